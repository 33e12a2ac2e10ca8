//! Packed integer arithmetic, comparison and shifts, XMM and MMX.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::lanes::*;
use crate::cpu::flags::{Lazy, CF, ZF};
use crate::cpu::state::Cpu;
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};
use crate::{either2, joined2, xmm2};

fn high_signed(a: i16, b: i16) -> i16 {
    ((i32::from(a) * i32::from(b)) >> 16) as i16
}

fn high_unsigned(a: u16, b: u16) -> u16 {
    ((u32::from(a) * u32::from(b)) >> 16) as u16
}

fn high_rounded(a: i16, b: i16) -> i16 {
    ((((i32::from(a) * i32::from(b)) >> 14) + 1) >> 1) as i16
}

fn average8(a: u8, b: u8) -> u8 {
    ((u16::from(a) + u16::from(b) + 1) >> 1) as u8
}

fn average16(a: u16, b: u16) -> u16 {
    ((u32::from(a) + u32::from(b) + 1) >> 1) as u16
}

/// PMADDWD: sums of neighbouring products.
fn multiply_add(a: u128, b: u128) -> u128 {
    let (a, b) = (i16s(a), i16s(b));
    let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
    join_i32(std::array::from_fn(|n| {
        product(2 * n).wrapping_add(product(2 * n + 1))
    }))
}

/// PMADDUBSW: unsigned destination bytes by signed source bytes.
fn multiply_add_bytes(a: u128, b: u128) -> u128 {
    let (a, b) = (u8s(a), i8s(b));
    let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
    join_i16(std::array::from_fn(|n| {
        saturate16(product(2 * n) + product(2 * n + 1))
    }))
}

