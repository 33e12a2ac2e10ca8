//! MSRs, the TSC and counters, CPUID, random numbers.

use crate::cpu::flags::{Lazy, CF};
use crate::cpu::int::Int;
use crate::cpu::state::{cr4, Cpu, Stop, RAX, RCX, RDX};
use crate::cpu::uop::{last, step, Flow, Ip, Uop};
use crate::cpu::vmx_ctl::{primary, secondary};
use crate::cpu::vmx_exit::reason;

use super::*;

pub(super) fn rdmsr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let msr = cpu.gpr[RCX] as u32;
        if cpu.msr_exits(msr, false)? {
            return Err(cpu.exit_with(reason::RDMSR, 0));
        }
        let value = match cpu.x2apic_read(msr)? {
            Some(value) => value,
            None if msr == crate::cpu::msr::index::TSC => cpu.tsc_at(u),
            None => match cpu.msr_read(msr) {
                Some(value) => value,
                None => return Err(cpu.gp(0)),
            },
        };
        cpu.gpr[RAX] = value & 0xffff_ffff;
        cpu.gpr[RDX] = value >> 32;
        Ok(())
    })
}

pub(super) fn wrmsr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let msr = cpu.gpr[RCX] as u32;
        if cpu.msr_exits(msr, true)? {
            return Err(cpu.exit_with(reason::WRMSR, 0));
        }
        let value = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
        if !cpu.x2apic_write(msr, value)? && cpu.msr_write(msr, value).is_err() {
            return Err(cpu.gp(0));
        }
        cpu.refresh();
        Ok(cpu.sync_after(u))
    })
}

impl Cpu {
    fn msr_exits(&mut self, msr: u32, write: bool) -> Result<bool, Stop> {
        if !self.ctl.primary(primary::MSR_BITMAPS) {
            return Ok(true);
        }
        let half = match msr {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 0x400,
            _ => return Ok(true),
        };
        let bit = msr & 0x1fff;
        let at = (self.ctl.msr_bitmap | self.ctl.hkid)
            + half
            + u64::from(write) * 0x800
            + u64::from(bit >> 5) * 4;
        Ok(self.phys_rd32(at)? >> (bit & 31) & 1 != 0)
    }

    /// Virtualized x2APIC reads: `None` if the MSR is not one of them.
    fn x2apic_read(&mut self, msr: u32) -> Result<Option<u64>, Stop> {
        if !(0x800..=0x8ff).contains(&msr) || !self.ctl.secondary(secondary::X2APIC) {
            return Ok(None);
        }
        if msr != 0x808 && !self.ctl.secondary(secondary::APIC_REGISTER) {
            return Ok(None);
        }
        let offset = u64::from(msr & 0xff) << 4;
        let low = self.vapic_read(offset)?;
        let high = if msr == 0x830 {
            self.vapic_read(offset + 4)?
        } else {
            0
        };
        Ok(Some(u64::from(high) << 32 | u64::from(low)))
    }

    /// Virtualized x2APIC writes; `false` if the MSR is not one of them.
    fn x2apic_write(&mut self, msr: u32, value: u64) -> Result<bool, Stop> {
        if !self.ctl.secondary(secondary::X2APIC) {
            return Ok(false);
        }
        let delivery = self.ctl.secondary(secondary::VIRTUAL_INT);
        match msr {
            0x808 => {
                if value >> 8 != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0x80, value as u32)?;
                self.tpr_changed()?;
            }
            0x80b if delivery => {
                if value != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0xb0, 0)?;
                self.virtual_eoi()?;
            }
            0x83f if delivery => {
                if value >> 8 != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0x3f0, value as u32)?;
                if value >> 4 == 0 {
                    // Vectors below 16 go to the monitor.
                    let stop = self.exit_with(reason::APIC_WRITE, 0x3f0);
                    self.exit.after = true;
                    return Err(stop);
                }
                self.virtual_self_ipi(value as u8)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The guest's TSC at `u`, instructions of the running block before it included.
    pub fn tsc_at(&mut self, u: &Uop) -> u64 {
        let before = self.icount;
        self.icount += u64::from(u.n);
        let tsc = self.guest_tsc();
        self.icount = before;
        tsc
    }

    /// RDRAND and RDSEED: seeded, so that runs repeat.
    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.rng ^ self.options.seed.rotate_left(17);
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

pub(super) fn cpuid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| Err(cpu.exit_with(reason::CPUID, 0)))
}

/// RDTSC (`op` 0) and RDTSCP.
pub(super) fn rdtsc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if u.op == 1 && !cpu.ctl.secondary(secondary::RDTSCP) {
            return Err(cpu.ud());
        }
        if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        if cpu.ctl.primary(primary::RDTSC) {
            let reason = if u.op == 1 {
                reason::RDTSCP
            } else {
                reason::RDTSC
            };
            return Err(cpu.exit_with(reason, 0));
        }
        let tsc = cpu.tsc_at(u);
        cpu.gpr[RAX] = tsc & 0xffff_ffff;
        cpu.gpr[RDX] = tsc >> 32;
        if u.op == 1 {
            cpu.gpr[RCX] = cpu.tsc_aux & 0xffff_ffff;
        }
        Ok(())
    })
}

pub(super) fn rdpid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if !cpu.ctl.secondary(secondary::RDTSCP) {
            return Err(cpu.ud());
        }
        cpu.gpr[usize::from(u.dst)] = cpu.tsc_aux & 0xffff_ffff;
        Ok(())
    })
}

pub(super) fn rdpmc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if cpu.cr4 & cr4::PCE == 0 && cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        if cpu.ctl.primary(primary::RDPMC) {
            return Err(cpu.exit_with(reason::RDPMC, 0));
        }
        // No performance counters.
        Err(cpu.gp(0))
    })
}

pub(super) fn random<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let (control, reason) = if u.op == 0 {
            (secondary::RDRAND, reason::RDRAND)
        } else {
            (secondary::RDSEED, reason::RDSEED)
        };
        if cpu.ctl.secondary(control) {
            let size = match T::BYTES {
                2 => 0,
                4 => 1,
                _ => 2u32,
            };
            let stop = cpu.exit_with(reason, 0);
            cpu.exit.info = u32::from(u.dst) << 3 | size << 11;
            return Err(stop);
        }
        let value = cpu.random();
        T::set(cpu, u.dst, T::from64(value));
        cpu.cc = Lazy::bits(CF);
        Ok(())
    })
}
