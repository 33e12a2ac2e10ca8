//! Addition, multiplication, division, square root, comparison.

use std::cmp::Ordering;

use super::round::shift_sticky;
use super::value::{Class, Format, Value};
use super::{flag, Env, Rounding};

/// Moves the leading one of `sig` to bit 127; `exp` belongs to bit 127.
fn normalise(exp: i32, sig: u128) -> (i32, u128) {
    let shift = sig.leading_zeros();
    (exp - shift as i32, sig << shift)
}

impl Env {
    /// Operands that stop an operation before it is done, with unmasked exceptions.
    fn stopped(&self) -> bool {
        self.unmasked() & flag::BEFORE != 0
    }

    pub fn add(&mut self, a: Value, b: Value, format: Format) -> Value {
        if let Some(nan) = self.nan(&a, &b) {
            return nan;
        }
        if a.is_infinite() && b.is_infinite() && a.sign != b.sign {
            return self.invalid();
        }
        self.denormals(&a, &b);
        if self.stopped() || a.is_infinite() {
            return a;
        }
        if b.is_infinite() {
            return b;
        }
        match (a.is_zero(), b.is_zero()) {
            (true, true) => {
                return if a.sign == b.sign {
                    a
                } else {
                    Value::zero(self.rounding == Rounding::Down)
                };
            }
            (true, false) => return self.fit(b, format),
            (false, true) => return self.fit(a, format),
            _ => {}
        }
        // The leading ones go to bit 126: a sum has room, and a difference keeps more than 60 bits below.
        let (big, small) = if (a.exp, a.sig) >= (b.exp, b.sig) {
            (a, b)
        } else {
            (b, a)
        };
        let high = u128::from(big.sig) << 63;
        let low = shift_sticky(
            u128::from(small.sig) << 63,
            (i64::from(big.exp) - i64::from(small.exp)).min(200) as u32,
        );
        let sum = if a.sign == b.sign {
            high + low
        } else {
            high - low
        };
        if sum == 0 {
            return Value::zero(self.rounding == Rounding::Down);
        }
        let (exp, sig) = normalise(big.exp + 1, sum);
        self.round(big.sign, exp, sig, format)
    }

    pub fn sub(&mut self, a: Value, b: Value, format: Format) -> Value {
        // A NaN keeps its sign.
        let b = if b.is_nan() { b } else { b.negate() };
        self.add(a, b, format)
    }

    pub fn mul(&mut self, a: Value, b: Value, format: Format) -> Value {
        if let Some(nan) = self.nan(&a, &b) {
            return nan;
        }
        let sign = a.sign != b.sign;
        if a.is_infinite() && b.is_zero() || a.is_zero() && b.is_infinite() {
            return self.invalid();
        }
        self.denormals(&a, &b);
        if self.stopped() {
            return a;
        }
        if a.is_infinite() || b.is_infinite() {
            return Value::infinity(sign);
        }
        if a.is_zero() || b.is_zero() {
            return Value::zero(sign);
        }
        let (exp, sig) = normalise(a.exp + b.exp + 1, u128::from(a.sig) * u128::from(b.sig));
        self.round(sign, exp, sig, format)
    }

    pub fn div(&mut self, a: Value, b: Value, format: Format) -> Value {
        if let Some(nan) = self.nan(&a, &b) {
            return nan;
        }
        let sign = a.sign != b.sign;
        if a.is_infinite() && b.is_infinite() || a.is_zero() && b.is_zero() {
            return self.invalid();
        }
        if b.is_zero() && a.class == Class::Finite {
            self.raise(flag::ZERO);
            return Value::infinity(sign);
        }
        self.denormals(&a, &b);
        if self.stopped() {
            return a;
        }
        if a.is_infinite() || b.is_zero() {
            return Value::infinity(sign);
        }
        if a.is_zero() || b.is_infinite() {
            return Value::zero(sign);
        }
        let divisor = u128::from(b.sig);
        let numerator = u128::from(a.sig) << 63;
        let (high, rest) = (numerator / divisor, numerator % divisor);
        let numerator = rest << 63;
        let (low, rest) = (numerator / divisor, numerator % divisor);
        // `high` has 63 or 64 bits; `low` holds the 63 below.
        let (exp, sig) = normalise(a.exp - b.exp + 1, high << 63 | low);
        self.round(sign, exp, sig | u128::from(rest != 0), format)
    }

    pub fn sqrt(&mut self, a: Value, format: Format) -> Value {
        if let Some(nan) = self.nan(&a, &Value::zero(false)) {
            return nan;
        }
        if a.is_zero() {
            return a;
        }
        if a.sign {
            return self.invalid();
        }
        self.denormals(&a, &a);
        if self.stopped() || a.is_infinite() {
            return a;
        }
        // An even exponent, and a root of 64 bits.
        let odd = a.exp & 1 != 0;
        let square = u128::from(a.sig) << if odd { 64 } else { 63 };
        let root = square.isqrt();
        let rest = square - root * root;
        // The fraction behind the root is above one half exactly if the remainder exceeds the root; it is never half.
        let sig = root << 64 | u128::from(rest > root) << 63 | u128::from(rest != 0);
        self.round(false, a.exp >> 1, sig, format)
    }

    /// `None` is "unordered". `signals`: a quiet NaN is invalid too.
    pub fn compare(&mut self, a: &Value, b: &Value, signals: bool) -> Option<Ordering> {
        if a.is_nan() || b.is_nan() {
            let quiet = |value: &Value| !value.is_nan() || value.class == Class::Quiet;
            if signals || !quiet(a) || !quiet(b) {
                self.raise(flag::INVALID);
            }
            return None;
        }
        self.denormals(a, b);
        Some(order(a, b))
    }
}

/// The order of two numbers.
fn order(a: &Value, b: &Value) -> Ordering {
    if a.is_zero() && b.is_zero() {
        return Ordering::Equal;
    }
    let rank = |value: &Value| match value.class {
        Class::Zero => (0, 0, 0),
        Class::Infinite => (2, 0, 0),
        _ => (1, value.exp, value.sig),
    };
    let magnitude = rank(a).cmp(&rank(b));
    match (a.sign && !a.is_zero(), b.sign && !b.is_zero()) {
        (false, false) => magnitude,
        (true, true) => magnitude.reverse(),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    }
}
