//! Tests of the memory as its users see it. The rules themselves are checked against an eager model in `model`.

mod model;
mod threads;
mod walks;

use super::*;

pub(super) const KEYID_BITS: u32 = 6;
pub(super) const PRIVATE: u32 = 32;
pub(super) const BASE: u64 = 0x10_0000;
pub(super) const SIZE: u64 = 0x40_0000;

pub(super) fn memory(integrity: Integrity) -> Memory {
    let memory = Memory::new(&Config {
        ranges: vec![(BASE, SIZE), (0x1_0000_0000, 0x1000)],
        keyid_bits: KEYID_BITS,
        first_private_keyid: PRIVATE,
        integrity,
        tme: true,
        seed: 7,
    })
    .unwrap();
    for keyid in [1, PRIVATE, PRIVATE + 1] {
        memory.set_key(keyid, None, Agent::SEAM).unwrap();
    }
    memory
}

pub(super) fn with_key(keyid: u32, address: u64) -> u64 {
    u64::from(keyid) << (PA_BITS - KEYID_BITS) | address
}

fn td(address: u64) -> u64 {
    with_key(PRIVATE, address)
}

fn read_line(memory: &Memory, pa: u64, agent: Agent) -> Result<[u8; 64], Fault> {
    let mut line = [0; 64];
    memory.read(pa, &mut line, agent).map(|()| line)
}

const SECRET: [u8; 64] = *b"A trust domain keeps its secret in exactly sixty-four bytes here";

#[test]
fn fresh_dram_is_zero_for_the_host_and_poison_for_a_td() {
    let memory = memory(Integrity::Crypto);
    assert_eq!(read_line(&memory, BASE, Agent::HOST), Ok([0; 64]));
    assert_eq!(
        memory.rd64(td(BASE), Agent::SEAM),
        Err(Fault::MachineCheck { pa: td(BASE) })
    );
    assert_eq!(
        memory.rd64(BASE, Agent::HOST),
        Err(Fault::MachineCheck { pa: BASE })
    );
}

#[test]
fn a_probe_never_sees_what_a_td_wrote_and_the_td_always_does() {
    for integrity in [Integrity::Crypto, Integrity::Logical, Integrity::None] {
        let memory = memory(integrity);
        memory.write(td(BASE), &SECRET, Agent::SEAM).unwrap();
        let raw = memory.raw_line(BASE);
        assert!(raw
            .data
            .windows(8)
            .all(|window| !SECRET.windows(8).any(|secret| secret == window)));
        assert_eq!(raw.owner, integrity != Integrity::None);
        assert_eq!(read_line(&memory, td(BASE), Agent::SEAM), Ok(SECRET));
    }
}

#[test]
fn the_host_reads_zeros_from_owned_lines_and_ciphers_garbage_without_integrity() {
    for integrity in [Integrity::Crypto, Integrity::Logical] {
        let memory = memory(integrity);
        memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
        assert_eq!(read_line(&memory, BASE, Agent::HOST), Ok([0; 64]));
        assert_eq!(
            read_line(&memory, with_key(1, BASE), Agent::HOST),
            Ok([0; 64])
        );
        assert_eq!(
            read_line(&memory, td(BASE), Agent::SEAM),
            Ok(SECRET),
            "and that did no harm"
        );
    }
    let memory = memory(Integrity::None);
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    let seen = read_line(&memory, BASE, Agent::HOST).unwrap();
    assert!(seen != [0; 64] && seen != SECRET);
    assert_eq!(read_line(&memory, td(BASE), Agent::SEAM), Ok(SECRET));
}

#[test]
fn one_td_cannot_read_another() {
    let memory = memory(Integrity::Crypto);
    let other = with_key(PRIVATE + 1, BASE);
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    assert_eq!(
        read_line(&memory, other, Agent::SEAM),
        Err(Fault::MachineCheck { pa: other })
    );
    let poisoned = Err(Fault::MachineCheck { pa: td(BASE) });
    assert_eq!(
        read_line(&memory, td(BASE), Agent::SEAM),
        poisoned,
        "the line is poisoned for its owner too"
    );
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    assert_eq!(
        read_line(&memory, td(BASE), Agent::SEAM),
        Ok(SECRET),
        "a full write heals it"
    );
}

