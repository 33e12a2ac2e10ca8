//! Loads in a row, each from where the one before it pointed: what software walks, done by one call.
//!
//! They are loads and nothing more; what an entry means beyond "leads on" and "address" is software's.

use super::{Agent, Fault, Memory, PAGE};

/// SDM vol. 3C, 29.3.2, bits 7:0 of an EPT entry that leads on with all rights: R, W and X. Bit 7 would make it a leaf,
/// bits 6:3 of an entry that is none are reserved.
const LOW_BITS: u64 = 0xFF;
const LEADS_ON: u64 = 7;
/// Address bits of an entry, KeyID included.
const ADDRESS: u64 = (1 << 52) - PAGE;
/// The deepest tree: level 4 is that of 5-level EPT's root entries.
pub const TOP_LEVEL: u32 = 4;

/// Where a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    pub at: u64,
    pub entry: u64,
    pub level: u32,
}

/// The three entries of a PAMT above a 4 KiB page. Addresses include the KeyID.
#[derive(Debug, Clone, Copy)]
pub struct PamtPath {
    pub e1g: u64,
    pub e2m: u64,
    pub e4k: u64,
}

/// PT of a PAMT entry, bits 23:16; 0 (NDA) above the 4 KiB level says that there are smaller entries below.
const PAGE_TYPE: u64 = 0xFF << 16;

impl Memory {
    /// From the EPT page `table`, whose entries have level `top` (at most [`TOP_LEVEL`]), down to the entry of `gpa`
    /// at `level`; ends early at an entry that does not lead on: it is not present, maps a page, withholds a right or
    /// is misconfigured.
    pub fn walk_ept(
        &self,
        table: u64,
        top: u32,
        gpa: u64,
        level: u32,
        agent: Agent,
    ) -> Result<Reached, Fault> {
        let mut here = top.min(TOP_LEVEL);
        let mut table = table;
        loop {
            let at = table.wrapping_add(gpa >> (9 + 9 * here) & 0xFF8);
            let entry = self.rd64(at, agent)?;
            if here <= level || entry & LOW_BITS != LEADS_ON {
                return Ok(Reached {
                    at,
                    entry,
                    level: here,
                });
            }
            table = entry & ADDRESS;
            here -= 1;
        }
    }

    /// Whether a PAMT walk goes down to the 4 KiB entry. `None`: these loads need a wait or a fault, make them singly.
    pub fn pamt_is_split(&self, path: &PamtPath, agent: Agent) -> Option<bool> {
        let e1g = self.rd64_now(path.e1g, agent)?;
        if e1g & PAGE_TYPE != 0 {
            return Some(false);
        }
        Some(self.rd64_now(path.e2m, agent)? & PAGE_TYPE == 0)
    }
}
