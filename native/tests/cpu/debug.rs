//! Data breakpoints, single steps through repeated instructions, and bus locks.

use iced_x86::code_asm::*;

use crate::machine::*;

const DEBUGCTL: u32 = 0x2802;
const DR7: u32 = 0x681A;
const WRITES: u64 = 1 << 16;
const ACCESSES: u64 = 3 << 16;
const FOUR_BYTES: u64 = 3 << 18;
const EIGHT_BYTES: u64 = 2 << 18;

/// A machine whose guest takes its own exceptions, with DR0 at `at`.
fn watched(at: u64, kind: u64) -> Machine {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.cpu.dr[0] = at;
    m.set(DR7, 0x400 | 1 | kind);
    m
}

/// RIP that #DB gave, relative to the program, and the low bits of DR6; `None` if the program came to its end.
fn trap(m: &mut Machine, program: impl FnOnce(&mut CodeAssembler)) -> Option<(u64, u64)> {
    m.cpu.dr[6] = 0xffff_0ff0;
    let reason = m.run(program);
    if reason == exit::HLT {
        return None;
    }
    assert_eq!(reason, exit::VMCALL);
    let (vector, [rip, ..]) = m.stub();
    assert_eq!(vector, 1);
    Some((rip - CODE, m.cpu.dr[6] & 0xf))
}

#[test]
fn a_data_breakpoint_traps_behind_the_access_that_meets_it() {
    type Access = fn(&mut CodeAssembler);
    // RSI = DATA + 8, where four bytes are watched. Each program ends with HLT.
    let accesses: [(Access, bool, bool); 14] = [
        (|a| a.mov(dword_ptr(rsi), eax).unwrap(), true, true),
        (|a| a.mov(eax, dword_ptr(rsi)).unwrap(), false, true),
        (|a| a.mov(dword_ptr(rsi + 4), eax).unwrap(), false, false),
        (|a| a.mov(dword_ptr(rsi - 4), eax).unwrap(), false, false),
        (|a| a.mov(dword_ptr(rsi - 3), eax).unwrap(), true, true),
        (|a| a.mov(byte_ptr(rsi + 3), al).unwrap(), true, true),
        (|a| a.mov(qword_ptr(rsi - 7), rax).unwrap(), true, true),
        (|a| a.add(dword_ptr(rsi), eax).unwrap(), true, true),
        (|a| a.lock().add(dword_ptr(rsi), eax).unwrap(), true, true),
        (|a| a.cmp(dword_ptr(rsi), eax).unwrap(), false, true),
        (|a| a.xchg(qword_ptr(rsi), rax).unwrap(), true, true),
        (
            |a| a.movups(xmm0, xmmword_ptr(rsi - 12)).unwrap(),
            false,
            true,
        ),
        (
            |a| a.movups(xmmword_ptr(rsi - 12), xmm0).unwrap(),
            true,
            true,
        ),
        (
            |a| a.movups(xmmword_ptr(rsi - 16), xmm0).unwrap(),
            false,
            false,
        ),
    ];
    for (number, (access, writes, any)) in accesses.into_iter().enumerate() {
        for (kind, expected) in [(WRITES, writes), (ACCESSES, any)] {
            let mut m = watched(DATA + 8, kind | FOUR_BYTES);
            m.cpu.gpr[RSI] = DATA + 8;
            let length = assemble(64, CODE, access).len() as u64;
            let met = trap(&mut m, |a| {
                // The page is in the TLB, with a pointer if it may have one.
                a.mov(ecx, dword_ptr(rsi + 0x40)).unwrap();
                a.mov(dword_ptr(rsi + 0x40), ecx).unwrap();
                access(a);
                a.nop().unwrap();
                a.hlt().unwrap();
            });
            let expected = expected.then_some((6 + length, 1));
            assert_eq!(met, expected, "access {number}, kind {kind:#x}");
        }
    }
}

