//! What happens to a line: the rules of MKTME with integrity.
//!
//! Sources: Intel TDX module base specification, "Memory Integrity Protection" (checks on memory reads and writes);
//! Linux Documentation/arch/x86/tdx.rst, "TDX erratum" and "Integrity"; the white paper "Intel Trust Domain
//! Extensions". The TD-owner bit of a line is set by a write with a private KeyID and cleared by any other.
//!
//! | line is | read, shared KeyID | read, private KeyID | partial write, shared | partial write, private |
//! |---|---|---|---|---|
//! | owner = 1 | 64 zero bytes | MAC verifies (Ci): data; else poison, #MC | poison, silently | reads first, then writes |
//! | owner = 0 | decrypted, whoever wrote it | poison, #MC | reads first, then writes | poison, #MC |
//! | poisoned | #MC | #MC | stays poisoned | #MC |
//!
//! A write of the whole line checks nothing and clears poison. Li lacks the MAC; without integrity there are no
//! owner bits, and a wrong key reads (real) garbage.

use super::bytes;
use super::config::{Integrity, LINE};
use super::engine::LINE_BYTES;
use super::keys::Tag;
use super::page::{Line, Locked, LINES};
use super::{Fault, RawLine};

type Bytes = [u8; LINE_BYTES];

impl Locked<'_> {
    /// Reads within this page as a reader with `tag` does. `keyid` (in place) makes the address of a fault.
    pub fn read(
        &mut self,
        offset: usize,
        into: &mut [u8],
        tag: Tag,
        keyid: u64,
    ) -> Result<(), Fault> {
        if self.uniform() == Some(tag) {
            self.cells_out(offset, into);
            return Ok(());
        }
        for (index, start, part) in spans(offset, into.len()) {
            let line = self
                .view(index, tag)
                .map_err(|poisoned| poisoned.fault(self, keyid))?;
            into[part.clone()].copy_from_slice(&line[start..start + part.len()]);
        }
        self.settle();
        Ok(())
    }

    /// Writes within this page as a writer with `tag` does.
    pub fn write(&mut self, offset: usize, from: &[u8], tag: Tag, keyid: u64) -> Result<(), Fault> {
        if from.len() == LINES * LINE_BYTES {
            self.set_uniform(tag);
        }
        if self.uniform() == Some(tag) {
            self.note_store();
            self.cells_in(offset, from);
            return Ok(());
        }
        // Before lines are read to be merged with: no store of a running processor may get lost in between.
        self.take_back();
        for (index, start, part) in spans(offset, from.len()) {
            self.write_line(index, start, &from[part], tag)
                .map_err(|poisoned| poisoned.fault(self, keyid))?;
        }
        self.settle();
        Ok(())
    }

    /// Makes the page uniform under `tag`, if every line already is what that key would have written.
    pub fn unify(&mut self, tag: Tag) -> bool {
        if self.uniform().is_none() {
            let folded = (0..LINES).all(|index| match self.line(index) {
                Line::Plain(writer) => writer == tag,
                Line::Cipher { .. } => self.fold(index, tag),
                Line::Poisoned { .. } => false,
            });
            if folded {
                self.settle();
            }
        }
        self.uniform() == Some(tag)
    }

    /// A line as a probe finds it. Changes nothing.
    pub fn raw(&self, index: usize) -> RawLine {
        let mut data = self.cells(index);
        let (mac, owner) = match self.line(index) {
            Line::Cipher { mac, owner } | Line::Poisoned { mac, owner } => (mac, owner),
            Line::Plain(writer) => {
                self.mem
                    .keys
                    .key(writer)
                    .encrypt(self.address(index), &mut data);
                (self.mac(writer, index, &data), self.mem.owns(writer))
            }
        };
        RawLine {
            data,
            mac,
            owner,
            poisoned: matches!(self.line(index), Line::Poisoned { .. }),
        }
    }

    /// A probe's write into a line: the ciphertext changes, MAC, owner bit and poison stay.
    pub fn raw_write(&mut self, index: usize, start: usize, from: &[u8]) {
        self.take_back();
        let mut raw = self.raw(index);
        raw.data[start..start + from.len()].copy_from_slice(from);
        self.raw_set(index, &raw);
    }

    pub fn raw_set(&mut self, index: usize, raw: &RawLine) {
        let (mac, owner) = (raw.mac, raw.owner);
        let line = match raw.poisoned {
            true => Line::Poisoned { mac, owner },
            false => Line::Cipher { mac, owner },
        };
        self.set_line(index, line);
        self.note_store();
        self.cells_in(index * LINE_BYTES, &raw.data);
    }

    /// The plaintext that a reader with `tag` gets, or poison.
    fn view(&mut self, index: usize, tag: Tag) -> Result<Bytes, Poison> {
        match self.line(index) {
            Line::Plain(writer) if writer == tag => return Ok(self.cells(index)),
            Line::Poisoned { .. } => return Err(Poison(index)),
            _ => {}
        }
        if self.owner(index) && !tag.is_private() {
            return Ok([0; LINE_BYTES]);
        }
        let mut raw = self.raw(index);
        if tag.is_private() && !self.accepts(index, &raw, tag) {
            raw.poisoned = true;
            self.raw_set(index, &raw);
            return Err(Poison(index));
        }
        if self.fold(index, tag) {
            return Ok(self.cells(index));
        }
        self.mem
            .keys
            .key(tag)
            .decrypt(self.address(index), &mut raw.data);
        Ok(raw.data)
    }

    fn write_line(
        &mut self,
        index: usize,
        start: usize,
        from: &[u8],
        tag: Tag,
    ) -> Result<(), Poison> {
        if from.len() < LINE_BYTES && self.line(index) != Line::Plain(tag) {
            return self.write_part(index, start, from, tag);
        }
        self.set_line(index, Line::Plain(tag));
        self.note_store();
        self.cells_in(index * LINE_BYTES + start, from);
        Ok(())
    }

    /// A write of less than a line that another key wrote, or a probe, or that is poisoned.
    fn write_part(
        &mut self,
        index: usize,
        start: usize,
        from: &[u8],
        tag: Tag,
    ) -> Result<(), Poison> {
        if !tag.is_private() {
            let mut raw = self.raw(index);
            if raw.poisoned || raw.owner {
                raw.poisoned = true;
                self.raw_set(index, &raw);
                return Ok(());
            }
        }
        let mut line = self.view(index, tag)?;
        line[start..start + from.len()].copy_from_slice(from);
        self.write_line(index, 0, &line, tag)
    }

    /// Turns a line of ciphertext into plaintext under `tag`, if that key would write exactly this line.
    fn fold(&mut self, index: usize, tag: Tag) -> bool {
        let Line::Cipher { mac, owner } = self.line(index) else {
            return false;
        };
        let mut data = self.cells(index);
        if owner != self.mem.owns(tag) || mac != self.mac(tag, index, &data) {
            return false;
        }
        self.mem
            .keys
            .key(tag)
            .decrypt(self.address(index), &mut data);
        self.set_line(index, Line::Plain(tag));
        self.cells_in(index * LINE_BYTES, &data);
        true
    }

    /// The check of a read with a private KeyID.
    fn accepts(&self, index: usize, raw: &RawLine, tag: Tag) -> bool {
        match self.mem.integrity {
            Integrity::Crypto => raw.owner && raw.mac == self.mac(tag, index, &raw.data),
            Integrity::Logical => raw.owner,
            Integrity::None => true,
        }
    }

    /// The MAC that `tag` gives this ciphertext here; 0 where lines have none.
    fn mac(&self, tag: Tag, index: usize, ciphertext: &Bytes) -> u32 {
        match self.mem.integrity {
            Integrity::Crypto => {
                self.mem
                    .keys
                    .key(tag)
                    .mac(self.address(index), self.mem.owns(tag), ciphertext)
            }
            Integrity::Logical | Integrity::None => 0,
        }
    }

    fn owner(&self, index: usize) -> bool {
        match self.line(index) {
            Line::Cipher { owner, .. } | Line::Poisoned { owner, .. } => owner,
            Line::Plain(writer) => self.mem.owns(writer),
        }
    }

    fn address(&self, index: usize) -> u64 {
        self.page.address + index as u64 * LINE
    }

    fn cells(&self, index: usize) -> Bytes {
        let mut line = [0; LINE_BYTES];
        self.cells_out(index * LINE_BYTES, &mut line);
        line
    }

    pub fn cells_out(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= LINES * LINE_BYTES, "within the page");
        // SAFETY: in bounds of the page's 4096 cells, as just checked.
        unsafe { bytes::copy_out(self.page.data.add(offset), into) };
    }

    fn cells_in(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= LINES * LINE_BYTES, "within the page");
        // SAFETY: in bounds of the page's 4096 cells, as just checked.
        unsafe { bytes::copy_in(self.page.data.add(offset), from) };
    }
}

/// The line (by index) whose poison was consumed.
struct Poison(usize);

impl Poison {
    /// The machine check for it. A line was changed on the way, so the page may have to settle.
    fn fault(self, locked: &Locked, keyid: u64) -> Fault {
        Fault::MachineCheck {
            pa: keyid | locked.address(self.0),
        }
    }
}

/// The lines that `len` bytes at `offset` of a page touch: (line, offset in it, which of the bytes).
pub(super) fn spans(
    offset: usize,
    len: usize,
) -> impl Iterator<Item = (usize, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done;
        let (index, start) = (at / LINE_BYTES, at % LINE_BYTES);
        let part = done..len.min(done + LINE_BYTES - start);
        done = part.end;
        Some((index, start, part))
    })
}
