//! Shifts and rotates, SHLD and SHRD.
//!
//! Flags the SDM leaves undefined: OF for counts other than 1 is what processors do in fact (the bits of the last
//! step), AF is cleared.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::by_size;
use crate::cpu::decode::{gpr, immediate, operand_size};
use crate::cpu::flags::{Kind, AF, CF, OF};
use crate::cpu::int::{lazy, Int};
use crate::cpu::state::{Cpu, RCX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

const ROL: u8 = 0;
const ROR: u8 = 1;
const RCL: u8 = 2;
const RCR: u8 = 3;
const SHL: u8 = 4;
const SHR: u8 = 5;
const SAR: u8 = 7;

/// `count` is already masked and not zero.
#[inline(always)]
fn operate<T: Int, const OP: u8>(cpu: &mut Cpu, a: T, count: u32) -> T {
    let bits = T::BITS;
    let value = a.to64();
    match OP {
        SHL => {
            // 8- and 16-bit operands may be shifted out altogether: 31 + 16 bits still fit.
            let res = T::from64(value << count);
            let carry = if bits == 64 {
                value >> (64 - count) & 1
            } else {
                (value << count) >> bits & 1
            };
            let over = u64::from(res.msb()) ^ carry;
            cpu.cc = lazy(Kind::Part, res, (carry * CF) | (over * OF));
            res
        }
        SHR => {
            let res = T::from64(value >> count);
            let carry = value >> (count - 1) & 1;
            let over = u64::from(a.msb());
            cpu.cc = lazy(Kind::Part, res, (carry * CF) | (over * OF));
            res
        }
        SAR => {
            let signed = a.sext() as i64;
            let res = T::from64((signed >> count) as u64);
            let carry = (signed >> (count - 1)) as u64 & 1;
            cpu.cc = lazy(Kind::Part, res, carry * CF);
            res
        }
        ROL | ROR => {
            let turn = count % bits;
            let res = rotate_left::<T>(
                value,
                if OP == ROL {
                    turn
                } else {
                    (bits - turn) % bits
                },
            );
            let (carry, over) = if OP == ROL {
                let carry = res.to64() & 1;
                (carry, u64::from(res.msb()) ^ carry)
            } else {
                let top = res.to64() >> (bits - 2);
                (top >> 1 & 1, (top >> 1 ^ top) & 1)
            };
            set_carry_overflow(cpu, carry, over);
            res
        }
        _ => {
            // Through carry: one bit wider.
            let turn = count % (bits + 1);
            let carry_in = u128::from(cpu.cc.cf());
            if turn == 0 {
                return a;
            }
            let width = bits + 1;
            let left = if OP == RCL { turn } else { width - turn };
            let wide = carry_in << bits | u128::from(value);
            let mask = (1u128 << width) - 1;
            let turned = (wide << left | wide >> (width - left)) & mask;
            let res = T::from64(turned as u64);
            let carry = (turned >> bits) as u64 & 1;
            let over = if OP == RCL {
                u64::from(res.msb()) ^ carry
            } else {
                let top = res.to64() >> (bits - 2);
                (top >> 1 ^ top) & 1
            };
            set_carry_overflow(cpu, carry, over);
            res
        }
    }
}

fn rotate_left<T: Int>(value: u64, by: u32) -> T {
    if by == 0 {
        return T::from64(value);
    }
    T::from64(value << by | value >> (T::BITS - by))
}

/// Rotates change CF and OF only.
fn set_carry_overflow(cpu: &mut Cpu, carry: u64, over: u64) {
    let cc = &mut cpu.cc;
    let new = (carry * CF) | (over * OF);
    if cc.kind == Kind::Bits {
        cc.src = cc.src & !(CF | OF) | new;
    } else {
        cc.src = new | if cc.af() { AF } else { 0 };
        cc.kind = Kind::Part;
    }
}

/// The count is CL if `op` is 1, else `imm`.
fn shift<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mask = if T::BITS == 64 { 63 } else { 31 };
        let count = if u.op == 1 {
            cpu.gpr[RCX] as u32
        } else {
            u.imm as u32
        } & mask;
        if u.mem {
            let at = cpu.ea(u)?;
            if count == 0 {
                // Nothing changes, but the operand is accessed for writing.
                return cpu.modify::<T>(at, |_, a| a);
            }
            return cpu.modify::<T>(at, |cpu, a| operate::<T, OP>(cpu, a, count));
        }
        let a = T::get(cpu, u.dst);
        let res = if count == 0 {
            a
        } else {
            operate::<T, OP>(cpu, a, count)
        };
        T::set(cpu, u.dst, res);
        Ok(())
    })
}

