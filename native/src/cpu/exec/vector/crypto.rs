//! AES-NI, PCLMULQDQ, GFNI and SHA.

use iced_x86::{Instruction, Mnemonic};

use super::lanes::*;
use crate::cpu::uop::{Handler, Uop};
use crate::{xmm2, xmm_imm, xmm_zero};

/// Product in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
const fn times(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = a << 1 ^ if a & 0x80 != 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

/// FIPS 197's S-box: the inverse, then an affine map.
const SBOX: [u8; 256] = {
    let mut table = [0; 256];
    // 3 generates the field: p runs through its powers, q through their inverses.
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        p = times(p, 3);
        q = times(q, 0xf6);
        let x = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4);
        table[p as usize] = x ^ 0x63;
        if p == 1 {
            break;
        }
    }
    table[0] = 0x63;
    table
};

const INVERSE: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        table[SBOX[n] as usize] = n as u8;
        n += 1;
    }
    table
};

fn sub(state: u128, table: &[u8; 256]) -> u128 {
    join_u8(u8s(state).map(|byte| table[usize::from(byte)]))
}

/// ShiftRows: row r moves left by r columns; bytes are stored column by column.
fn shift_rows(state: u128) -> u128 {
    let bytes = u8s(state);
    join_u8(std::array::from_fn(|n| bytes[(n + 4 * (n % 4)) % 16]))
}

fn shift_rows_back(state: u128) -> u128 {
    let bytes = u8s(state);
    join_u8(std::array::from_fn(|n| bytes[(n + 12 * (n % 4)) % 16]))
}

fn mix(state: u128, factors: [u8; 4]) -> u128 {
    let bytes = u8s(state);
    join_u8(std::array::from_fn(|n| {
        let (column, row) = (n / 4 * 4, n % 4);
        (0..4).fold(0, |sum, k| {
            sum ^ times(bytes[column + k], factors[(k + 4 - row) % 4])
        })
    }))
}

fn mix_columns(state: u128) -> u128 {
    mix(state, [2, 3, 1, 1])
}

fn mix_columns_back(state: u128) -> u128 {
    mix(state, [14, 11, 13, 9])
}

fn key_assist(value: u128, round: u8) -> u128 {
    let words = u32s(sub(value, &SBOX));
    let constant = u32::from(round);
    join_u32([
        words[1],
        words[1].rotate_right(8) ^ constant,
        words[3],
        words[3].rotate_right(8) ^ constant,
    ])
}

/// Carry-less product of the halves that `imm` picks.
fn carryless(a: u128, b: u128, imm: u8) -> u128 {
    let a = u64s(a)[usize::from(imm & 1)];
    let b = u64s(b)[usize::from(imm >> 4 & 1)];
    (0..64).fold(0, |product, n| {
        if b >> n & 1 != 0 {
            product ^ u128::from(a) << n
        } else {
            product
        }
    })
}

// --- GFNI: the field of AES, and affine maps over GF(2)

/// The inverse in AES's field is its 254th power; 0 goes to 0.
const INVERSES: [u8; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let x = n as u8;
        let mut power = 1;
        let mut left = 254;
        while left > 0 {
            power = times(power, x);
            left -= 1;
        }
        table[n] = power;
        n += 1;
    }
    table
};

/// Every byte of `a` through the matrix in the same half of `matrices`, plus the constant; row 0 is byte 7.
fn affine(a: u128, matrices: u128, constant: u8) -> u128 {
    let (bytes, matrices) = (u8s(a), u64s(matrices));
    join_u8(std::array::from_fn(|n| {
        let rows = matrices[n / 8].to_le_bytes();
        (0..8).fold(constant, |out, bit| {
            let parity = (rows[7 - bit] & bytes[n]).count_ones() as u8 & 1;
            out ^ parity << bit
        })
    }))
}

fn affine_inverse(a: u128, matrices: u128, constant: u8) -> u128 {
    affine(sub(a, &INVERSES), matrices, constant)
}

// --- SHA-1 and SHA-256 (SDM volume 2, SHA1RNDS4 and following); lane 3 is the first word

