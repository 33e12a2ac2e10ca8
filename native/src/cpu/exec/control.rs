//! Jumps, calls, returns, loops; and the end of a block.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::cpu::decode::{bitness, gpr, mode, operand_size};
use crate::cpu::exec::mov::condition_of;
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop, StopKind, RCX, RSP};
use crate::cpu::uop::{last, Flow, Handler, Ip, Uop};
use crate::cpu::way::Fast;

/// `Uop::alu` of a conditional jump.
pub const BRANCH: u8 = 0xfe;

/// The end of a block that no branch closes.
pub fn close(_cpu: &mut Cpu, _ip: Ip<'_>) -> Flow {
    Flow::Next
}

/// An instruction this processor does not have: #UD, counted and named.
pub fn undefined(uop: &mut Uop) -> Handler {
    uop.ends = true;
    raise_undefined
}

fn raise_undefined(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        cpu.note_undefined(u);
        Err(cpu.ud())
    })
}

/// #UD by design (UD0, UD1, UD2, and instructions that are off): not counted as missing.
pub fn invalid(uop: &mut Uop) -> Handler {
    uop.ends = true;
    raise_invalid
}

fn raise_invalid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| Err(cpu.ud()))
}

/// #NM: the x87 or SSE state is not available (CR0.TS).
pub fn unavailable(uop: &mut Uop) -> Handler {
    uop.ends = true;
    raise_unavailable
}

fn raise_unavailable(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| Err(cpu.raise(7, None)))
}

fn escape(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        cpu.stop = StopKind::Escape { hook: u.imm as u16 };
        Err(crate::cpu::state::Stop)
    })
}

fn jmp(_cpu: &mut Cpu, _ip: Ip<'_>) -> Flow {
    Flow::Taken
}

fn jcc<const C: u8>(cpu: &mut Cpu, _ip: Ip<'_>) -> Flow {
    if cpu.cc.cond::<C>() {
        Flow::Taken
    } else {
        Flow::Next
    }
}

fn jcc_handler(code: u8) -> Handler {
    match code {
        0 => jcc::<0>,
        1 => jcc::<1>,
        2 => jcc::<2>,
        3 => jcc::<3>,
        4 => jcc::<4>,
        5 => jcc::<5>,
        6 => jcc::<6>,
        7 => jcc::<7>,
        8 => jcc::<8>,
        9 => jcc::<9>,
        10 => jcc::<10>,
        11 => jcc::<11>,
        12 => jcc::<12>,
        13 => jcc::<13>,
        14 => jcc::<14>,
        _ => jcc::<15>,
    }
}

/// JCXZ family (`op` 0) and LOOP (1), LOOPE (2), LOOPNE (3).
fn jcxz(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    let u = ip.op();
    let mask = match u.asize {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    if u.op == 0 {
        return if cpu.gpr[RCX] & mask == 0 {
            Flow::Taken
        } else {
            Flow::Next
        };
    }
    let count = cpu.gpr[RCX].wrapping_sub(1) & mask;
    match u.asize {
        2 => u16::set(cpu, RCX as u8, count as u16),
        _ => cpu.gpr[RCX] = count,
    }
    let go = match u.op {
        1 => true,
        2 => cpu.cc.zf(),
        _ => !cpu.cc.zf(),
    };
    if count != 0 && go {
        Flow::Taken
    } else {
        Flow::Next
    }
}

fn call_near<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    let back = T::from64(cpu.ip_after(ip.op()));
    match cpu.push_by::<T, Fast>(back) {
        Ok(()) => Flow::Taken,
        Err(Stop) => call_slow::<T>(cpu, ip),
    }
}

#[cold]
#[inline(never)]
fn call_slow<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let back = cpu.ip_after(u);
        cpu.push::<T>(T::from64(back))?;
        Ok(Flow::Taken)
    })
}

