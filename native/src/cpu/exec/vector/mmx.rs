//! MMX registers: the significands of the x87 registers, and what only they do (SDM volume 1, chapter 9).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::shuffle::{at_rdi, store_bytes};
use crate::cpu::decode::{gpr, mode, operand_size};
use crate::cpu::exec::control;
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

impl Cpu {
    #[inline]
    pub fn mm(&self, register: u8) -> u64 {
        self.ext.x87.regs[usize::from(register & 7)].0
    }

    /// Writing an MMX register sets the exponent part to ones.
    #[inline]
    pub fn set_mm(&mut self, register: u8, value: u64) {
        self.ext.x87.regs[usize::from(register & 7)] = (value, 0xffff);
    }

    /// What every MMX instruction but EMMS does to the x87 state: TOP is 0 and all registers are in use.
    #[inline]
    pub fn enter_mmx(&mut self) {
        self.ext.x87.top = 0;
        self.ext.x87.valid = 0xff;
    }

    /// #MF if an x87 exception is pending.
    #[inline]
    pub fn x87_wait(&mut self) -> Result<(), Stop> {
        if self.ext.x87.status & 0x80 != 0 {
            return Err(self.raise(16, None));
        }
        Ok(())
    }
}

/// Source operand, zero-extended: an MMX register or memory of `u.size` bytes.
#[inline]
pub fn source(cpu: &mut Cpu, u: &Uop) -> Result<u128, Stop> {
    if !u.mem {
        return Ok(cpu.mm(u.src).into());
    }
    let at = cpu.ea(u)?;
    cpu.load_sized(at, u64::from(u.size.min(8))).map(u128::from)
}

#[inline]
pub fn binary(cpu: &mut Cpu, ip: Ip<'_>, f: impl FnOnce(u128, u128) -> u128) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let b = source(cpu, u)?;
        cpu.enter_mmx();
        let value = f(cpu.mm(u.dst).into(), b);
        cpu.set_mm(u.dst, value as u64);
        Ok(())
    })
}

#[inline]
pub fn with_imm(cpu: &mut Cpu, ip: Ip<'_>, f: impl FnOnce(u128, u128, u8) -> u128) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let b = source(cpu, u)?;
        cpu.enter_mmx();
        let value = f(cpu.mm(u.dst).into(), b, u.imm as u8);
        cpu.set_mm(u.dst, value as u64);
        Ok(())
    })
}

/// A handler of MMX operands from a function of (destination, source, immediate).
#[macro_export]
macro_rules! mmx_imm {
    ($f:expr) => {{
        fn run(
            cpu: &mut $crate::cpu::state::Cpu,
            ip: $crate::cpu::uop::Ip<'_>,
        ) -> $crate::cpu::uop::Flow {
            $crate::cpu::exec::vector::mmx::with_imm(cpu, ip, $f)
        }
        run as $crate::cpu::uop::Handler
    }};
}

/// What `mode` says about using MMX at all.
pub fn gate(uop: &mut Uop, mode: u32) -> Option<Handler> {
    if mode & mode::EM != 0 {
        return Some(control::invalid(uop));
    }
    (mode & mode::TS != 0).then(|| control::unavailable(uop))
}

/// MOVD, MOVQ to an MMX register from a general register (`op` 1) or memory.
fn from_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load_sized(at, u.size.into())?
        } else if u.size == 4 {
            cpu.gpr[usize::from(u.src)] & 0xffff_ffff
        } else {
            cpu.gpr[usize::from(u.src)]
        };
        cpu.enter_mmx();
        cpu.set_mm(u.dst, value);
        Ok(())
    })
}

