//! Conversions between integers, single and double in XMM, MMX and general registers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::mmx;
use super::{memory, source};
use crate::cpu::float::{Env, Format, DOUBLE, SINGLE};
use crate::cpu::state::{Cpu, Stop};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

const LOW32: u128 = u32::MAX as u128;
const LOW64: u128 = u64::MAX as u128;

fn lane(value: u128, n: u32, bits: u32) -> u128 {
    value >> (n * bits) & (u128::MAX >> (128 - bits))
}

fn finish(cpu: &mut Cpu, u: &Uop, env: &Env, value: u128) -> Result<(), Stop> {
    cpu.sse_done(env)?;
    cpu.ext.xmm[usize::from(u.dst & 15)] = value;
    Ok(())
}

/// CVTSS2SD (`op` bit 0 clear) and CVTSD2SS.
fn scalar(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let mut env = Env::sse(cpu.ext.mxcsr);
        let value = if u.op & 1 == 0 {
            a & !LOW64 | resize(&mut env, b & LOW32, SINGLE, DOUBLE)
        } else {
            a & !LOW32 | resize(&mut env, b & LOW64, DOUBLE, SINGLE)
        };
        finish(cpu, u, &env, value)
    })
}

fn resize(env: &mut Env, bits: u128, from: Format, to: Format) -> u128 {
    let value = env.take(bits, from);
    env.convert(value, to).pack(to)
}

/// CVTPS2PD (`op` bit 0 clear) and CVTPD2PS.
fn packed(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let value = if u.op & 1 == 0 {
            resize(&mut env, lane(b, 0, 32), SINGLE, DOUBLE)
                | resize(&mut env, lane(b, 1, 32), SINGLE, DOUBLE) << 64
        } else {
            resize(&mut env, lane(b, 0, 64), DOUBLE, SINGLE)
                | resize(&mut env, lane(b, 1, 64), DOUBLE, SINGLE) << 32
        };
        finish(cpu, u, &env, value)
    })
}

/// Packed doublewords to single (`op` bits 1:0 = 0) or the low two to double (1).
fn from_packed(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let mut value = 0;
        let (count, to, bits) = if u.op & 1 == 0 {
            (4, SINGLE, 32)
        } else {
            (2, DOUBLE, 64)
        };
        for n in 0..count {
            let number = lane(b, n, 32) as u32 as i32;
            value |= env.from_int(number.into(), to).pack(to) << (n * bits);
        }
        finish(cpu, u, &env, value)
    })
}

/// To packed doublewords: `op` bit 0 from double, bit 1 truncating.
fn to_packed(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let (count, from, bits) = if u.op & 1 == 0 {
            (4, SINGLE, 32)
        } else {
            (2, DOUBLE, 64)
        };
        let value = doublewords(&mut env, b, count, from, bits, u.op & 2 != 0);
        finish(cpu, u, &env, value)
    })
}

fn doublewords(
    env: &mut Env,
    b: u128,
    count: u32,
    from: Format,
    bits: u32,
    truncate: bool,
) -> u128 {
    (0..count).fold(0, |all, n| {
        let value = env.take(lane(b, n, bits), from);
        let number = env.to_int(&value, 32, truncate) as u32;
        all | u128::from(number) << (n * 32)
    })
}

/// CVTSI2SS (`op` bit 0 clear), CVTSI2SD. Operand size in `imm`.
fn from_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let raw = if u.mem {
            memory(cpu, u)? as u64
        } else {
            cpu.gpr[usize::from(u.src)]
        };
        let number = if u.imm == 8 {
            raw as i64
        } else {
            i64::from(raw as u32 as i32)
        };
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let mut env = Env::sse(cpu.ext.mxcsr);
        let value = if u.op & 1 == 0 {
            a & !LOW32 | env.from_int(number, SINGLE).pack(SINGLE)
        } else {
            a & !LOW64 | env.from_int(number, DOUBLE).pack(DOUBLE)
        };
        finish(cpu, u, &env, value)
    })
}

