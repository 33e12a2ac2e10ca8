//! Speed of the interpreter in MIPS of processor time, on loops of one kind of instruction each.
//!
//! `cargo bench`. Wall time says little on a shared machine, so the thread's CPU time is what counts.

use iced_x86::code_asm::*;

#[path = "../tests/cpu/machine.rs"]
#[allow(dead_code)]
mod machine;

use machine::{exit, Machine, DATA};

fn cpu_time() -> f64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is a timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) };
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn measure(name: &str, program: impl Fn(&mut CodeAssembler)) {
    let mut best = 0.0f64;
    for _ in 0..3 {
        let mut m = Machine::new();
        m.load(&program);
        let start = cpu_time();
        assert_eq!(m.enter(), exit::HLT, "{name}");
        best = best.max(m.cpu.icount as f64 / (cpu_time() - start) / 1e6);
    }
    println!("{name:<24} {best:8.1} MIPS");
}

fn looped(a: &mut CodeAssembler, rounds: u32, body: impl FnOnce(&mut CodeAssembler)) {
    let mut top = a.create_label();
    a.mov(rsi, DATA).unwrap();
    a.mov(ecx, rounds).unwrap();
    a.set_label(&mut top).unwrap();
    body(a);
    a.dec(ecx).unwrap();
    a.jnz(top).unwrap();
    a.hlt().unwrap();
}

fn main() {
    measure("integer loop", |a| {
        looped(a, 20_000_000, |a| {
            a.add(rax, rcx).unwrap();
            a.xor(rdx, rax).unwrap();
            a.lea(rbx, qword_ptr(rax + rdx + 3)).unwrap();
            a.sub(rbx, 1).unwrap();
            a.shl(rbx, 3).unwrap();
        });
    });
    measure("load/store loop", |a| {
        looped(a, 20_000_000, |a| {
            a.mov(rax, qword_ptr(rsi)).unwrap();
            a.add(rax, 1).unwrap();
            a.mov(qword_ptr(rsi), rax).unwrap();
            a.mov(rbx, qword_ptr(rsi + rdx * 8 + 8)).unwrap();
            a.mov(dword_ptr(rsi + 16), ebx).unwrap();
        });
    });
    measure("call/return loop", |a| {
        let (mut function, mut start) = (a.create_label(), a.create_label());
        a.jmp(start).unwrap();
        a.set_label(&mut function).unwrap();
        a.push(rbx).unwrap();
        a.mov(rbx, rcx).unwrap();
        a.pop(rbx).unwrap();
        a.ret().unwrap();
        a.set_label(&mut start).unwrap();
        looped(a, 10_000_000, |a| a.call(function).unwrap());
    });
    measure("branches", |a| {
        let mut skip = a.create_label();
        let mut other = a.create_label();
        looped(a, 20_000_000, |a| {
            a.add(eax, 0x9e37_79b9u32 as i32).unwrap();
            a.test(eax, 0x4_0000).unwrap();
            a.jz(skip).unwrap();
            a.inc(ebx).unwrap();
            a.set_label(&mut skip).unwrap();
            a.cmp(eax, ebx).unwrap();
            a.jb(other).unwrap();
            a.inc(edx).unwrap();
            a.set_label(&mut other).unwrap();
            a.nop().unwrap();
        });
    });
    measure("strings", |a| {
        looped(a, 200_000, |a| {
            a.mov(rdi, DATA).unwrap();
            a.mov(rbx, rcx).unwrap();
            a.mov(ecx, 64).unwrap();
            a.rep().stosq().unwrap();
            a.mov(rcx, rbx).unwrap();
        });
    });
    measure("locked", |a| {
        looped(a, 5_000_000, |a| {
            a.lock().inc(qword_ptr(rsi)).unwrap();
            a.lock().xadd(qword_ptr(rsi + 8), rax).unwrap();
        });
    });
    measure("page walks", |a| {
        looped(a, 20_000, |a| {
            a.mov(rax, cr3).unwrap();
            a.mov(cr3, rax).unwrap();
            a.mov(rax, qword_ptr(rsi)).unwrap();
            a.mov(rax, qword_ptr(rsi + 0x1000)).unwrap();
            a.mov(rax, qword_ptr(rsi + 0x2000)).unwrap();
        });
    });
}
