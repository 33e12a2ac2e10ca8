//! The cryptography of the engine: AES-XTS-128 over a line, and the 28-bit MAC beside it.
//!
//! A line is one XTS data unit of 64 bytes; the tweak is its physical address without the KeyID, so equal lines at
//! two addresses differ and a line moved elsewhere decrypts to garbage. The MAC is a SHA3-256 over key and line,
//! cut to 28 bits, as Intel describes for MKTME-i ("Intel Trust Domain Extensions" white paper, memory integrity).
//! What exactly goes into Intel's hash is not public; ours is platform MAC key, line key, address, owner bit and
//! ciphertext, all of fixed length.

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Block};
use sha3::{Digest, Sha3_256};

pub const LINE_BYTES: usize = 64;
const BLOCK_BYTES: usize = 16;
const BLOCKS: usize = LINE_BYTES / BLOCK_BYTES;
/// Lines ciphered together: enough to fill the host's AES pipeline, on the stack.
const BATCH: usize = 16;
pub const MAC_MASK: u32 = (1 << 28) - 1;

/// A data key and a tweak key, as PCONFIG takes them.
pub type KeyPair = ([u8; 16], [u8; 16]);

/// One programmed key. `None` as cipher is the bypass of a platform without TME.
pub struct LineKey {
    cipher: Option<(Aes128, Aes128)>,
    /// Ties a MAC to the platform and to this key.
    mac_secret: [u8; 32],
}

impl LineKey {
    pub fn new(platform: &[u8; 32], pair: &KeyPair) -> LineKey {
        LineKey {
            cipher: Some((Aes128::new(&pair.0.into()), Aes128::new(&pair.1.into()))),
            mac_secret: mac_secret(platform, &[&pair.0, &pair.1]),
        }
    }

    pub fn bypass(platform: &[u8; 32]) -> LineKey {
        LineKey {
            cipher: None,
            mac_secret: mac_secret(platform, &[]),
        }
    }

    /// Encrypts whole lines in place; `address` is that of the first one.
    pub fn encrypt(&self, address: u64, lines: &mut [u8]) {
        self.each_batch(address, lines, |cipher, blocks| {
            cipher.encrypt_blocks(blocks)
        });
    }

    /// Decrypts whole lines in place; `address` is that of the first one.
    pub fn decrypt(&self, address: u64, lines: &mut [u8]) {
        self.each_batch(address, lines, |cipher, blocks| {
            cipher.decrypt_blocks(blocks)
        });
    }

    /// The MAC of a line of ciphertext.
    pub fn mac(&self, address: u64, owner: bool, ciphertext: &[u8; LINE_BYTES]) -> u32 {
        let mut hash = Sha3_256::new();
        hash.update(self.mac_secret);
        hash.update(address.to_le_bytes());
        hash.update([u8::from(owner)]);
        hash.update(ciphertext);
        let digest = hash.finalize();
        u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]]) & MAC_MASK
    }

    fn each_batch(&self, address: u64, lines: &mut [u8], run: impl Fn(&Aes128, &mut [Block])) {
        let Some((data, tweak)) = &self.cipher else {
            return;
        };
        debug_assert!(
            lines.len().is_multiple_of(LINE_BYTES) && address.is_multiple_of(LINE_BYTES as u64)
        );
        let mut address = address;
        for batch in lines.chunks_mut(BATCH * LINE_BYTES) {
            let masks = masks(tweak, address, batch.len() / LINE_BYTES);
            let mut blocks = [Block::default(); BATCH * BLOCKS];
            let blocks = &mut blocks[..batch.len() / BLOCK_BYTES];
            for ((block, bytes), mask) in blocks
                .iter_mut()
                .zip(batch.chunks_exact(BLOCK_BYTES))
                .zip(&masks)
            {
                *block = (value(bytes) ^ mask).to_le_bytes().into();
            }
            run(data, blocks);
            for ((block, bytes), mask) in blocks
                .iter()
                .zip(batch.chunks_exact_mut(BLOCK_BYTES))
                .zip(&masks)
            {
                bytes.copy_from_slice(&(value(block) ^ mask).to_le_bytes());
            }
            address += batch.len() as u64;
        }
    }
}

/// The XTS mask of each block (IEEE 1619, 5.3.2): the encrypted tweak, times α for every further block of the line.
fn masks(tweak: &Aes128, address: u64, lines: usize) -> [u128; BATCH * BLOCKS] {
    let mut firsts = [Block::default(); BATCH];
    for (n, first) in firsts[..lines].iter_mut().enumerate() {
        *first = u128::from(address + (n * LINE_BYTES) as u64)
            .to_le_bytes()
            .into();
    }
    tweak.encrypt_blocks(&mut firsts[..lines]);
    let mut masks = [0; BATCH * BLOCKS];
    for (line, first) in masks.chunks_exact_mut(BLOCKS).zip(&firsts[..lines]) {
        let mut mask = value(first);
        for slot in line {
            *slot = mask;
            mask = (mask << 1) ^ (0x87 * (mask >> 127));
        }
    }
    masks
}

