//! Segmentation: limits, descriptor loads, far branches, and what follows from the segment registers.

use super::decode::mode;
use super::flags::VM;
use super::state::{
    cr0, cr4, Cpu, Segment, Stop, CS, DS, ES, FS, GS, LDTR, RSP, SEG_BASE, SS, TR, UNUSABLE,
};
use super::uop::Uop;

/// A descriptor as read from a table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub raw: u64,
    pub at: u64,
}

impl Descriptor {
    pub fn kind(&self) -> u8 {
        (self.raw >> 40 & 15) as u8
    }
    /// S: code or data.
    pub fn ordinary(&self) -> bool {
        self.raw >> 44 & 1 != 0
    }
    pub fn code(&self) -> bool {
        self.ordinary() && self.kind() & 8 != 0
    }
    pub fn conforming(&self) -> bool {
        self.kind() & 4 != 0
    }
    /// Data: writable; code: readable.
    pub fn permits(&self) -> bool {
        self.kind() & 2 != 0
    }
    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }
    pub fn present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }
    pub fn long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }
    pub fn big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | (self.raw >> 56 & 0xff) << 24
    }
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }
    /// Access rights as the VMCS holds them.
    pub fn rights(&self) -> u32 {
        (self.raw >> 40 & 0xf0ff) as u32
    }
    pub fn segment(&self, sel: u16) -> Segment {
        Segment {
            sel,
            rights: self.rights(),
            limit: self.limit(),
            base: self.base(),
        }
    }
}

impl Cpu {
    /// Brings everything that derives from CR0, CR4, EFER, XCR0, segments and CPL up to date.
    pub fn refresh(&mut self) {
        self.long = self.long_mode() && self.seg[CS].long();
        self.stack_mask = if self.long {
            u64::MAX
        } else if self.seg[SS].big() {
            0xffff_ffff
        } else {
            0xffff
        };
        for index in ES..=GS {
            self.gpr[SEG_BASE + index] = if self.long && index < FS {
                0
            } else {
                self.seg[index].base
            };
        }
        let mut bits = if self.long {
            mode::CODE64
        } else if self.seg[CS].big() {
            mode::CODE32
        } else {
            0
        };
        let mut set = |on: bool, bit: u32| {
            if on {
                bits |= bit;
            }
        };
        set(self.stack_mask == 0xffff_ffff, mode::STACK32);
        set(self.cpl == 3, mode::USER);
        set(
            self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0,
            mode::SSE_UD,
        );
        set(self.cr0 & cr0::TS != 0, mode::TS);
        set(self.cr0 & cr0::EM != 0, mode::EM);
        set(self.cr0 & cr0::MP != 0, mode::MP);
        set(
            self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6,
            mode::AVX,
        );
        set(self.cr4 & cr4::OSXSAVE != 0, mode::XSAVE);
        set(self.allow_escape, mode::ESCAPE);
        self.mode = bits;
        self.set_tag();
    }

    pub fn set_seg_bases(&mut self) {
        self.refresh();
    }

    /// Legacy limit and type check of a memory operand.
    pub fn check_limit(
        &mut self,
        segment: &Segment,
        index: usize,
        offset: u64,
        size: u64,
    ) -> Result<(), Stop> {
        let last = offset.wrapping_add(size - 1);
        let limit = u64::from(segment.limit);
        let expand_down = segment.rights & 0x1c == 0x14;
        let ok = !segment.unusable()
            && if expand_down {
                let top = if segment.big() { 0xffff_ffff } else { 0xffff };
                offset > limit && last <= top
            } else {
                last <= limit && last >= offset
            };
        if ok {
            return Ok(());
        }
        Err(self.raise(if index == SS { 12 } else { 13 }, Some(0)))
    }

