//! ADD to CMP, TEST, INC, DEC, NEG, NOT, XADD, CMPXCHG and its 8- and 16-byte forms.

use std::marker::PhantomData;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::cpu::decode::{gpr, immediate, operand_size};
use crate::cpu::flags::{Kind, Lazy, AF, CF, OF, ZF};
use crate::cpu::int::{lazy, Int};
use crate::cpu::state::{Cpu, Stop, RAX, RBX, RCX, RDX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};
use crate::cpu::way::{fused, quick, Op, Way};
use crate::{by_size, by_size_based};

const ADD: u8 = 0;
const OR: u8 = 1;
const ADC: u8 = 2;
const SBB: u8 = 3;
const AND: u8 = 4;
const SUB: u8 = 5;
const XOR: u8 = 6;
const CMP: u8 = 7;
const TEST: u8 = 8;

const UNARY_INC: u8 = 9;
const UNARY_DEC: u8 = 10;
/// `Uop::alu` of what is not of this family, or does not fuse.
pub const NONE: u8 = 0xff;

// Operand forms: destination, source.
const RR: u8 = 0;
const RI: u8 = 1;
const RM: u8 = 2;
const MR: u8 = 3;
const MI: u8 = 4;

/// One operation, with its flags.
#[inline(always)]
fn operate<T: Int, const OP: u8>(cpu: &mut Cpu, a: T, b: T) -> T {
    match OP {
        ADD => {
            let res = a.add(b);
            cpu.cc = lazy(Kind::Add, res, b.to64());
            res
        }
        SUB | CMP => {
            let res = a.sub(b);
            cpu.cc = lazy(Kind::Sub, res, b.to64());
            res
        }
        ADC => {
            let carry = cpu.cc.cf();
            let res = a.add(b).add(T::from64(carry.into()));
            let out = res < a || carry && res == a;
            let over = res.xor(a).and(res.xor(b)).msb();
            cpu.cc = lazy(Kind::Part, res, part(out, over, a.xor(b).xor(res).to64()));
            res
        }
        SBB => {
            let carry = cpu.cc.cf();
            let res = a.sub(b).sub(T::from64(carry.into()));
            let out = a < b || carry && a == b;
            let over = a.xor(b).and(a.xor(res)).msb();
            cpu.cc = lazy(Kind::Part, res, part(out, over, a.xor(b).xor(res).to64()));
            res
        }
        _ => {
            let res = match OP {
                OR => a.or(b),
                XOR => a.xor(b),
                _ => a.and(b),
            };
            cpu.cc = lazy(Kind::Logic, res, 0);
            res
        }
    }
}

fn part(carry: bool, over: bool, half: u64) -> u64 {
    (u64::from(carry) * CF) | (u64::from(over) * OF) | half & AF
}

const fn writes(op: u8) -> bool {
    op != CMP && op != TEST
}

/// ADD to CMP and TEST in one operand form. `B`: the address is simple.
pub struct Alu<T, const OP: u8, const FORM: u8, const B: bool>(PhantomData<T>);
impl<T: Int, const OP: u8, const FORM: u8, const B: bool> Op for Alu<T, OP, FORM, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        match FORM {
            RR | RI | RM => {
                let b = match FORM {
                    RR => T::get(cpu, u.src),
                    RI => T::from64(u.imm),
                    _ => {
                        let at = cpu.address::<W, B>(u)?;
                        cpu.load_by::<T, W>(at)?
                    }
                };
                let a = T::get(cpu, u.dst);
                let res = operate::<T, OP>(cpu, a, b);
                if writes(OP) {
                    T::set(cpu, u.dst, res);
                }
                Ok(())
            }
            _ => {
                let at = cpu.address::<W, B>(u)?;
                let b = if FORM == MI {
                    T::from64(u.imm)
                } else {
                    T::get(cpu, u.src)
                };
                if writes(OP) {
                    return cpu.modify_by::<T, W>(at, |cpu, a| operate::<T, OP>(cpu, a, b));
                }
                let a = cpu.load_by::<T, W>(at)?;
                operate::<T, OP>(cpu, a, b);
                Ok(())
            }
        }
    }
}

