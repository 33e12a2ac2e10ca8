//! Which key a KeyID stands for, now and in the past.
//!
//! Programming a KeyID makes a new [`Tag`]. Lines remember the tag that wrote them, so a reprogrammed KeyID does
//! not read what its old key wrote, and the old key stays known for as long as a probe may look at such a line.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::config::{unfit, Config, Unfit};
use super::engine::{KeyPair, KeySource, LineKey};

/// One programming of one KeyID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Tag(pub u32);

const PRIVATE: u32 = 1 << 31;
/// In `current`: no key. Never a tag, since that many keys do not fit in memory.
const NO_KEY: u32 = u32::MAX;

impl Tag {
    /// The key of KeyID 0, under which DRAM wakes up as zeros.
    pub const TME: Tag = Tag(0);

    pub fn is_private(self) -> bool {
        self.0 & PRIVATE != 0
    }
}

struct Keys {
    /// By tag, without the `PRIVATE` bit.
    by_tag: Vec<Arc<LineKey>>,
    source: KeySource,
}

pub(super) struct KeyTable {
    current: Box<[AtomicU32]>,
    keys: RwLock<Keys>,
    /// One programming at a time, its shootdown included.
    pub programming: Mutex<()>,
    generation: AtomicU64,
    platform: [u8; 32],
    first_private: u32,
}

impl KeyTable {
    pub fn new(config: &Config) -> KeyTable {
        let mut source = KeySource::new(config.seed);
        let platform = source.draw();
        let tme = match config.tme {
            true => LineKey::new(&platform, &source.draw_pair()),
            false => LineKey::bypass(&platform),
        };
        let first_private = config.first_private_keyid;
        let slot = |keyid| {
            AtomicU32::new(if keyid < first_private {
                Tag::TME.0
            } else {
                NO_KEY
            })
        };
        KeyTable {
            current: (0..1 << config.keyid_bits).map(slot).collect(),
            keys: RwLock::new(Keys {
                by_tag: vec![Arc::new(tme)],
                source,
            }),
            programming: Mutex::new(()),
            generation: AtomicU64::new(0),
            platform,
            first_private,
        }
    }

    pub fn is_private(&self, keyid: u32) -> bool {
        keyid >= self.first_private
    }

    /// The tag that `keyid` writes with now. A shared KeyID without a key of its own uses the TME key.
    #[inline(always)]
    pub fn current(&self, keyid: u32) -> Option<Tag> {
        // SeqCst: a page pointer is made by the key read here, or the programmer's shootdown catches it.
        match self.current.get(keyid as usize)?.load(Ordering::SeqCst) {
            NO_KEY => None,
            tag => Some(Tag(tag)),
        }
    }

    pub fn key(&self, tag: Tag) -> Arc<LineKey> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.by_tag[(tag.0 & !PRIVATE) as usize].clone()
    }

    pub fn program(&self, keyid: u32, pair: Option<KeyPair>) -> Result<(), Unfit> {
        let slot = self.programmable(keyid)?;
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        let pair = pair.unwrap_or_else(|| keys.source.draw_pair());
        let tag = keys.by_tag.len() as u32 | if self.is_private(keyid) { PRIVATE } else { 0 };
        keys.by_tag
            .push(Arc::new(LineKey::new(&self.platform, &pair)));
        slot.store(tag, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    pub fn clear(&self, keyid: u32) -> Result<(), Unfit> {
        let tag = if self.is_private(keyid) {
            NO_KEY
        } else {
            Tag::TME.0
        };
        self.programmable(keyid)?.store(tag, Ordering::SeqCst);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn programmable(&self, keyid: u32) -> Result<&AtomicU32, Unfit> {
        if keyid == 0 {
            return unfit("KeyID 0 is TME's own; its key is drawn when the platform starts".into());
        }
        match self.current.get(keyid as usize) {
            Some(slot) => Ok(slot),
            None => unfit(format!(
                "KeyID {keyid} does not exist; the highest is {}",
                self.current.len() - 1
            )),
        }
    }
}
