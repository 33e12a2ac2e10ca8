//! Instructions on RFLAGS as such.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::cpu::exec::control;
use crate::cpu::flags::{
    Lazy, AC, AF, ARITH, CF, DF, ID, IF, IOPL, NT, OF, PF, RF, SF, TF, VIF, VIP, VM, ZF,
};
use crate::cpu::int::{Int, HIGH};
use crate::cpu::state::{block, cr4, Cpu, StopKind};
use crate::cpu::uop::{last, step, Flow, Handler, Ip, Uop};

impl Cpu {
    /// RFLAGS, arithmetic flags included.
    pub fn rflags(&self) -> u64 {
        self.flags | self.cc.all()
    }

    pub fn set_rflags(&mut self, value: u64) {
        self.cc = Lazy::bits(value);
        self.flags = value & !ARITH | 2;
    }

    pub fn iopl(&self) -> u8 {
        (self.flags >> 12 & 3) as u8
    }

    /// POPF and the flag part of IRET: `value` within what the privilege and operand size may change.
    pub fn pop_rflags(&mut self, value: u64, size: u8, iret: bool) {
        let mut mask = ARITH | TF | DF | NT | AC | ID;
        if self.cpl == 0 {
            mask |= IOPL;
        }
        if self.cpl <= self.iopl() {
            mask |= IF;
        }
        if iret {
            mask |= RF;
            if self.cpl == 0 {
                mask |= VIF | VIP;
            }
        }
        if size == 2 {
            mask &= 0xffff;
        }
        // POPF clears RF and leaves VM.
        let keep = if iret { !mask } else { !mask & !RF };
        let new = self.rflags() & keep | value & mask;
        self.set_rflags(new & !if iret { 0 } else { RF } | self.flags & VM);
    }
}

fn pushf(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.rflags() & !(VM | RF);
        cpu.push_sized(value, u.size)
    })
}

fn popf(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let before = cpu.flags;
        let value = cpu.pop_sized(u.size)?;
        cpu.pop_rflags(value, u.size, false);
        Ok(cpu.flags_changed(before, u))
    })
}

impl Cpu {
    /// Ends the block if a change of IF, TF or AC means something.
    pub fn flags_changed(&mut self, before: u64, u: &Uop) -> Flow {
        let changed = before ^ self.flags;
        if changed & AC != 0 {
            self.set_tag();
        }
        if changed & self.flags & IF != 0 || self.flags & TF != 0 || before & TF != 0 {
            return self.sync_after(u);
        }
        Flow::Next
    }

    /// The instruction is complete; the run loop must look at the state again before the next.
    pub fn sync_after(&mut self, u: &Uop) -> Flow {
        self.rip = self.ip_after(u);
        self.partial = u32::from(u.n) + 1;
        self.stop = StopKind::Sync;
        Flow::Stop
    }
}

fn cli(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if cpu.cpl > cpu.iopl() {
            return Err(cpu.gp(0));
        }
        cpu.flags &= !IF;
        Ok(())
    })
}

fn sti(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.cpl > cpu.iopl() {
            return Err(cpu.gp(0));
        }
        if cpu.flags & IF != 0 {
            return Ok(Flow::Next);
        }
        cpu.flags |= IF;
        cpu.blocking |= block::STI;
        Ok(cpu.sync_after(u))
    })
}

/// CLC, STC, CMC, CLD, STD (`op` 0 to 4).
fn simple(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        match u.op {
            0 => cpu.cc = Lazy::bits(cpu.cc.all() & !CF),
            1 => cpu.cc = Lazy::bits(cpu.cc.all() | CF),
            2 => cpu.cc = Lazy::bits(cpu.cc.all() ^ CF),
            3 => cpu.flags &= !DF,
            _ => cpu.flags |= DF,
        }
        Ok(())
    })
}

fn lahf(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        let flags = cpu.cc.all() & !OF | 2;
        u8::set(cpu, HIGH, flags as u8);
        Ok(())
    })
}

fn sahf(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        let low = u64::from(u8::get(cpu, HIGH)) & (CF | PF | AF | ZF | SF);
        cpu.cc = Lazy::bits(cpu.cc.all() & OF | low);
        Ok(())
    })
}

fn salc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        let value = if cpu.cc.cf() { 0xff } else { 0 };
        u8::set(cpu, 0, value);
        Ok(())
    })
}

/// CLAC (`op` 0) and STAC.
fn alignment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if cpu.cpl != 0 || cpu.cr4 & cr4::SMAP == 0 && !cpu.has_smap() {
            return Err(cpu.ud());
        }
        if u.op == 0 {
            cpu.flags &= !AC;
        } else {
            cpu.flags |= AC;
        }
        cpu.set_tag();
        Ok(())
    })
}

impl Cpu {
    fn has_smap(&self) -> bool {
        self.options.cr4_valid & cr4::SMAP != 0
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let simple_op = |uop: &mut Uop, op: u8| {
        uop.op = op;
        simple as Handler
    };
    Some(match insn.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => {
            uop.size = match insn.code() {
                Code::Pushfw => 2,
                Code::Pushfd => 4,
                _ => 8,
            };
            pushf
        }
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
            uop.size = match insn.code() {
                Code::Popfw => 2,
                Code::Popfd => 4,
                _ => 8,
            };
            uop.ends = true;
            popf
        }
        Mnemonic::Cli => cli,
        Mnemonic::Sti => {
            uop.ends = true;
            sti
        }
        Mnemonic::Clc => simple_op(uop, 0),
        Mnemonic::Stc => simple_op(uop, 1),
        Mnemonic::Cmc => simple_op(uop, 2),
        Mnemonic::Cld => simple_op(uop, 3),
        Mnemonic::Std => simple_op(uop, 4),
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        Mnemonic::Clac | Mnemonic::Stac => {
            if uop.lock {
                return Some(control::invalid(uop));
            }
            uop.op = u8::from(insn.mnemonic() == Mnemonic::Stac);
            alignment
        }
        _ => return None,
    })
}