fn alu_locked<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        // The second operand is a register or, if there is none, the immediate.
        let b = if u.op == 1 {
            T::from64(u.imm)
        } else {
            T::get(cpu, u.src)
        };
        let before = cpu.cc;
        cpu.modify_locked::<T>(at, |cpu, a| {
            cpu.cc = before;
            operate::<T, OP>(cpu, a, b)
        })?;
        Ok(())
    })
}

/// XOR r, r: the result is known.
fn zero<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        T::set(cpu, u.dst, T::ZERO);
        cpu.cc = lazy(Kind::Logic, T::ZERO, 0);
        Ok(())
    })
}

#[inline(always)]
fn one_operand<T: Int>(cpu: &mut Cpu, op: u8, a: T) -> T {
    match op {
        0 => {
            let carry = u64::from(cpu.cc.cf());
            let res = a.add(T::from64(1));
            cpu.cc = lazy(Kind::Inc, res, carry);
            res
        }
        1 => {
            let carry = u64::from(cpu.cc.cf());
            let res = a.sub(T::from64(1));
            cpu.cc = lazy(Kind::Dec, res, carry);
            res
        }
        2 => {
            let res = T::ZERO.sub(a);
            cpu.cc = lazy(Kind::Sub, res, a.to64());
            res
        }
        _ => a.xor(T::from64(u64::MAX)),
    }
}

/// INC, DEC, NEG, NOT of a register.
pub struct Unary<T, const OP: u8>(PhantomData<T>);
impl<T: Int, const OP: u8> Op for Unary<T, OP> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let a = T::get(cpu, u.dst);
        let res = one_operand(cpu, OP, a);
        T::set(cpu, u.dst, res);
        Ok(())
    }
}

/// The same of memory.
struct UnaryM<T, const OP: u8, const B: bool>(PhantomData<T>);
impl<T: Int, const OP: u8, const B: bool> Op for UnaryM<T, OP, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, B>(u)?;
        cpu.modify_by::<T, W>(at, |cpu, a| one_operand(cpu, OP, a))
    }
}

fn unary_locked<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let before = cpu.cc;
        cpu.modify_locked::<T>(at, |cpu, a| {
            cpu.cc = before;
            one_operand(cpu, OP, a)
        })?;
        Ok(())
    })
}

fn xadd<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = T::get(cpu, u.src);
        let old = if u.mem {
            let at = cpu.ea(u)?;
            if u.lock {
                cpu.modify_locked::<T>(at, |cpu, a| operate::<T, ADD>(cpu, a, b))?
            } else {
                let mut old = T::ZERO;
                cpu.modify::<T>(at, |cpu, a| {
                    old = a;
                    operate::<T, ADD>(cpu, a, b)
                })?;
                old
            }
        } else {
            let a = T::get(cpu, u.dst);
            let res = operate::<T, ADD>(cpu, a, b);
            T::set(cpu, u.src, a);
            T::set(cpu, u.dst, res);
            return Ok(());
        };
        T::set(cpu, u.src, old);
        Ok(())
    })
}

fn cmpxchg<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let expected = T::get(cpu, RAX as u8);
        let new = T::get(cpu, u.src);
        let old = if !u.mem {
            let old = T::get(cpu, u.dst);
            if old == expected {
                T::set(cpu, u.dst, new);
            }
            old
        } else {
            let at = cpu.ea(u)?;
            let swap = |_: &mut Cpu, old: T| if old == expected { new } else { old };
            if u.lock {
                cpu.modify_locked::<T>(at, swap)?
            } else {
                let mut found = T::ZERO;
                cpu.modify::<T>(at, |cpu, old| {
                    found = old;
                    swap(cpu, old)
                })?;
                found
            }
        };
        operate::<T, CMP>(cpu, expected, old);
        // On equality the accumulator keeps its upper half; otherwise it is written, as a 32-bit register is.
        if old != expected {
            T::set(cpu, RAX as u8, old);
        }
        Ok(())
    })
}

