//! Walks against their definition, load by load.

use proptest::prelude::*;

use super::super::*;
use super::{memory, with_key, BASE, PRIVATE};

const LEAF: u64 = 1 << 7;
const ADDRESS: u64 = (1 << 52) - PAGE;

fn td(address: u64) -> u64 {
    with_key(PRIVATE, address)
}

/// One load at a time, as software would do it.
fn step_by_step(
    memory: &Memory,
    table: u64,
    top: u32,
    gpa: u64,
    level: u32,
) -> Result<Reached, Fault> {
    let (mut table, mut here) = (table, top);
    loop {
        let at = table.wrapping_add((gpa >> (12 + 9 * here) & 0x1FF) * 8);
        let entry = memory.rd64(at, Agent::SEAM)?;
        if here <= level || entry & 0xFF != 7 {
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

/// What a hostile or a sound tree may hold.
fn entry() -> impl Strategy<Value = u64> {
    let page = |n: u64| td(BASE + n * PAGE);
    prop_oneof![
        4 => (0..4u64).prop_map(move |n| page(n) | 7),
        1 => (0..4u64, 0..128u64).prop_map(move |(n, low)| page(n) | low),
        1 => (0..4u64).prop_map(move |n| page(n) | 7 | LEAF),
        1 => any::<u64>(),
    ]
}

proptest! {
    #[test]
    fn a_walk_is_its_loads(
        entries in prop::collection::vec((0..4u64, 0..4u64, entry()), 0..24),
        gpa in prop_oneof![any::<u64>(), (0..4u64, 0..4u64, 0..4u64).prop_map(|(a, b, c)| a << 30 | b << 21 | c << 12)],
        table in prop_oneof![4 => (0..4u64).prop_map(|n| td(BASE + n * PAGE)), 1 => any::<u64>()],
        top in 0..=TOP_LEVEL,
        level in 0..6u32,
    ) {
        let memory = memory(Integrity::Crypto);
        memory.zero_pages(td(BASE), 4, Agent::SEAM).unwrap();
        for (page, index, entry) in entries {
            memory.wr64(td(BASE + page * PAGE + index * 8), entry, Agent::SEAM).unwrap();
        }
        let expected = step_by_step(&memory, table, top, gpa, level);
        prop_assert_eq!(memory.walk_ept(table, top, gpa, level, Agent::SEAM), expected);
    }

    #[test]
    fn a_level_that_no_tree_has_walks_as_the_highest(top in TOP_LEVEL + 1.., gpa: u64) {
        let memory = memory(Integrity::Crypto);
        let walk = |top| memory.walk_ept(td(BASE), top, gpa, 0, Agent::SEAM);
        prop_assert_eq!(walk(top), walk(TOP_LEVEL));
    }
}

#[test]
fn a_pamt_walk_goes_down_while_the_entries_above_have_no_type() {
    let memory = memory(Integrity::Crypto);
    let path = PamtPath {
        e1g: td(BASE),
        e2m: td(BASE + 0x1008),
        e4k: td(BASE + 0x2000),
    };
    let agent = Agent::SEAM;
    assert_eq!(memory.pamt_is_split(&path, agent), None, "no MAC yet");
    memory.zero_pages(td(BASE), 3, agent).unwrap();
    assert_eq!(memory.pamt_is_split(&path, agent), Some(true));
    for level in [path.e1g, path.e2m] {
        memory.wr64(level, 0xFF00_FFFF, agent).unwrap();
        assert_eq!(memory.pamt_is_split(&path, agent), Some(true));
        memory.wr64(level, 3 << 16, agent).unwrap();
        assert_eq!(memory.pamt_is_split(&path, agent), Some(false));
        memory.wr64(level, 0, agent).unwrap();
    }
    memory.raw_write(BASE + 0x1000, &[0], agent);
    assert_eq!(memory.pamt_is_split(&path, agent), None, "tampered with");
}
