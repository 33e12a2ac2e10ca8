//! Control and debug registers, the machine status word.

use crate::cpu::int::Int;
use crate::cpu::state::{cr0, cr4, Cpu, Stop};
use crate::cpu::uop::{last, step, Flow, Ip, Uop};
use crate::cpu::vmx_ctl::primary;
use crate::cpu::vmx_exit::reason;

use super::*;

pub(super) fn mov_to_cr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let mut value = cpu.gpr[usize::from(u.src)];
        if !cpu.long {
            value &= 0xffff_ffff;
        }
        cpu.intercept_cr_write(u.op, u.src, value)?;
        match u.op {
            0 => cpu.write_cr0(value)?,
            2 => cpu.cr2 = value,
            3 => cpu.write_cr3(value)?,
            4 => cpu.write_cr4(value)?,
            _ => {
                if value >> 4 != 0 {
                    return Err(cpu.gp(0));
                }
                if cpu.ctl.primary(primary::TPR_SHADOW) {
                    cpu.vapic_write(0x80, (value << 4) as u32)?;
                    cpu.tpr_changed()?;
                } else {
                    cpu.cr8 = value;
                }
            }
        }
        Ok(cpu.sync_after(u))
    })
}

pub(super) fn mov_from_cr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        cpu.intercept_cr_read(u.op, u.dst)?;
        let value = match u.op {
            0 => cpu.cr0_seen(),
            2 => cpu.cr2,
            3 => cpu.cr3,
            4 => cpu.cr4_seen(),
            _ if cpu.ctl.primary(primary::TPR_SHADOW) => u64::from(cpu.vapic_read(0x80)? >> 4 & 15),
            _ => cpu.cr8,
        };
        cpu.gpr[usize::from(u.dst)] = if cpu.long { value } else { value & 0xffff_ffff };
        Ok(())
    })
}

pub(super) fn clts(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let ctl = &cpu.ctl;
        if ctl.cr0_mask & cr0::TS != 0 {
            if ctl.cr0_shadow & cr0::TS != 0 {
                return Err(cpu.exit_with(reason::CR_ACCESS, 2 << 4));
            }
            return Ok(Flow::Next);
        }
        let value = cpu.cr0 & !cr0::TS;
        cpu.write_cr0(value)?;
        Ok(cpu.sync_after(u))
    })
}

pub(super) fn lmsw(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let source = if u.mem {
            let at = cpu.ea(u)?;
            cpu.exit.linear = at;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let new = u64::from(source & 15);
        let ctl = &cpu.ctl;
        // PE can be set, not cleared; the mask decides bit by bit.
        let differs = (new ^ ctl.cr0_shadow) & ctl.cr0_mask & 0xe != 0
            || new & 1 != 0 && ctl.cr0_mask & 1 != 0 && ctl.cr0_shadow & 1 == 0;
        if differs {
            let linear = cpu.exit.linear;
            let stop = cpu.exit_with(
                reason::CR_ACCESS,
                3 << 4 | u64::from(u.mem) << 6 | u64::from(source) << 16,
            );
            cpu.exit.linear = linear;
            return Err(stop);
        }
        let value = cpu.cr0 & !0xe | new;
        cpu.write_cr0(value)?;
        Ok(cpu.sync_after(u))
    })
}

/// UMIP: SGDT, SIDT, SLDT, SMSW, STR are the supervisor's.
pub(super) fn umip(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

/// Stores a 16-bit system value: memory gets 16 bits, a register its operand size.
pub(super) fn store_system(cpu: &mut Cpu, u: &Uop, value: u64) -> Result<(), Stop> {
    if u.mem {
        let at = cpu.ea(u)?;
        return cpu.store::<u16>(at, value as u16);
    }
    match u.size {
        2 => u16::set(cpu, u.dst, value as u16),
        4 => cpu.gpr[usize::from(u.dst)] = value & 0xffff_ffff,
        _ => cpu.gpr[usize::from(u.dst)] = value,
    }
    Ok(())
}

pub(super) fn smsw(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        umip(cpu)?;
        let value = cpu.cr0_seen();
        store_system(cpu, u, value)
    })
}

pub(super) fn mov_dr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let to = u.rep == 0xff;
        let register = if to { u.src } else { u.dst };
        let mut number = usize::from(u.op);
        if number > 7 {
            return Err(cpu.ud());
        }
        if matches!(number, 4 | 5) {
            if cpu.cr4 & cr4::DE != 0 {
                return Err(cpu.ud());
            }
            number += 2;
        }
        if cpu.ctl.primary(primary::MOV_DR) {
            let qualification = u64::from(u.op) | u64::from(!to) << 4 | u64::from(register) << 8;
            return Err(cpu.exit_with(reason::DR_ACCESS, qualification));
        }
        if cpu.dr[7] & 1 << 13 != 0 {
            cpu.pending_debug |= 1 << 13;
            return Err(cpu.raise(1, None));
        }
        if !to {
            let value = cpu.dr[number];
            cpu.gpr[usize::from(register)] = if cpu.long { value } else { value & 0xffff_ffff };
            return Ok(Flow::Next);
        }
        let value = cpu.gpr[usize::from(register)];
        let value = if cpu.long { value } else { value & 0xffff_ffff };
        if number >= 6 && value >> 32 != 0 {
            return Err(cpu.gp(0));
        }
        cpu.dr[number] = match number {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_2bff | 0x400,
            _ => value,
        };
        if cpu.watching() {
            cpu.tlb.drop_pointers();
        }
        Ok(cpu.sync_after(u))
    })
}
