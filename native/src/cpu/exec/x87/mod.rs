//! The x87 unit (SDM volume 1, chapter 8): [`stack`] is its register file, the rest its instruction families.

pub mod arith;
pub mod control;
pub mod load;
pub mod partial;
pub mod stack;

use iced_x86::{Instruction, MemorySize, OpKind};

use crate::cpu::decode::mode;
use crate::cpu::exec::control as branch;
use crate::cpu::state::{Cpu, Stop, StopKind};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

/// What a memory operand holds (`Uop::size` is its width in bytes).
pub mod kind {
    pub const FLOAT: u8 = 0;
    pub const INTEGER: u8 = 1;
    pub const BCD: u8 = 2;
}

/// Runs an instruction that waits for pending exceptions and notes where it is.
#[inline(always)]
pub fn waiting(
    cpu: &mut Cpu,
    ip: Ip<'_>,
    body: impl FnOnce(&mut Cpu, &Uop) -> Result<(), Stop>,
) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let at = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u64::from(u.at)));
        let before = cpu.ext.x87.ip;
        cpu.ext.x87.ip = at;
        match body(cpu, u) {
            Ok(()) if cpu.ext.x87.pending() => cpu.note_x87_operand(u),
            Ok(()) => Ok(()),
            Err(stop) => {
                cpu.ext.x87.ip = before;
                Err(stop)
            }
        }
    })
}

impl Cpu {
    /// The last opcode and data pointer are kept only of instructions with an unmasked exception (CPUID.7.EBX[6], and
    /// IA32_MISC_ENABLE without fopcode compatibility).
    #[cold]
    #[inline(never)]
    fn note_x87_operand(&mut self, u: &Uop) -> Result<(), Stop> {
        let at = self.ext.x87.ip;
        let mut code = [0; 15];
        let code = &mut code[..usize::from(u.next - u.at).min(15)];
        let linear = if self.long {
            at
        } else {
            at.wrapping_add(self.seg[crate::cpu::state::CS].base) & 0xffff_ffff
        };
        // The bytes were fetched a moment ago; if they cannot be read as data the opcode stays what it was.
        if self.read_linear(linear, code).is_ok() {
            if let Some(first) = code.iter().position(|byte| byte & 0xf8 == 0xd8) {
                let second = code.get(first + 1).copied().unwrap_or(0);
                self.ext.x87.opcode = u16::from(code[first] & 7) << 8 | u16::from(second);
            }
        }
        self.stop = StopKind::None;
        if u.mem {
            self.ext.x87.dp = self.offset(u);
        }
        Ok(())
    }
}

fn memory_kind(insn: &Instruction) -> u8 {
    match insn.memory_size() {
        MemorySize::Int16 | MemorySize::Int32 | MemorySize::Int64 => kind::INTEGER,
        MemorySize::Bcd => kind::BCD,
        _ => kind::FLOAT,
    }
}

/// Number of the ST register that operand `n` is.
fn st(insn: &Instruction, n: u32) -> u8 {
    if n < insn.op_count() && insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_st() {
        insn.op_register(n).number() as u8
    } else {
        0
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    use iced_x86::Mnemonic as M;
    let mut own = *uop;
    own.dst = st(insn, 0);
    own.src = st(insn, 1);
    if own.mem {
        own.size = insn.memory_size().size() as u8;
    }
    let handler = arith::lower(insn, &mut own)
        .or_else(|| load::lower(insn, &mut own))
        .or_else(|| partial::lower(insn, &mut own))
        .or_else(|| control::lower(insn, &mut own))?;
    *uop = own;
    let trapped = match insn.mnemonic() {
        M::Wait => mode & mode::TS != 0 && mode & mode::MP != 0,
        M::Emms if mode & mode::EM != 0 => return Some(branch::invalid(uop)),
        _ => mode & (mode::TS | mode::EM) != 0,
    };
    if trapped {
        return Some(branch::unavailable(uop));
    }
    Some(handler)
}
