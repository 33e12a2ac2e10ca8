//! Square root, remainder, scaling, and the transcendental functions.
//!
//! FSQRT, FPREM, FPREM1, FSCALE, FXTRACT and FRNDINT are exact. F2XM1, FYL2X, FYL2XP1, FPTAN, FPATAN, FSIN, FCOS and
//! FSINCOS are computed in double precision: about 53 of the 64 bits are right, where hardware has 64 (SDM volume 1,
//! 8.3.10 allows less than one unit in the last place).

use iced_x86::{Instruction, Mnemonic};

use super::stack::{pack, unpack, C0, C1, C2, C3, INDEFINITE};
use super::waiting;
use crate::cpu::float::remainder::{remainder, Partial};
use crate::cpu::float::transcendental;
use crate::cpu::float::{Value, EXTENDED};
use crate::cpu::state::Cpu;
use crate::cpu::uop::{Flow, Handler, Ip, Uop};

/// ST(0) and, if `two`, ST(1); a stack underflow is dealt with here.
fn operands(cpu: &mut Cpu, two: bool) -> Option<(Value, Value)> {
    let x87 = &cpu.ext.x87;
    if x87.is_empty(0) || two && x87.is_empty(1) {
        return None;
    }
    Some((unpack(x87.st(0)), unpack(x87.st(1))))
}

fn underflow(cpu: &mut Cpu) {
    if cpu.stack_fault(false) {
        cpu.ext.x87.set_st(0, INDEFINITE);
    }
}

/// FSQRT (`op` 0), FRNDINT (1), FSCALE (2): ST(0) from itself and ST(1).
fn unary(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let Some((a, b)) = operands(cpu, u.op == 2) else {
            underflow(cpu);
            return Ok(());
        };
        let mut env = cpu.x87_env(u.op == 0);
        let result = match u.op {
            0 => env.sqrt(a, EXTENDED),
            1 => {
                if !a.is_nan() {
                    env.denormals(&a, &a);
                }
                env.round_integral(a)
            }
            _ => env.scale(a, b),
        };
        if cpu.x87_raised(&env) {
            cpu.ext.x87.set_st(0, pack(&result));
        }
        Ok(())
    })
}

/// FPREM (`op` 0), FPREM1 (1).
fn fprem(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let Some((a, b)) = operands(cpu, true) else {
            underflow(cpu);
            cpu.ext.x87.set_codes(C2, 0);
            return Ok(());
        };
        let mut env = cpu.x87_env(false);
        let Partial {
            value,
            quotient,
            complete,
        } = remainder(&mut env, a, b, u.op == 1);
        let stored = cpu.x87_raised(&env);
        let x87 = &mut cpu.ext.x87;
        if stored {
            x87.set_st(0, pack(&value));
        }
        if !stored || value.is_nan() {
            x87.set_codes(C2, 0);
            return Ok(());
        }
        let mut codes = if complete { 0 } else { C2 };
        for (bit, code) in [(1, C1), (2, C3), (4, C0)] {
            if quotient & bit != 0 {
                codes |= code;
            }
        }
        x87.set_codes(C0 | C1 | C2 | C3, codes);
        Ok(())
    })
}

/// FXTRACT: the exponent stays, the significand is pushed.
fn fxtract(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, _| {
        let full = !cpu.ext.x87.is_empty(7);
        let Some((a, _)) = operands(cpu, false) else {
            if cpu.stack_fault(false) {
                cpu.ext.x87.set_st(0, INDEFINITE);
                let x87 = &mut cpu.ext.x87;
                x87.top = x87.top.wrapping_sub(1) & 7;
                x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        };
        if full {
            if cpu.stack_fault(true) {
                cpu.ext.x87.set_st(0, INDEFINITE);
                let x87 = &mut cpu.ext.x87;
                x87.top = x87.top.wrapping_sub(1) & 7;
                x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        }
        let mut env = cpu.x87_env(false);
        let (exponent, significand) = env.extract(a);
        if cpu.x87_raised(&env) {
            cpu.ext.x87.set_st(0, pack(&exponent));
            cpu.x87_push(pack(&significand));
        }
        Ok(())
    })
}

/// F2XM1 (`op` 0), FSIN (1), FCOS (2): one operand, one result.
fn one_result(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let Some((a, _)) = operands(cpu, false) else {
            underflow(cpu);
            return Ok(());
        };
        let mut env = cpu.x87_env(false);
        let result = match u.op {
            0 => Some(transcendental::exp2m1(&mut env, a)),
            1 => transcendental::trigonometric(&mut env, a, f64::sin),
            _ => transcendental::trigonometric(&mut env, a, f64::cos),
        };
        finish(cpu, &env, result, u.op != 0);
        Ok(())
    })
}

