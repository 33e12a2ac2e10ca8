//! Two processors at once: atomics, shootdowns, code changed from the other side.

use iced_x86::code_asm::*;
use softtdx_silicon::cpu::Cpu;
use softtdx_silicon::mem::Agent;

use crate::machine::*;

/// A second processor of the same platform with a VMCS of its own.
fn second(first: &Machine) -> Machine {
    let mut m = Machine::on(first.mem.clone(), Box::new(Cpu::new(first.mem.clone(), 1)));
    m.build_vmcs(VMCS + 0x2000);
    m.set(field::RSP, STACK - 0x1000);
    m
}

#[test]
fn locked_increments_of_two_processors_all_count() {
    const ROUNDS: u32 = 200_000;
    let mut first = Machine::new();
    let mut other = second(&first);
    first.w64(DATA, 0);
    first.w64(DATA + 8, 0);
    first.load(|a| {
        let mut top = a.create_label();
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut top).unwrap();
        a.lock().inc(qword_ptr(rdi)).unwrap();
        a.mov(eax, 1).unwrap();
        a.lock().xadd(dword_ptr(rdi + 8), eax).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    std::thread::scope(|scope| {
        for m in [&mut first, &mut other] {
            scope.spawn(move || assert_eq!(m.enter(), exit::HLT));
        }
    });
    assert_eq!(first.r64(DATA), 2 * u64::from(ROUNDS));
    assert_eq!(first.r64(DATA + 8), 2 * u64::from(ROUNDS));
}

#[test]
fn a_spin_lock_excludes() {
    const ROUNDS: u32 = 20_000;
    let mut first = Machine::new();
    let mut other = second(&first);
    first.w64(DATA, 0);
    first.w64(DATA + 64, 0);
    first.load(|a| {
        let (mut top, mut wait, mut have) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, ROUNDS).unwrap();
        a.set_label(&mut top).unwrap();
        a.mov(eax, 1).unwrap();
        a.xchg(dword_ptr(rdi), eax).unwrap();
        a.test(eax, eax).unwrap();
        a.jz(have).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.cmp(dword_ptr(rdi), 0).unwrap();
        a.jne(wait).unwrap();
        a.jmp(top).unwrap();
        a.set_label(&mut have).unwrap();
        a.inc(qword_ptr(rdi + 64)).unwrap();
        a.mov(dword_ptr(rdi), 0).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    std::thread::scope(|scope| {
        for m in [&mut first, &mut other] {
            scope.spawn(move || assert_eq!(m.enter(), exit::HLT));
        }
    });
    assert_eq!(first.r64(DATA + 64), 2 * u64::from(ROUNDS));
}

#[test]
fn the_host_writes_while_the_guest_polls() {
    let mut m = Machine::new();
    m.w64(DATA, 0);
    m.load(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        a.cmp(qword_ptr(DATA), 0).unwrap();
        a.je(top).unwrap();
        a.hlt().unwrap();
    });
    let mem = m.mem.clone();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        mem.wr64(DATA, 1, Agent::HOST).unwrap();
    });
    assert_eq!(m.enter(), exit::HLT);
    writer.join().unwrap();
}

#[test]
fn code_patched_by_another_processor_is_seen() {
    let mut m = Machine::new();
    // JMP $ becomes HLT under the guest's feet.
    m.load(|a| a.db(&[0xeb, 0xfe]).unwrap());
    let mem = m.mem.clone();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(20));
        mem.wr8(CODE, 0xf4, Agent::HOST).unwrap();
    });
    assert_eq!(m.enter(), exit::HLT);
    writer.join().unwrap();
}

#[test]
fn time_does_not_run_backwards_between_processors() {
    let mut first = Machine::new();
    let mut other = second(&first);
    first.load(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut top).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(top).unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    });
    let mut last = 0;
    for _ in 0..5 {
        for m in [&mut first, &mut other] {
            m.set(field::RIP, CODE);
            m.enter();
            let now = m.reg(RDX) << 32 | m.reg(RAX);
            assert!(now > last, "{now} after {last}");
            last = now;
        }
    }
}
