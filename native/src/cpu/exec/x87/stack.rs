//! The register stack: reading, writing, pushing, popping, and what each raises.

use crate::cpu::ext::X87;
use crate::cpu::float::{flag, Env, Value, EXTENDED};
use crate::cpu::state::Cpu;

/// Condition codes of the status word.
pub const C0: u16 = 1 << 8;
pub const C1: u16 = 1 << 9;
pub const C2: u16 = 1 << 10;
pub const C3: u16 = 1 << 14;
const STACK_FAULT: u16 = 1 << 6;
const SUMMARY: u16 = 1 << 7;
const BUSY: u16 = 1 << 15;

/// The masked response to an invalid operation, as a register holds it.
pub const INDEFINITE: (u64, u16) = (0xc000_0000_0000_0000, 0xffff);

pub fn unpack(register: (u64, u16)) -> Value {
    Value::unpack(
        u128::from(register.1) << 64 | u128::from(register.0),
        EXTENDED,
    )
}

pub fn pack(value: &Value) -> (u64, u16) {
    let bits = value.pack(EXTENDED);
    (bits as u64, (bits >> 64) as u16)
}

impl X87 {
    fn place(&self, n: u8) -> usize {
        usize::from(self.top.wrapping_add(n) & 7)
    }

    pub fn is_empty(&self, n: u8) -> bool {
        self.valid >> self.place(n) & 1 == 0
    }

    pub fn st(&self, n: u8) -> (u64, u16) {
        self.regs[self.place(n)]
    }

    pub fn set_st(&mut self, n: u8, value: (u64, u16)) {
        let place = self.place(n);
        self.regs[place] = value;
        self.valid |= 1 << place;
    }

    pub fn free(&mut self, n: u8) {
        self.valid &= !(1 << self.place(n));
    }

    pub fn pop(&mut self) {
        self.free(0);
        self.top = self.top.wrapping_add(1) & 7;
    }

    /// An unmasked exception waits for the next instruction.
    pub fn pending(&self) -> bool {
        self.status & SUMMARY != 0
    }

    /// Exception summary and busy follow from the flags and the masks.
    pub fn summarise(&mut self) {
        if self.status & !self.control & flag::ALL != 0 {
            self.status |= SUMMARY | BUSY;
        } else {
            self.status &= !(SUMMARY | BUSY);
        }
    }

    pub fn set_codes(&mut self, which: u16, codes: u16) {
        self.status = self.status & !which | codes;
    }

    /// Two bits a physical register, as FNSTENV stores them: valid, zero, special, empty.
    pub fn tags(&self) -> u16 {
        (0..8).fold(0, |tags, n| {
            let (sig, exponent) = self.regs[n];
            let tag = if self.valid >> n & 1 == 0 {
                3
            } else {
                match exponent & 0x7fff {
                    0 if sig == 0 => 1,
                    0 | 0x7fff => 2,
                    _ if sig >> 63 == 0 => 2,
                    _ => 0,
                }
            };
            tags | tag << (2 * n)
        })
    }

    pub fn set_tags(&mut self, tags: u16) {
        self.valid = (0..8).fold(0, |valid, n| {
            valid | u8::from(tags >> (2 * n) & 3 != 3) << n
        });
    }
}

impl Cpu {
    /// Rules for an x87 operation; `precise`: the precision control applies.
    pub fn x87_env(&self, precise: bool) -> Env {
        let mut env = Env::x87(self.ext.x87.control);
        if !precise {
            env.precision = 64;
        }
        env
    }

    /// Notes what an operation raised. `false`: an unmasked exception keeps its result from being stored.
    pub fn x87_raised(&mut self, env: &Env) -> bool {
        let mut flags = env.flags;
        let stopped = env.unmasked() & flag::BEFORE != 0;
        if stopped {
            flags &= flag::BEFORE;
        }
        let x87 = &mut self.ext.x87;
        let up = env.up && flags & flag::INEXACT != 0;
        x87.set_codes(C1, if up { C1 } else { 0 });
        x87.status |= flags;
        x87.summarise();
        !stopped
    }

    /// A stack fault: #IS. `true` if it is masked, so that the indefinite is delivered.
    pub fn stack_fault(&mut self, overflow: bool) -> bool {
        let x87 = &mut self.ext.x87;
        x87.set_codes(C1, if overflow { C1 } else { 0 });
        x87.status |= STACK_FAULT | flag::INVALID;
        x87.summarise();
        x87.control & flag::INVALID != 0
    }

    /// Pushes; an overflow is noted and pushes the indefinite if masked.
    pub fn x87_push(&mut self, value: (u64, u16)) {
        let value = if self.ext.x87.is_empty(7) {
            self.ext.x87.set_codes(C1, 0);
            value
        } else if self.stack_fault(true) {
            INDEFINITE
        } else {
            return;
        };
        let x87 = &mut self.ext.x87;
        x87.top = x87.top.wrapping_sub(1) & 7;
        x87.set_st(0, value);
    }
}