pub fn saturate16(value: i32) -> i16 {
    value.clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

/// PSADBW: sum of absolute differences in each half.
fn differences(a: u128, b: u128) -> u128 {
    let (a, b) = (u8s(a), u8s(b));
    join_u64(std::array::from_fn(|half| {
        (half * 8..half * 8 + 8)
            .map(|n| u64::from(a[n].abs_diff(b[n])))
            .sum()
    }))
}

/// PSIGN: negated, kept or zeroed by the sign of the other.
macro_rules! sign {
    ($map:ident) => {
        |a, b| {
            $map(a, b, |x, by| match by.signum() {
                -1 => x.wrapping_neg(),
                0 => 0,
                _ => x,
            })
        }
    };
}

/// PHADDW and the like: neighbours of the destination, then of the source.
fn neighbours16(a: u128, b: u128, f: impl Fn(i16, i16) -> i16) -> u128 {
    let all = [i16s(a), i16s(b)];
    join_i16(std::array::from_fn(|n| {
        let from = &all[n / 4];
        f(from[n % 4 * 2], from[n % 4 * 2 + 1])
    }))
}

fn neighbours32(a: u128, b: u128, f: impl Fn(i32, i32) -> i32) -> u128 {
    let all = [i32s(a), i32s(b)];
    join_i32(std::array::from_fn(|n| {
        let from = &all[n / 2];
        f(from[n % 2 * 2], from[n % 2 * 2 + 1])
    }))
}

/// MPSADBW.
fn offset_differences(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (u8s(a), u8s(b));
    let (from, block) = (usize::from(imm >> 2 & 1) * 4, usize::from(imm & 3) * 4);
    join_u16(std::array::from_fn(|n| {
        (0..4)
            .map(|k| u16::from(a[from + n + k].abs_diff(b[block + k])))
            .sum()
    }))
}

/// PHMINPOSUW: the smallest word and where it first stands.
fn smallest(b: u128) -> u128 {
    let words = u16s(b);
    let (at, least) = words
        .iter()
        .enumerate()
        .min_by_key(|(_, word)| **word)
        .map_or((0, 0), |(at, word)| (at, *word));
    u128::from(least) | (at as u128) << 16
}

fn arithmetic(insn: &Instruction, mmx: bool) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Paddb => either2!(mmx, |a, b| map_u8(a, b, u8::wrapping_add)),
        M::Paddw => either2!(mmx, |a, b| map_u16(a, b, u16::wrapping_add)),
        M::Paddd => either2!(mmx, |a, b| map_u32(a, b, u32::wrapping_add)),
        M::Paddq => either2!(mmx, |a, b| map_u64(a, b, u64::wrapping_add)),
        M::Psubb => either2!(mmx, |a, b| map_u8(a, b, u8::wrapping_sub)),
        M::Psubw => either2!(mmx, |a, b| map_u16(a, b, u16::wrapping_sub)),
        M::Psubd => either2!(mmx, |a, b| map_u32(a, b, u32::wrapping_sub)),
        M::Psubq => either2!(mmx, |a, b| map_u64(a, b, u64::wrapping_sub)),
        M::Paddsb => either2!(mmx, |a, b| map_i8(a, b, i8::saturating_add)),
        M::Paddsw => either2!(mmx, |a, b| map_i16(a, b, i16::saturating_add)),
        M::Paddusb => either2!(mmx, |a, b| map_u8(a, b, u8::saturating_add)),
        M::Paddusw => either2!(mmx, |a, b| map_u16(a, b, u16::saturating_add)),
        M::Psubsb => either2!(mmx, |a, b| map_i8(a, b, i8::saturating_sub)),
        M::Psubsw => either2!(mmx, |a, b| map_i16(a, b, i16::saturating_sub)),
        M::Psubusb => either2!(mmx, |a, b| map_u8(a, b, u8::saturating_sub)),
        M::Psubusw => either2!(mmx, |a, b| map_u16(a, b, u16::saturating_sub)),
        M::Pmullw => either2!(mmx, |a, b| map_u16(a, b, u16::wrapping_mul)),
        M::Pmulhw => either2!(mmx, |a, b| map_i16(a, b, high_signed)),
        M::Pmulhuw => either2!(mmx, |a, b| map_u16(a, b, high_unsigned)),
        M::Pmulhrsw => either2!(mmx, |a, b| map_i16(a, b, high_rounded)),
        M::Pmuludq => either2!(mmx, |a, b| map_u64(a, b, |x, y| {
            (x & 0xffff_ffff) * (y & 0xffff_ffff)
        })),
        M::Pmuldq => xmm2!(|a, b| map_i64(a, b, |x, y| i64::from(x as i32) * i64::from(y as i32))),
        M::Pmulld => xmm2!(|a, b| map_u32(a, b, u32::wrapping_mul)),
        M::Pmaddwd => either2!(mmx, multiply_add),
        M::Pmaddubsw => either2!(mmx, multiply_add_bytes),
        M::Psadbw => either2!(mmx, differences),
        M::Pavgb => either2!(mmx, |a, b| map_u8(a, b, average8)),
        M::Pavgw => either2!(mmx, |a, b| map_u16(a, b, average16)),
        M::Pminub => either2!(mmx, |a, b| map_u8(a, b, u8::min)),
        M::Pmaxub => either2!(mmx, |a, b| map_u8(a, b, u8::max)),
        M::Pminsw => either2!(mmx, |a, b| map_i16(a, b, i16::min)),
        M::Pmaxsw => either2!(mmx, |a, b| map_i16(a, b, i16::max)),
        M::Pminsb => xmm2!(|a, b| map_i8(a, b, i8::min)),
        M::Pmaxsb => xmm2!(|a, b| map_i8(a, b, i8::max)),
        M::Pminuw => xmm2!(|a, b| map_u16(a, b, u16::min)),
        M::Pmaxuw => xmm2!(|a, b| map_u16(a, b, u16::max)),
        M::Pminsd => xmm2!(|a, b| map_i32(a, b, i32::min)),
        M::Pmaxsd => xmm2!(|a, b| map_i32(a, b, i32::max)),
        M::Pminud => xmm2!(|a, b| map_u32(a, b, u32::min)),
        M::Pmaxud => xmm2!(|a, b| map_u32(a, b, u32::max)),
        M::Pabsb => either2!(mmx, |_, b| map_i8(b, b, |x, _| x.wrapping_abs())),
        M::Pabsw => either2!(mmx, |_, b| map_i16(b, b, |x, _| x.wrapping_abs())),
        M::Pabsd => either2!(mmx, |_, b| map_i32(b, b, |x, _| x.wrapping_abs())),
        M::Psignb => either2!(mmx, sign!(map_i8)),
        M::Psignw => either2!(mmx, sign!(map_i16)),
        M::Psignd => either2!(mmx, sign!(map_i32)),
        M::Phaddw => joined2!(mmx, |a, b| neighbours16(a, b, i16::wrapping_add)),
        M::Phaddsw => joined2!(mmx, |a, b| neighbours16(a, b, i16::saturating_add)),
        M::Phsubw => joined2!(mmx, |a, b| neighbours16(a, b, i16::wrapping_sub)),
        M::Phsubsw => joined2!(mmx, |a, b| neighbours16(a, b, i16::saturating_sub)),
        M::Phaddd => joined2!(mmx, |a, b| neighbours32(a, b, i32::wrapping_add)),
        M::Phsubd => joined2!(mmx, |a, b| neighbours32(a, b, i32::wrapping_sub)),
        M::Mpsadbw => crate::xmm_imm!(offset_differences),
        M::Phminposuw => xmm2!(|_, b| smallest(b)),
        _ => return None,
    })
}