    /// Reads the descriptor of `selector`; `fault` is the exception for a selector outside its table.
    pub fn descriptor(&mut self, selector: u16, fault: u8) -> Result<Descriptor, Stop> {
        let error = u32::from(selector & !3);
        let (base, limit) = if selector & 4 != 0 {
            let ldt = self.seg[LDTR];
            if ldt.unusable() || ldt.rights & 0x80 == 0 {
                return Err(self.raise(fault, Some(error)));
            }
            (ldt.base, ldt.limit)
        } else {
            (self.gdtr.base, self.gdtr.limit)
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Err(self.raise(fault, Some(error)));
        }
        let at = base.wrapping_add(u64::from(offset));
        let raw = self.system_u64(at)?;
        Ok(Descriptor { raw, at })
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Stop> {
        if descriptor.raw >> 40 & 1 == 0 {
            descriptor.raw |= 1 << 40;
            let byte = [(descriptor.raw >> 40) as u8];
            self.write_system(descriptor.at + 5, &byte)?;
        }
        Ok(())
    }

    /// MOV, POP, LxS to DS, ES, FS, GS, SS.
    pub fn load_segment(&mut self, index: usize, selector: u16) -> Result<(), Stop> {
        let error = u32::from(selector & !3);
        if !self.protected() || self.flags & VM != 0 {
            let segment = &mut self.seg[index];
            segment.sel = selector;
            segment.base = u64::from(selector) << 4;
            if segment.unusable() {
                segment.rights = 0x93;
                segment.limit = 0xffff;
            }
            self.refresh();
            return Ok(());
        }
        if selector & !3 == 0 {
            if index == SS && (!self.long || self.cpl == 3 || selector & 3 != u16::from(self.cpl)) {
                return Err(self.gp(0));
            }
            let base = if index >= FS { 0 } else { self.seg[index].base };
            let dpl = u32::from(selector & 3) << 5;
            self.seg[index] = Segment {
                sel: selector,
                rights: UNUSABLE | dpl,
                limit: 0,
                base,
            };
            if index == SS {
                // A null SS in 64-bit mode still carries the privilege level.
                self.seg[SS].rights = UNUSABLE | u32::from(self.cpl) << 5;
            }
            self.refresh();
            return Ok(());
        }
        let mut descriptor = self.descriptor(selector, 13)?;
        let rpl = (selector & 3) as u8;
        let ok = if index == SS {
            let data = descriptor.ordinary() && !descriptor.code() && descriptor.permits();
            data && rpl == self.cpl && descriptor.dpl() == self.cpl
        } else {
            let readable = descriptor.ordinary() && (!descriptor.code() || descriptor.permits());
            let conforming = descriptor.code() && descriptor.conforming();
            readable && (conforming || descriptor.dpl() >= self.cpl.max(rpl))
        };
        if !ok {
            return Err(self.gp(error));
        }
        if !descriptor.present() {
            return Err(self.raise(if index == SS { 12 } else { 11 }, Some(error)));
        }
        self.mark_accessed(&mut descriptor)?;
        self.seg[index] = descriptor.segment(selector);
        self.refresh();
        Ok(())
    }

    /// Checks a code segment for a far branch or an IRET target at privilege `cpl`, and reads its descriptor.
    fn code_descriptor(&mut self, selector: u16) -> Result<Descriptor, Stop> {
        if selector & !3 == 0 {
            return Err(self.gp(0));
        }
        self.descriptor(selector, 13)
    }

    /// JMP FAR and CALL FAR to a code segment or (calls, long mode excluded from tasks) through a call gate.
    pub fn far_branch(
        &mut self,
        u: &Uop,
        selector: u16,
        offset: u64,
        call: bool,
    ) -> Result<(), Stop> {
        let back = self.ip_after(u);
        if !self.protected() || self.flags & VM != 0 {
            return self.far_branch_real(u, selector, offset, call, back);
        }
        let error = u32::from(selector & !3);
        let mut descriptor = self.code_descriptor(selector)?;
        let rpl = (selector & 3) as u8;
        if !descriptor.ordinary() {
            return self.far_gate(selector, descriptor, call, back, u.size);
        }
        if !descriptor.code() {
            return Err(self.gp(error));
        }
        let both = descriptor.long() && descriptor.big() && self.long_mode();
        let privileged = if descriptor.conforming() {
            descriptor.dpl() > self.cpl
        } else {
            rpl > self.cpl || descriptor.dpl() != self.cpl
        };
        if both || privileged {
            return Err(self.gp(error));
        }
        if !descriptor.present() {
            return Err(self.raise(11, Some(error)));
        }
        self.check_code_target(&descriptor, offset)?;
        if call {
            let rsp = self.gpr[RSP];
            let cs = u64::from(self.seg[CS].sel);
            let pushed = self
                .push_sized(cs, u.size)
                .and_then(|()| self.push_sized(back, u.size));
            if let Err(stop) = pushed {
                self.gpr[RSP] = rsp;
                return Err(stop);
            }
        }
        self.mark_accessed(&mut descriptor)?;
        self.seg[CS] = descriptor.segment(selector & !3 | u16::from(self.cpl));
        self.rip = offset;
        self.refresh();
        Ok(())
    }

    fn check_code_target(&mut self, descriptor: &Descriptor, offset: u64) -> Result<(), Stop> {
        let long = self.long_mode() && descriptor.long();
        let ok = if long {
            self.canonical(offset)
        } else {
            offset <= u64::from(descriptor.limit())
        };
        if ok {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }

    fn far_branch_real(
        &mut self,
        u: &Uop,
        selector: u16,
        offset: u64,
        call: bool,
        back: u64,
    ) -> Result<(), Stop> {
        if offset > u64::from(self.seg[CS].limit) {
            return Err(self.gp(0));
        }
        if call {
            let rsp = self.gpr[RSP];
            let cs = u64::from(self.seg[CS].sel);
            let pushed = self
                .push_sized(cs, u.size)
                .and_then(|()| self.push_sized(back, u.size));
            if let Err(stop) = pushed {
                self.gpr[RSP] = rsp;
                return Err(stop);
            }
        }
        self.seg[CS].sel = selector;
        self.seg[CS].base = u64::from(selector) << 4;
        self.rip = offset;
        self.refresh();
        Ok(())
    }

    /// Far branch through a call gate. Same privilege, or for calls a more privileged segment with a new stack.
    fn far_gate(
        &mut self,
        gate: u16,
        descriptor: Descriptor,
        call: bool,
        back: u64,
        _size: u8,
    ) -> Result<(), Stop> {
        let error = u32::from(gate & !3);
        let rpl = (gate & 3) as u8;
        let long = self.long_mode();
        let kind = descriptor.kind();
        // 0xC: 32-bit call gate, or 64-bit in long mode. Task gates and TSSs are not there in long mode; task
        // switches of 32-bit code always exit.
        if !long && matches!(kind, 1 | 5 | 9) {
            if descriptor.dpl() < self.cpl.max(rpl) {
                return Err(self.gp(error));
            }
            let source = if call { 0 } else { 2u64 };
            return Err(self.exit_with(
                super::vmx_exit::reason::TASK_SWITCH,
                u64::from(gate) | source << 30,
            ));
        }
        if kind != 0xc {
            return Err(self.gp(error));
        }
        if descriptor.dpl() < self.cpl.max(rpl) {
            return Err(self.gp(error));
        }
        if !descriptor.present() {
            return Err(self.raise(11, Some(error)));
        }
        let selector = (descriptor.raw >> 16) as u16;
        let mut offset = descriptor.raw & 0xffff | descriptor.raw >> 32 & 0xffff_0000;
        if long {
            let upper = self.system_u64(descriptor.at + 8)?;
            if upper >> 40 & 0x1f != 0 {
                return Err(self.gp(error));
            }
            offset |= upper << 32;
        }
        let mut code = self.code_descriptor(selector)?;
        let code_error = u32::from(selector & !3);
        if !code.code() || code.dpl() > self.cpl || long && (!code.long() || code.big()) {
            return Err(self.gp(code_error));
        }
        if !code.present() {
            return Err(self.raise(11, Some(code_error)));
        }
        self.check_code_target(&code, offset)?;
        let inner = !code.conforming() && code.dpl() < self.cpl;
        if inner && !call {
            return Err(self.gp(code_error));
        }
        if inner {
            // Parameter copying of 32-bit gates is not done: nothing since OS/2 uses it.
            return self.far_gate_inner(selector, code, offset, back, long);
        }
        if call {
            let rsp = self.gpr[RSP];
            let size = if long { 8 } else { 4 };
            let cs = u64::from(self.seg[CS].sel);
            let pushed = self
                .push_sized(cs, size)
                .and_then(|()| self.push_sized(back, size));
            if let Err(stop) = pushed {
                self.gpr[RSP] = rsp;
                return Err(stop);
            }
        }
        self.mark_accessed(&mut code)?;
        self.seg[CS] = code.segment(selector & !3 | u16::from(self.cpl));
        self.rip = offset;
        self.refresh();
        Ok(())
    }

    fn far_gate_inner(
        &mut self,
        selector: u16,
        code: Descriptor,
        offset: u64,
        back: u64,
        long: bool,
    ) -> Result<(), Stop> {
        let (cs, ss, rsp) = (self.seg[CS].sel, self.seg[SS].sel, self.gpr[RSP]);
        let frame = [back, u64::from(cs), rsp, u64::from(ss)];
        self.enter_inner(selector, code, offset, &frame, if long { 8 } else { 4 }, 0)
    }

    /// RETF.
    pub fn ret_far(&mut self, size: u8, extra: u64) -> Result<(), Stop> {
        let before = self.gpr[RSP];
        let result = self.ret_far_body(size, extra);
        if result.is_err() {
            self.gpr[RSP] = before;
        }
        result
    }

    fn ret_far_body(&mut self, size: u8, extra: u64) -> Result<(), Stop> {
        let offset = self.pop_sized(size)?;
        let selector = self.pop_sized(size)? as u16;
        if !self.protected() || self.flags & VM != 0 {
            if offset > u64::from(self.seg[CS].limit) {
                return Err(self.gp(0));
            }
            self.seg[CS].sel = selector;
            self.seg[CS].base = u64::from(selector) << 4;
            self.rip = offset;
            let rsp = self.gpr[RSP].wrapping_add(extra);
            self.set_rsp(rsp);
            self.refresh();
            return Ok(());
        }
        let code = self.return_code(selector, offset)?;
        let rpl = (selector & 3) as u8;
        let rsp = self.gpr[RSP].wrapping_add(extra);
        if rpl == self.cpl {
            self.set_rsp(rsp);
            self.seg[CS] = code.segment(selector);
            self.rip = offset;
            self.refresh();
            return Ok(());
        }
        self.set_rsp(rsp);
        let outer_rsp = self.pop_sized(size)?;
        let outer_ss = self.pop_sized(size)? as u16;
        self.return_outer(
            code,
            selector,
            offset,
            outer_ss,
            outer_rsp.wrapping_add(extra),
        )
    }

    /// The code segment of RETF or IRET: at the same or an outer level.
    pub fn return_code(&mut self, selector: u16, offset: u64) -> Result<Descriptor, Stop> {
        let error = u32::from(selector & !3);
        let rpl = (selector & 3) as u8;
        let mut code = self.code_descriptor(selector)?;
        let dpl_ok = if code.conforming() {
            code.dpl() <= rpl
        } else {
            code.dpl() == rpl
        };
        if !code.code()
            || rpl < self.cpl
            || !dpl_ok
            || code.long() && code.big() && self.long_mode()
        {
            return Err(self.gp(error));
        }
        if !code.present() {
            return Err(self.raise(11, Some(error)));
        }
        self.check_code_target(&code, offset)?;
        self.mark_accessed(&mut code)?;
        Ok(code)
    }

    /// Completes a return to an outer privilege level.
    pub fn return_outer(
        &mut self,
        code: Descriptor,
        cs: u16,
        rip: u64,
        ss: u16,
        rsp: u64,
    ) -> Result<(), Stop> {
        let rpl = (cs & 3) as u8;
        let to_long = self.long_mode() && code.long();
        let stack = if ss & !3 == 0 {
            if !to_long || rpl == 3 || ss & 3 != u16::from(rpl) {
                return Err(self.gp(0));
            }
            Segment {
                sel: ss,
                rights: UNUSABLE | u32::from(rpl) << 5,
                limit: 0,
                base: 0,
            }
        } else {
            let error = u32::from(ss & !3);
            let mut stack = self.descriptor(ss, 13)?;
            let data = stack.ordinary() && !stack.code() && stack.permits();
            if !data || ss & 3 != u16::from(rpl) || stack.dpl() != rpl {
                return Err(self.gp(error));
            }
            if !stack.present() {
                return Err(self.raise(12, Some(error)));
            }
            self.mark_accessed(&mut stack)?;
            stack.segment(ss)
        };
        self.seg[CS] = code.segment(cs);
        self.seg[SS] = stack;
        self.cpl = rpl;
        self.rip = rip;
        self.refresh();
        self.set_rsp(rsp);
        // Data segments that the outer level may not use become null.
        for index in [ES, DS, FS, GS] {
            let segment = &mut self.seg[index];
            let conforming_code = segment.rights & 0xc == 0xc;
            if segment.rights & 0x10 != 0
                && !segment.unusable()
                && !conforming_code
                && segment.dpl() < rpl
            {
                segment.sel = 0;
                segment.rights |= UNUSABLE;
                segment.base = 0;
            }
        }
        self.refresh();
        Ok(())
    }

    /// LLDT and LTR.
    pub fn load_system_segment(&mut self, index: usize, selector: u16) -> Result<(), Stop> {
        let error = u32::from(selector & !3);
        if selector & !3 == 0 {
            if index == TR {
                return Err(self.gp(0));
            }
            self.seg[LDTR] = Segment {
                sel: selector,
                rights: UNUSABLE,
                limit: 0,
                base: 0,
            };
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let mut descriptor = self.descriptor(selector, 13)?;
        let wanted: &[u8] = if index == LDTR {
            &[2]
        } else if self.long_mode() {
            &[9]
        } else {
            &[1, 9]
        };
        if descriptor.ordinary() || !wanted.contains(&descriptor.kind()) {
            return Err(self.gp(error));
        }
        if !descriptor.present() {
            return Err(self.raise(11, Some(error)));
        }
        let mut upper = 0;
        if self.long_mode() {
            if u32::from(selector & !7) + 15 > self.gdtr.limit {
                return Err(self.gp(error));
            }
            upper = self.system_u64(descriptor.at + 8)?;
            if upper >> 40 & 0x1f != 0 {
                return Err(self.gp(error));
            }
        }
        if index == TR {
            // Busy.
            descriptor.raw |= 2 << 40;
            let byte = [(descriptor.raw >> 40) as u8];
            self.write_system(descriptor.at + 5, &byte)?;
        }
        self.seg[index] = descriptor.segment(selector);
        self.seg[index].base |= upper << 32;
        Ok(())
    }
}
