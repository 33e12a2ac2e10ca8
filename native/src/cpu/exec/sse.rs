//! SSE moves and logic, what compiled integer code and memory routines use most; the rest is in [`super::vector`].

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::cpu::decode::{gpr, mode, operand_size};
use crate::cpu::exec::control;
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

impl Cpu {
    /// 16 bytes of memory; `aligned`: #GP unless the address is.
    #[inline]
    pub fn load128(&mut self, at: u64, aligned: bool) -> Result<u128, Stop> {
        if at & 15 != 0 && aligned {
            return Err(self.gp(0));
        }
        if at & 0xfff > 0xff0 {
            let mut bytes = [0; 16];
            self.read_linear(at, &mut bytes)?;
            return Ok(u128::from_le_bytes(bytes));
        }
        let low = self.load::<u64>(at)?;
        let high = self.load::<u64>(at.wrapping_add(8))?;
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    #[inline]
    pub fn store128(&mut self, at: u64, value: u128, aligned: bool) -> Result<(), Stop> {
        if at & 15 != 0 && aligned {
            return Err(self.gp(0));
        }
        if at & 0xfff > 0xff0 {
            return self.write_linear(at, &value.to_le_bytes());
        }
        self.store::<u64>(at, value as u64)?;
        self.store::<u64>(at.wrapping_add(8), (value >> 64) as u64)
    }
}

/// Source operand: an XMM register or memory of `u.size` bytes, zero-extended. `op` bit 7: memory must be aligned.
fn source(cpu: &mut Cpu, u: &Uop) -> Result<u128, Stop> {
    if !u.mem {
        return Ok(cpu.ext.xmm[usize::from(u.src & 15)]);
    }
    let at = cpu.ea(u)?;
    match u.size {
        4 => cpu.load::<u32>(at).map(u128::from),
        8 => cpu.load::<u64>(at).map(u128::from),
        _ => cpu.load128(at, u.op & 0x80 != 0),
    }
}

/// Whole-register moves: load or register.
fn move_in(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = source(cpu, u)?;
        cpu.ext.xmm[usize::from(u.dst & 15)] = value;
        Ok(())
    })
}

fn move_out(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let value = cpu.ext.xmm[usize::from(u.src & 15)];
        match u.size {
            4 => cpu.store::<u32>(at, value as u32),
            8 => cpu.store::<u64>(at, value as u64),
            _ => cpu.store128(at, value, u.op & 0x80 != 0),
        }
    })
}

/// MOVSS, MOVSD between registers: the low part only.
fn move_low(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mask = if u.size == 4 {
            0xffff_ffff
        } else {
            u64::MAX.into()
        };
        let value = cpu.ext.xmm[usize::from(u.src & 15)];
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = *into & !mask | value & mask;
        Ok(())
    })
}

/// MOVD, MOVQ from a general register or memory.
fn from_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load_sized(at, u.size.into())?
        } else if u.size == 4 {
            cpu.gpr[usize::from(u.src)] & 0xffff_ffff
        } else {
            cpu.gpr[usize::from(u.src)]
        };
        cpu.ext.xmm[usize::from(u.dst & 15)] = value.into();
        Ok(())
    })
}

fn to_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.ext.xmm[usize::from(u.src & 15)] as u64;
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.store_sized(at, value, u.size.into());
        }
        if u.size == 4 {
            u32::set(cpu, u.dst, value as u32);
        } else {
            cpu.gpr[usize::from(u.dst)] = value;
        }
        Ok(())
    })
}

/// MOVLPS/PD, MOVHPS/PD, MOVLHPS, MOVHLPS: one half. `imm` bit 0: high half of the destination, bit 1: high half of
/// the source.
fn half(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u64>(at)?
        } else {
            let from = cpu.ext.xmm[usize::from(u.src & 15)];
            (if u.imm & 2 != 0 { from >> 64 } else { from }) as u64
        };
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = if u.imm & 1 != 0 {
            *into & u128::from(u64::MAX) | u128::from(value) << 64
        } else {
            *into >> 64 << 64 | u128::from(value)
        };
        Ok(())
    })
}

fn half_out(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let value = cpu.ext.xmm[usize::from(u.src & 15)];
        cpu.store::<u64>(
            at,
            (if u.imm & 2 != 0 { value >> 64 } else { value }) as u64,
        )
    })
}

/// PXOR, PAND, PANDN, POR and their floating-point names.
fn logic(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let into = &mut cpu.ext.xmm[usize::from(u.dst & 15)];
        *into = match u.imm {
            0 => *into ^ b,
            1 => *into & b,
            2 => !*into & b,
            _ => *into | b,
        };
        Ok(())
    })
}

/// LDMXCSR (`op` 0) and STMXCSR.
fn mxcsr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if u.op != 0 {
            let value = cpu.ext.mxcsr;
            return cpu.store::<u32>(at, value);
        }
        let value = cpu.load::<u32>(at)?;
        if value & !crate::cpu::ext::MXCSR_MASK != 0 {
            return Err(cpu.gp(0));
        }
        cpu.ext.mxcsr = value;
        Ok(())
    })
}

fn xmm(register: Register) -> u8 {
    register.number() as u8
}

