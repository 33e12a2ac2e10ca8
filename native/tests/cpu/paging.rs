//! The two walks: permissions, faults, accessed and dirty bits, and what the TLB may not remember.

use iced_x86::code_asm::*;

use crate::machine::*;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;
const WP: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;

/// One access to DATA whose page-table entry has `bits`; `None` if it succeeds, else the error code.
fn access(bits: u64, user: bool, write: bool, fetch: bool, with0: u64, with4: u64) -> Option<u64> {
    let mut m = Machine::new();
    if user {
        m.user_mode();
    }
    m.set(field::CR0, (0x8005_0033 & !WP) | with0);
    m.or(field::CR4, with4);
    m.w64(Machine::pte(DATA), DATA | bits);
    m.write(DATA, &[0x0f, 0x0b]);
    let reason = m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        if fetch {
            a.jmp(rdi).unwrap();
        } else if write {
            a.mov(byte_ptr(rdi), 1).unwrap();
        } else {
            a.mov(al, byte_ptr(rdi)).unwrap();
        }
        a.ud2().unwrap();
    });
    assert_eq!(reason, exit::EXCEPTION);
    match m.vector() {
        6 => None,
        14 => {
            assert_eq!(m.get(field::QUALIFICATION), DATA);
            Some(m.get(field::INTR_ERROR))
        }
        other => panic!("vector {other}"),
    }
}

#[test]
fn every_combination_of_rights_agrees_with_the_manual() {
    for bits in 0..32u64 {
        let entry = bits & 7 | if bits & 8 != 0 { NX } else { 0 };
        for setting in 0..48u64 {
            let user = setting & 1 != 0;
            let (write, fetch) = (setting >> 1 & 3 == 1, setting >> 1 & 3 == 2);
            if setting >> 1 & 3 == 3 {
                continue;
            }
            let wp = setting & 8 != 0;
            let (smep, smap) = (setting & 16 != 0, setting & 32 != 0);
            let present = entry & P != 0;
            let user_page = entry & U != 0;
            let refused = if !present {
                true
            } else if user {
                !user_page || write && entry & W == 0 || fetch && entry & NX != 0
            } else {
                write && entry & W == 0 && wp
                    || fetch && (entry & NX != 0 || smep && user_page)
                    || !fetch && smap && user_page
            };
            let code = u64::from(present)
                | u64::from(write) << 1
                | u64::from(user) << 2
                | u64::from(fetch) << 4;
            // Supervisor code lies in user pages here: SMEP would stop the program itself.
            if smep && !user {
                continue;
            }
            let with4 = if smep { SMEP } else { 0 } | if smap { SMAP } else { 0 };
            let got = access(entry, user, write, fetch, if wp { WP } else { 0 }, with4);
            assert_eq!(
                got,
                refused.then_some(code),
                "entry {entry:#x} setting {setting:#x}"
            );
        }
    }
}

#[test]
fn smep_keeps_the_kernel_from_running_user_pages() {
    let mut m = Machine::new();
    m.or(field::CR4, SMEP);
    // The program itself lies in a supervisor page.
    m.w64(Machine::pte(CODE), CODE | 3);
    m.write(DATA, &[0x90]);
    assert_eq!(
        m.fault(|a| {
            a.mov(rax, DATA).unwrap();
            a.jmp(rax).unwrap();
        }),
        (14, 0x11)
    );
    assert_eq!(m.get(field::RIP), DATA);
}

#[test]
fn stac_opens_user_pages_and_clac_closes_them() {
    let mut m = Machine::new();
    m.or(field::CR4, SMAP);
    m.w64(DATA, 5);
    let (vector, error) = m.fault(|a| {
        a.mov(rdi, DATA).unwrap();
        a.stac().unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.clac().unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
    });
    assert_eq!((vector, error), (14, 1));
    assert_eq!(m.reg(RAX), 5);
}

#[test]
fn accessed_and_dirty_bits_are_set_when_they_should_be() {
    let mut m = Machine::new();
    m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.mov(qword_ptr(rdi + 0x1000), rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.r64(Machine::pte(DATA)) & 0x60, 0x20);
    assert_eq!(m.r64(Machine::pte(DATA + 0x1000)) & 0x60, 0x60);
    assert_eq!(m.r64(Machine::pte(DATA + 0x2000)) & 0x60, 0);
    // A page read first gets its dirty bit at the first write.
    m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.r64(Machine::pte(DATA)) & 0x60, 0x60);
}

