//! Descriptor tables: GDT, IDT, LDT, TR, and the instructions that ask about descriptors.

use crate::cpu::flags::{Lazy, VM, ZF};
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop, LDTR, TR};
use crate::cpu::uop::{last, step, Flow, Ip, Uop};
use crate::cpu::vmx_ctl::secondary;
use crate::cpu::vmx_exit::reason;

use super::*;

pub(super) fn table(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        // `op`: 0 SGDT, 1 SIDT, 2 LGDT, 3 LIDT.
        let load = u.op >= 2;
        if load {
            supervisor(cpu)?;
        } else {
            umip(cpu)?;
        }
        if cpu.ctl.secondary(secondary::DESCRIPTOR) {
            let offset = u.disp;
            let stop = cpu.exit_with(reason::GDTR_IDTR, offset);
            cpu.exit.info = cpu.instruction_info(u, u32::from(u.op) << 28);
            return Err(stop);
        }
        let at = cpu.ea(u)?;
        let wide = u.size == 8;
        if load {
            let limit = cpu.load::<u16>(at)?;
            let base = if wide {
                cpu.load::<u64>(at.wrapping_add(2))?
            } else {
                let base = u64::from(cpu.load::<u32>(at.wrapping_add(2))?);
                if u.size == 2 {
                    base & 0xff_ffff
                } else {
                    base
                }
            };
            if wide && !cpu.canonical(base) {
                return Err(cpu.gp(0));
            }
            let register = if u.op == 2 {
                &mut cpu.gdtr
            } else {
                &mut cpu.idtr
            };
            register.base = base;
            register.limit = limit.into();
        } else {
            let register = if u.op == 0 { cpu.gdtr } else { cpu.idtr };
            let mut bytes = [0; 10];
            bytes[..2].copy_from_slice(&(register.limit as u16).to_le_bytes());
            bytes[2..].copy_from_slice(&register.base.to_le_bytes());
            cpu.write_linear(at, &bytes[..if wide { 10 } else { 6 }])?;
        }
        Ok(Flow::Next)
    })
}

/// SLDT, STR, LLDT, LTR: `op` 0 to 3.
pub(super) fn system_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if !cpu.protected() || cpu.flags & VM != 0 {
            return Err(cpu.ud());
        }
        if u.op >= 2 {
            supervisor(cpu)?;
        } else {
            umip(cpu)?;
        }
        if cpu.ctl.secondary(secondary::DESCRIPTOR) {
            let stop = cpu.exit_with(reason::LDTR_TR, u.disp);
            cpu.exit.info = cpu.instruction_info(u, u32::from(u.op) << 28);
            return Err(stop);
        }
        let index = if u.op & 1 == 0 { LDTR } else { TR };
        if u.op < 2 {
            let value = u64::from(cpu.seg[index].sel);
            store_system(cpu, u, value)?;
            return Ok(Flow::Next);
        }
        let selector = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        cpu.load_system_segment(index, selector)?;
        Ok(Flow::Next)
    })
}

/// LAR, LSL, VERR, VERW: `op` 0 to 3.
pub(super) fn probe_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if !cpu.protected() || cpu.flags & VM != 0 {
            return Err(cpu.ud());
        }
        let selector = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let found = cpu.probe_descriptor(selector, u.op)?;
        let flags = cpu.cc.all() & !ZF;
        cpu.cc = Lazy::bits(flags | if found.is_some() { ZF } else { 0 });
        if let (Some(value), 0 | 1) = (found, u.op) {
            match u.size {
                2 => u16::set(cpu, u.dst, value as u16),
                _ => cpu.gpr[usize::from(u.dst)] = value.into(),
            }
        }
        Ok(())
    })
}

impl Cpu {
    fn probe_descriptor(&mut self, selector: u16, op: u8) -> Result<Option<u32>, Stop> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let (base, limit) = if selector & 4 != 0 {
            let ldt = self.seg[LDTR];
            if ldt.unusable() {
                return Ok(None);
            }
            (ldt.base, ldt.limit)
        } else {
            (self.gdtr.base, self.gdtr.limit)
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Ok(None);
        }
        let raw = self.system_u64(base.wrapping_add(offset.into()))?;
        let descriptor = crate::cpu::segment::Descriptor { raw, at: 0 };
        let rpl = (selector & 3) as u8;
        let conforming = descriptor.code() && descriptor.conforming();
        let visible = conforming || descriptor.dpl() >= self.cpl.max(rpl);
        if !visible {
            return Ok(None);
        }
        let long = self.long_mode();
        let system_ok = match op {
            0 if long => matches!(descriptor.kind(), 2 | 9 | 11 | 12),
            0 => matches!(descriptor.kind(), 1 | 2 | 3 | 4 | 5 | 9 | 11 | 12),
            1 if long => matches!(descriptor.kind(), 2 | 9 | 11),
            1 => matches!(descriptor.kind(), 1 | 2 | 3 | 9 | 11),
            _ => false,
        };
        let ok = match op {
            0 | 1 => descriptor.ordinary() || system_ok,
            2 => descriptor.ordinary() && (!descriptor.code() || descriptor.permits()),
            _ => descriptor.ordinary() && !descriptor.code() && descriptor.permits(),
        };
        Ok(ok.then(|| {
            if op == 0 {
                (descriptor.raw >> 32) as u32 & 0x00ff_ff00
            } else {
                descriptor.limit()
            }
        }))
    }

    /// VM-exit instruction information of a memory operand (SDM vol. 3, 27.2.5), with `extra` bits added.
    pub fn instruction_info(&self, u: &Uop, extra: u32) -> u32 {
        use crate::cpu::state::{BLOCK, ZERO};
        let register = |index: u8| {
            if usize::from(index) < 16 {
                u32::from(index)
            } else {
                0
            }
        };
        let mut info = extra | u32::from(u.scale & 3);
        info |= match u.ea {
            crate::cpu::uop::ea::FLAT => 2,
            crate::cpu::uop::ea::LEGACY16 => 0,
            _ => 1,
        } << 7;
        if !u.mem {
            info |= 1 << 10 | register(u.src) << 3;
        }
        info |= u32::from(u.segment) << 15;
        info |= register(u.index) << 18 | u32::from(usize::from(u.index) == ZERO) << 22;
        info |= register(u.base) << 23
            | u32::from(usize::from(u.base) == ZERO || usize::from(u.base) == BLOCK) << 27;
        info
    }
}
