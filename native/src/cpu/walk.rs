//! The guest's own page walk: from a linear address to a guest-physical one, with accessed and dirty bits.

use super::state::{cr0, cr4, efer, Cpu, Stop, StopKind};
use super::tlb::USER;

/// Kinds of access, as bits (they are also the low bits of an EPT violation's qualification).
pub mod access {
    pub const READ: u8 = 1;
    pub const WRITE: u8 = 2;
    pub const EXEC: u8 = 4;
}

/// Page-fault error code.
pub mod pfec {
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const I: u32 = 16;
    pub const PK: u32 = 32;
}

/// Page-table entry bits.
mod pte {
    pub const P: u64 = 1;
    pub const W: u64 = 2;
    pub const U: u64 = 4;
    pub const A: u64 = 0x20;
    pub const D: u64 = 0x40;
    pub const PS: u64 = 0x80;
    pub const NX: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// What a walk found.
#[derive(Clone, Copy, Debug)]
struct Leaf {
    gpa: u64,
    /// Bits of offset in the page: 12, 21, 22 or 30.
    shift: u32,
    /// AND of U, W and OR of NX along the way.
    user: bool,
    write: bool,
    exec: bool,
    key: u32,
    dirty: bool,
}

/// Why a walk gave no page.
enum Miss {
    /// #PF with P clear, or with RSVD.
    Fault {
        reserved: bool,
    },
    Stop(Stop),
}

impl From<Stop> for Miss {
    fn from(stop: Stop) -> Self {
        Miss::Stop(stop)
    }
}

impl Cpu {
    /// Physical address (KeyID included) behind a linear one, for `access` with the rights of `privilege` (see
    /// [`super::tlb`]). Fills the TLB.
    pub fn translate(&mut self, linear: u64, access: u8, privilege: u64) -> Result<u64, Stop> {
        let tag = self.tag & !3 | privilege;
        if let Some(pa) = self.tlb.lookup(linear, tag, access) {
            return Ok(pa);
        }
        self.translate_miss(linear, access, privilege, tag)
    }

    #[cold]
    #[inline(never)]
    fn translate_miss(
        &mut self,
        linear: u64,
        access: u8,
        privilege: u64,
        tag: u64,
    ) -> Result<u64, Stop> {
        self.counters.tlb_fills += 1;
        if !self.canonical(linear) {
            self.stop = StopKind::Canonical;
            return Err(Stop);
        }
        let mut allowed = access
            | if access == access::WRITE {
                access::READ
            } else {
                0
            };
        let gpa = if self.paging() {
            let leaf = self.walk_guest(linear, access, privilege, true)?;
            if leaf.shift > 12 {
                self.tlb.note_large(linear, 1 << leaf.shift);
            }
            // A page read before it is written gets its write permission now if that needs no dirty bit.
            if access == access::READ
                && leaf.dirty
                && self.permits(&leaf, access::WRITE, privilege).is_ok()
            {
                allowed |= 0x80;
            }
            leaf.gpa
        } else {
            allowed |= 0x80;
            linear & 0xffff_ffff
        };
        let page = self.translate_gpa(gpa, access, Some(linear), false)?;
        // 0x80 asked for: writable without another walk, if the EPT agrees.
        if allowed & 0x80 != 0 {
            allowed &= !0x80;
            if page.writable {
                allowed |= access::WRITE;
            }
        }
        self.tlb.fill(linear, tag, page.pa, gpa, allowed);
        Ok(page.pa)
    }

    /// Guest-physical address behind a linear one without any side effect: no fault, no accessed bits. `None` if it
    /// does not translate.
    pub fn probe_linear(&mut self, linear: u64) -> Option<u64> {
        if !self.canonical(linear) {
            return None;
        }
        if !self.paging() {
            return Some(linear & 0xffff_ffff);
        }
        let stop = self.stop;
        let leaf = self.walk_tables(linear, access::READ, false);
        self.stop = stop;
        leaf.ok().map(|leaf| leaf.gpa)
    }

    pub fn canonical(&self, linear: u64) -> bool {
        if !self.long_mode() {
            return linear >> 32 == 0;
        }
        let shift = if self.cr4 & cr4::LA57 != 0 { 7 } else { 16 };
        ((linear << shift) as i64 >> shift) as u64 == linear
    }

