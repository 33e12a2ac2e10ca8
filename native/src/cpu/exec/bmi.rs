//! BMI1, BMI2, ADX and CRC32: integer instructions that leaf 7 and leaf 1 of CPUID enumerate one by one.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::by_size;
use crate::cpu::decode::{gpr, immediate, operand_size};
use crate::cpu::flags::{Kind, Lazy, CF, OF};
use crate::cpu::int::{lazy, Int};
use crate::cpu::state::{Cpu, Stop, RDX};
use crate::cpu::uop::{step, Flow, Handler, Ip, Uop};

fn source<T: Int>(cpu: &mut Cpu, u: &Uop) -> Result<T, Stop> {
    if u.mem {
        let at = cpu.ea(u)?;
        cpu.load::<T>(at)
    } else {
        Ok(T::get(cpu, u.src))
    }
}

/// Flags of the result, with the carry given; overflow clear.
fn with_carry<T: Int>(res: T, carry: bool) -> Lazy {
    lazy(Kind::Part, res, u64::from(carry) * CF)
}

/// ANDN (`op` 0), BEXTR (1), BZHI (2), SHLX (3), SHRX (4), SARX (5), PDEP (6), PEXT (7). The operand that is not
/// `src` is the register in `imm`.
fn three<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let a = source::<T>(cpu, u)?;
        let other = T::get(cpu, u.imm as u8);
        let (value, control) = (a.to64(), other.to64());
        let count = control as u32 & (T::BITS - 1);
        let res = match u.op {
            0 => {
                let res = other.xor(T::from64(u64::MAX)).and(a);
                cpu.cc = lazy(Kind::Logic, res, 0);
                res
            }
            1 => {
                let res = T::from64(extract(value, control));
                cpu.cc = with_carry(res, false);
                res
            }
            2 => {
                let bits = control as u8 as u32;
                let res = if bits < T::BITS {
                    T::from64(value & ((1 << bits) - 1))
                } else {
                    a
                };
                cpu.cc = with_carry(res, bits >= T::BITS);
                res
            }
            3 => T::from64(value << count),
            4 => T::from64(value >> count),
            5 => T::from64((a.sext() as i64 >> count) as u64),
            6 => T::from64(deposit(control, value)),
            _ => T::from64(gather(control, value)),
        };
        T::set(cpu, u.dst, res);
        Ok(())
    })
}

fn extract(value: u64, control: u64) -> u64 {
    let (start, length) = (control as u8 as u32, (control >> 8) as u8 as u32);
    let shifted = if start < 64 { value >> start } else { 0 };
    if length < 64 {
        shifted & ((1 << length) - 1)
    } else {
        shifted
    }
}

/// PDEP: low bits of `value` to the places `mask` names.
fn deposit(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut n) = (0, 0);
    while mask != 0 {
        result |= (value >> n & 1) << mask.trailing_zeros();
        mask &= mask - 1;
        n += 1;
    }
    result
}

/// PEXT: bits of `value` at the places `mask` names, together.
fn gather(value: u64, mut mask: u64) -> u64 {
    let (mut result, mut n) = (0, 0);
    while mask != 0 {
        result |= (value >> mask.trailing_zeros() & 1) << n;
        mask &= mask - 1;
        n += 1;
    }
    result
}

/// BLSI (`op` 0), BLSMSK (1), BLSR (2).
fn lowest<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let a = source::<T>(cpu, u)?;
        let zero = a == T::ZERO;
        let less = a.sub(T::from64(1));
        let (res, carry) = match u.op {
            0 => (T::ZERO.sub(a).and(a), !zero),
            1 => (less.xor(a), zero),
            _ => (less.and(a), zero),
        };
        cpu.cc = with_carry(res, carry);
        T::set(cpu, u.dst, res);
        Ok(())
    })
}

/// RORX.
fn rotate<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = source::<T>(cpu, u)?.to64();
        let count = u.imm as u32 & (T::BITS - 1);
        let res = if count == 0 {
            value
        } else {
            value >> count | value << (T::BITS - count)
        };
        T::set(cpu, u.dst, T::from64(res));
        Ok(())
    })
}

