//! SEAMRR: the range that only SEAM mode reaches.

use std::sync::atomic::{AtomicU64, Ordering};

/// A range that is set once, by the platform's firmware, before any processor uses it. Empty until then.
#[derive(Default)]
pub struct Seamrr {
    base: AtomicU64,
    size: AtomicU64,
}

impl Seamrr {
    /// The size goes last: a reader that sees it sees the base that belongs to it.
    pub fn set(&self, base: u64, size: u64) {
        self.size.store(0, Ordering::Release);
        self.base.store(base, Ordering::Release);
        self.size.store(size, Ordering::Release);
    }

    #[inline(always)]
    pub fn holds(&self, address: u64) -> bool {
        let size = self.size.load(Ordering::Acquire);
        address.wrapping_sub(self.base.load(Ordering::Relaxed)) < size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_inside_belong_to_it() {
        let range = Seamrr::default();
        assert!(!range.holds(0) && !range.holds(u64::MAX));
        range.set(0x1000, 0x2000);
        assert!(range.holds(0x1000) && range.holds(0x2fff));
        assert!(!range.holds(0xfff) && !range.holds(0x3000));
    }
}