#[test]
fn a_partial_host_write_poisons_silently_and_a_full_one_takes_the_line() {
    let memory = memory(Integrity::Crypto);
    memory
        .write(td(BASE), &[SECRET, SECRET].concat(), Agent::SEAM)
        .unwrap();
    memory.wr8(BASE + 5, 1, Agent::HOST).unwrap();
    assert!(memory.raw_line(BASE).poisoned);
    assert_eq!(
        memory.rd8(td(BASE), Agent::SEAM),
        Err(Fault::MachineCheck { pa: td(BASE) })
    );
    assert_eq!(
        memory
            .rd64(td(BASE + 64), Agent::SEAM)
            .unwrap()
            .to_le_bytes(),
        SECRET[..8],
        "the next line is well"
    );
    memory.write(BASE + 64, &[9; 64], Agent::HOST).unwrap();
    assert_eq!(
        memory.rd64(BASE + 64, Agent::HOST),
        Ok(0x0909_0909_0909_0909)
    );
    assert!(!memory.raw_line(BASE + 64).owner);
    assert!(memory.rd64(td(BASE + 64), Agent::SEAM).is_err());
}

#[test]
fn a_replayed_line_is_accepted_at_its_place_only() {
    let memory = memory(Integrity::Crypto);
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    let old = memory.raw_line(BASE);
    memory.write_line(td(BASE), &[1; 64], Agent::SEAM).unwrap();
    memory.raw_set_line(BASE, &old.data, old.mac, old.owner, Agent::HOST);
    assert_eq!(read_line(&memory, td(BASE), Agent::SEAM), Ok(SECRET));
    memory.raw_set_line(BASE + 64, &old.data, old.mac, old.owner, Agent::HOST);
    assert!(read_line(&memory, td(BASE + 64), Agent::SEAM).is_err());
    memory.raw_set_line(BASE, &old.data, old.mac, false, Agent::HOST);
    assert!(
        read_line(&memory, td(BASE), Agent::SEAM).is_err(),
        "the owner bit is checked"
    );
}

#[test]
fn a_reprogrammed_keyid_does_not_read_what_its_old_key_wrote() {
    let memory = memory(Integrity::Crypto);
    let pair = Some(([1; 16], [2; 16]));
    memory.set_key(PRIVATE, pair, Agent::SEAM).unwrap();
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    memory
        .set_key(PRIVATE, Some(([1; 16], [3; 16])), Agent::SEAM)
        .unwrap();
    assert!(read_line(&memory, td(BASE), Agent::SEAM).is_err());
    memory.set_key(PRIVATE, pair, Agent::SEAM).unwrap();
    memory.write_line(td(BASE), &SECRET, Agent::SEAM).unwrap();
    memory.set_key(PRIVATE, pair, Agent::SEAM).unwrap();
    assert_eq!(
        read_line(&memory, td(BASE), Agent::SEAM),
        Ok(SECRET),
        "the same key again is the same key"
    );
    memory.clear_key(PRIVATE, Agent::SEAM).unwrap();
    assert_eq!(
        memory.rd8(td(BASE), Agent::SEAM),
        Err(Fault::Bus { pa: td(BASE) })
    );
}

