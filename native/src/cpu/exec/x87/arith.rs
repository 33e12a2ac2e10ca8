//! Arithmetic and comparison with ST registers, memory numbers and memory integers.

use std::cmp::Ordering;

use iced_x86::{Instruction, Mnemonic};

use super::stack::{pack, unpack, C0, C1, C2, C3, INDEFINITE};
use super::{kind, memory_kind, waiting};
use crate::cpu::exec::vector::float::order_flags;
use crate::cpu::flags::{Lazy, CF, PF, ZF};
use crate::cpu::float::{Env, Value, DOUBLE, EXTENDED, SINGLE};
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{Flow, Handler, Ip, Uop};

const ADD: u8 = 0;
const MUL: u8 = 1;
const SUB: u8 = 2;
const SUBR: u8 = 3;
const DIV: u8 = 4;
const DIVR: u8 = 5;

/// Bits of `Uop::imm`.
const POP: u64 = 1;
const POP_TWICE: u64 = 2;
const QUIET: u64 = 4;
const TO_FLAGS: u64 = 8;

/// The memory operand as a number; integers are exact. `op` holds the kind.
fn memory(cpu: &mut Cpu, u: &Uop) -> Result<Value, Stop> {
    let at = cpu.ea(u)?;
    let raw = cpu.load_sized(at, u.size.into())?;
    Ok(match (u.rep, u.size) {
        (kind::INTEGER, 2) => Value::integer((raw as i16).into()),
        (kind::INTEGER, 4) => Value::integer((raw as i32).into()),
        (kind::INTEGER, _) => Value::integer(raw as i64),
        (_, 4) => Value::unpack(raw.into(), SINGLE),
        _ => Value::unpack(raw.into(), DOUBLE),
    })
}

fn operate(env: &mut Env, op: u8, a: Value, b: Value) -> Value {
    match op {
        ADD => env.add(a, b, EXTENDED),
        MUL => env.mul(a, b, EXTENDED),
        SUB => env.sub(a, b, EXTENDED),
        SUBR => env.sub(b, a, EXTENDED),
        DIV => env.div(a, b, EXTENDED),
        _ => env.div(b, a, EXTENDED),
    }
}

/// FADD and the like: ST(dst) = ST(dst) op operand, then perhaps a pop.
fn arith(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let other = if u.mem { Some(memory(cpu, u)?) } else { None };
        let x87 = &cpu.ext.x87;
        let empty = x87.is_empty(u.dst) || other.is_none() && x87.is_empty(u.src);
        if empty {
            if cpu.stack_fault(false) {
                cpu.ext.x87.set_st(u.dst, INDEFINITE);
                after(cpu, u);
            }
            return Ok(());
        }
        let a = unpack(x87.st(u.dst));
        let b = other.unwrap_or_else(|| unpack(x87.st(u.src)));
        let mut env = cpu.x87_env(true);
        let result = operate(&mut env, u.op, a, b);
        if cpu.x87_raised(&env) {
            cpu.ext.x87.set_st(u.dst, pack(&result));
            after(cpu, u);
        }
        Ok(())
    })
}

fn after(cpu: &mut Cpu, u: &Uop) {
    if u.imm & (POP | POP_TWICE) != 0 {
        cpu.ext.x87.pop();
    }
    if u.imm & POP_TWICE != 0 {
        cpu.ext.x87.pop();
    }
}

/// FCOM, FUCOM, FICOM, FTST, FCOMI, FUCOMI and their popping forms: ST(0) with ST(src) or memory.
fn compare(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let other = match (u.mem, u.op) {
            (true, _) => Some(memory(cpu, u)?),
            (false, 1) => Some(Value::zero(false)),
            _ => None,
        };
        let x87 = &cpu.ext.x87;
        if x87.is_empty(0) || other.is_none() && x87.is_empty(u.src) {
            let masked = cpu.stack_fault(false);
            report(cpu, u, None);
            if masked {
                after(cpu, u);
            }
            return Ok(());
        }
        let a = unpack(x87.st(0));
        let b = other.unwrap_or_else(|| unpack(x87.st(u.src)));
        let mut env = cpu.x87_env(false);
        let order = env.compare(&a, &b, u.imm & QUIET == 0);
        let c1 = cpu.ext.x87.status & C1;
        let done = cpu.x87_raised(&env);
        if u.imm & TO_FLAGS != 0 {
            // Only a stack fault says anything about C1.
            cpu.ext.x87.set_codes(C1, c1);
        }
        report(cpu, u, order);
        if done {
            after(cpu, u);
        }
        Ok(())
    })
}

