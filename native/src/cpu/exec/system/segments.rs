//! Segment registers: MOV, PUSH, POP, and loads of far pointers.

use crate::cpu::int::Int;
use crate::cpu::state::{block, Cpu, RSP, SS};
use crate::cpu::uop::{last, step, Flow, Ip};

pub(super) fn mov_from_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.seg[usize::from(u.op)].sel;
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.store::<u16>(at, value);
        }
        match u.size {
            2 => u16::set(cpu, u.dst, value),
            _ => cpu.gpr[usize::from(u.dst)] = value.into(),
        }
        Ok(())
    })
}

pub(super) fn mov_to_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let index = usize::from(u.op);
        cpu.load_segment(index, value)?;
        if index == SS {
            cpu.blocking |= block::MOV_SS;
        }
        Ok(cpu.sync_after(u))
    })
}

pub(super) fn push_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = u64::from(cpu.seg[usize::from(u.op)].sel);
        cpu.push_sized(value, u.size)
    })
}

pub(super) fn pop_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let rsp = cpu.gpr[RSP];
        let value = cpu.pop_sized(u.size)? as u16;
        let index = usize::from(u.op);
        if let Err(stop) = cpu.load_segment(index, value) {
            cpu.gpr[RSP] = rsp;
            return Err(stop);
        }
        if index == SS {
            cpu.blocking |= block::MOV_SS;
        }
        Ok(cpu.sync_after(u))
    })
}

/// LDS, LES, LFS, LGS, LSS.
pub(super) fn load_pointer(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let offset = cpu.load_sized(at, u.size.into())?;
        let selector = cpu.load::<u16>(at.wrapping_add(u.size.into()))?;
        cpu.load_segment(usize::from(u.op), selector)?;
        match u.size {
            2 => u16::set(cpu, u.dst, offset as u16),
            _ => cpu.gpr[usize::from(u.dst)] = offset,
        }
        Ok(cpu.sync_after(u))
    })
}
