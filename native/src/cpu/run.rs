//! The run loop: finds the next block, executes it, and looks around at every block boundary.

use std::sync::atomic::Ordering;

use super::block::Cache;
use super::decode::mode;
use super::exception::Event;
use super::flags::{RF, TF};
use super::state::{block, Cpu, RunningCode, Stop, StopKind, BLOCK};
use super::uop::{Flow, Ip, Uop};
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
            self.tlb.drop_pointers();
        }
        let keys = self.mem.key_generation();
        if cache.key_generation != keys {
            cache.clear();
            self.tlb.drop_pointers();
            cache.key_generation = keys;
        }
        self.pause_at = self.icount + SLICE;
        self.plan();
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
        // The block just executed, and the side it was left by.
        let mut left: Option<(u32, usize, u64)> = None;
        loop {
            self.poll();
            if self.attention
                || self.icount >= self.icount_stop
                || self.shared.events.load(Ordering::Relaxed) != 0
            {
                left = None;
                if let Next::Leave(outcome) = self.boundary() {
                    return outcome;
                }
            }
            let era = cache.era;
            let chained =
                left.and_then(|(from, side, _)| cache.follow(from, side, self.code_space));
            let index = match chained {
                Some(index) if cache.fresh(index, &self.mem) => index,
                _ => match self.next_block(cache, chained) {
                    Some(index) => {
                        if let (Some((from, side, page)), true) = (left, era == cache.era) {
                            let same = page == self.rip & !0xfff;
                            cache.link(from, side, index, same, self.code_space);
                        }
                        index
                    }
                    None => match self.stopped() {
                        Next::Go => {
                            left = None;
                            continue;
                        }
                        Next::Leave(outcome) => return outcome,
                    },
                },
            };
            let block = &cache.blocks[index as usize];
            self.gpr[BLOCK] = self.rip;
            self.code.pa = block.pa;
            self.code.len = block.bytes.into();
            if block.pa2 != 0 {
                let in_first = 0x1000 - (block.pa & 0xfff);
                self.code = RunningCode {
                    pa: block.pa,
                    len: in_first,
                    pa2: block.pa2,
                    len2: u64::from(block.bytes) - in_first,
                };
            }
            let uops: &[Uop] =
                &cache.uops[block.first as usize..(block.first + block.uops) as usize];
            let ip = Ip::start(uops);
            let stepping = self.step;
            let (trap, shadow) = (
                self.single_stepping(),
                self.blocking & (block::STI | block::MOV_SS),
            );
            let page = self.rip & !0xfff;
            let flow = (ip.op().run)(self, ip);
            let mut completed = true;
            match flow {
                Flow::Next => {
                    self.icount += u64::from(block.count);
                    self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.bytes.into()));
                    left = Some((index, 0, page));
                }
                Flow::Taken => {
                    self.icount += u64::from(block.count);
                    self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(block.taken));
                    left = Some((index, 1, page));
                }
                Flow::Jump => {
                    self.icount += u64::from(block.count);
                    left = None;
                }
                Flow::Stop => {
                    self.icount += u64::from(self.partial);
                    left = None;
                    // An interrupted REP is synchronised too, but it is not complete.
                    completed = self.stop == StopKind::Sync && self.partial == block.count;
                    match self.stopped() {
                        Next::Go => {}
                        Next::Leave(outcome) => return outcome,
                    }
                }
            }
            self.code.len2 = 0;
            if stepping {
                left = None;
                if completed {
                    self.stepped(trap, shadow);
                }
            }
        }
    }

    /// A block for RIP whose bytes are those in memory. `candidate`: one whose page was written.
    #[inline(never)]
    fn next_block(&mut self, cache: &mut Cache, candidate: Option<u32>) -> Option<u32> {
        let mut index = match candidate {
            Some(index) => index,
            None => self.find_block(cache)?,
        };
        while !cache.fresh(index, &self.mem) && !cache.refresh(index, self) {
            // Forgets what the jump table knows about the block.
            self.code_space += 1;
            index = self.find_block(cache)?;
        }
        Some(index)
    }

    /// The block at RIP: looked up by linear, then by physical address, else decoded. `None`: `stop` says why.
    fn find_block(&mut self, cache: &mut Cache) -> Option<u32> {
        self.counters.lookups += 1;
        let mode = self.mode | if self.step { mode::STEP } else { 0 };
        if let Some(index) = cache.jump(self.rip, self.code_space, mode) {
            return Some(index);
        }
        let linear = self.fetch_linear()?;
        let pa = self
            .translate(linear, access::EXEC, self.tag & 3)
            .map_err(|stop| self.fetch_fault(stop))
            .ok()?;
        let index = match cache.find(pa, mode) {
            Some(index) => {
                let second = cache.blocks[index as usize].pa2;
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

    /// An instruction that was executed alone is complete. `trap`: TF was set before it; `shadow`: blocking that was
    /// in force for it.
    fn stepped(&mut self, trap: bool, shadow: u32) {
        self.flags &= !RF;
        self.blocking &= !shadow;
        self.step = false;
        self.trap_after(trap);
        self.plan();
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
