//! Words that processors change with LOCK-prefixed instructions: SEAM software's own data, which no host reaches.
//!
//! A word is found by a key of 64 bits and is 0 until somebody stores another value, so the locks of a whole PAMT take
//! room only while they are held. Two ways to take one are built in, because they are one instruction each when
//! nobody is in the way:
//!
//! - exclusively: `LOCK CMPXCHG` from 0 to [`HELD`];
//! - shared: `LOCK XADD` of [`READER`], if neither [`HELD`] nor [`MARK`] is set.
//!
//! What the mark means, and what is done when a word cannot be taken so, is software's affair: `load` and `cas`.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bit 0: held exclusively.
pub const HELD: u64 = 1;
/// Bit 1: software's mark.
pub const MARK: u64 = 2;
/// Bits 63:2 count the shared holders.
pub const READER: u64 = 4;

/// Keys are addresses of pages and of a few constants: their middle bits are spread by one multiplication.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ mixed >> 32;
    }
}

type Rows = HashMap<u64, u64, BuildHasherDefault<KeyHasher>>;

/// All words of one piece of SEAM software.
#[derive(Default)]
pub struct Words(Mutex<Rows>);

/// The words while one instruction works on them: nobody else's comes in between.
pub struct Bus<'w>(MutexGuard<'w, Rows>);

impl Words {
    pub fn bus(&self) -> Bus<'_> {
        Bus(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every word that is not 0.
    pub fn rows(&self) -> Vec<(u64, u64)> {
        self.bus()
            .0
            .iter()
            .map(|(key, word)| (*key, *word))
            .collect()
    }
}

impl Bus<'_> {
    pub fn load(&self, key: u64) -> u64 {
        self.0.get(&key).copied().unwrap_or(0)
    }

    pub fn store(&mut self, key: u64, word: u64) {
        if word == 0 {
            self.0.remove(&key);
        } else {
            self.0.insert(key, word);
        }
    }

    /// Compare and exchange; returns the word found.
    pub fn cas(&mut self, key: u64, old: u64, new: u64) -> u64 {
        let found = self.load(key);
        if found == old {
            self.store(key, new);
        }
        found
    }

    /// Whether nobody is in the way of taking a word.
    pub fn is_free(&self, key: u64, exclusive: bool) -> bool {
        let word = self.load(key);
        word == 0 || !exclusive && word & (HELD | MARK) == 0
    }

    /// Takes a word that `is_free`; `false` when it is not, and nothing was done.
    pub fn take(&mut self, key: u64, exclusive: bool) -> bool {
        let free = self.is_free(key, exclusive);
        if free {
            let word = if exclusive {
                HELD
            } else {
                self.load(key).saturating_add(READER)
            };
            self.store(key, word);
        }
        free
    }

    /// Gives back what `take`, or software with `cas`, took. `Err`: the word, which is not held in this mode.
    pub fn release(&mut self, key: u64, exclusive: bool) -> Result<(), u64> {
        let word = self.load(key);
        let readers = word & !(HELD | MARK);
        let left = match exclusive {
            true if word & HELD != 0 => word & !HELD,
            false if word & HELD == 0 && readers != 0 => word - READER,
            _ => return Err(word),
        };
        self.store(key, left);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_word_is_taken_once_exclusively() {
        let words = Words::default();
        assert!(words.bus().take(7, true));
        assert!(!words.bus().take(7, true));
        assert!(!words.bus().take(7, false));
        assert_eq!(words.bus().release(7, false), Err(HELD));
        assert_eq!(words.bus().release(7, true), Ok(()));
        assert_eq!(words.rows(), []);
        assert_eq!(words.bus().release(7, true), Err(0));
        assert_eq!(words.bus().release(7, false), Err(0));
    }

    #[test]
    fn readers_share_and_a_mark_keeps_new_ones_out() {
        let words = Words::default();
        assert!(words.bus().take(7, false) && words.bus().take(7, false));
        assert_eq!(
            words.bus().cas(7, 2 * READER, (2 * READER) | MARK),
            2 * READER
        );
        assert!(!words.bus().take(7, false));
        assert_eq!(words.bus().release(7, false), Ok(()));
        assert_eq!(words.bus().release(7, false), Ok(()));
        assert_eq!(words.rows(), [(7, MARK)]);
        assert_eq!(words.bus().release(7, false), Err(MARK));
        assert!(!words.bus().take(7, true));
    }

    #[test]
    fn a_mark_outlives_the_exclusive_holder() {
        let words = Words::default();
        assert!(words.bus().take(u64::MAX, true));
        assert_eq!(words.bus().cas(u64::MAX, HELD, HELD | MARK), HELD);
        assert_eq!(words.bus().cas(u64::MAX, HELD, 0), HELD | MARK);
        assert_eq!(words.bus().release(u64::MAX, true), Ok(()));
        assert_eq!(words.rows(), [(u64::MAX, MARK)]);
    }
}