#[test]
fn addresses_that_no_agent_may_use_are_refused() {
    let memory = memory(Integrity::Crypto);
    for (pa, agent) in [
        (1 << 52 | BASE, Agent::SEAM),
        (1 << 63 | BASE, Agent::HOST),
        (td(BASE), Agent::HOST),
        (with_key(PRIVATE + 2, BASE), Agent::SEAM),
    ] {
        assert_eq!(memory.rd64(pa, agent), Err(Fault::Bus { pa }));
        assert_eq!(memory.wr64(pa, 1, agent), Err(Fault::Bus { pa }));
        assert_eq!(memory.cas64(pa, 1, 1, agent), Err(Fault::Bus { pa }));
        assert_eq!(memory.zero_pages(pa, 1, agent), Err(Fault::Bus { pa }));
        assert_eq!(memory.page_ptr(pa, false, agent), Err(Fault::Bus { pa }));
        assert_eq!(memory.mark_code(pa, agent), Err(Fault::Bus { pa }));
    }
    let top = with_key(0, (1 << (PA_BITS - KEYID_BITS)) - 4);
    assert_eq!(
        memory.rd64(top, Agent::HOST),
        Err(Fault::Bus { pa: top }),
        "not into the next KeyID"
    );
    assert!(memory.zero_pages(BASE, u64::MAX, Agent::HOST).is_err());
    assert!(memory.zero_pages(BASE + 8, 1, Agent::HOST).is_err());
    assert!(memory.copy_page(BASE + 64, BASE, Agent::HOST).is_err());
}

#[test]
fn outside_dram_reads_are_ones_and_writes_are_lost() {
    let memory = memory(Integrity::Crypto);
    let end = BASE + SIZE;
    memory.wr64(end - 4, 0, Agent::HOST).unwrap();
    assert_eq!(memory.rd64(end - 4, Agent::HOST), Ok(0xFFFF_FFFF_0000_0000));
    assert_eq!(memory.cas64(end, 5, 6, Agent::HOST), Ok(u64::MAX));
    memory.zero_pages(end, 2, Agent::HOST).unwrap();
    let mut raw = [0; 16];
    memory.raw_read(end - 8, &mut raw);
    assert_ne!(raw[..8], [0xFF; 8]);
    assert_eq!(raw[8..], [0xFF; 8]);
    memory.raw_read(u64::MAX - 3, &mut raw);
    assert_eq!(raw, [0xFF; 16]);
    memory.raw_write(u64::MAX - 3, &raw, Agent::HOST);
    assert!(memory.is_dram(end - 1) && !memory.is_dram(end));
    assert_eq!(memory.code_gen(u64::MAX), 0);
}

#[test]
fn whole_pages_change_hands_and_fold_back() {
    let memory = memory(Integrity::Crypto);
    let slot = memory.register_cpu();
    slot.enter();
    let agent = Agent {
        mode: Requester::Seam,
        cpu: Some(&slot),
    };
    let direct = |pa| matches!(memory.page_ptr(pa, true, agent), Ok(PageAccess::Direct(_)));
    assert!(!direct(td(BASE)));
    memory.zero_pages(td(BASE), 1, agent).unwrap();
    assert!(direct(td(BASE)) && !direct(BASE));
    for line in 0..64 {
        memory
            .write_line(td(BASE + line * 64), &SECRET, agent)
            .unwrap();
    }
    memory.raw_write(BASE + 100, &[1], agent);
    assert!(!direct(td(BASE)));
    let before = memory.raw_line(BASE + 128);
    memory.raw_set_line(
        BASE + 128,
        &before.data,
        before.mac,
        before.owner,
        Agent::HOST,
    );
    memory.write_line(td(BASE + 64), &SECRET, agent).unwrap();
    assert!(
        direct(td(BASE)),
        "an untouched line of ciphertext verifies and folds back"
    );
    memory.copy_page(BASE + PAGE, td(BASE), agent).unwrap();
    assert_eq!(
        read_line(&memory, BASE + PAGE + 4032, Agent::HOST),
        Ok(SECRET)
    );
}

#[test]
fn pointers_are_for_processors_that_run() {
    let memory = memory(Integrity::Crypto);
    assert_eq!(
        memory.page_ptr(BASE, false, Agent::HOST),
        Ok(PageAccess::Slow)
    );
    let slot = memory.register_cpu();
    let agent = Agent {
        mode: Requester::Host,
        cpu: Some(&slot),
    };
    assert_eq!(memory.page_ptr(BASE, false, agent), Ok(PageAccess::Slow));
    slot.enter();
    assert!(matches!(
        memory.page_ptr(BASE, false, agent),
        Ok(PageAccess::Direct(_))
    ));
    assert_eq!(
        memory.page_ptr(BASE + SIZE, false, agent),
        Ok(PageAccess::Slow)
    );
}