/// RET in 64-bit mode without an immediate: the frequent one.
fn ret_quick(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    let rsp = cpu.gpr[RSP];
    if let Ok(to) = cpu.load_fast::<u64>(rsp) {
        if cpu.target_ok(to) {
            cpu.gpr[RSP] = rsp.wrapping_add(8);
            cpu.rip = to;
            return Flow::Jump;
        }
    }
    ret_near::<u64>(cpu, ip)
}

#[inline(never)]
fn ret_near<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let rsp = cpu.gpr[RSP];
        let to = cpu.pop::<T>()?.to64();
        if !cpu.target_ok(to) {
            cpu.gpr[RSP] = rsp;
            return Err(cpu.gp(0));
        }
        if u.imm != 0 {
            let rsp = cpu.gpr[RSP].wrapping_add(u.imm);
            cpu.set_rsp(rsp);
        }
        cpu.rip = to;
        Ok(Flow::Jump)
    })
}

/// JMP and CALL through a register or memory.
fn indirect<T: Int, const CALL: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let to = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<T>(at)?
        } else {
            T::get(cpu, u.src)
        }
        .to64();
        if !cpu.target_ok(to) {
            return Err(cpu.gp(0));
        }
        if CALL {
            let back = cpu.ip_after(u);
            cpu.push::<T>(T::from64(back))?;
        }
        cpu.rip = to;
        Ok(Flow::Jump)
    })
}

impl Cpu {
    /// A near branch target: canonical in 64-bit mode, within CS's limit otherwise.
    #[inline(always)]
    pub fn target_ok(&self, to: u64) -> bool {
        if self.long {
            let shift = if self.cr4 & crate::cpu::state::cr4::LA57 != 0 {
                7
            } else {
                16
            };
            ((to << shift) as i64 >> shift) as u64 == to
        } else {
            to <= u64::from(self.seg[crate::cpu::state::CS].limit)
        }
    }
}

/// Far JMP, CALL, RET and IRET: see `segment` and `exception`.
fn far_direct(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let (offset, selector) = (u.imm, u.disp as u16);
        cpu.far_branch(u, selector, offset, u.op == 1)?;
        Ok(Flow::Jump)
    })
}

fn far_memory(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let offset = cpu.load_sized(at, u.size.into())?;
        let selector = cpu.load::<u16>(at.wrapping_add(u64::from(u.size)))?;
        cpu.far_branch(u, selector, offset, u.op == 1)?;
        Ok(Flow::Jump)
    })
}

fn far_return(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        cpu.ret_far(u.size, u.imm)?;
        Ok(Flow::Jump)
    })
}

