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

    /// Where the translation of `linear` in the context `tag` stands. Contexts are spread, so that the kernel's pages
    /// of one address space do not push out those of another.
    #[inline(always)]
    pub fn index(linear: u64, tag: u64) -> usize {
        ((linear >> 12) ^ (tag << 5)) as usize & (ENTRIES - 1)
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

    pub fn drop_page(&mut self, linear: u64, tag: u64) {
        self.hot[Self::index(linear, tag)] = EMPTY;
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
        let index = Self::index(linear, tag);
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
        let index = Self::index(linear, tag);
        let cold = &self.cold[index];
        (self.hot[index].tag == linear & PAGE | tag && cold.allowed & access == access)
            .then_some(cold.pa | linear & !PAGE)
    }

    /// Gives the entry of `linear` a host pointer.
    pub fn set_pointer(&mut self, linear: u64, tag: u64, page: *mut u8, write: bool) {
        let entry = &mut self.hot[Self::index(linear, tag)];
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

/// Address spaces whose translations may be used again when their PCID comes back.
#[derive(Clone, Copy, Default)]
pub struct Spaces {
    /// Address-space numbers given out so far.
    count: u64,
    /// The same for the numbers that chains between blocks rest on.
    codes: u64,
    kept: [Kept; KEPT],
    oldest: usize,
}

const KEPT: usize = 8;

#[derive(Clone, Copy, Default)]
struct Kept {
    valid: bool,
    pcid: u16,
    space: u64,
    code_space: u64,
}

impl Cpu {
    /// Drops every translation: a fresh address space, and none to come back to.
    pub fn flush_tlb(&mut self) {
        self.spaces.kept = Default::default();
        self.fresh_space();
    }

    fn fresh_space(&mut self) {
        self.spaces.count += 1;
        if self.spaces.count & 0x3ff == 0 {
            // The tags begin again: old ones must not match.
            self.tlb.clear();
            self.spaces.kept = Default::default();
        }
        self.space = self.spaces.count;
        self.fresh_code_space();
        self.set_tag();
    }

    /// Breaks the chains that rest on translations.
    pub fn fresh_code_space(&mut self) {
        self.spaces.codes += 1;
        self.code_space = self.spaces.codes;
    }

    /// MOV to CR3 with CR4.PCIDE: from the address space of `old` to that of `new`, whose translations are kept if
    /// `keep`.
    pub fn switch_pcid(&mut self, old: u16, new: u16, keep: bool) {
        let (space, code_space) = (self.space, self.code_space);
        let spaces = &mut self.spaces;
        let known = |kept: &[Kept; KEPT], pcid| {
            kept.iter().position(|kept| kept.valid && kept.pcid == pcid)
        };
        let slot = known(&spaces.kept, old).unwrap_or_else(|| {
            spaces.oldest = (spaces.oldest + 1) % KEPT;
            spaces.oldest
        });
        spaces.kept[slot] = Kept {
            valid: true,
            pcid: old,
            space,
            code_space,
        };
        let found = known(&spaces.kept, new);
        match found {
            Some(slot) if keep => {
                let kept = spaces.kept[slot];
                self.space = kept.space;
                if kept.code_space == 0 {
                    self.fresh_code_space();
                } else {
                    self.code_space = kept.code_space;
                }
                self.set_tag();
            }
            _ => {
                if let Some(slot) = found {
                    spaces.kept[slot].valid = false;
                }
                self.fresh_space();
            }
        }
    }

    /// INVPCID of one PCID that is not the current one.
    pub fn forget_pcid(&mut self, pcid: u16) {
        for kept in self.spaces.kept.iter_mut().filter(|kept| kept.pcid == pcid) {
            kept.valid = false;
        }
    }

    /// INVLPG: the translations of one linear address, in whatever address space.
    pub fn flush_page(&mut self, linear: u64) {
        if self.tlb.in_large(linear) {
            self.flush_tlb();
        } else {
            let kept = self.spaces.kept;
            let spaces = kept.iter().filter(|kept| kept.valid).map(|kept| kept.space);
            for space in spaces.chain([self.space]) {
                for privilege in [USER, SUPER, SUPER_AC] {
                    self.tlb.drop_page(linear, (space & 0x3ff) << 2 | privilege);
                }
            }
            // Chains between blocks rest on translations too, also those of other address spaces (global pages).
            for kept in self.spaces.kept.iter_mut() {
                kept.code_space = 0;
            }
            self.fresh_code_space();
        }
    }
}
