//! VMX non-root operation: what exits, with what in the VMCS; entry checks and injection; the virtual APIC.

use iced_x86::code_asm::*;
use softtdx_silicon::cpu::{event, VmError};
use softtdx_silicon::mem::Agent;

use crate::machine::*;

#[test]
fn instructions_exit_as_their_controls_say() {
    let mut m = Machine::new();
    type Case = (u32, fn(&mut CodeAssembler), u64);
    let cases: [Case; 9] = [
        (exit::CPUID, |a| a.cpuid().unwrap(), 2),
        (exit::HLT, |a| a.hlt().unwrap(), 1),
        (exit::VMCALL, |a| a.vmcall().unwrap(), 3),
        (13, |a| a.invd().unwrap(), 2),
        (55, |a| a.xsetbv().unwrap(), 3),
        (
            exit::SEAMCALL,
            |a| a.db(&[0x66, 0x0f, 0x01, 0xcf]).unwrap(),
            4,
        ),
        (20, |a| a.vmlaunch().unwrap(), 3),
        (
            exit::RDMSR,
            |a| {
                a.mov(ecx, 0x4000_0000).unwrap();
                a.rdmsr().unwrap()
            },
            2,
        ),
        (
            exit::WRMSR,
            |a| {
                a.mov(ecx, 0x4000_0000).unwrap();
                a.wrmsr().unwrap()
            },
            2,
        ),
    ];
    for (reason, program, length) in cases {
        assert_eq!(m.run(program), reason);
        assert_eq!(m.get(field::LENGTH), length, "reason {reason}");
        assert_eq!(m.get(0x4402), u64::from(reason));
    }
    // Off: HLT sleeps until an interrupt, which exits.
    m.set(field::PRIMARY, 1 << 28 | 1 << 31);
    m.cpu.shared.post(event::INTERRUPT);
    assert_eq!(
        m.run(|a| {
            a.nop().unwrap();
            a.hlt().unwrap()
        }),
        exit::INTERRUPT
    );
}

#[test]
fn tdcall_is_undefined_outside_seam_mode() {
    let mut m = Machine::new();
    assert_eq!(m.fault(|a| a.db(&[0x66, 0x0f, 0x01, 0xcc]).unwrap()).0, 6);
}

#[test]
fn io_exits_with_port_size_and_direction() {
    let mut m = Machine::new();
    assert_eq!(
        m.run(|a| {
            a.mov(dx, 0x3f8).unwrap();
            a.out(dx, al).unwrap()
        }),
        exit::IO
    );
    assert_eq!(m.get(field::QUALIFICATION), 0x3f8 << 16);
    assert_eq!(m.run(|a| a.in_(eax, 0x80).unwrap()), exit::IO);
    assert_eq!(
        m.get(field::QUALIFICATION),
        0x80 << 16 | 1 << 6 | 1 << 3 | 3
    );
    assert_eq!(
        m.run(|a| {
            a.mov(dx, 0x1f0).unwrap();
            a.mov(rdi, DATA).unwrap();
            a.mov(ecx, 4).unwrap();
            a.rep().insw().unwrap();
        }),
        exit::IO
    );
    assert_eq!(
        m.get(field::QUALIFICATION),
        0x1f0 << 16 | 1 << 5 | 1 << 4 | 1 << 3 | 1
    );
    assert_eq!(m.get(field::LINEAR), DATA);
}

#[test]
fn msr_bitmaps_choose_msr_by_msr() {
    let mut m = Machine::new();
    // Write of IA32_LSTAR exits, read does not.
    m.write(BITMAPS + 0xc00 + 0x82 / 8, &[1 << (0x82 & 7)]);
    m.cpu.lstar = 0x1234;
    assert_eq!(
        m.run(|a| {
            a.mov(ecx, 0xc000_0082u32 as i32).unwrap();
            a.rdmsr().unwrap();
            a.wrmsr().unwrap();
        }),
        exit::WRMSR
    );
    assert_eq!(m.reg(RAX), 0x1234);
    // An MSR that is not there: #GP; a value that is not allowed: #GP.
    assert_eq!(
        m.fault(|a| {
            a.mov(ecx, 0x1fff).unwrap();
            a.rdmsr().unwrap()
        }),
        (13, 0)
    );
    assert_eq!(
        m.fault(|a| {
            a.mov(ecx, 0xc000_0080u32 as i32).unwrap();
            a.mov(eax, -1).unwrap();
            a.mov(edx, -1).unwrap();
            a.wrmsr().unwrap();
        }),
        (13, 0)
    );
}

