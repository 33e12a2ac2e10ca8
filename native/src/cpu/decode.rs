//! From bytes to micro-operations. iced-x86 decodes; the families of `exec/` choose handlers.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::exec::FAMILIES;
use super::int::HIGH;
use super::state::{self, BLOCK, SEG_BASE, ZERO};
use super::uop::{ea, Handler, Uop};

/// What decoded code depends on, besides its bytes. Part of a block's key.
pub mod mode {
    /// Bits 1:0: 0 = 16-bit, 1 = 32-bit, 2 = 64-bit code.
    pub const BITS: u32 = 3;
    pub const CODE64: u32 = 2;
    pub const CODE32: u32 = 1;
    /// SS.B: 32-bit stack pointer in legacy code.
    pub const STACK32: u32 = 1 << 2;
    pub const USER: u32 = 1 << 3;
    /// SSE instructions raise #UD (CR0.EM set or CR4.OSFXSR clear).
    pub const SSE_UD: u32 = 1 << 4;
    /// CR0.TS: x87 and SSE raise #NM.
    pub const TS: u32 = 1 << 5;
    pub const EM: u32 = 1 << 6;
    pub const MP: u32 = 1 << 7;
    /// AVX usable (CR4.OSXSAVE and XCR0).
    pub const AVX: u32 = 1 << 8;
    pub const ESCAPE: u32 = 1 << 9;
    /// One instruction a block.
    pub const STEP: u32 = 1 << 10;
    /// CR4.OSXSAVE.
    pub const XSAVE: u32 = 1 << 11;
}

/// Longest block, in instructions.
pub const MAX: usize = 48;

pub fn bitness(mode: u32) -> u32 {
    match mode & mode::BITS {
        mode::CODE64 => 64,
        mode::CODE32 => 32,
        _ => 16,
    }
}

/// A decoded block, before it is stored.
pub struct Decoded {
    pub bytes: u16,
    pub count: u8,
    /// Target of the closing branch, relative to the block's start.
    pub taken: u64,
    /// The single instruction reaches into the next page.
    pub crosses: bool,
}

/// Why no block could be made.
pub enum Trouble {
    /// The first instruction needs bytes of the next page.
    Crosses,
}

/// Decodes from `bytes`, of which the first `page` lie in the first page, and appends the micro-operations to `into`.
pub fn decode(
    bytes: &[u8],
    page: usize,
    mode: u32,
    into: &mut Vec<Uop>,
) -> Result<Decoded, Trouble> {
    let mut decoder = Decoder::new(bitness(mode), bytes, DecoderOptions::MPX);
    decoder.set_ip(0);
    let max = if mode & mode::STEP != 0 { 1 } else { MAX };
    let first = into.len();
    let mut out = Decoded {
        bytes: 0,
        count: 0,
        taken: 0,
        crosses: false,
    };
    let mut insn = Instruction::default();
    loop {
        let at = decoder.position();
        if out.count as usize >= max || at >= page {
            break;
        }
        decoder.decode_out(&mut insn);
        let end = decoder.position();
        let short = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes;
        if short || end > page {
            // The instruction reaches into the next page: it stands alone in its block.
            if out.count > 0 {
                break;
            }
            if bytes.len() == page {
                return Err(Trouble::Crosses);
            }
            out.crosses = end > page;
        }
        let mut uop = blank(at, end, out.count);
        let run = lower(&insn, &mut uop, mode);
        uop.run = run;
        out.count += 1;
        out.bytes = end as u16;
        if uop.ends {
            out.taken = target(&insn, mode);
        }
        into.push(uop);
        if uop.ends || out.crosses {
            break;
        }
    }
    super::optimize::pass(&mut into[first..]);
    if !into[into.len() - 1].ends {
        // A block that just stops: a last micro-operation that is no instruction.
        let mut close = blank(out.bytes.into(), out.bytes.into(), out.count);
        close.run = super::exec::control::close;
        close.ends = true;
        into.push(close);
    }
    Ok(out)
}

fn blank(at: usize, end: usize, n: u8) -> Uop {
    Uop {
        run: super::exec::control::close,
        imm: 0,
        disp: 0,
        at: at as u16,
        next: end as u16,
        dst: ZERO as u8,
        src: ZERO as u8,
        base: ZERO as u8,
        index: ZERO as u8,
        scale: 0,
        seg: ZERO as u8,
        ea: ea::FLAT,
        n,
        op: 0,
        alu: super::exec::arith::NONE,
        form: 0,
        size: 0,
        segment: state::DS as u8,
        asize: 8,
        rep: 0,
        lock: false,
        ends: false,
        mem: false,
    }
}

