//! MOV and its relatives: LEA, MOVZX, MOVSX, CMOVcc, SETcc, XCHG, PUSH, POP, BSWAP, MOVBE, CBW and CWD families.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use std::marker::PhantomData;

use crate::cpu::decode::{bitness, gpr, immediate, operand_size};
use crate::cpu::int::Int;
use crate::cpu::state::{Cpu, Stop, RAX, RBP, RDX, RSP, SEG_BASE, SS};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};
use crate::cpu::way::{quick, Op, Way};
use crate::{by_size, by_size_based};

fn mov_rr<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = T::get(cpu, u.src);
        T::set(cpu, u.dst, value);
        Ok(())
    })
}

fn mov_ri<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        T::set(cpu, u.dst, T::from64(u.imm));
        Ok(())
    })
}

struct MovRm<T, const B: bool>(PhantomData<T>);
impl<T: Int, const B: bool> Op for MovRm<T, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, B>(u)?;
        let value = cpu.load_by::<T, W>(at)?;
        T::set(cpu, u.dst, value);
        Ok(())
    }
}

struct MovMr<T, const B: bool>(PhantomData<T>);
impl<T: Int, const B: bool> Op for MovMr<T, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, B>(u)?;
        let value = T::get(cpu, u.src);
        cpu.store_by::<T, W>(at, value)
    }
}

struct MovMi<T, const B: bool>(PhantomData<T>);
impl<T: Int, const B: bool> Op for MovMi<T, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, B>(u)?;
        cpu.store_by::<T, W>(at, T::from64(u.imm))
    }
}

/// LEA: `asize` cuts the offset, the operand size the result.
fn lea<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let mut offset = cpu.offset(u);
        match u.asize {
            2 => offset &= 0xffff,
            4 => offset &= 0xffff_ffff,
            _ => {}
        }
        T::set(cpu, u.dst, T::from64(offset));
        Ok(())
    })
}

/// LEA with 64-bit addresses: with an index, or base and displacement only.
fn lea_flat<T: Int, const BASED: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let offset = if BASED {
            cpu.gpr[usize::from(u.base)].wrapping_add(u.disp)
        } else {
            cpu.offset(u)
        };
        T::set(cpu, u.dst, T::from64(offset));
        Ok(())
    })
}

/// MOVZX, MOVSX, MOVSXD from memory: `S` widened to `T`.
struct ExtendRm<T, S, const SIGNED: bool, const B: bool>(PhantomData<(T, S)>);
impl<T: Int, S: Int, const SIGNED: bool, const B: bool> Op for ExtendRm<T, S, SIGNED, B> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, B>(u)?;
        let value = cpu.load_by::<S, W>(at)?;
        let value = if SIGNED { value.sext() } else { value.to64() };
        T::set(cpu, u.dst, T::from64(value));
        Ok(())
    }
}

/// The same between registers.
fn extend<T: Int, S: Int, const SIGNED: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = S::get(cpu, u.src);
        let value = if SIGNED { value.sext() } else { value.to64() };
        T::set(cpu, u.dst, T::from64(value));
        Ok(())
    })
}

fn cmov<T: Int, const C: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        // The source is read, and may fault, whatever the condition says.
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<T>(at)?
        } else {
            T::get(cpu, u.src)
        };
        // A 32-bit destination is zero-extended even if nothing moves.
        let value = if cpu.cc.cond::<C>() {
            value
        } else {
            T::get(cpu, u.dst)
        };
        T::set(cpu, u.dst, value);
        Ok(())
    })
}

struct PushR<T>(PhantomData<T>);
impl<T: Int> Op for PushR<T> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let value = T::get(cpu, u.src);
        cpu.push_by::<T, W>(value)
    }
}

struct PushI<T>(PhantomData<T>);
impl<T: Int> Op for PushI<T> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        cpu.push_by::<T, W>(T::from64(u.imm))
    }
}

struct PushM<T>(PhantomData<T>);
impl<T: Int> Op for PushM<T> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let at = cpu.address::<W, false>(u)?;
        let value = cpu.load_by::<T, W>(at)?;
        cpu.push_by::<T, W>(value)
    }
}

struct PopR<T>(PhantomData<T>);
impl<T: Int> Op for PopR<T> {
    #[inline(always)]
    fn run<W: Way>(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
        let value = cpu.pop_by::<T, W>()?;
        T::set(cpu, u.dst, value);
        Ok(())
    }
}

