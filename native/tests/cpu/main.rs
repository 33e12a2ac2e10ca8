//! Guests of a few instructions each, run in VMX non-root operation.

mod consistency;
mod debug;
mod exceptions;
mod hostile;
mod integer;
mod machine;
mod modes;
mod paging;
mod seam;
mod selfmod;
mod threads;
mod vmx;
