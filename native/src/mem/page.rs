//! The state of a page: one word when all is well, a table of 64 lines when it is not.
//!
//! ```text
//!   63      32 31        8  7  6   5     4      3        2       1      0
//!  ┌──────────┬───────────┬───┬───────┬──────┬────────┬───────┬───────┬──────┐
//!  │ tag      │ sequence  │ 0 │ DIRTY │ CODE │ OUT_W  │ OUT_R │ MIXED │ LOCK │
//!  └──────────┴───────────┴───┴───────┴──────┴────────┴───────┴───────┴──────┘
//! ```
//!
//! Not MIXED: all 64 lines are plain, written under `tag` (a fresh page is word 0: zeros under the TME key). MIXED:
//! the lines are in [`Lines`]. The word changes only under LOCK. A reader of an unmixed page needs no lock: it
//! reads the word, the data and the word again, and starts over if LOCK, tag or sequence differ; whoever changes
//! more than data raises the sequence.

use std::collections::HashMap;
use std::sync::atomic::{fence, Ordering};
use std::sync::{Mutex, PoisonError};

use super::bytes;
use super::config::{LINE, PAGE};
use super::dram::Page;
use super::keys::Tag;
use super::shootdown::{park, Backoff};
use super::{Agent, Memory};

const LOCK: u64 = 1 << 0;
const MIXED: u64 = 1 << 1;
/// A pointer was handed out for reading since the last shootdown.
const OUT_R: u64 = 1 << 2;
/// The same, for writing.
const OUT_W: u64 = 1 << 3;
/// Decoded code of this page may be cached.
const CODE: u64 = 1 << 4;
/// Something else than zeros may have been stored.
const DIRTY: u64 = 1 << 5;
const SEQ_ONE: u64 = 1 << 8;
const SEQ: u64 = 0xFFFF_FF00;
const TAG_SHIFT: u32 = 32;

pub(super) const LINES: usize = (PAGE / LINE) as usize;
const SHARDS: usize = 64;

/// One line of a mixed page. What its 64 bytes of DRAM cell hold is given in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// Written under this tag [plaintext].
    Plain(Tag),
    /// Touched by a probe [ciphertext]; its MAC and owner bit as they lie in DRAM.
    Cipher { mac: u32, owner: bool },
    /// Whoever reads it gets a machine check [ciphertext].
    Poisoned { mac: u32, owner: bool },
}

pub(super) type Lines = [Line; LINES];

/// The line tables of all mixed pages, by page address. A page's lock owns its table.
pub(super) struct MixedPages([Mutex<HashMap<u64, Box<Lines>>>; SHARDS]);

impl MixedPages {
    pub fn new() -> MixedPages {
        MixedPages(std::array::from_fn(|_| Mutex::default()))
    }

