//! Delivery of exceptions and interrupts through the guest's IDT, what becomes of faults on the way, and IRET.

use super::flags::{AC, IF, NT, RF, TF, VM};
use super::segment::Descriptor;
use super::state::{block, Cpu, Delivery, Segment, Stop, StopKind, CS, RSP, SS, TR, UNUSABLE};
use super::vmx_ctl::pin;
use super::vmx_exit::reason;

/// Interruption types, as in VM-entry and VM-exit interruption information.
pub mod kind {
    pub const EXTERNAL: u8 = 0;
    pub const NMI: u8 = 2;
    pub const HARDWARE: u8 = 3;
    pub const SOFT_INT: u8 = 4;
    pub const PRIVILEGED: u8 = 5;
    pub const SOFT_EXCEPTION: u8 = 6;
}

/// An event to deliver.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    pub vector: u8,
    pub kind: u8,
    pub error: Option<u32>,
    /// Length of the instruction that is left behind (INT n, INT3, INTO, INT1); 0 for everything else.
    pub length: u32,
}

impl Event {
    pub fn hardware(vector: u8, error: Option<u32>) -> Event {
        Event {
            vector,
            kind: kind::HARDWARE,
            error,
            length: 0,
        }
    }

    pub fn external(vector: u8) -> Event {
        Event {
            vector,
            kind: kind::EXTERNAL,
            error: None,
            length: 0,
        }
    }

    fn exception(&self) -> bool {
        matches!(
            self.kind,
            kind::HARDWARE | kind::PRIVILEGED | kind::SOFT_EXCEPTION
        )
    }

    /// Interruption information, valid bit included.
    pub fn info(&self) -> u32 {
        u32::from(self.vector)
            | u32::from(self.kind) << 8
            | u32::from(self.error.is_some()) << 11
            | 1 << 31
    }

    fn software(&self) -> bool {
        matches!(self.kind, kind::SOFT_INT | kind::SOFT_EXCEPTION)
    }
}

/// How two exceptions in a row combine (SDM vol. 3, table 6-5).
fn doubles(first: &Event, second: u8) -> bool {
    let contributory = |vector: u8| matches!(vector, 0 | 10..=13);
    if first.kind != kind::HARDWARE {
        return false;
    }
    match first.vector {
        14 => second == 14 || contributory(second),
        // #VE counts as a page fault does for what follows it.
        20 => second == 14 || contributory(second),
        vector => contributory(vector) && contributory(second),
    }
}

impl Cpu {
    /// Takes an event: exits by it if the VMCS says so, else delivers it. RIP stands at the instruction that the
    /// handler returns to (or, for software interrupts, at the instruction itself).
    pub fn take(&mut self, event: Event) -> Result<(), Stop> {
        self.take_event(event, false)
    }

    /// The event of a VM entry: it causes no exit itself and leaves CR2 and DR6 alone.
    pub fn take_injected(&mut self, event: Event) -> Result<(), Stop> {
        self.take_event(event, true)
    }

    fn take_event(&mut self, event: Event, mut injected: bool) -> Result<(), Stop> {
        let mut event = event;
        self.delivering = None;
        loop {
            if event.exception() && !injected {
                self.counters.exceptions += 1;
                if self.exception_exits(&event) {
                    if event.vector == 8 {
                        self.delivering = None;
                    }
                    return Err(self.exception_exit(&event));
                }
                self.exception_effects(&event);
            }
            injected = false;
            self.delivering = Some(Delivery {
                info: event.info(),
                error: event.error.unwrap_or(0),
                length: event.length,
            });
            let step = std::mem::replace(&mut self.step, true);
            let result = self.deliver(&event);
            self.step = step;
            if result.is_ok() {
                self.delivering = None;
                self.blocking &= !(block::STI | block::MOV_SS);
                return Ok(());
            }
            let next = match self.stop {
                StopKind::Exception { vector, error } => (vector, error),
                StopKind::Canonical => (13, Some(0)),
                _ => {
                    if self.exit.length == 0 {
                        self.exit.length = event.length;
                    }
                    return Err(Stop);
                }
            };
            if event.vector == 8 && event.kind == kind::HARDWARE {
                self.delivering = None;
                return Err(self.exit_with(reason::TRIPLE_FAULT, 0));
            }
            event = if doubles(&event, next.0) {
                Event::hardware(8, Some(0))
            } else {
                Event::hardware(next.0, next.1)
            };
        }
    }

