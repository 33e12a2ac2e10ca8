//! Loads and stores through the engine, and pages handed out whole.

use super::bytes::Word;
use super::config::{LINE, PAGE};
use super::keys::Tag;
use super::page::Locked;
use super::{Agent, Fault, Memory, PageAccess, Requester};

const OFFSET: u64 = PAGE - 1;

/// Where a `pa` leads: the key in force, and the DRAM address.
#[derive(Clone, Copy)]
struct Target {
    tag: Tag,
    address: u64,
}

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

    #[inline]
    pub fn wr8(&self, pa: u64, value: u8, agent: Agent) -> Result<(), Fault> {
        self.write(pa, &value.to_le_bytes(), agent)
    }

    #[inline]
    pub fn wr16(&self, pa: u64, value: u16, agent: Agent) -> Result<(), Fault> {
        self.write(pa, &value.to_le_bytes(), agent)
    }

    #[inline]
    pub fn wr32(&self, pa: u64, value: u32, agent: Agent) -> Result<(), Fault> {
        self.write(pa, &value.to_le_bytes(), agent)
    }

    #[inline]
    pub fn wr64(&self, pa: u64, value: u64, agent: Agent) -> Result<(), Fault> {
        self.write(pa, &value.to_le_bytes(), agent)
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
        if pa & (size_of::<T>() as u64 - 1) == 0 {
            let target = self.resolve(pa, agent.mode)?;
            if let Some(page) = self.dram.page(target.address) {
                let offset = (pa & OFFSET) as usize;
                // SAFETY: the offset is aligned to the word and within the page.
                if let Some(value) =
                    page.read_unlocked(target.tag, |data| unsafe { T::load(data.add(offset)) })
                {
                    return Ok(value);
                }
            }
        }
        let mut bytes = [0; 8];
        self.read(pa, &mut bytes[..size_of::<T>()], agent)?;
        Ok(T::from_wide(u128::from(u64::from_le_bytes(bytes))))
    }

    #[inline]
    fn read_in_page(&self, pa: u64, into: &mut [u8], agent: Agent) -> Result<(), Fault> {
        let target = self.resolve(pa, agent.mode)?;
        let Some(page) = self.dram.page(target.address) else {
            into.fill(0xFF);
            return Ok(());
        };
        let offset = (pa & OFFSET) as usize;
        // SAFETY: `offset + into.len()` is at most 4096, by the callers.
        if page
            .read_unlocked(target.tag, |data| unsafe {
                super::bytes::copy_out(data.add(offset), into)
            })
            .is_some()
        {
            return Ok(());
        }
        match self.lock(pa, agent)? {
            Some((mut locked, tag)) => locked.read(offset, into, tag, pa & !self.address_mask),
            None => Ok(()),
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
        let Some((mut locked, tag)) = self.lock(pa, agent)? else {
            found.fill(0xFF);
            return Ok(());
        };
        let offset = (pa & OFFSET) as usize;
        let aligned = offset.is_multiple_of(found.len().max(1));
        if aligned && locked.uniform() == Some(tag) && found.len() <= 8 {
            locked.note_store();
            // SAFETY: aligned and within the page.
            unsafe { cas_cells(locked.page.data.add(offset), found, old, new) };
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

    /// Locks the page of `pa`. The key is looked up under the lock, so that a pointer handed out and a
    /// reprogramming cannot miss each other.
    #[inline]
    fn lock<'m>(&'m self, pa: u64, agent: Agent<'m>) -> Result<Option<(Locked<'m>, Tag)>, Fault> {
        let target = self.resolve(pa, agent.mode)?;
        let Some(page) = self.dram.page(target.address) else {
            return Ok(None);
        };
        let locked = Locked::new(self, page, agent);
        let tag = self.resolve(pa, agent.mode)?.tag;
        Ok(Some((locked, tag)))
    }

    /// Checks a `pa` and splits it.
    #[inline(always)]
    fn resolve(&self, pa: u64, mode: Requester) -> Result<Target, Fault> {
        let (keyid, address) = self.split(pa)?;
        if mode == Requester::Host && self.keys.is_private(keyid) {
            return Err(Fault::Bus { pa });
        }
        let tag = self.keys.current(keyid).ok_or(Fault::Bus { pa })?;
        Ok(Target { tag, address })
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

/// One aligned CMPXCHG of `found.len()` (1, 2, 4 or 8) bytes.
///
/// # Safety
/// `at` is aligned to that length and points into a page.
unsafe fn cas_cells(at: *mut u8, found: &mut [u8], old: &[u8], new: &[u8]) {
    let (old, new) = (wide(old), wide(new));
    // SAFETY: the caller's promise.
    let value = unsafe {
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
