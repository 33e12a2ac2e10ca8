//! Operand widths: what differs between 8, 16, 32 and 64 bits.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, AtomicU8, Ordering};

use super::flags::{Kind, Lazy};
use super::state::Cpu;

/// Bit of a register number that names AH, CH, DH, BH (with the number of AX, CX, DX, BX).
pub const HIGH: u8 = 0x80;

/// An integer operand.
pub trait Int: Copy + Eq + Ord + 'static {
    const BYTES: u64;
    const BITS: u32;
    const ZERO: Self;
    fn get(cpu: &Cpu, register: u8) -> Self;
    fn set(cpu: &mut Cpu, register: u8, value: Self);
    fn from64(value: u64) -> Self;
    /// Zero-extended.
    fn to64(self) -> u64;
    /// Sign-extended.
    fn sext(self) -> u64;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    /// # Safety
    /// `at` points to `BYTES` readable bytes of guest memory.
    unsafe fn load(at: *const u8) -> Self;
    /// # Safety
    /// `at` points to `BYTES` writable bytes of guest memory.
    unsafe fn store(at: *mut u8, value: Self);
    /// LOCK CMPXCHG: `Err` holds what was found instead.
    ///
    /// # Safety
    /// As `store`, and `at` is aligned.
    unsafe fn cas(at: *mut u8, old: Self, new: Self) -> Result<(), Self>;

    fn msb(self) -> bool {
        self.sext() >> 63 != 0
    }
}

macro_rules! int {
    ($type:ty, $signed:ty, $atomic:ty, $get:expr, $set:expr) => {
        impl Int for $type {
            const BYTES: u64 = <$type>::BITS as u64 / 8;
            const BITS: u32 = <$type>::BITS;
            const ZERO: Self = 0;
            #[inline(always)]
            fn get(cpu: &Cpu, register: u8) -> Self {
                let get: fn(&Cpu, u8) -> $type = $get;
                get(cpu, register)
            }
            #[inline(always)]
            fn set(cpu: &mut Cpu, register: u8, value: Self) {
                let set: fn(&mut Cpu, u8, $type) = $set;
                set(cpu, register, value)
            }
            #[inline(always)]
            fn from64(value: u64) -> Self {
                value as $type
            }
            #[inline(always)]
            fn to64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sext(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self.wrapping_add(other)
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self.wrapping_sub(other)
            }
            #[inline(always)]
            fn and(self, other: Self) -> Self {
                self & other
            }
            #[inline(always)]
            fn or(self, other: Self) -> Self {
                self | other
            }
            #[inline(always)]
            fn xor(self, other: Self) -> Self {
                self ^ other
            }
            #[inline(always)]
            unsafe fn load(at: *const u8) -> Self {
                // Guest memory is shared with other processors: aligned accesses must be single and ordered as on
                // x86 (acquire and release cost nothing there).
                if at as usize & (Self::BYTES as usize - 1) == 0 {
                    (*at.cast::<$atomic>()).load(Ordering::Acquire)
                } else {
                    at.cast::<$type>().read_unaligned()
                }
            }
            #[inline(always)]
            unsafe fn store(at: *mut u8, value: Self) {
                if at as usize & (Self::BYTES as usize - 1) == 0 {
                    (*at.cast::<$atomic>()).store(value, Ordering::Release);
                } else {
                    at.cast::<$type>().write_unaligned(value);
                }
            }
            #[inline(always)]
            unsafe fn cas(at: *mut u8, old: Self, new: Self) -> Result<(), Self> {
                (*at.cast::<$atomic>())
                    .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
                    .map(|_| ())
            }
        }
    };
}

int!(
    u8,
    i8,
    AtomicU8,
    |cpu, r| {
        if r & HIGH == 0 {
            cpu.gpr[usize::from(r)] as u8
        } else {
            (cpu.gpr[usize::from(r & !HIGH)] >> 8) as u8
        }
    },
    |cpu, r, v| {
        if r & HIGH == 0 {
            let register = &mut cpu.gpr[usize::from(r)];
            *register = *register & !0xff | u64::from(v);
        } else {
            let register = &mut cpu.gpr[usize::from(r & !HIGH)];
            *register = *register & !0xff00 | u64::from(v) << 8;
        }
    }
);
int!(
    u16,
    i16,
    AtomicU16,
    |cpu, r| cpu.gpr[usize::from(r)] as u16,
    |cpu, r, v| {
        let register = &mut cpu.gpr[usize::from(r)];
        *register = *register & !0xffff | u64::from(v);
    }
);
int!(
    u32,
    i32,
    AtomicU32,
    |cpu, r| cpu.gpr[usize::from(r)] as u32,
    |cpu, r, v| cpu.gpr[usize::from(r)] = u64::from(v)
);
int!(
    u64,
    i64,
    AtomicU64,
    |cpu, r| cpu.gpr[usize::from(r)],
    |cpu, r, v| cpu.gpr[usize::from(r)] = v
);

/// Lazy flags of a result.
#[inline(always)]
pub fn lazy<T: Int>(kind: Kind, res: T, src: u64) -> Lazy {
    Lazy {
        kind,
        shift: (64 - T::BITS) as u8,
        res: res.sext(),
        src,
    }
}

/// Picks the instance of a generic handler by operand size in bytes.
#[macro_export]
macro_rules! by_size {
    ($size:expr, $handler:ident $(, $arg:tt)*) => {
        match $size {
            1 => $handler::<u8 $(, $arg)*> as $crate::cpu::uop::Handler,
            2 => $handler::<u16 $(, $arg)*>,
            4 => $handler::<u32 $(, $arg)*>,
            _ => $handler::<u64 $(, $arg)*>,
        }
    };
}
