//! What happens between instructions: NMIs, interrupts, windows, timers, traps, and the virtual APIC.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::exception::Event;
use super::flags::{IF, TF};
use super::run::Outcome;
use super::state::{block, event, Cpu, Shared, Stop};
use super::vmcs::field;
use super::vmx_ctl::{pin, primary, secondary};
use super::vmx_exit::reason;

impl Shared {
    /// Asks the processor for something; wakes it if it sleeps.
    pub fn post(&self, what: u32) {
        self.events.fetch_or(what, Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) {
            let _guard = self.lock.lock();
            self.wake.notify_all();
        }
    }
}

/// Guest activity state.
pub const ACTIVE: u32 = 0;
pub const HALTED: u32 = 1;
pub const SHUTDOWN: u32 = 2;
pub const WAIT_FOR_SIPI: u32 = 3;
/// Pending debug exceptions that trap: breakpoints 0 to 3, bus lock, an enabled breakpoint, single step.
const TRAPS: u64 = 0x580f;

impl Cpu {
    fn interruptible(&self) -> bool {
        self.flags & IF != 0 && self.blocking & (block::STI | block::MOV_SS) == 0
    }

    fn nmi_possible(&self) -> bool {
        self.blocking & (block::NMI | block::MOV_SS) == 0
    }

    /// Something that the guest's own state lets happen now (external events are in `shared.events`).
    pub fn work_pending(&self) -> bool {
        let shadow = self.blocking & (block::STI | block::MOV_SS) != 0;
        self.mtf_pending
            || self.activity != ACTIVE
            || self.pending_debug & TRAPS != 0 && self.blocking & block::MOV_SS == 0
            || self.dr[7] & 0xff != 0
            || !shadow
                && (self.interruptible()
                    && (self.ctl.primary(primary::INT_WINDOW)
                        || self.virtual_interrupt().is_some())
                    || self.ctl.primary(primary::NMI_WINDOW) && self.nmi_possible()
                    || self.nmi_waits && self.nmi_possible()
                    || self.interrupt_waits && self.interrupt_exits_now())
    }

    fn interrupt_exits_now(&self) -> bool {
        self.ctl.pin(pin::EXT_INT) || self.interruptible()
    }

    /// Sets `icount_stop`: the next moment at which time alone makes something happen.
    pub fn plan_timers(&mut self) {
        let mut stop = self.pause_at;
        for deadline in [self.host_timer, self.preempt_at].into_iter().flatten() {
            let left = deadline.saturating_sub(self.tsc_own());
            let rate = self.options.tsc_per_1024.max(1);
            let instructions = if self.options.tsc_real {
                // Look at the clock every so often.
                if left == 0 {
                    0
                } else {
                    20_000
                }
            } else {
                (u128::from(left) * 1024)
                    .div_ceil(rate.into())
                    .min(u64::MAX.into()) as u64
            };
            stop = stop.min(self.icount.saturating_add(instructions));
        }
        self.icount_stop = stop;
    }

    /// The work at an instruction boundary, in the order of its priorities (SDM vol. 3, table 6-2 and 25.7.1).
    pub fn boundary_work(&mut self) -> Result<Option<Outcome>, Stop> {
        let posted = self.shared.events.swap(0, Ordering::SeqCst);
        self.interrupt_waits |= posted & event::INTERRUPT != 0;
        self.nmi_waits |= posted & event::NMI != 0;
        self.init_waits |= posted & event::INIT != 0;
        if posted & event::POSTED != 0 {
            self.notification()?;
        }
        if self
            .host_timer
            .is_some_and(|deadline| self.tsc() >= deadline)
        {
            self.host_timer = None;
            self.interrupt_waits = true;
        }
        loop {
            if let Some(outcome) = self.boundary_once()? {
                return Ok(Some(outcome));
            }
            if self.activity == ACTIVE {
                break;
            }
            if let Some(outcome) = self.sleep()? {
                return Ok(Some(outcome));
            }
        }
        self.plan();
        Ok(None)
    }

