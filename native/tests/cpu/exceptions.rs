//! Delivery through the guest's IDT, IRET, system calls, traps.

use iced_x86::code_asm::*;

use crate::machine::*;

#[test]
fn a_fault_pushes_its_frame_and_iret_returns() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::RFLAGS, 0x202 | 1);
    assert_eq!(m.run(|a| a.ud2().unwrap()), exit::VMCALL);
    let (vector, [rip, code, rflags, stack, data, _]) = m.stub();
    assert_eq!(vector, 6);
    assert_eq!(
        (rip, code, stack, data),
        (CODE, selector::CODE64, STACK, selector::DATA)
    );
    // RF is set in the image, IF is cleared in the handler.
    assert_eq!(rflags, 0x1_0203);
    assert_eq!(m.get(field::RFLAGS) & 0x200, 0);
    m.w64(m.cpu.gpr[4], CODE + 2);
    m.write(STUBS + 6 * 16, &[0x48, 0xcf]);
    m.write(CODE + 2, &[0xf4]);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.get(field::RSP), STACK);
    assert_eq!(m.get(field::RFLAGS) & 0xffff, 0x203);
}

#[test]
fn a_page_fault_has_its_error_code_and_address() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    assert_eq!(
        m.run(|a| {
            a.mov(rax, 0x7000_0123u64).unwrap();
            a.mov(dword_ptr(rax), 1).unwrap();
        }),
        exit::VMCALL
    );
    let (vector, [error, ..]) = m.stub();
    assert_eq!((vector, error), (14, 2));
    assert_eq!(m.cpu.cr2, 0x7000_0123);
}

#[test]
fn user_code_enters_the_kernel_on_the_stack_of_the_tss_or_an_ist() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.user_mode();
    m.set_gate(0x80, STUBS + 0x800, 0, 0xee);
    assert_eq!(m.run(|a| a.int(0x80).unwrap()), exit::VMCALL);
    let (vector, [rip, code, _, stack, data, _]) = m.stub();
    assert_eq!(
        (vector, rip, code, stack, data),
        (0x80, CODE + 2, selector::USER64, STACK, selector::USER_DATA)
    );
    assert_eq!(m.get(field::RSP), RING0 - 40);
    assert_eq!(m.get(field::GUEST_CS_SEL), selector::CODE64);

    let mut m = Machine::new();
    m.deliver_exceptions();
    m.user_mode();
    m.set_gate(6, STUBS + 6 * 16, 1, 0x8e);
    m.run(|a| a.ud2().unwrap());
    assert_eq!(m.get(field::RSP), IST1 - 40);
}

#[test]
fn user_code_may_not_use_a_kernel_gate_nor_privileged_instructions() {
    let mut m = Machine::new();
    m.user_mode();
    assert_eq!(m.fault(|a| a.int(0x80).unwrap()), (13, 0x80 * 8 + 2));
    type Case = (&'static str, fn(&mut CodeAssembler));
    let privileged: [Case; 9] = [
        ("hlt", |a| a.hlt().unwrap()),
        ("cli", |a| a.cli().unwrap()),
        ("mov cr0", |a| a.mov(rax, cr0).unwrap()),
        ("rdmsr", |a| a.rdmsr().unwrap()),
        ("in", |a| a.in_(al, dx).unwrap()),
        ("lgdt", |a| a.lgdt(ptr(DATA)).unwrap()),
        ("invlpg", |a| a.invlpg(ptr(DATA)).unwrap()),
        ("wbinvd", |a| a.wbinvd().unwrap()),
        ("swapgs", |a| a.swapgs().unwrap()),
    ];
    for (name, program) in privileged {
        assert_eq!(m.fault(program), (13, 0), "{name}");
    }
}

#[test]
fn a_fault_while_delivering_a_fault_is_a_double_fault_and_then_the_end() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set_gate(13, 0, 0, 0);
    assert_eq!(
        m.run(|a| {
            a.mov(rbx, 1u64 << 62).unwrap();
            a.mov(rax, qword_ptr(rbx)).unwrap();
        }),
        exit::VMCALL
    );
    let (vector, [error, ..]) = m.stub();
    assert_eq!((vector, error), (8, 0));

    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(0x4812, 0);
    assert_eq!(m.run(|a| a.ud2().unwrap()), exit::TRIPLE_FAULT);
    assert_eq!(m.get(field::RIP), CODE);
}

