//! 32-bit protected mode, the switch to long mode and back, compatibility mode, real mode.

use iced_x86::code_asm::*;

use crate::machine::*;

/// A guest in flat 32-bit protected mode with paging off, as a TD starts.
fn protected() -> Machine {
    let mut m = Machine::new();
    m.set(field::CR0, 0x21);
    m.set(field::CR3, 0);
    m.set(field::CR4, 1 << 6);
    m.set(field::EFER, 0x900);
    m.set(field::ENTRY, 1 << 2 | 1 << 15);
    m.set(0x4816, 0xc09b);
    m.set(field::GUEST_CS_SEL, selector::CODE32);
    m
}

#[test]
fn paging_off_addresses_memory_directly() {
    let mut m = protected();
    m.w64(DATA, 0x1234_5678_9abc_def0);
    let code = assemble(32, CODE, |a| {
        a.mov(edi, DATA as u32).unwrap();
        a.mov(eax, dword_ptr(edi + 4)).unwrap();
        a.push(eax).unwrap();
        a.pop(ecx).unwrap();
        a.hlt().unwrap();
    });
    m.write(CODE, &code);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!((m.reg(RAX), m.reg(RCX)), (0x1234_5678, 0x1234_5678));
    assert_eq!(m.get(field::RSP), STACK);
}

#[test]
fn the_switch_to_long_mode_goes_through_compatibility_mode() {
    let mut m = protected();
    let code = assemble(32, CODE, |a| {
        a.mov(eax, cr4).unwrap();
        a.or(eax, 0x20).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, TABLES as u32).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(eax, cr0).unwrap();
        a.or(eax, 0x8000_0000u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        // Compatibility mode now.
        a.mov(ebx, 0x77).unwrap();
        a.db(&[0xea]).unwrap();
        a.dd(&[(CODE + 0x100) as u32]).unwrap();
        a.dw(&[selector::CODE64 as u16]).unwrap();
    });
    m.write(CODE, &code);
    let code = assemble(64, CODE + 0x100, |a| {
        a.mov(rcx, 0x1_0000_0001u64).unwrap();
        a.mov(r8, cr0).unwrap();
        a.hlt().unwrap();
    });
    m.write(CODE + 0x100, &code);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!((m.reg(RBX), m.reg(RCX)), (0x77, 0x1_0000_0001));
    assert_eq!(m.get(field::EFER), 0xd00);
    // Unrestricted guests get the new mode in the VM-entry controls.
    assert_eq!(m.get(field::ENTRY) >> 9 & 1, 1);
    assert_eq!(m.reg(R8) >> 31, 1);
}

#[test]
fn two_level_paging_of_32_bit_code() {
    let mut m = protected();
    m.set(field::EFER, 0);
    // Identity by 4 MiB pages, and one 4 KiB mapping.
    m.mem
        .wr32(TABLES + 0x6000, 0x87, softtdx_silicon::mem::Agent::SEAM)
        .unwrap();
    m.mem
        .wr32(
            TABLES + 0x6004,
            (TABLES as u32 + 0x7000) | 7,
            softtdx_silicon::mem::Agent::SEAM,
        )
        .unwrap();
    m.mem
        .wr32(
            TABLES + 0x7000,
            DATA as u32 | 7,
            softtdx_silicon::mem::Agent::SEAM,
        )
        .unwrap();
    m.w64(DATA, 0x55);
    let code = assemble(32, CODE, |a| {
        a.mov(eax, cr4).unwrap();
        a.or(eax, 0x10).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, TABLES as u32 + 0x6000).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(eax, 0x8000_0021u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.mov(ecx, dword_ptr(0x40_0000)).unwrap();
        a.mov(edx, dword_ptr(0x80_0000)).unwrap();
    });
    m.write(CODE, &code);
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!((m.vector(), m.get(field::QUALIFICATION)), (14, 0x80_0000));
    assert_eq!(m.reg(RCX), 0x55);
}

