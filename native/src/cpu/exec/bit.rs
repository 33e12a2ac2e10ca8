//! BT family, BSF, BSR, TZCNT, LZCNT, POPCNT.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::by_size;
use crate::cpu::decode::{gpr, immediate, operand_size};
use crate::cpu::flags::{Kind, Lazy, CF, ZF};
use crate::cpu::int::{lazy, Int};
use crate::cpu::state::Cpu;
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

const TEST: u8 = 0;
const SET: u8 = 1;
const RESET: u8 = 2;

fn change<T: Int, const OP: u8>(value: T, bit: u32) -> T {
    let mask = T::from64(1u64 << bit);
    match OP {
        TEST => value,
        SET => value.or(mask),
        RESET => value.and(mask.xor(T::from64(u64::MAX))),
        _ => value.xor(mask),
    }
}

/// BT, BTS, BTR, BTC. A register bit offset reaches beyond a memory operand, signed.
fn bit<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let offset = if u.op == 1 {
            T::from64(u.imm)
        } else {
            T::get(cpu, u.src)
        };
        let number = offset.to64() as u32 & (T::BITS - 1);
        let old = if u.mem {
            let mut place = *u;
            if u.op == 0 {
                let words = offset.sext() as i64 >> T::BITS.trailing_zeros();
                place.disp = place
                    .disp
                    .wrapping_add((words as u64).wrapping_mul(T::BYTES));
            }
            let at = cpu.ea(&place)?;
            if OP == TEST {
                cpu.load::<T>(at)?
            } else if u.lock {
                cpu.modify_locked::<T>(at, |_, value| change::<T, OP>(value, number))?
            } else {
                let mut old = T::ZERO;
                cpu.modify::<T>(at, |_, value| {
                    old = value;
                    change::<T, OP>(value, number)
                })?;
                old
            }
        } else {
            let old = T::get(cpu, u.dst);
            if OP != TEST {
                T::set(cpu, u.dst, change::<T, OP>(old, number));
            }
            old
        };
        let carry = old.to64() >> number & 1;
        cpu.cc = Lazy::bits(cpu.cc.all() & !CF | (carry * CF));
        Ok(())
    })
}

fn source<T: Int>(cpu: &mut Cpu, u: &Uop) -> Result<T, crate::cpu::state::Stop> {
    if u.mem {
        let at = cpu.ea(u)?;
        cpu.load::<T>(at)
    } else {
        Ok(T::get(cpu, u.src))
    }
}

/// BSF and BSR: a source of zero leaves the destination alone.
fn scan<T: Int, const REVERSE: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = source::<T>(cpu, u)?.to64();
        // The other flags are undefined: processors derive them from the source, as TEST does.
        cpu.cc = lazy(Kind::Logic, T::from64(value), 0);
        if value != 0 {
            let number = if REVERSE {
                63 - value.leading_zeros()
            } else {
                value.trailing_zeros()
            };
            T::set(cpu, u.dst, T::from64(number.into()));
        }
        Ok(())
    })
}

/// TZCNT (`op` 0), LZCNT (1), POPCNT (2).
fn count<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = source::<T>(cpu, u)?.to64();
        let res = match u.op {
            0 => value.trailing_zeros().min(T::BITS),
            1 => value.leading_zeros() - (64 - T::BITS),
            _ => value.count_ones(),
        };
        T::set(cpu, u.dst, T::from64(res.into()));
        cpu.cc = Lazy::bits(if u.op == 2 {
            u64::from(value == 0) * ZF
        } else {
            (u64::from(value == 0) * CF) | (u64::from(res == 0) * ZF)
        });
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => {
            uop.size = operand_size(insn, 0);
            if insn.op0_kind() == OpKind::Register {
                uop.dst = gpr(insn.op0_register());
            }
            match immediate(insn, 1) {
                Some(offset) => {
                    uop.imm = offset;
                    uop.op = 1;
                }
                None => uop.src = gpr(insn.op1_register()),
            }
            Some(match mnemonic {
                Mnemonic::Bt => by_size!(uop.size, bit, TEST),
                Mnemonic::Bts => by_size!(uop.size, bit, SET),
                Mnemonic::Btr => by_size!(uop.size, bit, RESET),
                _ => by_size!(uop.size, bit, 3),
            })
        }
        Mnemonic::Bsf | Mnemonic::Bsr | Mnemonic::Tzcnt | Mnemonic::Lzcnt | Mnemonic::Popcnt => {
            uop.size = operand_size(insn, 0);
            uop.dst = gpr(insn.op0_register());
            if !uop.mem {
                uop.src = gpr(insn.op1_register());
            }
            Some(match mnemonic {
                Mnemonic::Bsf => by_size!(uop.size, scan, false),
                Mnemonic::Bsr => by_size!(uop.size, scan, true),
                _ => {
                    uop.op = match mnemonic {
                        Mnemonic::Tzcnt => 0,
                        Mnemonic::Lzcnt => 1,
                        _ => 2,
                    };
                    by_size!(uop.size, count)
                }
            })
        }
        _ => None,
    }
}