    fn boundary_once(&mut self) -> Result<Option<Outcome>, Stop> {
        if self.mtf_pending {
            self.mtf_pending = false;
            return Err(self.boundary_exit(reason::MTF, 0));
        }
        if self.pending_debug & TRAPS != 0
            && self.blocking & block::MOV_SS == 0
            && self.activity != SHUTDOWN
        {
            self.activity = ACTIVE;
            self.take(Event::hardware(1, None))?;
        }
        if self.init_waits && self.activity != WAIT_FOR_SIPI {
            self.init_waits = false;
            return Err(self.boundary_exit(reason::INIT, 0));
        }
        if let Some(deadline) = self.preempt_at {
            if self.tsc() >= deadline {
                self.preempt_at = Some(deadline);
                return Err(self.boundary_exit(reason::PREEMPTION_TIMER, 0));
            }
        }
        if self.ctl.primary(primary::NMI_WINDOW) && self.nmi_possible() && self.activity < SHUTDOWN
        {
            self.activity = ACTIVE;
            return Err(self.boundary_exit(reason::NMI_WINDOW, 0));
        }
        if self.nmi_waits && self.nmi_deliverable() {
            self.nmi_waits = false;
            return self.nmi().map(|()| None);
        }
        let interruptible = self.interruptible();
        if self.ctl.primary(primary::INT_WINDOW) && interruptible && self.activity < SHUTDOWN {
            self.activity = ACTIVE;
            return Err(self.boundary_exit(reason::INTERRUPT_WINDOW, 0));
        }
        if self.interrupt_waits && self.ctl.pin(pin::EXT_INT) {
            self.interrupt_waits = false;
            return Err(self.boundary_exit(reason::EXTERNAL_INTERRUPT, 0));
        }
        if self.interrupt_waits && interruptible && self.activity <= HALTED {
            // No external-interrupt exiting: this model's processors have no vector of their own to deliver.
            self.interrupt_waits = false;
        }
        if interruptible && self.activity <= HALTED {
            if let Some(vector) = self.virtual_interrupt() {
                self.activity = ACTIVE;
                return self.deliver_virtual(vector).map(|()| None);
            }
        }
        if self.breakpoint_at_rip() {
            self.activity = ACTIVE;
            self.take(Event::hardware(1, None))?;
        }
        if self.icount >= self.pause_at {
            self.live = true;
            return Ok(Some(Outcome::Pause));
        }
        Ok(None)
    }

    fn nmi_deliverable(&self) -> bool {
        // With virtual NMIs, blocking by NMI is the guest's own and does not keep a real NMI out.
        let blocked = if self.ctl.pin(pin::VIRTUAL_NMI) {
            0
        } else {
            self.blocking & block::NMI
        };
        blocked == 0 && self.blocking & block::MOV_SS == 0 && self.activity != WAIT_FOR_SIPI
    }

    fn nmi(&mut self) -> Result<(), Stop> {
        if self.ctl.pin(pin::NMI) {
            let stop = self.boundary_exit(reason::EXCEPTION, 0);
            self.exit.intr_info = 2 | 2 << 8 | 1 << 31;
            return Err(stop);
        }
        self.activity = ACTIVE;
        self.take(Event {
            vector: 2,
            kind: super::exception::kind::NMI,
            error: None,
            length: 0,
        })?;
        self.blocking |= block::NMI;
        Ok(())
    }

    /// An exit between instructions: no instruction length.
    fn boundary_exit(&mut self, reason: u32, qualification: u64) -> Stop {
        self.exit_with(reason, qualification)
    }

    /// HLT without exiting, and the other inactive states: waits until an event is posted.
    fn sleep(&mut self) -> Result<Option<Outcome>, Stop> {
        self.slot.leave();
        let woken = {
            self.shared.sleeping.store(true, Ordering::SeqCst);
            let mut woken = self.shared.events.load(Ordering::SeqCst) != 0;
            if !woken {
                if let Ok(guard) = self.shared.lock.lock() {
                    if self.shared.events.load(Ordering::SeqCst) == 0 {
                        let _ = self
                            .shared
                            .wake
                            .wait_timeout(guard, Duration::from_millis(20));
                    }
                }
                woken = self.shared.events.load(Ordering::SeqCst) != 0;
            }
            self.shared.sleeping.store(false, Ordering::SeqCst);
            woken
        };
        if self.slot.enter() {
            self.drop_pointers();
        }
        if !woken {
            // Time passes while the processor sleeps: a virtual timer is reached at once.
            let next = [self.host_timer, self.preempt_at]
                .into_iter()
                .flatten()
                .min();
            if let (Some(deadline), false) = (next, self.options.tsc_real) {
                let jump = deadline.saturating_sub(self.tsc());
                self.shared.tsc_jump.fetch_add(jump, Ordering::Relaxed);
            } else {
                self.live = true;
                return Ok(Some(Outcome::Pause));
            }
        }
        let posted = self.shared.events.swap(0, Ordering::SeqCst);
        self.interrupt_waits |= posted & event::INTERRUPT != 0;
        self.nmi_waits |= posted & event::NMI != 0;
        self.init_waits |= posted & event::INIT != 0;
        if posted & event::POSTED != 0 {
            self.notification()?;
        }
        if self
            .host_timer
            .is_some_and(|deadline| self.tsc() >= deadline)
        {
            self.host_timer = None;
            self.interrupt_waits = true;
        }
        Ok(None)
    }

