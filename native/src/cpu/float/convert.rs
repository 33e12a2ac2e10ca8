//! Conversions: between formats, and from and to integers.

use super::value::{Class, Format, Value};
use super::{flag, Env, Rounding};

impl Env {
    /// A value of another format: CVTSS2SD and its like, FLD m32/m64, FST m32/m64.
    pub fn convert(&mut self, value: Value, format: Format) -> Value {
        if let Some(nan) = self.nan(&value, &Value::zero(false)) {
            return nan;
        }
        self.denormals(&value, &value);
        if self.unmasked() & flag::BEFORE != 0 {
            return value;
        }
        self.fit(value, format)
    }

    /// To a signed integer of `bits`; out of range and NaN are invalid and give the integer indefinite (the most
    /// negative one).
    pub fn to_int(&mut self, value: &Value, bits: u32, truncate: bool) -> i64 {
        let indefinite = i64::MIN >> (64 - bits);
        let mut rules = *self;
        if truncate {
            rules.rounding = Rounding::Zero;
        }
        let number = match value.class {
            Class::Zero | Class::Finite => rules.integral(value),
            _ => None,
        };
        let limit = 1u64 << (bits - 1);
        match number {
            Some((magnitude, inexact, up))
                if magnitude < limit || magnitude == limit && value.sign =>
            {
                if inexact {
                    self.raise(flag::INEXACT);
                    self.up = up;
                }
                if value.sign {
                    (magnitude as i64).wrapping_neg()
                } else {
                    magnitude as i64
                }
            }
            _ => {
                self.raise(flag::INVALID);
                indefinite
            }
        }
    }

    /// From a signed integer.
    pub fn from_int(&mut self, value: i64, format: Format) -> Value {
        self.fit(Value::integer(value), format)
    }

    /// Rounds to an integral number in the same format: FRNDINT, ROUNDPS and the like.
    pub fn round_integral(&mut self, value: Value) -> Value {
        if let Some(nan) = self.nan(&value, &Value::zero(false)) {
            return nan;
        }
        if value.class != Class::Finite || value.exp >= 63 {
            return value;
        }
        match self.integral(&value) {
            Some((magnitude, inexact, up)) => {
                if inexact {
                    self.raise(flag::INEXACT);
                    self.up = up;
                }
                Value::finite(value.sign, 63, magnitude)
            }
            None => value,
        }
    }
}
