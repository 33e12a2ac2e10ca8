//! The decoded instruction: what a handler needs, and nothing it would have to work out again.

use std::marker::PhantomData;

use super::state::{Cpu, Stop, StopKind, BLOCK};

/// How a handler leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Flow {
    /// The block ended; go on behind it.
    Next = 0,
    /// The branch that ends the block is taken; its target is the block's second successor.
    Taken = 1,
    /// `Cpu::rip` holds where to go.
    Jump,
    /// `Cpu::stop` says why; `Cpu::rip` and `Cpu::partial` are set.
    Stop,
}

pub type Handler = for<'a> fn(&mut Cpu, Ip<'a>) -> Flow;

/// How the effective address is formed.
pub mod ea {
    /// base + index * scale + disp + segment base, all 64 bits.
    pub const FLAT: u8 = 0;
    /// 64-bit mode with a 32-bit address size: offset cut to 32 bits, then the segment base.
    pub const LOW32: u8 = 1;
    /// Legacy: offset cut to 32 bits, limit checked, sum cut to 32 bits.
    pub const LEGACY32: u8 = 2;
    pub const LEGACY16: u8 = 3;
}

/// One decoded instruction. What `dst`, `src`, `op` and `imm` mean is between the decoder and the handler.
#[derive(Clone, Copy)]
pub struct Uop {
    pub run: Handler,
    pub imm: u64,
    pub disp: u64,
    /// Offsets from the start of the block: of this instruction and of the one behind it.
    pub at: u16,
    pub next: u16,
    pub dst: u8,
    pub src: u8,
    pub base: u8,
    pub index: u8,
    pub scale: u8,
    /// Register-file index of the segment base, `ZERO` if none needs adding.
    pub seg: u8,
    pub ea: u8,
    /// Instructions before this one in its block.
    pub n: u8,
    pub op: u8,
    /// For fusion with a branch: operation and operand form (see `exec::arith`).
    pub alu: u8,
    pub form: u8,
    /// Operand size in bytes.
    pub size: u8,
    /// Segment register of the memory operand (for #SS, limits).
    pub segment: u8,
    /// Address size in bytes (string instructions, LOOP).
    pub asize: u8,
    /// REP (1) and REPNE (2).
    pub rep: u8,
    pub lock: bool,
    /// This instruction ends its block.
    pub ends: bool,
    /// The operand in the r/m field is memory.
    pub mem: bool,
}

impl Uop {
    /// Length of the instruction in bytes.
    pub fn length(&self) -> u32 {
        u32::from(self.next - self.at)
    }
}

/// A place in a block's instructions.
#[derive(Clone, Copy)]
pub struct Ip<'a>(*const Uop, PhantomData<&'a [Uop]>);

impl<'a> Ip<'a> {
    /// Start of the block at the head of `uops`. The decoder closed it with an instruction that `ends`: that is what
    /// [`Ip::next`] needs.
    #[inline(always)]
    pub fn start(uops: &'a [Uop]) -> Ip<'a> {
        debug_assert!(uops.iter().any(|uop| uop.ends));
        assert!(!uops.is_empty());
        Ip(uops.as_ptr(), PhantomData)
    }

    #[inline(always)]
    pub fn op(self) -> &'a Uop {
        // SAFETY: made from a slice that lives as long as 'a; `next` stays inside it.
        unsafe { &*self.0 }
    }

    /// Goes on with the next instruction of the block.
    #[inline(always)]
    pub fn next(self, cpu: &mut Cpu) -> Flow {
        // SAFETY: only handlers of instructions that do not end a block call this, and the decoder closes every
        // block with one that does, so there is a next one. Not checking again here is
        // worth a tenth of the interpreter's speed.
        let next = Ip(unsafe { self.0.add(1) }, PhantomData);
        (next.op().run)(cpu, next)
    }
}

/// Runs an ordinary instruction and goes on with the next.
#[inline(always)]
pub fn step(
    cpu: &mut Cpu,
    ip: Ip<'_>,
    body: impl FnOnce(&mut Cpu, &Uop) -> Result<(), Stop>,
) -> Flow {
    let uop = ip.op();
    match body(cpu, uop) {
        Ok(()) => ip.next(cpu),
        Err(Stop) => cpu.fault(uop),
    }
}

/// Runs an instruction that ends its block.
#[inline(always)]
pub fn last(
    cpu: &mut Cpu,
    ip: Ip<'_>,
    body: impl FnOnce(&mut Cpu, &Uop) -> Result<Flow, Stop>,
) -> Flow {
    let uop = ip.op();
    match body(cpu, uop) {
        Ok(flow) => flow,
        Err(Stop) => cpu.fault(uop),
    }
}

impl Cpu {
    /// The running instruction stops: RIP back on it, the ones before it have retired.
    #[cold]
    #[inline(never)]
    pub fn fault(&mut self, uop: &Uop) -> Flow {
        self.partial = u32::from(uop.n);
        self.rip = self.ip_mask(self.gpr[BLOCK].wrapping_add(u64::from(uop.at)));
        match self.stop {
            StopKind::Canonical => {
                let vector = if usize::from(uop.segment) == super::state::SS {
                    12
                } else {
                    13
                };
                self.stop = StopKind::Exception {
                    vector,
                    error: Some(0),
                };
            }
            StopKind::Exit if self.exit.length == 0 => self.exit.length = uop.length(),
            _ => {}
        }
        Flow::Stop
    }

    /// Linear address arithmetic of RIP: 64 bits in 64-bit mode, 32 otherwise.
    #[inline(always)]
    pub fn ip_mask(&self, ip: u64) -> u64 {
        if self.long {
            ip
        } else {
            ip & 0xffff_ffff
        }
    }

    /// RIP of the instruction behind `uop`.
    #[inline(always)]
    pub fn ip_after(&self, uop: &Uop) -> u64 {
        self.ip_mask(self.gpr[BLOCK].wrapping_add(u64::from(uop.next)))
    }

    /// Effective address of the memory operand, segment base added.
    #[inline(always)]
    pub fn ea(&mut self, uop: &Uop) -> Result<u64, Stop> {
        let offset = self.offset(uop);
        if uop.ea == ea::FLAT {
            return Ok(offset.wrapping_add(self.gpr[usize::from(uop.seg)]));
        }
        self.ea_legacy(uop, offset)
    }

    /// Offset part of the memory operand, before its size cuts it.
    #[inline(always)]
    pub fn offset(&self, uop: &Uop) -> u64 {
        self.gpr[usize::from(uop.base)]
            .wrapping_add(self.gpr[usize::from(uop.index)] << (uop.scale & 3))
            .wrapping_add(uop.disp)
    }
}