    /// After an instruction with TF or the monitor trap flag.
    pub fn trap_after(&mut self, trap_flag: bool) {
        self.pending_debug |= std::mem::take(&mut self.hits);
        if trap_flag {
            self.pending_debug |= 0x4000;
        }
        if self.ctl.primary(primary::MTF) {
            self.mtf_pending = true;
        }
    }

    pub fn single_stepping(&self) -> bool {
        self.flags & TF != 0
    }

    /// An enabled instruction breakpoint at RIP (not with RF).
    fn breakpoint_at_rip(&mut self) -> bool {
        if self.dr[7] & 0xff == 0 || self.flags & super::flags::RF != 0 {
            return false;
        }
        let linear = if self.long {
            self.rip
        } else {
            self.rip.wrapping_add(self.seg[super::state::CS].base) & 0xffff_ffff
        };
        let mut hit = 0;
        for number in 0..4 {
            let enabled = self.dr[7] >> (number * 2) & 3 != 0;
            let kind = self.dr[7] >> (16 + number * 4) & 3;
            if enabled && kind == 0 && self.dr[number] == linear {
                hit |= 1 << number;
            }
        }
        if hit == 0 {
            return false;
        }
        self.pending_debug |= hit;
        // RF for the return: the handler's IRET steps over it.
        self.flags |= super::flags::RF;
        true
    }

    // --- the virtual APIC (SDM vol. 3, chapter 30)

    fn virtual_delivery(&self) -> bool {
        self.ctl.secondary(secondary::VIRTUAL_INT)
    }

    pub fn vapic_read(&mut self, offset: u64) -> Result<u32, Stop> {
        self.phys_rd32(self.ctl.virtual_apic | self.ctl.hkid | offset)
    }

    pub fn vapic_write(&mut self, offset: u64, value: u32) -> Result<(), Stop> {
        self.phys_wr32(self.ctl.virtual_apic | self.ctl.hkid | offset, value)
    }

    /// The vector that virtual-interrupt delivery would deliver now, IF aside.
    fn virtual_interrupt(&self) -> Option<u8> {
        if !self.virtual_delivery() {
            return None;
        }
        let rvi = self.vmcs.get(field::GUEST_INTR_STATUS) as u8;
        (rvi >> 4 > self.vppr >> 4).then_some(rvi)
    }

    fn svi(&self) -> u8 {
        (self.vmcs.get(field::GUEST_INTR_STATUS) >> 8) as u8
    }

    fn set_status(&mut self, rvi: u8, svi: u8) {
        self.vmcs.set(
            field::GUEST_INTR_STATUS,
            u64::from(svi) << 8 | u64::from(rvi),
        );
    }

    fn rvi(&self) -> u8 {
        self.vmcs.get(field::GUEST_INTR_STATUS) as u8
    }

    /// PPR virtualization.
    pub fn update_vppr(&mut self) -> Result<(), Stop> {
        let tpr = self.vapic_read(0x80)? as u8;
        let svi = self.svi();
        self.vppr = if tpr >> 4 >= svi >> 4 {
            tpr
        } else {
            svi & 0xf0
        };
        self.vapic_write(0xa0, self.vppr.into())
    }

    /// TPR virtualization, after a change of VTPR. Trap-like: the instruction is complete.
    pub fn tpr_changed(&mut self) -> Result<(), Stop> {
        if self.virtual_delivery() {
            return self.update_vppr();
        }
        let tpr = self.vapic_read(0x80)? as u8;
        let threshold = self.vmcs.get(field::TPR_THRESHOLD) as u8 & 15;
        if tpr >> 4 < threshold {
            let stop = self.exit_with(reason::TPR_THRESHOLD, 0);
            self.exit.after = true;
            return Err(stop);
        }
        Ok(())
    }

