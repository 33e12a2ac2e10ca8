//! The software TLB: direct mapped, from a linear page (and the address space and privilege it is used in) to a host
//! pointer, so that most loads and stores need one comparison.
//!
//! A tag is the linear page with the context in its low 12 bits: ten bits of address-space number, two of privilege.
//! Leaving an address space costs nothing: the next one has a new number, and every old tag fails to match.

use super::state::Cpu;

pub const ENTRIES: usize = 2048;
const INVALID: u64 = u64::MAX;
const PAGE: u64 = !0xfff;

/// Privilege part of a tag.
pub const USER: u64 = 0;
/// Supervisor, kept off user pages by SMAP.
pub const SUPER: u64 = 1;
/// Supervisor that may touch user pages (SMAP off, or RFLAGS.AC set).
pub const SUPER_AC: u64 = 2;

/// What the fast paths look at. `read` and `write` equal the tag only if the host pointer may be used for that.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    /// Host address of the page minus the linear address of the page.
    pub host: usize,
    /// The tag of the translation itself, whether or not a pointer exists.
    pub tag: u64,
}

/// The translation behind an entry.
#[derive(Clone, Copy)]
pub struct Cold {
    /// Physical page, KeyID included.
    pub pa: u64,
    /// Guest-physical page.
    pub gpa: u64,
    /// Accesses that were checked and allowed: [`super::walk::Access`] bits.
    pub allowed: u8,
}

pub struct Tlb {
    pub hot: Box<[Entry; ENTRIES]>,
    pub cold: Box<[Cold; ENTRIES]>,
    /// Range that covers every large page translated so far; INVLPG inside it drops everything.
    large: (u64, u64),
}

const EMPTY: Entry = Entry {
    read: INVALID,
    write: INVALID,
    host: 0,
    tag: INVALID,
};
const COLD: Cold = Cold {
    pa: 0,
    gpa: 0,
    allowed: 0,
};

impl Default for Tlb {
    fn default() -> Self {
        Self::new()
    }
}

impl Tlb {
    pub fn new() -> Tlb {
        Tlb {
            hot: Box::new([EMPTY; ENTRIES]),
            cold: Box::new([COLD; ENTRIES]),
            large: (u64::MAX, 0),
        }
    }

    #[inline(always)]
    pub fn index(linear: u64) -> usize {
        (linear >> 12) as usize & (ENTRIES - 1)
    }

    pub fn clear(&mut self) {
        self.hot.fill(EMPTY);
        self.large = (u64::MAX, 0);
    }

    /// Takes back every host pointer, keeping the translations.
    pub fn drop_pointers(&mut self) {
        for entry in self.hot.iter_mut() {
            entry.read = INVALID;
            entry.write = INVALID;
        }
    }

    pub fn drop_page(&mut self, linear: u64) {
        self.hot[Self::index(linear)] = EMPTY;
    }

    pub fn note_large(&mut self, linear: u64, size: u64) {
        let base = linear & !(size - 1);
        self.large = (self.large.0.min(base), self.large.1.max(base | (size - 1)));
    }

    pub fn in_large(&self, linear: u64) -> bool {
        (self.large.0..=self.large.1).contains(&linear)
    }

    /// Fills the entry of `linear`, keeping what an earlier fill of the same translation allowed.
    pub fn fill(&mut self, linear: u64, tag: u64, pa: u64, gpa: u64, allowed: u8) {
        let index = Self::index(linear);
        let tag = linear & PAGE | tag;
        let (hot, cold) = (&mut self.hot[index], &mut self.cold[index]);
        if hot.tag == tag && cold.pa == pa & PAGE {
            cold.allowed |= allowed;
            return;
        }
        *hot = Entry { tag, ..EMPTY };
        *cold = Cold {
            pa: pa & PAGE,
            gpa: gpa & PAGE,
            allowed,
        };
    }

    /// The translation of `linear`, if one that allows all of `access` is held.
    #[inline]
    pub fn lookup(&self, linear: u64, tag: u64, access: u8) -> Option<u64> {
        let index = Self::index(linear);
        let cold = &self.cold[index];
        (self.hot[index].tag == linear & PAGE | tag && cold.allowed & access == access)
            .then_some(cold.pa | linear & !PAGE)
    }

    /// Gives the entry of `linear` a host pointer.
    pub fn set_pointer(&mut self, linear: u64, tag: u64, page: *mut u8, write: bool) {
        let entry = &mut self.hot[Self::index(linear)];
        let tag = linear & PAGE | tag;
        if entry.tag != tag {
            return;
        }
        let host = (page as usize).wrapping_sub((linear & PAGE) as usize);
        if entry.host != host {
            entry.read = INVALID;
            entry.write = INVALID;
            entry.host = host;
        }
        entry.read = tag;
        if write {
            entry.write = tag;
        }
    }
}

impl Cpu {
    /// Starts a fresh address space: nothing translated before is used again.
    pub fn flush_tlb(&mut self) {
        self.space += 1;
        if self.space & 0x3ff == 0 {
            self.tlb.clear();
        }
        self.code_space += 1;
        self.set_tag();
    }

    /// INVLPG: the translations of one linear address, in whatever address space.
    pub fn flush_page(&mut self, linear: u64) {
        if self.tlb.in_large(linear) {
            self.flush_tlb();
        } else {
            self.tlb.drop_page(linear);
            // Chains between blocks rest on translations too.
            self.code_space += 1;
        }
    }
}