#[test]
fn reserved_bits_fault_with_rsvd() {
    let mut m = Machine::new();
    m.cpu.configure("pa_bits", 46).unwrap();
    m.w64(Machine::pte(DATA), DATA | 7 | 1 << 50);
    assert_eq!(m.fault(|a| a.mov(rax, qword_ptr(DATA)).unwrap()), (14, 9));
    let mut m = Machine::new();
    // A 2 MiB page with an address bit below its size.
    m.w64(TABLES + 0x2000 + 8, 1 << 21 | 0x87 | 1 << 13);
    assert_eq!(
        m.fault(|a| a.mov(rax, qword_ptr(1u64 << 21)).unwrap()),
        (14, 9)
    );
    let mut m = Machine::new();
    m.set(field::EFER, 0x501);
    m.w64(Machine::pte(DATA), DATA | 7 | NX);
    assert_eq!(m.fault(|a| a.mov(rax, qword_ptr(DATA)).unwrap()), (14, 9));
}

#[test]
fn invlpg_and_cr3_drop_translations() {
    let mut m = Machine::new();
    m.w64(DATA, 1);
    m.w64(DATA + 0x1000, 2);
    m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        // The entry of DATA now points to the next page.
        a.mov(rbx, Machine::pte(DATA)).unwrap();
        a.mov(rdx, DATA + 0x1000 + 7).unwrap();
        a.mov(qword_ptr(rbx), rdx).unwrap();
        a.invlpg(ptr(rdi)).unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.sub(rdx, 0x1000).unwrap();
        a.mov(qword_ptr(rbx), rdx).unwrap();
        a.mov(rsi, cr3).unwrap();
        a.mov(cr3, rsi).unwrap();
        a.mov(rsi, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((m.reg(RAX), m.reg(RCX), m.reg(RSI)), (1, 2, 1));
}

#[test]
fn pages_of_every_size_translate() {
    let mut m = Machine::new();
    m.w64(0x123_4568, 77);
    // 1 GiB page at 4 GiB, 2 MiB page at 2 GiB.
    m.w64(TABLES + 0x1000 + 4 * 8, 0x87);
    m.w64(TABLES + 0x1000 + 2 * 8, (TABLES + 0x4000) | 7);
    m.w64(TABLES + 0x4000, 0x120_0000 | 0x87);
    m.run(|a| {
        a.mov(rdi, (4u64 << 30) + 0x123_4568).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.mov(rdi, (2u64 << 30) + 0x3_4568).unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((m.reg(RAX), m.reg(RCX)), (77, 77));
}

#[test]
fn protection_keys_refuse_data_and_not_code() {
    let mut m = Machine::new();
    m.or(field::CR4, 1 << 22);
    m.w64(Machine::pte(DATA), DATA | 7 | 5 << 59);
    m.w64(DATA, 9);
    let (vector, error) = m.fault(|a| {
        a.mov(rdi, DATA).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.xor(edx, edx).unwrap();
        a.mov(eax, 2 << 10).unwrap();
        a.wrpkru().unwrap();
        a.mov(rbx, qword_ptr(rdi)).unwrap();
        a.mov(qword_ptr(rdi), rbx).unwrap();
    });
    assert_eq!((vector, error), (14, 0x23));
    assert_eq!(m.reg(RBX), 9);
}

#[test]
fn five_levels_translate_when_cr4_says_so() {
    let mut m = Machine::new();
    m.w64(TABLES + 0x5000, TABLES | 7);
    m.set(field::CR3, TABLES + 0x5000);
    m.or(field::CR4, 1 << 12);
    m.w64(DATA, 3);
    m.run(|a| {
        a.mov(rax, qword_ptr(DATA)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.reg(RAX), 3);
    // 2^52 is canonical with 57 bits.
    assert_eq!(
        m.fault(|a| {
            a.mov(rax, 1u64 << 52).unwrap();
            a.mov(rax, qword_ptr(rax)).unwrap();
        }),
        (14, 0)
    );
}

#[test]
fn an_ept_violation_says_what_was_tried_and_where() {
    let mut m = Machine::new();
    m.w64(EPT + 0x2000 + 16 * 8, 0);
    let at = 16u64 << 21 | 0x123;
    let reason = m.run(|a| {
        a.mov(rdi, at).unwrap();
        a.mov(byte_ptr(rdi), 1).unwrap();
    });
    assert_eq!(reason, exit::EPT_VIOLATION);
    assert_eq!(m.get(field::QUALIFICATION), 1 << 1 | 1 << 7 | 1 << 8);
    assert_eq!((m.get(field::GPA), m.get(field::LINEAR)), (at, at));
    assert_eq!(m.get(field::RIP), CODE + 10);
    // Read-only: readable and executable are reported.
    m.w64(EPT + 0x2000 + 16 * 8, 16 << 21 | 0xb5);
    assert_eq!(m.enter(), exit::EPT_VIOLATION);
    assert_eq!(
        m.get(field::QUALIFICATION),
        1 << 1 | 5 << 3 | 1 << 7 | 1 << 8
    );
    // Writable without being readable is a misconfiguration.
    m.w64(EPT + 0x2000 + 16 * 8, 16 << 21 | 0xb2);
    assert_eq!(m.enter(), exit::EPT_MISCONFIGURATION);
    assert_eq!(m.get(field::GPA), at);
    m.w64(EPT + 0x2000 + 16 * 8, 16 << 21 | 0xb7);
    m.write(CODE + 13, &[0xf4]);
    assert_eq!(m.enter(), exit::HLT);
}

#[test]
fn a_page_table_that_the_ept_does_not_map_is_a_violation_of_the_walk() {
    let mut m = Machine::new();
    m.w64(TABLES + 8, (20 << 21) | 7);
    m.w64(EPT + 0x2000 + 20 * 8, 0);
    let at = 1u64 << 39;
    assert_eq!(
        m.run(|a| {
            a.mov(rdi, at).unwrap();
            a.mov(rax, qword_ptr(rdi)).unwrap();
        }),
        exit::EPT_VIOLATION
    );
    assert_eq!(m.get(field::QUALIFICATION), 1 | 1 << 7);
    assert_eq!((m.get(field::GPA), m.get(field::LINEAR)), (20 << 21, at));
}

#[test]
fn code_may_cross_pages_and_each_page_is_checked() {
    let mut m = Machine::new();
    let code = assemble(64, CODE + 0xffc, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64).unwrap();
        a.hlt().unwrap();
    });
    m.write(CODE + 0xffc, &code);
    m.set(field::RIP, CODE + 0xffc);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RAX), 0x1122_3344_5566_7788);
    // The second page moves to other bytes: the instruction follows its translation.
    m.write(DATA, &[0xaa; 6]);
    m.write(DATA + 6, &[0xf4]);
    m.w64(Machine::pte(CODE + 0x1000), DATA | 7);
    m.cpu.invvpid(2, 0, 0).unwrap();
    m.set(field::RIP, CODE + 0xffc);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RAX), 0xaaaa_aaaa_aaaa_7788);
    m.w64(Machine::pte(CODE + 0x1000), 0);
    m.cpu.invvpid(2, 0, 0).unwrap();
    m.set(field::RIP, CODE + 0xffc);
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!((m.vector(), m.get(field::INTR_ERROR)), (14, 0x10));
    assert_eq!(m.get(field::QUALIFICATION), CODE + 0x1000);
}