/// Stores the result, or C2 if the operand was out of range.
fn finish(cpu: &mut Cpu, env: &crate::cpu::float::Env, result: Option<Value>, ranged: bool) {
    match result {
        None => cpu.ext.x87.set_codes(C1 | C2, C2),
        Some(value) => {
            if cpu.x87_raised(env) {
                cpu.ext.x87.set_st(0, pack(&value));
            }
            if ranged {
                cpu.ext.x87.set_codes(C2, 0);
            }
        }
    }
}

/// FYL2X (`op` 0), FYL2XP1 (1), FPATAN (2): ST(1) from both, then a pop.
fn two_operands(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let Some((x, y)) = operands(cpu, true) else {
            if cpu.stack_fault(false) {
                cpu.ext.x87.set_st(1, INDEFINITE);
                cpu.ext.x87.pop();
            }
            return Ok(());
        };
        let mut env = cpu.x87_env(false);
        let result = match u.op {
            0 => transcendental::y_log2(&mut env, x, y),
            1 => transcendental::y_log2p1(&mut env, x, y),
            _ => transcendental::arctangent(&mut env, x, y),
        };
        if cpu.x87_raised(&env) {
            cpu.ext.x87.set_st(1, pack(&result));
            cpu.ext.x87.pop();
        }
        Ok(())
    })
}

/// FSINCOS (`op` 0), FPTAN (1): ST(0), and another pushed.
fn two_results(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let operand = operands(cpu, false);
        let full = !cpu.ext.x87.is_empty(7);
        let Some((a, _)) = operand.filter(|_| !full) else {
            if cpu.stack_fault(operand.is_some()) {
                cpu.ext.x87.set_st(0, INDEFINITE);
                let x87 = &mut cpu.ext.x87;
                x87.top = x87.top.wrapping_sub(1) & 7;
                x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        };
        let mut env = cpu.x87_env(false);
        let first = if u.op == 0 { f64::sin } else { f64::tan };
        let Some(result) = transcendental::trigonometric(&mut env, a, first) else {
            cpu.ext.x87.set_codes(C1 | C2, C2);
            return Ok(());
        };
        let second = if a.is_nan() || a.is_infinite() {
            result
        } else if u.op == 0 {
            transcendental::trigonometric(&mut env, a, f64::cos).unwrap_or(result)
        } else {
            Value::integer(1)
        };
        if cpu.x87_raised(&env) {
            cpu.ext.x87.set_st(0, pack(&result));
            let c1 = cpu.ext.x87.status & C1;
            cpu.x87_push(pack(&second));
            cpu.ext.x87.set_codes(C1 | C2, c1);
        }
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let (op, handler): (u8, Handler) = match insn.mnemonic() {
        M::Fsqrt => (0, unary),
        M::Frndint => (1, unary),
        M::Fscale => (2, unary),
        M::Fprem => (0, fprem),
        M::Fprem1 => (1, fprem),
        M::Fxtract => (0, fxtract),
        M::F2xm1 => (0, one_result),
        M::Fsin => (1, one_result),
        M::Fcos => (2, one_result),
        M::Fyl2x => (0, two_operands),
        M::Fyl2xp1 => (1, two_operands),
        M::Fpatan => (2, two_operands),
        M::Fsincos => (0, two_results),
        M::Fptan => (1, two_results),
        _ => return None,
    };
    uop.op = op;
    Some(handler)
}
