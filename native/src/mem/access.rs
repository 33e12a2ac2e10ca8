//! Loads and stores through the engine, and pages handed out whole.

use super::bytes::{self, Word};
use super::config::{LINE, PAGE};
use super::dram::Page;
use super::keys::Tag;
use super::page::Locked;
use super::{Agent, Fault, Memory, PageAccess, Requester};

const OFFSET: u64 = PAGE - 1;

/// An address that no DRAM answers: where a Host access to SEAMRR goes.
const NOWHERE: u64 = 1 << 63;

impl Memory {
    /// Reads any length, crossing lines and pages. Outside DRAM everything reads as ones.
    #[inline]
    pub fn read(&self, pa: u64, into: &mut [u8], agent: Agent) -> Result<(), Fault> {
        self.check_span(pa, into.len())?;
        let mut at = pa;
        let mut rest = into;
        while !rest.is_empty() {
            let (part, more) = rest.split_at_mut(rest.len().min((PAGE - (at & OFFSET)) as usize));
            self.read_in_page(at, part, agent)?;
            at += part.len() as u64;
            rest = more;
        }
        Ok(())
    }

    /// Writes any length, crossing lines and pages. Outside DRAM writes are dropped.
    #[inline]
    pub fn write(&self, pa: u64, from: &[u8], agent: Agent) -> Result<(), Fault> {
        self.check_span(pa, from.len())?;
        let mut at = pa;
        let mut rest = from;
        while !rest.is_empty() {
            let (part, more) = rest.split_at(rest.len().min((PAGE - (at & OFFSET)) as usize));
            self.write_in_page(at, part, agent)?;
            at += part.len() as u64;
            rest = more;
        }
        Ok(())
    }

    /// Reads within one page if that needs no wait and no change of any line; `false`: nothing was done, use `read`.
    #[inline]
    pub fn read_now(&self, pa: u64, into: &mut [u8], agent: Agent) -> bool {
        let Some((page, tag)) = self.whole_in_page(pa, into.len(), agent) else {
            return false;
        };
        let offset = (pa & OFFSET) as usize;
        // SAFETY: `whole_in_page` keeps the access within the page.
        let read = |data: *const u8| unsafe { bytes::copy_out(data.add(offset), into) };
        page.read_unlocked(tag, read).is_some()
    }

    /// Writes within one page if that needs no wait: the page is wholly of this key, or becomes so, and nothing has
    /// to be taken back. `false`: nothing was done, use `write`.
    #[inline]
    pub fn write_now(&self, pa: u64, from: &[u8], agent: Agent) -> bool {
        let Some((page, tag)) = self.whole_in_page(pa, from.len(), agent) else {
            return false;
        };
        let Some(mut locked) = Locked::now(self, page, agent) else {
            return false;
        };
        let same = locked.uniform() == Some(tag);
        if !same && (from.len() < PAGE as usize || locked.is_out()) {
            return false;
        }
        locked.write((pa & OFFSET) as usize, from, tag, 0).is_ok()
    }

    #[inline]
    pub fn rd8(&self, pa: u64, agent: Agent) -> Result<u8, Fault> {
        self.load(pa, agent)
    }

    #[inline]
    pub fn rd16(&self, pa: u64, agent: Agent) -> Result<u16, Fault> {
        self.load(pa, agent)
    }

    #[inline]
    pub fn rd32(&self, pa: u64, agent: Agent) -> Result<u32, Fault> {
        self.load(pa, agent)
    }

    #[inline]
    pub fn rd64(&self, pa: u64, agent: Agent) -> Result<u64, Fault> {
        self.load(pa, agent)
    }

    /// As `rd64` of an aligned word, if that needs no wait and no change of any line.
    #[inline]
    pub fn rd64_now(&self, pa: u64, agent: Agent) -> Option<u64> {
        if is_aligned::<u64>(pa) {
            self.load_now(pa, agent)
        } else {
            None
        }
    }

    #[inline]
    pub fn wr8(&self, pa: u64, value: u8, agent: Agent) -> Result<(), Fault> {
        self.store(pa, value, agent)
    }

