//! Rounding: from an exact (or sticky) result to a format.

use super::value::{Class, Format, Value, EXTENDED};
use super::{flag, Env, Rounding};

/// `sig` >> `by`, with whatever falls out remembered in the lowest bit.
#[inline]
pub fn shift_sticky(sig: u128, by: u32) -> u128 {
    match by {
        0 => sig,
        1..=127 => sig >> by | u128::from(sig << (128 - by) != 0),
        _ => u128::from(sig != 0),
    }
}

/// A significand rounded to fewer bits.
struct Rounded {
    /// Right-aligned; may have carried into one more bit.
    sig: u128,
    inexact: bool,
    up: bool,
}

impl Env {
    /// Drops the `drop` lowest bits (1 to 127).
    #[inline]
    fn round_off(&self, sig: u128, drop: u32, sign: bool) -> Rounded {
        let rest = sig & ((1 << drop) - 1);
        let half = 1 << (drop - 1);
        let kept = sig >> drop;
        let up = match self.rounding {
            Rounding::Nearest => rest > half || rest == half && kept & 1 != 0,
            Rounding::Down => sign && rest != 0,
            Rounding::Up => !sign && rest != 0,
            Rounding::Zero => false,
        };
        Rounded {
            sig: kept + u128::from(up),
            inexact: rest != 0,
            up,
        }
    }

    /// Rounds `sig` / 2^127 * 2^`exp` to `format`; the top bit of `sig` is set, its lowest bit may be sticky.
    #[inline]
    pub fn round(&mut self, sign: bool, exp: i32, sig: u128, format: Format) -> Value {
        let precision = if format == EXTENDED {
            self.precision
        } else {
            format.precision
        };
        let drop = 128 - precision;
        let smallest = 1 - format.bias();
        let rounded = self.round_off(sig, drop, sign);
        let carried = rounded.sig >> precision != 0;
        if exp < smallest && !(carried && exp == smallest - 1) {
            return self.round_tiny(sign, exp, sig, format, drop);
        }
        if exp < smallest {
            // Not tiny, since rounding with an unbounded exponent reaches the smallest normal number; but what is
            // stored is rounded at the place of denormal numbers.
            return self.round_denormal(sign, exp, sig, format, drop, false);
        }
        let exp = exp + i32::from(carried);
        let kept = if carried {
            rounded.sig >> 1
        } else {
            rounded.sig
        };
        if exp > format.bias() {
            let rounded = Rounded {
                sig: kept,
                ..rounded
            };
            return self.overflow(sign, exp, &rounded, precision, format);
        }
        if rounded.inexact {
            self.raise(flag::INEXACT);
            self.up = rounded.up;
        }
        Value {
            class: Class::Finite,
            exp,
            sig: (kept as u64) << (64 - precision),
            ..Value::zero(sign)
        }
    }

    fn overflow(
        &mut self,
        sign: bool,
        exp: i32,
        rounded: &Rounded,
        precision: u32,
        format: Format,
    ) -> Value {
        self.raise(flag::OVERFLOW);
        if self.masks & flag::OVERFLOW == 0 {
            if rounded.inexact {
                self.raise(flag::INEXACT);
                self.up = rounded.up;
            }
            if format != EXTENDED {
                return Value::infinity(sign);
            }
            // What an x87 register receives: the exponent wrapped by 24576 (SDM volume 1, 8.5.4).
            let exp = exp - 24576;
            if exp > format.bias() {
                // FSCALE alone gets so far.
                self.raise(flag::INEXACT);
                self.up = true;
                return Value::infinity(sign);
            }
            return Value {
                class: Class::Finite,
                exp,
                sig: (rounded.sig as u64) << (64 - precision),
                ..Value::zero(sign)
            };
        }
        self.raise(flag::INEXACT);
        let to_infinity = match self.rounding {
            Rounding::Nearest => true,
            Rounding::Down => sign,
            Rounding::Up => !sign,
            Rounding::Zero => false,
        };
        self.up = to_infinity;
        if to_infinity {
            return Value::infinity(sign);
        }
        Value {
            class: Class::Finite,
            exp: format.bias(),
            sig: u64::MAX << (64 - precision),
            ..Value::zero(sign)
        }
    }

    #[cold]
    fn round_tiny(&mut self, sign: bool, exp: i32, sig: u128, format: Format, drop: u32) -> Value {
        if self.masks & flag::UNDERFLOW == 0 {
            self.raise(flag::UNDERFLOW);
            let rounded = self.round_off(sig, drop, sign);
            if rounded.inexact {
                self.raise(flag::INEXACT);
                self.up = rounded.up;
            }
            if format != EXTENDED {
                return Value::zero(sign);
            }
            let carried = rounded.sig >> (128 - drop) != 0;
            let exp = exp + 24576 + i32::from(carried);
            let kept = rounded.sig >> u32::from(carried);
            if exp < 1 - format.bias() {
                self.raise(flag::INEXACT);
                self.up = false;
                return Value::zero(sign);
            }
            return Value {
                class: Class::Finite,
                exp,
                sig: (kept as u64) << (drop - 64),
                ..Value::zero(sign)
            };
        }
        if self.ftz {
            self.raise(flag::UNDERFLOW | flag::INEXACT);
            return Value::zero(sign);
        }
        self.round_denormal(sign, exp, sig, format, drop, true)
    }

    fn round_denormal(
        &mut self,
        sign: bool,
        exp: i32,
        sig: u128,
        format: Format,
        drop: u32,
        tiny: bool,
    ) -> Value {
        let smallest = 1 - format.bias();
        let shifted = shift_sticky(sig, (smallest - exp) as u32);
        let rounded = self.round_off(shifted, drop, sign);
        if rounded.inexact {
            self.raise(flag::INEXACT | if tiny { flag::UNDERFLOW } else { 0 });
            self.up = rounded.up;
        }
        let sig = (rounded.sig as u64) << (drop - 64);
        if sig == 0 {
            return Value::zero(sign);
        }
        Value {
            class: Class::Finite,
            exp: smallest,
            sig,
            ..Value::zero(sign)
        }
    }

    /// A value of any format brought to `format`.
    pub fn fit(&mut self, value: Value, format: Format) -> Value {
        if value.class != Class::Finite {
            return value;
        }
        self.round(value.sign, value.exp, u128::from(value.sig) << 64, format)
    }

    /// Rounds to an integer in magnitude: (magnitude, inexact, away from zero); `None` if it has more than 64 bits.
    pub fn integral(&self, value: &Value) -> Option<(u64, bool, bool)> {
        if value.is_zero() {
            return Some((0, false, false));
        }
        if value.exp > 63 {
            return None;
        }
        // Two more bits below the point than the shift needs, so that a sticky bit is never the rounding bit.
        let sig = shift_sticky(u128::from(value.sig) << 63, (63 - value.exp) as u32);
        let rounded = self.round_off(sig, 63, value.sign);
        let magnitude = u64::try_from(rounded.sig).ok()?;
        Some((magnitude, rounded.inexact, rounded.up))
    }
}