/// MULX: RDX by the source; the high half to `dst`, the low half to the register in `imm`, in that order of rank.
fn multiply<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let a = source::<T>(cpu, u)?.to64();
        let b = T::get(cpu, RDX as u8).to64();
        let product = u128::from(a) * u128::from(b);
        T::set(cpu, u.imm as u8, T::from64(product as u64));
        T::set(cpu, u.dst, T::from64((product >> T::BITS) as u64));
        Ok(())
    })
}

/// ADCX (`op` 0) and ADOX (1): an addition whose carry goes through one flag and touches no other.
fn add_carry<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let b = source::<T>(cpu, u)?;
        let a = T::get(cpu, u.dst);
        let flag = if u.op == 0 { CF } else { OF };
        let flags = cpu.cc.all();
        let carry = flags & flag != 0;
        let sum = u128::from(a.to64()) + u128::from(b.to64()) + u128::from(carry);
        let out = sum >> T::BITS != 0;
        T::set(cpu, u.dst, T::from64(sum as u64));
        cpu.cc = Lazy::bits(flags & !flag | (u64::from(out) * flag));
        Ok(())
    })
}

/// CRC-32C, bit-reflected: polynomial 0x11EDC6F41.
fn crc<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = source::<T>(cpu, u)?.to64();
        let mut sum = cpu.gpr[usize::from(u.dst)] as u32;
        for byte in &value.to_le_bytes()[..T::BYTES as usize] {
            sum = sum >> 8 ^ CRC_TABLE[usize::from(sum as u8 ^ byte)];
        }
        cpu.gpr[usize::from(u.dst)] = sum.into();
        Ok(())
    })
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut n = 0;
    while n < 256 {
        let mut sum = n as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 != 0 {
                sum >> 1 ^ 0x82f6_3b78
            } else {
                sum >> 1
            };
            bit += 1;
        }
        table[n] = sum;
        n += 1;
    }
    table
};

fn lower_three(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    use Mnemonic as M;
    // Which operand may be memory: the last, or for those that take their control from a register, the middle one.
    let (op, rm, register) = match insn.mnemonic() {
        M::Andn => (0, 2, 1),
        M::Bextr => (1, 1, 2),
        M::Bzhi => (2, 1, 2),
        M::Shlx => (3, 1, 2),
        M::Shrx => (4, 1, 2),
        M::Sarx => (5, 1, 2),
        M::Pdep => (6, 2, 1),
        M::Pext => (7, 2, 1),
        _ => return None,
    };
    uop.op = op;
    uop.size = operand_size(insn, 0);
    uop.dst = gpr(insn.op0_register());
    uop.imm = gpr(insn.op_register(register)).into();
    if !uop.mem {
        uop.src = gpr(insn.op_register(rm));
    }
    Some(by_size!(uop.size, three))
}

/// The simple layout: operand 0 the destination, operand `rm` the source.
fn fill(insn: &Instruction, uop: &mut Uop, rm: u32) {
    uop.size = operand_size(insn, 0);
    uop.dst = gpr(insn.op0_register());
    if insn.op_kind(rm) == OpKind::Register {
        uop.src = gpr(insn.op_register(rm));
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, _mode: u32) -> Option<Handler> {
    use Mnemonic as M;
    if let Some(handler) = lower_three(insn, uop) {
        return Some(handler);
    }
    match insn.mnemonic() {
        M::Blsi | M::Blsmsk | M::Blsr => {
            fill(insn, uop, 1);
            uop.op = match insn.mnemonic() {
                M::Blsi => 0,
                M::Blsmsk => 1,
                _ => 2,
            };
            Some(by_size!(uop.size, lowest))
        }
        M::Rorx => {
            fill(insn, uop, 1);
            uop.imm = immediate(insn, 2)?;
            Some(by_size!(uop.size, rotate))
        }
        M::Mulx => {
            fill(insn, uop, 2);
            uop.imm = gpr(insn.op1_register()).into();
            Some(by_size!(uop.size, multiply))
        }
        M::Adcx | M::Adox => {
            fill(insn, uop, 1);
            uop.op = u8::from(insn.mnemonic() == M::Adox);
            Some(by_size!(uop.size, add_carry))
        }
        M::Crc32 => {
            uop.dst = gpr(insn.op0_register());
            uop.size = operand_size(insn, 1);
            if insn.op1_kind() == OpKind::Register {
                uop.src = gpr(insn.op1_register());
            }
            Some(by_size!(uop.size, crc))
        }
        _ => None,
    }
}