    fn walk_guest(
        &mut self,
        linear: u64,
        access: u8,
        privilege: u64,
        mark: bool,
    ) -> Result<Leaf, Stop> {
        self.counters.walks += 1;
        match self.walk_tables(linear, access, mark) {
            Ok(leaf) => match self.permits(&leaf, access, privilege) {
                Ok(()) => {
                    if mark && !leaf.dirty && access == access::WRITE {
                        // The dirty bit is set by a walk of its own that knows the entry.
                        return self.walk_dirty(linear);
                    }
                    Ok(leaf)
                }
                Err(key) => {
                    let key = if key { pfec::PK } else { 0 };
                    Err(self.page_fault(linear, access, privilege, pfec::P | key))
                }
            },
            Err(Miss::Fault { reserved }) => {
                let code = if reserved { pfec::P | pfec::RSVD } else { 0 };
                Err(self.page_fault(linear, access, privilege, code))
            }
            Err(Miss::Stop(stop)) => Err(stop),
        }
    }

    fn walk_dirty(&mut self, linear: u64) -> Result<Leaf, Stop> {
        match self.walk_tables(linear, access::WRITE | 0x80, true) {
            Ok(leaf) => Ok(leaf),
            Err(Miss::Stop(stop)) => Err(stop),
            // The tables changed under us: start over by running the instruction again.
            Err(Miss::Fault { .. }) => {
                self.stop = StopKind::Restart;
                Err(Stop)
            }
        }
    }

    #[cold]
    fn page_fault(&mut self, linear: u64, access: u8, privilege: u64, mut code: u32) -> Stop {
        if access & access::WRITE != 0 {
            code |= pfec::W;
        }
        if privilege == USER {
            code |= pfec::U;
        }
        let fetch =
            self.efer & efer::NXE != 0 && self.cr4 & cr4::PAE != 0 || self.cr4 & cr4::SMEP != 0;
        if access & access::EXEC != 0 && fetch {
            code |= pfec::I;
        }
        // CR2 is written when the exception is delivered, not when it exits; both need the address.
        self.fault_linear = linear;
        self.raise(14, Some(code))
    }

    /// `Err(true)`: refused by a protection key.
    fn permits(&self, leaf: &Leaf, access: u8, privilege: u64) -> Result<(), bool> {
        let user = privilege == USER;
        if access & access::EXEC != 0 {
            let smep = !user && leaf.user && self.cr4 & cr4::SMEP != 0;
            return if !leaf.exec || user && !leaf.user || smep {
                Err(false)
            } else {
                Ok(())
            };
        }
        if user && !leaf.user {
            return Err(false);
        }
        if !user && leaf.user && privilege == super::tlb::SUPER && self.cr4 & cr4::SMAP != 0 {
            return Err(false);
        }
        let write = access & access::WRITE != 0;
        if write && !leaf.write && (user || self.cr0 & cr0::WP != 0) {
            return Err(false);
        }
        if leaf.user && self.cr4 & cr4::PKE != 0 && self.long_mode() {
            let rights = self.pkru >> (leaf.key * 2);
            if rights & 1 != 0 || write && rights & 2 != 0 && (user || self.cr0 & cr0::WP != 0) {
                return Err(true);
            }
        }
        Ok(())
    }

    /// The walk itself. `mark`: set accessed bits, and with `access & 0x80` the dirty bit.
    fn walk_tables(&mut self, linear: u64, access: u8, mark: bool) -> Result<Leaf, Miss> {
        if self.cr4 & cr4::PAE == 0 {
            return self.walk_32(linear, access, mark);
        }
        let long = self.long_mode();
        let (mut table, mut level) = if !long {
            let pdpte = self.pdptes[(linear >> 30 & 3) as usize];
            if pdpte & pte::P == 0 {
                return Err(Miss::Fault { reserved: false });
            }
            (pdpte & self.address_mask(), 2)
        } else if self.cr4 & cr4::LA57 != 0 {
            (self.cr3 & self.address_mask(), 5)
        } else {
            (self.cr3 & self.address_mask(), 4)
        };
        let (mut user, mut write, mut exec) = (true, true, true);
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = table + (linear >> shift & 0x1ff) * 8;
            let entry = self.table_entry(at, linear)?;
            if entry & pte::P == 0 {
                return Err(Miss::Fault { reserved: false });
            }
            let leaf = level == 1 || entry & pte::PS != 0 && level <= 3;
            if self.entry_reserved(entry, level, leaf, long) {
                return Err(Miss::Fault { reserved: true });
            }
            user &= entry & pte::U != 0;
            write &= entry & pte::W != 0;
            exec &= entry & pte::NX == 0;
            let mut wanted = pte::A;
            if leaf && access & 0x80 != 0 {
                wanted |= pte::D;
            }
            if mark && entry & wanted != wanted && !self.mark_entry(at, entry, wanted, linear)? {
                // Somebody changed the entry since it was read: read it again.
                continue;
            }
            if leaf {
                let offset = (1u64 << shift) - 1;
                let gpa = entry & self.address_mask() & !offset | linear & offset;
                let key = (entry >> 59 & 15) as u32;
                let dirty = (entry | if mark { wanted } else { 0 }) & pte::D != 0;
                return Ok(Leaf {
                    gpa,
                    shift,
                    user,
                    write,
                    exec,
                    key,
                    dirty,
                });
            }
            table = entry & self.address_mask();
            level -= 1;
        }
    }

