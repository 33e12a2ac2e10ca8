//! The second walk: from a guest-physical address to the one on the bus, through one EPT or, for a TD, one of two.
//!
//! In SEAM non-root mode the GPA's shared bit chooses. Private addresses go through the EPT at EPTP (the Secure EPT),
//! whose pages and whose data are accessed with the TD's HKID; shared ones through the EPT at the shared EPTP, whose
//! entries name their KeyIDs themselves, and may not name private ones.

use super::state::{cr0, Cpu, Stop};
use super::vmcs::field;
use super::vmx_ctl::secondary;
use super::vmx_exit::reason;
use super::walk::access;

mod epte {
    pub const R: u64 = 1;
    pub const W: u64 = 2;
    pub const LEAF: u64 = 1 << 7;
    pub const A: u64 = 1 << 8;
    pub const D: u64 = 1 << 9;
    pub const SUPPRESS_VE: u64 = 1 << 63;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// EPTP bits.
mod eptp {
    pub const AD: u64 = 1 << 6;
}

const ENTRIES: usize = 1024;

#[derive(Clone, Copy)]
struct Cached {
    /// GPA page with bit 0 set; 0 when empty.
    tag: u64,
    pa: u64,
    rights: u8,
}

/// Translations of GPAs that were checked; a miss or a refused access walks again.
pub struct EptTlb(Box<[Cached; ENTRIES]>);

impl EptTlb {
    pub fn new() -> EptTlb {
        EptTlb(Box::new(
            [Cached {
                tag: 0,
                pa: 0,
                rights: 0,
            }; ENTRIES],
        ))
    }
    pub fn clear(&mut self) {
        for entry in self.0.iter_mut() {
            entry.tag = 0;
        }
    }
}

impl Default for EptTlb {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a GPA leads.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Physical address, KeyID included.
    pub pa: u64,
    pub writable: bool,
}

/// Why an EPT walk failed.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// `rights`: what the GPA does allow. `convertible`: the entry does not suppress #VE.
    Violation {
        rights: u8,
        convertible: bool,
    },
    Misconfiguration,
}

impl Cpu {
    /// Translates `gpa` for `access`. `linear` is what it stands for, if anything; `table`: the access is to a
    /// paging-structure entry on the way to it.
    pub fn translate_gpa(
        &mut self,
        gpa: u64,
        access: u8,
        linear: Option<u64>,
        table: bool,
    ) -> Result<Page, Stop> {
        let wanted = access & 7;
        let cached = self.ept.0[(gpa >> 12) as usize & (ENTRIES - 1)];
        if cached.tag == gpa & !0xfff | 1 && cached.rights & wanted == wanted {
            return Ok(Page {
                pa: cached.pa | gpa & 0xfff,
                writable: cached.rights & access::WRITE != 0,
            });
        }
        self.translate_gpa_miss(gpa, wanted, linear, table)
    }

    #[cold]
    #[inline(never)]
    fn translate_gpa_miss(
        &mut self,
        gpa: u64,
        access: u8,
        linear: Option<u64>,
        table: bool,
    ) -> Result<Page, Stop> {
        if !self.ctl.secondary(secondary::EPT) {
            return Ok(Page {
                pa: gpa,
                writable: true,
            });
        }
        match self.walk_ept(gpa, access, table, true)? {
            Ok((pa, rights)) => {
                self.ept.0[(gpa >> 12) as usize & (ENTRIES - 1)] = Cached {
                    tag: gpa & !0xfff | 1,
                    pa: pa & !0xfff,
                    rights,
                };
                Ok(Page {
                    pa,
                    writable: rights & access::WRITE != 0,
                })
            }
            Err(Refusal::Misconfiguration) => {
                let stop = self.exit_with(reason::EPT_MISCONFIGURATION, 0);
                self.exit.physical = gpa;
                Err(stop)
            }
            Err(Refusal::Violation {
                rights,
                convertible,
            }) => {
                let mut qualification = u64::from(access) | u64::from(rights) << 3;
                if let Some(linear) = linear {
                    qualification |= 1 << 7 | u64::from(!table) << 8;
                    self.exit.linear = linear;
                }
                Err(self.ept_violation(qualification, linear.unwrap_or(0), gpa, convertible))
            }
        }
    }

    /// An EPT violation: #VE if the entry and the VMCS allow it, a VM exit otherwise.
    fn ept_violation(
        &mut self,
        qualification: u64,
        linear: u64,
        gpa: u64,
        convertible: bool,
    ) -> Stop {
        if convertible
            && self.ctl.secondary(secondary::EPT_VE)
            && self.protected()
            && self.delivering.is_none()
        {
            match self.fill_ve_page(qualification, linear, gpa) {
                Ok(true) => return self.raise(20, None),
                Ok(false) => {}
                Err(stop) => return stop,
            }
        }
        let mut qualification = qualification;
        if self.nmi_unblocked {
            qualification |= 1 << 12;
        }
        let stop = self.exit_with(reason::EPT_VIOLATION, qualification);
        self.exit.linear = linear;
        self.exit.physical = gpa;
        stop
    }

