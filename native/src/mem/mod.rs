//! DRAM behind the memory-encryption engine: MKTME with integrity (MKTME-i), as TDX uses it.
//!
//! A physical address (`pa`) is what software writes: the DRAM address with a KeyID on top of it, in bits
//! 51:(52 - keyid_bits). Bits 63:52 are reserved. Every access is made by an [`Agent`].
//!
//! # Pointers for a TLB, and how they are taken back
//!
//! [`Memory::page_ptr`] hands a running processor a host pointer to a page. The pointer stays right until the
//! memory takes it back, which it does by a *shootdown*: it raises the epoch and waits until each processor that
//! is running has acknowledged the new epoch. What a processor must do ([`CpuSlot`]):
//!
//! 1. `enter()` before it uses any pointer; `true` means: drop every pointer you hold.
//! 2. `poll()` at block boundaries, and after *every* call into `Memory` that was given its slot (such a call may
//!    have waited, and while it waits the processor counts as not running). `true` means: drop every pointer
//!    you hold, also the one that the very call returned, and ask again.
//! 3. `leave()` before anything that may block (a VM exit, the GIL, a wait for an interrupt).

use std::sync::Arc;

/// On whose behalf the bus is used. It decides which KeyIDs may be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requester {
    /// Outside SEAM mode: host software, devices. May name shared KeyIDs only.
    Host,
    /// SEAM root and SEAM non-root mode. May name every KeyID.
    Seam,
}

/// Who makes an access: the mode, and the processor's slot if the access comes from a processor.
#[derive(Clone, Copy)]
pub struct Agent<'a> {
    pub mode: Requester,
    /// `None` for anything that never holds page pointers.
    pub cpu: Option<&'a CpuSlot>,
}

impl Agent<'static> {
    pub const HOST: Agent<'static> = Agent { mode: Requester::Host, cpu: None };
    pub const SEAM: Agent<'static> = Agent { mode: Requester::Seam, cpu: None };
}

/// Why an access was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Reserved address bits, a private KeyID named outside SEAM mode, or a private KeyID without a key.
    Bus { pa: u64 },
    /// #MC: poison was consumed; `pa` is the line's address with the KeyID of the reader.
    MachineCheck { pa: u64 },
}

/// How much the engine checks when a line is read with a private KeyID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Integrity {
    /// 28-bit MAC and TD-owner bit.
    Crypto,
    /// TD-owner bit only.
    Logical,
    None,
}

/// The memory of one platform. `ranges` are (base, size), 4 KiB aligned, disjoint.
#[derive(Debug, Clone)]
pub struct Config {
    pub ranges: Vec<(u64, u64)>,
    pub keyid_bits: u32,
    pub first_private_keyid: u32,
    pub integrity: Integrity,
    /// KeyID 0 encrypts with the TME key; `false`: it bypasses encryption.
    pub tme: bool,
    pub seed: u64,
}

/// What [`Memory::page_ptr`] answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageAccess {
    /// The 4 KiB page starts here; access it with atomic or volatile operations only.
    Direct(*mut u8),
    /// This page cannot be used through a pointer now: use [`Memory::read`], [`Memory::write`] and the like.
    Slow,
}

/// A processor's part in shootdowns. One thread at a time uses it.
pub struct CpuSlot {}

impl CpuSlot {
    /// The processor starts to run guest code. `true`: drop every page pointer first.
    pub fn enter(&self) -> bool { todo!() }
    /// At block boundaries and after every `Memory` call. `true`: drop every page pointer now. One load when idle.
    #[inline]
    pub fn poll(&self) -> bool { todo!() }
    /// The processor stops running; pointers may go stale from here on.
    pub fn leave(&self) { todo!() }
}

pub struct Memory {}

impl Memory {
    pub fn new(_config: Config) -> Result<Memory, String> { todo!() }

    // --- keys (PCONFIG). A reprogrammed KeyID cannot read what its old key wrote.
    pub fn set_key(&self, _keyid: u32, _key: Option<([u8; 16], [u8; 16])>, _agent: Agent) -> Result<(), String> { todo!() }
    pub fn clear_key(&self, _keyid: u32, _agent: Agent) -> Result<(), String> { todo!() }
    /// Changes whenever a key was set or cleared: decoded code (cached by `pa`) must then be dropped.
    pub fn key_generation(&self) -> u64 { todo!() }
    /// (KeyID, DRAM address) of `pa`; BusFault for reserved bits.
    pub fn split(&self, _pa: u64) -> Result<(u32, u64), Fault> { todo!() }
    pub fn is_dram(&self, _pa: u64) -> bool { todo!() }

