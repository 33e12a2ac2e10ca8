//! Words that processors change with LOCK-prefixed instructions: SEAM software's own data, which no host reaches.
//!
//! A word is found by a key of 64 bits and is 0 until somebody stores another value, so the locks of a whole PAMT take
//! room only while they are held. Two ways to take one are built in, because they are one instruction each when
//! nobody is in the way:
//!
//! - exclusively: `LOCK CMPXCHG` from 0 to [`HELD`];
//! - shared: `LOCK XADD` of [`READER`], if neither [`HELD`] nor [`MARK`] is set.
//!
//! Who gives a word back may watch it: until somebody takes it again it is known that what it protects did not change.
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

#[derive(Default)]
struct Table {
    rows: Rows,
    /// (who watches, key), one a watcher.
    watches: Vec<(usize, u64)>,
    watchers: usize,
}

/// All words of one piece of SEAM software.
#[derive(Default)]
pub struct Words(Mutex<Table>);

/// The words while one instruction works on them: nobody else's comes in between.
pub struct Bus<'w>(MutexGuard<'w, Table>);

impl Words {
    pub fn bus(&self) -> Bus<'_> {
        Bus(self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Every word that is not 0.
    pub fn rows(&self) -> Vec<(u64, u64)> {
        self.bus()
            .0
            .rows
            .iter()
            .map(|(key, word)| (*key, *word))
            .collect()
    }
}

impl Bus<'_> {
    pub fn load(&self, key: u64) -> u64 {
        self.0.rows.get(&key).copied().unwrap_or(0)
    }

    fn store(&mut self, key: u64, word: u64) {
        if word == 0 {
            self.0.rows.remove(&key);
        } else {
            self.0.rows.insert(key, word);
        }
    }

    /// A number for one who may watch a word.
    pub fn new_watcher(&mut self) -> usize {
        self.0.watchers += 1;
        self.0.watchers
    }

    /// From now on `watcher`, who holds the word, watches it and no other.
    pub fn watch(&mut self, watcher: usize, key: u64) {
        self.0.watches.retain(|(who, _)| *who != watcher);
        self.0.watches.push((watcher, key));
    }

    /// Takes a free word exclusively if nobody has had it since `watcher` began to watch it; the watch goes on.
    pub fn take_watched(&mut self, watcher: usize, key: u64) -> bool {
        let free = self.0.watches.contains(&(watcher, key)) && self.load(key) == 0;
        if free {
            self.store(key, HELD);
        }
        free
    }

    fn end_watches(&mut self, key: u64) {
        self.0.watches.retain(|(_, watched)| *watched != key);
    }

    /// Compare and exchange; returns the word found.
    pub fn cas(&mut self, key: u64, old: u64, new: u64) -> u64 {
        let found = self.load(key);
        if found == old {
            self.end_watches(key);
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
            self.end_watches(key);
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
        for _ in 0..2 {
            assert!(words.bus().take(7, false));
        }
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
    fn a_watch_ends_when_anybody_takes_the_word() {
        let words = Words::default();
        let a = words.bus().new_watcher();
        let b = words.bus().new_watcher();
        let again = |who| {
            let mut bus = words.bus();
            let taken = bus.take_watched(who, 7);
            if taken {
                assert!(!bus.take_watched(who, 7), "it is held");
                assert_eq!(bus.release(7, true), Ok(()));
            }
            taken
        };
        let takes: [&dyn Fn(&mut Bus<'_>); 3] = [
            &|bus| assert!(bus.take(7, true)),
            &|bus| assert!(bus.take(7, false)),
            &|bus| assert_eq!(bus.cas(7, 0, HELD), 0),
        ];
        for take in takes {
            assert!(words.bus().take(7, true));
            words.bus().watch(a, 7);
            assert_eq!(words.bus().release(7, true), Ok(()));
            assert!(again(a) && again(a));
            assert!(!again(b));
            assert!(words.bus().take(8, true));
            assert_eq!(words.bus().release(8, true), Ok(()));
            assert!(again(a));
            take(&mut words.bus());
            let mode = words.bus().load(7) == HELD;
            assert_eq!(words.bus().release(7, mode), Ok(()));
            assert!(!again(a));
        }
    }

    #[test]
    fn one_watches_one_word_and_a_mark_keeps_it() {
        let words = Words::default();
        words.bus().watch(1, 7);
        words.bus().watch(1, 8);
        assert!(!words.bus().take_watched(1, 7));
        assert!(words.bus().take_watched(1, 8));
        assert_eq!(words.bus().cas(8, HELD, HELD | MARK), HELD);
        assert_eq!(words.bus().release(8, true), Ok(()));
        assert!(!words.bus().take_watched(1, 8));
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