/// CVT(T)SS2SI, CVT(T)SD2SI: `op` bit 0 from double, bit 1 truncating. Operand size in `imm`.
fn to_gpr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let value = if u.op & 1 == 0 {
            env.take(b & LOW32, SINGLE)
        } else {
            env.take(b & LOW64, DOUBLE)
        };
        let number = env.to_int(&value, u.imm as u32 * 8, u.op & 2 != 0);
        cpu.sse_done(&env)?;
        cpu.gpr[usize::from(u.dst)] = if u.imm == 8 {
            number as u64
        } else {
            number as u64 & 0xffff_ffff
        };
        Ok(())
    })
}

/// CVTPI2PS (`op` bit 0 clear), CVTPI2PD: two doublewords of an MMX register or memory.
fn from_mmx(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        // From memory it touches no MMX register, and leaves the x87 state alone.
        let untouched = u.mem;
        if !untouched || u.op & 1 == 0 {
            cpu.x87_wait()?;
        }
        let b = mmx::source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let a = cpu.ext.xmm[usize::from(u.dst & 15)];
        let (to, bits, kept) = if u.op & 1 == 0 {
            (SINGLE, 32, a & !LOW64)
        } else {
            (DOUBLE, 64, 0)
        };
        let value = (0..2).fold(kept, |all, n| {
            let number = lane(b, n, 32) as u32 as i32;
            all | env.from_int(number.into(), to).pack(to) << (n * bits)
        });
        if !untouched {
            // Even if the conversion then faults.
            cpu.enter_mmx();
        }
        cpu.sse_done(&env)?;
        cpu.ext.xmm[usize::from(u.dst & 15)] = value;
        Ok(())
    })
}

/// CVT(T)PS2PI, CVT(T)PD2PI: `op` bit 0 from double, bit 1 truncating.
fn to_mmx(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        cpu.x87_wait()?;
        let b = source(cpu, u)?;
        let mut env = Env::sse(cpu.ext.mxcsr);
        let (from, bits) = if u.op & 1 == 0 {
            (SINGLE, 32)
        } else {
            (DOUBLE, 64)
        };
        let value = doublewords(&mut env, b, 2, from, bits, u.op & 2 != 0);
        cpu.enter_mmx();
        cpu.sse_done(&env)?;
        cpu.set_mm(u.dst, value as u64);
        Ok(())
    })
}

pub fn lower(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    let (op, handler): (u8, Handler) = match insn.mnemonic() {
        M::Cvtss2sd => (0, scalar),
        M::Cvtsd2ss => (1, scalar),
        M::Cvtps2pd => (0, packed),
        M::Cvtpd2ps => (1, packed),
        M::Cvtdq2ps => (0, from_packed),
        M::Cvtdq2pd => (1, from_packed),
        M::Cvtps2dq => (0, to_packed),
        M::Cvtpd2dq => (1, to_packed),
        M::Cvttps2dq => (2, to_packed),
        M::Cvttpd2dq => (3, to_packed),
        M::Cvtsi2ss => (0, from_gpr),
        M::Cvtsi2sd => (1, from_gpr),
        M::Cvtss2si => (0, to_gpr),
        M::Cvtsd2si => (1, to_gpr),
        M::Cvttss2si => (2, to_gpr),
        M::Cvttsd2si => (3, to_gpr),
        M::Cvtpi2ps => (0, from_mmx),
        M::Cvtpi2pd => (1, from_mmx),
        M::Cvtps2pi => (0, to_mmx),
        M::Cvtpd2pi => (1, to_mmx),
        M::Cvttps2pi => (2, to_mmx),
        M::Cvttpd2pi => (3, to_mmx),
        _ => return None,
    };
    uop.op |= op;
    let general = if matches!(insn.mnemonic(), M::Cvtsi2ss | M::Cvtsi2sd) {
        1
    } else {
        0
    };
    uop.imm = match insn.op_kind(general) {
        OpKind::Register => insn.op_register(general).size() as u64,
        _ => insn.memory_size().size() as u64,
    };
    Some(handler)
}