/// The outcome, in the condition codes or in RFLAGS.
fn report(cpu: &mut Cpu, u: &Uop, order: Option<Ordering>) {
    let flags = order_flags(order);
    if u.imm & TO_FLAGS != 0 {
        cpu.cc = Lazy::bits(flags);
        return;
    }
    let mut codes = 0;
    for (flag, code) in [(CF, C0), (PF, C2), (ZF, C3)] {
        if flags & flag != 0 {
            codes |= code;
        }
    }
    cpu.ext.x87.set_codes(C0 | C1 | C2 | C3, codes);
}

/// FXAM.
fn examine(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    use crate::cpu::float::Class;
    waiting(cpu, ip, |cpu, _| {
        let x87 = &mut cpu.ext.x87;
        let register = x87.st(0);
        let value = unpack(register);
        let class = if x87.is_empty(0) {
            C3 | C0
        } else {
            match value.class {
                Class::Unsupported => 0,
                Class::Quiet | Class::Signaling => C0,
                Class::Infinite => C2 | C0,
                Class::Zero => C3,
                Class::Finite if value.denormal => C3 | C2,
                Class::Finite => C2,
            }
        };
        let sign = if register.1 >> 15 != 0 { C1 } else { 0 };
        x87.set_codes(C0 | C1 | C2 | C3, class | sign);
        Ok(())
    })
}

/// FCHS (`op` 0), FABS (1).
fn sign(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        if cpu.ext.x87.is_empty(0) {
            if cpu.stack_fault(false) {
                cpu.ext.x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        }
        let x87 = &mut cpu.ext.x87;
        x87.set_codes(C1, 0);
        let (sig, exponent) = x87.st(0);
        let exponent = if u.op == 0 {
            exponent ^ 0x8000
        } else {
            exponent & 0x7fff
        };
        x87.set_st(0, (sig, exponent));
        Ok(())
    })
}

fn lower_arith(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let (op, pops) = match insn.mnemonic() {
        M::Fadd | M::Fiadd => (ADD, false),
        M::Faddp => (ADD, true),
        M::Fmul | M::Fimul => (MUL, false),
        M::Fmulp => (MUL, true),
        M::Fsub | M::Fisub => (SUB, false),
        M::Fsubp => (SUB, true),
        M::Fsubr | M::Fisubr => (SUBR, false),
        M::Fsubrp => (SUBR, true),
        M::Fdiv | M::Fidiv => (DIV, false),
        M::Fdivp => (DIV, true),
        M::Fdivr | M::Fidivr => (DIVR, false),
        M::Fdivrp => (DIVR, true),
        _ => return None,
    };
    uop.op = op;
    uop.imm = if pops { POP } else { 0 };
    Some(arith)
}

fn lower_compare(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let flags = match insn.mnemonic() {
        M::Fcom | M::Ficom => 0,
        M::Fcomp | M::Ficomp => POP,
        M::Fcompp => POP_TWICE,
        M::Fucom => QUIET,
        M::Fucomp => QUIET | POP,
        M::Fucompp => QUIET | POP_TWICE,
        M::Fcomi => TO_FLAGS,
        M::Fcomip => TO_FLAGS | POP,
        M::Fucomi => TO_FLAGS | QUIET,
        M::Fucomip => TO_FLAGS | QUIET | POP,
        M::Ftst => {
            uop.op = 1;
            return Some(compare);
        }
        _ => return None,
    };
    uop.imm = flags;
    // One operand named: it is the source, compared with ST(0).
    if insn.op_count() == 1 && !uop.mem {
        uop.src = uop.dst;
    }
    if insn.op_count() == 0 {
        uop.src = 1;
    }
    Some(compare)
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    // No x87 instruction has a REP prefix of meaning: the field holds the kind of the memory operand.
    uop.rep = memory_kind(insn);
    if let Some(handler) = lower_arith(insn, uop).or_else(|| lower_compare(insn, uop)) {
        return Some(handler);
    }
    match insn.mnemonic() {
        M::Fxam => Some(examine),
        M::Fchs => {
            uop.op = 0;
            Some(sign)
        }
        M::Fabs => {
            uop.op = 1;
            Some(sign)
        }
        _ => None,
    }
}
