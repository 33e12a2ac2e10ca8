//! One logical processor: the x86-64 interpreter, its page walks, and VMX non-root operation.
//!
//! Reading order: [`state`] (the registers), [`vmcs`] and [`root`] (what root-mode software does with a processor),
//! [`vmx_entry`] and [`vmx_exit`]; then the engine: [`decode`] turns bytes into [`uop`]s, [`block`] keeps them,
//! [`run`] executes them, [`exec`] holds the instruction families; [`mem_access`], [`tlb`], [`walk`] and [`ept`] are
//! the way to memory; [`exception`] and [`interrupt`] deliver events through the guest's IDT.
//!
//! Only guests execute here. Software in VMX root mode (the host, the TDX module) is not machine code: it calls
//! the functions of [`root`] and [`Cpu::vmenter`].

pub mod block;
pub mod control_regs;
pub mod debug;
pub mod decode;
pub mod ept;
pub mod exception;
pub mod exec;
pub mod ext;
pub mod flags;
pub mod float;
pub mod int;
pub mod interrupt;
pub mod live;
pub mod mem_access;
pub mod msr;
pub mod optimize;
pub mod root;
pub mod run;
pub mod samples;
pub mod segment;
pub mod state;
pub mod tlb;
pub mod trial;
pub mod uop;
pub mod vmcs;
pub mod vmx_ctl;
pub mod vmx_entry;
pub mod vmx_exit;
pub mod walk;
pub mod way;

pub use root::VmError;
pub use run::Outcome;
pub use state::{event, Cpu, Shared};
