//! Floating-point arithmetic on XMM registers: scalar and packed, single and double.

use std::cmp::Ordering;

use iced_x86::{Instruction, Mnemonic};

use super::source;
use crate::cpu::flags::{Lazy, CF, PF, ZF};
use crate::cpu::float::{flag, Class, Env, Format, Value, DOUBLE, SINGLE};
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

const ADD: u8 = 0;
const SUB: u8 = 1;
const MUL: u8 = 2;
const DIV: u8 = 3;
const MIN: u8 = 4;
const MAX: u8 = 5;
const SQRT: u8 = 6;
const CMP: u8 = 7;
const ROUND: u8 = 8;

/// An element type.
trait Element {
    const FORMAT: Format;
    const BITS: u32;
    /// The host's own operation, where its result is the processor's: nearest, all exceptions masked, inexact noted
    /// already, and operands and result normal numbers, so that nothing else can have been raised.
    fn host<const OP: u8>(a: u64, b: u64) -> Option<u64>;
}

macro_rules! element {
    ($name:ident, $float:ty, $bits:ty, $format:expr, $exponent:literal, $shift:literal) => {
        struct $name;
        impl Element for $name {
            const FORMAT: Format = $format;
            const BITS: u32 = <$bits>::BITS;
            #[inline(always)]
            fn host<const OP: u8>(a: u64, b: u64) -> Option<u64> {
                let normal =
                    |bits: $bits| (bits >> $shift & $exponent).wrapping_sub(1) < $exponent - 1;
                if !normal(a as $bits) || !normal(b as $bits) {
                    return None;
                }
                let (a, b) = (
                    <$float>::from_bits(a as $bits),
                    <$float>::from_bits(b as $bits),
                );
                let result = match OP {
                    ADD => a + b,
                    SUB => a - b,
                    MUL => a * b,
                    DIV => a / b,
                    SQRT => b.sqrt(),
                    _ => return None,
                }
                .to_bits();
                // The smallest normal number may be a tiny result rounded up.
                let exponent = result >> $shift & $exponent;
                (exponent > 1 && exponent < $exponent).then_some(result.into())
            }
        }
    };
}
element!(Single, f32, u32, SINGLE, 0xff, 23);
element!(Double, f64, u64, DOUBLE, 0x7ff, 52);

/// MXCSR with which [`Element::host`] is right: nearest, everything masked, inexact raised.
fn host_rounds(mxcsr: u32) -> bool {
    mxcsr & 0x7fa0 == 0x1fa0
}

impl Cpu {
    /// Adds what an SSE instruction raised to MXCSR; #XM (or #UD without CR4.OSXMMEXCPT) if something is unmasked.
    #[inline]
    pub fn sse_done(&mut self, env: &Env) -> Result<(), Stop> {
        let mut flags = env.flags;
        let stop = env.unmasked();
        if stop & flag::BEFORE != 0 {
            flags &= flag::BEFORE;
        }
        self.ext.mxcsr |= u32::from(flags);
        if stop == 0 {
            return Ok(());
        }
        if self.cr4 & crate::cpu::state::cr4::OSXMMEXCPT == 0 {
            return Err(self.ud());
        }
        Err(self.raise(19, None))
    }
}

/// One element. `imm`: predicate of CMPxx, mode of ROUNDxx.
fn element<const OP: u8>(env: &mut Env, a: u64, b: u64, imm: u8, format: Format) -> u64 {
    let x = env.take(a.into(), format);
    let y = env.take(b.into(), format);
    let result = match OP {
        ADD => env.add(x, y, format),
        SUB => env.sub(x, y, format),
        MUL => env.mul(x, y, format),
        DIV => env.div(x, y, format),
        SQRT => env.sqrt(y, format),
        ROUND => round(env, y, imm),
        MIN | MAX => {
            // NaNs and equal numbers: the second operand as it is (a denormal that counts as zero is one).
            let order = env.compare(&x, &y, true);
            let wanted = if OP == MIN {
                Ordering::Less
            } else {
                Ordering::Greater
            };
            let (value, bits) = if order == Some(wanted) {
                (x, a)
            } else {
                (y, b)
            };
            return if value.is_zero() {
                value.pack(format) as u64
            } else {
                bits
            };
        }
        _ => {
            let holds = predicate(env, &x, &y, imm);
            return if holds { u64::MAX } else { 0 };
        }
    };
    result.pack(format) as u64
}

/// CMPxx: EQ, LT, LE, UNORD and their negations. The ordering ones signal on quiet NaNs.
fn predicate(env: &mut Env, a: &Value, b: &Value, imm: u8) -> bool {
    let signals = matches!(imm & 3, 1 | 2);
    let order = env.compare(a, b, signals);
    let holds = match imm & 3 {
        0 => order == Some(Ordering::Equal),
        1 => order == Some(Ordering::Less),
        2 => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        _ => order.is_none(),
    };
    holds != (imm & 4 != 0)
}