#[test]
fn a_breakpoint_set_while_the_page_is_in_the_tlb_is_met() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    let met = trap(&mut m, |a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(qword_ptr(rsi), rsi).unwrap();
        a.mov(dr0, rsi).unwrap();
        a.mov(eax, (0x401 | WRITES | EIGHT_BYTES) as u32).unwrap();
        a.mov(dr7, rax).unwrap();
        a.nop().unwrap();
        a.mov(qword_ptr(rsi), rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(met, Some((10 + 3 + 3 + 5 + 3 + 1 + 3, 1)));
}

#[test]
fn a_store_that_faults_meets_no_breakpoint() {
    let mut m = watched(DATA + 0xffc, WRITES | FOUR_BYTES);
    m.w64(Machine::pte(DATA + 0x1000), 0);
    assert_eq!(
        m.run(|a| {
            a.mov(rsi, DATA + 0xffc).unwrap();
            a.mov(qword_ptr(rsi), rax).unwrap();
            a.hlt().unwrap();
        }),
        exit::VMCALL
    );
    assert_eq!(m.stub().0, 14);
    assert_eq!(m.cpu.dr[6] & 15, 0);
}

#[test]
fn a_repeated_store_stops_behind_the_iteration_that_meets_a_breakpoint() {
    let mut m = watched(DATA + 16, WRITES | EIGHT_BYTES);
    let met = trap(&mut m, |a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, 10).unwrap();
        a.rep().stosq().unwrap();
        a.hlt().unwrap();
    });
    // On the instruction again: seven are left.
    assert_eq!(met, Some((15, 1)));
    assert_eq!((m.reg(RCX), m.reg(RDI)), (7, DATA + 24));
}

#[test]
fn the_trap_flag_traps_behind_each_iteration() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.cpu.gpr[RDI] = DATA;
    m.cpu.gpr[RCX] = 2;
    m.set(field::RFLAGS, 0x102);
    m.run(|a| {
        a.rep().stosb().unwrap();
        a.hlt().unwrap();
    });
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((vector, rip, m.reg(RCX)), (1, CODE, 1));
    assert_eq!(m.cpu.dr[6] & 0x4000, 0x4000);
}

#[test]
fn a_bus_lock_of_a_user_traps_if_the_kernel_asked_for_it() {
    type Locked = fn(&mut CodeAssembler);
    // RSI = DATA + 60: four bytes before the next cache line.
    let programs: [(Locked, bool); 5] = [
        (|a| a.lock().inc(qword_ptr(rsi)).unwrap(), true),
        (|a| a.xchg(qword_ptr(rsi), rax).unwrap(), true),
        (|a| a.lock().cmpxchg8b(qword_ptr(rsi)).unwrap(), true),
        (|a| a.lock().inc(dword_ptr(rsi)).unwrap(), false),
        (|a| a.inc(qword_ptr(rsi)).unwrap(), false),
    ];
    for (number, (locked, splits)) in programs.into_iter().enumerate() {
        for (user, asked) in [(true, true), (true, false), (false, true)] {
            let mut m = Machine::new();
            if user {
                m.user_mode();
            }
            m.set(DEBUGCTL, if asked { 4 } else { 0 });
            m.cpu.gpr[RSI] = DATA + 60;
            let length = assemble(64, CODE, locked).len() as u64;
            let reason = m.run(|a| {
                locked(a);
                a.vmcall().unwrap();
            });
            if splits && user && asked {
                assert_eq!((reason, m.vector()), (exit::EXCEPTION, 1), "{number}");
                assert_eq!(m.get(field::QUALIFICATION), 1 << 11);
                assert_eq!(m.get(field::RIP), CODE + length);
            } else {
                assert_eq!(reason, exit::VMCALL, "{number} {user} {asked}");
            }
        }
    }
}

#[test]
fn dr6_says_bus_lock_by_a_zero() {
    let mut m = Machine::new();
    m.user_mode();
    m.deliver_exceptions();
    m.set(DEBUGCTL, 4);
    m.cpu.dr[6] = 0xffff_0ff0;
    m.cpu.gpr[RSI] = DATA + 60;
    m.run(|a| {
        a.lock().inc(qword_ptr(rsi)).unwrap();
        a.nop().unwrap();
    });
    assert_eq!(m.stub().0, 1);
    assert_eq!(m.cpu.dr[6], 0xffff_07f0);
}