#[test]
fn control_register_masks_hide_and_exit() {
    let mut m = Machine::new();
    m.set(field::CR0_MASK, 1 << 5 | 1 << 16);
    m.set(field::CR0_SHADOW, 1 << 5);
    m.set(field::CR4_MASK, 1 << 6 | 1 << 13);
    m.set(field::CR4_SHADOW, 0);
    assert_eq!(
        m.run(|a| {
            a.mov(rax, cr0).unwrap();
            a.mov(rcx, cr4).unwrap();
            // Bits that the guest owns change without an exit.
            a.mov(rdx, rax).unwrap();
            a.or(rdx, 2).unwrap();
            a.mov(cr0, rdx).unwrap();
            a.mov(rbx, cr0).unwrap();
            a.or(rdx, 1 << 16).unwrap();
            a.mov(cr0, rdx).unwrap();
        }),
        exit::CR
    );
    assert_eq!(m.reg(RAX) >> 16 & 1, 0);
    assert_eq!(m.reg(RCX) >> 6 & 1, 0);
    assert_eq!(m.reg(RBX) & 2, 2);
    assert_eq!(m.get(field::QUALIFICATION), (RDX as u64) << 8);
    // WP is still set behind the shadow.
    assert_eq!(m.get(field::CR0) >> 16 & 1, 1);
}

#[test]
fn an_interrupt_exits_at_a_boundary_and_a_loop_does_not_hide_it() {
    let mut m = Machine::new();
    let shared = m.cpu.shared.clone();
    let kicker = std::thread::spawn(move || {
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            shared.post(event::INTERRUPT);
        }
    });
    let programs: [fn(&mut CodeAssembler); 4] = [
        |a| a.db(&[0xeb, 0xfe]).unwrap(),
        |a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.inc(rax).unwrap();
            a.jmp(top).unwrap();
        },
        |a| {
            a.mov(rcx, u64::MAX).unwrap();
            a.mov(rsi, DATA).unwrap();
            a.mov(rdi, DATA).unwrap();
            a.std().unwrap();
            a.db(&[0xf3, 0xac]).unwrap();
        },
        |a| {
            let mut top = a.create_label();
            a.set_label(&mut top).unwrap();
            a.pause().unwrap();
            a.jmp(top).unwrap();
        },
    ];
    for program in programs {
        let reason = m.run(program);
        assert!(
            reason == exit::INTERRUPT || reason == exit::EXCEPTION,
            "{reason}"
        );
    }
    kicker.join().unwrap();
}

#[test]
fn the_host_timer_and_the_preemption_timer_fire_at_an_exact_instruction() {
    for _ in 0..2 {
        let mut m = Machine::new();
        m.cpu.host_timer = Some(1000);
        assert_eq!(m.run(|a| a.db(&[0xeb, 0xfe]).unwrap()), exit::INTERRUPT);
        assert_eq!(m.cpu.icount, 1000);
        m.or(field::PIN, 1 << 6);
        m.set(0x482E, 100);
        assert_eq!(m.enter(), 52);
        assert_eq!(m.cpu.icount, 1000 + (100 << 5));
    }
}

#[test]
fn the_monitor_trap_flag_exits_after_each_instruction() {
    let mut m = Machine::new();
    m.or(field::PRIMARY, 1 << 27);
    m.load(|a| {
        a.inc(rax).unwrap();
        a.inc(rax).unwrap();
        a.inc(rax).unwrap();
    });
    for step in 1..=3 {
        assert_eq!(m.enter(), exit::MTF);
        assert_eq!((m.reg(RAX), m.get(field::RIP)), (step, CODE + 3 * step));
    }
}