#[test]
fn a_benign_fault_on_the_way_to_a_contributory_one_is_delivered_as_it_is() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    // #UD is benign: the #NP of its gate is what the guest sees.
    m.set_gate(6, STUBS, 0, 0x0e);
    m.run(|a| a.ud2().unwrap());
    let (vector, [error, ..]) = m.stub();
    assert_eq!((vector, error), (11, 6 * 8 + 2 + 1));
}

#[test]
fn an_exit_while_delivering_leaves_the_event_as_idt_vectoring_information() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    // The page-fault handler's stack lies in a page that the EPT does not map.
    m.w64(EPT + 0x2000 + 16 * 8, 0);
    m.set(field::RSP, 16 << 21 | 0x1000);
    let reason = m.run(|a| {
        a.mov(rax, 0x7000_0000u64).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
    });
    assert_eq!(reason, exit::EPT_VIOLATION);
    assert_eq!(m.get(field::IDT_INFO), 0x8000_0b0e);
    assert_eq!(m.get(field::IDT_ERROR), 0);
    assert_eq!(m.cpu.cr2, 0x7000_0000);
    // Reinjected once the page is there, it goes through.
    m.w64(EPT + 0x2000 + 16 * 8, 16 << 21 | 0xb7);
    m.set(field::INJECT, 0x8000_0b0e);
    m.set(field::INJECT_ERROR, 0);
    assert_eq!(m.enter(), exit::VMCALL);
    assert_eq!(m.stub().0, 14);
}

#[test]
fn syscall_and_sysret_change_privilege_and_keep_what_they_must() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.user_mode();
    m.cpu.star = (selector::USER64 - 16) << 48 | selector::CODE64 << 32;
    m.cpu.lstar = CODE + 0x100;
    m.cpu.fmask = 0x200;
    m.set(field::RFLAGS, 0x202 | 0x400);
    m.write(CODE + 0x100, &[0x48, 0x0f, 0x07]);
    let reason = m.run(|a| {
        a.syscall().unwrap();
        a.mov(eax, cs).unwrap();
        a.pushfq().unwrap();
        a.pop(rbx).unwrap();
        a.ud2().unwrap();
    });
    assert_eq!(reason, exit::VMCALL);
    assert_eq!(m.stub().0, 6);
    assert_eq!(m.reg(RAX), selector::USER64);
    assert_eq!(m.reg(RCX), CODE + 2);
    assert_eq!(m.reg(RBX) & 0x600, 0x600);
    assert_eq!(m.reg(11) & 0x600, 0x600);
}

#[test]
fn swapgs_exchanges_the_bases_and_fs_and_gs_are_used() {
    let mut m = Machine::new();
    m.w64(DATA + 8, 0x1111);
    m.w64(DATA + 0x108, 0x2222);
    m.cpu.kernel_gs_base = DATA;
    m.set(0x6810, DATA + 0x100);
    m.run(|a| {
        a.mov(rax, qword_ptr(8).gs()).unwrap();
        a.swapgs().unwrap();
        a.mov(rcx, qword_ptr(8).gs()).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!((m.reg(RAX), m.reg(RCX)), (0x2222, 0x1111));
    assert_eq!(m.cpu.kernel_gs_base, DATA + 0x100);
}

#[test]
fn the_trap_flag_traps_after_every_instruction() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::RFLAGS, 0x102);
    assert_eq!(
        m.run(|a| {
            a.nop().unwrap();
            a.nop().unwrap();
        }),
        exit::VMCALL
    );
    let (vector, [rip, _, rflags, ..]) = m.stub();
    assert_eq!((vector, rip), (1, CODE + 1));
    assert_eq!(rflags & 0x100, 0x100);
    assert_eq!(m.cpu.dr[6] & 0x4000, 0x4000);
}

