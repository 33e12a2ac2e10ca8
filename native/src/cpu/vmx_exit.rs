//! The end of VMX non-root operation: the guest's state and the reason go to the VMCS.

use super::flags::RF;
use super::state::{Cpu, CS, ES, GS, LDTR, RSP, SS, TR};
use super::vmcs::field;
use super::vmx_ctl::{entry_ctl, exit_ctl, pin, secondary};

/// Basic exit reasons (SDM vol. 3, appendix C, and TDX's).
pub mod reason {
    pub const EXCEPTION: u32 = 0;
    pub const EXTERNAL_INTERRUPT: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const INTERRUPT_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const TASK_SWITCH: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const GETSEC: u32 = 11;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const INVLPG: u32 = 14;
    pub const RDPMC: u32 = 15;
    pub const RDTSC: u32 = 16;
    pub const RSM: u32 = 17;
    pub const VMCALL: u32 = 18;
    pub const VMCLEAR: u32 = 19;
    pub const VMLAUNCH: u32 = 20;
    pub const VMPTRLD: u32 = 21;
    pub const VMPTRST: u32 = 22;
    pub const VMREAD: u32 = 23;
    pub const VMRESUME: u32 = 24;
    pub const VMWRITE: u32 = 25;
    pub const VMXOFF: u32 = 26;
    pub const VMXON: u32 = 27;
    pub const CR_ACCESS: u32 = 28;
    pub const DR_ACCESS: u32 = 29;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    pub const GUEST_STATE: u32 = 33;
    pub const MSR_LOADING: u32 = 34;
    pub const MWAIT: u32 = 36;
    pub const MTF: u32 = 37;
    pub const MONITOR: u32 = 39;
    pub const PAUSE: u32 = 40;
    pub const ENTRY_MACHINE_CHECK: u32 = 41;
    pub const TPR_THRESHOLD: u32 = 43;
    pub const VIRTUALIZED_EOI: u32 = 45;
    pub const GDTR_IDTR: u32 = 46;
    pub const LDTR_TR: u32 = 47;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIGURATION: u32 = 49;
    pub const INVEPT: u32 = 50;
    pub const RDTSCP: u32 = 51;
    pub const PREEMPTION_TIMER: u32 = 52;
    pub const INVVPID: u32 = 53;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
    pub const APIC_WRITE: u32 = 56;
    pub const RDRAND: u32 = 57;
    pub const INVPCID: u32 = 58;
    pub const VMFUNC: u32 = 59;
    pub const ENCLS: u32 = 60;
    pub const RDSEED: u32 = 61;
    pub const XSAVES: u32 = 63;
    pub const XRSTORS: u32 = 64;
    pub const PCONFIG: u32 = 65;
    pub const UMWAIT: u32 = 67;
    pub const TPAUSE: u32 = 68;
    pub const LOADIWKEY: u32 = 69;
    pub const ENCLV: u32 = 70;
    pub const ENQCMD: u32 = 72;
    pub const ENQCMDS: u32 = 73;
    pub const SEAMCALL: u32 = 76;
    pub const TDCALL: u32 = 77;
    /// The exit is a failed VM entry.
    pub const FAILED_ENTRY: u32 = 1 << 31;
}

impl Cpu {
    /// Stores the exit described by `exit` and the guest's state; gives the exit reason.
    pub fn finish_exit(&mut self) -> u32 {
        self.counters.exits += 1;
        let exit = self.exit;
        if exit.after {
            self.rip = self.ip_mask(self.rip.wrapping_add(exit.length.into()));
        }
        // Other processors start from the time that passed here.
        self.tsc();
        self.save_guest();
        self.write_exit_fields(exit.reason);
        self.load_host();
        self.live = false;
        self.step = false;
        exit.reason
    }

    fn write_exit_fields(&mut self, reason: u32) {
        let exit = self.exit;
        let delivering = self.delivering.take();
        self.nmi_unblocked = false;
        let v = &mut self.vmcs;
        v.set(field::EXIT_REASON, reason.into());
        v.set(field::EXIT_QUALIFICATION, exit.qualification);
        v.set(field::GUEST_LINEAR, exit.linear);
        v.set(field::GUEST_PHYSICAL, exit.physical);
        v.set(field::EXIT_INSTR_LEN, exit.length.into());
        v.set(field::EXIT_INSTR_INFO, exit.info.into());
        v.set(field::EXIT_INTR_INFO, exit.intr_info.into());
        v.set(field::EXIT_INTR_ERROR, exit.intr_error.into());
        v.set(
            field::IDT_VECTORING_INFO,
            delivering.map_or(0, |event| event.info.into()),
        );
        v.set(
            field::IDT_VECTORING_ERROR,
            delivering.map_or(0, |event| event.error.into()),
        );
        let info = v.get(field::ENTRY_INTR_INFO);
        v.set(field::ENTRY_INTR_INFO, info & 0x7fff_ffff);
    }

    /// A VM entry that failed its checks of the guest's state, or later: nothing was loaded that matters.
    pub fn failed_entry(&mut self, reason: u32, qualification: u64) -> u32 {
        let reason = reason | reason::FAILED_ENTRY;
        self.vmcs.set(field::EXIT_REASON, reason.into());
        self.vmcs.set(field::EXIT_QUALIFICATION, qualification);
        reason
    }

