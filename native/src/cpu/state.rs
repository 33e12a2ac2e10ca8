//! The register file of one logical processor, and everything else it carries from one instruction to the next.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};

use crate::mem::{Agent, CpuSlot, Memory, Requester};

use super::block::Cache;
use super::ept::EptTlb;
use super::ext::Ext;
use super::flags::Lazy;
use super::mem_access::{NO_PAGE, PAGES};
use super::samples::Samples;
use super::tlb::{Spaces, Tlb};
use super::vmcs::Vmcs;
use super::vmx_ctl::Controls;

pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;
pub const R8: usize = 8;
pub const R11: usize = 11;
/// A register that reads as zero: base or index of an operand that has none.
pub const ZERO: usize = 16;
/// Linear address of the first instruction of the running block: base of RIP-relative operands.
pub const BLOCK: usize = 17;

/// Segment registers in the order of their encoding, which is also the VMCS's.
pub const ES: usize = 0;
pub const CS: usize = 1;
pub const SS: usize = 2;
pub const DS: usize = 3;
pub const FS: usize = 4;
pub const GS: usize = 5;
pub const LDTR: usize = 6;
pub const TR: usize = 7;
/// Segment bases as addresses are formed: zero for ES, CS, SS, DS in 64-bit mode. `SEG_BASE + n` of the register file.
pub const SEG_BASE: usize = 18;

/// A segment register with its hidden part. `rights` is as in the VMCS: type, S, DPL, P, AVL, L, D/B, G, and bit 16
/// "unusable".
#[derive(Clone, Copy, Default, Debug)]
pub struct Segment {
    pub sel: u16,
    pub rights: u32,
    pub limit: u32,
    pub base: u64,
}

pub const UNUSABLE: u32 = 1 << 16;

impl Segment {
    pub fn dpl(&self) -> u8 {
        (self.rights >> 5 & 3) as u8
    }
    pub fn unusable(&self) -> bool {
        self.rights & UNUSABLE != 0
    }
    pub fn long(&self) -> bool {
        self.rights & 1 << 13 != 0
    }
    pub fn big(&self) -> bool {
        self.rights & 1 << 14 != 0
    }
}

#[derive(Clone, Copy, Default, Debug)]
pub struct TableRegister {
    pub base: u64,
    pub limit: u32,
}

pub mod cr0 {
    pub const PE: u64 = 1;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const VMXE: u64 = 1 << 13;
    pub const SMXE: u64 = 1 << 14;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const KL: u64 = 1 << 19;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
    pub const CET: u64 = 1 << 23;
    pub const PKS: u64 = 1 << 24;
    pub const UINTR: u64 = 1 << 25;
}

pub mod efer {
    pub const SCE: u64 = 1;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Guest interruptibility state, bits of the VMCS field.
pub mod block {
    pub const STI: u32 = 1;
    pub const MOV_SS: u32 = 2;
    pub const SMI: u32 = 4;
    pub const NMI: u32 = 8;
}

/// What may be switched on or off when a processor is described (`Core.configure`).
#[derive(Clone, Debug)]
pub struct Options {
    /// TSC from the host's clock instead of the count of retired instructions.
    pub tsc_real: bool,
    pub tsc_hz: u64,
    /// TSC ticks per 1024 retired instructions when the TSC is virtual.
    pub tsc_per_1024: u64,
    /// Physical-address width that page-table entries may use (KeyID bits included).
    pub pa_bits: u32,
    pub vmcs_revision: u32,
    /// Seed of RDRAND and RDSEED.
    pub seed: u64,
    /// CR4 bits that exist on this processor.
    pub cr4_valid: u64,
    /// Bits of XCR0 and IA32_XSS that exist: the state that XSAVES and XRSTORS of root mode reach.
    pub xcr0_valid: u64,
    pub xss_valid: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            tsc_real: false,
            tsc_hz: 2_000_000_000,
            tsc_per_1024: 1024,
            pa_bits: 52,
            vmcs_revision: 0x12,
            seed: 0,
            cr4_valid: cr4::TSD
                | 3
                | cr4::DE
                | cr4::PSE
                | cr4::PAE
                | cr4::MCE
                | cr4::PGE
                | cr4::PCE
                | cr4::OSFXSR
                | cr4::OSXMMEXCPT
                | cr4::UMIP
                | cr4::LA57
                | cr4::VMXE
                | cr4::SMXE
                | cr4::FSGSBASE
                | cr4::PCIDE
                | cr4::OSXSAVE
                | cr4::SMEP
                | cr4::SMAP
                | cr4::PKE,
            // x87, SSE, PKRU: no more than there are instructions for.
            xcr0_valid: 0x203,
            xss_valid: 0,
        }
    }
}