/// MOVD, MOVQ, MOVNTQ from an MMX register.
fn to_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        // TOP changes even if the store faults; the tags do not.
        cpu.ext.x87.top = 0;
        let value = cpu.mm(u.src);
        if u.mem {
            let at = cpu.ea(u)?;
            cpu.store_sized(at, value, u.size.into())?;
        } else if u.size == 4 {
            cpu.gpr[usize::from(u.dst)] = value & 0xffff_ffff;
        } else {
            cpu.gpr[usize::from(u.dst)] = value;
        }
        cpu.enter_mmx();
        Ok(())
    })
}

/// MOVDQ2Q.
fn from_xmm(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let value = cpu.ext.xmm[usize::from(u.src & 15)] as u64;
        cpu.enter_mmx();
        cpu.set_mm(u.dst, value);
        Ok(())
    })
}

/// MOVQ2DQ.
fn to_xmm(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        cpu.enter_mmx();
        cpu.ext.xmm[usize::from(u.dst & 15)] = cpu.mm(u.src).into();
        Ok(())
    })
}

fn signs(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        cpu.enter_mmx();
        let value = cpu.mm(u.src);
        let mask = (0..8).fold(0, |mask, n| mask | (value >> (8 * n + 7) & 1) << n);
        u32::set(cpu, u.dst, mask as u32);
        Ok(())
    })
}

fn extract(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        cpu.enter_mmx();
        let value = cpu.mm(u.src) >> (16 * (u.imm & 3)) & 0xffff;
        cpu.gpr[usize::from(u.dst)] = value;
        Ok(())
    })
}

fn insert(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load_sized(at, 2)?
        } else {
            cpu.gpr[usize::from(u.src)] & 0xffff
        };
        cpu.enter_mmx();
        let at = 16 * (u.imm & 3);
        let value = cpu.mm(u.dst) & !(0xffff << at) | value << at;
        cpu.set_mm(u.dst, value);
        Ok(())
    })
}

fn masked_store(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        // Before the store, and even if that faults.
        cpu.enter_mmx();
        let (value, mask) = (cpu.mm(u.dst), cpu.mm(u.src));
        if mask & 0x8080_8080_8080_8080 == 0 {
            // Nothing to store, but unlike MASKMOVDQU it looks whether it could.
            let at = cpu.ea(u)?;
            return cpu.check_write(at, 8);
        }
        store_bytes(cpu, u, &value.to_le_bytes(), &mask.to_le_bytes())
    })
}

fn moves(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    let into = insn.op0_kind() == OpKind::Register && insn.op0_register().is_mm();
    let out = insn.op1_kind() == OpKind::Register && insn.op1_register().is_mm();
    Some(match (into, out) {
        (true, true) => crate::mmx2!(|_, b| b),
        (true, false) => {
            uop.size = operand_size(insn, 1);
            if insn.op1_kind() == OpKind::Register {
                uop.src = gpr(insn.op1_register());
            }
            from_gpr
        }
        (false, true) => {
            uop.size = operand_size(insn, 0);
            if insn.op0_kind() == OpKind::Register {
                uop.dst = gpr(insn.op0_register());
            }
            to_gpr
        }
        _ => return None,
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    if !super::is_mmx(insn) {
        return None;
    }
    let number = |register: Register| register.number() as u8;
    Some(match insn.mnemonic() {
        M::Movd | M::Movq => moves(insn, uop)?,
        M::Movntq => {
            uop.size = 8;
            to_gpr
        }
        M::Movdq2q => from_xmm,
        M::Movq2dq => to_xmm,
        M::Pmovmskb => signs,
        M::Pextrw => extract,
        M::Pinsrw => insert,
        M::Pxor => crate::mmx2!(|a, b| a ^ b),
        M::Por => crate::mmx2!(|a, b| a | b),
        M::Pand => crate::mmx2!(|a, b| a & b),
        M::Pandn => crate::mmx2!(|a, b| !a & b),
        M::Maskmovq => {
            at_rdi(insn, uop);
            uop.dst = number(insn.op1_register());
            uop.src = number(insn.op2_register());
            masked_store
        }
        _ => return None,
    })
}