    fn exception_exits(&self, event: &Event) -> bool {
        let bit = self.ctl.exceptions >> event.vector.min(31) & 1 != 0;
        if event.vector == 14 && event.kind == kind::HARDWARE {
            let mask = self.vmcs.get(super::vmcs::field::PF_MASK) as u32;
            let matched = self.vmcs.get(super::vmcs::field::PF_MATCH) as u32;
            return (event.error.unwrap_or(0) & mask == matched) == bit;
        }
        bit
    }

    fn exception_exit(&mut self, event: &Event) -> Stop {
        let qualification = match event.vector {
            14 => self.fault_linear,
            1 => self.debug_qualification(),
            _ => 0,
        };
        let stop = self.exit_with(reason::EXCEPTION, qualification);
        self.exit.intr_info = event.info() | u32::from(self.nmi_unblocked) << 12;
        self.exit.intr_error = event.error.unwrap_or(0);
        if event.software() || event.kind == kind::PRIVILEGED {
            self.exit.length = event.length;
        }
        stop
    }

    fn debug_qualification(&self) -> u64 {
        self.pending_debug & 0x680f
    }

    /// CR2 and DR6, once it is clear that the guest gets the exception.
    fn exception_effects(&mut self, event: &Event) {
        match event.vector {
            14 if event.kind == kind::HARDWARE => self.cr2 = self.fault_linear,
            1 if event.kind == kind::HARDWARE => {
                self.dr[6] |= self.pending_debug & 0xe00f;
                self.dr[6] &= !(self.pending_debug & super::debug::BUS_LOCK);
                self.pending_debug = 0;
                self.dr[7] &= !(1 << 13);
            }
            _ => {}
        }
    }

    fn deliver(&mut self, event: &Event) -> Result<(), Stop> {
        if self.long_mode() {
            self.deliver_long(event)
        } else if self.protected() {
            self.deliver_protected(event)
        } else {
            self.deliver_real(event)
        }
    }

    /// RFLAGS as the handler finds them on its stack: RF set for faults, so that a breakpoint does not hit again.
    fn flags_image(&self, event: &Event) -> u64 {
        let fault = event.kind == kind::HARDWARE && !matches!(event.vector, 1 | 8 | 18);
        self.rflags() | if fault { RF } else { 0 }
    }

    /// Code segment of a gate, with the privilege the handler runs at.
    fn gate_code(&mut self, selector: u16, external: u32) -> Result<(Descriptor, u8), Stop> {
        if selector & !3 == 0 {
            return Err(self.gp(external));
        }
        let error = u32::from(selector & !3) | external;
        let code = match self.descriptor(selector, 13) {
            Ok(code) => code,
            Err(stop) => {
                if let StopKind::Exception {
                    vector: 13,
                    error: Some(code),
                } = self.stop
                {
                    self.stop = StopKind::Exception {
                        vector: 13,
                        error: Some(code | external),
                    };
                }
                return Err(stop);
            }
        };
        let long = self.long_mode();
        if !code.code() || code.dpl() > self.cpl || long && (!code.long() || code.big()) {
            return Err(self.gp(error));
        }
        if !code.present() {
            return Err(self.raise(11, Some(error)));
        }
        let cpl = if code.conforming() {
            self.cpl
        } else {
            code.dpl()
        };
        Ok((code, cpl))
    }