/// Picks an [`Op`] of one type parameter by operand size.
macro_rules! quick_by_size {
    ($size:expr, $op:ident) => {
        match $size {
            1 => quick::<$op<u8>> as Handler,
            2 => quick::<$op<u16>>,
            4 => quick::<$op<u32>>,
            _ => quick::<$op<u64>>,
        }
    };
}

/// Picks the instance of a handler by condition code.
macro_rules! by_condition {
    ($code:expr, $handler:ident, $type:ty) => {
        match $code {
            0 => $handler::<$type, 0> as Handler,
            1 => $handler::<$type, 1>,
            2 => $handler::<$type, 2>,
            3 => $handler::<$type, 3>,
            4 => $handler::<$type, 4>,
            5 => $handler::<$type, 5>,
            6 => $handler::<$type, 6>,
            7 => $handler::<$type, 7>,
            8 => $handler::<$type, 8>,
            9 => $handler::<$type, 9>,
            10 => $handler::<$type, 10>,
            11 => $handler::<$type, 11>,
            12 => $handler::<$type, 12>,
            13 => $handler::<$type, 13>,
            14 => $handler::<$type, 14>,
            _ => $handler::<$type, 15>,
        }
    };
}

fn setcc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = u8::from(cpu.cc.cond_dyn(u.op));
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.store::<u8>(at, value);
        }
        u8::set(cpu, u.dst, value);
        Ok(())
    })
}

fn xchg<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = T::get(cpu, u.src);
        let a = if u.mem {
            // Always locked.
            let at = cpu.ea(u)?;
            cpu.modify_locked::<T>(at, |_, _| b)?
        } else {
            let a = T::get(cpu, u.dst);
            T::set(cpu, u.dst, b);
            a
        };
        T::set(cpu, u.src, a);
        Ok(())
    })
}

fn bswap<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = swap_bytes(T::get(cpu, u.dst));
        T::set(cpu, u.dst, value);
        Ok(())
    })
}

fn swap_bytes<T: Int>(value: T) -> T {
    T::from64(value.to64().swap_bytes() >> (64 - T::BITS))
}

fn movbe<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        if u.op == 0 {
            let value = cpu.load::<T>(at)?;
            T::set(cpu, u.dst, swap_bytes(value));
            Ok(())
        } else {
            let value = swap_bytes(T::get(cpu, u.src));
            cpu.store::<T>(at, value)
        }
    })
}

impl Cpu {
    /// Pushes `size` bytes; RSP changes only if the store succeeds.
    #[inline(always)]
    pub fn push<T: Int>(&mut self, value: T) -> Result<(), Stop> {
        if self.stack_mask == u64::MAX {
            let rsp = self.gpr[RSP].wrapping_sub(T::BYTES);
            if let Err(stop) = self.store::<T>(rsp, value) {
                return Err(self.stack_stop(stop));
            }
            self.gpr[RSP] = rsp;
            return Ok(());
        }
        self.push_legacy(value.to64(), T::BYTES)
    }

    #[inline(always)]
    pub fn pop<T: Int>(&mut self) -> Result<T, Stop> {
        if self.stack_mask == u64::MAX {
            let rsp = self.gpr[RSP];
            return match self.load::<T>(rsp) {
                Ok(value) => {
                    self.gpr[RSP] = rsp.wrapping_add(T::BYTES);
                    Ok(value)
                }
                Err(stop) => Err(self.stack_stop(stop)),
            };
        }
        self.pop_legacy(T::BYTES).map(T::from64)
    }

    #[inline(never)]
    fn push_legacy(&mut self, value: u64, size: u64) -> Result<(), Stop> {
        let mask = self.stack_mask;
        let rsp = self.gpr[RSP].wrapping_sub(size) & mask;
        let segment = self.seg[SS];
        self.check_limit(&segment, SS, rsp, size)?;
        let at = rsp.wrapping_add(self.gpr[SEG_BASE + SS]) & 0xffff_ffff;
        self.store_sized(at, value, size)?;
        self.set_rsp(rsp);
        Ok(())
    }

    #[inline(never)]
    fn pop_legacy(&mut self, size: u64) -> Result<u64, Stop> {
        let mask = self.stack_mask;
        let rsp = self.gpr[RSP] & mask;
        let segment = self.seg[SS];
        self.check_limit(&segment, SS, rsp, size)?;
        let at = rsp.wrapping_add(self.gpr[SEG_BASE + SS]) & 0xffff_ffff;
        let value = self.load_sized(at, size)?;
        self.set_rsp(rsp.wrapping_add(size));
        Ok(value)
    }

