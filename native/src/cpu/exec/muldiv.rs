//! MUL, IMUL, DIV, IDIV, and the decimal adjustments of legacy code.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::by_size;
use crate::cpu::decode::{gpr, immediate, operand_size};
use crate::cpu::flags::{Kind, Lazy, AF, CF, OF};
use crate::cpu::int::{lazy, Int, HIGH};
use crate::cpu::state::{Cpu, Stop, RAX, RDX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

fn source<T: Int>(cpu: &mut Cpu, u: &Uop) -> Result<T, Stop> {
    if u.mem {
        let at = cpu.ea(u)?;
        cpu.load::<T>(at)
    } else {
        Ok(T::get(cpu, u.src))
    }
}

/// High half of a product goes to AH (8 bits) or RDX.
fn high(bits: u32) -> u8 {
    if bits == 8 {
        HIGH
    } else {
        RDX as u8
    }
}

/// One-operand MUL and IMUL.
fn multiply<T: Int, const SIGNED: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source::<T>(cpu, u)?;
        let a = T::get(cpu, RAX as u8);
        let (low, upper, over) = if SIGNED {
            let product = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
            let low = T::from64(product as u64);
            (
                low,
                T::from64((product >> T::BITS) as u64),
                i128::from(low.sext() as i64) != product,
            )
        } else {
            let product = u128::from(a.to64()) * u128::from(b.to64());
            let upper = T::from64((product >> T::BITS) as u64);
            (T::from64(product as u64), upper, upper != T::ZERO)
        };
        T::set(cpu, RAX as u8, low);
        T::set(cpu, high(T::BITS), upper);
        let both = u64::from(over) * (CF | OF);
        cpu.cc = lazy(Kind::Part, low, both);
        Ok(())
    })
}

/// Two- and three-operand IMUL; with `op` 1 the second factor is the immediate.
fn imul<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source::<T>(cpu, u)?;
        let a = if u.op == 1 {
            T::from64(u.imm)
        } else {
            T::get(cpu, u.dst)
        };
        let product = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
        let low = T::from64(product as u64);
        let over = i128::from(low.sext() as i64) != product;
        T::set(cpu, u.dst, low);
        cpu.cc = lazy(Kind::Part, low, u64::from(over) * (CF | OF));
        Ok(())
    })
}

fn divide<T: Int, const SIGNED: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let divisor = source::<T>(cpu, u)?;
        if divisor == T::ZERO {
            return Err(cpu.raise(0, None));
        }
        let upper = T::get(cpu, high(T::BITS));
        let low = T::get(cpu, RAX as u8);
        let (quotient, remainder) = if SIGNED {
            let dividend = (i128::from(upper.sext() as i64) << T::BITS) | i128::from(low.to64());
            let by = i128::from(divisor.sext() as i64);
            // i128::MIN / -1 is the one quotient that does not fit 128 bits.
            let Some(quotient) = dividend.checked_div(by) else {
                return Err(cpu.raise(0, None));
            };
            let fits = T::from64(quotient as u64);
            if i128::from(fits.sext() as i64) != quotient {
                return Err(cpu.raise(0, None));
            }
            (fits, T::from64((dividend % by) as u64))
        } else {
            let dividend = u128::from(upper.to64()) << T::BITS | u128::from(low.to64());
            let by = u128::from(divisor.to64());
            let quotient = if upper == T::ZERO {
                u128::from(low.to64() / divisor.to64())
            } else {
                dividend / by
            };
            if quotient >> T::BITS != 0 {
                return Err(cpu.raise(0, None));
            }
            let remainder = if upper == T::ZERO {
                low.to64() % divisor.to64()
            } else {
                (dividend % by) as u64
            };
            (T::from64(quotient as u64), T::from64(remainder))
        };
        T::set(cpu, RAX as u8, quotient);
        T::set(cpu, high(T::BITS), remainder);
        Ok(())
    })
}

/// DAA, DAS, AAA, AAS, AAM, AAD (`op` 0 to 5): 32-bit code only.
fn decimal(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let (al, ah) = (u8::get(cpu, 0), u8::get(cpu, HIGH));
        let (carry, half) = (cpu.cc.cf(), cpu.cc.af());
        let adjust = al & 15 > 9 || half;
        match u.op {
            0 | 1 => {
                let six = |value: u8, by: u8| {
                    if u.op == 0 {
                        value.wrapping_add(by)
                    } else {
                        value.wrapping_sub(by)
                    }
                };
                let mut res = al;
                let mut out = false;
                if adjust {
                    out = carry || if u.op == 0 { al > 0xf9 } else { al < 6 };
                    res = six(res, 6);
                }
                if al > 0x99 || carry {
                    res = six(res, 0x60);
                    out = true;
                } else if u.op == 0 {
                    out = false;
                }
                u8::set(cpu, 0, res);
                cpu.cc = lazy(
                    Kind::Part,
                    res,
                    (u64::from(out) * CF) | (u64::from(adjust) * AF),
                );
            }
            2 | 3 => {
                let mut ax = u16::get(cpu, 0);
                if adjust {
                    ax = if u.op == 2 {
                        ax.wrapping_add(0x106)
                    } else {
                        ax.wrapping_sub(6).wrapping_sub(0x100)
                    };
                }
                ax &= 0xff0f;
                u16::set(cpu, 0, ax);
                cpu.cc = lazy(Kind::Part, ax as u8, u64::from(adjust) * (CF | AF));
            }
            4 => {
                let base = u.imm as u8;
                if base == 0 {
                    return Err(cpu.raise(0, None));
                }
                u8::set(cpu, HIGH, al / base);
                u8::set(cpu, 0, al % base);
                cpu.cc = lazy(Kind::Logic, al % base, 0);
            }
            _ => {
                let res = al.wrapping_add(ah.wrapping_mul(u.imm as u8));
                u16::set(cpu, 0, res.into());
                cpu.cc = lazy(Kind::Logic, res, 0);
            }
        }
        if u.op > 5 {
            cpu.cc = Lazy::default();
        }
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Mul | Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Imul => {
            uop.size = operand_size(insn, 0);
            if mnemonic == Mnemonic::Imul && insn.op_count() > 1 {
                uop.dst = gpr(insn.op0_register());
                if insn.op1_kind() == OpKind::Register {
                    uop.src = gpr(insn.op1_register());
                }
                if let Some(factor) = immediate(insn, 2) {
                    uop.imm = factor;
                    uop.op = 1;
                }
                return Some(by_size!(uop.size, imul));
            }
            if !uop.mem {
                uop.src = gpr(insn.op0_register());
            }
            Some(match mnemonic {
                Mnemonic::Mul => by_size!(uop.size, multiply, false),
                Mnemonic::Imul => by_size!(uop.size, multiply, true),
                Mnemonic::Div => by_size!(uop.size, divide, false),
                _ => by_size!(uop.size, divide, true),
            })
        }
        Mnemonic::Daa
        | Mnemonic::Das
        | Mnemonic::Aaa
        | Mnemonic::Aas
        | Mnemonic::Aam
        | Mnemonic::Aad => {
            uop.op = match mnemonic {
                Mnemonic::Daa => 0,
                Mnemonic::Das => 1,
                Mnemonic::Aaa => 2,
                Mnemonic::Aas => 3,
                Mnemonic::Aam => 4,
                _ => 5,
            };
            uop.imm = immediate(insn, 0).unwrap_or(10);
            Some(decimal)
        }
        _ => None,
    }
}
