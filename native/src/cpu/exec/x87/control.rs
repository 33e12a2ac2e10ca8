//! Control words, environments, and the empty operations.

use iced_x86::{Instruction, Mnemonic};

use super::waiting;
use crate::cpu::ext::X87;
use crate::cpu::float::flag;
use crate::cpu::state::{Cpu, Stop, RAX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

const FNINIT: u8 = 0;
const FNCLEX: u8 = 1;
const FNSTCW: u8 = 2;
const FNSTSW: u8 = 3;
const FNSTSW_AX: u8 = 4;

/// What does not look at pending exceptions.
fn quiet(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        match u.op {
            FNINIT => initialise(cpu),
            FNCLEX => cpu.ext.x87.status &= 0x7f00,
            FNSTCW => {
                let at = cpu.ea(u)?;
                let value = cpu.ext.x87.control;
                cpu.store::<u16>(at, value)?;
            }
            FNSTSW => {
                let at = cpu.ea(u)?;
                let value = cpu.ext.x87.status_word();
                cpu.store::<u16>(at, value)?;
            }
            FNSTSW_AX => {
                let value = cpu.ext.x87.status_word();
                cpu.gpr[RAX] = cpu.gpr[RAX] & !0xffff | u64::from(value);
            }
            // FNDISI, FNENI, FNSETPM: of the 8087 and 80287, and nothing since.
            _ => {}
        }
        Ok(())
    })
}

/// The registers keep their contents, and are empty.
fn initialise(cpu: &mut Cpu) {
    let regs = cpu.ext.x87.regs;
    cpu.ext.x87 = X87 {
        regs,
        ..X87::default()
    };
}

/// FWAIT.
fn wait(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| cpu.x87_wait())
}

fn emms(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        cpu.x87_wait()?;
        cpu.ext.x87.top = 0;
        cpu.ext.x87.valid = 0;
        Ok(())
    })
}

/// FLDCW.
fn load_control(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let at = cpu.ea(u)?;
        let value = cpu.load::<u16>(at)?;
        set_control(cpu, value);
        Ok(())
    })
}

fn set_control(cpu: &mut Cpu, value: u16) {
    cpu.ext.x87.control = value & 0x1f7f | 0x40;
    cpu.ext.x87.summarise();
}

/// Environment of the operand size: 14 or 28 bytes.
fn environment(cpu: &Cpu, wide: bool) -> Vec<u8> {
    let x87 = &cpu.ext.x87;
    let (control, status, tags) = (x87.control, x87.status_word(), x87.tags());
    let mut out = Vec::with_capacity(28);
    if wide {
        // The upper halves of the 32-bit form read as ones; the selectors as zero (CPUID.7.EBX[13]).
        for word in [control, status, tags] {
            out.extend_from_slice(&(0xffff_0000 | u32::from(word)).to_le_bytes());
        }
        out.extend_from_slice(&(x87.ip as u32).to_le_bytes());
        out.extend_from_slice(&(u32::from(x87.opcode) << 16).to_le_bytes());
        out.extend_from_slice(&(x87.dp as u32).to_le_bytes());
        out.extend_from_slice(&0xffff_0000u32.to_le_bytes());
    } else {
        for word in [control, status, tags, x87.ip as u16, 0, x87.dp as u16, 0] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
    out
}

fn set_environment(cpu: &mut Cpu, bytes: &[u8]) {
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 2)) << 16;
    let wide = bytes.len() == 28;
    let stride = if wide { 4 } else { 2 };
    let x87 = &mut cpu.ext.x87;
    x87.set_status_word(half(stride));
    x87.set_tags(half(2 * stride));
    if wide {
        x87.ip = word(12);
        x87.opcode = half(18) & 0x7ff;
        x87.dp = word(20);
    } else {
        x87.ip = half(6).into();
        x87.dp = half(10).into();
    }
    set_control(cpu, half(0));
}

/// FNSTENV (`op` 0), FNSAVE (1).
fn store_environment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let mut bytes = environment(cpu, u.size != 14 && u.size != 94);
        if u.op == 1 {
            for n in 0..8 {
                let (sig, exponent) = cpu.ext.x87.st(n);
                bytes.extend_from_slice(&sig.to_le_bytes());
                bytes.extend_from_slice(&exponent.to_le_bytes());
            }
        }
        // The two ends are probed; so a fault of the second page has the address of the last byte.
        cpu.check_write(at, 1)?;
        cpu.check_write(at.wrapping_add(bytes.len() as u64 - 1), 1)?;
        cpu.write_linear(at, &bytes)?;
        if u.op == 1 {
            initialise(cpu);
        } else {
            cpu.ext.x87.control |= flag::ALL;
            cpu.ext.x87.summarise();
        }
        Ok(())
    })
}

/// FLDENV (`op` 0), FRSTOR (1).
fn load_environment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let at = cpu.ea(u)?;
        let mut bytes = [0; 108];
        let size = usize::from(u.size).min(108);
        cpu.read_linear(at, &mut bytes[..size])?;
        let head = if size == 14 || size == 94 { 14 } else { 28 };
        set_environment(cpu, &bytes[..head]);
        if u.op == 1 {
            restore_registers(cpu, &bytes[head..size]);
        }
        Ok(())
    })
}

fn restore_registers(cpu: &mut Cpu, bytes: &[u8]) {
    let x87 = &mut cpu.ext.x87;
    for (n, register) in bytes.chunks_exact(10).enumerate() {
        let sig = register[..8]
            .iter()
            .rev()
            .fold(0, |sig, byte| sig << 8 | u64::from(*byte));
        let exponent = u16::from_le_bytes([register[8], register[9]]);
        let place = usize::from(x87.top.wrapping_add(n as u8) & 7);
        x87.regs[place] = (sig, exponent);
    }
}

/// FNOP (`op` 0), FINCSTP (1), FDECSTP (2), FFREE (3), FFREEP (4).
fn pointer(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    waiting(cpu, ip, |cpu, u| {
        let x87 = &mut cpu.ext.x87;
        match u.op {
            1 => x87.top = x87.top.wrapping_add(1) & 7,
            2 => x87.top = x87.top.wrapping_sub(1) & 7,
            3 => x87.free(u.dst),
            4 => {
                x87.free(u.dst);
                x87.pop();
            }
            _ => return Ok::<(), Stop>(()),
        }
        x87.set_codes(super::stack::C1, 0);
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let (op, handler): (u8, Handler) = match insn.mnemonic() {
        M::Fninit => (FNINIT, quiet),
        M::Fnclex => (FNCLEX, quiet),
        M::Fnstcw => (FNSTCW, quiet),
        M::Fnstsw if uop.mem => (FNSTSW, quiet),
        M::Fnstsw => (FNSTSW_AX, quiet),
        M::Fndisi | M::Fneni | M::Fnsetpm => (5, quiet),
        M::Fldcw => (0, load_control),
        M::Wait => (0, wait),
        M::Emms => (0, emms),
        M::Fnstenv => (0, store_environment),
        M::Fnsave => (1, store_environment),
        M::Fldenv => (0, load_environment),
        M::Frstor => (1, load_environment),
        M::Fnop => (0, pointer),
        M::Fincstp => (1, pointer),
        M::Fdecstp => (2, pointer),
        M::Ffree => (3, pointer),
        M::Ffreep => (4, pointer),
        _ => return None,
    };
    uop.op = op;
    Some(handler)
}
