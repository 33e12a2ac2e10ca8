//! Extended state: x87, SSE, AVX and the other XSAVE components.

/// The x87 unit. Registers hold the 80-bit format: 64-bit significand, and sign and exponent.
#[derive(Clone, Copy, Debug)]
pub struct X87 {
    /// Physical registers; ST(i) is `regs[(top + i) & 7]`.
    pub regs: [(u64, u16); 8],
    pub control: u16,
    /// Status word without TOP, which is in `top`.
    pub status: u16,
    pub top: u8,
    /// One bit a physical register: 1 = in use (the abridged tag of FXSAVE).
    pub valid: u8,
    pub opcode: u16,
    pub ip: u64,
    pub dp: u64,
}

impl Default for X87 {
    fn default() -> Self {
        X87 {
            regs: [(0, 0); 8],
            control: 0x37f,
            status: 0,
            top: 0,
            valid: 0,
            opcode: 0,
            ip: 0,
            dp: 0,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Ext {
    pub x87: X87,
    pub mxcsr: u32,
    pub xmm: [u128; 16],
    /// High halves of the YMM registers.
    pub ymm: [u128; 16],
}

pub const MXCSR_INIT: u32 = 0x1f80;
/// Bits of MXCSR that exist.
pub const MXCSR_MASK: u32 = 0xffff;

impl Default for Ext {
    fn default() -> Self {
        Ext {
            x87: X87::default(),
            mxcsr: MXCSR_INIT,
            xmm: [0; 16],
            ymm: [0; 16],
        }
    }
}
