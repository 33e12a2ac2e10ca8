//! Loads, stores, exchanges, conditional moves and constants.

use iced_x86::{Instruction, Mnemonic};

use super::stack::{pack, unpack, C1, INDEFINITE};
use super::{kind, memory_kind, waiting};
use crate::cpu::float::{flag, Rounding, Value, DOUBLE, EXTENDED, SINGLE};
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{Flow, Handler, Ip, Uop};

const POP: u64 = 1;
const TRUNCATE: u64 = 2;

fn load80(cpu: &mut Cpu, at: u64) -> Result<(u64, u16), Stop> {
    let mut bytes = [0; 10];
    cpu.read_linear(at, &mut bytes)?;
    let mut low = [0; 8];
    low.copy_from_slice(&bytes[..8]);
    Ok((
        u64::from_le_bytes(low),
        u16::from_le_bytes([bytes[8], bytes[9]]),
    ))
}

fn store80(cpu: &mut Cpu, at: u64, (sig, exponent): (u64, u16)) -> Result<(), Stop> {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&sig.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    cpu.write_linear(at, &bytes)
}

/// FLD m32, m64, m80; FILD; FBLD.
fn load(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if u.size == 10 {
            let raw = load80(cpu, at)?;
            let value = if u.rep == kind::BCD {
                from_bcd(raw)
            } else {
                raw
            };
            cpu.x87_push(value);
            return Ok(());
        }
        let raw = cpu.load_sized(at, u.size.into())?;
        if u.rep == kind::INTEGER {
            let number = match u.size {
                2 => (raw as i16).into(),
                4 => (raw as i32).into(),
                _ => raw as i64,
            };
            cpu.x87_push(pack(&Value::integer(number)));
            return Ok(());
        }
        // A full stack comes before the operand's own exceptions.
        if !cpu.ext.x87.is_empty(7) {
            cpu.x87_push(INDEFINITE);
            return Ok(());
        }
        let format = if u.size == 4 { SINGLE } else { DOUBLE };
        let mut env = cpu.x87_env(false);
        let number = Value::unpack(raw.into(), format);
        // A denormal operand is loaded even if that exception is not masked.
        env.masks |= flag::DENORMAL;
        let value = env.convert(number, EXTENDED);
        if cpu.x87_raised(&env) {
            cpu.x87_push(pack(&value));
        }
        Ok(())
    })
}

/// FLD ST(i).
fn load_register(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        if cpu.ext.x87.is_empty(u.src) {
            if cpu.stack_fault(false) {
                let x87 = &mut cpu.ext.x87;
                x87.top = x87.top.wrapping_sub(1) & 7;
                x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        }
        let value = cpu.ext.x87.st(u.src);
        cpu.x87_push(value);
        Ok(())
    })
}

/// Whether ST(0) is empty, its stack fault noted; `None` if that is not masked, and nothing is to be stored. A page
/// fault comes between the two: it leaves the x87 state as it was, but an exception that keeps the store from being
/// done keeps it from faulting too.
fn stack_ready(cpu: &mut Cpu, u: &Uop, at: u64) -> Result<Option<bool>, Stop> {
    if !cpu.ext.x87.is_empty(0) {
        return Ok(Some(false));
    }
    if cpu.ext.x87.control & flag::INVALID != 0 {
        cpu.check_write(at, u.size.into())?;
    }
    Ok(cpu.stack_fault(false).then_some(true))
}

/// FST and FSTP to m32, m64; FSTP m80.
fn store(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let Some(empty) = stack_ready(cpu, u, at)? else {
            return Ok(());
        };
        let raw = if empty { INDEFINITE } else { cpu.ext.x87.st(0) };
        if u.size == 10 {
            cpu.check_write(at, 10)?;
            if !empty {
                cpu.ext.x87.set_codes(C1, 0);
            }
            store80(cpu, at, raw)?;
        } else {
            let format = if u.size == 4 { SINGLE } else { DOUBLE };
            let bits = if empty {
                Value::indefinite().pack(format)
            } else {
                let mut env = cpu.x87_env(false);
                let value = narrow(&mut env, raw, format);
                let range = env.unmasked() & (flag::OVERFLOW | flag::UNDERFLOW);
                if range != 0 {
                    // Nothing is stored, so nothing is inexact.
                    env.flags = range;
                }
                if range == 0 && env.unmasked() & flag::BEFORE == 0 {
                    cpu.check_write(at, u.size.into())?;
                }
                if !cpu.x87_raised(&env) || range != 0 {
                    return Ok(());
                }
                value
            };
            cpu.store_sized(at, bits as u64, u.size.into())?;
        }
        if u.imm & POP != 0 {
            cpu.ext.x87.pop();
        }
        Ok(())
    })
}

