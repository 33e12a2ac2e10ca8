//! VM entry: checks, loading the guest, and the event that the VMCS injects.

use super::exception::{kind, Event};
use super::flags::{IF, VM};
use super::interrupt::{ACTIVE, HALTED, SHUTDOWN, WAIT_FOR_SIPI};
use super::root::{error, VmError};
use super::run::Outcome;
use super::state::{
    block, cr0, cr4, efer, Cpu, Segment, Stop, CS, ES, GS, LDTR, RSP, SS, TR, UNUSABLE,
};
use super::vmcs::field;
use super::vmx_ctl::{entry_ctl, pin, primary, secondary, Controls};
use super::vmx_exit::reason;

/// The VMX-preemption timer counts down once every 2^5 TSC ticks (IA32_VMX_MISC[4:0]).
pub const PREEMPTION_SHIFT: u32 = 5;

impl Cpu {
    /// VMLAUNCH (`launch`) or VMRESUME, and the guest up to its next VM exit or escape.
    pub fn vmenter(&mut self, launch: bool) -> Result<Outcome, VmError> {
        if self.vmcs_pa.is_none() {
            return Err(VmError::Fail(0));
        }
        if launch && self.vmcs.launched {
            return Err(self.vm_fail(error::LAUNCH_NOT_CLEAR));
        }
        if !launch && !self.vmcs.launched {
            return Err(self.vm_fail(error::RESUME_NOT_LAUNCHED));
        }
        self.live = false;
        let seam = self.seam;
        let ctl = Controls::read(&self.vmcs, seam, self.keyid_shift);
        if !self.controls_ok(&ctl) {
            return Err(self.vm_fail(error::ENTRY_CONTROLS));
        }
        if let Some(qualification) = self.bad_guest(&ctl) {
            return Ok(Outcome::Exit(
                self.failed_entry(reason::GUEST_STATE, qualification),
            ));
        }
        self.vmcs.launched = true;
        self.ctl = ctl;
        self.guest_seam = seam;
        self.load_guest();
        if let Some(failed) = self.load_entry_msrs() {
            return Ok(Outcome::Exit(
                self.failed_entry(reason::MSR_LOADING, failed),
            ));
        }
        self.switch_address_space();
        Ok(self.start())
    }

    /// Goes on with a live guest: after an escape, or after a pause.
    pub fn resume(&mut self) -> Result<Outcome, VmError> {
        self.live = false;
        self.refresh();
        Ok(self.run())
    }

    fn controls_ok(&self, ctl: &Controls) -> bool {
        let with_virtual = secondary::X2APIC | secondary::APIC_REGISTER | secondary::VIRTUAL_INT;
        let posted = ctl.pin(pin::POSTED);
        let entry = self.vmcs.get(field::ENTRY_INTR_INFO) as u32;
        let levels = ctl.eptp >> 3 & 7;
        !(ctl.pin(pin::VIRTUAL_NMI) && !ctl.pin(pin::NMI)
            || ctl.primary(primary::NMI_WINDOW) && !ctl.pin(pin::VIRTUAL_NMI)
            || !ctl.primary(primary::TPR_SHADOW) && ctl.secondary & with_virtual != 0
            || ctl.primary(primary::TPR_SHADOW) && ctl.virtual_apic & 0xfff != 0
            || ctl.secondary(secondary::VIRTUAL_INT) && !ctl.pin(pin::EXT_INT)
            || posted && !ctl.secondary(secondary::VIRTUAL_INT)
            || posted && self.vmcs.get(field::PI_DESCRIPTOR) & 63 != 0
            || ctl.secondary(secondary::UNRESTRICTED) && !ctl.secondary(secondary::EPT)
            || ctl.secondary(secondary::EPT)
                && (!(3..=4).contains(&levels) || ctl.eptp & 7 != 6 && ctl.eptp & 7 != 0)
            || ctl.secondary(secondary::VPID) && self.vmcs.get(field::VPID) == 0
            || ctl.secondary(secondary::EPT_VE) && self.vmcs.get(field::VE_INFO) & 0xfff != 0
            || ctl.primary(primary::MSR_BITMAPS) && ctl.msr_bitmap & 0xfff != 0
            || self.vmcs.get(field::CR3_TARGET_COUNT) > 4
            || entry >> 31 != 0 && !injection_ok(entry, self.vmcs.get(field::ENTRY_INSTR_LEN)))
    }