/// ROUNDxx: bits 1:0 the mode unless bit 2 takes MXCSR's; bit 3 keeps inexact from being raised.
fn round(env: &mut Env, value: Value, imm: u8) -> Value {
    let mut rules = *env;
    if imm & 4 == 0 {
        rules.rounding = crate::cpu::float::Rounding::from_bits(imm.into());
    }
    let result = rules.round_integral(value);
    let kept = if imm & 8 != 0 {
        !flag::INEXACT
    } else {
        flag::ALL
    };
    env.raise(rules.flags & kept);
    result
}

/// Element-wise over a register; a scalar keeps the rest of the destination.
#[inline(always)]
fn each<E: Element>(a: u128, b: u128, scalar: bool, mut f: impl FnMut(u64, u64) -> u64) -> u128 {
    let lane = u128::MAX >> (128 - E::BITS);
    let mut result = if scalar { a & !lane } else { 0 };
    let count = if scalar { 1 } else { 128 / E::BITS };
    for n in 0..count {
        let at = n * E::BITS;
        let value = f((a >> at & lane) as u64, (b >> at & lane) as u64);
        result |= (u128::from(value) & lane) << at;
    }
    result
}

fn arith<E: Element, const OP: u8, const SCALAR: bool>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let mut env = Env::sse(cpu.ext.mxcsr);
        let quick = host_rounds(cpu.ext.mxcsr);
        let imm = u.imm as u8;
        let result = each::<E>(a, b, SCALAR, |a, b| {
            let host = if quick {
                E::host::<OP>(if OP == SQRT { b } else { a }, b)
            } else {
                None
            };
            match host {
                Some(value) => value,
                None => element::<OP>(&mut env, a, b, imm, E::FORMAT),
            }
        });
        cpu.sse_done(&env)?;
        cpu.ext.xmm[usize::from(u.dst & 15)] = result;
        Ok(())
    })
}

/// ADDSUBPx, HADDPx, HSUBPx (`op` & 15: 0, 1, 2).
fn neighbours<E: Element>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let mut env = Env::sse(cpu.ext.mxcsr);
        let lane = u128::MAX >> (128 - E::BITS);
        let get = |from: u128, n: u32| (from >> (n * E::BITS) & lane) as u64;
        let count = 128 / E::BITS;
        let mut result = 0;
        for n in 0..count {
            let half = n >= count / 2;
            let (x, y, subtract) = match u.op & 15 {
                0 => (get(a, n), get(b, n), n & 1 == 0),
                kind => {
                    let from = if half { b } else { a };
                    let at = n % (count / 2) * 2;
                    (get(from, at), get(from, at + 1), kind == 2)
                }
            };
            let value = if subtract {
                element::<SUB>(&mut env, x, y, 0, E::FORMAT)
            } else {
                element::<ADD>(&mut env, x, y, 0, E::FORMAT)
            };
            result |= (u128::from(value) & lane) << (n * E::BITS);
        }
        cpu.sse_done(&env)?;
        cpu.ext.xmm[usize::from(u.dst & 15)] = result;
        Ok(())
    })
}

/// DPPS, DPPD: products picked by the immediate's high half, their sum to the places its low half names.
fn dot<E: Element>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let imm = u.imm as u8;
        let lane = u128::MAX >> (128 - E::BITS);
        let count = 128 / E::BITS;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let mut products = [0; 4];
        for (n, product) in products.iter_mut().enumerate().take(count as usize) {
            if imm >> (4 + n) & 1 != 0 {
                let at = n as u32 * E::BITS;
                let (x, y) = ((a >> at & lane) as u64, (b >> at & lane) as u64);
                *product = element::<MUL>(&mut env, x, y, 0, E::FORMAT);
            }
        }
        // An unmasked exception of one step keeps the next from being done.
        cpu.sse_done(&env)?;
        // Sums of neighbours, then of halves. Of two NaNs the first operand's goes on: that of the place itself, but
        // of its neighbour in the first step of DPPS. (The SDM leaves it open; this is what Intel's processors do.)
        for distance in [1, 2] {
            if distance < count as usize {
                let sums = [0, 1, 2, 3].map(|n: usize| {
                    let first = if count == 4 && distance == 1 {
                        n ^ 1
                    } else {
                        n
                    };
                    let (x, y) = (products[first], products[first ^ distance]);
                    element::<ADD>(&mut env, x, y, 0, E::FORMAT)
                });
                cpu.sse_done(&env)?;
                products = sums;
            }
        }
        let mut result = 0;
        for n in 0..count {
            if imm >> n & 1 != 0 {
                result |= (u128::from(products[n as usize]) & lane) << (n * E::BITS);
            }
        }
        cpu.ext.xmm[usize::from(u.dst & 15)] = result;
        Ok(())
    })
}