    #[inline]
    pub fn wr16(&self, pa: u64, value: u16, agent: Agent) -> Result<(), Fault> {
        self.store(pa, value, agent)
    }

    #[inline]
    pub fn wr32(&self, pa: u64, value: u32, agent: Agent) -> Result<(), Fault> {
        self.store(pa, value, agent)
    }

    #[inline]
    pub fn wr64(&self, pa: u64, value: u64, agent: Agent) -> Result<(), Fault> {
        self.store(pa, value, agent)
    }

    /// LOCK CMPXCHG of `size` bytes (1, 2, 4, 8 or 16) at any alignment. Returns the value found; it was replaced
    /// if that equals `old`. As on hardware the operand is written in either case. Across a page boundary it is a
    /// plain read and a plain write.
    pub fn cas(
        &self,
        pa: u64,
        size: usize,
        old: u128,
        new: u128,
        agent: Agent,
    ) -> Result<u128, Fault> {
        let size = size.min(16);
        self.check_span(pa, size)?;
        let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
        let mut found = [0; 16];
        if (pa & OFFSET) + size as u64 > PAGE {
            self.read(pa, &mut found[..size], agent)?;
            let equal = found[..size] == old[..size];
            self.write(pa, if equal { &new[..size] } else { &found[..size] }, agent)?;
        } else {
            self.cas_in_page(pa, &mut found[..size], &old[..size], &new[..size], agent)?;
        }
        Ok(u128::from_le_bytes(found))
    }

    #[inline]
    pub fn cas64(&self, pa: u64, old: u64, new: u64, agent: Agent) -> Result<u64, Fault> {
        Ok(self.cas(pa, 8, u128::from(old), u128::from(new), agent)? as u64)
    }

    /// MOVDIR64B: the whole line at `pa` (bits 5:0 are ignored), without reading it first.
    pub fn write_line(&self, pa: u64, line: &[u8; 64], agent: Agent) -> Result<(), Fault> {
        self.write(pa & !(LINE - 1), line, agent)
    }

    /// Zeroes whole pages as a MOVDIR64B loop does. `pa` must be 4 KiB aligned (else BusFault).
    pub fn zero_pages(&self, pa: u64, pages: u64, agent: Agent) -> Result<(), Fault> {
        let bytes = pages.checked_mul(PAGE).ok_or(Fault::Bus { pa })?;
        if pa & OFFSET != 0 {
            return Err(Fault::Bus { pa });
        }
        self.check_span(pa, bytes as usize)?;
        for at in (pa..pa + bytes).step_by(PAGE as usize) {
            let Some((mut locked, tag)) = self.lock(at, agent)? else {
                continue;
            };
            locked.set_uniform(tag);
            locked.zero();
        }
        Ok(())
    }

    /// Copies 4 KiB as a MOVDIR64B loop does. Both addresses must be 4 KiB aligned (else BusFault).
    pub fn copy_page(&self, dst: u64, src: u64, agent: Agent) -> Result<(), Fault> {
        if let Some(pa) = [dst, src].into_iter().find(|pa| pa & OFFSET != 0) {
            return Err(Fault::Bus { pa });
        }
        let mut page = [0; PAGE as usize];
        self.read(src, &mut page, agent)?;
        self.write(dst, &page, agent)
    }

    /// A pointer to the page of `pa`, if all its lines are plain under that KeyID's key. Only for an agent whose
    /// `cpu` is between `enter` and `leave` (else `Slow`). A code page is `Slow` for writing.
    pub fn page_ptr(&self, pa: u64, write: bool, agent: Agent) -> Result<PageAccess, Fault> {
        let running = agent.cpu.is_some_and(|cpu| cpu.is_running());
        let Some((mut locked, tag)) = self.lock(pa, agent)? else {
            return Ok(PageAccess::Slow);
        };
        let pointer = if running && locked.unify(tag) {
            locked.hand_out(write)
        } else {
            None
        };
        Ok(pointer.map_or(PageAccess::Slow, PageAccess::Direct))
    }

    /// Declares that decoded code of the page of `pa` is about to be cached; to be called *before* the bytes are
    /// read. After it no write pointer to the page exists. Returns the page's code generation (0 outside DRAM).
    pub fn mark_code(&self, pa: u64, agent: Agent) -> Result<u32, Fault> {
        Ok(self
            .lock(pa, agent)?
            .map_or(0, |(mut locked, _)| locked.watch_code()))
    }