#[test]
fn injected_events_are_delivered_before_the_first_instruction() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::RFLAGS, 0x202);
    m.set(field::INJECT, 1 << 31 | 0x41);
    m.load(|a| a.ud2().unwrap());
    assert_eq!(m.enter(), exit::VMCALL);
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((vector, rip), (0x41, CODE));
    // The valid bit is gone after the exit.
    assert_eq!(m.get(field::INJECT) >> 31, 0);

    let mut m = Machine::new();
    m.set(field::INJECT, 1 << 31 | 1 << 11 | 3 << 8 | 14);
    m.set(field::INJECT_ERROR, 0x7);
    m.load(|a| a.ud2().unwrap());
    // An injected exception does not exit by the exception bitmap.
    assert_eq!(m.enter(), exit::VMCALL);
    let (vector, [error, ..]) = m.stub();
    assert_eq!((vector, error, m.cpu.cr2), (14, 7, 0));

    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::INJECT, 1 << 31 | 4 << 8 | 0x80);
    m.set(field::INJECT_LENGTH, 2);
    m.load(|a| a.int(0x80).unwrap());
    m.enter();
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((vector, rip), (0x80, CODE + 2));
}

#[test]
fn vm_entry_refuses_bad_controls_and_bad_guests() {
    let mut m = Machine::new();
    m.load(|a| a.hlt().unwrap());
    let bad: [(u32, u64); 9] = [
        (field::RFLAGS, 0),
        (field::RFLAGS, 0x8002),
        (field::CR0, 0x8000_0030),
        (field::RIP, 1 << 60),
        (0x4816, 0xe09b),
        (0x4822, 0x1_0000),
        (field::ACTIVITY, 4),
        (field::BLOCKING, 3),
        (0x2800, 0),
    ];
    for (at, value) in bad {
        let good = m.get(at);
        m.set(at, value);
        assert_eq!(m.enter(), exit::BAD_GUEST, "{at:#x} = {value:#x}");
        m.set(at, good);
    }
    m.set(field::PIN, 1 << 5);
    assert_eq!(m.cpu.vmenter(true), Err(VmError::Fail(7)));
    assert_eq!(m.get(0x4400), 7);
    m.set(field::PIN, 9);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.cpu.vmenter(true), Err(VmError::Fail(4)));
    m.cpu.vmclear(VMCS).unwrap();
    assert_eq!(m.cpu.vmenter(false), Err(VmError::Fail(0)));
    m.cpu.vmptrld(VMCS).unwrap();
    assert_eq!(m.cpu.vmenter(false), Err(VmError::Fail(5)));
    assert_eq!(m.cpu.vmptrld(VMCS + 1), Err(VmError::Fail(9)));
    assert_eq!(m.cpu.vmptrld(DATA), Err(VmError::Fail(11)));
    assert_eq!(m.cpu.vmread(0x7ffe), Err(VmError::Fail(12)));
}

#[test]
fn a_vmcs_keeps_its_state_in_its_region() {
    let mut m = Machine::new();
    m.load(|a| a.hlt().unwrap());
    assert_eq!(m.enter(), exit::HLT);
    m.build_vmcs(VMCS + 0x1000);
    m.load(|a| a.cpuid().unwrap());
    assert_eq!(m.enter(), exit::CPUID);
    m.cpu.vmptrld(VMCS).unwrap();
    assert_eq!(m.get(0x4402), u64::from(exit::HLT));
    // Still launched: VMRESUME works.
    assert!(m.cpu.vmenter(false).is_ok());
}

#[test]
fn virtual_interrupts_are_delivered_by_priority_and_ended_by_eoi() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    virtual_apic(&mut m);
    // 0x61 and 0x35 are requested.
    m.mem
        .wr32(
            VAPIC + 0x200 + 0x30,
            1 << 1,
            softtdx_silicon::mem::Agent::SEAM,
        )
        .unwrap();
    m.mem
        .wr32(
            VAPIC + 0x200 + 0x10,
            1 << 0x15,
            softtdx_silicon::mem::Agent::SEAM,
        )
        .unwrap();
    m.set(field::INTR_STATUS, 0x61);
    m.load(|a| {
        a.sti().unwrap();
        a.nop().unwrap();
        a.nop().unwrap();
        a.hlt().unwrap();
    });
    // The handler ends its interrupt and returns with interrupts on.
    let handler = assemble(64, STUBS, |a| {
        a.inc(rbx).unwrap();
        a.shl(r8, 8).unwrap();
        a.or(r8, 0x61).unwrap();
        a.mov(ecx, 0x80b).unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.iretq().unwrap();
    });
    m.write(CODE + 0x800, &handler);
    m.set_gate(0x61, CODE + 0x800, 0, 0x8e);
    let mut second = handler.clone();
    let at = second
        .windows(2)
        .position(|pair| pair == [0x83, 0xc8])
        .map(|at| at + 2)
        .unwrap();
    second[at] = 0x35;
    m.write(CODE + 0x900, &second);
    m.set_gate(0x35, CODE + 0x900, 0, 0x8e);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!((m.reg(RBX), m.reg(R8)), (2, 0x6135));
    assert_eq!(m.get(field::INTR_STATUS), 0);
    assert_eq!(m.r64(VAPIC + 0x130) & 0xffff_ffff, 0);
}