/// Bits of [`Shared::events`].
pub mod event {
    /// An external interrupt waits for this processor.
    pub const INTERRUPT: u32 = 1;
    pub const NMI: u32 = 2;
    /// The posted-interrupt notification vector arrived.
    pub const POSTED: u32 = 4;
    /// The guest state changed so that pending work must be looked at (interrupt window, virtual interrupt, ...).
    pub const RECHECK: u32 = 8;
    pub const INIT: u32 = 16;
}

/// What other threads may touch: requests to this processor.
#[derive(Default)]
pub struct Shared {
    pub events: AtomicU32,
    /// A processor that waits (HLT without exiting) sleeps here.
    pub sleeping: AtomicBool,
    pub lock: Mutex<()>,
    pub wake: Condvar,
    /// Advance of the virtual TSC by the host, in ticks.
    pub tsc_jump: AtomicU64,
    /// The counters as of the last pause or exit, for those who ask while the processor runs.
    pub counters: Mutex<Vec<(&'static str, u64)>>,
}

/// Counters a user may read.
#[derive(Default, Clone, Debug)]
pub struct Counters {
    pub lookups: u64,
    pub decoded: u64,
    pub tlb_fills: u64,
    pub slow_accesses: u64,
    pub walks: u64,
    pub exits: u64,
    pub exceptions: u64,
    pub interrupts: u64,
    pub undefined: u64,
    pub shootdowns: u64,
}

/// Why the running instruction, or the run, ended early. Its kind stands in `Cpu::stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum StopKind {
    #[default]
    None,
    /// A non-canonical address: #SS(0) or #GP(0), as the instruction's segment says.
    Canonical,
    /// An exception to be delivered (or to exit by) for the running instruction.
    Exception { vector: u8, error: Option<u32> },
    /// A VM exit described by `Cpu::exit`.
    Exit,
    /// The instruction wrote to the code being run: execute it alone, with fresh code.
    Restart,
    /// The instruction is complete; state that blocks depend on may have changed.
    Sync,
    /// The escape instruction of hook `n` was executed.
    Escape { hook: u16 },
}

/// The fields of a VM exit on its way to the VMCS.
#[derive(Clone, Copy, Debug, Default)]
pub struct Exit {
    pub reason: u32,
    pub qualification: u64,
    pub linear: u64,
    pub physical: u64,
    pub length: u32,
    pub info: u32,
    pub intr_info: u32,
    pub intr_error: u32,
    /// A trap-like exit: the instruction has completed (RIP is already past it).
    pub after: bool,
}

/// Where the bytes of the running block lie, so that a store into them is noticed.
#[derive(Clone, Copy, Default, Debug)]
pub struct RunningCode {
    /// Physical address of the first byte, and number of bytes in its page.
    pub pa: u64,
    pub len: u64,
    /// The part in the next page, if the block's only instruction crosses.
    pub pa2: u64,
    pub len2: u64,
}

/// An event on its way through the guest's IDT: becomes the IDT-vectoring information if the delivery exits.
#[derive(Clone, Copy, Debug)]
pub struct Delivery {
    pub info: u32,
    pub error: u32,
    pub length: u32,
}

