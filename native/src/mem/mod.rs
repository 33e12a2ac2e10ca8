//! DRAM behind the memory-encryption engine: MKTME with integrity (MKTME-i), as TDX uses it.
//!
//! A physical address (`pa`) is what software writes: the DRAM address with a KeyID on top of it, in bits
//! 51:(52 - keyid_bits). Bits 63:52 are reserved. Every access is made by an [`Agent`].
//!
//! **Encryption is real, and lazy.** A line remembers the key that wrote it (a tag, one for each programming of a
//! KeyID) and lies there as plaintext while reader and writer agree. Ciphertext (AES-XTS) and MAC are made when
//! somebody looks with another key or with a probe, and kept once a probe has changed them. What an access does
//! to a line is in `lines.rs`, how a page remembers it in `page.rs`, the cryptography in `engine.rs`.
//!
//! KeyIDs: KeyID 0 is TME's. A shared KeyID without a key of its own behaves as KeyID 0. A private KeyID without
//! a key refuses every access (BusFault): no sound TDX module makes one.
//!
//! # Pointers for a TLB, and how they are taken back
//!
//! [`Memory::page_ptr`] hands a running processor a host pointer to a page. The pointer stays right until the
//! memory takes it back, which it does by a *shootdown*: it raises the epoch and waits until each processor that
//! is running has acknowledged the new epoch (why this is sound and free of deadlock: `shootdown.rs`). What a
//! processor must do with its [`CpuSlot`]:
//!
//! 1. `enter()` before it uses any pointer; `true` means: drop every pointer you hold.
//! 2. `poll()` at block boundaries, and after *every* call into `Memory` that was given its slot (such a call may
//!    have waited, and while it waits the processor counts as not running). `true` means: drop every pointer
//!    you hold, also the one that the very call returned, and ask again.
//! 3. `leave()` before anything that may block (a VM exit, the GIL, a wait for an interrupt).
//!
//! Decoded code is kept by `pa` with the generation that [`Memory::mark_code`] gave; it is stale once
//! [`Memory::code_gen`] differs, or [`Memory::key_generation`] changed.

mod access;
pub mod bytes;
mod config;
mod dram;
mod engine;
mod keys;
mod lines;
mod page;
mod probe;
mod seamrr;
mod shootdown;
#[cfg(test)]
mod tests;
mod walks;

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};

pub use config::{Config, Integrity, Unfit, LINE, PAGE, PA_BITS};
pub use engine::KeyPair;
pub use probe::RawLine;
pub use shootdown::CpuSlot;
pub use walks::{PamtPath, Reached, TOP_LEVEL};

use dram::Dram;
use keys::{KeyTable, Tag};
use page::MixedPages;
use seamrr::Seamrr;
use shootdown::Shootdown;

/// On whose behalf the bus is used. It decides which KeyIDs may be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// Outside SEAM mode: host software, devices. May name shared KeyIDs only.
    Host,
    /// SEAM root and SEAM non-root mode. May name every KeyID.
    Seam,
}

/// Who makes an access: the mode, and the processor's slot if the access comes from a processor.
#[derive(Clone, Copy)]
pub struct Agent<'a> {
    pub mode: Requester,
    /// `None` for anything that never holds page pointers.
    pub cpu: Option<&'a CpuSlot>,
}

impl Agent<'static> {
    pub const HOST: Agent<'static> = Agent {
        mode: Requester::Host,
        cpu: None,
    };
    pub const SEAM: Agent<'static> = Agent {
        mode: Requester::Seam,
        cpu: None,
    };
}

/// Why an access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Reserved address bits, a private KeyID named outside SEAM mode, or a private KeyID without a key.
    Bus { pa: u64 },
    /// #MC: poison was consumed; `pa` is the line's address with the KeyID of the reader.
    MachineCheck { pa: u64 },
}

/// What [`Memory::page_ptr`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageAccess {
    /// The 4 KiB page starts here. It is shared with other threads: see [`bytes`].
    Direct(*mut u8),
    /// This page cannot be used through a pointer now: use [`Memory::read`], [`Memory::write`] and the like.
    Slow,
}

