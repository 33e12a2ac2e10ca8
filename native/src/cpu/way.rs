//! Two ways through one instruction.
//!
//! The frequent instructions with a memory operand are written once and compiled twice. The *fast* way is all
//! registers and one comparison with the TLB; whatever it cannot do makes it give up, having changed nothing. Then
//! the *slow* way does the instruction from the start. So the fast way makes no calls but the last one, to the next
//! instruction's handler, and keeps nothing on the stack.

use super::int::Int;
use super::state::{Cpu, Stop, RSP};
use super::uop::{ea, step, Flow, Ip, Uop};

pub trait Way {
    const FAST: bool;
}
pub struct Fast;
pub struct Slow;
impl Way for Fast {
    const FAST: bool = true;
}
impl Way for Slow {
    const FAST: bool = false;
}

/// An instruction's effect. It commits nothing before its last memory access has succeeded.
pub trait Op {
    fn run<W: Way>(cpu: &mut Cpu, uop: &Uop) -> Result<(), Stop>;
}

/// Handler of an ordinary instruction.
pub fn quick<O: Op>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    match O::run::<Fast>(cpu, ip.op()) {
        Ok(()) => ip.next(cpu),
        Err(Stop) => slow::<O>(cpu, ip),
    }
}

#[cold]
#[inline(never)]
fn slow<O: Op>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, O::run::<Slow>)
}

/// Handler of an instruction together with the conditional jump behind it, which closes the block.
pub fn fused<O: Op, const C: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    match O::run::<Fast>(cpu, ip.op()) {
        Ok(()) => branch::<C>(cpu),
        Err(Stop) => slow_fused::<O, C>(cpu, ip),
    }
}

#[cold]
#[inline(never)]
fn slow_fused<O: Op, const C: u8>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    match O::run::<Slow>(cpu, ip.op()) {
        Ok(()) => branch::<C>(cpu),
        Err(Stop) => cpu.fault(ip.op()),
    }
}

#[inline(always)]
fn branch<const C: u8>(cpu: &Cpu) -> Flow {
    if cpu.cc.cond::<C>() {
        Flow::Taken
    } else {
        Flow::Next
    }
}

/// Whether the memory operand is a base register and a displacement and nothing else.
pub fn based(uop: &Uop) -> bool {
    let zero = super::state::ZERO as u8;
    uop.ea == ea::FLAT && uop.index == zero && uop.seg == zero
}

impl Cpu {
    /// Linear address of the memory operand. `BASED`: see [`based`].
    #[inline(always)]
    pub fn address<W: Way, const BASED: bool>(&mut self, uop: &Uop) -> Result<u64, Stop> {
        if BASED {
            return Ok(self.gpr[usize::from(uop.base)].wrapping_add(uop.disp));
        }
        let offset = self.offset(uop);
        if uop.ea == ea::FLAT {
            return Ok(offset.wrapping_add(self.gpr[usize::from(uop.seg)]));
        }
        if W::FAST {
            return Err(Stop);
        }
        self.ea_legacy(uop, offset)
    }

    #[inline(always)]
    pub fn load_by<T: Int, W: Way>(&mut self, linear: u64) -> Result<T, Stop> {
        if W::FAST {
            self.load_fast(linear)
        } else {
            self.load(linear)
        }
    }

    #[inline(always)]
    pub fn store_by<T: Int, W: Way>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        if W::FAST {
            self.store_fast(linear, value)
        } else {
            self.store(linear, value)
        }
    }

    #[inline(always)]
    pub fn modify_by<T: Int, W: Way>(
        &mut self,
        linear: u64,
        change: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Stop> {
        if W::FAST {
            self.modify_fast(linear, change)
        } else {
            self.modify(linear, change)
        }
    }

    #[inline(always)]
    pub fn push_by<T: Int, W: Way>(&mut self, value: T) -> Result<(), Stop> {
        if !W::FAST {
            return self.push(value);
        }
        if self.stack_mask != u64::MAX {
            return Err(Stop);
        }
        let rsp = self.gpr[RSP].wrapping_sub(T::BYTES);
        self.store_fast(rsp, value)?;
        self.gpr[RSP] = rsp;
        Ok(())
    }

    #[inline(always)]
    pub fn pop_by<T: Int, W: Way>(&mut self) -> Result<T, Stop> {
        if !W::FAST {
            return self.pop();
        }
        if self.stack_mask != u64::MAX {
            return Err(Stop);
        }
        let rsp = self.gpr[RSP];
        let value = self.load_fast(rsp)?;
        self.gpr[RSP] = rsp.wrapping_add(T::BYTES);
        Ok(value)
    }
}

/// Picks the instance of an [`Op`] by operand size and by whether its address is simple ([`based`]).
#[macro_export]
macro_rules! by_size_based {
    ($uop:expr, $size:expr, $op:ident $(, $arg:tt)*) => {
        match ($size, $crate::cpu::way::based($uop)) {
            (1, true) => $crate::cpu::way::quick::<$op<u8 $(, $arg)*, true>> as $crate::cpu::uop::Handler,
            (2, true) => $crate::cpu::way::quick::<$op<u16 $(, $arg)*, true>>,
            (4, true) => $crate::cpu::way::quick::<$op<u32 $(, $arg)*, true>>,
            (_, true) => $crate::cpu::way::quick::<$op<u64 $(, $arg)*, true>>,
            (1, false) => $crate::cpu::way::quick::<$op<u8 $(, $arg)*, false>>,
            (2, false) => $crate::cpu::way::quick::<$op<u16 $(, $arg)*, false>>,
            (4, false) => $crate::cpu::way::quick::<$op<u32 $(, $arg)*, false>>,
            (_, false) => $crate::cpu::way::quick::<$op<u64 $(, $arg)*, false>>,
        }
    };
}
