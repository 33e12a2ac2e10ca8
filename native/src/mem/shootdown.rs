//! Taking page pointers back from processors that run.
//!
//! A processor that runs holds host pointers to pages in its TLB. Before such a page stops being plain under that
//! key, every holder must have dropped them. The parts:
//!
//! - the *epoch*, one counter a memory, raised by each shootdown;
//! - a [`CpuSlot`] a processor: `running`, and `acked`, the newest epoch for which it has dropped its pointers.
//!
//! The one who takes back (holding the page's lock, so that nobody gets a new pointer to it):
//! raises the epoch; full fence; waits for each slot until `!running` or `acked >= epoch`.
//! The processor that begins: `running = true`; full fence; reads the epoch; if it is new, drops its pointers.
//! With a full fence on both sides, one of the two sees the other (Dekker): a pointer is either waited for or
//! dropped before use. `acked` is stored with release order, so the accesses before it have happened.
//!
//! A completed shootdown takes back *every* pointer handed out before its epoch. A page remembers the epoch of its
//! last pointer, so a host that reclaims many pages of a dead TD interrupts the living ones once, not each time.
//!
//! **No deadlock.** A processor that has to wait inside `Memory` (for a page lock, or in a shootdown of its own)
//! *parks*: it counts as not running meanwhile, so nobody waits for one who waits. The price: pointers may have
//! been taken back without its answer, so it must `poll` after each call. A processor leaves before it blocks
//! elsewhere (the GIL, an interrupt), so one that runs reaches a block boundary by its own strength.

use std::hint;
use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::thread;

/// A processor's part in shootdowns. One thread at a time uses it.
pub struct CpuSlot {
    running: AtomicBool,
    acked: AtomicU64,
    epoch: Arc<AtomicU64>,
}

impl CpuSlot {
    /// The processor starts to run guest code. `true`: drop every page pointer first.
    pub fn enter(&self) -> bool {
        self.running.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.poll()
    }

    /// At block boundaries and after every `Memory` call. `true`: drop every page pointer now.
    #[inline(always)]
    pub fn poll(&self) -> bool {
        let epoch = self.epoch.load(Ordering::Acquire);
        if epoch == self.acked.load(Ordering::Relaxed) {
            return false;
        }
        self.acked.store(epoch, Ordering::Release);
        true
    }

    /// The processor stops running; pointers may go stale from here on, `enter` tells.
    pub fn leave(&self) {
        self.running.store(false, Ordering::Release);
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Relaxed)
    }

    fn park(&self) -> Option<Parked<'_>> {
        if !self.is_running() {
            return None;
        }
        self.leave();
        Some(Parked(self))
    }
}

/// While this lives, its processor counts as not running.
pub(super) struct Parked<'a>(&'a CpuSlot);

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.0.running.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }
}

pub(super) fn park(cpu: Option<&CpuSlot>) -> Option<Parked<'_>> {
    cpu.and_then(CpuSlot::park)
}

/// The epoch and everybody who must follow it.
pub(super) struct Shootdown {
    epoch: Arc<AtomicU64>,
    /// No pointer handed out before this epoch is in use.
    done: AtomicU64,
    slots: RwLock<Vec<Weak<CpuSlot>>>,
}

impl Shootdown {
    pub fn new() -> Shootdown {
        Shootdown {
            epoch: Arc::new(AtomicU64::new(1)),
            done: AtomicU64::new(1),
            slots: RwLock::new(Vec::new()),
        }
    }

    pub fn register(&self) -> Arc<CpuSlot> {
        let slot = Arc::new(CpuSlot {
            running: AtomicBool::new(false),
            acked: AtomicU64::new(self.epoch.load(Ordering::Acquire)),
            epoch: self.epoch.clone(),
        });
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|known| known.strong_count() > 0);
        slots.push(Arc::downgrade(&slot));
        slot
    }

    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Returns when nobody uses a pointer that was handed out up to the epoch `since`.
    pub fn take_back_since(&self, since: u64, me: Option<&CpuSlot>) {
        if since >= self.done.load(Ordering::Acquire) {
            self.take_back(me);
        }
    }

    /// Returns when no running processor but `me` uses a pointer that it got before this call.
    pub fn take_back(&self, me: Option<&CpuSlot>) {
        let _parked = park(me);
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        fence(Ordering::SeqCst);
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        for slot in slots.iter().filter_map(Weak::upgrade) {
            let mut wait = Backoff::default();
            while slot.running.load(Ordering::Acquire) && slot.acked.load(Ordering::Acquire) < epoch
            {
                wait.pause();
            }
        }
        self.done.fetch_max(epoch, Ordering::AcqRel);
    }
}

/// Waits for something that another thread does within microseconds, if the host lets it run.
#[derive(Default)]
pub(super) struct Backoff(u32);

impl Backoff {
    pub fn pause(&mut self) {
        self.0 += 1;
        if self.0 < 64 {
            hint::spin_loop();
        } else {
            thread::yield_now();
        }
    }
}