fn iret(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        cpu.iret(u.size)?;
        cpu.partial = u32::from(u.n) + 1;
        cpu.stop = StopKind::Sync;
        Ok(Flow::Stop)
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    let bits = bitness(mode);
    // Operand size of near branches: 64 bits in 64-bit mode whatever the prefixes say.
    let near = if bits == 64 {
        8
    } else {
        operand_size_of_branch(insn, bits)
    };
    macro_rules! near {
        ($handler:ident $(, $arg:tt)*) => {
            match near {
                2 => $handler::<u16 $(, $arg)*> as Handler,
                4 => $handler::<u32 $(, $arg)*>,
                _ => $handler::<u64 $(, $arg)*>,
            }
        };
    }
    let handler = match insn.mnemonic() {
        Mnemonic::Jmp if insn.is_jmp_short_or_near() => jmp,
        Mnemonic::Call if insn.is_call_near() => near!(call_near),
        Mnemonic::Jmp | Mnemonic::Call
            if insn.is_jmp_near_indirect() || insn.is_call_near_indirect() =>
        {
            if uop.mem {
                uop.size = near;
            } else {
                uop.src = gpr(insn.op0_register());
            }
            if insn.mnemonic() == Mnemonic::Call {
                near!(indirect, true)
            } else {
                near!(indirect, false)
            }
        }
        Mnemonic::Jmp | Mnemonic::Call => {
            uop.op = u8::from(insn.mnemonic() == Mnemonic::Call);
            if uop.mem {
                uop.size = operand_size(insn, 0).saturating_sub(2);
                far_memory
            } else {
                let wide = matches!(insn.code(), Code::Jmp_ptr1632 | Code::Call_ptr1632);
                uop.size = if wide { 4 } else { 2 };
                uop.disp = u64::from(insn.far_branch_selector());
                uop.imm = if wide {
                    insn.far_branch32().into()
                } else {
                    insn.far_branch16().into()
                };
                far_direct
            }
        }
        Mnemonic::Ret => {
            uop.imm = if insn.op_count() > 0 {
                u64::from(insn.immediate16())
            } else {
                0
            };
            if near == 8 && uop.imm == 0 {
                ret_quick
            } else {
                near!(ret_near)
            }
        }
        Mnemonic::Retf => {
            uop.imm = if insn.op_count() > 0 {
                u64::from(insn.immediate16())
            } else {
                0
            };
            uop.size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            far_return
        }
        Mnemonic::Iret => {
            uop.size = 2;
            iret
        }
        Mnemonic::Iretd => {
            uop.size = 4;
            iret
        }
        Mnemonic::Iretq => {
            uop.size = 8;
            iret
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            uop.asize = match insn.mnemonic() {
                Mnemonic::Jcxz => 2,
                Mnemonic::Jecxz => 4,
                _ => 8,
            };
            uop.op = 0;
            jcxz
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            uop.asize = match insn.code() {
                Code::Loop_rel8_16_CX
                | Code::Loop_rel8_32_CX
                | Code::Loope_rel8_16_CX
                | Code::Loope_rel8_32_CX
                | Code::Loopne_rel8_16_CX
                | Code::Loopne_rel8_32_CX => 2,
                Code::Loop_rel8_16_ECX
                | Code::Loop_rel8_32_ECX
                | Code::Loop_rel8_64_ECX
                | Code::Loope_rel8_16_ECX
                | Code::Loope_rel8_32_ECX
                | Code::Loope_rel8_64_ECX
                | Code::Loopne_rel8_16_ECX
                | Code::Loopne_rel8_32_ECX
                | Code::Loopne_rel8_64_ECX => 4,
                _ => 8,
            };
            uop.op = match insn.mnemonic() {
                Mnemonic::Loop => 1,
                Mnemonic::Loope => 2,
                _ => 3,
            };
            jcxz
        }
        Mnemonic::Ud0 | Mnemonic::Ud2 => return Some(invalid(uop)),
        Mnemonic::Ud1 => {
            // The escape of Python guests: 0F B9 /0 with a bare disp32 0x54445800 | n (ModRM 05).
            let absolute = insn.op1_kind() == iced_x86::OpKind::Memory
                && insn.len() == 7
                && insn.memory_displ_size() >= 4
                && insn.memory_index() == iced_x86::Register::None;
            let relative = insn.memory_base() == iced_x86::Register::RIP;
            let disp = if relative {
                insn.memory_displacement64().wrapping_sub(insn.next_ip()) as u32
            } else {
                insn.memory_displacement64() as u32
            };
            if mode & mode::ESCAPE == 0 || !absolute || disp >> 8 != 0x54_4458 {
                return Some(invalid(uop));
            }
            uop.imm = u64::from(disp & 0xff);
            escape
        }
        _ if insn.is_jcc_short_or_near() => {
            uop.op = condition_of(insn);
            uop.alu = BRANCH;
            jcc_handler(uop.op)
        }
        _ => return None,
    };
    uop.ends = true;
    Some(handler)
}

fn operand_size_of_branch(insn: &Instruction, bits: u32) -> u8 {
    use iced_x86::OpKind;
    match insn.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ if insn.op_count() == 0 => (bits / 8) as u8,
        _ => match insn.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            OpKind::Register | OpKind::Memory => operand_size(insn, 0),
            _ => (bits / 8) as u8,
        },
    }
}