/// What `mode` says about using SSE at all: a handler that raises instead.
pub fn gate(uop: &mut Uop, mode: u32) -> Option<Handler> {
    if mode & mode::SSE_UD != 0 {
        return Some(control::invalid(uop));
    }
    (mode & mode::TS != 0).then(|| control::unavailable(uop))
}

fn is_xmm(insn: &Instruction, operand: u32) -> bool {
    insn.op_kind(operand) == OpKind::Register && insn.op_register(operand).is_xmm()
}

fn lower_moves(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    let aligned = matches!(
        insn.mnemonic(),
        Mnemonic::Movaps
            | Mnemonic::Movapd
            | Mnemonic::Movdqa
            | Mnemonic::Movntps
            | Mnemonic::Movntpd
            | Mnemonic::Movntdq
    );
    uop.op = if aligned { 0x80 } else { 0 };
    if insn.op0_kind() == OpKind::Memory {
        uop.src = xmm(insn.op1_register());
        return Some(move_out);
    }
    uop.dst = xmm(insn.op0_register());
    if !uop.mem {
        uop.src = xmm(insn.op1_register());
    }
    Some(move_in)
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    let mnemonic = insn.mnemonic();
    let handler: Handler = match mnemonic {
        Mnemonic::Movaps
        | Mnemonic::Movapd
        | Mnemonic::Movups
        | Mnemonic::Movupd
        | Mnemonic::Movdqa
        | Mnemonic::Movdqu
        | Mnemonic::Lddqu
        | Mnemonic::Movntps
        | Mnemonic::Movntpd
        | Mnemonic::Movntdq => {
            uop.size = 16;
            lower_moves(insn, uop)?
        }
        Mnemonic::Movss | Mnemonic::Movsd if !insn.is_string_instruction() => {
            uop.size = if mnemonic == Mnemonic::Movss { 4 } else { 8 };
            let between = is_xmm(insn, 0) && is_xmm(insn, 1);
            let handler = lower_moves(insn, uop)?;
            if between {
                move_low
            } else {
                handler
            }
        }
        Mnemonic::Movd | Mnemonic::Movq => {
            if !is_xmm(insn, 0) && !is_xmm(insn, 1) {
                // MMX.
                return None;
            }
            if is_xmm(insn, 0) && is_xmm(insn, 1) {
                // MOVQ xmm, xmm: the upper half is cleared.
                uop.dst = xmm(insn.op0_register());
                uop.src = xmm(insn.op1_register());
                uop.imm = 0;
                movq
            } else if is_xmm(insn, 0) {
                uop.dst = xmm(insn.op0_register());
                if !uop.mem {
                    uop.src = gpr(insn.op1_register());
                }
                uop.size = operand_size(insn, 1);
                from_gpr
            } else {
                uop.src = xmm(insn.op1_register());
                if !uop.mem {
                    uop.dst = gpr(insn.op0_register());
                }
                uop.size = operand_size(insn, 0);
                to_gpr
            }
        }
        Mnemonic::Movlps
        | Mnemonic::Movlpd
        | Mnemonic::Movhps
        | Mnemonic::Movhpd
        | Mnemonic::Movlhps
        | Mnemonic::Movhlps => {
            let high = matches!(mnemonic, Mnemonic::Movhps | Mnemonic::Movhpd);
            uop.size = 8;
            if insn.op0_kind() == OpKind::Memory {
                uop.src = xmm(insn.op1_register());
                uop.imm = if high { 2 } else { 0 };
                half_out
            } else {
                uop.dst = xmm(insn.op0_register());
                uop.imm = u64::from(high || mnemonic == Mnemonic::Movlhps);
                if !uop.mem {
                    uop.src = xmm(insn.op1_register());
                    if mnemonic == Mnemonic::Movhlps {
                        uop.imm = 2;
                    }
                }
                half
            }
        }
        Mnemonic::Pxor
        | Mnemonic::Xorps
        | Mnemonic::Xorpd
        | Mnemonic::Pand
        | Mnemonic::Andps
        | Mnemonic::Andpd
        | Mnemonic::Pandn
        | Mnemonic::Andnps
        | Mnemonic::Andnpd
        | Mnemonic::Por
        | Mnemonic::Orps
        | Mnemonic::Orpd => {
            if !is_xmm(insn, 0) {
                return None;
            }
            uop.imm = match mnemonic {
                Mnemonic::Pxor | Mnemonic::Xorps | Mnemonic::Xorpd => 0,
                Mnemonic::Pand | Mnemonic::Andps | Mnemonic::Andpd => 1,
                Mnemonic::Pandn | Mnemonic::Andnps | Mnemonic::Andnpd => 2,
                _ => 3,
            };
            uop.size = 16;
            uop.op = 0x80;
            uop.dst = xmm(insn.op0_register());
            if !uop.mem {
                uop.src = xmm(insn.op1_register());
            }
            logic
        }
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => {
            uop.op = u8::from(mnemonic == Mnemonic::Stmxcsr);
            uop.size = 4;
            mxcsr
        }
        _ => return None,
    };
    Some(gate(uop, mode).unwrap_or(handler))
}

fn movq(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.ext.xmm[usize::from(u.src & 15)] & u128::from(u64::MAX);
        cpu.ext.xmm[usize::from(u.dst & 15)] = value;
        Ok(())
    })
}