#[test]
fn pae_paging_loads_its_pointers_with_cr3() {
    let mut m = protected();
    m.w64(TABLES + 0x8000, (TABLES + 0x2000) | 1);
    m.w64(DATA, 0x66);
    let code = assemble(32, CODE, |a| {
        a.mov(eax, 0x60).unwrap();
        a.mov(cr4, eax).unwrap();
        a.mov(eax, TABLES as u32 + 0x8000).unwrap();
        a.mov(cr3, eax).unwrap();
        a.mov(ecx, 0xc000_0080u32 as i32).unwrap();
        a.mov(eax, 0x8000_0021u32 as i32).unwrap();
        a.mov(cr0, eax).unwrap();
        a.mov(ecx, dword_ptr(DATA as u32)).unwrap();
        a.hlt().unwrap();
    });
    m.set(field::EFER, 0);
    m.write(CODE, &code);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RCX), 0x66);
}

#[test]
fn limits_are_checked_in_32_bit_code() {
    let mut m = protected();
    m.set(0x4806, 0xfff);
    let code = assemble(32, CODE, |a| {
        a.mov(eax, dword_ptr(0xffc)).unwrap();
        a.mov(eax, dword_ptr(0xffd)).unwrap();
    });
    m.write(CODE, &code);
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!((m.vector(), m.get(field::INTR_ERROR)), (13, 0));
    assert_eq!(m.get(field::RIP), CODE + 5);
}

#[test]
fn exceptions_in_32_bit_code_use_8_byte_gates() {
    let mut m = protected();
    m.deliver_exceptions();
    let gate = (STUBS + 0x60) & 0xffff
        | selector::CODE32 << 16
        | 0x8e << 40
        | (STUBS >> 16 & 0xffff) << 48;
    m.w64(IDT + 6 * 8, gate);
    m.write(CODE, &[0x0f, 0x0b]);
    assert_eq!(m.enter(), exit::VMCALL);
    let top = m.get(field::RSP);
    assert_eq!(top, STACK - 12);
    assert_eq!(m.r64(top) & 0xffff_ffff, CODE);
    assert_eq!(m.r64(top) >> 32, selector::CODE32);
}

#[test]
fn user_code_may_be_32_bit_below_a_64_bit_kernel() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    let code = assemble(32, CODE + 0x400, |a| {
        a.mov(eax, 0xffff_ffffu32 as i32).unwrap();
        a.inc(eax).unwrap();
        a.pushad().unwrap();
        a.popad().unwrap();
        a.ud2().unwrap();
    });
    m.write(CODE + 0x400, &code);
    let reason = m.run(|a| {
        a.push(selector::USER_DATA as i32).unwrap();
        a.push(STACK as i32 - 0x100).unwrap();
        a.push(2).unwrap();
        a.push(selector::USER32 as i32).unwrap();
        a.push(CODE as i32 + 0x400).unwrap();
        a.iretq().unwrap();
    });
    assert_eq!(reason, exit::VMCALL);
    let (vector, [rip, code, ..]) = m.stub();
    assert_eq!((vector, rip, code), (6, CODE + 0x400 + 8, selector::USER32));
}

#[test]
fn real_mode_runs_and_takes_interrupts() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::CR0, 0x20);
    m.set(field::CR4, 1 << 6);
    m.set(field::EFER, 0);
    m.set(field::ENTRY, 1 << 2 | 1 << 15);
    for index in 0..6 {
        m.set(0x0800 + 2 * index, 0);
        m.set(0x6806 + 2 * index, 0);
        m.set(0x4800 + 2 * index, 0xffff);
        m.set(0x4814 + 2 * index, if index == 1 { 0x9b } else { 0x93 });
    }
    m.set(0x6818, 0);
    m.set(0x4812, 0x3ff);
    m.set(field::RIP, 0x7c00);
    m.set(field::RSP, 0x7000);
    // IVT entry 0x21 → 0000:7d00.
    m.write(0x84, &[0x00, 0x7d, 0, 0]);
    m.write(0x7d00, &[0xf4]);
    let code = assemble(16, 0x7c00, |a| {
        a.mov(ax, 0x1000).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(byte_ptr(4), 0x5a).unwrap();
        a.int(0x21).unwrap();
    });
    m.write(0x7c00, &code);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.get(field::RIP), 0x7d00);
    assert_eq!(m.r64(0x1_0004) & 0xff, 0x5a);
}