    fn deliver_long(&mut self, event: &Event) -> Result<(), Stop> {
        let external = u32::from(!event.software());
        let index_error = u32::from(event.vector) << 3 | 2;
        let offset = u32::from(event.vector) * 16;
        if offset + 15 > self.idtr.limit {
            return Err(self.gp(index_error | external));
        }
        let mut gate = [0; 16];
        self.read_system(self.idtr.base.wrapping_add(offset.into()), &mut gate)?;
        let gate = u128::from_le_bytes(gate);
        let (low, high) = (gate as u64, (gate >> 64) as u64);
        let gate_kind = low >> 40 & 0x1f;
        if !matches!(gate_kind, 0xe | 0xf) || event.software() && ((low >> 45 & 3) as u8) < self.cpl
        {
            return Err(self.gp(index_error | external));
        }
        if low >> 47 & 1 == 0 {
            return Err(self.raise(11, Some(index_error | external)));
        }
        let selector = (low >> 16) as u16;
        let target = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let (mut code, cpl) = self.gate_code(selector, external)?;
        let ist = (low >> 32 & 7) as u32;
        let inner = cpl < self.cpl;
        let top = if ist != 0 {
            self.tss_u64(0x24 + (ist - 1) * 8, external)?
        } else if inner {
            self.tss_u64(4 + u32::from(cpl) * 8, external)?
        } else {
            self.gpr[RSP]
        };
        let top = top & !15;
        let mut frame = [0u8; 48];
        let rip = self.rip.wrapping_add(event.length.into());
        let rip = if self.long { rip } else { rip & 0xffff_ffff };
        let words = [
            u64::from(event.error.unwrap_or(0)),
            rip,
            self.seg[CS].sel.into(),
            self.flags_image(event),
            self.gpr[RSP],
            self.seg[SS].sel.into(),
        ];
        for (place, word) in frame.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let frame = if event.error.is_some() {
            &frame[..]
        } else {
            &frame[8..]
        };
        let bottom = top.wrapping_sub(frame.len() as u64);
        if !self.canonical(top) || !self.canonical(bottom) {
            return Err(self.raise(12, Some(external)));
        }
        if !self.canonical(target) {
            return Err(self.gp(external));
        }
        self.mark_accessed(&mut code)?;
        self.push_frame(bottom, frame, cpl)?;
        if inner {
            self.seg[SS] = Segment {
                sel: cpl.into(),
                rights: UNUSABLE | u32::from(cpl) << 5,
                limit: 0,
                base: 0,
            };
        }
        self.gpr[RSP] = bottom;
        self.enter_handler(code, selector, cpl, target, gate_kind & 1 == 0);
        Ok(())
    }

    /// Writes an event frame with the rights of the handler's privilege.
    fn push_frame(&mut self, at: u64, frame: &[u8], cpl: u8) -> Result<(), Stop> {
        if cpl == 3 {
            self.write_as(at, frame, super::tlb::USER)
        } else {
            self.write_system(at, frame)
        }
    }

    fn enter_handler(
        &mut self,
        code: Descriptor,
        selector: u16,
        cpl: u8,
        target: u64,
        interrupt_gate: bool,
    ) {
        let mut flags = self.flags & !(TF | NT | RF | VM);
        if interrupt_gate {
            flags &= !IF;
        }
        self.flags = flags;
        self.seg[CS] = code.segment(selector & !3 | u16::from(cpl));
        self.cpl = cpl;
        self.rip = target;
        self.refresh();
    }

    /// A stack pointer of the 64-bit TSS.
    fn tss_u64(&mut self, offset: u32, external: u32) -> Result<u64, Stop> {
        let tss = self.seg[TR];
        if offset + 7 > tss.limit {
            return Err(self.raise(10, Some(u32::from(tss.sel & !3) | external)));
        }
        self.system_u64(tss.base.wrapping_add(offset.into()))
    }

    /// SS:ESP of the 32-bit TSS for `cpl`, checked.
    fn tss_stack(&mut self, cpl: u8, external: u32) -> Result<(Segment, u64), Stop> {
        let tss = self.seg[TR];
        let tss_error = u32::from(tss.sel & !3) | external;
        let wide = tss.rights & 8 != 0;
        let (esp, ss) = if wide {
            let offset = 4 + u32::from(cpl) * 8;
            if offset + 5 > tss.limit {
                return Err(self.raise(10, Some(tss_error)));
            }
            let at = tss.base.wrapping_add(offset.into());
            (
                u64::from(self.system_u32(at)?),
                self.system_u16(at.wrapping_add(4))?,
            )
        } else {
            let offset = 2 + u32::from(cpl) * 4;
            if offset + 3 > tss.limit {
                return Err(self.raise(10, Some(tss_error)));
            }
            let at = tss.base.wrapping_add(offset.into());
            (
                u64::from(self.system_u16(at)?),
                self.system_u16(at.wrapping_add(2))?,
            )
        };
        let error = u32::from(ss & !3) | external;
        if ss & !3 == 0 {
            return Err(self.raise(10, Some(external)));
        }
        let mut stack = self.descriptor(ss, 10)?;
        let data = stack.ordinary() && !stack.code() && stack.permits();
        if ss & 3 != u16::from(cpl) || stack.dpl() != cpl || !data {
            return Err(self.raise(10, Some(error)));
        }
        if !stack.present() {
            return Err(self.raise(12, Some(error)));
        }
        self.mark_accessed(&mut stack)?;
        Ok((stack.segment(ss), esp))
    }