/// A register in a shorter format. Denormal operands raise nothing here.
fn narrow(
    env: &mut crate::cpu::float::Env,
    raw: (u64, u16),
    format: crate::cpu::float::Format,
) -> u128 {
    let mut value = unpack(raw);
    value.denormal = false;
    env.convert(value, format).pack(format)
}

/// FST, FSTP ST(i).
fn store_register(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let value = if cpu.ext.x87.is_empty(0) {
            if !cpu.stack_fault(false) {
                return Ok(());
            }
            INDEFINITE
        } else {
            cpu.ext.x87.set_codes(C1, 0);
            cpu.ext.x87.st(0)
        };
        cpu.ext.x87.set_st(u.dst, value);
        if u.imm & POP != 0 {
            cpu.ext.x87.pop();
        }
        Ok(())
    })
}

/// FIST, FISTP, FISTTP.
fn store_integer(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let bits = u32::from(u.size) * 8;
        let Some(empty) = stack_ready(cpu, u, at)? else {
            return Ok(());
        };
        let number = if empty {
            i64::MIN >> (64 - bits)
        } else {
            let mut env = cpu.x87_env(false);
            let value = unpack(cpu.ext.x87.st(0));
            let number = env.to_int(&value, bits, u.imm & TRUNCATE != 0);
            if env.unmasked() & flag::BEFORE == 0 {
                cpu.check_write(at, u.size.into())?;
            }
            if !cpu.x87_raised(&env) {
                return Ok(());
            }
            number
        };
        cpu.store_sized(at, number as u64, u.size.into())?;
        if u.imm & POP != 0 {
            cpu.ext.x87.pop();
        }
        Ok(())
    })
}

/// 18 packed digits and a sign, as a register.
fn from_bcd((low, high): (u64, u16)) -> (u64, u16) {
    let digits = u128::from(high & 0xff) << 64 | u128::from(low);
    let number = (0..18).rev().fold(0u64, |number, n| {
        number * 10 + (digits >> (4 * n) & 15) as u64
    });
    let mut value = Value::finite(false, 63, number);
    value.sign = high >> 15 != 0;
    pack(&value)
}

/// FBSTP.
fn store_bcd(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    const INDEFINITE_BCD: (u64, u16) = (0xc000_0000_0000_0000, 0xffff);
    waiting(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let Some(empty) = stack_ready(cpu, u, at)? else {
            return Ok(());
        };
        let bcd = if empty {
            INDEFINITE_BCD
        } else {
            let mut env = cpu.x87_env(false);
            let value = unpack(cpu.ext.x87.st(0));
            let before = env;
            let number = env.to_int(&value, 64, false);
            let bcd = if number.unsigned_abs() > 999_999_999_999_999_999 || env.flags & 1 != 0 {
                env = before;
                env.raise(flag::INVALID);
                INDEFINITE_BCD
            } else {
                to_bcd(number.unsigned_abs(), value.sign)
            };
            if env.unmasked() & flag::BEFORE == 0 {
                cpu.check_write(at, 10)?;
            }
            if !cpu.x87_raised(&env) {
                return Ok(());
            }
            bcd
        };
        store80(cpu, at, bcd)?;
        cpu.ext.x87.pop();
        Ok(())
    })
}

fn to_bcd(mut number: u64, sign: bool) -> (u64, u16) {
    let mut digits = 0u128;
    for n in 0..18 {
        digits |= u128::from(number % 10) << (4 * n);
        number /= 10;
    }
    (digits as u64, (digits >> 64) as u16 | u16::from(sign) << 15)
}

