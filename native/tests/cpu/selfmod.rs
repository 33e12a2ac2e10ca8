//! Code that changes while it is cached: by itself, by its neighbour, by the host.

use iced_x86::code_asm::*;

use crate::machine::*;

#[test]
fn a_store_into_the_next_instruction_takes_effect_at_once() {
    let mut m = Machine::new();
    for _ in 0..2 {
        let code = assemble(64, CODE, |a| {
            let mut site = a.create_label();
            a.lea(rdi, ptr(site)).unwrap();
            a.mov(dword_ptr(rdi + 1), 0x42).unwrap();
            a.nop().unwrap();
            a.set_label(&mut site).unwrap();
            a.mov(eax, 0x17).unwrap();
            a.hlt().unwrap();
        });
        m.write(CODE, &code);
        m.set(field::RIP, CODE);
        assert_eq!(m.enter(), exit::HLT);
        assert_eq!(m.reg(RAX), 0x42);
    }
    // Every instruction retired once although the store was started twice.
    assert_eq!(m.cpu.icount, 2 * 4);
}

#[test]
fn a_function_rewritten_between_calls_is_decoded_again() {
    let mut m = Machine::new();
    m.load(|a| {
        let mut function = a.create_label();
        let mut top = a.create_label();
        a.xor(ebx, ebx).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.set_label(&mut top).unwrap();
        a.call(function).unwrap();
        a.add(ebx, eax).unwrap();
        a.inc(byte_ptr(CODE + 0x801)).unwrap();
        a.inc(ecx).unwrap();
        a.cmp(ecx, 10).unwrap();
        a.jne(top).unwrap();
        a.hlt().unwrap();
        a.set_label(&mut function).unwrap();
        a.jmp(CODE + 0x800).unwrap();
    });
    m.write(CODE + 0x800, &[0xb8, 1, 0, 0, 0, 0xc3]);
    m.set(field::RIP, CODE);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.reg(RBX), (1..=10).sum::<u64>());
}

#[test]
fn data_in_a_code_page_may_be_written_without_end() {
    let mut m = Machine::new();
    m.w64(CODE + 0x900, 0);
    m.run(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 3000).unwrap();
        a.set_label(&mut top).unwrap();
        a.inc(qword_ptr(CODE + 0x900)).unwrap();
        a.loop_(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.r64(CODE + 0x900), 3000);
}

#[test]
fn the_host_may_rewrite_code_between_entries() {
    let mut m = Machine::new();
    for value in 0..50u64 {
        assert_eq!(
            m.run(|a| {
                a.mov(rax, value).unwrap();
                a.hlt().unwrap();
            }),
            exit::HLT
        );
        assert_eq!(m.reg(RAX), value);
    }
}