    /// Writes the part of RSP that the stack segment uses.
    pub fn set_rsp(&mut self, value: u64) {
        let mask = self.stack_mask;
        self.gpr[RSP] = match mask {
            u64::MAX => value,
            0xffff_ffff => value & mask,
            _ => self.gpr[RSP] & !mask | value & mask,
        };
    }

    pub fn load_sized(&mut self, at: u64, size: u64) -> Result<u64, Stop> {
        match size {
            1 => self.load::<u8>(at).map(u64::from),
            2 => self.load::<u16>(at).map(u64::from),
            4 => self.load::<u32>(at).map(u64::from),
            _ => self.load::<u64>(at),
        }
    }

    pub fn store_sized(&mut self, at: u64, value: u64, size: u64) -> Result<(), Stop> {
        match size {
            1 => self.store::<u8>(at, value as u8),
            2 => self.store::<u16>(at, value as u16),
            4 => self.store::<u32>(at, value as u32),
            _ => self.store::<u64>(at, value),
        }
    }

    /// Pushes `size` bytes of `value`.
    pub fn push_sized(&mut self, value: u64, size: u8) -> Result<(), Stop> {
        match size {
            2 => self.push::<u16>(value as u16),
            4 => self.push::<u32>(value as u32),
            _ => self.push::<u64>(value),
        }
    }

    pub fn pop_sized(&mut self, size: u8) -> Result<u64, Stop> {
        match size {
            2 => self.pop::<u16>().map(u64::from),
            4 => self.pop::<u32>().map(u64::from),
            _ => self.pop::<u64>(),
        }
    }
}

fn pop_m<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let before = cpu.gpr[RSP];
        let value = cpu.pop::<T>()?;
        // The address of the destination is formed with RSP already incremented.
        let stored = cpu.ea(u).and_then(|at| cpu.store::<T>(at, value));
        if stored.is_err() {
            cpu.gpr[RSP] = before;
        }
        stored
    })
}

fn leave<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        let before = cpu.gpr[RSP];
        let frame = cpu.gpr[RBP];
        cpu.set_rsp(frame);
        match cpu.pop::<T>() {
            Ok(value) => {
                T::set(cpu, RBP as u8, value);
                Ok(())
            }
            Err(stop) => {
                cpu.gpr[RSP] = before;
                Err(stop)
            }
        }
    })
}

/// ENTER: `imm` is the frame's size, `op` the nesting level.
fn enter(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let (rsp, rbp) = (cpu.gpr[RSP], cpu.gpr[RBP]);
        let result = enter_body(cpu, u);
        if result.is_err() {
            cpu.gpr[RSP] = rsp;
            cpu.gpr[RBP] = rbp;
        }
        result
    })
}

fn enter_body(cpu: &mut Cpu, u: &Uop) -> Result<(), Stop> {
    let size = u64::from(u.size);
    let frame_of = cpu.gpr[RBP];
    cpu.push_sized(frame_of, u.size)?;
    let frame = cpu.gpr[RSP];
    let base = |cpu: &Cpu, at: u64| {
        if cpu.long {
            at
        } else {
            (at & cpu.stack_mask).wrapping_add(cpu.gpr[SEG_BASE + SS]) & 0xffff_ffff
        }
    };
    if u.op > 0 {
        let mut at = frame_of;
        for _ in 1..u.op {
            at = at.wrapping_sub(size);
            let value = cpu.load_sized(base(cpu, at), size)?;
            cpu.push_sized(value, u.size)?;
        }
        cpu.push_sized(frame, u.size)?;
    }
    let rsp = cpu.gpr[RSP].wrapping_sub(u.imm);
    // The final stack pointer is probed for writing.
    cpu.check_write(base(cpu, rsp), 1)?;
    cpu.set_rsp(rsp);
    match u.size {
        2 => u16::set(cpu, RBP as u8, frame as u16),
        4 => u32::set(cpu, RBP as u8, frame as u32),
        _ => cpu.gpr[RBP] = frame,
    }
    Ok(())
}

fn pusha(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let rsp = cpu.gpr[RSP];
        for register in 0..8 {
            let value = if register == RSP {
                rsp
            } else {
                cpu.gpr[register]
            };
            if let Err(stop) = cpu.push_sized(value, u.size) {
                cpu.gpr[RSP] = rsp;
                return Err(stop);
            }
        }
        Ok(())
    })
}

fn popa(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let rsp = cpu.gpr[RSP];
        let mut values = [0; 8];
        for register in (0..8).rev() {
            match cpu.pop_sized(u.size) {
                Ok(value) => values[register] = value,
                Err(stop) => {
                    cpu.gpr[RSP] = rsp;
                    return Err(stop);
                }
            }
        }
        for (register, value) in values
            .into_iter()
            .enumerate()
            .filter(|&(register, _)| register != RSP)
        {
            if u.size == 2 {
                u16::set(cpu, register as u8, value as u16);
            } else {
                cpu.gpr[register] = value;
            }
        }
        Ok(())
    })
}