/// All DRAM of a platform, behind its memory-encryption engine. Shared by reference; nothing in it ever moves.
pub struct Memory {
    dram: Dram,
    keys: KeyTable,
    mixed: MixedPages,
    shootdown: Shootdown,
    integrity: Integrity,
    seamrr: Seamrr,
    address_bits: u32,
    address_mask: u64,
    /// The highest time-stamp that a processor of this platform has shown: none shows a lower one later. It stands
    /// here because the memory is what the processors of a platform have in common.
    pub tsc: AtomicU64,
    /// Changes with every generation of any code page: while it stands still, nothing decoded is stale.
    pub code_stores: AtomicU64,
}

/// `Memory` is shared between threads; this fails to compile if a part of it cannot be.
const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Memory>();
};

impl Memory {
    pub fn new(config: &Config) -> Result<Memory, Unfit> {
        config.check()?;
        Ok(Memory {
            dram: Dram::new(&config.ranges)?,
            keys: KeyTable::new(config),
            mixed: MixedPages::new(),
            shootdown: Shootdown::new(),
            integrity: config.integrity,
            seamrr: Seamrr::default(),
            address_bits: config.address_bits(),
            address_mask: (1 << config.address_bits()) - 1,
            tsc: AtomicU64::new(0),
            code_stores: AtomicU64::new(0),
        })
    }

    /// PCONFIG: gives `keyid` a new key (drawn from the seeded source if `None`). It cannot read what the old key
    /// wrote. `agent` is who asks: a running processor must pass its slot.
    pub fn set_key(&self, keyid: u32, pair: Option<KeyPair>, agent: Agent) -> Result<(), Unfit> {
        self.reprogram(agent, || self.keys.program(keyid, pair))
    }

    /// Takes the key of `keyid` away: a private KeyID is refused from now on, a shared one behaves as KeyID 0.
    pub fn clear_key(&self, keyid: u32, agent: Agent) -> Result<(), Unfit> {
        self.reprogram(agent, || self.keys.clear(keyid))
    }

    /// Changes whenever a key was set or cleared: decoded code (kept by `pa`) must then be dropped.
    pub fn key_generation(&self) -> u64 {
        self.keys.generation()
    }

    /// (KeyID, DRAM address) of a `pa`. BusFault for reserved bits.
    #[inline(always)]
    pub fn split(&self, pa: u64) -> Result<(u32, u64), Fault> {
        if pa >> PA_BITS != 0 {
            return Err(Fault::Bus { pa });
        }
        Ok(((pa >> self.address_bits) as u32, pa & self.address_mask))
    }

    /// From now on a Host access to the range is aborted: reads give ones, writes are dropped. Pointers that were
    /// handed out before are taken back.
    pub fn set_seamrr(&self, base: u64, size: u64, agent: Agent) {
        self.seamrr.set(base, size);
        let parked = shootdown::park(agent.cpu);
        self.shootdown.take_back(agent.cpu);
        drop(parked);
    }

    pub fn is_private(&self, keyid: u32) -> bool {
        self.keys.is_private(keyid)
    }

    /// Whether DRAM answers at this address; the KeyID does not matter.
    pub fn is_dram(&self, pa: u64) -> bool {
        pa >> PA_BITS == 0 && self.dram.page(pa & self.address_mask).is_some()
    }

    /// A new processor of this platform. It is forgotten when the last reference drops.
    pub fn register_cpu(&self) -> Arc<CpuSlot> {
        self.shootdown.register()
    }

    /// The owner bit of a line that `writer` writes.
    fn owns(&self, writer: Tag) -> bool {
        self.integrity != Integrity::None && writer.is_private()
    }

    fn reprogram(
        &self,
        agent: Agent,
        program: impl FnOnce() -> Result<(), Unfit>,
    ) -> Result<(), Unfit> {
        let parked = shootdown::park(agent.cpu);
        let _one = self
            .keys
            .programming
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        program()?;
        self.shootdown.take_back(agent.cpu);
        drop(parked);
        Ok(())
    }
}