    /// Bit `vector` of a 256-bit register (IRR at 0x200, ISR at 0x100) of the virtual APIC.
    fn vapic_bit(&mut self, register: u64, vector: u8, on: bool) -> Result<(), Stop> {
        let at = register + u64::from(vector >> 5) * 16;
        let old = self.vapic_read(at)?;
        let bit = 1 << (vector & 31);
        self.vapic_write(at, if on { old | bit } else { old & !bit })
    }

    fn vapic_highest(&mut self, register: u64) -> Result<u8, Stop> {
        for word in (0..8u64).rev() {
            let bits = self.vapic_read(register + word * 16)?;
            if bits != 0 {
                return Ok((word as u8) << 5 | (31 - bits.leading_zeros()) as u8);
            }
        }
        Ok(0)
    }

    fn deliver_virtual(&mut self, vector: u8) -> Result<(), Stop> {
        self.counters.interrupts += 1;
        self.vapic_bit(0x100, vector, true)?;
        self.vppr = vector & 0xf0;
        self.vapic_write(0xa0, self.vppr.into())?;
        self.vapic_bit(0x200, vector, false)?;
        let rvi = self.vapic_highest(0x200)?;
        self.set_status(rvi, vector);
        self.take(Event::external(vector))
    }

    /// EOI virtualization.
    pub fn virtual_eoi(&mut self) -> Result<(), Stop> {
        let vector = self.svi();
        self.vapic_bit(0x100, vector, false)?;
        let svi = self.vapic_highest(0x100)?;
        let rvi = self.rvi();
        self.set_status(rvi, svi);
        self.update_vppr()?;
        let bitmap = self
            .vmcs
            .get(field::EOI_EXIT0.nth(usize::from(vector >> 6)));
        if bitmap >> (vector & 63) & 1 != 0 {
            let stop = self.exit_with(reason::VIRTUALIZED_EOI, vector.into());
            self.exit.after = true;
            return Err(stop);
        }
        Ok(())
    }

    /// Self-IPI virtualization.
    pub fn virtual_self_ipi(&mut self, vector: u8) -> Result<(), Stop> {
        self.vapic_bit(0x200, vector, true)?;
        let (rvi, svi) = (self.rvi().max(vector), self.svi());
        self.set_status(rvi, svi);
        Ok(())
    }

    /// Posted-interrupt processing: the notification vector came in.
    fn notification(&mut self) -> Result<(), Stop> {
        if !self.ctl.pin(pin::POSTED) {
            // Nothing posts to this guest: an ordinary external interrupt.
            self.interrupt_waits = true;
            return Ok(());
        }
        let descriptor = self.vmcs.get(field::PI_DESCRIPTOR);
        // Outstanding-notification bit.
        loop {
            let control = self.phys_rd64(descriptor + 32)?;
            if self.phys_cas(descriptor + 32, 8, control.into(), (control & !1).into())?
                == u128::from(control)
            {
                break;
            }
        }
        let mut highest = 0;
        for word in 0..4u64 {
            let at = descriptor + word * 8;
            let bits = loop {
                let bits = self.phys_rd64(at)?;
                if bits == 0 || self.phys_cas(at, 8, bits.into(), 0)? == u128::from(bits) {
                    break bits;
                }
            };
            // The host cannot post a TD what would look like an exception: vectors 0 to 30 are dropped.
            let bits = if word == 0 && self.guest_seam {
                bits & !0x7fff_ffff
            } else {
                bits
            };
            if bits == 0 {
                continue;
            }
            highest = (word as u8) << 6 | (63 - bits.leading_zeros()) as u8;
            for half in 0..2u64 {
                let add = (bits >> (half * 32)) as u32;
                if add != 0 {
                    let register = 0x200 + (word * 2 + half) * 16;
                    let old = self.vapic_read(register)?;
                    self.vapic_write(register, old | add)?;
                }
            }
        }
        let (rvi, svi) = (self.rvi().max(highest), self.svi());
        self.set_status(rvi, svi);
        Ok(())
    }
}