    /// Differs from what `mark_code` returned once the page was written to since.
    #[inline(always)]
    pub fn code_gen(&self, pa: u64) -> u32 {
        let page = self.dram.page(pa & self.address_mask);
        page.map_or(0, |page| {
            page.code.load(std::sync::atomic::Ordering::Acquire)
        })
    }

    #[inline(always)]
    fn load<T: Word>(&self, pa: u64, agent: Agent) -> Result<T, Fault> {
        if is_aligned::<T>(pa) {
            if let Some(value) = self.load_now(pa, agent) {
                return Ok(value);
            }
        }
        let mut bytes = [0; 16];
        self.read(pa, &mut bytes[..size_of::<T>()], agent)?;
        Ok(T::from_wide(u128::from_le_bytes(bytes)))
    }

    /// One load of an aligned word from a page that is uniform under the reader's key and that nobody changes.
    #[inline(always)]
    fn load_now<T: Word>(&self, pa: u64, agent: Agent) -> Option<T> {
        debug_assert!(is_aligned::<T>(pa));
        let (page, tag) = self.whole_in_page(pa, size_of::<T>(), agent)?;
        // SAFETY: the offset is aligned to the word (every caller checked) and within the page.
        let read = |data: *const u8| unsafe { T::load(data.add((pa & OFFSET) as usize)) };
        page.read_unlocked(tag, read)
    }

    #[inline(always)]
    fn store<T: Word>(&self, pa: u64, value: T, agent: Agent) -> Result<(), Fault> {
        if is_aligned::<T>(pa) {
            if let Some(mut locked) = self.lock_now(pa, size_of::<T>(), agent) {
                locked.note_store();
                // SAFETY: the offset is aligned to the word and within the page.
                unsafe { T::store(locked.page.data.add((pa & OFFSET) as usize), value) };
                return Ok(());
            }
        }
        self.write(pa, &value.wide().to_le_bytes()[..size_of::<T>()], agent)
    }

    #[inline]
    fn read_in_page(&self, pa: u64, into: &mut [u8], agent: Agent) -> Result<(), Fault> {
        if self.read_now(pa, into, agent) {
            return Ok(());
        }
        match self.lock(pa, agent)? {
            Some((mut locked, tag)) => {
                let offset = (pa & OFFSET) as usize;
                locked.read(offset, into, tag, pa & !self.address_mask)
            }
            None => {
                into.fill(0xFF);
                Ok(())
            }
        }
    }

    #[inline]
    fn write_in_page(&self, pa: u64, from: &[u8], agent: Agent) -> Result<(), Fault> {
        match self.lock(pa, agent)? {
            Some((mut locked, tag)) => {
                locked.write((pa & OFFSET) as usize, from, tag, pa & !self.address_mask)
            }
            None => Ok(()),
        }
    }

