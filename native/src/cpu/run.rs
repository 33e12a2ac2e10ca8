//! The run loop: finds the next block, executes it, and looks around at every block boundary.

use std::sync::atomic::Ordering;

use super::block::{Cache, NONE};
use super::decode::mode;
use super::exception::Event;
use super::flags::{RF, TF};
use super::state::{block, Cpu, Stop, StopKind, BLOCK};
use super::uop::{Flow, Ip};
use super::walk::access;

/// Why the run loop returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A VM exit: its reason, as in the VMCS.
    Exit(u32),
    /// The escape instruction of a hook; the guest is live.
    Escape(u16),
    /// A good moment for the caller to look for signals; the guest is live.
    Pause,
}

/// Instructions between two pauses.
const SLICE: u64 = 50_000_000;

/// Instructions between two looks at what other threads want.
const LOOK: u64 = 256;

/// How the loop goes on.
enum Next {
    Go,
    Leave(Outcome),
}

impl Cpu {
    /// Runs the loaded guest until something ends the run.
    pub fn run(&mut self) -> Outcome {
        let mut cache = self.cache.take().unwrap_or_default();
        if self.slot.enter() {
            self.drop_pointers();
        }
        let keys = self.mem.key_generation();
        if cache.key_generation != keys {
            cache.clear();
            self.drop_pointers();
            cache.key_generation = keys;
        }
        if self.watching() {
            self.tlb.drop_pointers();
        }
        self.pause_at = self.icount + SLICE;
        self.plan();
        // What was posted before the run is met at its first boundary: a pending interrupt ends it at once.
        self.look_at = self.icount;
        let outcome = self.run_loop(&mut cache);
        self.slot.leave();
        self.cache = Some(cache);
        if let Ok(mut shown) = self.shared.counters.lock() {
            shown.clear();
            shown.extend(self.counter_list());
        }
        outcome
    }