/// CBW, CWDE, CDQE: the low half of the accumulator, sign-extended.
fn widen(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let rax = cpu.gpr[RAX];
        match u.size {
            2 => u16::set(cpu, 0, rax as i8 as u16),
            4 => u32::set(cpu, 0, rax as i16 as u32),
            _ => cpu.gpr[RAX] = rax as i32 as u64,
        }
        Ok(())
    })
}

/// CWD, CDQ, CQO: the accumulator's sign into RDX.
fn spread(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let rax = cpu.gpr[RAX];
        match u.size {
            2 => u16::set(cpu, RDX as u8, ((rax as i16) >> 15) as u16),
            4 => u32::set(cpu, RDX as u8, ((rax as i32) >> 31) as u32),
            _ => cpu.gpr[RDX] = ((rax as i64) >> 63) as u64,
        }
        Ok(())
    })
}

/// XLATB: [RBX + AL]. iced names AL as an index; only its byte counts.
fn xlat(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let place = Uop {
            index: crate::cpu::state::ZERO as u8,
            disp: cpu.gpr[RAX] & 0xff,
            ..*u
        };
        let at = cpu.ea(&place)?;
        let value = cpu.load::<u8>(at)?;
        u8::set(cpu, 0, value);
        Ok(())
    })
}

fn nop(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    ip.next(cpu)
}

/// Condition code of CMOVcc, SETcc and Jcc: the low nibble of the opcode.
fn condition(insn: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match insn.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}

pub fn condition_of(insn: &Instruction) -> u8 {
    condition(insn)
}

fn mov(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    let (to, from) = (insn.op0_kind(), insn.op1_kind());
    if to == OpKind::Register && !insn.op0_register().is_gpr()
        || from == OpKind::Register && !insn.op1_register().is_gpr()
    {
        // Segment, control and debug registers: the system family.
        return None;
    }
    uop.size = operand_size(insn, 0);
    if to == OpKind::Memory {
        if let Some(value) = immediate(insn, 1) {
            uop.imm = value;
            return Some(by_size_based!(uop, uop.size, MovMi));
        }
        uop.src = gpr(insn.op1_register());
        return Some(by_size_based!(uop, uop.size, MovMr));
    }
    uop.dst = gpr(insn.op0_register());
    if let Some(value) = immediate(insn, 1) {
        uop.imm = value;
        return Some(by_size!(uop.size, mov_ri));
    }
    if from == OpKind::Memory {
        return Some(by_size_based!(uop, uop.size, MovRm));
    }
    uop.src = gpr(insn.op1_register());
    Some(by_size!(uop.size, mov_rr))
}

fn widening<const SIGNED: bool>(insn: &Instruction, uop: &mut Uop) -> Handler {
    let from = operand_size(insn, 1);
    uop.dst = gpr(insn.op0_register());
    if !uop.mem {
        uop.src = gpr(insn.op1_register());
    }
    let to = operand_size(insn, 0);
    uop.size = from;
    match (from, uop.mem) {
        (1, false) => by_size!(to, extend, u8, SIGNED),
        (2, false) => by_size!(to, extend, u16, SIGNED),
        (_, false) => by_size!(to, extend, u32, SIGNED),
        (1, true) => by_size_based!(uop, to, ExtendRm, u8, SIGNED),
        (2, true) => by_size_based!(uop, to, ExtendRm, u16, SIGNED),
        (_, true) => by_size_based!(uop, to, ExtendRm, u32, SIGNED),
    }
}

