//! Where guests spend their instructions: RIP noted every so many instructions, for profiles of what runs in a guest.
//! The silicon can do that; no host of a TD could.

use std::collections::HashMap;

/// Places kept; a guest that runs through more of them is counted without the new ones.
const PLACES: usize = 1 << 20;

/// Instructions by the address at which they were counted.
pub struct Samples {
    /// Instructions from one sample to the next; the look at a block's end that follows takes it.
    period: u64,
    last: u64,
    places: HashMap<u64, u64>,
}

impl Samples {
    /// `now`: instructions retired so far.
    pub fn new(period: u64, now: u64) -> Samples {
        Samples {
            period,
            last: now,
            places: HashMap::new(),
        }
    }

    /// The guest stands at `rip` after `now` instructions.
    #[inline]
    pub fn look(&mut self, rip: u64, now: u64) {
        let spent = now.wrapping_sub(self.last);
        if spent < self.period {
            return;
        }
        self.last = now;
        if self.places.len() < PLACES || self.places.contains_key(&rip) {
            *self.places.entry(rip).or_default() += spent;
        }
    }

    /// (RIP, instructions), the most first.
    pub fn list(&self) -> Vec<(u64, u64)> {
        let mut places: Vec<_> = self
            .places
            .iter()
            .map(|(&rip, &count)| (rip, count))
            .collect();
        places.sort_unstable_by_key(|&(rip, count)| (std::cmp::Reverse(count), rip));
        places
    }
}
