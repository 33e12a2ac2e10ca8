//! Instructions of 64-bit integer code. The breadth is tested against other processors elsewhere; here are the
//! corners that decide whether an engine is precise.

use iced_x86::code_asm::*;

use crate::machine::*;

#[test]
fn arithmetic_moves_and_branches_work_and_instructions_are_counted() {
    let mut m = Machine::new();
    let reason = m.run(|a| {
        let mut top = a.create_label();
        a.mov(rcx, 10u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.set_label(&mut top).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(rcx).unwrap();
        a.jnz(top).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(reason, exit::HLT);
    assert_eq!(m.reg(RAX), 55);
    assert_eq!(m.cpu.icount, 2 + 3 * 10);
}

#[test]
fn a_write_to_a_32_bit_register_clears_the_upper_half_and_to_a_smaller_one_does_not() {
    let mut m = Machine::new();
    m.run(|a| {
        a.mov(rax, u64::MAX).unwrap();
        a.mov(eax, 1).unwrap();
        a.mov(rcx, u64::MAX).unwrap();
        a.mov(cx, 1).unwrap();
        a.mov(rdx, u64::MAX).unwrap();
        a.mov(dh, 1).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.reg(RAX), 1);
    assert_eq!(m.reg(RCX), 0xffff_ffff_ffff_0001);
    assert_eq!(m.reg(RDX), 0xffff_ffff_ffff_01ff);
}

#[test]
fn inc_keeps_carry_and_a_shift_by_zero_keeps_everything() {
    let mut m = Machine::new();
    m.run(|a| {
        a.stc().unwrap();
        a.mov(eax, -1).unwrap();
        a.inc(eax).unwrap();
        a.mov(ecx, 0).unwrap();
        a.mov(ebx, 5).unwrap();
        a.shl(ebx, cl).unwrap();
        a.pushfq().unwrap();
        a.pop(rdx).unwrap();
        a.hlt().unwrap();
    });
    // CF from STC, ZF, PF and AF from INC.
    assert_eq!(m.reg(RDX) & 0x8d5, 0x55);
}

#[test]
fn a_fault_in_a_read_modify_write_leaves_flags_and_registers_alone() {
    let mut m = Machine::new();
    m.w64(Machine::pte(DATA), DATA | 5);
    m.w64(DATA, 7);
    m.set(field::RFLAGS, 2 | 0x8d5);
    let (vector, error) = m.fault(|a| {
        a.mov(rdi, DATA).unwrap();
        a.add(qword_ptr(rdi), 1).unwrap();
    });
    assert_eq!((vector, error & 3), (14, 3));
    assert_eq!(m.get(field::RFLAGS) & 0x8d5, 0x8d5);
    assert_eq!(m.get(field::QUALIFICATION), DATA);
    assert_eq!(m.r64(DATA), 7);
}

#[test]
fn a_store_over_two_pages_writes_nothing_if_the_second_refuses() {
    let mut m = Machine::new();
    m.w64(DATA + 0xff8, 0);
    m.w64(Machine::pte(DATA + 0x1000), 0);
    let (vector, error) = m.fault(|a| {
        a.mov(rdi, DATA + 0xffc).unwrap();
        a.mov(rax, u64::MAX).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
    });
    assert_eq!((vector, error), (14, 2));
    assert_eq!(m.get(field::QUALIFICATION), DATA + 0x1000);
    assert_eq!(m.r64(DATA + 0xff8), 0);
}

#[test]
fn rep_movs_stops_at_a_fault_with_registers_where_they_are() {
    let mut m = Machine::new();
    m.w64(Machine::pte(DATA + 0x1000), 0);
    let (vector, _) = m.fault(|a| {
        a.mov(rsi, 0x20_0000u64).unwrap();
        a.mov(rdi, DATA + 0xf00).unwrap();
        a.mov(ecx, 0x200).unwrap();
        a.rep().movsb().unwrap();
    });
    assert_eq!(vector, 14);
    assert_eq!(
        (m.reg(RCX), m.reg(RSI), m.reg(RDI)),
        (0x100, 0x20_0100, DATA + 0x1000)
    );
    // The tables are mended and the instruction goes on.
    m.w64(Machine::pte(DATA + 0x1000), (DATA + 0x1000) | 7);
    let rip = m.get(field::RIP);
    m.write(rip + 2, &[0xf4]);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!((m.reg(RCX), m.reg(RDI)), (0, DATA + 0x1100));
}

#[test]
fn overlapping_rep_movs_repeats_the_pattern_and_backwards_it_copies() {
    let mut m = Machine::new();
    m.write(DATA, b"ab______________");
    m.run(|a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 2).unwrap();
        a.mov(ecx, 6).unwrap();
        a.rep().movsb().unwrap();
        a.std().unwrap();
        a.lea(rsi, qword_ptr(DATA + 7)).unwrap();
        a.lea(rdi, qword_ptr(DATA + 9)).unwrap();
        a.mov(ecx, 8).unwrap();
        a.rep().movsb().unwrap();
        a.hlt().unwrap();
    });
    let mut bytes = [0; 16];
    m.mem
        .read(DATA, &mut bytes, softtdx_silicon::mem::Agent::SEAM)
        .unwrap();
    assert_eq!(&bytes, b"ababababab______");
}

#[test]
fn repe_cmps_and_repne_scas_stop_where_they_must() {
    let mut m = Machine::new();
    m.write(DATA, b"hello world\0");
    m.write(DATA + 64, b"hello there\0");
    m.run(|a| {
        a.mov(rsi, DATA).unwrap();
        a.mov(rdi, DATA + 64).unwrap();
        a.mov(ecx, 11).unwrap();
        a.repe().cmpsb().unwrap();
        a.mov(rbx, rcx).unwrap();
        a.mov(rdi, DATA).unwrap();
        a.mov(ecx, 100).unwrap();
        a.xor(eax, eax).unwrap();
        a.repne().scasb().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(m.reg(RBX), 4);
    assert_eq!(m.reg(RCX), 88);
}

#[test]
fn division_faults_on_zero_and_on_overflow_and_divides_otherwise() {
    let mut m = Machine::new();
    for (high, low, divisor) in [(0u64, 1u64, 0u64), (5, 0, 5), (u64::MAX, 0, 1)] {
        let (vector, _) = m.fault(|a| {
            a.mov(rdx, high).unwrap();
            a.mov(rax, low).unwrap();
            a.mov(rcx, divisor).unwrap();
            a.div(rcx).unwrap();
        });
        assert_eq!(vector, 0);
        assert_eq!((m.reg(RDX), m.reg(RAX)), (high, low));
    }
    let (vector, _) = m.fault(|a| {
        a.mov(rdx, i64::MIN as u64).unwrap();
        a.xor(eax, eax).unwrap();
        a.mov(rcx, -1i64 as u64).unwrap();
        a.idiv(rcx).unwrap();
    });
    assert_eq!(vector, 0);
    m.run(|a| {
        a.mov(rdx, -1i64 as u64).unwrap();
        a.mov(rax, -7i64 as u64).unwrap();
        a.mov(rcx, 2u64).unwrap();
        a.idiv(rcx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((m.reg(RAX) as i64, m.reg(RDX) as i64), (-3, -1));
}

#[test]
fn bit_offsets_in_registers_reach_beyond_the_operand() {
    let mut m = Machine::new();
    m.w64(DATA, 0);
    m.w64(DATA + 8, 0);
    m.w64(DATA - 8, 0);
    m.run(|a| {
        a.mov(rdi, DATA).unwrap();
        a.mov(rax, 64 + 3u64).unwrap();
        a.bts(qword_ptr(rdi), rax).unwrap();
        a.mov(rax, -1i64 as u64).unwrap();
        a.lock().bts(qword_ptr(rdi), rax).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(
        (m.r64(DATA), m.r64(DATA + 8), m.r64(DATA - 8)),
        (0, 8, 1 << 63)
    );
}

#[test]
fn cmpxchg16b_compares_and_swaps_and_wants_alignment() {
    let mut m = Machine::new();
    m.w64(DATA, 1);
    m.w64(DATA + 8, 2);
    let program = |a: &mut CodeAssembler, at: u64| {
        a.mov(rdi, at).unwrap();
        a.mov(eax, 1).unwrap();
        a.mov(edx, 2).unwrap();
        a.mov(ebx, 3).unwrap();
        a.mov(ecx, 4).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
        a.hlt().unwrap();
    };
    m.run(|a| program(a, DATA));
    assert_eq!((m.r64(DATA), m.r64(DATA + 8)), (3, 4));
    assert_ne!(m.get(field::RFLAGS) & 0x40, 0);
    m.run(|a| program(a, DATA));
    assert_eq!((m.reg(RAX), m.reg(RDX)), (3, 4));
    assert_eq!(m.get(field::RFLAGS) & 0x40, 0);
    assert_eq!(m.fault(|a| program(a, DATA + 8)), (13, 0));
}

#[test]
fn stack_instructions_restore_the_stack_pointer_when_they_fault() {
    let mut m = Machine::new();
    m.set(field::RSP, 0x7000_0000);
    assert_eq!(m.fault(|a| a.push(rax).unwrap()), (14, 2));
    assert_eq!(m.get(field::RSP), 0x7000_0000);
    m.set(field::RSP, 0x8000_0000_0000);
    assert_eq!(m.fault(|a| a.pop(rax).unwrap()), (12, 0));
    m.set(field::RSP, STACK);
    let (vector, error) = m.fault(|a| {
        a.mov(rbx, 1u64 << 62).unwrap();
        a.mov(rax, qword_ptr(rbx)).unwrap();
    });
    assert_eq!((vector, error), (13, 0));
}

#[test]
fn enter_and_leave_build_and_drop_a_frame() {
    let mut m = Machine::new();
    m.run(|a| {
        a.mov(rbp, 0x1234u64).unwrap();
        a.enter(32, 0).unwrap();
        a.mov(rax, rsp).unwrap();
        a.mov(rcx, rbp).unwrap();
        a.leave().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((m.reg(RAX), m.reg(RCX)), (STACK - 40, STACK - 8));
    assert_eq!((m.reg(5), m.get(field::RSP)), (0x1234, STACK));
}

#[test]
fn an_unknown_instruction_is_undefined_and_named() {
    let mut m = Machine::new();
    // VPERMB zmm0, zmm0, zmm0.
    m.write(CODE, &[0x62, 0xf2, 0x7d, 0x48, 0x8d, 0xc0]);
    assert_eq!(m.enter(), exit::EXCEPTION);
    assert_eq!(m.vector(), 6);
    assert_eq!(m.cpu.counters.undefined, 1);
    assert!(
        m.cpu.undefined[0].contains("Vpermb"),
        "{}",
        m.cpu.undefined[0]
    );
    // UD2 is undefined by design and not counted.
    assert_eq!(m.fault(|a| a.ud2().unwrap()).0, 6);
    assert_eq!(m.cpu.counters.undefined, 1);
}

#[test]
fn sse_moves_check_alignment_and_obey_cr0_and_cr4() {
    let mut m = Machine::new();
    let program = |a: &mut CodeAssembler| {
        a.mov(rdi, DATA + 8).unwrap();
        a.movaps(xmm0, xmmword_ptr(rdi)).unwrap();
    };
    assert_eq!(m.fault(program), (13, 0));
    m.or(field::CR0, 8);
    assert_eq!(m.fault(|a| a.movups(xmm0, xmm1).unwrap()).0, 7);
    m.set(field::CR0, 0x8005_0033);
    m.set(field::CR4, 1 << 5 | 1 << 6);
    assert_eq!(m.fault(|a| a.movups(xmm0, xmm1).unwrap()).0, 6);
}
