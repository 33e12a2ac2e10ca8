//! Decoded blocks: found by physical address, chained to their successors, checked against their page's generation.

use std::collections::HashMap;

use crate::mem::Memory;

use super::decode::{decode, Trouble};
use super::state::Cpu;
use super::uop::Uop;

const NONE: u32 = u32::MAX;
/// A link inside one page stays right as long as its block does.
const ALWAYS: u64 = u64::MAX;
const JUMPS: usize = 4096;
/// Decoded instructions kept before everything is thrown away.
const CAPACITY: usize = 1 << 20;

#[derive(Clone, Copy)]
pub struct Link {
    block: u32,
    space: u64,
}

const UNLINKED: Link = Link {
    block: NONE,
    space: 0,
};

/// One block.
#[derive(Clone)]
pub struct Block {
    pub first: u32,
    pub uops: u32,
    pub count: u32,
    /// Bytes of code.
    pub bytes: u32,
    /// Target of the closing branch relative to the start.
    pub taken: u64,
    /// Physical address, KeyID included.
    pub pa: u64,
    pub generation: u32,
    /// The second page of a block whose only instruction crosses; 0 if none.
    pub pa2: u64,
    pub generation2: u32,
    pub mode: u32,
    links: [Link; 2],
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
        self.uops.clear();
        self.by_pa.clear();
        for jump in self.jumps.iter_mut() {
            jump.block = NONE;
        }
    }

    /// The successor of `block` on `side` (0 behind it, 1 its branch target), if the chain to it still holds.
    #[inline(always)]
    pub fn follow(&self, block: u32, side: usize, space: u64) -> Option<u32> {
        let link = self.blocks[block as usize].links[side];
        (link.block != NONE && (link.space == ALWAYS || link.space == space)).then_some(link.block)
    }

    pub fn link(&mut self, from: u32, side: usize, to: u32, same_page: bool, space: u64) {
        let crosses = self.blocks[to as usize].pa2 != 0;
        if from as usize >= self.blocks.len() || crosses {
            return;
        }
        let space = if same_page { ALWAYS } else { space };
        self.blocks[from as usize].links[side] = Link { block: to, space };
    }

    /// The block at `rip`, by linear address.
    #[inline(always)]
    pub fn jump(&self, rip: u64, space: u64, mode: u32) -> Option<u32> {
        let jump = &self.jumps[jump_index(rip)];
        (jump.rip == rip && jump.space == space && jump.mode == mode && jump.block != NONE)
            .then_some(jump.block)
    }

    pub fn note_jump(&mut self, rip: u64, space: u64, mode: u32, block: u32) {
        if self.blocks[block as usize].pa2 == 0 {
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

    /// Whether the bytes that `block` was decoded from are still there; brings its generation up to date.
    #[inline(always)]
    pub fn fresh(&self, block: u32, mem: &Memory) -> bool {
        let block = &self.blocks[block as usize];
        mem.code_gen(block.pa) == block.generation
            && (block.pa2 == 0 || mem.code_gen(block.pa2) == block.generation2)
    }

    /// The page of `block` was written. Compares the bytes, and drops the block if they changed.
    #[cold]
    #[inline(never)]
    pub fn refresh(&mut self, index: u32, cpu: &mut Cpu) -> bool {
        let (pa, pa2, bytes) = {
            let block = &self.blocks[index as usize];
            (block.pa, block.pa2, block.code.len())
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
        let block = &mut self.blocks[index as usize];
        match generations {
            Some((first, second)) if *block.code == *now => {
                block.generation = first;
                block.generation2 = second;
                true
            }
            _ => {
                let key = (block.pa, block.mode);
                // Its old place may still be linked to; a generation that cannot come back keeps it from running.
                block.generation = block.generation.wrapping_sub(1);
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
            first: first as u32,
            uops: (self.uops.len() - first) as u32,
            count: decoded.count.into(),
            bytes: decoded.bytes.into(),
            taken: decoded.taken,
            pa,
            generation,
            pa2,
            generation2,
            mode,
            links: [UNLINKED; 2],
            code: bytes.into_boxed_slice(),
        });
        self.by_pa.insert((pa, mode), index);
        Ok(Some(index))
    }
}
