//! FPREM, FPREM1, FSCALE, FXTRACT: exact operations of the extended format.

use super::value::{Class, Value, EXTENDED};
use super::{flag, Env};

/// What FPREM and FPREM1 deliver.
pub struct Partial {
    pub value: Value,
    /// Low three bits of the quotient.
    pub quotient: u8,
    /// The exponents were near enough for one step.
    pub complete: bool,
}

/// The remainder of `a` by `b`, with the quotient truncated, or rounded to nearest.
pub fn remainder(env: &mut Env, a: Value, b: Value, nearest: bool) -> Partial {
    let whole = |value| Partial {
        value,
        quotient: 0,
        complete: true,
    };
    if let Some(nan) = env.nan(&a, &b) {
        return whole(nan);
    }
    if a.is_infinite() || b.is_zero() {
        return whole(env.invalid());
    }
    env.denormals(&a, &b);
    if env.unmasked() & flag::BEFORE != 0 || a.is_zero() || b.is_infinite() {
        return whole(env.fit(a, EXTENDED));
    }
    let distance = a.exp - b.exp;
    if distance >= 64 {
        return partial(env, a, b, distance);
    }
    if distance < -1 || distance < 0 && !nearest {
        return whole(env.fit(a, EXTENDED));
    }
    // Both over 2^(b.exp - 64), so that halves of `b` are whole.
    let (top, bottom) = (u128::from(a.sig) << (distance + 1), u128::from(b.sig) << 1);
    let (mut quotient, mut rest) = (top / bottom, top % bottom);
    let mut sign = a.sign;
    if nearest && (2 * rest > bottom || 2 * rest == bottom && quotient & 1 != 0) {
        rest = bottom - rest;
        quotient += 1;
        sign = !sign;
    }
    let value = if rest == 0 {
        Value::zero(a.sign)
    } else {
        let shift = rest.leading_zeros() as i32;
        // The remainder has at most 64 significant bits.
        env.round(sign, b.exp - 1 + 64 - shift, rest << shift, EXTENDED)
    };
    Partial {
        value,
        quotient: (quotient & 7) as u8,
        complete: true,
    }
}

/// One step towards the remainder, with the exponents 64 or more apart: the distance shrinks by 32 to 63.
fn partial(env: &mut Env, a: Value, b: Value, distance: i32) -> Partial {
    let steps = distance & 31 | 32;
    let top = u128::from(a.sig) << steps;
    let rest = (top % u128::from(b.sig)) as u64;
    let value = Value::finite(a.sign, b.exp + distance - steps, rest);
    Partial {
        value: env.fit(value, EXTENDED),
        quotient: 0,
        complete: false,
    }
}

impl Env {
    /// FSCALE: `a` * 2^trunc(`b`).
    pub fn scale(&mut self, a: Value, b: Value) -> Value {
        if let Some(nan) = self.nan(&a, &b) {
            return nan;
        }
        if b.is_infinite() {
            if b.sign && a.is_infinite() || !b.sign && a.is_zero() {
                return self.invalid();
            }
            self.denormals(&a, &a);
            return if b.sign {
                Value::zero(a.sign)
            } else {
                Value::infinity(a.sign)
            };
        }
        if a.class != Class::Finite {
            self.denormals(&b, &b);
            return a;
        }
        self.denormals(&a, &b);
        if self.unmasked() & flag::BEFORE != 0 {
            return a;
        }
        let by = match b.class {
            Class::Finite if b.exp >= 17 => 1 << 17,
            Class::Finite if b.exp >= 0 => (b.sig >> (63 - b.exp)) as i32,
            _ => 0,
        };
        let exp = a.exp + if b.sign { -by } else { by };
        self.round(a.sign, exp, u128::from(a.sig) << 64, EXTENDED)
    }

    /// FXTRACT: (exponent, significand).
    pub fn extract(&mut self, a: Value) -> (Value, Value) {
        if let Some(nan) = self.nan(&a, &Value::zero(false)) {
            return (nan, nan);
        }
        match a.class {
            Class::Zero => {
                self.raise(flag::ZERO);
                (Value::infinity(true), a)
            }
            Class::Infinite => (Value::infinity(false), a),
            _ => {
                self.denormals(&a, &a);
                let significand = Value {
                    exp: 0,
                    denormal: false,
                    ..a
                };
                (Value::integer(a.exp.into()), significand)
            }
        }
    }
}