/// CMPXCHG8B and CMPXCHG16B, locked or not.
fn cmpxchg_pair<const BYTES: usize>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if BYTES == 16 && at & 15 != 0 {
            return Err(cpu.gp(0));
        }
        let pair = |cpu: &Cpu, high: usize, low: usize| {
            if BYTES == 16 {
                u128::from(cpu.gpr[high]) << 64 | u128::from(cpu.gpr[low])
            } else {
                u128::from(cpu.gpr[high] << 32 | cpu.gpr[low] & 0xffff_ffff)
            }
        };
        let expected = pair(cpu, RDX, RAX);
        let new = pair(cpu, RCX, RBX);
        let found = if BYTES == 8 {
            let (expected, new) = (expected as u64, new as u64);
            u128::from(
                cpu.modify_locked::<u64>(at, |_, old| if old == expected { new } else { old })?,
            )
        } else {
            cpu.cas_16_bytes(at, expected, new)?
        };
        let flags = cpu.cc.all() & !ZF;
        if found == expected {
            cpu.cc = Lazy::bits(flags | ZF);
        } else {
            cpu.cc = Lazy::bits(flags);
            if BYTES == 16 {
                cpu.gpr[RAX] = found as u64;
                cpu.gpr[RDX] = (found >> 64) as u64;
            } else {
                cpu.gpr[RAX] = found as u64 & 0xffff_ffff;
                cpu.gpr[RDX] = (found as u64) >> 32;
            }
        }
        Ok(())
    })
}

fn form(insn: &Instruction, uop: &mut Uop) -> Option<u8> {
    let memory = insn.op0_kind() == OpKind::Memory;
    if memory {
        uop.size = operand_size(insn, 0);
    } else {
        uop.dst = gpr(insn.op0_register());
        uop.size = operand_size(insn, 0);
    }
    if let Some(value) = immediate(insn, 1) {
        uop.imm = value;
        uop.op = 1;
        return Some(if memory { MI } else { RI });
    }
    if insn.op1_kind() == OpKind::Memory {
        return Some(RM);
    }
    uop.src = gpr(insn.op1_register());
    Some(if memory { MR } else { RR })
}

fn alu_handler<const OP: u8>(form: u8, uop: &Uop) -> Handler {
    let size = uop.size;
    if uop.lock {
        return by_size!(size, alu_locked, OP);
    }
    macro_rules! register_form {
        ($form:tt) => {
            match size {
                1 => quick::<Alu<u8, OP, $form, false>> as Handler,
                2 => quick::<Alu<u16, OP, $form, false>>,
                4 => quick::<Alu<u32, OP, $form, false>>,
                _ => quick::<Alu<u64, OP, $form, false>>,
            }
        };
    }
    match form {
        RR => register_form!(RR),
        RI => register_form!(RI),
        RM => by_size_based!(uop, size, Alu, OP, RM),
        MR => by_size_based!(uop, size, Alu, OP, MR),
        _ => by_size_based!(uop, size, Alu, OP, MI),
    }
}

/// Handler for INC, DEC, NEG, NOT.
fn unary_handler<const OP: u8>(uop: &Uop) -> Handler {
    if uop.mem && uop.lock {
        return by_size!(uop.size, unary_locked, OP);
    }
    if uop.mem {
        return by_size_based!(uop, uop.size, UnaryM, OP);
    }
    match uop.size {
        1 => quick::<Unary<u8, OP>>,
        2 => quick::<Unary<u16, OP>>,
        4 => quick::<Unary<u32, OP>>,
        _ => quick::<Unary<u64, OP>>,
    }
}

