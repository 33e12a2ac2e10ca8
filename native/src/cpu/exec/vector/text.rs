//! SSE4.2 string comparison: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM volume 1, 12.3, and volume 2, 4.1).

use iced_x86::{Instruction, Mnemonic};

use super::source;
use crate::cpu::flags::{Lazy, CF, OF, SF, ZF};
use crate::cpu::state::{Cpu, RAX, RCX, RDX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

/// One string: its elements as numbers, and how many of them count.
struct Text {
    elements: [i32; 16],
    length: usize,
}

/// Elements of `value` in the format of `imm` bits 1:0 (bit 0 words, bit 1 signed).
fn elements(value: u128, imm: u8) -> ([i32; 16], usize) {
    let mut out = [0; 16];
    let words = imm & 1 != 0;
    let count = if words { 8 } else { 16 };
    for (n, element) in out.iter_mut().enumerate().take(count) {
        *element = match (words, imm & 2 != 0) {
            (false, false) => i32::from((value >> (8 * n)) as u8),
            (false, true) => i32::from((value >> (8 * n)) as i8),
            (true, false) => i32::from((value >> (16 * n)) as u16),
            (true, true) => i32::from((value >> (16 * n)) as i16),
        };
    }
    (out, count)
}

fn implicit(value: u128, imm: u8) -> Text {
    let (elements, count) = elements(value, imm);
    let length = elements[..count]
        .iter()
        .position(|&element| element == 0)
        .unwrap_or(count);
    Text { elements, length }
}

fn explicit(value: u128, imm: u8, length: i64) -> Text {
    let (elements, count) = elements(value, imm);
    let length = length.unsigned_abs().min(count as u64) as usize;
    Text { elements, length }
}

/// The intermediate result: one bit an element of `b`.
fn aggregate(a: &Text, b: &Text, imm: u8, count: usize) -> u32 {
    let valid = |text: &Text, n: usize| n < text.length;
    let mut result = 0;
    for j in 0..count {
        let holds = match imm >> 2 & 3 {
            // Equal any: element j is one of the set.
            0 => valid(b, j) && (0..a.length).any(|i| a.elements[i] == b.elements[j]),
            // Ranges: element j lies between a pair.
            1 => {
                valid(b, j)
                    && (0..a.length / 2).any(|pair| {
                        let range = a.elements[2 * pair]..=a.elements[2 * pair + 1];
                        range.contains(&b.elements[j])
                    })
            }
            // Equal each: same element in the same place; behind both ends equal, behind one not.
            2 => match (valid(a, j), valid(b, j)) {
                (true, true) => a.elements[j] == b.elements[j],
                (false, false) => true,
                _ => false,
            },
            // Equal ordered: the substring begins here, as far as the register reaches.
            _ => (0..count - j)
                .all(|i| !valid(a, i) || valid(b, j + i) && a.elements[i] == b.elements[j + i]),
        };
        result |= u32::from(holds) << j;
    }
    result
}

/// Polarity, bits 5:4.
fn polarised(result: u32, b: &Text, imm: u8, count: usize) -> u32 {
    let all = (1 << count) - 1;
    let inside = (1u32 << b.length) - 1;
    match imm >> 4 & 3 {
        1 => result ^ all,
        3 => result ^ inside & all,
        _ => result,
    }
}

/// `op` bit 0: explicit lengths; bit 1: a mask to XMM0 instead of an index to ECX. `imm` bit 8: 64-bit lengths.
fn compare(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let second = source(cpu, u)?;
        let first = cpu.ext.xmm[usize::from(u.dst & 15)];
        let imm = u.imm as u8;
        let count = if imm & 1 != 0 { 8 } else { 16 };
        let (a, b) = if u.op & 1 != 0 {
            let length = |register: usize| {
                if u.imm >> 8 != 0 {
                    cpu.gpr[register] as i64
                } else {
                    i64::from(cpu.gpr[register] as i32)
                }
            };
            (
                explicit(first, imm, length(RAX)),
                explicit(second, imm, length(RDX)),
            )
        } else {
            (implicit(first, imm), implicit(second, imm))
        };
        let result = polarised(aggregate(&a, &b, imm, count), &b, imm, count);
        if u.op & 2 != 0 {
            cpu.ext.xmm[0] = mask(result, imm, count);
        } else {
            let index = match (result, imm & 0x40 != 0) {
                (0, _) => count as u32,
                (_, true) => 31 - result.leading_zeros(),
                (_, false) => result.trailing_zeros(),
            };
            cpu.gpr[RCX] = index.into();
        }
        let mut flags = 0;
        for (flag, set) in [
            (CF, result != 0),
            (ZF, b.length < count),
            (SF, a.length < count),
            (OF, result & 1 != 0),
        ] {
            flags |= u64::from(set) * flag;
        }
        cpu.cc = Lazy::bits(flags);
        Ok(())
    })
}

/// Bit mask or, with bit 6, one mask an element.
fn mask(result: u32, imm: u8, count: usize) -> u128 {
    if imm & 0x40 == 0 {
        return result.into();
    }
    let bits = 128 / count;
    (0..count).fold(0, |all, n| {
        if result >> n & 1 != 0 {
            all | (u128::MAX >> (128 - bits)) << (n * bits)
        } else {
            all
        }
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let (op, wide) = match insn.mnemonic() {
        M::Pcmpistri => (0, false),
        M::Pcmpistrm => (2, false),
        M::Pcmpestri => (1, false),
        M::Pcmpestri64 => (1, true),
        M::Pcmpestrm => (3, false),
        M::Pcmpestrm64 => (3, true),
        _ => return None,
    };
    uop.imm |= u64::from(wide) << 8;
    // The memory operand need not be aligned.
    uop.op = op;
    Some(compare)
}