    fn with<T>(&self, page: u64, run: impl FnOnce(&mut HashMap<u64, Box<Lines>>) -> T) -> T {
        let shard = &self.0[(page / PAGE) as usize % SHARDS];
        run(&mut shard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Page<'_> {
    /// Reads this page's data without its lock, if it is uniform under `tag` and nobody changes it meanwhile.
    #[inline(always)]
    pub fn read_unlocked<T>(&self, tag: Tag, read: impl FnOnce(*const u8) -> T) -> Option<T> {
        let before = self.word.load(Ordering::Acquire);
        if before & (LOCK | MIXED) != 0 || before >> TAG_SHIFT != u64::from(tag.0) {
            return None;
        }
        let value = read(self.data);
        fence(Ordering::Acquire);
        let after = self.word.load(Ordering::Relaxed);
        let same = (before ^ after) & (LOCK | MIXED | SEQ | !0 << TAG_SHIFT) == 0;
        same.then_some(value)
    }
}

/// A page whose lock this thread holds. Dropping it publishes the new state.
pub(super) struct Locked<'m> {
    pub mem: &'m Memory,
    pub page: Page<'m>,
    agent: Agent<'m>,
    word: u64,
    lines: Option<Box<Lines>>,
}

impl<'m> Locked<'m> {
    #[inline]
    pub fn new(mem: &'m Memory, page: Page<'m>, agent: Agent<'m>) -> Locked<'m> {
        let word = try_lock(page).unwrap_or_else(|| wait_for(page, agent));
        Locked::with_word(mem, page, agent, word)
    }

    /// Takes the lock if that needs no waiting.
    #[inline]
    pub fn now(mem: &'m Memory, page: Page<'m>, agent: Agent<'m>) -> Option<Locked<'m>> {
        Some(Locked::with_word(mem, page, agent, try_lock(page)?))
    }

    #[inline(always)]
    fn with_word(mem: &'m Memory, page: Page<'m>, agent: Agent<'m>, word: u64) -> Locked<'m> {
        // Pairs with the fence in `read_unlocked`: who sees data stored from here on also sees LOCK.
        fence(Ordering::Release);
        let lines = match word & MIXED {
            0 => None,
            _ => mem
                .mixed
                .with(page.address, |tables| tables.remove(&page.address)),
        };
        Locked {
            mem,
            page,
            agent,
            word,
            lines,
        }
    }

    /// The tag of all lines, or `None` for a mixed page.
    #[inline(always)]
    pub fn uniform(&self) -> Option<Tag> {
        match self.lines {
            None => Some(self.tag()),
            Some(_) => None,
        }
    }

    /// Whether a pointer to this page may be in use.
    pub fn is_out(&self) -> bool {
        self.word & (OUT_R | OUT_W) != 0
    }

    /// Whether its cells may hold something else than zeros.
    pub fn is_dirty(&self) -> bool {
        self.word & DIRTY != 0
    }

    /// What the word says; holds for a page that is not mixed.
    #[inline(always)]
    fn tag(&self) -> Tag {
        Tag((self.word >> TAG_SHIFT) as u32)
    }

    pub fn line(&self, index: usize) -> Line {
        match &self.lines {
            Some(lines) => lines[index],
            None => Line::Plain(self.tag()),
        }
    }

    /// Gives a line another state, before its data change: what is out of it is taken back first.
    pub fn set_line(&mut self, index: usize, line: Line) {
        if self.line(index) == line {
            return;
        }
        if let Some(tag) = self.uniform() {
            self.take_back();
            self.disturb_readers();
            self.lines = Some(Box::new([Line::Plain(tag); LINES]));
        }
        if let Some(lines) = &mut self.lines {
            lines[index] = line;
        }
    }

    /// Makes all lines plain under `tag`, before the whole page is overwritten.
    #[inline]
    pub fn set_uniform(&mut self, tag: Tag) {
        if self.uniform() != Some(tag) {
            self.take_back();
            self.lines = None;
            self.retag(tag);
        }
    }

    /// If the lines agree on a tag again, the page is uniform again.
    pub fn settle(&mut self) {
        let Some(lines) = &self.lines else { return };
        if let Line::Plain(tag) = lines[0] {
            // From the end: whoever fills a page line by line mostly begins at the start.
            if lines.iter().rev().all(|line| *line == Line::Plain(tag)) {
                self.lines = None;
                self.retag(tag);
            }
        }
    }

    /// No processor uses a pointer to this page after this, until the lock is gone.
    pub fn take_back(&mut self) {
        if self.is_out() {
            let since = self.page.out_at.load(Ordering::Relaxed);
            self.mem.shootdown.take_back_since(since, self.agent.cpu);
            self.word &= !(OUT_R | OUT_W);
        }
    }

    /// Unlocked readers that overlap with what this thread does now start over.
    pub fn disturb_readers(&mut self) {
        self.word = (self.word & !SEQ) | (self.word.wrapping_add(SEQ_ONE) & SEQ);
    }

    /// Hands out a pointer, see `Memory::page_ptr`.
    pub fn hand_out(&mut self, write: bool) -> Option<*mut u8> {
        if write && self.word & CODE != 0 {
            return None;
        }
        self.word |= if write { OUT_R | OUT_W } else { OUT_R };
        // The receiver runs, so an epoch that it does not see yet waits for it.
        self.page
            .out_at
            .store(self.mem.shootdown.epoch(), Ordering::Relaxed);
        if write {
            self.note_store();
        }
        Some(self.page.data)
    }

    /// Begins to watch the page for stores; returns its code generation.
    pub fn watch_code(&mut self) -> u32 {
        if self.word & OUT_W != 0 {
            self.take_back();
        }
        self.word |= CODE;
        self.page.code.load(Ordering::Acquire)
    }

    /// The data are about to change: decoded code of the page is stale, the chunk is in use.
    #[inline(always)]
    pub fn note_store(&mut self) {
        if self.word & (DIRTY | CODE) != DIRTY {
            self.first_store();
        }
    }

    /// Fills the page with zeros; it must be uniform.
    pub fn zero(&mut self) {
        let dirty = self.is_dirty();
        self.note_store();
        if dirty {
            // SAFETY: a page is 4096 bytes of cells, 8-byte aligned.
            unsafe { bytes::zero(self.page.data, PAGE as usize) };
        }
        if self.word & OUT_W == 0 {
            self.word &= !DIRTY;
        }
    }

    #[cold]
    fn first_store(&mut self) {
        if self.word & CODE != 0 {
            self.page.code.fetch_add(1, Ordering::Release);
            self.mem.code_stores.fetch_add(1, Ordering::Release);
        }
        self.word = self.word & !CODE | DIRTY;
        self.page.touch();
    }

    fn retag(&mut self, tag: Tag) {
        self.disturb_readers();
        self.word = (self.word & 0xFFFF_FFFF) | u64::from(tag.0) << TAG_SHIFT;
    }
}

impl Drop for Locked<'_> {
    #[inline]
    fn drop(&mut self) {
        self.word &= !MIXED;
        if let Some(lines) = self.lines.take() {
            self.word |= MIXED;
            let page = self.page.address;
            self.mem
                .mixed
                .with(page, |tables| tables.insert(page, lines));
        }
        self.page.word.store(self.word, Ordering::Release);
    }
}

#[inline(always)]
fn try_lock(page: Page) -> Option<u64> {
    let free = page.word.load(Ordering::Relaxed) & !LOCK;
    page.word
        .compare_exchange(free, free | LOCK, Ordering::Acquire, Ordering::Relaxed)
        .ok()
}

/// Takes the lock when it was not free. The processor counts as not running meanwhile.
#[cold]
fn wait_for(page: Page, agent: Agent) -> u64 {
    let _parked = park(agent.cpu);
    let mut wait = Backoff::default();
    loop {
        let word = page.word.load(Ordering::Relaxed);
        if word & LOCK == 0
            && page
                .word
                .compare_exchange_weak(word, word | LOCK, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        {
            return word;
        }
        wait.pause();
    }
}