    /// Checks of the guest-state area; `Some` with the exit qualification if one fails.
    fn bad_guest(&self, ctl: &Controls) -> Option<u64> {
        let v = &self.vmcs;
        let (cr0, cr4) = (v.get(field::GUEST_CR0), v.get(field::GUEST_CR4));
        let rflags = v.get(field::GUEST_RFLAGS);
        let long = ctl.entry & entry_ctl::IA32E != 0;
        let unrestricted = ctl.secondary(secondary::UNRESTRICTED);
        let segment = |index: usize| self.vmcs_segment(index);
        let (cs, ss, tr, ldtr) = (segment(CS), segment(SS), segment(TR), segment(LDTR));
        let rip = v.get(field::GUEST_RIP);
        let canonical = |value: u64| ((value << 7) as i64 >> 7) as u64 == value;
        let blocking = v.get(field::GUEST_INTERRUPTIBILITY) as u32;
        let activity = v.get(field::GUEST_ACTIVITY) as u32;
        let guest_efer = v.get(field::GUEST_EFER);
        let control_registers = cr0 & cr0::PE == 0 && (cr0 & cr0::PG != 0 || !unrestricted)
            || cr0 >> 32 != 0
            || cr4 & !self.options.cr4_valid & !(cr4::CET | cr4::PKS | cr4::UINTR | cr4::KL) != 0
            || long && (cr0 & cr0::PG == 0 || cr4 & cr4::PAE == 0)
            || !long && cr4 & cr4::PCIDE != 0;
        let efer_bad = ctl.entry & entry_ctl::LOAD_EFER != 0
            && (guest_efer & !(efer::SCE | efer::LME | efer::LMA | efer::NXE) != 0
                || (guest_efer & efer::LMA != 0) != long
                || cr0 & cr0::PG != 0 && (guest_efer & efer::LME != 0) != long);
        let pat_bad =
            ctl.entry & entry_ctl::LOAD_PAT != 0 && !super::msr::pat_valid(v.get(field::GUEST_PAT));
        let flags_bad = rflags & 0xffff_ffff_ffc0_8028 != 0
            || rflags & 2 == 0
            || long && rflags & VM != 0
            || self.injects(kind::EXTERNAL) && rflags & IF == 0;
        let code_bad = cs.unusable()
            || cs.rights & 0x90 != 0x90
            || cs.rights & 8 == 0 && !(unrestricted && cs.rights & 15 == 3)
            || long && cs.long() && cs.big()
            || cs.rights & 0xfffe_0f00 != 0;
        let stack_bad = !ss.unusable() && (ss.rights & 0x90 != 0x90 || ss.rights & 0xb != 3);
        let task_bad = tr.unusable()
            || tr.rights & 0x80 == 0
            || !matches!(tr.rights & 31, 11 | 3)
            || !canonical(tr.base);
        let ldt_bad = !ldtr.unusable() && (ldtr.rights & 31 != 2 || ldtr.rights & 0x80 == 0);
        let rip_bad = if long && cs.long() {
            !canonical(rip)
        } else {
            rip >> 32 != 0
        };
        let state_bad = activity > WAIT_FOR_SIPI
            || activity == HALTED && ss.dpl() != 0
            || activity != ACTIVE && blocking & (block::STI | block::MOV_SS) != 0
            || blocking & !0x1f != 0
            || blocking & 3 == 3
            || blocking & block::STI != 0 && rflags & IF == 0
            || self.injects(kind::EXTERNAL) && blocking & 3 != 0
            || self.injects(kind::NMI) && blocking & block::MOV_SS != 0
            || activity == SHUTDOWN && self.injects(kind::EXTERNAL);
        if v.get(field::LINK_POINTER) != u64::MAX {
            return Some(4);
        }
        let bad = control_registers
            || efer_bad
            || pat_bad
            || flags_bad
            || code_bad
            || stack_bad
            || task_bad
            || ldt_bad
            || rip_bad
            || state_bad
            || v.get(field::GUEST_DR7) >> 32 != 0;
        bad.then_some(0)
    }

