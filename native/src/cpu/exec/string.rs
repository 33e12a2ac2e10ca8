//! MOVS, STOS, LODS, CMPS, SCAS with their REP prefixes.
//!
//! Registers are committed after every element, so a fault or an interrupt in the middle leaves a restartable
//! instruction. Runs inside one page go through host pointers.

use iced_x86::{Instruction, Mnemonic};

use crate::by_size;
use crate::cpu::decode::{address_size, bitness, mode, segment_number};
use crate::cpu::flags::{Kind, DF};
use crate::cpu::int::{lazy, Int};
use crate::cpu::state::{Cpu, Stop, StopKind, ES, FS, RAX, RCX, RDI, RSI, SEG_BASE, ZERO};
use crate::cpu::uop::{last, step, Flow, Handler, Ip, Uop};

const MOVS: u8 = 0;
const STOS: u8 = 1;
const LODS: u8 = 2;
const CMPS: u8 = 3;
const SCAS: u8 = 4;

fn mask(u: &Uop) -> u64 {
    match u.asize {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Adds to RSI, RDI or RCX within the address size.
fn bump(cpu: &mut Cpu, u: &Uop, register: usize, by: u64) {
    let value = cpu.gpr[register].wrapping_add(by);
    match u.asize {
        2 => u16::set(cpu, register as u8, value as u16),
        4 => cpu.gpr[register] = value & 0xffff_ffff,
        _ => cpu.gpr[register] = value,
    }
}

impl Cpu {
    /// Linear address of a string operand: `register` in `segment`.
    pub fn string_address(
        &mut self,
        u: &Uop,
        register: usize,
        segment: usize,
        size: u64,
    ) -> Result<u64, Stop> {
        let offset = self.gpr[register] & mask(u);
        if self.long {
            let base = if segment >= FS {
                self.gpr[SEG_BASE + segment]
            } else {
                0
            };
            return Ok(offset.wrapping_add(base));
        }
        let hidden = self.seg[segment];
        self.check_limit(&hidden, segment, offset, size)?;
        Ok(offset.wrapping_add(self.gpr[SEG_BASE + segment]) & 0xffff_ffff)
    }
}

/// One element. Nothing is committed unless it succeeds.
#[inline(always)]
fn element<T: Int, const OP: u8>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
    let delta = if cpu.flags & DF != 0 {
        T::BYTES.wrapping_neg()
    } else {
        T::BYTES
    };
    match OP {
        MOVS => {
            let from = cpu.string_address(u, RSI, u.segment.into(), T::BYTES)?;
            let to = cpu.string_address(u, RDI, ES, T::BYTES)?;
            let value = cpu.load::<T>(from)?;
            cpu.store::<T>(to, value)?;
            bump(cpu, u, RSI, delta);
            bump(cpu, u, RDI, delta);
        }
        STOS => {
            let to = cpu.string_address(u, RDI, ES, T::BYTES)?;
            let value = T::get(cpu, RAX as u8);
            cpu.store::<T>(to, value)?;
            bump(cpu, u, RDI, delta);
        }
        LODS => {
            let from = cpu.string_address(u, RSI, u.segment.into(), T::BYTES)?;
            let value = cpu.load::<T>(from)?;
            T::set(cpu, RAX as u8, value);
            bump(cpu, u, RSI, delta);
        }
        CMPS => {
            let from = cpu.string_address(u, RSI, u.segment.into(), T::BYTES)?;
            let to = cpu.string_address(u, RDI, ES, T::BYTES)?;
            let (a, b) = (cpu.load::<T>(from)?, cpu.load::<T>(to)?);
            cpu.cc = lazy(Kind::Sub, a.sub(b), b.to64());
            bump(cpu, u, RSI, delta);
            bump(cpu, u, RDI, delta);
        }
        _ => {
            let to = cpu.string_address(u, RDI, ES, T::BYTES)?;
            let (a, b) = (T::get(cpu, RAX as u8), cpu.load::<T>(to)?);
            cpu.cc = lazy(Kind::Sub, a.sub(b), b.to64());
            bump(cpu, u, RDI, delta);
        }
    }
    Ok(())
}

fn single<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, element::<T, OP>)
}

/// Elements that MOVS or STOS may do at once from here on; 0 if the slow way must be taken.
fn bulk<T: Int, const OP: u8>(cpu: &mut Cpu, u: &Uop, count: u64) -> Result<u64, Stop> {
    let shots = cpu.counters.shootdowns;
    let to = cpu.string_address(u, RDI, ES, T::BYTES)?;
    let mut room = 0x1000 - (to & 0xfff);
    let from = if OP == MOVS {
        cpu.string_address(u, RSI, u.segment.into(), T::BYTES)?
    } else {
        0
    };
    if OP == MOVS {
        room = room.min(0x1000 - (from & 0xfff));
    }
    let elements = (room / T::BYTES).min(count);
    if elements < 2 {
        return Ok(0);
    }
    let bytes = (elements * T::BYTES) as usize;
    let source = if OP == MOVS {
        cpu.pointer(from, false)?
    } else {
        None
    };
    let Some(into) = cpu.pointer(to, true)? else {
        return Ok(0);
    };
    if cpu.counters.shootdowns != shots {
        return Ok(0);
    }
    if OP == MOVS {
        let Some(source) = source else { return Ok(0) };
        // An element-wise copy that runs into its own output repeats a pattern: not a block move.
        let distance = (into as usize).wrapping_sub(source as usize);
        if distance < bytes {
            return Ok(0);
        }
        // SAFETY: both ranges lie in one page each that the pointers cover, and neither was taken back.
        unsafe { std::ptr::copy(source, into, bytes) };
        bump(cpu, u, RSI, bytes as u64);
    } else {
        let value = T::get(cpu, RAX as u8).to64();
        // SAFETY: as above.
        unsafe {
            if T::BYTES == 1 {
                into.write_bytes(value as u8, bytes);
            } else {
                for index in 0..elements as usize {
                    T::store(into.add(index * T::BYTES as usize), T::from64(value));
                }
            }
        }
    }
    bump(cpu, u, RDI, bytes as u64);
    Ok(elements)
}