/// One logical processor.
pub struct Cpu {
    // Hot: touched by nearly every instruction.
    /// Registers 0 to 15, then [`ZERO`], [`BLOCK`] and the segment bases. As long as an index byte reaches.
    pub gpr: [u64; 256],
    pub cc: Lazy,
    /// Low bits of the TLB tag: address space and privilege.
    pub tag: u64,
    pub tlb: Tlb,
    pub rip: u64,
    /// RFLAGS without the six arithmetic flags, which are in `cc`.
    pub flags: u64,
    /// Instructions retired before the running block.
    pub icount: u64,
    /// `icount` at which time makes something happen.
    pub icount_stop: u64,
    /// `icount` at which the run loop looks around next; 0: at once.
    pub look_at: u64,
    pub stop: StopKind,
    pub cpl: u8,
    /// 64-bit code segment in long mode.
    pub long: bool,
    /// Mask of the stack pointer: 64, 32 or 16 bits.
    pub stack_mask: u64,
    /// The rest of the address-space context: bits of decoded-block keys.
    pub mode: u32,

    pub seg: [Segment; 8],
    pub gdtr: TableRegister,
    pub idtr: TableRegister,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub dr: [u64; 8],
    pub xcr0: u64,
    pub xss: u64,
    pub pkru: u32,
    pub pat: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub debugctl: u64,
    pub spec_ctrl: u64,
    /// MSRs without a function here: they keep what was written.
    pub msrs: BTreeMap<u32, u64>,
    pub ext: Ext,
    pub pdptes: [u64; 4],

    /// Instructions of the running block that retired before it stopped in the middle.
    pub partial: u32,
    /// Interruptibility state as in the VMCS.
    pub blocking: u32,
    pub activity: u32,
    pub pending_debug: u64,
    /// What the running instruction adds to them once it is complete.
    pub hits: u64,
    pub exit: Exit,
    pub delivering: Option<Delivery>,
    /// Linear address of the last page fault, until it is delivered.
    pub fault_linear: u64,
    /// The next boundary has work that the guest's own state makes due.
    pub attention: bool,
    pub mtf_pending: bool,
    /// Events that arrived and could not be taken yet.
    pub interrupt_waits: bool,
    pub nmi_waits: bool,
    pub init_waits: bool,
    /// Virtual processor priority.
    pub vppr: u8,
    /// `icount` at which the run loop gives its caller a chance to look for signals.
    pub pause_at: u64,
    /// `None` while `run` has it out.
    pub cache: Option<Box<Cache>>,
    /// NMI blocking was lifted by an IRET that then faulted.
    pub nmi_unblocked: bool,
    pub ctl: Controls,

    /// SEAM root mode; a guest entered now runs in SEAM non-root mode. See `Cpu::set_seam`.
    pub seam: bool,
    /// The running guest is in SEAM non-root mode.
    pub guest_seam: bool,
    /// A guest's state is live between an escape and `vmcontinue`.
    pub live: bool,
    pub vmcs: Box<Vmcs>,
    pub vmcs_pa: Option<u64>,
    /// The current VMCS of the other root mode, and its address.
    pub parked_vmcs: (Box<Vmcs>, Option<u64>),
    pub allow_escape: bool,
    /// Number of the address space: changes when translations are dropped.
    pub space: u64,
    pub spaces: Spaces,
    /// Changes whenever chains between blocks of different pages must be looked up again.
    pub code_space: u64,
    /// Physical pages (and the linear one) of the running block.
    pub code: RunningCode,
    pub ept: EptTlb,
    /// Physical pages (KeyID included) with host pointers to read them by.
    pub pages: [(u64, usize); PAGES],
    /// CR0, CR3, CR4 and EFER at the last VM exit.
    pub left: (u64, u64, u64, u64),
    /// What the translations in the TLBs belong to.
    pub owner: (u64, u64, u64, u64),
    pub keyid_shift: u32,
    /// Execute the next instruction alone.
    pub step: bool,
    pub monitor: Option<u64>,
    pub rng: u64,
    /// What was added to this processor's time-stamp counter to keep up with the others.
    pub tsc_base: Cell<u64>,
    pub apic_id: u32,
    /// Tick at which the host's timer for this processor fires.
    pub host_timer: Option<u64>,
    /// Icount-independent deadline of the VMX-preemption timer, in TSC ticks.
    pub preempt_at: Option<u64>,

    pub options: Options,
    pub counters: Counters,
    /// The profile of what runs here, if somebody asked for one.
    pub samples: Option<Box<Samples>>,
    pub undefined: VecDeque<String>,
    pub mem: Arc<Memory>,
    pub slot: Arc<CpuSlot>,
    pub shared: Arc<Shared>,
}