    fn injects(&self, kind: u8) -> bool {
        let info = self.vmcs.get(field::ENTRY_INTR_INFO) as u32;
        info >> 31 != 0 && (info >> 8 & 7) as u8 == kind
    }

    fn vmcs_segment(&self, index: usize) -> Segment {
        let v = &self.vmcs;
        Segment {
            sel: v.get(field::GUEST_ES_SEL.nth(index)) as u16,
            rights: v.get(field::GUEST_ES_RIGHTS.nth(index)) as u32 & (0xf0ff | UNUSABLE),
            limit: v.get(field::GUEST_ES_LIMIT.nth(index)) as u32,
            base: v.get(field::GUEST_ES_BASE.nth(index)),
        }
    }

    fn load_guest(&mut self) {
        let v = &self.vmcs;
        self.cr0 = v.get(field::GUEST_CR0) | cr0::ET;
        self.cr3 = v.get(field::GUEST_CR3);
        self.cr4 = v.get(field::GUEST_CR4);
        self.gdtr.base = v.get(field::GUEST_GDTR_BASE);
        self.gdtr.limit = v.get(field::GUEST_GDTR_LIMIT) as u32;
        self.idtr.base = v.get(field::GUEST_IDTR_BASE);
        self.idtr.limit = v.get(field::GUEST_IDTR_LIMIT) as u32;
        self.blocking = v.get(field::GUEST_INTERRUPTIBILITY) as u32;
        self.activity = v.get(field::GUEST_ACTIVITY) as u32;
        self.pending_debug = v.get(field::GUEST_PENDING_DEBUG);
        self.sysenter_cs = v.get(field::GUEST_SYSENTER_CS);
        self.sysenter_esp = v.get(field::GUEST_SYSENTER_ESP);
        self.sysenter_eip = v.get(field::GUEST_SYSENTER_EIP);
        let entry = self.ctl.entry;
        if entry & entry_ctl::LOAD_DEBUG != 0 {
            self.dr[7] = v.get(field::GUEST_DR7);
            self.debugctl = v.get(field::GUEST_DEBUGCTL);
        }
        if entry & entry_ctl::LOAD_PAT != 0 {
            self.pat = v.get(field::GUEST_PAT);
        }
        if entry & entry_ctl::LOAD_EFER != 0 {
            self.efer = v.get(field::GUEST_EFER);
        } else {
            let long = entry & entry_ctl::IA32E != 0;
            self.efer &= !(efer::LMA
                | if self.cr0 & cr0::PG != 0 {
                    efer::LME
                } else {
                    0
                });
            if long {
                self.efer |= efer::LMA | efer::LME;
            }
        }
        for (index, pdpte) in self.pdptes.iter_mut().enumerate() {
            *pdpte = v.get(field::GUEST_PDPTE0.nth(index));
        }
        self.rip = v.get(field::GUEST_RIP);
        self.gpr[RSP] = v.get(field::GUEST_RSP);
        let rflags = v.get(field::GUEST_RFLAGS);
        self.set_rflags(rflags);
        for index in (ES..=GS).chain([LDTR, TR]) {
            self.seg[index] = self.vmcs_segment(index);
        }
        // CPL is SS's DPL.
        self.cpl = self.seg[SS].dpl();
        self.tsc();
        self.delivering = None;
        self.nmi_unblocked = false;
        self.mtf_pending = false;
        self.step = false;
        self.monitor = None;
        self.preempt_at = self.ctl.pin(pin::PREEMPTION).then(|| {
            let value = self.vmcs.get(field::PREEMPTION_TIMER);
            self.tsc().wrapping_add(value << PREEMPTION_SHIFT)
        });
    }

    /// The VM-entry MSR-load area; `Some(n)` if entry `n` (from 1) cannot be loaded.
    fn load_entry_msrs(&mut self) -> Option<u64> {
        let area = self.vmcs.get(field::ENTRY_MSR_LOAD);
        for index in 0..self.vmcs.get(field::ENTRY_MSR_LOAD_COUNT) {
            let at = area.wrapping_add(index * 16);
            let msr = self.mem.rd32(at, self.root_agent());
            let value = self.mem.rd64(at.wrapping_add(8), self.root_agent());
            let loaded = match (msr, value) {
                (Ok(msr), Ok(value)) => self.msr_write(msr, value).is_ok(),
                _ => false,
            };
            if !loaded || index >= 512 {
                return Some(index + 1);
            }
        }
        None
    }