/// Elements between two looks at pending events.
const BURST: u32 = 1024;

/// With a 32-bit address size the count loses its upper half even if nothing is repeated, or the first element
/// faults; so do the pointers of MOVS and STOS, on Intel's processors.
#[cold]
fn cut<const OP: u8>(cpu: &mut Cpu) {
    cpu.gpr[RCX] &= 0xffff_ffff;
    if OP == MOVS {
        cpu.gpr[RSI] &= 0xffff_ffff;
    }
    if OP == MOVS || OP == STOS {
        cpu.gpr[RDI] &= 0xffff_ffff;
    }
}

/// Lets an event in between two iterations; the instruction goes on afterwards.
#[cold]
fn leave(cpu: &mut Cpu, u: &Uop) -> Flow {
    cpu.partial = u32::from(u.n);
    cpu.rip = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u64::from(u.at)));
    cpu.stop = StopKind::Sync;
    Flow::Stop
}

fn repeated<T: Int, const OP: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let mask = mask(u);
        let mut burst = 0;
        let flags = cpu.cc;
        if u.asize == 4 {
            cut::<OP>(cpu);
        }
        loop {
            let count = cpu.gpr[RCX] & mask;
            if count == 0 {
                break;
            }
            if burst >= BURST {
                burst = 0;
                cpu.poll();
                if cpu.event_due() {
                    return Ok(leave(cpu, u));
                }
            }
            if (OP == MOVS || OP == STOS) && cpu.flags & DF == 0 && !cpu.trap_each() {
                let done = bulk::<T, OP>(cpu, u, count)?;
                if done > 0 {
                    bump(cpu, u, RCX, done.wrapping_neg());
                    burst += done as u32;
                    continue;
                }
            }
            if let Err(stop) = element::<T, OP>(cpu, u) {
                // A fault restores the flags of before the whole instruction (SDM volume 2, REP).
                cpu.cc = flags;
                return Err(stop);
            }
            bump(cpu, u, RCX, u64::MAX);
            burst += 1;
            if (OP == CMPS || OP == SCAS) && cpu.cc.zf() != (u.rep == 1) {
                break;
            }
            if cpu.trap_each() && cpu.gpr[RCX] & mask != 0 {
                return Ok(leave(cpu, u));
            }
        }
        Ok(Flow::Next)
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    if insn.op_count() > 2 || uop.mem {
        return None;
    }
    let (op, size) = match insn.mnemonic() {
        Mnemonic::Movsb => (MOVS, 1),
        Mnemonic::Movsw => (MOVS, 2),
        Mnemonic::Movsd if insn.is_string_instruction() => (MOVS, 4),
        Mnemonic::Movsq => (MOVS, 8),
        Mnemonic::Stosb => (STOS, 1),
        Mnemonic::Stosw => (STOS, 2),
        Mnemonic::Stosd => (STOS, 4),
        Mnemonic::Stosq => (STOS, 8),
        Mnemonic::Lodsb => (LODS, 1),
        Mnemonic::Lodsw => (LODS, 2),
        Mnemonic::Lodsd => (LODS, 4),
        Mnemonic::Lodsq => (LODS, 8),
        Mnemonic::Cmpsb => (CMPS, 1),
        Mnemonic::Cmpsw => (CMPS, 2),
        Mnemonic::Cmpsd if insn.is_string_instruction() => (CMPS, 4),
        Mnemonic::Cmpsq => (CMPS, 8),
        Mnemonic::Scasb => (SCAS, 1),
        Mnemonic::Scasw => (SCAS, 2),
        Mnemonic::Scasd => (SCAS, 4),
        Mnemonic::Scasq => (SCAS, 8),
        _ => return None,
    };
    uop.size = size;
    uop.asize = address_size(insn, mode);
    uop.segment = segment_number(insn.memory_segment()) as u8;
    let segment = usize::from(uop.segment);
    uop.seg = if bitness(mode) == 64 && segment < FS {
        ZERO as u8
    } else {
        (SEG_BASE + segment) as u8
    };
    let _ = mode::BITS;
    Some(if uop.rep == 0 {
        match op {
            MOVS => by_size!(size, single, MOVS),
            STOS => by_size!(size, single, STOS),
            LODS => by_size!(size, single, LODS),
            CMPS => by_size!(size, single, CMPS),
            _ => by_size!(size, single, SCAS),
        }
    } else {
        uop.ends = true;
        match op {
            MOVS => by_size!(size, repeated, MOVS),
            STOS => by_size!(size, repeated, STOS),
            LODS => by_size!(size, repeated, LODS),
            CMPS => by_size!(size, repeated, CMPS),
            _ => by_size!(size, repeated, SCAS),
        }
    })
}
