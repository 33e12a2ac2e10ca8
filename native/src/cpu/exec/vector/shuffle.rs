//! Packing, interleaving, shuffling, blending, widening, insertion and extraction.

use std::array::from_fn;

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::int::saturate16;
use super::lanes::*;
use super::memory;
use crate::cpu::int::Int;
use crate::cpu::state::Cpu;
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};
use crate::{either2, joined2, xmm2, xmm_imm, xmm_zero};

// --- packing

fn pack_signed16(a: u128, b: u128) -> u128 {
    let all = [i16s(a), i16s(b)];
    join_i8(from_fn(|n| {
        all[n / 8][n % 8].clamp(i8::MIN.into(), i8::MAX.into()) as i8
    }))
}

fn pack_unsigned16(a: u128, b: u128) -> u128 {
    let all = [i16s(a), i16s(b)];
    join_u8(from_fn(|n| {
        all[n / 8][n % 8].clamp(0, u8::MAX.into()) as u8
    }))
}

fn pack_signed32(a: u128, b: u128) -> u128 {
    let all = [i32s(a), i32s(b)];
    join_i16(from_fn(|n| saturate16(all[n / 4][n % 4])))
}

fn pack_unsigned32(a: u128, b: u128) -> u128 {
    let all = [i32s(a), i32s(b)];
    join_u16(from_fn(|n| {
        all[n / 4][n % 4].clamp(0, u16::MAX.into()) as u16
    }))
}

// --- interleaving: `from` is the first lane taken of each

fn mix8(a: u128, b: u128, from: usize) -> u128 {
    let all = [u8s(a), u8s(b)];
    join_u8(from_fn(|n| all[n & 1][from + n / 2]))
}

fn mix16(a: u128, b: u128, from: usize) -> u128 {
    let all = [u16s(a), u16s(b)];
    join_u16(from_fn(|n| all[n & 1][from + n / 2]))
}

fn mix32(a: u128, b: u128, from: usize) -> u128 {
    let all = [u32s(a), u32s(b)];
    join_u32(from_fn(|n| all[n & 1][from + n / 2]))
}

/// The upper half of MMX operands begins in the middle of 64 bits.
macro_rules! high {
    ($mmx:expr, $f:ident, $wide:literal) => {
        if $mmx {
            $crate::mmx2!(|a, b| $f(a, b, $wide / 2))
        } else {
            $crate::xmm2!(|a, b| $f(a, b, $wide))
        }
    };
}

fn packing(insn: &Instruction, mmx: bool) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Packsswb => joined2!(mmx, pack_signed16),
        M::Packuswb => joined2!(mmx, pack_unsigned16),
        M::Packssdw => joined2!(mmx, pack_signed32),
        M::Packusdw => xmm2!(pack_unsigned32),
        M::Punpcklbw => either2!(mmx, |a, b| mix8(a, b, 0)),
        M::Punpcklwd => either2!(mmx, |a, b| mix16(a, b, 0)),
        M::Punpckldq => either2!(mmx, |a, b| mix32(a, b, 0)),
        M::Punpckhbw => high!(mmx, mix8, 8),
        M::Punpckhwd => high!(mmx, mix16, 4),
        M::Punpckhdq => high!(mmx, mix32, 2),
        M::Unpcklps => xmm2!(|a, b| mix32(a, b, 0)),
        M::Unpckhps => xmm2!(|a, b| mix32(a, b, 2)),
        M::Punpcklqdq | M::Unpcklpd => xmm2!(|a, b| a & u128::from(u64::MAX) | b << 64),
        M::Punpckhqdq | M::Unpckhpd => xmm2!(|a, b| a >> 64 | b >> 64 << 64),
        M::Movddup => xmm2!(|_, b| b & u128::from(u64::MAX) | b << 64),
        M::Movshdup => xmm2!(|_, b| {
            let b = u32s(b);
            join_u32([b[1], b[1], b[3], b[3]])
        }),
        M::Movsldup => xmm2!(|_, b| {
            let b = u32s(b);
            join_u32([b[0], b[0], b[2], b[2]])
        }),
        _ => return None,
    })
}