/// COMISx, and UCOMISx (`op` bit 0), which signals on signaling NaNs only.
fn compare<E: Element>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let lane = u128::MAX >> (128 - E::BITS);
        let mut env = Env::sse(cpu.ext.mxcsr);
        let x = env.take(a & lane, E::FORMAT);
        let y = env.take(b & lane, E::FORMAT);
        let order = env.compare(&x, &y, u.op & 1 == 0);
        cpu.sse_done(&env)?;
        cpu.cc = Lazy::bits(order_flags(order));
        Ok(())
    })
}

/// ZF, PF and CF as COMISx and FCOMI set them.
pub fn order_flags(order: Option<Ordering>) -> u64 {
    match order {
        None => ZF | PF | CF,
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
    }
}

/// RCPPS (`op` bit 0 clear) and RSQRTPS: approximations. The architecture bounds their relative error by
/// 1.5 * 2^-12; here it is that of rounding to 13 bits. No exceptions.
fn approximate(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let root = u.op & 1 != 0;
        let result = each::<Single>(a, b, u.op & 2 != 0, |_, b| {
            reciprocal(b as u32, root).into()
        });
        cpu.ext.xmm[usize::from(u.dst & 15)] = result;
        Ok(())
    })
}

fn reciprocal(bits: u32, root: bool) -> u32 {
    let value = Value::unpack(bits.into(), SINGLE);
    let result = match value.class {
        _ if value.is_nan() => value.quieted(),
        Class::Infinite if !root => Value::zero(value.sign),
        // Denormal operands count as zero.
        Class::Zero => Value::infinity(value.sign),
        _ if value.denormal => Value::infinity(value.sign),
        _ if root && value.sign => Value::indefinite(),
        Class::Infinite => Value::zero(false),
        _ => {
            let x = f64::from(f32::from_bits(bits));
            let exact = if root { 1.0 / x.sqrt() } else { 1.0 / x };
            return short(exact);
        }
    };
    result.pack(SINGLE) as u32
}

/// To single precision with 13 significant bits; a denormal result is zero.
fn short(value: f64) -> u32 {
    let dropped = 53 - 13;
    let rounded = f64::from_bits((value.to_bits() + (1 << (dropped - 1))) & (u64::MAX << dropped));
    let single = rounded as f32;
    if single.is_subnormal() {
        return (0f32).copysign(single).to_bits();
    }
    single.to_bits()
}

macro_rules! scalar_packed {
    ($op:expr, $scalar:expr, $double:expr) => {
        match ($double, $scalar) {
            (false, false) => arith::<Single, { $op }, false> as Handler,
            (false, true) => arith::<Single, { $op }, true>,
            (true, false) => arith::<Double, { $op }, false>,
            (true, true) => arith::<Double, { $op }, true>,
        }
    };
}

fn ordinary(insn: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if insn.is_string_instruction() {
        return None;
    }
    // Packed single, scalar single, packed double, scalar double.
    let kind = |list: [M; 4]| {
        list.iter()
            .position(|&m| m == mnemonic)
            .map(|n| (n & 1 != 0, n & 2 != 0))
    };
    macro_rules! family {
        ($ps:ident, $ss:ident, $pd:ident, $sd:ident, $op:expr) => {
            if let Some((scalar, double)) = kind([M::$ps, M::$ss, M::$pd, M::$sd]) {
                return Some(scalar_packed!($op, scalar, double));
            }
        };
    }
    family!(Addps, Addss, Addpd, Addsd, ADD);
    family!(Subps, Subss, Subpd, Subsd, SUB);
    family!(Mulps, Mulss, Mulpd, Mulsd, MUL);
    family!(Divps, Divss, Divpd, Divsd, DIV);
    family!(Minps, Minss, Minpd, Minsd, MIN);
    family!(Maxps, Maxss, Maxpd, Maxsd, MAX);
    family!(Sqrtps, Sqrtss, Sqrtpd, Sqrtsd, SQRT);
    family!(Cmpps, Cmpss, Cmppd, Cmpsd, CMP);
    family!(Roundps, Roundss, Roundpd, Roundsd, ROUND);
    None
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    if let Some(handler) = ordinary(insn) {
        return Some(handler);
    }
    let (op, handler): (u8, Handler) = match insn.mnemonic() {
        M::Addsubps => (0, neighbours::<Single>),
        M::Addsubpd => (0, neighbours::<Double>),
        M::Haddps => (1, neighbours::<Single>),
        M::Haddpd => (1, neighbours::<Double>),
        M::Hsubps => (2, neighbours::<Single>),
        M::Hsubpd => (2, neighbours::<Double>),
        M::Dpps => (0, dot::<Single>),
        M::Dppd => (0, dot::<Double>),
        M::Comiss => (0, compare::<Single>),
        M::Comisd => (0, compare::<Double>),
        M::Ucomiss => (1, compare::<Single>),
        M::Ucomisd => (1, compare::<Double>),
        M::Rcpps => (0, approximate),
        M::Rcpss => (2, approximate),
        M::Rsqrtps => (1, approximate),
        M::Rsqrtss => (3, approximate),
        _ => return None,
    };
    uop.op |= op;
    Some(handler)
}
