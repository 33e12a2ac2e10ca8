//! SEAM non-root mode: two EPTs, HKIDs, TDCALL, #VE, and what a broken line does to a guest.

use iced_x86::code_asm::*;
use softtdx_silicon::mem::{Agent, Requester};

use crate::machine::*;

const HKID: u64 = 33;
const KEY: u64 = HKID << KEYID_SHIFT;
const SHARED_EPT: u64 = 0x17_0000;
const SHARED_BIT: u64 = 1 << 47;
/// GPA and HPA of the page that only the shared EPT maps.
const SHARED_PAGE: u64 = 0x300_0000;

/// A TD: everything that the ordinary machine has below 2 MiB, moved to the TD's HKID.
fn td() -> Machine {
    let mut m = Machine::new();
    m.mem.set_key(HKID as u32, None, Agent::SEAM).unwrap();
    let seam = Agent {
        mode: Requester::Seam,
        cpu: None,
    };
    for page in (0..2 << 20)
        .step_by(4096)
        .filter(|&page| page != VMCS && page != BITMAPS)
    {
        let mut bytes = [0; 4096];
        m.mem.read(page, &mut bytes, seam).unwrap();
        m.mem.zero_pages(page | KEY, 1, seam).unwrap();
        m.mem.write(page | KEY, &bytes, seam).unwrap();
    }
    m.mem.zero_pages(BITMAPS | KEY, 1, seam).unwrap();
    for table in [SHARED_EPT, SHARED_EPT + 0x1000, SHARED_EPT + 0x2000] {
        m.mem.zero_pages(table, 1, seam).unwrap();
    }
    // The shared EPT is indexed by the whole GPA, shared bit included.
    m.w64(SHARED_EPT + 256 * 8, (SHARED_EPT + 0x1000) | 7);
    m.w64(SHARED_EPT + 0x1000, (SHARED_EPT + 0x2000) | 7);
    m.w64(
        SHARED_EPT + 0x2000 + (SHARED_PAGE >> 21) * 8,
        SHARED_PAGE | 0xb7,
    );
    // The guest maps the shared alias at 1 TiB.
    m.mem
        .wr64((TABLES + 2 * 8) | KEY, (TABLES + 0x9000) | 7, seam)
        .unwrap();
    m.mem
        .wr64((TABLES + 0x9000) | KEY, SHARED_BIT | 0x87, seam)
        .unwrap();
    m.set(0x4026, HKID);
    m.set(0x203C, SHARED_EPT);
    m.cpu.seam = true;
    m
}

const ALIAS: u64 = 2 << 39;

/// Loads a program into the TD's private memory.
fn load(m: &mut Machine, write: impl FnOnce(&mut CodeAssembler)) {
    let code = assemble(64, CODE, write);
    m.mem.write(CODE | KEY, &code, Agent::SEAM).unwrap();
    m.set(field::RIP, CODE);
}

#[test]
fn private_memory_is_accessed_with_the_tds_key_and_shared_memory_is_not() {
    let mut m = td();
    load(&mut m, |a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, 0x1111u64).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(rdi, ALIAS + SHARED_PAGE).unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.mov(rax, 0x2222u64).unwrap();
        a.mov(qword_ptr(rdi + 8), rax).unwrap();
        a.hlt().unwrap();
    });
    m.w64(SHARED_PAGE, 0x3333);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RCX), 0x3333);
    assert_eq!(m.mem.rd64(SHARED_PAGE + 8, Agent::HOST).unwrap(), 0x2222);
    assert_eq!(m.mem.rd64(DATA | KEY, Agent::SEAM).unwrap(), 0x1111);
    assert!(m.mem.rd64(DATA | KEY, Agent::HOST).is_err());
    assert_ne!(m.mem.rd64(DATA, Agent::HOST).unwrap_or(0), 0x1111);
}

#[test]
fn tdcall_exits_and_seamcall_too() {
    let mut m = td();
    load(&mut m, |a| a.db(&[0x66, 0x0f, 0x01, 0xcc]).unwrap());
    assert_eq!(m.enter(), exit::TDCALL);
    assert_eq!(m.get(field::LENGTH), 4);
    load(&mut m, |a| a.db(&[0x66, 0x0f, 0x01, 0xcf]).unwrap());
    assert_eq!(m.enter(), exit::SEAMCALL);
}

