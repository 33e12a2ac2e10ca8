//! Vector instructions beyond moves and logic: MMX, SSE to SSE4.2, AES, PCLMULQDQ, SHA.
//!
//! An instruction is a function of 128-bit values here; [`binary`] and its like bring the operands. The MMX forms run
//! the same functions on the low halves, where that is the same operation.

pub mod crypto;
pub mod float;
pub mod float_convert;
pub mod int;
pub mod lanes;
pub mod mmx;
pub mod shuffle;
pub mod text;

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::decode::{gpr, immediate};
use crate::cpu::exec::control;
use crate::cpu::exec::sse::gate;
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

/// `op` bit: memory must be aligned to 16 bytes.
pub const ALIGNED: u8 = 0x80;

/// Source operand: an XMM register, or memory of `u.size` bytes, zero-extended.
#[inline(always)]
pub fn source(cpu: &mut Cpu, u: &Uop) -> Result<u128, Stop> {
    if !u.mem {
        return Ok(cpu.ext.xmm[usize::from(u.src & 15)]);
    }
    memory(cpu, u)
}

#[inline]
pub fn memory(cpu: &mut Cpu, u: &Uop) -> Result<u128, Stop> {
    let at = cpu.ea(u)?;
    match u.size {
        1 | 2 => cpu.load_sized(at, u.size.into()).map(u128::from),
        4 => cpu.load::<u32>(at).map(u128::from),
        8 => cpu.load::<u64>(at).map(u128::from),
        _ => cpu.load128(at, u.op & ALIGNED != 0),
    }
}

/// dst = f(dst, src)
#[inline(always)]
pub fn binary(cpu: &mut Cpu, ip: Ip<'_>, f: impl FnOnce(u128, u128) -> u128) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = f(*into, b);
        Ok(())
    })
}

/// dst = f(dst, src, immediate byte)
#[inline(always)]
pub fn with_imm(cpu: &mut Cpu, ip: Ip<'_>, f: impl FnOnce(u128, u128, u8) -> u128) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = f(*into, b, u.imm as u8);
        Ok(())
    })
}

/// dst = f(dst, src, XMM0)
#[inline(always)]
pub fn with_xmm0(cpu: &mut Cpu, ip: Ip<'_>, f: impl FnOnce(u128, u128, u128) -> u128) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let zero = cpu.ext.xmm[0];
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = f(*into, b, zero);
        Ok(())
    })
}

/// A handler of XMM operands from a function of (destination, source).
#[macro_export]
macro_rules! xmm2 {
    ($f:expr) => {{
        fn run(
            cpu: &mut $crate::cpu::state::Cpu,
            ip: $crate::cpu::uop::Ip<'_>,
        ) -> $crate::cpu::uop::Flow {
            $crate::cpu::exec::vector::binary(cpu, ip, $f)
        }
        run as $crate::cpu::uop::Handler
    }};
}

/// A handler of XMM operands from a function of (destination, source, immediate).
#[macro_export]
macro_rules! xmm_imm {
    ($f:expr) => {{
        fn run(
            cpu: &mut $crate::cpu::state::Cpu,
            ip: $crate::cpu::uop::Ip<'_>,
        ) -> $crate::cpu::uop::Flow {
            $crate::cpu::exec::vector::with_imm(cpu, ip, $f)
        }
        run as $crate::cpu::uop::Handler
    }};
}

/// A handler of XMM operands from a function of (destination, source, XMM0).
#[macro_export]
macro_rules! xmm_zero {
    ($f:expr) => {{
        fn run(
            cpu: &mut $crate::cpu::state::Cpu,
            ip: $crate::cpu::uop::Ip<'_>,
        ) -> $crate::cpu::uop::Flow {
            $crate::cpu::exec::vector::with_xmm0(cpu, ip, $f)
        }
        run as $crate::cpu::uop::Handler
    }};
}

/// A handler of MMX operands from a function of (destination, source), on zero-extended 64-bit values.
#[macro_export]
macro_rules! mmx2 {
    ($f:expr) => {{
        fn run(
            cpu: &mut $crate::cpu::state::Cpu,
            ip: $crate::cpu::uop::Ip<'_>,
        ) -> $crate::cpu::uop::Flow {
            $crate::cpu::exec::vector::mmx::binary(cpu, ip, $f)
        }
        run as $crate::cpu::uop::Handler
    }};
}

/// XMM or MMX: picked by `$mmx`.
#[macro_export]
macro_rules! either2 {
    ($mmx:expr, $f:expr) => {
        if $mmx {
            $crate::mmx2!($f)
        } else {
            $crate::xmm2!($f)
        }
    };
}

/// XMM or MMX for operations that combine neighbours, which with 64-bit operands are those of (dst | src << 64, 0).
#[macro_export]
macro_rules! joined2 {
    ($mmx:expr, $f:expr) => {
        if $mmx {
            $crate::mmx2!(|a, b| ($f)(a | b << 64, 0))
        } else {
            $crate::xmm2!($f)
        }
    };
}

pub fn is_mmx(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm())
}

/// Fills in register operands and the immediate: operand 0 is the destination, operand 1 the source.
pub fn operands(insn: &Instruction, uop: &mut Uop) {
    let number = |register: Register| {
        if register.is_gpr() {
            gpr(register)
        } else {
            register.number() as u8
        }
    };
    uop.op = ALIGNED;
    if insn.op0_kind() == OpKind::Register {
        uop.dst = number(insn.op0_register());
    }
    if insn.op_count() > 1 && insn.op1_kind() == OpKind::Register {
        uop.src = number(insn.op1_register());
    }
    for operand in 1..insn.op_count() {
        if let Some(value) = immediate(insn, operand) {
            uop.imm = value & 0xff;
        }
    }
    if uop.mem {
        uop.size = insn.memory_size().size() as u8;
    }
}

/// The families of this folder.
pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    if insn.encoding() != iced_x86::EncodingKind::Legacy {
        return None;
    }
    let mut own = *uop;
    operands(insn, &mut own);
    let handler = int::lower(insn, &mut own)
        .or_else(|| shuffle::lower(insn, &mut own))
        .or_else(|| float::lower(insn, &mut own))
        .or_else(|| float_convert::lower(insn, &mut own))
        .or_else(|| text::lower(insn, &mut own))
        .or_else(|| crypto::lower(insn, &mut own))
        .or_else(|| mmx::lower(insn, &mut own))?;
    *uop = own;
    if is_mmx(insn) && !touches_xmm(insn) {
        return Some(mmx::gate(uop, mode).unwrap_or(handler));
    }
    Some(gate(uop, mode).unwrap_or(handler))
}

/// Instructions between MMX and XMM registers obey both sets of rules; the SSE ones include the MMX ones.
fn touches_xmm(insn: &Instruction) -> bool {
    (0..insn.op_count())
        .any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_xmm())
}

/// #UD for encodings that have no operation.
pub fn reserved(uop: &mut Uop) -> Handler {
    control::invalid(uop)
}
