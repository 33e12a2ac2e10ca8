//! The transcendental functions of the x87, through the host's double precision: about 53 bits are right.
//!
//! What is exact here is what does not need digits: NaNs, infinities, zeroes, domain errors, and the flags.

use super::value::{Class, Value, DOUBLE, EXTENDED};
use super::{flag, Env};

fn to_f64(value: &Value) -> f64 {
    let mut env = Env::sse(0x1f80);
    f64::from_bits(env.fit(*value, DOUBLE).pack(DOUBLE) as u64)
}

impl Env {
    /// A computed number: inexact, in the extended format.
    fn computed(&mut self, result: f64) -> Value {
        self.raise(flag::INEXACT);
        self.fit(Value::unpack(result.to_bits().into(), DOUBLE), EXTENDED)
    }

    /// For operands of which the function is nearly a multiple: `value` * `factor`.
    fn times(&mut self, value: Value, factor: f64) -> Value {
        let factor = Value::unpack(factor.to_bits().into(), DOUBLE);
        self.raise(flag::INEXACT);
        self.mul(value, factor, EXTENDED)
    }
}

/// 2^x - 1, for -1 <= x <= 1.
pub fn exp2m1(env: &mut Env, x: Value) -> Value {
    if let Some(nan) = env.nan(&x, &Value::zero(false)) {
        return nan;
    }
    match x.class {
        Class::Infinite if x.sign => return Value::integer(-1),
        Class::Infinite | Class::Zero => return x,
        _ => {}
    }
    env.denormals(&x, &x);
    if x.exp < -64 {
        return env.times(x, std::f64::consts::LN_2);
    }
    if x.exp >= 0 {
        // Outside the domain the result is undefined; at the two ends it is exact.
        let exact = x.exp == 0 && x.sig == 1 << 63;
        return match (exact, x.sign) {
            (true, false) => Value::integer(1),
            (true, true) => env.fit(Value::finite(true, -1, 1 << 63), EXTENDED),
            _ => x,
        };
    }
    env.computed((to_f64(&x) * std::f64::consts::LN_2).exp_m1())
}

/// sin, cos, tan; `None` from 2^63 on (C2).
pub fn trigonometric(env: &mut Env, x: Value, f: fn(f64) -> f64) -> Option<Value> {
    if let Some(nan) = env.nan(&x, &Value::zero(false)) {
        return Some(nan);
    }
    if x.is_infinite() {
        return Some(env.invalid());
    }
    let odd = f(0.0) == 0.0;
    if x.is_zero() {
        return Some(if odd { x } else { Value::integer(1) });
    }
    if x.exp >= 63 {
        return None;
    }
    env.denormals(&x, &x);
    if x.exp < -40 {
        env.raise(flag::INEXACT);
        return Some(if odd {
            env.fit(x, EXTENDED)
        } else {
            Value::integer(1)
        });
    }
    Some(env.computed(f(to_f64(&x))))
}

/// y * log2(x).
pub fn y_log2(env: &mut Env, x: Value, y: Value) -> Value {
    if let Some(nan) = env.nan(&x, &y) {
        return nan;
    }
    if x.sign && !x.is_zero() || y.is_zero() && (x.is_zero() || x.is_infinite()) {
        return env.invalid();
    }
    let one = x.class == Class::Finite && x.exp == 0 && x.sig == 1 << 63;
    if one && y.is_infinite() {
        return env.invalid();
    }
    if x.is_zero() {
        if y.is_infinite() {
            return Value::infinity(!y.sign);
        }
        env.raise(flag::ZERO);
        return Value::infinity(!y.sign);
    }
    env.denormals(&x, &y);
    let below = x.class == Class::Finite && x.exp < 0;
    if x.is_infinite() || y.is_infinite() {
        return Value::infinity(y.sign != below);
    }
    if one || y.is_zero() {
        return Value::zero(y.sign != below);
    }
    let fraction = Value { exp: 0, ..x };
    let log = if x.exp == -1 {
        (to_f64(&fraction) / 2.0).log2()
    } else {
        to_f64(&fraction).log2() + f64::from(x.exp)
    };
    if x.sig == 1 << 63 {
        // A power of two has an exact logarithm.
        return env.mul(y, Value::integer(x.exp.into()), EXTENDED);
    }
    env.times(y, log)
}

/// y * log2(x + 1), for small x.
pub fn y_log2p1(env: &mut Env, x: Value, y: Value) -> Value {
    if let Some(nan) = env.nan(&x, &y) {
        return nan;
    }
    if x.is_infinite() && (x.sign || y.is_zero()) || x.is_zero() && y.is_infinite() {
        return env.invalid();
    }
    env.denormals(&x, &y);
    if x.is_infinite() || y.is_infinite() {
        return Value::infinity(x.sign != y.sign);
    }
    if x.is_zero() || y.is_zero() {
        return Value::zero(x.sign != y.sign);
    }
    let log2_e = std::f64::consts::LOG2_E;
    if x.exp < -40 {
        let factor = Value::unpack(log2_e.to_bits().into(), DOUBLE);
        let mut inner = *env;
        let log = inner.mul(x, factor, EXTENDED);
        env.raise(flag::INEXACT);
        return env.mul(y, log, EXTENDED);
    }
    env.times(y, to_f64(&x).ln_1p() * log2_e)
}

/// The angle of the point (x, y).
pub fn arctangent(env: &mut Env, x: Value, y: Value) -> Value {
    if let Some(nan) = env.nan(&x, &y) {
        return nan;
    }
    env.denormals(&x, &y);
    if y.is_zero() && !x.sign || x.is_infinite() && !x.sign && !y.is_infinite() {
        return Value::zero(y.sign);
    }
    // Only the quotient matters: keep the exponents in double's range.
    let shift = if x.class == Class::Finite && y.class == Class::Finite {
        x.exp.max(y.exp)
    } else {
        0
    };
    let near = |mut value: Value| {
        if value.class == Class::Finite {
            value.exp = (value.exp - shift).max(-1000);
        }
        to_f64(&value)
    };
    env.computed(near(y).atan2(near(x)))
}