    fn deliver_protected(&mut self, event: &Event) -> Result<(), Stop> {
        let external = u32::from(!event.software());
        let index_error = u32::from(event.vector) << 3 | 2;
        let offset = u32::from(event.vector) * 8;
        if offset + 7 > self.idtr.limit {
            return Err(self.gp(index_error | external));
        }
        let gate = self.system_u64(self.idtr.base.wrapping_add(offset.into()))?;
        let gate_kind = gate >> 40 & 0x1f;
        let allowed = matches!(gate_kind, 5 | 6 | 7 | 0xe | 0xf);
        if !allowed || event.software() && ((gate >> 45 & 3) as u8) < self.cpl {
            return Err(self.gp(index_error | external));
        }
        if gate >> 47 & 1 == 0 {
            return Err(self.raise(11, Some(index_error | external)));
        }
        let selector = (gate >> 16) as u16;
        if gate_kind == 5 {
            return Err(self.exit_with(reason::TASK_SWITCH, u64::from(selector) | 3 << 30));
        }
        let wide = gate_kind & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let mask = if wide { 0xffff_ffff } else { 0xffff };
        let target = (gate & 0xffff | gate >> 32 & 0xffff_0000) & mask;
        let (mut code, cpl) = self.gate_code(selector, external)?;
        if target > u64::from(code.limit()) {
            return Err(self.gp(external));
        }
        let inner = cpl < self.cpl;
        let (stack, esp) = if inner {
            self.tss_stack(cpl, external)?
        } else {
            (self.seg[SS], self.gpr[RSP])
        };
        let rip = self.rip.wrapping_add(event.length.into());
        let mut words = Vec::with_capacity(6);
        words.extend(event.error.map(u64::from));
        words.extend([rip, self.seg[CS].sel.into(), self.flags_image(event)]);
        if inner {
            words.extend([self.gpr[RSP], self.seg[SS].sel.into()]);
        }
        self.mark_accessed(&mut code)?;
        let esp = self.push_words(&stack, esp, &words, size, cpl, external)?;
        self.seg[SS] = stack;
        self.enter_handler(code, selector, cpl, target, gate_kind & 1 == 0);
        self.set_rsp(esp);
        Ok(())
    }

    /// Writes `words` (lowest address first) below `esp` on a legacy stack; the new stack pointer.
    fn push_words(
        &mut self,
        stack: &Segment,
        esp: u64,
        words: &[u64],
        size: u64,
        cpl: u8,
        external: u32,
    ) -> Result<u64, Stop> {
        let mask = if stack.big() { 0xffff_ffff } else { 0xffff };
        let bytes = words.len() as u64 * size;
        let bottom = esp.wrapping_sub(bytes) & mask;
        if self.check_limit(stack, SS, bottom, bytes).is_err() {
            return Err(self.raise(12, Some(external)));
        }
        let mut frame = Vec::with_capacity(bytes as usize);
        for word in words {
            frame.extend_from_slice(&word.to_le_bytes()[..size as usize]);
        }
        self.push_frame(stack.base.wrapping_add(bottom) & 0xffff_ffff, &frame, cpl)?;
        Ok(bottom)
    }

    /// Real mode: the vector table at IDTR.
    fn deliver_real(&mut self, event: &Event) -> Result<(), Stop> {
        let offset = u32::from(event.vector) * 4;
        if offset + 3 > self.idtr.limit {
            return Err(self.gp(0));
        }
        let vector = self.system_u32(self.idtr.base.wrapping_add(offset.into()))?;
        let rip = self.rip.wrapping_add(event.length.into());
        let words = [rip, self.seg[CS].sel.into(), self.rflags()];
        let stack = self.seg[SS];
        let rsp = self.gpr[RSP];
        let rsp = self.push_words(&stack, rsp, &words, 2, 0, 0)?;
        self.set_rsp(rsp);
        self.flags &= !(IF | TF | AC);
        self.seg[CS].sel = (vector >> 16) as u16;
        self.seg[CS].base = u64::from(vector >> 16) << 4;
        self.rip = u64::from(vector & 0xffff);
        self.refresh();
        Ok(())
    }

