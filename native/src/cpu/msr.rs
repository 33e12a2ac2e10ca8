//! MSRs. RDMSR and WRMSR of a guest come here once the MSR bitmap let them through; so do root-mode software's.

use std::sync::atomic::Ordering;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::state::{cr0, efer, Cpu};

pub mod index {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}
use index::*;

/// MSRs without a function here that exist from reset, with their values.
pub const PLAIN: &[(u32, u64)] = &[
    (0x17, 0),
    (APIC_BASE, 0xfee0_0800),
    (0x3a, 0),
    (0x8b, 0),
    (0xe1, 0),
    (0x122, 0),
    (0x140, 0),
    (0x1a0, 1),
    (0x1c4, 0),
    (0x1c5, 0),
    (0x2ff, 0),
];

/// The value has bits the MSR does not have, or the MSR does not exist: #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// Host time since the first processor was made: one clock for all of them.
fn real_time() -> Duration {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed()
}

/// Canonical for 57-bit linear addresses, as MSRs check on processors that have LA57.
fn canonical57(value: u64) -> bool {
    ((value << 7) as i64 >> 7) as u64 == value
}

pub fn pat_valid(value: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|kind| matches!(kind, 0 | 1 | 4 | 5 | 6 | 7))
}

impl Cpu {
    /// This processor's own reckoning of the time-stamp counter.
    pub fn tsc_own(&self) -> u64 {
        let jump = self.shared.tsc_jump.load(Ordering::Relaxed);
        let ticks = if self.options.tsc_real {
            (real_time().as_nanos() * u128::from(self.options.tsc_hz) / 1_000_000_000) as u64
        } else {
            ((u128::from(self.icount) * u128::from(self.options.tsc_per_1024)) >> 10) as u64
        };
        self.tsc_base.get().wrapping_add(ticks).wrapping_add(jump)
    }

    /// The time-stamp counter before any VM's offset. Processors count their own instructions; whoever looks is
    /// brought up to the highest value that anyone on the platform has seen, so that time never runs backwards
    /// between processors.
    pub fn tsc(&self) -> u64 {
        let own = self.tsc_own();
        let seen = self.mem.tsc.fetch_max(own, Ordering::SeqCst);
        if seen > own {
            self.tsc_base
                .set(self.tsc_base.get().wrapping_add(seen - own));
            return seen;
        }
        own
    }

    /// What RDTSC gives the running guest.
    pub fn guest_tsc(&self) -> u64 {
        let tsc = self.tsc().wrapping_add(self.tsc_adjust);
        let scaled = match self.ctl.tsc_multiplier {
            0 => tsc,
            multiplier => ((u128::from(tsc) * u128::from(multiplier)) >> 48) as u64,
        };
        scaled.wrapping_add(self.ctl.tsc_offset)
    }

    pub fn msr_read(&self, msr: u32) -> Option<u64> {
        Some(match msr {
            TSC => self.tsc().wrapping_add(self.tsc_adjust),
            TSC_ADJUST => self.tsc_adjust,
            SPEC_CTRL => self.spec_ctrl,
            SYSENTER_CS => self.sysenter_cs,
            SYSENTER_ESP => self.sysenter_esp,
            SYSENTER_EIP => self.sysenter_eip,
            DEBUGCTL => self.debugctl,
            PAT => self.pat,
            XSS => self.xss,
            EFER => self.efer,
            STAR => self.star,
            LSTAR => self.lstar,
            CSTAR => self.cstar,
            FMASK => self.fmask,
            FS_BASE => self.seg[super::state::FS].base,
            GS_BASE => self.seg[super::state::GS].base,
            KERNEL_GS_BASE => self.kernel_gs_base,
            TSC_AUX => self.tsc_aux,
            PRED_CMD | FLUSH_CMD => return None,
            _ => return self.msrs.get(&msr).copied(),
        })
    }

    /// WRMSR with the checks of each register.
    pub fn msr_write(&mut self, msr: u32, value: u64) -> Result<(), Refused> {
        let check = |ok: bool| if ok { Ok(()) } else { Err(Refused) };
        match msr {
            TSC => {
                self.tsc_adjust = self.tsc_adjust.wrapping_add(value.wrapping_sub(self.tsc()));
            }
            TSC_ADJUST => {
                self.tsc_adjust = value;
            }
            SPEC_CTRL => {
                check(value >> 11 == 0)?;
                self.spec_ctrl = value;
            }
            PRED_CMD | FLUSH_CMD => check(value >> 1 == 0)?,
            SYSENTER_CS => self.sysenter_cs = value,
            SYSENTER_ESP => {
                check(canonical57(value))?;
                self.sysenter_esp = value;
            }
            SYSENTER_EIP => {
                check(canonical57(value))?;
                self.sysenter_eip = value;
            }
            DEBUGCTL => {
                check(value & !0xffff == 0)?;
                self.debugctl = value;
            }
            PAT => {
                check(pat_valid(value))?;
                self.pat = value;
            }
            XSS => {
                check(value & !self.options.xss_valid == 0)?;
                self.xss = value;
            }
            EFER => {
                check(value & !(efer::SCE | efer::LME | efer::LMA | efer::NXE) == 0)?;
                check(self.cr0 & cr0::PG == 0 || (value ^ self.efer) & efer::LME == 0)?;
                // LMA is not writable.
                self.efer = value & !efer::LMA | self.efer & efer::LMA;
                self.flush_tlb();
            }
            STAR => self.star = value,
            LSTAR => {
                check(canonical57(value))?;
                self.lstar = value;
            }
            CSTAR => {
                check(canonical57(value))?;
                self.cstar = value;
            }
            FMASK => {
                check(value >> 32 == 0)?;
                self.fmask = value;
            }
            FS_BASE => {
                check(canonical57(value))?;
                self.seg[super::state::FS].base = value;
                self.set_seg_bases();
            }
            GS_BASE => {
                check(canonical57(value))?;
                self.seg[super::state::GS].base = value;
                self.set_seg_bases();
            }
            KERNEL_GS_BASE => {
                check(canonical57(value))?;
                self.kernel_gs_base = value;
            }
            TSC_AUX => {
                check(value >> 32 == 0)?;
                self.tsc_aux = value;
            }
            _ => match self.msrs.get_mut(&msr) {
                Some(register) => *register = value,
                None => return Err(Refused),
            },
        }
        Ok(())
    }

    /// Gives this processor an MSR it has not had, or sets any MSR without checks: the platform describes itself.
    pub fn msr_define(&mut self, msr: u32, value: u64) {
        if self.msr_read(msr).is_none() || self.msrs.contains_key(&msr) {
            self.msrs.insert(msr, value);
        } else if msr == EFER {
            self.efer = value;
        } else {
            // A named register: its own checks stand, a refused value leaves it alone.
            let _ = self.msr_write(msr, value);
        }
    }
}