#[test]
fn whatever_changes_a_page_takes_its_pointers_back() {
    for integrity in [Integrity::Crypto, Integrity::None] {
        let memory = memory(integrity);
        let slot = memory.register_cpu();
        slot.enter();
        let agent = Agent {
            mode: Requester::Seam,
            cpu: Some(&slot),
        };
        let line = memory.raw_line(BASE);
        let changes: [&dyn Fn(); 9] = [
            &|| memory.zero_pages(BASE, 1, agent).unwrap(),
            &|| memory.copy_page(BASE, BASE + PAGE, agent).unwrap(),
            &|| memory.write_line(BASE, &SECRET, agent).unwrap(),
            &|| memory.wr8(BASE + 9, 1, agent).unwrap(),
            &|| assert!(memory.cas(td(BASE), 16, 0, 0, agent).is_ok()),
            &|| memory.raw_write(BASE + 9, &[1], agent),
            &|| memory.raw_set_line(BASE, &line.data, 0, true, agent),
            &|| assert!(memory.mark_code(td(BASE), agent).is_ok()),
            &|| memory.set_key(PRIVATE, None, agent).unwrap(),
        ];
        for (n, change) in changes.iter().enumerate() {
            memory.zero_pages(td(BASE), 1, agent).unwrap();
            slot.poll();
            let pointer = memory.page_ptr(td(BASE), true, agent).unwrap();
            assert!(matches!(pointer, PageAccess::Direct(_)));
            assert!(!slot.poll());
            change();
            assert!(slot.poll(), "change {n}");
        }
    }
}

#[test]
fn pages_nobody_took_since_a_shootdown_need_no_other() {
    let memory = memory(Integrity::Crypto);
    let slot = memory.register_cpu();
    slot.enter();
    let agent = Agent {
        mode: Requester::Seam,
        cpu: Some(&slot),
    };
    memory.zero_pages(td(BASE), 8, agent).unwrap();
    for page in 0..8 {
        let got = memory.page_ptr(td(BASE + page * PAGE), true, agent);
        assert!(matches!(got, Ok(PageAccess::Direct(_))));
    }
    memory.zero_pages(BASE, 1, agent).unwrap();
    assert!(slot.poll());
    let kept = memory.page_ptr(td(BASE + 7 * PAGE), true, agent);
    assert!(matches!(kept, Ok(PageAccess::Direct(_))));
    memory.zero_pages(BASE + PAGE, 6, agent).unwrap();
    assert!(!slot.poll());
    memory.zero_pages(BASE + 7 * PAGE, 1, agent).unwrap();
    assert!(slot.poll());
}

#[test]
fn zeroing_a_page_also_zeroes_what_went_through_a_pointer() {
    let memory = memory(Integrity::Crypto);
    let slot = memory.register_cpu();
    slot.enter();
    let agent = Agent {
        mode: Requester::Host,
        cpu: Some(&slot),
    };
    let Ok(PageAccess::Direct(page)) = memory.page_ptr(BASE, true, agent) else {
        panic!("a fresh page is KeyID 0's");
    };
    for _ in 0..2 {
        // SAFETY: nothing takes the pointer back: key and code mark stay as they are.
        unsafe { bytes::copy_in(page, &SECRET) };
        memory.zero_pages(BASE, 1, agent).unwrap();
        assert!(!slot.poll());
        assert_eq!(read_line(&memory, BASE, agent), Ok([0; 64]));
    }
}