// --- shuffles

fn shuffle_bytes(a: u128, b: u128) -> u128 {
    let (a, b) = (u8s(a), u8s(b));
    join_u8(from_fn(|n| {
        if b[n] & 0x80 != 0 {
            0
        } else {
            a[usize::from(b[n] & 15)]
        }
    }))
}

/// Four words in the low half of `b`, picked by two bits each.
fn shuffle_words(b: u128, imm: u8) -> u128 {
    let words = u16s(b);
    (0..4).fold(0, |all, n| {
        all | u128::from(words[usize::from(imm >> (2 * n) & 3)]) << (16 * n)
    })
}

fn shuffle_doublewords(a: u128, b: u128, imm: u8) -> u128 {
    let all = [u32s(a), u32s(b)];
    join_u32(from_fn(|n| all[n / 2][usize::from(imm >> (2 * n) & 3)]))
}

fn align_right(a: u128, b: u128, imm: u8) -> u128 {
    let bytes = [u8s(b), u8s(a)];
    join_u8(from_fn(|n| {
        let at = n + usize::from(imm);
        bytes.get(at / 16).map_or(0, |half| half[at % 16])
    }))
}

fn insert_single(a: u128, b: u128, imm: u8, from_memory: bool) -> u128 {
    let picked = if from_memory {
        b as u32
    } else {
        u32s(b)[usize::from(imm >> 6)]
    };
    let mut lanes = u32s(a);
    lanes[usize::from(imm >> 4 & 3)] = picked;
    join_u32(from_fn(|n| if imm >> n & 1 != 0 { 0 } else { lanes[n] }))
}

fn shuffling(insn: &Instruction, mmx: bool, mem: bool) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pshufb if mmx => crate::mmx2!(|a, b| shuffle_bytes(a, b & 0x8787_8787_8787_8787)),
        M::Pshufb => xmm2!(shuffle_bytes),
        M::Pshufw => crate::mmx_imm!(|_, b, imm| shuffle_words(b, imm)),
        M::Pshuflw => xmm_imm!(|_, b, imm| b >> 64 << 64 | shuffle_words(b, imm)),
        M::Pshufhw => {
            xmm_imm!(|_, b, imm| b & u128::from(u64::MAX) | shuffle_words(b >> 64, imm) << 64)
        }
        M::Pshufd => xmm_imm!(|_, b, imm| shuffle_doublewords(b, b, imm)),
        M::Shufps => xmm_imm!(shuffle_doublewords),
        M::Shufpd => xmm_imm!(|a, b, imm| {
            let (a, b) = (u64s(a), u64s(b));
            join_u64([a[usize::from(imm & 1)], b[usize::from(imm >> 1 & 1)]])
        }),
        M::Palignr if mmx => crate::mmx_imm!(|a, b, imm| align_right(0, a << 64 | b, imm)),
        M::Palignr => xmm_imm!(align_right),
        M::Insertps if mem => xmm_imm!(|a, b, imm| insert_single(a, b, imm, true)),
        M::Insertps => xmm_imm!(|a, b, imm| insert_single(a, b, imm, false)),
        _ => return None,
    })
}

// --- blends

