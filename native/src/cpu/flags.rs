//! Arithmetic flags, kept as the last result and operand and worked out only when somebody looks.

pub const CF: u64 = 1;
pub const PF: u64 = 4;
pub const AF: u64 = 0x10;
pub const ZF: u64 = 0x40;
pub const SF: u64 = 0x80;
pub const TF: u64 = 0x100;
pub const IF: u64 = 0x200;
pub const DF: u64 = 0x400;
pub const OF: u64 = 0x800;
pub const IOPL: u64 = 0x3000;
pub const NT: u64 = 0x4000;
pub const RF: u64 = 0x1_0000;
pub const VM: u64 = 0x2_0000;
pub const AC: u64 = 0x4_0000;
pub const VIF: u64 = 0x8_0000;
pub const VIP: u64 = 0x10_0000;
pub const ID: u64 = 0x20_0000;
/// The six arithmetic flags.
pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;

/// What made the flags. `res` is always sign-extended to 64 bits, so ZF and SF do not depend on the width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// `src` holds the flags themselves.
    Bits,
    /// `src` holds the second operand.
    Add,
    Sub,
    /// CF = OF = AF = 0.
    Logic,
    /// `src` holds CF.
    Inc,
    Dec,
    /// `src` holds CF, OF and AF at their places; ZF, SF and PF follow the result.
    Part,
}

#[derive(Clone, Copy, Debug)]
pub struct Lazy {
    pub kind: Kind,
    /// 64 - width in bits.
    pub shift: u8,
    pub res: u64,
    pub src: u64,
}

impl Default for Lazy {
    fn default() -> Self {
        Lazy {
            kind: Kind::Bits,
            shift: 0,
            res: 0,
            src: 0,
        }
    }
}

impl Lazy {
    pub fn bits(flags: u64) -> Lazy {
        Lazy {
            kind: Kind::Bits,
            shift: 0,
            res: 0,
            src: flags & ARITH,
        }
    }

    #[inline(always)]
    pub fn zf(&self) -> bool {
        if self.kind == Kind::Bits {
            self.src & ZF != 0
        } else {
            self.res == 0
        }
    }

    #[inline(always)]
    pub fn sf(&self) -> bool {
        if self.kind == Kind::Bits {
            self.src & SF != 0
        } else {
            (self.res as i64) < 0
        }
    }

    #[inline(always)]
    pub fn cf(&self) -> bool {
        match self.kind {
            Kind::Sub => {
                // first operand = res + src
                let a = self.res.wrapping_add(self.src) << self.shift;
                a < self.src << self.shift
            }
            Kind::Add => self.res << self.shift < self.src << self.shift,
            Kind::Logic => false,
            Kind::Inc | Kind::Dec | Kind::Part | Kind::Bits => self.src & CF != 0,
        }
    }

    #[inline(always)]
    pub fn of(&self) -> bool {
        let msb = 63 - self.shift;
        match self.kind {
            Kind::Sub => {
                let a = self.res.wrapping_add(self.src);
                ((a ^ self.src) & (a ^ self.res)) >> msb & 1 != 0
            }
            Kind::Add => {
                let a = self.res.wrapping_sub(self.src);
                ((self.res ^ a) & (self.res ^ self.src)) >> msb & 1 != 0
            }
            Kind::Logic => false,
            Kind::Inc => self.res << self.shift == 1 << 63,
            Kind::Dec => self.res << self.shift == (u64::MAX >> 1 >> self.shift) << self.shift,
            Kind::Part | Kind::Bits => self.src & OF != 0,
        }
    }

    #[inline(always)]
    pub fn pf(&self) -> bool {
        if self.kind == Kind::Bits {
            self.src & PF != 0
        } else {
            (self.res as u8).count_ones() & 1 == 0
        }
    }

    pub fn af(&self) -> bool {
        match self.kind {
            Kind::Sub => (self.res.wrapping_add(self.src) ^ self.src ^ self.res) & 0x10 != 0,
            Kind::Add => (self.res.wrapping_sub(self.src) ^ self.src ^ self.res) & 0x10 != 0,
            Kind::Logic => false,
            Kind::Inc => self.res & 0xf == 0,
            Kind::Dec => self.res & 0xf == 0xf,
            Kind::Part | Kind::Bits => self.src & AF != 0,
        }
    }

    /// All six, at their places in RFLAGS.
    pub fn all(&self) -> u64 {
        if self.kind == Kind::Bits {
            return self.src;
        }
        let mut flags = 0;
        if self.cf() {
            flags |= CF;
        }
        if self.pf() {
            flags |= PF;
        }
        if self.af() {
            flags |= AF;
        }
        if self.zf() {
            flags |= ZF;
        }
        if self.sf() {
            flags |= SF;
        }
        if self.of() {
            flags |= OF;
        }
        flags
    }

    /// As BT leaves them: a new CF, ZF as it was. SF and PF stay too; OF and AF, which are undefined, are cleared.
    #[inline(always)]
    pub fn with_carry(&self, carry: u64) -> Lazy {
        if self.kind == Kind::Bits {
            return Lazy::bits(self.src & !CF | carry);
        }
        Lazy {
            kind: Kind::Part,
            src: carry,
            ..*self
        }
    }

    /// Condition `C` of Jcc, SETcc, CMOVcc (low four bits of the opcode).
    #[inline(always)]
    pub fn cond<const C: u8>(&self) -> bool {
        let holds = match C >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.less(),
            _ => self.zf() || self.less(),
        };
        holds != (C & 1 != 0)
    }

    /// SF != OF.
    #[inline(always)]
    fn less(&self) -> bool {
        if self.kind == Kind::Sub {
            let a = self.res.wrapping_add(self.src) << self.shift;
            return (a as i64) < (self.src << self.shift) as i64;
        }
        self.sf() != self.of()
    }

    pub fn cond_dyn(&self, code: u8) -> bool {
        match code & 15 {
            0 => self.cond::<0>(),
            1 => self.cond::<1>(),
            2 => self.cond::<2>(),
            3 => self.cond::<3>(),
            4 => self.cond::<4>(),
            5 => self.cond::<5>(),
            6 => self.cond::<6>(),
            7 => self.cond::<7>(),
            8 => self.cond::<8>(),
            9 => self.cond::<9>(),
            10 => self.cond::<10>(),
            11 => self.cond::<11>(),
            12 => self.cond::<12>(),
            13 => self.cond::<13>(),
            14 => self.cond::<14>(),
            _ => self.cond::<15>(),
        }
    }
}