/// The handler of an instruction of this family fused with a conditional jump behind it; `None` if there is none.
pub fn fuse(uop: &Uop, condition: u8) -> Option<Handler> {
    macro_rules! conditions {
        ($op:ty) => {
            match condition {
                0 => fused::<$op, 0> as Handler,
                1 => fused::<$op, 1>,
                2 => fused::<$op, 2>,
                3 => fused::<$op, 3>,
                4 => fused::<$op, 4>,
                5 => fused::<$op, 5>,
                6 => fused::<$op, 6>,
                7 => fused::<$op, 7>,
                8 => fused::<$op, 8>,
                9 => fused::<$op, 9>,
                10 => fused::<$op, 10>,
                11 => fused::<$op, 11>,
                12 => fused::<$op, 12>,
                13 => fused::<$op, 13>,
                14 => fused::<$op, 14>,
                _ => fused::<$op, 15>,
            }
        };
    }
    macro_rules! sizes {
        ($op:tt, $form:tt) => {
            match uop.size {
                1 => conditions!(Alu<u8, $op, $form, false>),
                4 => conditions!(Alu<u32, $op, $form, false>),
                8 => conditions!(Alu<u64, $op, $form, false>),
                _ => return None,
            }
        };
    }
    macro_rules! wide {
        ($op:tt, $form:tt) => {
            match uop.size {
                4 => conditions!(Alu<u32, $op, $form, false>),
                8 => conditions!(Alu<u64, $op, $form, false>),
                _ => return None,
            }
        };
    }
    if uop.lock {
        return None;
    }
    Some(match (uop.alu, uop.form) {
        (CMP, RR) => sizes!(CMP, RR),
        (CMP, RI) => sizes!(CMP, RI),
        (CMP, RM) => sizes!(CMP, RM),
        (CMP, MR) => sizes!(CMP, MR),
        (CMP, MI) => sizes!(CMP, MI),
        (TEST, RR) => sizes!(TEST, RR),
        (TEST, RI) => sizes!(TEST, RI),
        (TEST, MI) => sizes!(TEST, MI),
        (ADD, RR) => wide!(ADD, RR),
        (ADD, RI) => wide!(ADD, RI),
        (SUB, RR) => wide!(SUB, RR),
        (SUB, RI) => wide!(SUB, RI),
        (AND, RR) => wide!(AND, RR),
        (AND, RI) => wide!(AND, RI),
        (UNARY_INC, _) => match uop.size {
            4 => conditions!(Unary<u32, 0>),
            8 => conditions!(Unary<u64, 0>),
            _ => return None,
        },
        (UNARY_DEC, _) => match uop.size {
            4 => conditions!(Unary<u32, 1>),
            8 => conditions!(Unary<u64, 1>),
            _ => return None,
        },
        _ => return None,
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    Some(match mnemonic {
        Mnemonic::Add
        | Mnemonic::Or
        | Mnemonic::Adc
        | Mnemonic::Sbb
        | Mnemonic::And
        | Mnemonic::Sub
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test => {
            let form = form(insn, uop)?;
            uop.form = form;
            uop.alu = match mnemonic {
                Mnemonic::Add => ADD,
                Mnemonic::Sub => SUB,
                Mnemonic::And => AND,
                Mnemonic::Cmp => CMP,
                Mnemonic::Test => TEST,
                _ => NONE,
            };
            match mnemonic {
                Mnemonic::Add => alu_handler::<ADD>(form, uop),
                Mnemonic::Or => alu_handler::<OR>(form, uop),
                Mnemonic::Adc => alu_handler::<ADC>(form, uop),
                Mnemonic::Sbb => alu_handler::<SBB>(form, uop),
                Mnemonic::And => alu_handler::<AND>(form, uop),
                Mnemonic::Sub => alu_handler::<SUB>(form, uop),
                Mnemonic::Xor if form == RR && uop.dst == uop.src => by_size!(uop.size, zero),
                Mnemonic::Xor => alu_handler::<XOR>(form, uop),
                Mnemonic::Cmp => alu_handler::<CMP>(form, uop),
                _ => alu_handler::<TEST>(form, uop),
            }
        }
        Mnemonic::Inc | Mnemonic::Dec | Mnemonic::Neg | Mnemonic::Not => {
            uop.size = operand_size(insn, 0);
            if !uop.mem {
                uop.dst = gpr(insn.op0_register());
            }
            match mnemonic {
                Mnemonic::Inc => {
                    uop.alu = if uop.mem { NONE } else { UNARY_INC };
                    unary_handler::<0>(uop)
                }
                Mnemonic::Dec => {
                    uop.alu = if uop.mem { NONE } else { UNARY_DEC };
                    unary_handler::<1>(uop)
                }
                Mnemonic::Neg => unary_handler::<2>(uop),
                _ => unary_handler::<3>(uop),
            }
        }
        Mnemonic::Xadd | Mnemonic::Cmpxchg => {
            uop.size = operand_size(insn, 0);
            uop.src = gpr(insn.op1_register());
            if !uop.mem {
                uop.dst = gpr(insn.op0_register());
            }
            if mnemonic == Mnemonic::Xadd {
                by_size!(uop.size, xadd)
            } else {
                by_size!(uop.size, cmpxchg)
            }
        }
        _ => match insn.code() {
            Code::Cmpxchg8b_m64 => cmpxchg_pair::<8>,
            Code::Cmpxchg16b_m128 => cmpxchg_pair::<16>,
            _ => return None,
        },
    })
}