impl Cpu {
    pub fn new(mem: Arc<Memory>, apic_id: u32) -> Cpu {
        let slot = mem.register_cpu();
        // Bit 51 is the top bit of the KeyID, if there are KeyIDs at all.
        let keyid_bits = mem
            .split(1 << 51)
            .map_or(0, |(keyid, _)| 32 - keyid.leading_zeros());
        let keyid_shift = 52 - keyid_bits;
        Cpu {
            gpr: [0; 256],
            cc: Lazy::default(),
            tag: 0,
            tlb: Tlb::new(),
            rip: 0,
            flags: 2,
            icount: 0,
            icount_stop: 0,
            look_at: 0,
            stop: StopKind::None,
            cpl: 0,
            long: false,
            stack_mask: u64::MAX,
            mode: 0,
            seg: [Segment::default(); 8],
            gdtr: TableRegister::default(),
            idtr: TableRegister::default(),
            cr0: cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            xcr0: 1,
            xss: 0,
            pkru: 0,
            pat: 0x0007_0406_0007_0406,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            tsc_aux: 0,
            tsc_adjust: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            debugctl: 0,
            spec_ctrl: 0,
            msrs: BTreeMap::new(),
            ext: Ext::default(),
            pdptes: [0; 4],
            partial: 0,
            blocking: 0,
            activity: 0,
            pending_debug: 0,
            hits: 0,
            exit: Exit::default(),
            delivering: None,
            fault_linear: 0,
            attention: false,
            mtf_pending: false,
            interrupt_waits: false,
            nmi_waits: false,
            init_waits: false,
            vppr: 0,
            pause_at: 0,
            cache: None,
            nmi_unblocked: false,
            ctl: Controls::default(),
            seam: false,
            guest_seam: false,
            live: false,
            vmcs: Box::default(),
            vmcs_pa: None,
            parked_vmcs: (Box::default(), None),
            allow_escape: false,
            space: 0,
            spaces: Spaces::default(),
            code_space: 0,
            code: RunningCode::default(),
            ept: EptTlb::new(),
            pages: [NO_PAGE; PAGES],
            left: (0, 0, 0, 0),
            owner: (0, 0, 0, 0),
            keyid_shift,
            step: false,
            monitor: None,
            rng: 0x9e37_79b9_7f4a_7c15 ^ u64::from(apic_id),
            tsc_base: Cell::new(0),
            apic_id,
            host_timer: None,
            preempt_at: None,
            options: Options::default(),
            counters: Counters::default(),
            samples: None,
            undefined: VecDeque::new(),
            mem,
            slot,
            shared: Arc::new(Shared::default()),
        }
    }

    /// Who this processor is on the bus while it is in root mode.
    pub fn root_agent(&self) -> Agent<'_> {
        Agent {
            mode: if self.seam {
                Requester::Seam
            } else {
                Requester::Host
            },
            cpu: Some(&self.slot),
        }
    }

    /// Who the running guest is on the bus.
    #[inline]
    pub fn guest_agent(&self) -> Agent<'_> {
        Agent {
            mode: if self.guest_seam {
                Requester::Seam
            } else {
                Requester::Host
            },
            cpu: Some(&self.slot),
        }
    }

    pub fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    pub fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    pub fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// #GP(0) and the like: notes an exception for the running instruction.
    #[cold]
    #[inline(never)]
    pub fn raise(&mut self, vector: u8, error: Option<u32>) -> Stop {
        self.stop = StopKind::Exception { vector, error };
        Stop
    }

    #[cold]
    #[inline(never)]
    pub fn gp(&mut self, error: u32) -> Stop {
        self.raise(13, Some(error))
    }

    #[cold]
    #[inline(never)]
    pub fn ud(&mut self) -> Stop {
        self.raise(6, None)
    }

    /// Notes a VM exit for the running instruction.
    #[cold]
    #[inline(never)]
    pub fn exit_with(&mut self, reason: u32, qualification: u64) -> Stop {
        self.exit = Exit {
            reason,
            qualification,
            ..Exit::default()
        };
        self.stop = StopKind::Exit;
        Stop
    }
}