    // --- accesses. Any length, crossing lines and pages. Outside DRAM: all ones, writes dropped.
    pub fn read(&self, _pa: u64, _into: &mut [u8], _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn write(&self, _pa: u64, _from: &[u8], _agent: Agent) -> Result<(), Fault> { todo!() }
    // Single-copy atomic when naturally aligned.
    pub fn rd8(&self, _pa: u64, _agent: Agent) -> Result<u8, Fault> { todo!() }
    pub fn rd16(&self, _pa: u64, _agent: Agent) -> Result<u16, Fault> { todo!() }
    pub fn rd32(&self, _pa: u64, _agent: Agent) -> Result<u32, Fault> { todo!() }
    pub fn rd64(&self, _pa: u64, _agent: Agent) -> Result<u64, Fault> { todo!() }
    pub fn wr8(&self, _pa: u64, _value: u8, _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn wr16(&self, _pa: u64, _value: u16, _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn wr32(&self, _pa: u64, _value: u32, _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn wr64(&self, _pa: u64, _value: u64, _agent: Agent) -> Result<(), Fault> { todo!() }
    /// LOCK CMPXCHG of `size` bytes (1, 2, 4, 8, 16), any alignment, also across lines (not across pages: splits
    /// into a plain read and write there). Returns the value found; it was replaced if that equals `old`.
    pub fn cas(&self, _pa: u64, _size: usize, _old: u128, _new: u128, _agent: Agent) -> Result<u128, Fault> { todo!() }
    pub fn cas64(&self, _pa: u64, _old: u64, _new: u64, _agent: Agent) -> Result<u64, Fault> { todo!() }
    /// MOVDIR64B: the whole line at `pa` (bits 5:0 ignored) without reading it; sets the owner bit by the KeyID's kind.
    pub fn write_line(&self, _pa: u64, _line: &[u8; 64], _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn zero_pages(&self, _pa: u64, _pages: u64, _agent: Agent) -> Result<(), Fault> { todo!() }
    pub fn copy_page(&self, _dst: u64, _src: u64, _agent: Agent) -> Result<(), Fault> { todo!() }

    // --- page pointers and code pages
    pub fn register_cpu(&self) -> Arc<CpuSlot> { todo!() }
    /// A pointer to the page of `pa`, if all its lines are plain under that KeyID's key. Only for an agent whose
    /// `cpu` is between `enter` and `leave` (else `Slow`). A code page is `Slow` for writing.
    pub fn page_ptr(&self, _pa: u64, _write: bool, _agent: Agent) -> Result<PageAccess, Fault> { todo!() }
    /// Declares that decoded code of this page is about to be cached; call it *before* reading the bytes. No write
    /// pointer to the page exists after it. Returns the page's code generation.
    pub fn mark_code(&self, _pa: u64, _agent: Agent) -> Result<u32, Fault> { todo!() }
    /// Differs from what `mark_code` returned once the page was written since. One load.
    #[inline]
    pub fn code_gen(&self, _pa: u64) -> u32 { todo!() }

    // --- the DRAM probe: no KeyID in `pa`, no checks, ciphertext. Outside DRAM: all ones, dropped.
    pub fn raw_read(&self, _pa: u64, _into: &mut [u8]) { todo!() }
    pub fn raw_write(&self, _pa: u64, _from: &[u8], _agent: Agent) { todo!() }
    pub fn raw_line(&self, _pa: u64) -> RawLine { todo!() }
    pub fn raw_set_line(&self, _pa: u64, _line: &[u8; 64], _mac: u32, _owner: bool, _agent: Agent) { todo!() }
    /// Bytes of DRAM that anything was ever written to, in 2 MiB chunks.
    pub fn resident(&self) -> u64 { todo!() }
}

/// A line as it lies in DRAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawLine {
    pub data: [u8; 64],
    pub mac: u32,
    pub owner: bool,
    pub poisoned: bool,
}
