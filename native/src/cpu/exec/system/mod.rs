//! System instructions: control and debug registers, descriptor tables, MSRs, I/O, system calls, caches.
//!
//! The handlers are in a file for each kind; here stands which instruction is whose.

mod caches;
mod calls;
mod control_regs;
mod io;
mod msrs;
mod segments;
mod tables;

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::cpu::decode::{bitness, gpr, immediate, operand_size, segment_number};
use crate::cpu::exec::control;
use crate::cpu::state::{Cpu, Stop, CS, DS, ES, FS, GS, SS};
use crate::cpu::uop::{Handler, Uop};

use caches::*;
use calls::*;
use control_regs::*;
use io::*;
use msrs::*;
use segments::*;
use tables::*;

/// #GP(0) outside ring 0.
fn supervisor(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

fn segment_operand(insn: &Instruction, operand: u32) -> Option<u8> {
    (insn.op_kind(operand) == OpKind::Register && insn.op_register(operand).is_segment_register())
        .then(|| segment_number(insn.op_register(operand)) as u8)
}

fn lower_mov(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    if let Some(index) = segment_operand(insn, 0) {
        if usize::from(index) == CS {
            return Some(control::invalid(uop));
        }
        uop.op = index;
        if !uop.mem {
            uop.src = gpr(insn.op1_register());
        }
        uop.size = 2;
        uop.ends = true;
        return Some(mov_to_segment);
    }
    if let Some(index) = segment_operand(insn, 1) {
        uop.op = index;
        uop.size = operand_size(insn, 0);
        if !uop.mem {
            uop.dst = gpr(insn.op0_register());
        } else {
            uop.size = 2;
        }
        return Some(mov_from_segment);
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if to.is_cr() {
        uop.op = to.number() as u8;
        uop.src = gpr(from);
        uop.ends = true;
        return Some(if matches!(uop.op, 0 | 2 | 3 | 4 | 8) {
            mov_to_cr
        } else {
            control::invalid(uop)
        });
    }
    if from.is_cr() {
        uop.op = from.number() as u8;
        uop.dst = gpr(to);
        return Some(if matches!(uop.op, 0 | 2 | 3 | 4 | 8) {
            mov_from_cr
        } else {
            control::invalid(uop)
        });
    }
    if to.is_dr() || from.is_dr() {
        let write = to.is_dr();
        uop.op = if write { to.number() } else { from.number() } as u8;
        uop.rep = if write { 0xff } else { 0 };
        uop.src = gpr(from);
        uop.dst = gpr(to);
        uop.ends = true;
        return Some(mov_dr);
    }
    None
}

fn lower_io(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::In | Mnemonic::Out => {
            let input = insn.mnemonic() == Mnemonic::In;
            let (data, port) = if input { (0, 1) } else { (1, 0) };
            uop.size = operand_size(insn, data);
            uop.op = u8::from(input);
            if let Some(number) = immediate(insn, port) {
                uop.imm = number;
                uop.op |= 2;
            }
            uop.ends = true;
            Some(port_io)
        }
        Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => {
            (uop.op, uop.size) = match insn.mnemonic() {
                Mnemonic::Insb => (1, 1),
                Mnemonic::Insw => (1, 2),
                Mnemonic::Insd => (1, 4),
                Mnemonic::Outsb => (0, 1),
                Mnemonic::Outsw => (0, 2),
                _ => (0, 4),
            };
            uop.asize = crate::cpu::decode::address_size(insn, mode);
            uop.segment = segment_number(insn.memory_segment()) as u8;
            uop.ends = true;
            Some(string_io)
        }
        _ => None,
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    let bits = bitness(mode);
    let ending = |uop: &mut Uop, handler: Handler| {
        uop.ends = true;
        Some(handler)
    };
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Mov => lower_mov(insn, uop),
        Mnemonic::Push | Mnemonic::Pop => {
            uop.op = segment_operand(insn, 0)?;
            uop.size = match insn.stack_pointer_increment().unsigned_abs() {
                2 => 2,
                4 => 4,
                8 => 8,
                _ => (bits / 8) as u8,
            };
            if mnemonic == Mnemonic::Push {
                Some(push_segment)
            } else {
                ending(uop, pop_segment)
            }
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            uop.op = match mnemonic {
                Mnemonic::Lds => DS,
                Mnemonic::Les => ES,
                Mnemonic::Lfs => FS,
                Mnemonic::Lgs => GS,
                _ => SS,
            } as u8;
            uop.size = operand_size(insn, 0);
            uop.dst = gpr(insn.op0_register());
            ending(uop, load_pointer)
        }
        Mnemonic::Clts => ending(uop, clts),
        Mnemonic::Lmsw => {
            if !uop.mem {
                uop.src = gpr(insn.op0_register());
            }
            ending(uop, lmsw)
        }
        Mnemonic::Smsw | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Lldt | Mnemonic::Ltr => {
            if uop.mem {
                uop.size = 2;
            } else {
                uop.size = operand_size(insn, 0);
                uop.dst = gpr(insn.op0_register());
                uop.src = uop.dst;
            }
            uop.op = match mnemonic {
                Mnemonic::Smsw => return Some(smsw),
                Mnemonic::Sldt => 0,
                Mnemonic::Str => 1,
                Mnemonic::Lldt => 2,
                _ => 3,
            };
            ending(uop, system_segment)
        }
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt => {
            uop.op = match mnemonic {
                Mnemonic::Sgdt => 0,
                Mnemonic::Sidt => 1,
                Mnemonic::Lgdt => 2,
                _ => 3,
            };
            uop.size = match insn.code() {
                _ if bits == 64 => 8,
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
                _ => 4,
            };
            ending(uop, table)
        }
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw => {
            uop.op = match mnemonic {
                Mnemonic::Lar => 0,
                Mnemonic::Lsl => 1,
                Mnemonic::Verr => 2,
                _ => 3,
            };
            let source = if uop.op < 2 { 1 } else { 0 };
            if uop.op < 2 {
                uop.dst = gpr(insn.op0_register());
                uop.size = operand_size(insn, 0);
            }
            if !uop.mem {
                uop.src = gpr(insn.op_register(source));
            }
            Some(probe_segment)
        }
        Mnemonic::Rdmsr => Some(rdmsr),
        Mnemonic::Wrmsr => ending(uop, wrmsr),
        Mnemonic::Cpuid => ending(uop, cpuid),
        Mnemonic::Rdtsc => Some(rdtsc),
        Mnemonic::Rdtscp => {
            uop.op = 1;
            Some(rdtsc)
        }
        Mnemonic::Rdpid => {
            uop.dst = gpr(insn.op0_register());
            Some(rdpid)
        }
        Mnemonic::Rdpmc => Some(rdpmc),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            uop.op = u8::from(mnemonic == Mnemonic::Rdseed);
            uop.dst = gpr(insn.op0_register());
            Some(match operand_size(insn, 0) {
                2 => random::<u16>,
                4 => random::<u32>,
                _ => random::<u64>,
            })
        }
        Mnemonic::Int => {
            uop.imm = u64::from(insn.immediate8());
            ending(uop, int_n)
        }
        Mnemonic::Int3 => ending(uop, int3),
        Mnemonic::Int1 => ending(uop, int1),
        Mnemonic::Into => ending(uop, into),
        Mnemonic::Syscall => ending(uop, syscall),
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            uop.size = if insn.code() == Code::Sysretq { 8 } else { 4 };
            ending(uop, sysret)
        }
        Mnemonic::Sysenter => ending(uop, sysenter),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            uop.size = if insn.code() == Code::Sysexitq { 8 } else { 4 };
            ending(uop, sysexit)
        }
        Mnemonic::Swapgs => Some(swapgs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            uop.op = match mnemonic {
                Mnemonic::Rdfsbase => 0,
                Mnemonic::Rdgsbase => 1,
                Mnemonic::Wrfsbase => 2,
                _ => 3,
            };
            uop.dst = gpr(insn.op0_register());
            uop.src = uop.dst;
            Some(if operand_size(insn, 0) == 4 {
                fsgsbase::<u32>
            } else {
                fsgsbase::<u64>
            })
        }
        Mnemonic::Hlt => ending(uop, hlt),
        Mnemonic::Pause => ending(uop, pause),
        Mnemonic::Monitor
        | Mnemonic::Mwait
        | Mnemonic::Umonitor
        | Mnemonic::Umwait
        | Mnemonic::Tpause => {
            uop.op = match mnemonic {
                Mnemonic::Monitor => 0,
                Mnemonic::Mwait => 1,
                Mnemonic::Umonitor => 2,
                Mnemonic::Umwait => 3,
                _ => 4,
            };
            uop.segment = segment_number(insn.segment_prefix()) as u8;
            ending(uop, monitor)
        }
        Mnemonic::Invd => Some(invalidate_caches),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => {
            uop.op = 1;
            Some(invalidate_caches)
        }
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => {
            uop.size = 1;
            Some(flush_line)
        }
        Mnemonic::Lfence | Mnemonic::Sfence | Mnemonic::Mfence | Mnemonic::Serialize => Some(fence),
        Mnemonic::Invlpg => {
            uop.size = 1;
            ending(uop, invlpg)
        }
        Mnemonic::Invpcid => {
            uop.src = gpr(insn.op0_register());
            uop.size = 16;
            ending(uop, invpcid)
        }
        Mnemonic::Movdiri | Mnemonic::Movnti => {
            uop.src = gpr(insn.op1_register());
            uop.size = operand_size(insn, 0);
            Some(direct_store)
        }
        Mnemonic::Movdir64b => {
            uop.dst = gpr(insn.op0_register());
            uop.asize = operand_size(insn, 0);
            uop.size = 64;
            Some(direct_line)
        }
        Mnemonic::Rdpkru => ending(uop, rdpkru),
        Mnemonic::Wrpkru => {
            uop.op = 1;
            ending(uop, rdpkru)
        }
        Mnemonic::Xgetbv => Some(xgetbv),
        Mnemonic::Xsetbv => ending(uop, xsetbv),
        Mnemonic::Bound => {
            uop.dst = gpr(insn.op0_register());
            uop.size = operand_size(insn, 0);
            Some(bound)
        }
        Mnemonic::Arpl => {
            uop.src = gpr(insn.op1_register());
            uop.dst = gpr(insn.op0_register());
            uop.size = 2;
            Some(arpl)
        }
        _ => lower_io(insn, uop, mode),
    }
}