    fn cas_in_page(
        &self,
        pa: u64,
        found: &mut [u8],
        old: &[u8],
        new: &[u8],
        agent: Agent,
    ) -> Result<(), Fault> {
        let offset = (pa & OFFSET) as usize;
        let atomic = matches!(found.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(found.len());
        if atomic {
            if let Some(mut locked) = self.lock_now(pa, found.len(), agent) {
                // SAFETY: aligned and within the page.
                unsafe { cas_cells(&mut locked, offset, found, old, new) };
                return Ok(());
            }
        }
        let Some((mut locked, tag)) = self.lock(pa, agent)? else {
            found.fill(0xFF);
            return Ok(());
        };
        if atomic && locked.uniform() == Some(tag) {
            // SAFETY: aligned and within the page.
            unsafe { cas_cells(&mut locked, offset, found, old, new) };
            return Ok(());
        }
        // Nothing the host offers is atomic here: shut everybody else out. Running processors lose their
        // pointers, readers without the lock start over.
        locked.take_back();
        locked.disturb_readers();
        let keyid = pa & !self.address_mask;
        locked.read(offset, found, tag, keyid)?;
        let value = if found == old { new } else { &*found };
        locked.write(offset, value, tag, keyid)
    }

    /// The page of an access that stays within it, if there is one.
    #[inline(always)]
    fn whole_in_page(&self, pa: u64, len: usize, agent: Agent) -> Option<(Page<'_>, Tag)> {
        let (tag, address) = self.resolve(pa, agent.mode).ok()?;
        let inside = (pa & OFFSET) as usize + len <= PAGE as usize;
        let page = self.dram.page(address).filter(|_| inside)?;
        Some((page, tag))
    }

    /// Locks the page of an access within it, if that needs no waiting and the page is uniform under its key.
    #[inline(always)]
    fn lock_now<'m>(&'m self, pa: u64, len: usize, agent: Agent<'m>) -> Option<Locked<'m>> {
        let (page, tag) = self.whole_in_page(pa, len, agent)?;
        Locked::now(self, page, agent).filter(|locked| locked.uniform() == Some(tag))
    }

    /// Locks the page of `pa`. The key is looked up under the lock, so that a pointer handed out and a
    /// reprogramming cannot miss each other.
    #[inline]
    fn lock<'m>(&'m self, pa: u64, agent: Agent<'m>) -> Result<Option<(Locked<'m>, Tag)>, Fault> {
        let (keyid, address) = self.admit(pa, agent.mode)?;
        let Some(page) = self.dram.page(address) else {
            self.keys.current(keyid).ok_or(Fault::Bus { pa })?;
            return Ok(None);
        };
        let locked = Locked::new(self, page, agent);
        let tag = self.keys.current(keyid).ok_or(Fault::Bus { pa })?;
        Ok(Some((locked, tag)))
    }

    /// The key in force for a `pa`, and its DRAM address.
    #[inline(always)]
    fn resolve(&self, pa: u64, mode: Requester) -> Result<(Tag, u64), Fault> {
        let (keyid, address) = self.admit(pa, mode)?;
        let tag = self.keys.current(keyid).ok_or(Fault::Bus { pa })?;
        Ok((tag, address))
    }

    /// Splits a `pa` that this requester may name.
    #[inline(always)]
    fn admit(&self, pa: u64, mode: Requester) -> Result<(u32, u64), Fault> {
        let (keyid, address) = self.split(pa)?;
        if mode == Requester::Host && self.keys.is_private(keyid) {
            return Err(Fault::Bus { pa });
        }
        if mode == Requester::Host && self.seamrr.holds(address) {
            return Ok((keyid, NOWHERE | address & OFFSET));
        }
        Ok((keyid, address))
    }

    /// An access may not run over the top of DRAM addresses into the next KeyID.
    #[inline(always)]
    fn check_span(&self, pa: u64, len: usize) -> Result<(), Fault> {
        match (pa & self.address_mask).checked_add(len as u64) {
            Some(end) if end <= self.address_mask + 1 => Ok(()),
            _ => Err(Fault::Bus { pa }),
        }
    }
}

#[inline(always)]
fn is_aligned<T>(pa: u64) -> bool {
    pa & (size_of::<T>() as u64 - 1) == 0
}

/// One aligned CMPXCHG of `found.len()` (1, 2, 4 or 8) bytes.
///
/// # Safety
/// `offset` is aligned to that length and within the page.
unsafe fn cas_cells(locked: &mut Locked, offset: usize, found: &mut [u8], old: &[u8], new: &[u8]) {
    locked.note_store();
    let (old, new) = (wide(old), wide(new));
    // SAFETY: the caller's promise.
    let value = unsafe {
        let at = locked.page.data.add(offset);
        match found.len() {
            8 => u64::cas(at, old as u64, new as u64).wide(),
            4 => u32::cas(at, old as u32, new as u32).wide(),
            2 => u16::cas(at, old as u16, new as u16).wide(),
            _ => u8::cas(at, old as u8, new as u8).wide(),
        }
    };
    found.copy_from_slice(&value.to_le_bytes()[..found.len()]);
}

fn wide(bytes: &[u8]) -> u128 {
    let mut all = [0; 16];
    all[..bytes.len()].copy_from_slice(bytes);
    u128::from_le_bytes(all)
}