#[test]
fn an_unmapped_shared_page_is_a_ve_unless_it_is_suppressed_or_the_last_was_not_read() {
    let mut m = td();
    m.deliver_exceptions();
    m.or(field::SECONDARY, 1 << 18);
    m.set(0x202A, VE_INFO);
    m.mem.zero_pages(VE_INFO | KEY, 1, Agent::SEAM).unwrap();
    let at = ALIAS + SHARED_PAGE + (2 << 20) + 0x18;
    let entry = SHARED_EPT + 0x2000 + ((SHARED_PAGE >> 21) + 1) * 8;
    // An empty entry with suppress-VE set exits.
    m.w64(entry, 1 << 63);
    load(&mut m, |a| {
        a.mov(rdi, at).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.enter(), exit::EPT_VIOLATION);
    assert_eq!(
        m.get(field::GPA),
        SHARED_BIT | (SHARED_PAGE + (2 << 20) + 0x18)
    );
    // Without it the guest gets #VE, and the area tells why.
    m.w64(entry, 0);
    assert_eq!(m.enter(), exit::VMCALL);
    let rip = m.get(field::RIP);
    assert_eq!((rip - STUBS) / 16, 20);
    let info = |offset: u64| m.mem.rd64((VE_INFO + offset) | KEY, Agent::SEAM).unwrap();
    assert_eq!(info(0), 0xffff_ffff_0000_0030);
    assert_eq!(info(8), 1 | 1 << 7 | 1 << 8);
    assert_eq!(info(16), at);
    assert_eq!(info(24), SHARED_BIT | (SHARED_PAGE + (2 << 20) + 0x18));
    // A second one before the area is released exits.
    load(&mut m, |a| {
        a.mov(rax, qword_ptr(rdi)).unwrap();
    });
    assert_eq!(m.enter(), exit::EPT_VIOLATION);
}

#[test]
fn a_gpa_above_the_shared_bit_is_a_violation_with_its_address() {
    let mut m = td();
    m.mem
        .wr64((TABLES + 0x9000 + 8) | KEY, 1 << 49 | 0x87, Agent::SEAM)
        .unwrap();
    load(&mut m, |a| {
        a.mov(rdi, ALIAS + (1 << 30)).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
    });
    assert_eq!(m.enter(), exit::EPT_VIOLATION);
    assert_eq!(m.get(field::GPA), 1 << 49);
    assert_eq!(m.get(field::QUALIFICATION) & 0x80, 0x80);
}

#[test]
fn the_shared_ept_may_not_name_private_keyids() {
    let mut m = td();
    m.w64(
        SHARED_EPT + 0x2000 + (SHARED_PAGE >> 21) * 8,
        KEY | SHARED_PAGE | 0xb7,
    );
    load(&mut m, |a| {
        a.mov(rdi, ALIAS + SHARED_PAGE).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
    });
    assert_eq!(m.enter(), exit::EPT_MISCONFIGURATION);
}

#[test]
fn a_line_that_the_host_overwrote_is_a_machine_check_for_the_td() {
    let mut m = td();
    m.mem.wr64(DATA, 0, Agent::HOST).unwrap();
    load(&mut m, |a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, qword_ptr(rdi)).unwrap();
    });
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!(m.vector(), 18);
    assert_eq!(m.get(field::RIP), CODE + 10);
}

#[test]
fn code_that_the_host_overwrote_does_not_run() {
    let mut m = td();
    load(&mut m, |a| a.hlt().unwrap());
    assert_eq!(m.enter(), exit::HLT);
    m.mem.write(CODE, &[0xf4; 64], Agent::HOST).unwrap();
    m.set(field::RIP, CODE);
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!(m.vector(), 18);
}

#[test]
fn with_a_wide_gpa_the_shared_bit_is_bit_51() {
    let mut m = td();
    // Five levels, tertiary control GPAW.
    m.or(field::PRIMARY, 1 << 17);
    m.set(0x2034, 1 << 5);
    let seam = Agent::SEAM;
    m.mem.zero_pages((EPT + 0x5000) | KEY, 1, seam).unwrap();
    m.mem.wr64((EPT + 0x5000) | KEY, EPT | 7, seam).unwrap();
    m.set(field::EPTP, (EPT + 0x5000) | 4 << 3 | 6);
    m.mem.zero_pages(SHARED_EPT + 0x3000, 2, seam).unwrap();
    m.w64(SHARED_EPT + 0x3000 + 8 * 8, (SHARED_EPT + 0x4000) | 7);
    m.w64(SHARED_EPT + 0x4000, (SHARED_EPT + 0x1000) | 7);
    m.set(0x203C, SHARED_EPT + 0x3000);
    m.mem
        .wr64((TABLES + 0x9000) | KEY, 1 << 51 | 0x87, seam)
        .unwrap();
    m.w64(SHARED_PAGE, 0x4444);
    load(&mut m, |a| {
        a.mov(rdi, ALIAS + SHARED_PAGE).unwrap();
        a.mov(rcx, qword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RCX), 0x4444);
}
