//! Decoded blocks: found by physical address, chained to their successors, checked against their page's generation.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::decode::{decode, Trouble};
use super::state::{Cpu, RunningCode};
use super::uop::Uop;

/// No block.
pub const NONE: u32 = u32::MAX;
/// A link inside one page stays right as long as its block does.
const ALWAYS: u64 = u64::MAX;
const JUMPS: usize = 4096;
/// Decoded instructions kept before everything is thrown away.
const CAPACITY: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Link {
    space: u64,
    block: u32,
}

const UNLINKED: Link = Link {
    space: 0,
    block: NONE,
};

/// One block: what the run loop touches, in one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Block {
    /// `Memory::code_stores` when its bytes were last known to be right.
    checked: u64,
    /// Physical address, KeyID included.
    pub pa: u64,
    /// Target of the closing branch relative to the start.
    pub taken: u64,
    /// Its first micro-operation.
    pub first: u32,
    /// Bytes of code.
    pub bytes: u16,
    /// Instructions.
    pub count: u8,
    /// Its only instruction crosses into another page.
    pub crosses: bool,
    links: [Link; 2],
}

/// Where a block came from.
struct Origin {
    generation: u32,
    /// The second page of a block that crosses, else 0.
    pa2: u64,
    generation2: u32,
    mode: u32,
    code: Box<[u8]>,
}

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    space: u64,
    mode: u32,
    block: u32,
}

/// All blocks of one processor.
pub struct Cache {
    pub blocks: Vec<Block>,
    origins: Vec<Origin>,
    pub uops: Vec<Uop>,
    by_pa: HashMap<(u64, u32), u32, Hasher>,
    jumps: Box<[Jump; JUMPS]>,
    pub key_generation: u64,
    /// How often everything was thrown away: block numbers of another era mean nothing.
    pub era: u64,
}

#[derive(Clone, Copy, Default)]
pub struct Hasher;

/// Multiplicative hashing of the two words of a block's key: the keys are addresses, not chosen by an adversary who
/// could gain more than a slow guest.
pub struct Hash(u64);

impl std::hash::BuildHasher for Hasher {
    type Hasher = Hash;
    fn build_hasher(&self) -> Hash {
        Hash(0)
    }
}

impl std::hash::Hasher for Hash {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(value.into());
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }
}

impl Default for Cache {
    fn default() -> Self {
        Cache {
            blocks: Vec::new(),
            origins: Vec::new(),
            uops: Vec::new(),
            by_pa: HashMap::default(),
            jumps: Box::new(
                [Jump {
                    rip: 0,
                    space: 0,
                    mode: 0,
                    block: NONE,
                }; JUMPS],
            ),
            key_generation: 0,
            era: 0,
        }
    }
}

fn jump_index(rip: u64) -> usize {
    (rip ^ rip >> 12) as usize & (JUMPS - 1)
}

impl Cache {
    pub fn clear(&mut self) {
        self.era += 1;
        self.blocks.clear();
        self.origins.clear();
        self.uops.clear();
        self.by_pa.clear();
        for jump in self.jumps.iter_mut() {
            jump.block = NONE;
        }
    }

    /// The successor of `block` on `side` (0 behind it, 1 its branch target), or `NONE` if no chain to it holds.
    #[inline(always)]
    pub fn follow(&self, block: u32, side: usize, space: u64) -> u32 {
        let link = self.blocks[block as usize].links[side];
        if link.space == space || link.space == ALWAYS {
            link.block
        } else {
            NONE
        }
    }

    pub fn link(&mut self, from: u32, side: usize, to: u32, same_page: bool, space: u64) {
        if self.blocks[to as usize].crosses {
            // Its second page must be translated each time.
            return;
        }
        let space = if same_page { ALWAYS } else { space };
        self.blocks[from as usize].links[side] = Link { block: to, space };
    }

    /// The block at `rip`, by linear address, or `NONE`.
    #[inline(always)]
    pub fn jump(&self, rip: u64, space: u64, mode: u32) -> u32 {
        let jump = &self.jumps[jump_index(rip)];
        if jump.rip == rip && jump.space == space && jump.mode == mode {
            jump.block
        } else {
            NONE
        }
    }

    pub fn note_jump(&mut self, rip: u64, space: u64, mode: u32, block: u32) {
        if !self.blocks[block as usize].crosses {
            self.jumps[jump_index(rip)] = Jump {
                rip,
                space,
                mode,
                block,
            };
        }
    }

    pub fn find(&self, pa: u64, mode: u32) -> Option<u32> {
        self.by_pa.get(&(pa, mode)).copied()
    }

    /// Where the bytes of `block` lie.
    pub fn running(&self, block: u32) -> RunningCode {
        let (at, origin) = (&self.blocks[block as usize], &self.origins[block as usize]);
        let len = u64::from(at.bytes);
        let first = if at.crosses {
            0x1000 - (at.pa & 0xfff)
        } else {
            len
        };
        RunningCode {
            pa: at.pa,
            len: first,
            pa2: origin.pa2,
            len2: len - first,
        }
    }

