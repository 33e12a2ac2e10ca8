//! The silicon of SoftTDX, and nothing above it: it does what hardware does and holds no policy.
//!
//! Reading order: [`mem`] (DRAM and the memory-encryption engine), [`cpu`] (the interpreter, its walks and
//! VMX non-root operation), [`words`] (what LOCK-prefixed instructions of SEAM software work on), `face` (the thin PyO3 binding, only with the `python` feature).

pub mod cpu;
#[cfg(feature = "python")]
pub mod face;
pub mod mem;
pub mod words;