    /// A call to an inner level: new stack from the TSS, `frame` (lowest first) pushed, CS and RIP set.
    pub fn enter_inner(
        &mut self,
        selector: u16,
        code: Descriptor,
        target: u64,
        frame: &[u64],
        size: u64,
        external: u32,
    ) -> Result<(), Stop> {
        let mut code = code;
        let cpl = code.dpl();
        if self.long_mode() {
            let top = self.tss_u64(4 + u32::from(cpl) * 8, external)?;
            let bottom = top.wrapping_sub(frame.len() as u64 * size);
            if !self.canonical(bottom) || !self.canonical(top) {
                return Err(self.raise(12, Some(external)));
            }
            let bytes: Vec<u8> = frame.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.mark_accessed(&mut code)?;
            self.push_frame(bottom, &bytes, cpl)?;
            self.seg[SS] = Segment {
                sel: cpl.into(),
                rights: UNUSABLE | u32::from(cpl) << 5,
                limit: 0,
                base: 0,
            };
            self.gpr[RSP] = bottom;
        } else {
            let (stack, esp) = self.tss_stack(cpl, external)?;
            self.mark_accessed(&mut code)?;
            let esp = self.push_words(&stack, esp, frame, size, cpl, external)?;
            self.seg[SS] = stack;
            self.refresh();
            self.set_rsp(esp);
        }
        self.seg[CS] = code.segment(selector & !3 | u16::from(cpl));
        self.cpl = cpl;
        self.rip = target;
        self.refresh();
        Ok(())
    }

    /// IRET of any size.
    pub fn iret(&mut self, size: u8) -> Result<(), Stop> {
        let rsp = self.gpr[RSP];
        let was_blocked = self.blocking & block::NMI != 0;
        // Blocking by NMI ends with the IRET even if it faults.
        if was_blocked && (self.ctl.pin(pin::VIRTUAL_NMI) || !self.ctl.pin(pin::NMI)) {
            self.blocking &= !block::NMI;
            self.nmi_unblocked = true;
        }
        let result = self.iret_body(size);
        if result.is_err() {
            self.gpr[RSP] = rsp;
        } else {
            self.nmi_unblocked = false;
        }
        result
    }

    fn iret_body(&mut self, size: u8) -> Result<(), Stop> {
        if self.protected() && self.flags & NT != 0 {
            if self.long_mode() {
                return Err(self.gp(0));
            }
            let link = self.system_u16(self.seg[TR].base)?;
            return Err(self.exit_with(reason::TASK_SWITCH, u64::from(link) | 1 << 30));
        }
        let rip = self.pop_sized(size)?;
        let cs = self.pop_sized(size)? as u16;
        let flags = self.pop_sized(size)?;
        if !self.protected() {
            if rip > u64::from(self.seg[CS].limit) {
                return Err(self.gp(0));
            }
            self.seg[CS].sel = cs;
            self.seg[CS].base = u64::from(cs) << 4;
            self.rip = rip;
            self.pop_rflags(flags, size, true);
            self.refresh();
            return Ok(());
        }
        if !self.long_mode() && flags & VM != 0 && self.cpl == 0 {
            // Virtual-8086 mode is not there.
            return Err(self.gp(0));
        }
        let code = self.return_code(cs, rip)?;
        let outer = (cs & 3) as u8 > self.cpl;
        if outer || self.long {
            let new_rsp = self.pop_sized(size)?;
            let new_ss = self.pop_sized(size)? as u16;
            let before = self.cpl;
            self.return_outer(code, cs, rip, new_ss, new_rsp)?;
            // The privilege that may change IOPL and IF is that of the IRET.
            let now = std::mem::replace(&mut self.cpl, before);
            self.pop_rflags(flags, size, true);
            self.cpl = now;
        } else {
            self.pop_rflags(flags, size, true);
            self.seg[CS] = code.segment(cs);
            self.rip = rip;
        }
        self.refresh();
        Ok(())
    }

    /// A machine check while the guest runs: vector 18, which a TD's exception bitmap turns into an exit.
    #[cold]
    pub fn machine_check(&mut self) -> Stop {
        self.raise(18, None)
    }
}
