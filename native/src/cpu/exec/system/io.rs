//! Port I/O, single and in strings, and the I/O permission bitmap.

use crate::cpu::flags::VM;
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop, ES, RCX, RDX, TR};
use crate::cpu::uop::{last, Flow, Ip};
use crate::cpu::vmx_ctl::primary;
use crate::cpu::vmx_exit::reason;

impl Cpu {
    /// I/O privilege: IOPL, else the bitmap of the TSS.
    fn io_allowed(&mut self, port: u16, size: u8) -> Result<(), Stop> {
        if !self.protected() || self.cpl <= self.iopl() && self.flags & VM == 0 {
            return Ok(());
        }
        let tss = self.seg[TR];
        if tss.unusable() || tss.rights & 8 == 0 || tss.limit < 103 {
            return Err(self.gp(0));
        }
        let map = u32::from(self.system_u16(tss.base.wrapping_add(102))?);
        let byte = map + u32::from(port >> 3);
        if byte + 1 > tss.limit {
            return Err(self.gp(0));
        }
        let bits = self.system_u16(tss.base.wrapping_add(byte.into()))? >> (port & 7);
        if bits & ((1 << size) - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn io_exits(&mut self, port: u16, size: u8) -> Result<bool, Stop> {
        if !self.ctl.primary(primary::IO_BITMAPS) {
            return Ok(self.ctl.primary(primary::IO));
        }
        for offset in 0..u16::from(size) {
            let Some(port) = port.checked_add(offset) else {
                return Ok(true);
            };
            let (field, bit) = if port < 0x8000 {
                (crate::cpu::vmcs::field::IO_BITMAP_A, port)
            } else {
                (crate::cpu::vmcs::field::IO_BITMAP_B, port - 0x8000)
            };
            let at = self.vmcs.get(field) + u64::from(bit >> 5) * 4;
            if self.phys_rd32(at)? >> (bit & 31) & 1 != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// IN and OUT. `op` bit 0: IN; bit 1: immediate port.
pub(super) fn port_io(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let port = if u.op & 2 != 0 {
            u.imm as u16 & 0xff
        } else {
            cpu.gpr[RDX] as u16
        };
        cpu.io_allowed(port, u.size)?;
        if cpu.io_exits(port, u.size)? {
            let qualification = u64::from(u.size - 1)
                | u64::from(u.op & 1) << 3
                | u64::from(u.op & 2 != 0) << 6
                | u64::from(port) << 16;
            return Err(cpu.exit_with(reason::IO, qualification));
        }
        // No device answers on this bus: reads float high.
        if u.op & 1 != 0 {
            match u.size {
                1 => u8::set(cpu, 0, 0xff),
                2 => u16::set(cpu, 0, 0xffff),
                _ => u32::set(cpu, 0, 0xffff_ffff),
            }
        }
        Ok(Flow::Next)
    })
}

/// INS (`op` 1) and OUTS (0), with or without REP: one element an execution.
pub(super) fn string_io(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let mask = match u.asize {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        if u.rep != 0 && cpu.gpr[RCX] & mask == 0 {
            return Ok(Flow::Next);
        }
        let port = cpu.gpr[RDX] as u16;
        cpu.io_allowed(port, u.size)?;
        let input = u.op == 1;
        let (register, segment) = if input {
            (crate::cpu::state::RDI, ES)
        } else {
            (crate::cpu::state::RSI, usize::from(u.segment))
        };
        let at = cpu.string_address(u, register, segment, u.size.into())?;
        if cpu.io_exits(port, u.size)? {
            let qualification = u64::from(u.size - 1)
                | u64::from(input) << 3
                | 1 << 4
                | u64::from(u.rep != 0) << 5
                | u64::from(port) << 16;
            let stop = cpu.exit_with(reason::IO, qualification);
            cpu.exit.linear = at;
            let size = match u.asize {
                2 => 0,
                4 => 1,
                _ => 2u32,
            };
            cpu.exit.info = size << 7 | (segment as u32) << 15;
            return Err(stop);
        }
        if input {
            cpu.store_sized(at, u64::MAX, u.size.into())?;
        } else {
            cpu.load_sized(at, u.size.into())?;
        }
        let delta = if cpu.flags & crate::cpu::flags::DF != 0 {
            u64::from(u.size).wrapping_neg()
        } else {
            u.size.into()
        };
        let mut add = |register: usize, by: u64| {
            let value = cpu.gpr[register].wrapping_add(by) & mask;
            cpu.gpr[register] = if u.asize == 2 {
                cpu.gpr[register] & !0xffff | value
            } else {
                value
            };
        };
        add(register, delta);
        if u.rep != 0 {
            add(RCX, u64::MAX);
            if cpu.gpr[RCX] & mask != 0 {
                // Once more, after a look at events.
                cpu.rip = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u.at.into()));
                cpu.partial = u.n.into();
                cpu.stop = crate::cpu::state::StopKind::Sync;
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Next)
    })
}