    fn save_guest(&mut self) {
        let rflags = self.rflags();
        let rsp = self.gpr[RSP];
        let ctl = self.ctl;
        let mut activity = self.activity;
        if self.exit.reason == reason::TRIPLE_FAULT {
            activity = super::interrupt::ACTIVE;
        }
        let pending = self.pending_debug;
        let v = &mut self.vmcs;
        v.set(field::GUEST_CR0, self.cr0);
        v.set(field::GUEST_CR3, self.cr3);
        v.set(field::GUEST_CR4, self.cr4);
        v.set(field::GUEST_RIP, self.rip);
        v.set(field::GUEST_RSP, rsp);
        v.set(
            field::GUEST_RFLAGS,
            rflags & !if self.exit.after { RF } else { 0 },
        );
        for index in (ES..=GS).chain([LDTR, TR]) {
            let segment = self.seg[index];
            v.set(field::GUEST_ES_SEL.nth(index), segment.sel.into());
            v.set(field::GUEST_ES_BASE.nth(index), segment.base);
            v.set(field::GUEST_ES_LIMIT.nth(index), segment.limit.into());
            v.set(field::GUEST_ES_RIGHTS.nth(index), segment.rights.into());
        }
        v.set(field::GUEST_GDTR_BASE, self.gdtr.base);
        v.set(field::GUEST_GDTR_LIMIT, self.gdtr.limit.into());
        v.set(field::GUEST_IDTR_BASE, self.idtr.base);
        v.set(field::GUEST_IDTR_LIMIT, self.idtr.limit.into());
        v.set(field::GUEST_INTERRUPTIBILITY, self.blocking.into());
        v.set(field::GUEST_ACTIVITY, activity.into());
        v.set(field::GUEST_PENDING_DEBUG, pending);
        v.set(field::GUEST_SYSENTER_CS, self.sysenter_cs);
        v.set(field::GUEST_SYSENTER_ESP, self.sysenter_esp);
        v.set(field::GUEST_SYSENTER_EIP, self.sysenter_eip);
        if ctl.exit & exit_ctl::SAVE_DEBUG != 0 {
            v.set(field::GUEST_DR7, self.dr[7]);
            v.set(field::GUEST_DEBUGCTL, self.debugctl);
        }
        if ctl.exit & exit_ctl::SAVE_PAT != 0 {
            v.set(field::GUEST_PAT, self.pat);
        }
        if ctl.exit & exit_ctl::SAVE_EFER != 0 {
            v.set(field::GUEST_EFER, self.efer);
        }
        if ctl.secondary(secondary::EPT) {
            for (index, pdpte) in self.pdptes.iter().enumerate() {
                v.set(field::GUEST_PDPTE0.nth(index), *pdpte);
            }
        }
        if ctl.secondary(secondary::UNRESTRICTED) {
            let entry = v.get(field::ENTRY_CTLS) & !u64::from(entry_ctl::IA32E);
            let long = self.efer & super::state::efer::LMA != 0;
            v.set(
                field::ENTRY_CTLS,
                entry | if long { entry_ctl::IA32E.into() } else { 0 },
            );
        }
        let left = self
            .preempt_at
            .map(|at| at.saturating_sub(self.tsc()) >> super::vmx_entry::PREEMPTION_SHIFT);
        if ctl.pin(pin::PREEMPTION) && ctl.exit & exit_ctl::SAVE_PREEMPTION != 0 {
            self.vmcs.set(field::PREEMPTION_TIMER, left.unwrap_or(0));
        }
        self.left = (self.cr0, self.cr3, self.cr4, self.efer);
    }

    fn load_host(&mut self) {
        self.dr[7] = 0x400;
        self.preempt_at = None;
        self.mtf_pending = false;
        let (store, stores) = (
            self.vmcs.get(field::EXIT_MSR_STORE),
            self.vmcs.get(field::EXIT_MSR_STORE_COUNT).min(512),
        );
        for index in 0..stores {
            let at = store + index * 16;
            if let Ok(msr) = self.mem.rd32(at, self.root_agent()) {
                let value = self.msr_read(msr).unwrap_or(0);
                // A refused store is a VMX abort on hardware; the host's own memory does not refuse here.
                let _ = self.mem.wr64(at + 8, value, self.root_agent());
            }
        }
        if self.ctl.exit & exit_ctl::LOAD_EFER != 0 {
            self.efer = self.vmcs.get(field::HOST_EFER);
        }
        if self.ctl.exit & exit_ctl::LOAD_PAT != 0 {
            self.pat = self.vmcs.get(field::HOST_PAT);
        }
        let (load, loads) = (
            self.vmcs.get(field::EXIT_MSR_LOAD),
            self.vmcs.get(field::EXIT_MSR_LOAD_COUNT).min(512),
        );
        for index in 0..loads {
            let at = load + index * 16;
            if let (Ok(msr), Ok(value)) = (
                self.mem.rd32(at, self.root_agent()),
                self.mem.rd64(at + 8, self.root_agent()),
            ) {
                let _ = self.msr_write(msr, value);
            }
        }
        let _ = (CS, SS);
    }
}