#[test]
fn translations_of_a_pcid_come_back_only_if_they_were_kept() {
    let mut m = Machine::new();
    m.or(field::CR4, 1 << 17);
    // A second address space that maps DATA to the next page.
    let other = TABLES + 0xa000;
    for (offset, entry) in [
        (0, (other + 0x1000) | 7),
        (0x1000, (other + 0x2000) | 7),
        (0x2000, (other + 0x3000) | 7),
    ] {
        m.w64(other + offset, entry);
    }
    for index in 0..512 {
        m.w64(other + 0x3000 + index * 8, index << 12 | 7);
    }
    m.w64(other + 0x3000 + (DATA >> 12) * 8, (DATA + 0x1000) | 7);
    m.w64(DATA, 1);
    m.w64(DATA + 0x1000, 2);
    m.w64(DATA + 0x2000, 3);
    let keep = 1u64 << 63;
    m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(r8, qword_ptr(rdi)).unwrap();
        a.mov(rax, (other + 5) | keep).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(r9, qword_ptr(rdi)).unwrap();
        // DATA of the first space now leads to the third page; its TLB entry still knows the first.
        a.mov(rbx, Machine::pte(DATA)).unwrap();
        a.mov(rdx, DATA + 0x2000 + 7).unwrap();
        a.mov(qword_ptr(rbx), rdx).unwrap();
        a.mov(rax, TABLES | keep).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(r10, qword_ptr(rdi)).unwrap();
        // Without the bit the entry goes.
        a.mov(rax, TABLES).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(r11, qword_ptr(rdi)).unwrap();
        // INVPCID of the other space, then back to it: its table is read again.
        a.mov(rbx, other + 0x3000 + (DATA >> 12) * 8).unwrap();
        a.mov(rdx, DATA + 7).unwrap();
        a.mov(qword_ptr(rbx), rdx).unwrap();
        a.mov(rbx, DATA + 0x3000).unwrap();
        a.mov(qword_ptr(rbx), 5).unwrap();
        a.mov(qword_ptr(rbx + 8), 0).unwrap();
        a.mov(eax, 1).unwrap();
        a.invpcid(rax, xmmword_ptr(rbx)).unwrap();
        a.mov(rax, (other + 5) | keep).unwrap();
        a.mov(cr3, rax).unwrap();
        a.mov(r12, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    // The kept entry is stale, as it may be: nothing dropped it.
    assert_eq!((m.reg(8), m.reg(9), m.reg(10)), (1, 2, 1));
    assert_eq!((m.reg(11), m.reg(12)), (3, 1));
}

#[test]
fn an_invalidation_reaches_the_address_spaces_that_are_kept() {
    type Invalidate = fn(&mut CodeAssembler);
    // Each runs in PCID 5 with RDI = DATA and a descriptor for PCID 0 and DATA at RBX.
    let ways: [(Invalidate, u64); 7] = [
        (|a| a.nop().unwrap(), 1),
        (|a| a.invlpg(qword_ptr(rdi)).unwrap(), 2),
        (|a| invpcid(a, 0), 2),
        (|a| invpcid(a, 1), 2),
        (|a| invpcid(a, 2), 2),
        (|a| invpcid(a, 3), 2),
        (
            |a| {
                // CR4.PGE off and on.
                for _ in 0..2 {
                    a.mov(rax, cr4).unwrap();
                    a.xor(rax, 0x80).unwrap();
                    a.mov(cr4, rax).unwrap();
                }
            },
            2,
        ),
    ];
    for (number, (invalidate, expected)) in ways.into_iter().enumerate() {
        let mut m = Machine::new();
        m.or(field::CR4, 1 << 17);
        m.w64(DATA, 1);
        m.w64(DATA + 0x1000, 2);
        m.w64(DATA + 0x3000, 0);
        m.w64(DATA + 0x3008, DATA);
        m.run(|a| {
            a.mov(rdi, DATA).unwrap();
            a.mov(rbx, DATA + 0x3000).unwrap();
            a.mov(r8, qword_ptr(rdi)).unwrap();
            a.mov(rax, (TABLES + 5) | 1 << 63).unwrap();
            a.mov(cr3, rax).unwrap();
            a.mov(rax, Machine::pte(DATA)).unwrap();
            a.mov(rdx, DATA + 0x1000 + 7).unwrap();
            a.mov(qword_ptr(rax), rdx).unwrap();
            invalidate(a);
            a.mov(rax, TABLES | 1 << 63).unwrap();
            a.mov(cr3, rax).unwrap();
            a.mov(r9, qword_ptr(rdi)).unwrap();
            a.hlt().unwrap();
        });
        assert_eq!((m.reg(8), m.reg(9)), (1, expected), "way {number}");
    }
}

fn invpcid(a: &mut CodeAssembler, kind: u32) {
    a.mov(eax, kind).unwrap();
    a.invpcid(rax, xmmword_ptr(rbx)).unwrap();
}
