//! Guests that mean harm, or mean nothing at all: no panic, no hang, no way out of DRAM.

use proptest::prelude::*;
use softtdx_silicon::cpu::event;

use crate::machine::*;

/// Runs whatever lies at CODE until it has exited `exits` times, stepping over exits.
fn endure(m: &mut Machine, exits: usize) {
    for _ in 0..exits {
        m.cpu.host_timer = Some(m.cpu.tsc() + 2000);
        let reason = m.enter();
        if reason == exit::BAD_GUEST {
            return;
        }
        let rip = m.get(field::RIP);
        let length = m.get(field::LENGTH).max(1);
        let next = rip.wrapping_add(length);
        m.set(field::RIP, if next >> 47 == 0 { next } else { CODE });
        if m.get(field::ACTIVITY) != 0 {
            m.set(field::ACTIVITY, 0);
        }
        m.set(field::BLOCKING, 0);
        m.cpu.shared.post(event::INTERRUPT);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_do_no_harm(
        bytes in proptest::collection::vec(any::<u8>(), 64..256),
        registers in proptest::array::uniform16(prop_oneof![any::<u64>(), 0..SIZE, Just(DATA), Just(CODE)]),
        deliver in any::<bool>(),
        user in any::<bool>(),
    ) {
        let mut m = Machine::new();
        if deliver {
            m.deliver_exceptions();
        }
        if user {
            m.user_mode();
        }
        m.write(CODE, &bytes);
        m.cpu.gpr[..16].copy_from_slice(&registers);
        endure(&mut m, 20);
    }

    #[test]
    fn random_bytes_in_32_and_16_bit_code_do_no_harm(
        bytes in proptest::collection::vec(any::<u8>(), 64..256),
        registers in proptest::array::uniform16(prop_oneof![any::<u64>(), 0..SIZE]),
        big in any::<bool>(),
        paging in any::<bool>(),
        deliver in any::<bool>(),
    ) {
        let mut m = Machine::new();
        if deliver {
            m.deliver_exceptions();
        }
        m.set(0x4816, if big { 0xc09b } else { 0x809b });
        if !paging {
            m.set(field::CR0, 0x21);
            m.set(field::EFER, 0);
            m.set(field::ENTRY, 1 << 2 | 1 << 15);
        }
        m.write(CODE, &bytes);
        m.cpu.gpr[..16].copy_from_slice(&registers);
        endure(&mut m, 20);
    }

    #[test]
    fn random_page_tables_do_no_harm(entries in proptest::collection::vec(any::<u64>(), 64), at in any::<u64>()) {
        let mut m = Machine::new();
        for (index, entry) in entries.iter().enumerate() {
            m.w64(TABLES + 0x1000 + 64 + index as u64 * 8, *entry);
            m.w64(EPT + 0x2000 + 256 + index as u64 * 8, entry.rotate_left(13));
        }
        for linear in [at & 0x3f_ffff_ffff, 0x10_0000_0000 | at & 0xffff_ffff] {
            m.run(|a| {
                use iced_x86::code_asm::*;
                a.mov(rdi, linear).unwrap();
                a.mov(rax, qword_ptr(rdi)).unwrap();
                a.mov(qword_ptr(rdi), rax).unwrap();
                a.jmp(rdi).unwrap();
            });
        }
    }

    #[test]
    fn random_vmcs_contents_do_no_harm(fields in proptest::collection::vec((0u32..0x7000, any::<u64>()), 1..12)) {
        let mut m = Machine::new();
        m.load(|a| a.hlt().unwrap());
        for (at, value) in fields {
            let _ = m.cpu.vmwrite(at, value);
        }
        m.cpu.host_timer = Some(m.cpu.tsc() + 10_000);
        m.cpu.shared.post(event::INTERRUPT | event::NMI);
        // A guest that sleeps for good is woken by INIT.
        let shared = m.cpu.shared.clone();
        let waker = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(2));
            shared.post(event::INIT | event::INTERRUPT);
        });
        let _ = m.cpu.vmenter(true);
        waker.join().unwrap();
    }
}

/// Random code through [`Trial`], case after case, until so many instructions were executed. Bytes are random, or
/// instructions of random opcodes with plausible operands, which get further.
fn storm(instructions: u64, seed: u64) {
    use softtdx_silicon::cpu::trial::{Trial, RECORD};
    let mut random = seed;
    let mut next = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (random ^ random >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    };
    let mut trial = Trial::new().unwrap();
    let mut executed = 0;
    while executed < instructions {
        let mut records = vec![0; RECORD * 64];
        for record in records.chunks_exact_mut(RECORD) {
            for word in record.chunks_exact_mut(8) {
                word.copy_from_slice(&next().to_le_bytes());
            }
            // Half of the registers are addresses of data.
            let pick = next();
            for n in (0..16).filter(|n| pick >> n & 1 != 0) {
                let address = 0x2000_0000 + next() % 0x2000;
                record[n * 8..n * 8 + 8].copy_from_slice(&address.to_le_bytes());
            }
            record[136..144].copy_from_slice(&60u64.to_le_bytes());
            if next() & 1 == 0 {
                plausible(&mut record[160..224], &mut next);
            }
        }
        trial.run(&mut records).unwrap();
        for record in records.chunks_exact(RECORD) {
            let mut count = [0; 8];
            count.copy_from_slice(&record[232..240]);
            // At least one was tried.
            executed += u64::from_le_bytes(count).max(1);
        }
    }
}

/// Prefixes, an opcode of any map, and a register or small memory operand.
fn plausible(code: &mut [u8], next: &mut impl FnMut() -> u64) {
    let mut at = 0;
    while at < 48 {
        let bits = next();
        let mut put = |byte: u64| {
            code[at] = byte as u8;
            at += 1;
        };
        if bits & 3 == 0 {
            put([0x66, 0xf2, 0xf3, 0xf0][(bits >> 2 & 3) as usize]);
        }
        if bits & 0x30 == 0 {
            put(0x40 | bits >> 8 & 15);
        }
        match bits >> 6 & 3 {
            0 => {}
            1 => put(0x0f),
            2 => {
                put(0x0f);
                put(0x38);
            }
            _ => {
                put(0x0f);
                put(0x3a);
            }
        }
        put(bits >> 16);
        put(bits >> 24 & 0x3f | if bits >> 60 & 1 != 0 { 0xc0 } else { 0x00 });
    }
}

#[test]
fn random_instructions_in_bulk_do_no_harm() {
    storm(200_000, 1);
}

#[test]
#[ignore = "a long campaign"]
fn a_hundred_million_random_instructions_do_no_harm() {
    for seed in 0..10 {
        storm(10_000_000, 1000 + seed);
    }
}