    /// Two-level paging of 32-bit entries.
    fn walk_32(&mut self, linear: u64, access: u8, mark: bool) -> Result<Leaf, Miss> {
        let mut table = self.cr3 & 0xffff_f000;
        let (mut user, mut write) = (true, true);
        let mut level = 2;
        loop {
            let shift = 12 + 10 * (level - 1);
            let at = table + (linear >> shift & 0x3ff) * 4;
            let hpa = self.translate_gpa(at, access::READ, Some(linear), true)?.pa;
            let entry = u64::from(self.phys_rd32(hpa)?);
            if entry & pte::P == 0 {
                return Err(Miss::Fault { reserved: false });
            }
            let leaf = level == 1 || entry & pte::PS != 0 && self.cr4 & cr4::PSE != 0;
            user &= entry & pte::U != 0;
            write &= entry & pte::W != 0;
            let wanted = pte::A
                | if leaf && access & 0x80 != 0 {
                    pte::D
                } else {
                    0
                };
            if mark && entry & wanted != wanted {
                let hpa = self
                    .translate_gpa(at, access::WRITE, Some(linear), true)?
                    .pa;
                if self.phys_cas(hpa, 4, entry.into(), (entry | wanted).into())?
                    != u128::from(entry)
                {
                    continue;
                }
            }
            if leaf {
                let mut base = entry & 0xffff_f000;
                if level == 2 {
                    // PSE-36: bits 20:13 hold address bits 39:32.
                    base = entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32;
                }
                let gpa = base | linear & ((1 << shift) - 1);
                let dirty = (entry | if mark { wanted } else { 0 }) & pte::D != 0;
                return Ok(Leaf {
                    gpa,
                    shift,
                    user,
                    write,
                    exec: true,
                    key: 0,
                    dirty,
                });
            }
            table = entry & 0xffff_f000;
            level -= 1;
        }
    }

    fn address_mask(&self) -> u64 {
        pte::ADDRESS & ((1 << self.options.pa_bits) - 1)
    }

    fn table_entry(&mut self, gpa: u64, linear: u64) -> Result<u64, Stop> {
        let hpa = self
            .translate_gpa(gpa, access::READ, Some(linear), true)?
            .pa;
        self.phys_rd64(hpa)
    }

    /// Sets bits of an entry atomically; `false` if it was changed meanwhile.
    fn mark_entry(&mut self, gpa: u64, entry: u64, wanted: u64, linear: u64) -> Result<bool, Stop> {
        let hpa = self
            .translate_gpa(gpa, access::WRITE, Some(linear), true)?
            .pa;
        Ok(self.phys_cas(hpa, 8, entry.into(), (entry | wanted).into())? == u128::from(entry))
    }

    fn entry_reserved(&self, entry: u64, level: u32, leaf: bool, long: bool) -> bool {
        let mut reserved = pte::ADDRESS & !self.address_mask();
        if self.efer & efer::NXE == 0 {
            reserved |= pte::NX;
        }
        if !long {
            // PAE: bits 62:52 are reserved too.
            reserved |= 0x7ff << 52;
        }
        if level >= 4 {
            reserved |= pte::PS;
        }
        if leaf && level > 1 {
            let offset = (1u64 << (12 + 9 * (level - 1))) - 1;
            // Address bits below the page size, without PAT in bit 12.
            reserved |= offset & !0x1fff;
        }
        entry & reserved != 0
    }

    /// Loads the PDPTEs of PAE paging from CR3; `false`: reserved bits (#GP).
    pub fn load_pdptes(&mut self, cr3: u64) -> Result<bool, Stop> {
        let mut pdptes = [0; 4];
        for (index, pdpte) in pdptes.iter_mut().enumerate() {
            let at = (cr3 & 0xffff_ffe0) + index as u64 * 8;
            let hpa = self.translate_gpa(at, access::READ, None, false)?.pa;
            *pdpte = self.phys_rd64(hpa)?;
            let reserved = 0x1e6 | !((1u64 << self.options.pa_bits.min(52)) - 1);
            if *pdpte & pte::P != 0 && *pdpte & reserved != 0 {
                return Ok(false);
            }
        }
        self.pdptes = pdptes;
        Ok(true)
    }
}
