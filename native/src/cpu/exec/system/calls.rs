//! Software interrupts, system calls and returns, FS and GS bases.

use crate::cpu::exception::{kind, Event};
use crate::cpu::flags::{IF, RF, VM};
use crate::cpu::int::Int;
use crate::cpu::state::{cr4, efer, Cpu, Segment, Stop, CS, FS, GS, R11, RCX, RDX, RSP, SS};
use crate::cpu::uop::{last, step, Flow, Ip, Uop};

use super::*;

pub(super) fn software_event(cpu: &mut Cpu, u: &Uop, vector: u8, kind: u8) -> Result<Flow, Stop> {
    cpu.rip = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u.at.into()));
    cpu.take(Event {
        vector,
        kind,
        error: None,
        length: u.length(),
    })?;
    cpu.partial = u32::from(u.n) + 1;
    cpu.stop = crate::cpu::state::StopKind::Sync;
    Ok(Flow::Stop)
}

pub(super) fn int_n(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, u.imm as u8, kind::SOFT_INT)
    })
}

pub(super) fn int3(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, 3, kind::SOFT_EXCEPTION)
    })
}

pub(super) fn int1(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, 1, kind::PRIVILEGED)
    })
}

pub(super) fn into(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.cc.of() {
            software_event(cpu, u, 4, kind::SOFT_EXCEPTION)
        } else {
            Ok(Flow::Next)
        }
    })
}

/// Flat segments that system calls load without reading a descriptor.
pub(super) fn flat(sel: u16, rights: u32) -> Segment {
    Segment {
        sel,
        rights,
        limit: 0xffff_ffff,
        base: 0,
    }
}

pub(super) const CODE64: u32 = 0xa09b;
pub(super) const CODE32: u32 = 0xc09b;
pub(super) const DATA: u32 = 0xc093;
pub(super) const DPL3: u32 = 0x60;

pub(super) fn syscall(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.efer & efer::SCE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        cpu.gpr[RCX] = cpu.ip_after(u);
        cpu.gpr[R11] = cpu.rflags() & !RF;
        cpu.rip = cpu.lstar;
        let flags = cpu.rflags() & !(cpu.fmask | RF);
        cpu.set_rflags(flags);
        let selector = (cpu.star >> 32) as u16 & !3;
        cpu.seg[CS] = flat(selector, CODE64);
        cpu.seg[SS] = flat(selector + 8, DATA);
        cpu.cpl = 0;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

pub(super) fn sysret(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.efer & efer::SCE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        let selector = (cpu.star >> 48) as u16;
        let wide = u.size == 8;
        let to = cpu.gpr[RCX];
        if wide && !cpu.canonical(to) {
            return Err(cpu.gp(0));
        }
        cpu.rip = if wide { to } else { to & 0xffff_ffff };
        let flags = cpu.gpr[R11] & 0x3c_7fd7 | 2;
        cpu.set_rflags(flags);
        if wide {
            cpu.seg[CS] = flat(selector.wrapping_add(16) | 3, CODE64 | DPL3);
        } else {
            cpu.seg[CS] = flat(selector | 3, CODE32 | DPL3);
        }
        cpu.seg[SS] = flat(selector.wrapping_add(8) | 3, DATA | DPL3);
        cpu.cpl = 3;
        cpu.refresh();
        cpu.partial = u32::from(u.n) + 1;
        cpu.stop = crate::cpu::state::StopKind::Sync;
        Ok(Flow::Stop)
    })
}

pub(super) fn sysenter(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        let selector = cpu.sysenter_cs as u16 & !3;
        if !cpu.protected() || selector == 0 {
            return Err(cpu.gp(0));
        }
        let long = cpu.long_mode();
        cpu.flags &= !(IF | VM | RF);
        cpu.gpr[RSP] = if long {
            cpu.sysenter_esp
        } else {
            cpu.sysenter_esp & 0xffff_ffff
        };
        cpu.rip = if long {
            cpu.sysenter_eip
        } else {
            cpu.sysenter_eip & 0xffff_ffff
        };
        cpu.seg[CS] = flat(selector, if long { CODE64 } else { CODE32 });
        cpu.seg[SS] = flat(selector + 8, DATA);
        cpu.cpl = 0;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

pub(super) fn sysexit(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let selector = cpu.sysenter_cs as u16;
        if !cpu.protected() || selector & !3 == 0 || cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        let wide = u.size == 8;
        let (rip, rsp) = (cpu.gpr[RDX], cpu.gpr[RCX]);
        if wide && (!cpu.canonical(rip) || !cpu.canonical(rsp)) {
            return Err(cpu.gp(0));
        }
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        cpu.rip = rip & mask;
        cpu.gpr[RSP] = rsp & mask;
        let offset = if wide { 32 } else { 16 };
        let rights = if wide { CODE64 } else { CODE32 } | DPL3;
        cpu.seg[CS] = flat(selector.wrapping_add(offset) | 3, rights);
        cpu.seg[SS] = flat(selector.wrapping_add(offset + 8) | 3, DATA | DPL3);
        cpu.cpl = 3;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

pub(super) fn swapgs(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if !cpu.long {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.kernel_gs_base);
        cpu.gpr[crate::cpu::state::SEG_BASE + GS] = cpu.seg[GS].base;
        Ok(())
    })
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE: `op` 0 to 3.
pub(super) fn fsgsbase<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if cpu.cr4 & cr4::FSGSBASE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        let index = if u.op & 1 == 0 { FS } else { GS };
        if u.op < 2 {
            let base = cpu.seg[index].base;
            T::set(cpu, u.dst, T::from64(base));
            return Ok(());
        }
        let base = T::get(cpu, u.src).to64();
        if !cpu.canonical(base) {
            return Err(cpu.gp(0));
        }
        cpu.seg[index].base = base;
        cpu.gpr[crate::cpu::state::SEG_BASE + index] = base;
        Ok(())
    })
}
