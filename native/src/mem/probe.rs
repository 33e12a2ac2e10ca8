//! The probe on the memory bus: it sees and changes what DRAM really holds, past every check.
//!
//! Addresses have no KeyID. Looking changes nothing: ciphertext is made on the way out. Outside DRAM everything
//! reads as ones and writes are dropped.

use super::config::PAGE;
use super::engine::{LINE_BYTES, MAC_MASK};
use super::lines::spans;
use super::page::{Locked, LINES};
use super::{Agent, Integrity, Memory};

/// A line as it lies in DRAM. A MAC of 0 on a platform without cryptographic integrity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawLine {
    pub data: [u8; LINE_BYTES],
    pub mac: u32,
    pub owner: bool,
    pub poisoned: bool,
}

impl Memory {
    /// The ciphertext of any stretch of DRAM.
    pub fn raw_read(&self, pa: u64, into: &mut [u8]) {
        for (at, part) in pages(pa, into.len()) {
            let into = &mut into[part];
            match self.probe(at, Agent::HOST) {
                Some(locked) => raw_out(locked, (at % PAGE) as usize, into),
                None => into.fill(0xFF),
            }
        }
    }

    /// Overwrites ciphertext. MAC, owner bit and poison of the lines stay as they are.
    pub fn raw_write(&self, pa: u64, from: &[u8], agent: Agent) {
        for (at, part) in pages(pa, from.len()) {
            let Some(mut locked) = self.probe(at, agent) else {
                continue;
            };
            let from = &from[part];
            for (index, start, part) in spans((at % PAGE) as usize, from.len()) {
                locked.raw_write(index, start, &from[part]);
            }
        }
    }

    /// The line that `pa` lies in, with what the engine keeps beside it.
    pub fn raw_line(&self, pa: u64) -> RawLine {
        match self.probe(pa, Agent::HOST) {
            Some(locked) => locked.raw((pa % PAGE) as usize / LINE_BYTES),
            None => RawLine {
                data: [0xFF; LINE_BYTES],
                mac: MAC_MASK,
                owner: false,
                poisoned: false,
            },
        }
    }

    /// Puts a whole line into DRAM: one that `raw_line` gave before (a replay), or one from elsewhere (a splice).
    /// `mac` counts with cryptographic integrity only, `owner` with any.
    pub fn raw_set_line(
        &self,
        pa: u64,
        data: &[u8; LINE_BYTES],
        mac: u32,
        owner: bool,
        agent: Agent,
    ) {
        let Some(mut locked) = self.probe(pa, agent) else {
            return;
        };
        let mac = if self.integrity == Integrity::Crypto {
            mac & MAC_MASK
        } else {
            0
        };
        let owner = owner && self.integrity != Integrity::None;
        let raw = RawLine {
            data: *data,
            mac,
            owner,
            poisoned: false,
        };
        locked.raw_set((pa % PAGE) as usize / LINE_BYTES, &raw);
    }

    /// Bytes of DRAM that anything was ever written to, in 2 MiB chunks.
    pub fn resident(&self) -> u64 {
        self.dram.resident()
    }

    fn probe<'m>(&'m self, pa: u64, agent: Agent<'m>) -> Option<Locked<'m>> {
        Some(Locked::new(self, self.dram.page(pa)?, agent))
    }
}

/// Ciphertext out of one page.
fn raw_out(locked: Locked, offset: usize, into: &mut [u8]) {
    let Some(tag) = locked.uniform() else {
        for (index, start, part) in spans(offset, into.len()) {
            into[part.clone()].copy_from_slice(&locked.raw(index).data[start..start + part.len()]);
        }
        return;
    };
    // All lines at once, and without the lock: this is what a dump of DRAM spends its time in.
    let first = offset / LINE_BYTES * LINE_BYTES;
    let last = (offset + into.len()).next_multiple_of(LINE_BYTES);
    let mut cells = [0; LINES * LINE_BYTES];
    let cells = &mut cells[..last - first];
    // Nobody's memory is touched for a page that was never written to.
    if locked.is_dirty() {
        locked.cells_out(first, cells);
    }
    let (key, address) = (locked.mem.keys.key(tag), locked.page.address + first as u64);
    drop(locked);
    key.encrypt(address, cells);
    into.copy_from_slice(&cells[offset - first..][..into.len()]);
}

/// Cuts a stretch at page boundaries: (address, which of the bytes). Addresses past 2^64 are nowhere.
fn pages(pa: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = pa.saturating_add(done as u64);
        let left = (PAGE - at % PAGE) as usize;
        let part = done..len.min(done.saturating_add(left));
        done = part.end;
        Some((at, part))
    })
}