    fn run_loop(&mut self, cache: &mut Cache) -> Outcome {
        let mem = self.mem.clone();
        // The block to run next, if it is known; and the block just left, with the side it was left by.
        let mut next = NONE;
        let mut left = (NONE, 0);
        loop {
            if self.icount >= self.look_at {
                let before = (self.rip, self.code_space, self.mode);
                if let Next::Leave(outcome) = self.look_around(cache) {
                    return outcome;
                }
                if before != (self.rip, self.code_space, self.mode) {
                    next = NONE;
                    left.0 = NONE;
                }
                if self.icount >= self.look_at {
                    continue;
                }
            }
            if next == NONE || !cache.fresh(next, mem.code_stores.load(Ordering::Acquire)) {
                let era = cache.era;
                let Some(found) = self.next_block(cache, next) else {
                    next = NONE;
                    left.0 = NONE;
                    match self.stopped() {
                        Next::Go => continue,
                        Next::Leave(outcome) => return outcome,
                    }
                };
                if left.0 != NONE && era == cache.era {
                    let same = (self.gpr[BLOCK] ^ self.rip) >> 12 == 0;
                    cache.link(left.0, left.1, found, same, self.code_space);
                }
                next = found;
            }
            let index = next;
            let block = &cache.blocks[index as usize];
            self.gpr[BLOCK] = self.rip;
            self.code.pa = block.pa;
            self.code.len = block.bytes.into();
            if block.crosses {
                self.code = cache.running(index);
            }
            let ip = Ip::start(&cache.uops[block.first as usize..]);
            let flow = (ip.op().run)(self, ip);
            // The sides are taken apart by branches on purpose: the host predicts them, where a table would make the
            // next block wait for the guest's condition.
            if flow == Flow::Taken {
                self.icount += u64::from(block.count);
                self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.taken));
                next = cache.follow(index, 1, self.code_space);
                left = (index, 1);
            } else if flow == Flow::Next {
                self.icount += u64::from(block.count);
                self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.bytes.into()));
                next = cache.follow(index, 0, self.code_space);
                left = (index, 0);
            } else if flow == Flow::Jump {
                self.icount += u64::from(block.count);
                next = cache.jump(self.rip, self.code_space, self.mode);
                left.0 = NONE;
            } else {
                self.icount += u64::from(self.partial);
                next = NONE;
                left.0 = NONE;
                if let Next::Leave(outcome) = self.stopped() {
                    return outcome;
                }
            }
        }
    }

    /// Every [`LOOK`] instructions or when something is due: shootdowns, events, single steps.
    #[cold]
    #[inline(never)]
    fn look_around(&mut self, cache: &mut Cache) -> Next {
        self.poll();
        let due = self.attention
            || self.icount >= self.icount_stop
            || self.shared.events.load(Ordering::Relaxed) != 0;
        if due {
            if let Next::Leave(outcome) = self.boundary() {
                return Next::Leave(outcome);
            }
        }
        if self.step {
            return self.single(cache);
        }
        if let Some(samples) = self.samples.as_mut().filter(|_| !due) {
            // Not where something was due: such places would be seen more often than their share.
            samples.look(self.rip, self.icount);
        }
        self.look_at = if self.attention {
            // What is due cannot be done now: look again behind the next block.
            self.icount + 1
        } else {
            self.icount_stop.clamp(self.icount + 1, self.icount + LOOK)
        };
        Next::Go
    }

    fn set_look(&mut self) {
        self.look_at = if self.attention || self.step {
            0
        } else {
            self.icount_stop.min(self.icount + LOOK)
        };
    }

    /// One instruction, alone: after a store into the running block, in a shadow, or with a trap to follow.
    fn single(&mut self, cache: &mut Cache) -> Next {
        let Some(index) = self.next_block(cache, NONE) else {
            return self.stopped();
        };
        let block = cache.blocks[index as usize];
        self.gpr[BLOCK] = self.rip;
        self.code = cache.running(index);
        self.hits = 0;
        let trap = self.single_stepping();
        let shadow = self.blocking & (block::STI | block::MOV_SS);
        let ip = Ip::start(&cache.uops[block.first as usize..]);
        let flow = (ip.op().run)(self, ip);
        let mut completed = true;
        match flow {
            Flow::Next => self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.bytes.into())),
            Flow::Taken => self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.taken)),
            Flow::Jump => {}
            Flow::Stop => {
                // An interrupted REP is synchronised too, but it is not complete.
                completed = self.stop == StopKind::Sync && self.partial == u32::from(block.count);
                if !completed {
                    self.icount += u64::from(self.partial);
                    if self.stop == StopKind::Sync {
                        // One iteration of a repeated instruction is a step of its own.
                        self.trap_after(trap);
                    }
                    self.hits = 0;
                    return self.stopped();
                }
            }
        }
        if completed {
            self.icount += u64::from(block.count);
            self.flags &= !RF;
            self.blocking &= !shadow;
            self.step = false;
            self.trap_after(trap);
            self.plan();
        }
        Next::Go
    }

    /// A block for RIP whose bytes are those in memory. `candidate`: one that was not checked lately, or `NONE`.
    #[inline(never)]
    fn next_block(&mut self, cache: &mut Cache, candidate: u32) -> Option<u32> {
        let mut index = if candidate == NONE {
            self.find_block(cache)?
        } else {
            candidate
        };
        while !cache.fresh(index, self.mem.code_stores.load(Ordering::Acquire))
            && !cache.check(index, self)
        {
            // Forgets what the jump table knows about the block.
            self.fresh_code_space();
            index = self.find_block(cache)?;
        }
        Some(index)
    }

    /// The block at RIP: looked up by linear, then by physical address, else decoded. `None`: `stop` says why.
    fn find_block(&mut self, cache: &mut Cache) -> Option<u32> {
        self.counters.lookups += 1;
        let mode = self.mode | if self.step { mode::STEP } else { 0 };
        let known = cache.jump(self.rip, self.code_space, mode);
        if known != NONE {
            return Some(known);
        }
        let linear = self.fetch_linear()?;
        let pa = self
            .translate(linear, access::EXEC, self.tag & 3)
            .map_err(|stop| self.fetch_fault(stop))
            .ok()?;
        let index = match cache.find(pa, mode) {
            Some(index) => {
                let second = cache.second_page(index);
                if second != 0 && self.second_page(linear).ok()? != second {
                    self.decode(cache, linear, pa, mode)?
                } else {
                    index
                }
            }
            None => self.decode(cache, linear, pa, mode)?,
        };
        cache.note_jump(self.rip, self.code_space, mode, index);
        Some(index)
    }

    fn decode(&mut self, cache: &mut Cache, linear: u64, pa: u64, mode: u32) -> Option<u32> {
        match cache.decode_at(self, pa, mode, |cpu| cpu.second_page(linear)) {
            Ok(Some(index)) => Some(index),
            Ok(None) => {
                // The memory behind the code is gone or poisoned.
                self.machine_check();
                None
            }
            Err(Stop) => None,
        }
    }

    /// Linear address of the next instruction; a limit or canonical fault if it has none.
    fn fetch_linear(&mut self) -> Option<u64> {
        if self.long {
            return Some(self.rip);
        }
        let cs = self.seg[super::state::CS];
        if self.rip > u64::from(cs.limit) {
            self.gp(0);
            return None;
        }
        Some(self.rip.wrapping_add(cs.base) & 0xffff_ffff)
    }

    fn second_page(&mut self, linear: u64) -> Result<u64, Stop> {
        let next = (linear & !0xfff).wrapping_add(0x1000);
        let next = if self.long { next } else { next & 0xffff_ffff };
        self.translate(next, access::EXEC, self.tag & 3)
            .map_err(|stop| self.fetch_fault(stop))
    }

    fn fetch_fault(&mut self, stop: Stop) -> Stop {
        if self.stop == StopKind::Canonical {
            return self.gp(0);
        }
        stop
    }

    /// Declares a page as code; `None` if it cannot be read.
    pub fn watch_code(&mut self, pa: u64) -> Option<u32> {
        let result = self.mem.mark_code(pa, self.guest_agent());
        self.poll();
        result.ok()
    }

    /// What stopped the instruction at RIP.
    fn stopped(&mut self) -> Next {
        match self.stop {
            StopKind::Exception { vector, error } => {
                match self.take(Event::hardware(vector, error)) {
                    Ok(()) => {
                        self.step = false;
                        self.plan();
                        Next::Go
                    }
                    Err(Stop) => self.stopped(),
                }
            }
            StopKind::Exit => {
                if self.exit.after {
                    self.icount += 1;
                }
                Next::Leave(Outcome::Exit(self.finish_exit()))
            }
            StopKind::Restart => {
                self.step = true;
                self.set_look();
                Next::Go
            }
            StopKind::Escape { hook } => {
                self.live = true;
                Next::Leave(Outcome::Escape(hook))
            }
            StopKind::Canonical => {
                self.gp(0);
                self.stopped()
            }
            StopKind::Sync | StopKind::None => {
                self.plan();
                Next::Go
            }
        }
    }

    /// Works out whether the next boundary has anything to do, and whether the next instruction must stand alone.
    pub fn plan(&mut self) {
        self.attention = self.work_pending();
        let breakpoints = self.dr[7] & 0xff != 0;
        self.step = self.step
            || self.flags & TF != 0
            || breakpoints
            || self.blocking & (block::STI | block::MOV_SS) != 0
            || self.ctl.primary(super::vmx_ctl::primary::MTF);
        self.plan_timers();
        self.set_look();
    }

    /// A time to look around: boundary work that is due now.
    fn boundary(&mut self) -> Next {
        match self.boundary_work() {
            Ok(None) => Next::Go,
            Ok(Some(outcome)) => Next::Leave(outcome),
            Err(Stop) => self.stopped(),
        }
    }
}