/// FXCH.
fn exchange(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let x87 = &cpu.ext.x87;
        if x87.is_empty(0) || x87.is_empty(u.src) {
            if !cpu.stack_fault(false) {
                return Ok(());
            }
            for n in [0, u.src] {
                if cpu.ext.x87.is_empty(n) {
                    cpu.ext.x87.set_st(n, INDEFINITE);
                }
            }
        } else {
            cpu.ext.x87.set_codes(C1, 0);
        }
        let x87 = &mut cpu.ext.x87;
        let (a, b) = (x87.st(0), x87.st(u.src));
        x87.set_st(0, b);
        x87.set_st(u.src, a);
        Ok(())
    })
}

/// FCMOVcc: `op` is the condition of the integer CMOV.
fn conditional(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let x87 = &cpu.ext.x87;
        if x87.is_empty(0) || x87.is_empty(u.src) {
            if cpu.stack_fault(false) {
                cpu.ext.x87.set_st(0, INDEFINITE);
            }
            return Ok(());
        }
        if cpu.cc.cond_dyn(u.op) {
            let value = cpu.ext.x87.st(u.src);
            cpu.ext.x87.set_st(0, value);
        }
        Ok(())
    })
}

/// Constants: exponent, significand rounded down, and whether the nearest is the next one.
const CONSTANTS: [(u16, u64, bool); 5] = [
    // log2(10), log2(e), pi, log10(2), ln(2)
    (0x4000, 0xd49a_784b_cd1b_8afe, false),
    (0x3fff, 0xb8aa_3b29_5c17_f0bb, true),
    (0x4000, 0xc90f_daa2_2168_c234, true),
    (0x3ffd, 0x9a20_9a84_fbcf_f798, true),
    (0x3ffe, 0xb172_17f7_d1cf_79ab, true),
];

/// FLD1 (`op` 5), FLDZ (6) and the constants of [`CONSTANTS`].
fn constant(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let value = match u.op {
            5 => (1 << 63, 0x3fff),
            6 => (0, 0),
            n => {
                let (exponent, down, nearest_is_up) = CONSTANTS[usize::from(n)];
                let up = match cpu.x87_env(false).rounding {
                    Rounding::Nearest => nearest_is_up,
                    Rounding::Up => true,
                    _ => false,
                };
                (down + u64::from(up), exponent)
            }
        };
        cpu.x87_push(value);
        Ok(())
    })
}

fn lower_moves(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Fld | M::Fild | M::Fbld if uop.mem => load,
        M::Fld => {
            uop.src = if insn.op_count() > 1 {
                uop.src
            } else {
                uop.dst
            };
            load_register
        }
        M::Fst | M::Fstp | M::Fstpnce => {
            uop.imm = if insn.mnemonic() == M::Fst { 0 } else { POP };
            if uop.mem {
                store
            } else {
                store_register
            }
        }
        M::Fist | M::Fistp | M::Fisttp => {
            uop.imm = match insn.mnemonic() {
                M::Fist => 0,
                M::Fistp => POP,
                _ => POP | TRUNCATE,
            };
            store_integer
        }
        M::Fbstp => store_bcd,
        M::Fxch => {
            // ST(0) is one of the operands, and the other is what is named.
            uop.src = uop.src.max(uop.dst);
            exchange
        }
        _ => return None,
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    uop.rep = memory_kind(insn);
    if let Some(handler) = lower_moves(insn, uop) {
        return Some(handler);
    }
    let condition = match insn.mnemonic() {
        M::Fcmovb => Some(2),
        M::Fcmovnb => Some(3),
        M::Fcmove => Some(4),
        M::Fcmovne => Some(5),
        M::Fcmovbe => Some(6),
        M::Fcmovnbe => Some(7),
        M::Fcmovu => Some(10),
        M::Fcmovnu => Some(11),
        _ => None,
    };
    if let Some(condition) = condition {
        uop.op = condition;
        return Some(conditional);
    }
    uop.op = match insn.mnemonic() {
        M::Fldl2t => 0,
        M::Fldl2e => 1,
        M::Fldpi => 2,
        M::Fldlg2 => 3,
        M::Fldln2 => 4,
        M::Fld1 => 5,
        M::Fldz => 6,
        _ => return None,
    };
    Some(constant)
}
