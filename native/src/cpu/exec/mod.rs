//! Instruction families. Each file turns iced's instructions of its family into micro-operations (`lower`) and holds
//! their handlers.

pub mod arith;
pub mod bit;
pub mod bmi;
pub mod control;
pub mod flagops;
pub mod mov;
pub mod muldiv;
pub mod shift;
pub mod sse;
pub mod string;
pub mod system;
pub mod system_vmx;
pub mod vector;
pub mod x87;
pub mod xsave;

use iced_x86::Instruction;

use super::uop::{Handler, Uop};

/// A family's part of the decoder: the handler for `insn`, with the operands filled into `uop`; `None` if the
/// instruction is not of this family (or not one this processor has).
pub type Lower = fn(&Instruction, &mut Uop, u32) -> Option<Handler>;

/// Tried in this order; the frequent ones stand first.
pub const FAMILIES: &[Lower] = &[
    mov::lower,
    arith::lower,
    control::lower,
    shift::lower,
    bit::lower,
    muldiv::lower,
    sse::lower,
    string::lower,
    flagops::lower,
    system::lower,
    system_vmx::lower,
    xsave::lower,
    vector::lower,
    x87::lower,
    bmi::lower,
];