fn blend(insn: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pblendw => xmm_imm!(|a, b, imm| {
            let (a, b) = (u16s(a), u16s(b));
            join_u16(from_fn(|n| if imm >> n & 1 != 0 { b[n] } else { a[n] }))
        }),
        M::Blendps => xmm_imm!(|a, b, imm| {
            let (a, b) = (u32s(a), u32s(b));
            join_u32(from_fn(|n| if imm >> n & 1 != 0 { b[n] } else { a[n] }))
        }),
        M::Blendpd => xmm_imm!(|a, b, imm| {
            let (a, b) = (u64s(a), u64s(b));
            join_u64(from_fn(|n| if imm >> n & 1 != 0 { b[n] } else { a[n] }))
        }),
        M::Pblendvb => xmm_zero!(|a, b, by| {
            let (a, b, by) = (u8s(a), u8s(b), i8s(by));
            join_u8(from_fn(|n| if by[n] < 0 { b[n] } else { a[n] }))
        }),
        M::Blendvps => xmm_zero!(|a, b, by| {
            let (a, b, by) = (u32s(a), u32s(b), i32s(by));
            join_u32(from_fn(|n| if by[n] < 0 { b[n] } else { a[n] }))
        }),
        M::Blendvpd => xmm_zero!(|a, b, by| {
            let (a, b, by) = (u64s(a), u64s(b), i64s(by));
            join_u64(from_fn(|n| if by[n] < 0 { b[n] } else { a[n] }))
        }),
        _ => return None,
    })
}

// --- widening

fn widening(insn: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Pmovsxbw => xmm2!(|_, b| join_i16(from_fn(|n| i8s(b)[n].into()))),
        M::Pmovsxbd => xmm2!(|_, b| join_i32(from_fn(|n| i8s(b)[n].into()))),
        M::Pmovsxbq => xmm2!(|_, b| join_i64(from_fn(|n| i8s(b)[n].into()))),
        M::Pmovsxwd => xmm2!(|_, b| join_i32(from_fn(|n| i16s(b)[n].into()))),
        M::Pmovsxwq => xmm2!(|_, b| join_i64(from_fn(|n| i16s(b)[n].into()))),
        M::Pmovsxdq => xmm2!(|_, b| join_i64(from_fn(|n| i32s(b)[n].into()))),
        M::Pmovzxbw => xmm2!(|_, b| join_u16(from_fn(|n| u8s(b)[n].into()))),
        M::Pmovzxbd => xmm2!(|_, b| join_u32(from_fn(|n| u8s(b)[n].into()))),
        M::Pmovzxbq => xmm2!(|_, b| join_u64(from_fn(|n| u8s(b)[n].into()))),
        M::Pmovzxwd => xmm2!(|_, b| join_u32(from_fn(|n| u16s(b)[n].into()))),
        M::Pmovzxwq => xmm2!(|_, b| join_u64(from_fn(|n| u16s(b)[n].into()))),
        M::Pmovzxdq => xmm2!(|_, b| join_u64(from_fn(|n| u32s(b)[n].into()))),
        _ => return None,
    })
}

// --- to and from general registers

/// PMOVMSKB (`op` 1), MOVMSKPS (4), MOVMSKPD (8): the sign bits of lanes of so many bytes.
fn signs(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.ext.xmm[usize::from(u.src & 15)];
        let width = u32::from(u.op) * 8;
        let mask = (0..128 / width).fold(0, |mask, n| {
            mask | ((value >> (n * width + width - 1)) as u32 & 1) << n
        });
        u32::set(cpu, u.dst, mask);
        Ok(())
    })
}

/// PEXTRB (1), PEXTRW (2), PEXTRD and EXTRACTPS (4), PEXTRQ (8).
fn extract(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let size = u32::from(u.op);
        let lane = u32::from(u.imm as u8) & (16 / size - 1);
        let value = (cpu.ext.xmm[usize::from(u.src & 15)] >> (lane * size * 8)) as u64;
        let value = value & (u64::MAX >> (64 - size * 8));
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.store_sized(at, value, size.into());
        }
        cpu.gpr[usize::from(u.dst)] = value;
        Ok(())
    })
}

/// PINSRB (1), PINSRW (2), PINSRD (4), PINSRQ (8).
fn insert(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let size = u32::from(u.op);
        let value = if u.mem {
            memory(cpu, u)?
        } else {
            cpu.gpr[usize::from(u.src)].into()
        };
        let mask = u128::MAX >> (128 - size * 8);
        let at = (u32::from(u.imm as u8) & (16 / size - 1)) * size * 8;
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = *into & !(mask << at) | (value & mask) << at;
        Ok(())
    })
}

