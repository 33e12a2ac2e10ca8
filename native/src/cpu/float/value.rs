//! A number taken apart: class, sign, exponent, significand.

use super::{flag, Env};

/// An interchange format. `precision` counts the leading one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    pub precision: u32,
    pub exponent_bits: u32,
}

pub const SINGLE: Format = Format {
    precision: 24,
    exponent_bits: 8,
};
pub const DOUBLE: Format = Format {
    precision: 53,
    exponent_bits: 11,
};
/// x87's 80-bit format, the only one with an explicit leading one.
pub const EXTENDED: Format = Format {
    precision: 64,
    exponent_bits: 15,
};

impl Format {
    #[inline(always)]
    pub fn bias(self) -> i32 {
        (1 << (self.exponent_bits - 1)) - 1
    }

    #[inline(always)]
    fn exponent_mask(self) -> u128 {
        (1 << self.exponent_bits) - 1
    }

    /// Bits below the exponent.
    #[inline(always)]
    fn low_bits(self) -> u32 {
        if self.precision == 64 {
            64
        } else {
            self.precision - 1
        }
    }

    #[inline(always)]
    pub fn sign_bit(self) -> u32 {
        self.low_bits() + self.exponent_bits
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Zero,
    Finite,
    Infinite,
    Quiet,
    Signaling,
    /// An encoding of the extended format that no 80387 or later produces (unnormal, pseudo-infinity, pseudo-NaN).
    Unsupported,
}

/// Finite: `sig` has its top bit set, and the value is `sig` / 2^63 * 2^`exp`. NaN: `sig` as the extended format
/// has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Value {
    pub class: Class,
    pub sign: bool,
    pub exp: i32,
    pub sig: u64,
    pub denormal: bool,
}

const TOP: u64 = 1 << 63;
const QUIET: u64 = 1 << 62;

impl Value {
    pub const fn zero(sign: bool) -> Value {
        Value {
            class: Class::Zero,
            sign,
            exp: 0,
            sig: 0,
            denormal: false,
        }
    }

    pub const fn infinity(sign: bool) -> Value {
        Value {
            class: Class::Infinite,
            ..Value::zero(sign)
        }
    }

    /// The NaN that masked invalid operations deliver ("real indefinite").
    pub const fn indefinite() -> Value {
        Value {
            class: Class::Quiet,
            sig: TOP | QUIET,
            ..Value::zero(true)
        }
    }

    pub fn finite(sign: bool, exp: i32, sig: u64) -> Value {
        if sig == 0 {
            return Value::zero(sign);
        }
        let shift = sig.leading_zeros();
        Value {
            class: Class::Finite,
            exp: exp - shift as i32,
            sig: sig << shift,
            ..Value::zero(sign)
        }
    }

    /// An integer, exactly.
    pub fn integer(value: i64) -> Value {
        Value::finite(value < 0, 63, value.unsigned_abs())
    }

    #[inline]
    pub fn unpack(bits: u128, format: Format) -> Value {
        let low_bits = format.low_bits();
        let sign = bits >> format.sign_bit() & 1 != 0;
        let exponent = (bits >> low_bits & format.exponent_mask()) as i32;
        let low = (bits & ((1 << low_bits) - 1)) as u64;
        let top = exponent == format.exponent_mask() as i32;
        let explicit = low_bits == 64;
        // The significand with its leading one at bit 63.
        let sig = if explicit {
            low
        } else {
            low << (64 - format.precision) | if exponent != 0 { TOP } else { 0 }
        };
        if explicit && exponent != 0 && sig & TOP == 0 {
            return Value {
                class: Class::Unsupported,
                ..Value::zero(sign)
            };
        }
        if top {
            if sig << 1 == 0 {
                return Value::infinity(sign);
            }
            let class = if sig & QUIET != 0 {
                Class::Quiet
            } else {
                Class::Signaling
            };
            return Value {
                class,
                sig,
                ..Value::zero(sign)
            };
        }
        let mut value = Value::finite(sign, exponent.max(1) - format.bias(), sig);
        value.denormal = exponent == 0 && sig != 0;
        value
    }

    /// Bits of a value that the format holds exactly (a rounded one, or no finite one). `denormal` says that `exp` is
    /// the format's smallest and the leading one may be missing.
    #[inline]
    pub fn pack(&self, format: Format) -> u128 {
        let low_bits = format.low_bits();
        let explicit = low_bits == 64;
        let mask = (1u128 << low_bits) - 1;
        let (exponent, sig) = match self.class {
            Class::Zero => (0, 0),
            Class::Infinite => (format.exponent_mask(), TOP),
            Class::Finite if self.sig & TOP == 0 => (0, self.sig),
            Class::Finite => ((self.exp + format.bias()) as u128, self.sig),
            _ => (format.exponent_mask(), self.sig | TOP),
        };
        let low = if explicit {
            u128::from(sig)
        } else {
            u128::from(sig >> (64 - format.precision)) & mask
        };
        u128::from(self.sign) << format.sign_bit() | exponent << low_bits | low
    }

    pub fn is_nan(&self) -> bool {
        matches!(
            self.class,
            Class::Quiet | Class::Signaling | Class::Unsupported
        )
    }

    pub fn is_zero(&self) -> bool {
        self.class == Class::Zero
    }

    pub fn is_infinite(&self) -> bool {
        self.class == Class::Infinite
    }

    pub fn negate(mut self) -> Value {
        self.sign = !self.sign;
        self
    }

    pub fn quieted(mut self) -> Value {
        if self.class == Class::Unsupported {
            return Value::indefinite();
        }
        self.sig |= QUIET;
        self.class = Class::Quiet;
        self
    }
}

impl Env {
    /// Takes an operand apart, with DAZ applied.
    #[inline]
    pub fn take(&self, bits: u128, format: Format) -> Value {
        let value = Value::unpack(bits, format);
        if self.daz && value.denormal {
            return Value::zero(value.sign);
        }
        value
    }

    /// The result if an operand is a NaN or no number: invalid raised for the signaling ones.
    pub fn nan(&mut self, a: &Value, b: &Value) -> Option<Value> {
        if !a.is_nan() && !b.is_nan() {
            return None;
        }
        if a.class == Class::Unsupported || b.class == Class::Unsupported {
            self.raise(flag::INVALID);
            return Some(Value::indefinite());
        }
        let signaling = (a.class == Class::Signaling, b.class == Class::Signaling);
        if signaling.0 || signaling.1 {
            self.raise(flag::INVALID);
        }
        let first = if !a.is_nan() {
            false
        } else if !b.is_nan() || !self.x87 {
            true
        } else if signaling.0 != signaling.1 {
            // x87: the quiet one of two NaNs.
            signaling.1
        } else {
            // The larger significand; of two equal ones the positive.
            (a.sig, b.sign) >= (b.sig, a.sign)
        };
        Some(if first { *a } else { *b }.quieted())
    }

    /// Notes denormal operands.
    #[inline]
    pub fn denormals(&mut self, a: &Value, b: &Value) {
        if a.denormal || b.denormal {
            self.raise(flag::DENORMAL);
        }
    }

    pub fn invalid(&mut self) -> Value {
        self.raise(flag::INVALID);
        Value::indefinite()
    }
}
