//! Binary floating point in software: single, double and the x87's extended format, with every rounding mode and all
//! six exception flags (SDM volume 1, chapters 4.8, 4.9, 8 and 11.5).
//!
//! The host's own floating point cannot say what an operation raised, does not have the 80-bit format everywhere, and
//! rounds as the host pleases; so one implementation serves SSE and x87. [`value`] takes numbers apart, [`round`] puts
//! them together, [`arith`] and [`convert`] work between.

pub mod arith;
pub mod convert;
pub mod remainder;
pub mod round;
pub mod transcendental;
pub mod value;

pub use value::{Class, Format, Value, DOUBLE, EXTENDED, SINGLE};

/// Exception flags, at their places in MXCSR and in the x87 status word.
pub mod flag {
    pub const INVALID: u16 = 1;
    pub const DENORMAL: u16 = 2;
    pub const ZERO: u16 = 4;
    pub const OVERFLOW: u16 = 8;
    pub const UNDERFLOW: u16 = 16;
    pub const INEXACT: u16 = 32;
    pub const ALL: u16 = 63;
    /// Those found before the operation: an unmasked one keeps it from being done at all.
    pub const BEFORE: u16 = INVALID | DENORMAL | ZERO;
}

/// Rounding control, as encoded in MXCSR.RC and FCW.RC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rounding {
    Nearest,
    Down,
    Up,
    Zero,
}

impl Rounding {
    pub fn from_bits(bits: u32) -> Rounding {
        match bits & 3 {
            0 => Rounding::Nearest,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        }
    }
}

/// The rules an operation runs under, and what it raised.
#[derive(Clone, Copy, Debug)]
pub struct Env {
    pub rounding: Rounding,
    /// Masked exceptions.
    pub masks: u16,
    /// Raised exceptions.
    pub flags: u16,
    /// Denormal operands count as zero (MXCSR.DAZ).
    pub daz: bool,
    /// Tiny results become zero (MXCSR.FZ, with underflow masked).
    pub ftz: bool,
    /// x87: unmasked overflow and underflow deliver a result with a wrapped exponent; NaNs are chosen by significand.
    pub x87: bool,
    /// Bits of significand that results in the extended format are rounded to (FCW.PC); 64 if all.
    pub precision: u32,
    /// The last rounding went away from zero (x87's C1).
    pub up: bool,
}

impl Env {
    /// Rules of SSE instructions.
    #[inline]
    pub fn sse(mxcsr: u32) -> Env {
        let masks = (mxcsr >> 7) as u16 & flag::ALL;
        Env {
            rounding: Rounding::from_bits(mxcsr >> 13),
            masks,
            flags: 0,
            daz: mxcsr & 0x40 != 0,
            ftz: mxcsr & 0x8000 != 0 && masks & flag::UNDERFLOW != 0,
            x87: false,
            precision: 64,
            up: false,
        }
    }

    /// Rules of x87 instructions.
    pub fn x87(control: u16) -> Env {
        Env {
            rounding: Rounding::from_bits(u32::from(control) >> 10),
            masks: control & flag::ALL,
            flags: 0,
            daz: false,
            ftz: false,
            x87: true,
            precision: match control >> 8 & 3 {
                0 => 24,
                2 => 53,
                _ => 64,
            },
            up: false,
        }
    }

    pub fn raise(&mut self, flags: u16) {
        self.flags |= flags;
    }

    /// Exceptions that were raised and are not masked.
    pub fn unmasked(&self) -> u16 {
        self.flags & !self.masks
    }
}