fn target(insn: &Instruction, mode: u32) -> u64 {
    match insn.op0_kind() {
        OpKind::NearBranch64 => insn.near_branch64(),
        OpKind::NearBranch32 if bitness(mode) == 64 => insn.near_branch64(),
        OpKind::NearBranch32 => i64::from(insn.near_branch32() as i32) as u64,
        OpKind::NearBranch16 => i64::from(insn.near_branch16() as i16) as u64,
        _ => 0,
    }
}

/// Fills `uop` with what every family needs (the memory operand, prefixes), then asks the families.
fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Handler {
    if insn.code() == Code::INVALID {
        return super::exec::control::undefined(uop);
    }
    uop.lock = insn.has_lock_prefix();
    uop.rep = if insn.has_rep_prefix() {
        1
    } else if insn.has_repne_prefix() {
        2
    } else {
        0
    };
    if let Some(index) = (0..insn.op_count()).find(|&index| insn.op_kind(index) == OpKind::Memory) {
        memory(insn, uop, mode);
        uop.mem = true;
        let _ = index;
    }
    for family in FAMILIES {
        if let Some(run) = family(insn, uop, mode) {
            return run;
        }
    }
    super::exec::control::undefined(uop)
}

/// Number of a segment register, as encoded.
pub fn segment_number(register: Register) -> usize {
    match register {
        Register::ES => state::ES,
        Register::CS => state::CS,
        Register::SS => state::SS,
        Register::FS => state::FS,
        Register::GS => state::GS,
        _ => state::DS,
    }
}

/// Register-file index of a general register of any width; [`HIGH`] set for AH, CH, DH, BH.
pub fn gpr(register: Register) -> u8 {
    match register {
        Register::AH => HIGH,
        Register::CH => HIGH | 1,
        Register::DH => HIGH | 2,
        Register::BH => HIGH | 3,
        register if register.is_gpr() => register.full_register().number() as u8,
        _ => ZERO as u8,
    }
}

/// The memory operand.
fn memory(insn: &Instruction, uop: &mut Uop, mode: u32) {
    let segment = segment_number(insn.memory_segment());
    uop.segment = segment as u8;
    let bits = bitness(mode);
    let base = insn.memory_base();
    uop.disp = insn.memory_displacement64();
    uop.index = gpr(insn.memory_index());
    uop.scale = insn.memory_index_scale().trailing_zeros() as u8;
    uop.base = match base {
        // iced has already added the address of the next instruction, relative to the block.
        Register::RIP | Register::EIP => BLOCK as u8,
        base => gpr(base),
    };
    let size = match (base, insn.memory_index()) {
        (Register::EIP, _) => 4,
        (Register::RIP, _) => 8,
        (Register::None, Register::None) => insn.memory_displ_size().max(2),
        (Register::None, index) => index.size() as u32,
        (base, _) => base.size() as u32,
    };
    if bits == 64 {
        uop.ea = if size == 4 { ea::LOW32 } else { ea::FLAT };
        // The bases of ES, CS, SS and DS read as zero in 64-bit mode.
        uop.seg = if matches!(segment, state::FS | state::GS) {
            (SEG_BASE + segment) as u8
        } else {
            ZERO as u8
        };
    } else {
        uop.ea = match size {
            2 if base == Register::None && insn.memory_index() == Register::None => {
                if bits == 32 {
                    ea::LEGACY32
                } else {
                    ea::LEGACY16
                }
            }
            2 => ea::LEGACY16,
            _ => ea::LEGACY32,
        };
        uop.seg = (SEG_BASE + segment) as u8;
    }
    uop.size = insn.memory_size().size().min(64) as u8;
}

/// Size in bytes of a register or memory operand.
pub fn operand_size(insn: &Instruction, operand: u32) -> u8 {
    match insn.op_kind(operand) {
        OpKind::Register => insn.op_register(operand).size() as u8,
        OpKind::Memory => insn.memory_size().size() as u8,
        OpKind::Immediate8 => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        _ => 8,
    }
}

/// The immediate operand `operand`, sign-extended as the instruction says; `None` if it is no immediate.
pub fn immediate(insn: &Instruction, operand: u32) -> Option<u64> {
    match insn.op_kind(operand) {
        OpKind::Immediate8
        | OpKind::Immediate8_2nd
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(insn.immediate(operand)),
        _ => None,
    }
}

/// Address size in bytes of instructions with implied operands (strings, LOOP).
pub fn address_size(insn: &Instruction, mode: u32) -> u8 {
    for operand in 0..insn.op_count() {
        match insn.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI => return 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI => return 4,
            OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::MemorySegRDI => return 8,
            _ => {}
        }
    }
    (bitness(mode) / 8) as u8
}