/// MASKMOVDQU: bytes of `dst` whose byte of `src` has the top bit set, to DS:RDI.
fn masked_store(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mask = cpu.ext.xmm[usize::from(u.src & 15)];
        let value = cpu.ext.xmm[usize::from(u.dst & 15)];
        store_bytes(cpu, u, &value.to_le_bytes(), &mask.to_le_bytes())
    })
}

/// The store of MASKMOVDQU and MASKMOVQ. A mask of zeroes accesses nothing.
pub fn store_bytes(
    cpu: &mut Cpu,
    u: &Uop,
    value: &[u8],
    mask: &[u8],
) -> Result<(), crate::cpu::state::Stop> {
    let at = cpu.ea(u)?;
    let wanted = |n: &usize| mask[*n] & 0x80 != 0;
    // A page is touched if any of its bytes is. Of sixteen bytes the upper half goes first, as a fault's address shows.
    let page = |n: usize| at.wrapping_add(n as u64) >> 12;
    let second = (0x1000 - (at & 0xfff)) as usize;
    for probe in [value.len() - 8, 0, second] {
        if probe < value.len()
            && (0..value.len())
                .filter(wanted)
                .any(|n| page(n) == page(probe))
        {
            cpu.check_write(at.wrapping_add(probe as u64), 1)?;
        }
    }
    for n in (0..value.len()).filter(wanted) {
        cpu.store::<u8>(at.wrapping_add(n as u64), value[n])?;
    }
    Ok(())
}

/// The implied memory operand of MASKMOVDQU and MASKMOVQ.
pub fn at_rdi(insn: &Instruction, uop: &mut Uop) {
    use crate::cpu::decode::segment_number;
    use crate::cpu::state::{FS, GS, RDI, SEG_BASE, ZERO};
    use crate::cpu::uop::ea;
    let segment = segment_number(insn.memory_segment());
    uop.segment = segment as u8;
    uop.base = RDI as u8;
    let (form, flat) = match insn.op0_kind() {
        OpKind::MemorySegRDI => (ea::FLAT, true),
        OpKind::MemorySegEDI => (ea::LOW32, true),
        _ => (ea::LEGACY16, false),
    };
    uop.ea = form;
    uop.seg = if flat && !matches!(segment, FS | GS) {
        ZERO as u8
    } else {
        (SEG_BASE + segment) as u8
    };
}

fn transfers(insn: &Instruction, uop: &mut Uop, mmx: bool) -> Option<Handler> {
    use Mnemonic as M;
    if mmx {
        return None;
    }
    let (op, handler): (u8, Handler) = match insn.mnemonic() {
        M::Pmovmskb => (1, signs),
        M::Movmskps => (4, signs),
        M::Movmskpd => (8, signs),
        M::Pextrb => (1, extract),
        M::Pextrw => (2, extract),
        M::Pextrd | M::Extractps => (4, extract),
        M::Pextrq => (8, extract),
        M::Pinsrb => (1, insert),
        M::Pinsrw => (2, insert),
        M::Pinsrd => (4, insert),
        M::Pinsrq => (8, insert),
        M::Maskmovdqu => {
            at_rdi(insn, uop);
            uop.dst = insn.op1_register().number() as u8;
            uop.src = insn.op2_register().number() as u8;
            (0, masked_store)
        }
        M::Movntdqa => (super::ALIGNED, xmm2!(|_, b| b)),
        _ => return None,
    };
    uop.op = op;
    Some(handler)
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    let mmx = super::is_mmx(insn);
    let mem = uop.mem;
    packing(insn, mmx)
        .or_else(|| shuffling(insn, mmx, mem))
        .or_else(|| blend(insn))
        .or_else(|| widening(insn))
        .or_else(|| transfers(insn, uop, mmx))
}