    /// Writes the virtualization-exception information area; `false` if the guest has not yet read the last one.
    fn fill_ve_page(&mut self, qualification: u64, linear: u64, gpa: u64) -> Result<bool, Stop> {
        let area = self.vmcs.get(field::VE_INFO) | self.ctl.hkid;
        if self.phys_rd32(area + 4)? != 0 {
            return Ok(false);
        }
        self.phys_wr32(area, reason::EPT_VIOLATION)?;
        self.phys_wr32(area + 4, 0xffff_ffff)?;
        self.phys_wr64(area + 8, qualification)?;
        self.phys_wr64(area + 16, linear)?;
        self.phys_wr64(area + 24, gpa)?;
        let mut index = [0; 2];
        index.copy_from_slice(&(self.vmcs.get(field::EPTP_INDEX) as u16).to_le_bytes());
        self.phys_write(area + 32, &index)?;
        Ok(true)
    }

    /// The walk. The outer error is a machine check and the like on the way.
    fn walk_ept(
        &mut self,
        gpa: u64,
        access: u8,
        table: bool,
        mark: bool,
    ) -> Result<Result<(u64, u8), Refusal>, Stop> {
        let nothing = Refusal::Violation {
            rights: 0,
            convertible: false,
        };
        let pointer = self.ctl.eptp;
        let mut level = (pointer >> 3 & 7) as u32 + 1;
        if !(4..=5).contains(&level) {
            return Ok(Err(Refusal::Misconfiguration));
        }
        let tdx = self.ctl.shared_bit != 0;
        let shared = gpa & self.ctl.shared_bit != 0;
        if gpa >> (12 + 9 * level).min(52) != 0 || tdx && gpa & !(self.ctl.shared_bit * 2 - 1) != 0
        {
            return Ok(Err(nothing));
        }
        let marks = pointer & eptp::AD != 0 && !shared;
        // With accessed and dirty flags, the processor's own reads of guest page tables count as writes.
        let access = if marks && table {
            access | access::WRITE
        } else {
            access
        };
        let dram = (1u64 << self.keyid_shift) - 1;
        let secure = tdx && !shared;
        let place = |address: u64, cpu: &Cpu| {
            if secure {
                address & dram | cpu.ctl.hkid
            } else {
                address
            }
        };
        let mut at_table = place(
            if shared {
                self.ctl.shared_eptp
            } else {
                pointer
            } & epte::ADDRESS,
            self,
        );
        let mut rights = 7u8;
        loop {
            let shift = 12 + 9 * (level - 1);
            let at = at_table + (gpa >> shift & 0x1ff) * 8;
            if !secure && !self.host_address_ok(at_table) {
                return Ok(Err(Refusal::Misconfiguration));
            }
            let entry = self.phys_rd64(at)?;
            let convertible = entry & epte::SUPPRESS_VE == 0;
            if entry & 7 == 0 {
                return Ok(Err(Refusal::Violation {
                    rights: 0,
                    convertible,
                }));
            }
            let leaf = level == 1 || entry & epte::LEAF != 0;
            if self.epte_misconfigured(entry, level, leaf, secure) {
                return Ok(Err(Refusal::Misconfiguration));
            }
            rights &= (entry & 7) as u8;
            if leaf || rights & access != access {
                // Permission is judged on the whole path; an upper entry that already forbids ends the walk here only
                // for the purpose of the answer.
                if rights & access != access {
                    return Ok(Err(Refusal::Violation {
                        rights,
                        convertible,
                    }));
                }
            }
            if mark && marks {
                let wanted = epte::A
                    | if leaf && access & access::WRITE != 0 {
                        epte::D
                    } else {
                        0
                    };
                if entry & wanted != wanted
                    && self.phys_cas(at, 8, entry.into(), (entry | wanted).into())?
                        != u128::from(entry)
                {
                    continue;
                }
            }
            if leaf {
                let offset = (1u64 << shift) - 1;
                let address = place(entry & epte::ADDRESS & !offset, self);
                if !secure && !self.host_address_ok(address) {
                    return Ok(Err(Refusal::Misconfiguration));
                }
                if marks && entry & epte::D == 0 && access & access::WRITE == 0 {
                    rights &= !access::WRITE;
                }
                return Ok(Ok((address | gpa & offset, rights)));
            }
            at_table = place(entry & epte::ADDRESS, self);
            level -= 1;
        }
    }

    /// An address outside the Secure EPT: its KeyID is one that this place may name.
    fn host_address_ok(&self, address: u64) -> bool {
        self.mem
            .split(address)
            .is_ok_and(|(keyid, _)| !self.mem.is_private(keyid))
    }

    fn epte_misconfigured(&self, entry: u64, level: u32, leaf: bool, secure: bool) -> bool {
        if entry & (epte::R | epte::W) == epte::W || level > 3 && entry & epte::LEAF != 0 {
            return true;
        }
        if secure {
            // Secure EPT entries carry the module's state in bits that are reserved elsewhere.
            return false;
        }
        if leaf {
            let offset = (1u64 << (12 + 9 * (level - 1))) - 1;
            let kind = entry >> 3 & 7;
            entry & offset & epte::ADDRESS != 0 || matches!(kind, 2 | 3 | 7)
        } else {
            entry >> 3 & 0x1f != 0
        }
    }

    /// GPA to bus address without side effects, for a debugger's eye.
    pub fn probe_gpa(&mut self, gpa: u64, write: bool) -> Option<u64> {
        if !self.ctl.secondary(secondary::EPT) {
            return Some(gpa);
        }
        let stop = self.stop;
        let wanted = if write { access::WRITE } else { access::READ };
        let found = self.walk_ept(gpa, wanted, false, false);
        self.stop = stop;
        found.ok()?.ok().map(|(pa, _)| pa)
    }

    /// CR0.PE and the like decide whether #VE can be delivered at all.
    pub fn ve_possible(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }
}