#[test]
fn an_instruction_breakpoint_faults_before_the_instruction() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.cpu.dr[1] = CODE + 1;
    m.set(0x681A, 0x400 | 1 << 2);
    m.run(|a| {
        a.nop().unwrap();
        a.inc(rax).unwrap();
        a.hlt().unwrap();
    });
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((vector, rip), (1, CODE + 1));
    assert_eq!(m.cpu.dr[6] & 15, 2);
}

#[test]
fn interrupts_wait_for_one_instruction_after_sti_and_mov_ss() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    // Interrupt-window exiting stands in for an interrupt.
    m.or(field::PRIMARY, 1 << 2);
    assert_eq!(
        m.run(|a| {
            a.sti().unwrap();
            a.inc(rax).unwrap();
            a.inc(rax).unwrap();
            a.hlt().unwrap();
        }),
        7
    );
    assert_eq!((m.reg(RAX), m.get(field::RIP)), (1, CODE + 4));
    m.cpu.gpr[RAX] = 0;
    m.set(field::RFLAGS, 2);
    assert_eq!(
        m.run(|a| {
            a.mov(ecx, ss).unwrap();
            a.sti().unwrap();
            a.mov(ss, ecx).unwrap();
            a.inc(rax).unwrap();
            a.inc(rax).unwrap();
            a.hlt().unwrap();
        }),
        7
    );
    assert_eq!(m.reg(RAX), 1);
}

#[test]
fn hlt_behind_sti_exits_with_the_shadow_in_the_interruptibility_state() {
    let mut m = Machine::new();
    assert_eq!(
        m.run(|a| {
            a.sti().unwrap();
            a.hlt().unwrap();
        }),
        exit::HLT
    );
    assert_eq!(m.get(field::BLOCKING), 1);
}

#[test]
fn int3_and_into_push_the_address_behind_and_report_their_kind_on_exit() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.run(|a| a.int3().unwrap());
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((vector, rip), (3, CODE + 1));
    let mut m = Machine::new();
    m.fault(|a| a.int3().unwrap());
    assert_eq!(m.get(field::INTR_INFO), 0x8000_0603);
    assert_eq!((m.get(field::LENGTH), m.get(field::RIP)), (1, CODE));
}

#[test]
fn popf_changes_only_what_the_privilege_allows() {
    let mut m = Machine::new();
    m.user_mode();
    m.deliver_exceptions();
    m.run(|a| {
        a.push(0x3ed7).unwrap();
        a.popfq().unwrap();
        a.pushfq().unwrap();
        a.pop(rax).unwrap();
        a.ud2().unwrap();
    });
    // IOPL and IF stay 0; TF was not set in the value.
    assert_eq!(m.reg(RAX), 0x0cd7);
}

#[test]
fn iret_to_user_mode_and_a_bad_selector_on_the_way() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    let program = |a: &mut CodeAssembler, code: u64| {
        a.push(selector::USER_DATA as i32).unwrap();
        a.mov(rax, STACK - 0x100).unwrap();
        a.push(rax).unwrap();
        a.push(0x202).unwrap();
        a.push(code as i32).unwrap();
        a.mov(rax, CODE + 0x200).unwrap();
        a.push(rax).unwrap();
        a.iretq().unwrap();
    };
    m.write(CODE + 0x200, &[0x0f, 0x0b]);
    m.run(|a| program(a, selector::USER64));
    let (vector, [rip, code, _, stack, ..]) = m.stub();
    assert_eq!(
        (vector, rip, code, stack),
        (6, CODE + 0x200, selector::USER64, STACK - 0x100)
    );

    let mut m = Machine::new();
    assert_eq!(m.fault(|a| program(a, 0x28 | 3)), (13, 0x28));
}