fn sha1_rounds(a: u128, b: u128, imm: u8) -> u128 {
    let [d, c, bb, aa] = u32s(a);
    let words = u32s(b);
    let (mut a, mut b, mut c, mut d, mut e) = (aa, bb, c, d, 0u32);
    let constant = [0x5a82_7999, 0x6ed9_eba1, 0x8f1b_bcdc, 0xca62_c1d6][usize::from(imm & 3)];
    for n in 0..4 {
        let mixed = match imm & 3 {
            0 => b & c ^ !b & d,
            2 => b & c ^ b & d ^ c & d,
            _ => b ^ c ^ d,
        };
        let next = mixed
            .wrapping_add(a.rotate_left(5))
            .wrapping_add(words[3 - n])
            .wrapping_add(e)
            .wrapping_add(constant);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    join_u32([d, c, b, a])
}

fn sha1_next_e(a: u128, b: u128) -> u128 {
    let mut words = u32s(b);
    words[3] = words[3].wrapping_add(u32s(a)[3].rotate_left(30));
    join_u32(words)
}

fn sha1_message1(a: u128, b: u128) -> u128 {
    let (a, b) = (u32s(a), u32s(b));
    let w = [a[3], a[2], a[1], a[0], b[3], b[2]];
    join_u32([w[5] ^ w[3], w[4] ^ w[2], w[3] ^ w[1], w[2] ^ w[0]])
}

fn sha1_message2(a: u128, b: u128) -> u128 {
    let (a, b) = (u32s(a), u32s(b));
    let w16 = (a[3] ^ b[2]).rotate_left(1);
    let w17 = (a[2] ^ b[1]).rotate_left(1);
    let w18 = (a[1] ^ b[0]).rotate_left(1);
    let w19 = (a[0] ^ w16).rotate_left(1);
    join_u32([w19, w18, w17, w16])
}

fn sha256_rounds(dst: u128, src: u128, keys: u128) -> u128 {
    let [h, g, d, c] = u32s(dst);
    let [f, e, b, a] = u32s(src);
    let keys = u32s(keys);
    let mut s = [a, b, c, d, e, f, g, h];
    for key in &keys[..2] {
        let [a, b, c, d, e, f, g, h] = s;
        let choice = e & f ^ !e & g;
        let majority = a & b ^ a & c ^ b & c;
        let sum1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let sum0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t1 = choice.wrapping_add(sum1).wrapping_add(*key).wrapping_add(h);
        let t2 = majority.wrapping_add(sum0);
        s = [t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g];
    }
    join_u32([s[5], s[4], s[1], s[0]])
}

fn sha256_message1(a: u128, b: u128) -> u128 {
    let (a, b) = (u32s(a), u32s(b));
    let sigma = |w: u32| w.rotate_right(7) ^ w.rotate_right(18) ^ w >> 3;
    join_u32([
        a[0].wrapping_add(sigma(a[1])),
        a[1].wrapping_add(sigma(a[2])),
        a[2].wrapping_add(sigma(a[3])),
        a[3].wrapping_add(sigma(b[0])),
    ])
}

fn sha256_message2(a: u128, b: u128) -> u128 {
    let (a, b) = (u32s(a), u32s(b));
    let sigma = |w: u32| w.rotate_right(17) ^ w.rotate_right(19) ^ w >> 10;
    let w16 = a[0].wrapping_add(sigma(b[2]));
    let w17 = a[1].wrapping_add(sigma(b[3]));
    let w18 = a[2].wrapping_add(sigma(w16));
    let w19 = a[3].wrapping_add(sigma(w17));
    join_u32([w16, w17, w18, w19])
}

pub fn lower(insn: &Instruction, _uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    Some(match insn.mnemonic() {
        M::Aesenc => xmm2!(|a, b| mix_columns(shift_rows(sub(a, &SBOX))) ^ b),
        M::Aesenclast => xmm2!(|a, b| shift_rows(sub(a, &SBOX)) ^ b),
        M::Aesdec => xmm2!(|a, b| mix_columns_back(shift_rows_back(sub(a, &INVERSE))) ^ b),
        M::Aesdeclast => xmm2!(|a, b| shift_rows_back(sub(a, &INVERSE)) ^ b),
        M::Aesimc => xmm2!(|_, b| mix_columns_back(b)),
        M::Aeskeygenassist => xmm_imm!(|_, b, imm| key_assist(b, imm)),
        M::Pclmulqdq => xmm_imm!(carryless),
        M::Gf2p8mulb => xmm2!(|a, b| map_u8(a, b, times)),
        M::Gf2p8affineqb => xmm_imm!(affine),
        M::Gf2p8affineinvqb => xmm_imm!(affine_inverse),
        M::Sha1rnds4 => xmm_imm!(sha1_rounds),
        M::Sha1nexte => xmm2!(sha1_next_e),
        M::Sha1msg1 => xmm2!(sha1_message1),
        M::Sha1msg2 => xmm2!(sha1_message2),
        M::Sha256rnds2 => xmm_zero!(sha256_rounds),
        M::Sha256msg1 => xmm2!(sha256_message1),
        M::Sha256msg2 => xmm2!(sha256_message2),
        _ => return None,
    })
}