#[test]
fn a_store_to_a_code_page_is_noticed_once_and_every_way_of_storing_counts() {
    let memory = memory(Integrity::Crypto);
    memory.zero_pages(td(BASE), 1, Agent::SEAM).unwrap();
    let slot = memory.register_cpu();
    slot.enter();
    let agent = Agent {
        mode: Requester::Seam,
        cpu: Some(&slot),
    };
    let stores: [&dyn Fn(); 8] = [
        &|| memory.wr8(td(BASE), 1, agent).unwrap(),
        &|| memory.write_line(td(BASE), &SECRET, agent).unwrap(),
        &|| assert!(memory.cas64(td(BASE), 1, 2, agent).is_ok()),
        &|| assert!(memory.cas(td(BASE), 16, 1, 2, agent).is_ok()),
        &|| memory.zero_pages(td(BASE), 1, agent).unwrap(),
        &|| memory.copy_page(td(BASE), td(BASE), agent).unwrap(),
        &|| memory.raw_write(BASE, &[0], agent),
        &|| memory.wr8(BASE, 1, agent).unwrap(),
    ];
    for store in stores {
        let generation = memory.mark_code(td(BASE), agent).unwrap();
        assert_eq!(memory.code_gen(td(BASE)), generation);
        assert_eq!(memory.page_ptr(td(BASE), true, agent), Ok(PageAccess::Slow));
        store();
        assert_eq!(memory.code_gen(td(BASE)), generation + 1);
    }
}

#[test]
fn only_what_was_written_to_is_resident() {
    let memory = memory(Integrity::Crypto);
    let mut buffer = vec![0; SIZE as usize];
    memory.read(BASE, &mut buffer, Agent::HOST).unwrap();
    memory.raw_read(BASE, &mut buffer);
    assert_eq!(memory.resident(), 0);
    memory.wr8(BASE + 7, 1, Agent::HOST).unwrap();
    assert_eq!(memory.resident(), 2 << 20);
    memory.zero_pages(0x1_0000_0000, 1, Agent::HOST).unwrap();
    assert_eq!(memory.resident(), (2 << 20) + PAGE);
}

#[test]
fn without_tme_the_probe_sees_what_the_host_wrote() {
    let config = Config {
        ranges: vec![(0, PAGE)],
        keyid_bits: 0,
        first_private_keyid: 1,
        integrity: Integrity::None,
        tme: false,
        seed: 0,
    };
    let memory = Memory::new(&config).unwrap();
    memory.write(0, &SECRET, Agent::HOST).unwrap();
    assert_eq!(memory.raw_line(0).data, SECRET);
}

#[test]
fn configurations_that_no_platform_has_are_refused_with_their_value() {
    let good = Config {
        ranges: vec![(0, PAGE)],
        keyid_bits: 6,
        first_private_keyid: 32,
        integrity: Integrity::Crypto,
        tme: true,
        seed: 0,
    };
    let refused = |change: &dyn Fn(&mut Config), word: &str| {
        let mut config = good.clone();
        change(&mut config);
        let text = Memory::new(&config).err().unwrap().to_string();
        assert!(text.contains(word), "{text}");
    };
    refused(&|c| c.keyid_bits = 16, "16");
    refused(&|c| c.keyid_bits = u32::MAX, "4294967295");
    refused(&|c| c.first_private_keyid = 0, "first_private_keyid is 0");
    refused(&|c| c.first_private_keyid = 65, "65");
    refused(&|c| c.ranges = vec![], "no memory range");
    refused(&|c| c.ranges = vec![(1, PAGE)], "0x1");
    refused(&|c| c.ranges = vec![(0, 0)], "whole 4 KiB");
    refused(
        &|c| c.ranges = vec![(0x1000, 0x2000), (0, 0x2000)],
        "overlaps",
    );
    refused(&|c| c.ranges = vec![(1 << 45, 1 << 46)], "KeyIDs begin");
    refused(&|c| c.ranges = vec![(!0xFFF, 0x1000)], "KeyIDs begin");
    let memory = Memory::new(&good).unwrap();
    assert!(memory.set_key(0, None, Agent::SEAM).is_err());
    assert!(memory.set_key(64, None, Agent::SEAM).is_err());
    assert!(memory.clear_key(u32::MAX, Agent::SEAM).is_err());
}