/// A register shifted by a constant that is not zero.
fn shift_ri<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let a = T::get(cpu, u.dst);
        let res = operate::<T, OP>(cpu, a, u.imm as u32);
        T::set(cpu, u.dst, res);
        Ok(())
    })
}

/// SHLD (`LEFT`) and SHRD.
fn double<T: Int, const LEFT: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mask = if T::BITS == 64 { 63 } else { 31 };
        let count = if u.op == 1 {
            cpu.gpr[RCX] as u32
        } else {
            u.imm as u32
        } & mask;
        let b = T::get(cpu, u.src);
        let work = |cpu: &mut Cpu, a: T| {
            if count == 0 {
                return a;
            }
            let bits = T::BITS;
            let (high, low) = if LEFT { (a, b) } else { (b, a) };
            let wide = u128::from(high.to64()) << bits | u128::from(low.to64());
            // 16-bit operands with counts above 16: the SDM leaves the result undefined; processors go on with the
            // first operand, as a rotation of the pair.
            let both = 2 * bits;
            let turned = if LEFT {
                wide << count
                    | if both < 128 {
                        wide >> (both - count)
                    } else {
                        0
                    }
            } else {
                wide >> count
                    | if both < 128 {
                        wide << (both - count)
                    } else {
                        0
                    }
            };
            let (res, carry) = if LEFT {
                let carry = if count <= bits {
                    a.to64() >> (bits - count)
                } else {
                    b.to64() >> (2 * bits - count)
                };
                (T::from64((turned >> bits) as u64), carry & 1)
            } else {
                let carry = if count <= bits {
                    a.to64() >> (count - 1)
                } else {
                    b.to64() >> (count - 1 - bits)
                };
                (T::from64(turned as u64), carry & 1)
            };
            let over = u64::from(res.xor(a).msb());
            cpu.cc = lazy(Kind::Part, res, (carry * CF) | (over * OF));
            res
        };
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.modify::<T>(at, work);
        }
        let a = T::get(cpu, u.dst);
        let res = work(cpu, a);
        T::set(cpu, u.dst, res);
        Ok(())
    })
}

fn counted(insn: &Instruction, uop: &mut Uop, operand: u32) {
    match immediate(insn, operand) {
        Some(count) => uop.imm = count,
        None => uop.op = 1,
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Rcl
        | Mnemonic::Rcr
        | Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar => {
            uop.size = operand_size(insn, 0);
            counted(insn, uop, 1);
        }
        Mnemonic::Shld | Mnemonic::Shrd => {
            uop.size = operand_size(insn, 0);
            uop.src = gpr(insn.op1_register());
            counted(insn, uop, 2);
        }
        _ => return None,
    }
    if insn.op0_kind() == OpKind::Register {
        uop.dst = gpr(insn.op0_register());
    }
    let mask = if uop.size == 8 { 63 } else { 31 };
    if uop.op == 0 && !uop.mem && uop.imm & mask != 0 {
        uop.imm &= mask;
        match mnemonic {
            Mnemonic::Rol => return Some(by_size!(uop.size, shift_ri, ROL)),
            Mnemonic::Ror => return Some(by_size!(uop.size, shift_ri, ROR)),
            Mnemonic::Shl | Mnemonic::Sal => return Some(by_size!(uop.size, shift_ri, SHL)),
            Mnemonic::Shr => return Some(by_size!(uop.size, shift_ri, SHR)),
            Mnemonic::Sar => return Some(by_size!(uop.size, shift_ri, SAR)),
            _ => {}
        }
    }
    Some(match mnemonic {
        Mnemonic::Rol => by_size!(uop.size, shift, ROL),
        Mnemonic::Ror => by_size!(uop.size, shift, ROR),
        Mnemonic::Rcl => by_size!(uop.size, shift, RCL),
        Mnemonic::Rcr => by_size!(uop.size, shift, RCR),
        Mnemonic::Shl | Mnemonic::Sal => by_size!(uop.size, shift, SHL),
        Mnemonic::Shr => by_size!(uop.size, shift, SHR),
        Mnemonic::Sar => by_size!(uop.size, shift, SAR),
        Mnemonic::Shld => by_size!(uop.size, double, true),
        _ => by_size!(uop.size, double, false),
    })
}