fn virtual_apic(m: &mut Machine) {
    m.or(field::PRIMARY, 1 << 21);
    m.or(field::SECONDARY, 1 << 4 | 1 << 8 | 1 << 9);
    m.set(0x2012, VAPIC);
}

#[test]
fn a_posted_interrupt_reaches_a_running_guest_without_an_exit() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    virtual_apic(&mut m);
    m.or(field::PIN, 1 << 7);
    m.set(0x2016, PID);
    m.w64(PID + 8, 1 << 0x11);
    m.w64(PID + 32, 1);
    m.cpu.shared.post(event::POSTED);
    m.set(field::RFLAGS, 0x202);
    m.load(|a| a.db(&[0xeb, 0xfe]).unwrap());
    assert_eq!(m.enter(), exit::VMCALL);
    assert_eq!(m.stub().0, 0x51);
    assert_eq!((m.r64(PID + 8), m.r64(PID + 32) & 1), (0, 0));
}

#[test]
fn the_task_priority_holds_virtual_interrupts_back() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    virtual_apic(&mut m);
    m.set(field::INTR_STATUS, 0x51);
    m.set(field::RFLAGS, 0x202);
    m.mem
        .wr32(VAPIC + 0x80, 0x60, softtdx_silicon::mem::Agent::SEAM)
        .unwrap();
    m.mem
        .wr32(VAPIC + 0x220, 1 << 0x11, softtdx_silicon::mem::Agent::SEAM)
        .unwrap();
    let reason = m.run(|a| {
        a.nop().unwrap();
        a.mov(rax, cr8).unwrap();
        a.mov(ebx, 4).unwrap();
        a.mov(cr8, rbx).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(reason, exit::VMCALL);
    let (vector, [rip, ..]) = m.stub();
    assert_eq!((m.reg(RAX), vector, rip), (6, 0x51, CODE + 14));
}

#[test]
fn self_ipi_arrives() {
    let mut m = Machine::new();
    m.deliver_exceptions();
    virtual_apic(&mut m);
    m.set(field::RFLAGS, 0x202);
    let reason = m.run(|a| {
        a.mov(ecx, 0x83f).unwrap();
        a.mov(eax, 0x77).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(reason, exit::VMCALL);
    assert_eq!(m.stub().0, 0x77);
}

#[test]
fn an_nmi_exits_or_is_delivered_and_blocks_until_iret() {
    let mut m = Machine::new();
    m.cpu.shared.post(event::NMI);
    assert_eq!(m.run(|a| a.db(&[0xeb, 0xfe]).unwrap()), exit::EXCEPTION);
    assert_eq!(m.get(field::INTR_INFO), 0x8000_0202);
    let mut m = Machine::new();
    m.deliver_exceptions();
    m.set(field::PIN, 1);
    m.cpu.shared.post(event::NMI);
    assert_eq!(m.run(|a| a.db(&[0xeb, 0xfe]).unwrap()), exit::VMCALL);
    assert_eq!(m.stub().0, 2);
    assert_eq!(m.get(field::BLOCKING), 8);
    m.write(STUBS + 2 * 16, &[0x48, 0xcf]);
    m.write(CODE, &[0xf4]);
    assert_eq!(m.enter(), exit::HLT);
    assert_eq!(m.get(field::BLOCKING), 0);
}

#[test]
fn the_tsc_is_offset_scaled_and_counts_instructions() {
    let mut m = Machine::new();
    let program = |a: &mut CodeAssembler| {
        a.nop().unwrap();
        a.nop().unwrap();
        a.rdtsc().unwrap();
        a.hlt().unwrap();
    };
    m.run(program);
    assert_eq!(m.reg(RAX), 2);
    m.or(field::PRIMARY, 1 << 3);
    m.set(field::TSC_OFFSET, 1_000_000);
    m.or(field::SECONDARY, 1 << 25);
    m.set(0x2032, 2 << 48);
    let before = m.cpu.icount;
    m.run(program);
    assert_eq!(m.reg(RAX), (before + 2) * 2 + 1_000_000);
}

#[test]
fn the_escape_instruction_stops_only_where_it_is_allowed() {
    let mut m = Machine::new();
    let program = |a: &mut CodeAssembler| {
        a.mov(eax, 5).unwrap();
        a.db(&[0x0f, 0xb9, 0x05, 0x07, 0x58, 0x44, 0x54]).unwrap();
        a.hlt().unwrap();
    };
    assert_eq!(m.fault(program).0, 6);
    m.cpu.set_allow_escape(true);
    assert_eq!(m.run(program), 0x1_0007);
    assert!(m.cpu.live);
    let state: std::collections::HashMap<_, _> = m.cpu.live_state().into_iter().collect();
    assert_eq!((state["rip"], state["rsp"]), (CODE + 5, STACK));
    m.cpu.guest_write(DATA, b"from outside").unwrap();
    let mut back = [0; 12];
    m.cpu.guest_read(DATA, &mut back).unwrap();
    assert_eq!(&back, b"from outside");
    assert!(m.cpu.guest_read(0x7000_0000, &mut back).is_err());
    m.cpu.set_live("rip", CODE + 12).unwrap();
    assert!(m.cpu.set_live("cr3", 0).is_err());
    assert_eq!(
        m.cpu.resume(),
        Ok(softtdx_silicon::cpu::Outcome::Exit(exit::HLT))
    );
}

#[test]
fn a_guest_that_stands_still_is_read_through_what_its_tables_are_now() {
    let mut m = Machine::new();
    m.w64(DATA, 1);
    m.w64(DATA + 0x1000, 2);
    m.cpu.set_allow_escape(true);
    // Walks of the running guest leave pointers to its tables behind.
    let reason = m.run(|a| {
        a.mov(rax, DATA).unwrap();
        a.mov(rax, qword_ptr(rax)).unwrap();
        a.db(&[0x0f, 0xb9, 0x05, 0x07, 0x58, 0x44, 0x54]).unwrap();
        a.hlt().unwrap();
    });
    assert_eq!(reason, 0x1_0007);
    // The host writes the page table over with another key: what the guest's own key finds there is noise.
    let keyid = 1u64 << KEYID_SHIFT;
    m.mem
        .set_key(1, Some(([1; 16], [2; 16])), Agent::SEAM)
        .unwrap();
    let table = Machine::pte(0);
    for index in 0..512 {
        m.mem
            .wr64(
                (table + index * 8) | keyid,
                (DATA + 0x1000) | 7,
                Agent::SEAM,
            )
            .unwrap();
    }
    let mut found = [0; 8];
    let read = m.cpu.guest_read(DATA, &mut found);
    assert!(read.is_err() || u64::from_le_bytes(found) != 2);
}

#[test]
fn samples_say_where_the_instructions_went() {
    let mut m = Machine::new();
    let program = |a: &mut CodeAssembler| {
        a.mov(ecx, 100_000).unwrap();
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.hlt().unwrap();
    };
    m.run(program);
    assert!(m.cpu.samples.is_none());
    m.cpu.configure("sample", 1000).unwrap();
    assert_eq!(m.run(program), exit::HLT);
    let list = m.cpu.samples.as_ref().unwrap().list();
    // All of it is the loop; what came after the last sample is missing.
    assert_eq!(list.len(), 1);
    let (rip, count) = list[0];
    assert_eq!(rip, CODE + 5);
    assert!((198_000..=200_002).contains(&count), "{count}");
    m.cpu.configure("sample", 0).unwrap();
    assert!(m.cpu.samples.is_none());
}