fn value(block: &[u8]) -> u128 {
    let mut bytes = [0; BLOCK_BYTES];
    bytes.copy_from_slice(block);
    u128::from_le_bytes(bytes)
}

fn mac_secret(platform: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha3_256::new();
    hash.update(b"softtdx line MAC");
    hash.update(platform);
    for part in parts {
        hash.update(part);
    }
    hash.finalize().into()
}

/// The seeded source of every key that is not given: SHA3-256 in counter mode.
pub struct KeySource {
    seed: u64,
    drawn: u64,
}

impl KeySource {
    pub fn new(seed: u64) -> KeySource {
        KeySource { seed, drawn: 0 }
    }

    pub fn draw(&mut self) -> [u8; 32] {
        let mut hash = Sha3_256::new();
        hash.update(b"softtdx key source");
        hash.update(self.seed.to_le_bytes());
        hash.update(self.drawn.to_le_bytes());
        self.drawn += 1;
        hash.finalize().into()
    }

    pub fn draw_pair(&mut self) -> KeyPair {
        let drawn = self.draw();
        let (data, tweak) = drawn.split_at(16);
        let mut pair = KeyPair::default();
        pair.0.copy_from_slice(data);
        pair.1.copy_from_slice(tweak);
        pair
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xts_mode::Xts128;

    const PAIR: KeyPair = ([0x11; 16], [0x22; 16]);

    fn key() -> LineKey {
        LineKey::new(&[7; 32], &PAIR)
    }

    #[test]
    fn lines_are_ciphered_as_another_xts_does() {
        let theirs = Xts128::new(Aes128::new(&PAIR.0.into()), Aes128::new(&PAIR.1.into()));
        for lines in [1, 15, 16, 17, 64] {
            let plain: Vec<u8> = (0..lines * LINE_BYTES)
                .map(|n| (n * 7 % 251) as u8)
                .collect();
            let mut ours = plain.clone();
            key().encrypt(0x1234_5000, &mut ours);
            let mut expected = plain.clone();
            for (n, line) in expected.chunks_exact_mut(LINE_BYTES).enumerate() {
                let tweak = u128::from(0x1234_5000 + (n * LINE_BYTES) as u64).to_le_bytes();
                theirs.encrypt_sector(line, tweak.into());
            }
            assert_eq!(ours, expected);
            key().decrypt(0x1234_5000, &mut ours);
            assert_eq!(ours, plain);
        }
    }

    /// IEEE 1619-2018 annex B, vector 2 (32 bytes, which our four-block line extends).
    #[test]
    fn ieee_vector_2_is_met() {
        let key = LineKey::new(&[0; 32], &([0x11; 16], [0x22; 16]));
        let masks = masks(&key.cipher.as_ref().unwrap().1, 0x33_3333_3333, 1);
        let mut block = [(u128::from_le_bytes([0x44; 16]) ^ masks[0])
            .to_le_bytes()
            .into()];
        key.cipher.as_ref().unwrap().0.encrypt_blocks(&mut block);
        let out = (value(&block[0]) ^ masks[0]).to_le_bytes();
        assert_eq!(out[..8], [0xc4, 0x54, 0x18, 0x5e, 0x6a, 0x16, 0x93, 0x6e]);
    }

    #[test]
    fn a_mac_depends_on_everything_it_covers() {
        let line = [5; 64];
        let mut bent = line;
        bent[63] ^= 1;
        let mac = key().mac(0x40, true, &line);
        assert_eq!(mac, key().mac(0x40, true, &line));
        assert_eq!(mac & !MAC_MASK, 0);
        for other in [
            key().mac(0x80, true, &line),
            key().mac(0x40, false, &line),
            key().mac(0x40, true, &bent),
            LineKey::new(&[8; 32], &PAIR).mac(0x40, true, &line),
            LineKey::new(&[7; 32], &([0x11; 16], [0x23; 16])).mac(0x40, true, &line),
        ] {
            assert_ne!(mac, other);
        }
    }

    #[test]
    fn a_seed_draws_the_same_keys_and_never_one_twice() {
        let draw = |seed| {
            let mut source = KeySource::new(seed);
            [source.draw_pair(), source.draw_pair()]
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        let [first, second] = draw(1);
        assert_ne!(first, second);
        assert_ne!(first.0, first.1);
    }
}