    /// Translations of another guest, or of this one before its owner changed it, are not used.
    fn switch_address_space(&mut self) {
        let vpid = if self.ctl.secondary(secondary::VPID) {
            self.vmcs.get(field::VPID)
        } else {
            0
        };
        let owner = (
            self.ctl.eptp,
            self.ctl.shared_eptp,
            self.ctl.hkid | self.ctl.shared_bit | u64::from(self.guest_seam),
            vpid,
        );
        let registers = (self.cr0, self.cr3, self.cr4, self.efer);
        if owner != self.owner {
            // Pointers too: another guest may not name the same KeyIDs.
            self.drop_pointers();
            self.ept.clear();
        }
        if owner != self.owner || vpid == 0 || registers != self.left {
            self.flush_tlb();
        }
        self.owner = owner;
        self.refresh();
    }

    /// Event injection, and the run.
    fn start(&mut self) -> Outcome {
        if self.slot.enter() {
            self.drop_pointers();
        }
        let started = self.start_events();
        if let Err(Stop) = started {
            // Only an exit can come out of an event's delivery.
            self.slot.leave();
            return Outcome::Exit(self.finish_exit());
        }
        self.run()
    }

    fn start_events(&mut self) -> Result<(), Stop> {
        if self.ctl.secondary(secondary::VIRTUAL_INT) {
            self.physical(Cpu::update_vppr)?;
        }
        let info = self.vmcs.get(field::ENTRY_INTR_INFO) as u32;
        if info >> 31 != 0 {
            self.activity = ACTIVE;
            self.inject(info)?;
        } else if self.ctl.primary(primary::TPR_SHADOW)
            && !self.ctl.secondary(secondary::VIRTUAL_INT)
        {
            let threshold = self.vmcs.get(field::TPR_THRESHOLD) as u32 & 15;
            if threshold > 0 && self.physical(|cpu| cpu.vapic_read(0x80))? >> 4 & 15 < threshold {
                return Err(self.exit_with(reason::TPR_THRESHOLD, 0));
            }
        }
        Ok(())
    }

    /// A fault of the processor's own accesses at VM entry: a machine check.
    fn physical<T>(&mut self, access: impl FnOnce(&mut Cpu) -> Result<T, Stop>) -> Result<T, Stop> {
        access(self)
            .map_err(|_| self.exit_with(reason::ENTRY_MACHINE_CHECK | reason::FAILED_ENTRY, 0))
    }

    fn inject(&mut self, info: u32) -> Result<(), Stop> {
        let event_kind = (info >> 8 & 7) as u8;
        if event_kind == 7 {
            // Other event: a pending MTF VM exit.
            self.mtf_pending = true;
            return Ok(());
        }
        let error = (info >> 11 & 1 != 0).then(|| self.vmcs.get(field::ENTRY_ERROR_CODE) as u32);
        let software = matches!(
            event_kind,
            kind::SOFT_INT | kind::PRIVILEGED | kind::SOFT_EXCEPTION
        );
        let length = if software {
            self.vmcs.get(field::ENTRY_INSTR_LEN) as u32
        } else {
            0
        };
        let event = Event {
            vector: info as u8,
            kind: event_kind,
            error,
            length,
        };
        self.take_injected(event)?;
        if event_kind == kind::NMI {
            self.blocking |= block::NMI;
        }
        Ok(())
    }
}

/// Consistency of VM-entry interruption information.
fn injection_ok(info: u32, length: u64) -> bool {
    let vector = info & 0xff;
    let error = info >> 11 & 1 != 0;
    if info & 0x7fff_f000 != 0 {
        return false;
    }
    match (info >> 8 & 7) as u8 {
        kind::EXTERNAL => !error,
        kind::NMI => vector == 2 && !error,
        kind::HARDWARE => vector < 32 && (!error || matches!(vector, 8 | 10..=14 | 17 | 21)),
        kind::SOFT_INT | kind::PRIVILEGED | kind::SOFT_EXCEPTION => !error && length <= 15,
        7 => vector == 0 && !error,
        _ => false,
    }
}