    /// The second page that `block` was decoded from, if it crosses.
    pub fn second_page(&self, block: u32) -> u64 {
        self.origins[block as usize].pa2
    }

    /// Whether nothing was stored to any code page since the block was checked.
    #[inline(always)]
    pub fn fresh(&self, block: u32, stores: u64) -> bool {
        self.blocks[block as usize].checked == stores
    }

    /// Whether the bytes that `block` was decoded from are still there.
    #[cold]
    #[inline(never)]
    pub fn check(&mut self, block: u32, cpu: &mut Cpu) -> bool {
        // Read first: a store that comes later changes it again.
        let stores = cpu.mem.code_stores.load(Ordering::Acquire);
        let origin = &self.origins[block as usize];
        let pa = self.blocks[block as usize].pa;
        let same = cpu.mem.code_gen(pa) == origin.generation
            && (origin.pa2 == 0 || cpu.mem.code_gen(origin.pa2) == origin.generation2);
        if same || self.refresh(block, cpu) {
            self.blocks[block as usize].checked = stores;
            return true;
        }
        false
    }

    /// The page of `block` was written. Compares the bytes, and drops the block if they changed.
    fn refresh(&mut self, index: u32, cpu: &mut Cpu) -> bool {
        let (pa, pa2, bytes) = {
            let origin = &self.origins[index as usize];
            let pa = self.blocks[index as usize].pa;
            (pa, origin.pa2, origin.code.len())
        };
        let mut now = vec![0; bytes];
        let in_first = bytes.min((0x1000 - (pa & 0xfff)) as usize);
        let generations = (|| {
            let first = cpu.watch_code(pa)?;
            cpu.phys_read(pa, &mut now[..in_first]).ok()?;
            let second = if pa2 != 0 {
                let second = cpu.watch_code(pa2)?;
                cpu.phys_read(pa2, &mut now[in_first..]).ok()?;
                second
            } else {
                0
            };
            Some((first, second))
        })();
        let origin = &mut self.origins[index as usize];
        match generations {
            Some((first, second)) if *origin.code == *now => {
                origin.generation = first;
                origin.generation2 = second;
                true
            }
            _ => {
                let key = (pa, origin.mode);
                // Its old place may still be linked to; a generation that cannot come back keeps it from running.
                origin.generation = origin.generation.wrapping_sub(1);
                if self.by_pa.get(&key) == Some(&index) {
                    self.by_pa.remove(&key);
                }
                false
            }
        }
    }

    /// Decodes the block at `pa`. `second`: the physical address of the page behind, asked for only if the first
    /// instruction reaches there; an error of its translation is the fetch's fault.
    pub fn decode_at<E>(
        &mut self,
        cpu: &mut Cpu,
        pa: u64,
        mode: u32,
        mut second: impl FnMut(&mut Cpu) -> Result<u64, E>,
    ) -> Result<Option<u32>, E> {
        if self.uops.len() > CAPACITY {
            self.clear();
        }
        cpu.counters.decoded += 1;
        let checked = cpu.mem.code_stores.load(Ordering::Acquire);
        let page = (0x1000 - (pa & 0xfff)) as usize;
        let mut bytes = vec![0; page];
        let Some(generation) = cpu.watch_code(pa) else {
            return Ok(None);
        };
        if cpu.phys_read(pa, &mut bytes).is_err() {
            return Ok(None);
        }
        let first = self.uops.len();
        let (mut pa2, mut generation2) = (0, 0);
        let decoded = match decode(&bytes, page, mode, &mut self.uops) {
            Ok(decoded) => decoded,
            Err(Trouble::Crosses) => {
                let next = second(cpu)?;
                let Some(watched) = cpu.watch_code(next) else {
                    return Ok(None);
                };
                let mut more = [0; 16];
                if cpu.phys_read(next, &mut more).is_err() {
                    return Ok(None);
                }
                bytes.extend_from_slice(&more);
                (pa2, generation2) = (next, watched);
                match decode(&bytes, page, mode, &mut self.uops) {
                    Ok(decoded) => decoded,
                    Err(Trouble::Crosses) => return Ok(None),
                }
            }
        };
        let index = self.blocks.len() as u32;
        bytes.truncate(decoded.bytes.into());
        self.blocks.push(Block {
            checked,
            pa,
            taken: decoded.taken,
            first: first as u32,
            bytes: decoded.bytes,
            count: decoded.count,
            crosses: pa2 != 0,
            links: [UNLINKED; 2],
        });
        self.origins.push(Origin {
            generation,
            pa2,
            generation2,
            mode,
            code: bytes.into_boxed_slice(),
        });
        self.by_pa.insert((pa, mode), index);
        Ok(Some(index))
    }
}
