//! What a platform's memory is made of, and whether that makes sense.

use std::fmt;

/// Physical addresses end below this bit on every TDX part (bits 63:52 are reserved).
pub const PA_BITS: u32 = 52;
pub const PAGE: u64 = 4096;
pub const LINE: u64 = 64;
/// IA32_TME_ACTIVATE reserves at most this many address bits for KeyIDs (SDM vol. 4, MSR 982H, bits 35:32).
pub const MAX_KEYID_BITS: u32 = 15;

/// How much the engine checks when a line is read with a private KeyID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Integrity {
    /// Cryptographic integrity (Ci): a 28-bit MAC, and the TD-owner bit.
    Crypto,
    /// Logical integrity (Li): the TD-owner bit only.
    Logical,
    /// Encryption alone, as plain MKTME.
    None,
}

/// The memory of one platform.
#[derive(Debug, Clone)]
pub struct Config {
    /// (base, size) of each DRAM range: 4 KiB aligned, disjoint.
    pub ranges: Vec<(u64, u64)>,
    /// Address bits taken by KeyIDs, below bit 52.
    pub keyid_bits: u32,
    /// KeyIDs from here up are private (TDX); the others are shared (MKTME).
    pub first_private_keyid: u32,
    pub integrity: Integrity,
    /// KeyID 0 encrypts with the TME key. `false`: it bypasses encryption.
    pub tme: bool,
    /// Every key that is not given is drawn from this.
    pub seed: u64,
}

/// A request about memory or keys that no platform could fulfil; the text has the value and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit(pub String);

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unfit {}

impl Config {
    /// Width of a DRAM address: what the KeyID leaves of 52 bits.
    pub fn address_bits(&self) -> u32 {
        PA_BITS - self.keyid_bits
    }

    pub(super) fn check(&self) -> Result<(), Unfit> {
        if self.keyid_bits > MAX_KEYID_BITS {
            return unfit(format!(
                "keyid_bits is {}; at most {MAX_KEYID_BITS} exist",
                self.keyid_bits
            ));
        }
        let keyids = 1u32 << self.keyid_bits;
        if self.first_private_keyid == 0 || self.first_private_keyid > keyids {
            return unfit(format!(
                "first_private_keyid is {}; with keyid_bits={} it is 1 to {keyids} ({keyids}: no private KeyID)",
                self.first_private_keyid, self.keyid_bits
            ));
        }
        if self.ranges.is_empty() {
            return unfit("there is no memory range; give at least one (base, size)".into());
        }
        self.check_ranges()
    }

    fn check_ranges(&self) -> Result<(), Unfit> {
        let top = 1u64 << self.address_bits();
        let mut sorted = self.ranges.clone();
        sorted.sort_unstable();
        let mut free = 0;
        for (base, size) in sorted {
            if base % PAGE != 0 || size % PAGE != 0 || size == 0 {
                return unfit(format!(
                    "the range ({base:#x}, {size:#x}) is not made of whole 4 KiB pages"
                ));
            }
            if base.checked_add(size).is_none_or(|end| end > top) {
                return unfit(format!(
                    "the range ({base:#x}, {size:#x}) ends above {top:#x}, where KeyIDs begin"
                ));
            }
            if base < free {
                return unfit(format!(
                    "the range ({base:#x}, {size:#x}) overlaps the one that ends at {free:#x}"
                ));
            }
            free = base + size;
        }
        Ok(())
    }
}

pub(super) fn unfit<T>(text: String) -> Result<T, Unfit> {
    Err(Unfit(text))
}