fn comparison(insn: &Instruction, mmx: bool) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pcmpeqb => either2!(mmx, |a, b| map_u8(a, b, |x, y| truth8(x == y))),
        M::Pcmpeqw => either2!(mmx, |a, b| map_u16(a, b, |x, y| truth16(x == y))),
        M::Pcmpeqd => either2!(mmx, |a, b| map_u32(a, b, |x, y| truth32(x == y))),
        M::Pcmpeqq => xmm2!(|a, b| map_u64(a, b, |x, y| truth64(x == y))),
        M::Pcmpgtb => either2!(mmx, |a, b| map_i8(a, b, |x, y| truth8s(x > y))),
        M::Pcmpgtw => either2!(mmx, |a, b| map_i16(a, b, |x, y| truth16s(x > y))),
        M::Pcmpgtd => either2!(mmx, |a, b| map_i32(a, b, |x, y| truth32s(x > y))),
        M::Pcmpgtq => xmm2!(|a, b| map_i64(a, b, |x, y| truth64s(x > y))),
        M::Ptest => test,
        _ => return None,
    })
}

/// PTEST.
fn test(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = super::source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        cpu.cc = Lazy::bits((u64::from(a & b == 0) * ZF) | (u64::from(!a & b == 0) * CF));
        Ok(())
    })
}

/// The count of a shift: the low 64 bits of the operand, as a whole.
macro_rules! shifts {
    ($left:ident, $right:ident, $map:ident, $type:ty) => {
        fn $left(a: u128, count: u128) -> u128 {
            let count = count as u64;
            if count >= <$type>::BITS.into() {
                return 0;
            }
            $map(a, 0, |x, _| x << count)
        }
        fn $right(a: u128, count: u128) -> u128 {
            let count = count as u64;
            if count >= <$type>::BITS.into() {
                return 0;
            }
            $map(a, 0, |x, _| x >> count)
        }
    };
}
shifts!(left16, right16, map_u16, u16);
shifts!(left32, right32, map_u32, u32);
shifts!(left64, right64, map_u64, u64);

fn arithmetic16(a: u128, count: u128) -> u128 {
    let count = (count as u64).min(15);
    map_i16(a, 0, |x, _| x >> count)
}

fn arithmetic32(a: u128, count: u128) -> u128 {
    let count = (count as u64).min(31);
    map_i32(a, 0, |x, _| x >> count)
}

fn left_bytes(a: u128, count: u8) -> u128 {
    if count > 15 {
        0
    } else {
        a << (count * 8)
    }
}

fn right_bytes(a: u128, count: u8) -> u128 {
    if count > 15 {
        0
    } else {
        a >> (count * 8)
    }
}

macro_rules! shift {
    ($mmx:expr, $by_imm:expr, $f:ident) => {
        if $by_imm {
            if $mmx {
                $crate::mmx_imm!(|a, _, imm| $f(a, imm.into()))
            } else {
                $crate::xmm_imm!(|a, _, imm| $f(a, imm.into()))
            }
        } else {
            either2!($mmx, $f)
        }
    };
}

fn shifting(insn: &Instruction, mmx: bool) -> Option<Handler> {
    use Mnemonic as M;
    let imm = insn.op1_kind() == OpKind::Immediate8;
    Some(match insn.mnemonic() {
        M::Psllw => shift!(mmx, imm, left16),
        M::Pslld => shift!(mmx, imm, left32),
        M::Psllq => shift!(mmx, imm, left64),
        M::Psrlw => shift!(mmx, imm, right16),
        M::Psrld => shift!(mmx, imm, right32),
        M::Psrlq => shift!(mmx, imm, right64),
        M::Psraw => shift!(mmx, imm, arithmetic16),
        M::Psrad => shift!(mmx, imm, arithmetic32),
        M::Pslldq => crate::xmm_imm!(|a, _, imm| left_bytes(a, imm)),
        M::Psrldq => crate::xmm_imm!(|a, _, imm| right_bytes(a, imm)),
        _ => return None,
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    let mmx = super::is_mmx(insn);
    let handler = arithmetic(insn, mmx)
        .or_else(|| comparison(insn, mmx))
        .or_else(|| shifting(insn, mmx))?;
    if !uop.mem && insn.op1_kind() == OpKind::Immediate8 {
        // The one register is both.
        uop.src = uop.dst;
    }
    Some(handler)
}