fn push_size(insn: &Instruction, mode: u32) -> u8 {
    // The operand size of a push is the change of the stack pointer.
    let size = insn.stack_pointer_increment().unsigned_abs();
    if size == 0 {
        (bitness(mode) / 8) as u8
    } else {
        size as u8
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Mov => return mov(insn, uop),
        Mnemonic::Lea => {
            uop.asize = match uop.ea {
                crate::cpu::uop::ea::FLAT => 8,
                crate::cpu::uop::ea::LEGACY16 => 2,
                _ => 4,
            };
            uop.dst = gpr(insn.op0_register());
            let size = operand_size(insn, 0);
            let zero = crate::cpu::state::ZERO as u8;
            match (uop.asize, uop.index == zero) {
                (8, true) => by_size!(size, lea_flat, true),
                (8, false) => by_size!(size, lea_flat, false),
                _ => by_size!(size, lea),
            }
        }
        Mnemonic::Movzx => widening::<false>(insn, uop),
        Mnemonic::Movsx | Mnemonic::Movsxd => widening::<true>(insn, uop),
        Mnemonic::Push => {
            let size = push_size(insn, mode);
            if let Some(value) = immediate(insn, 0) {
                uop.imm = value;
                return Some(quick_by_size!(size, PushI));
            }
            if uop.mem {
                uop.size = size;
                return Some(quick_by_size!(size, PushM));
            }
            if !insn.op0_register().is_gpr() {
                return None;
            }
            uop.src = gpr(insn.op0_register());
            quick_by_size!(size, PushR)
        }
        Mnemonic::Pop => {
            let size = push_size(insn, mode);
            if uop.mem {
                uop.size = size;
                return Some(by_size!(size, pop_m));
            }
            if !insn.op0_register().is_gpr() {
                return None;
            }
            uop.dst = gpr(insn.op0_register());
            quick_by_size!(size, PopR)
        }
        Mnemonic::Xchg => {
            uop.size = operand_size(insn, 0);
            uop.src = gpr(insn.op1_register());
            if !uop.mem {
                uop.dst = gpr(insn.op0_register());
            }
            by_size!(uop.size, xchg)
        }
        Mnemonic::Bswap => {
            uop.dst = gpr(insn.op0_register());
            by_size!(operand_size(insn, 0), bswap)
        }
        Mnemonic::Movbe => {
            uop.size = operand_size(insn, 0);
            if insn.op0_kind() == OpKind::Memory {
                uop.op = 1;
                uop.src = gpr(insn.op1_register());
            } else {
                uop.dst = gpr(insn.op0_register());
            }
            by_size!(uop.size, movbe)
        }
        Mnemonic::Leave => by_size!(push_size(insn, mode), leave),
        Mnemonic::Enter => {
            uop.imm = u64::from(insn.immediate16());
            uop.op = insn.immediate8_2nd() & 31;
            uop.segment = SS as u8;
            uop.size = match insn.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            enter
        }
        Mnemonic::Pusha | Mnemonic::Pushad => {
            uop.size = if insn.code() == Code::Pushaw { 2 } else { 4 };
            pusha
        }
        Mnemonic::Popa | Mnemonic::Popad => {
            uop.size = if insn.code() == Code::Popaw { 2 } else { 4 };
            popa
        }
        Mnemonic::Cbw | Mnemonic::Cwde | Mnemonic::Cdqe => {
            uop.size = match insn.mnemonic() {
                Mnemonic::Cbw => 2,
                Mnemonic::Cwde => 4,
                _ => 8,
            };
            widen
        }
        Mnemonic::Cwd | Mnemonic::Cdq | Mnemonic::Cqo => {
            uop.size = match insn.mnemonic() {
                Mnemonic::Cwd => 2,
                Mnemonic::Cdq => 4,
                _ => 8,
            };
            spread
        }
        Mnemonic::Xlatb => {
            uop.size = 1;
            xlat
        }
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Prefetch
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Cldemote => nop,
        _ if insn.is_jcc_short_or_near() => return None,
        _ => {
            let code = insn.condition_code();
            if code == iced_x86::ConditionCode::None || insn.op_count() == 0 {
                return None;
            }
            uop.op = condition(insn);
            if insn.op_count() == 1
                && operand_size(insn, 0) == 1
                && insn.op0_kind() != OpKind::NearBranch64
            {
                uop.size = 1;
                if !uop.mem {
                    uop.dst = gpr(insn.op0_register());
                }
                return is_set(insn).then_some(setcc as Handler);
            }
            if insn.op_count() == 2 && insn.op0_kind() == OpKind::Register && is_cmov(insn) {
                uop.size = operand_size(insn, 0);
                uop.dst = gpr(insn.op0_register());
                if !uop.mem {
                    uop.src = gpr(insn.op1_register());
                }
                return Some(match uop.size {
                    2 => by_condition!(uop.op, cmov, u16),
                    4 => by_condition!(uop.op, cmov, u32),
                    _ => by_condition!(uop.op, cmov, u64),
                });
            }
            return None;
        }
    })
}

fn is_set(insn: &Instruction) -> bool {
    matches!(insn.code(), code if (Code::Seto_rm8..=Code::Setg_rm8).contains(&code))
}

fn is_cmov(insn: &Instruction) -> bool {
    matches!(insn.code(), code if (Code::Cmovo_r16_rm16..=Code::Cmovg_r64_rm64).contains(&code))
}
