//! Data breakpoints and OS bus-lock detection (SDM volume 3, 18.2 and 18.3.1.6): both trap behind the instruction.
//!
//! While a data breakpoint is enabled, instructions run one at a time (see `Cpu::plan`), and pages with a watched byte
//! have no host pointers, so every access to them comes by the slow paths, which look here.

use super::state::{Cpu, Stop, StopKind};

/// IA32_DEBUGCTL.BLD.
const DEBUGCTL_BLD: u64 = 1 << 2;
/// BLD in the pending debug exceptions and in an exit's qualification. In DR6 the bit is zero when it happened.
pub const BUS_LOCK: u64 = 1 << 11;
/// Of the pending debug exceptions: a breakpoint that DR7 enables was met.
const ENABLED: u64 = 1 << 12;

const CACHE_LINE: u64 = 64;
const PAGE: u64 = !0xfff;

/// Kinds of breakpoints in DR7.
const WRITES: u64 = 1;
const ACCESSES: u64 = 3;

impl Cpu {
    /// First byte and length of the data breakpoint `number`, if it is enabled for such accesses.
    fn breakpoint(&self, number: usize, write: bool) -> Option<(u64, u64)> {
        let dr7 = self.dr[7];
        let kind = dr7 >> (16 + number * 4) & 3;
        let wanted = kind == ACCESSES || write && kind == WRITES;
        let length = [1, 2, 8, 4][(dr7 >> (18 + number * 4) & 3) as usize];
        (wanted && dr7 >> (number * 2) & 3 != 0)
            .then_some((self.dr[number] & !(length - 1), length))
    }

    /// Whether any data breakpoint is enabled.
    pub fn watching(&self) -> bool {
        self.dr[7] & 0xff != 0 && (0..4).any(|number| self.breakpoint(number, true).is_some())
    }

    /// Whether the page of `linear` has a watched byte. (No watched range crosses pages: they are aligned.)
    pub fn watched_page(&self, linear: u64) -> bool {
        self.dr[7] & 0xff != 0
            && (0..4).any(|number| {
                self.breakpoint(number, true)
                    .is_some_and(|(start, _)| start & PAGE == linear & PAGE)
            })
    }

    /// An access of the running instruction was made: remembers the data breakpoints that it meets.
    pub fn watch(&mut self, linear: u64, size: u64, write: bool) {
        if self.dr[7] & 0xff == 0 {
            return;
        }
        for number in 0..4 {
            if let Some((start, length)) = self.breakpoint(number, write) {
                // Distances, since an access may wrap around the end of the address space.
                if start.wrapping_sub(linear) < size || linear.wrapping_sub(start) < length {
                    self.hits |= 1 << number | ENABLED;
                }
            }
        }
    }

    /// A locked access that is not aligned. If it locks the bus where that traps, the instruction is run alone first.
    pub fn split_lock(&mut self, linear: u64, size: u64) -> Result<(), Stop> {
        let splits = linear % CACHE_LINE + size > CACHE_LINE;
        if splits && self.debugctl & DEBUGCTL_BLD != 0 && self.cpl > 0 {
            if !self.step {
                self.stop = StopKind::Restart;
                return Err(Stop);
            }
            self.hits |= BUS_LOCK;
        }
        Ok(())
    }

    /// Whether a repeated string instruction stops behind the iteration just done.
    pub fn trap_each(&self) -> bool {
        self.hits != 0
            || self.flags & super::flags::TF != 0
            || self.ctl.primary(super::vmx_ctl::primary::MTF)
    }
}
