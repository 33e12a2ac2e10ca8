//! Loads and stores of the guest: the fast path through the TLB's host pointers, and the way round it.

use std::sync::atomic::Ordering;

use crate::mem::{Fault, PageAccess};

use super::int::Int;
use super::state::{Cpu, Stop, StopKind};
use super::tlb::{Tlb, SUPER, USER};
use super::uop::{ea, Uop};
use super::walk::access;

const PAGE: u64 = !0xfff;

/// Pages of page tables that a processor holds pointers to.
pub const PAGES: usize = 128;
/// No page has this address.
pub const NO_PAGE: (u64, usize) = (u64::MAX, 0);

/// LOCK CMPXCHG16B on the host.
///
/// # Safety
/// `at` points to 16 writable bytes of guest memory, aligned, and the host has the instruction.
#[cfg(target_arch = "x86_64")]
unsafe fn host_cas_16_bytes(at: *mut u8, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // RBX belongs to the compiler: it is lent for the one instruction. (The intrinsic of the standard library may end
    // up as a call into a library that is not there.)
    std::arch::asm!(
        "xchg rbx, rsi",
        "lock cmpxchg16b [rdi]",
        "xchg rbx, rsi",
        in("rdi") at,
        inout("rsi") new as u64 => _,
        in("rcx") (new >> 64) as u64,
        inout("rax") low,
        inout("rdx") high,
        options(nostack),
    );
    u128::from(high) << 64 | u128::from(low)
}

impl Cpu {
    // --- calls into memory. Each may have waited for a shootdown of somebody else, so each polls.

    /// After a call into memory: drops pointers if they were taken back meanwhile.
    #[inline]
    pub fn poll(&mut self) {
        if self.slot.poll() {
            self.drop_pointers();
        }
    }

    /// Every pointer to guest memory that this processor holds is gone.
    #[cold]
    #[inline(never)]
    pub fn drop_pointers(&mut self) {
        self.counters.shootdowns += 1;
        self.tlb.drop_pointers();
        self.pages = [NO_PAGE; PAGES];
    }

    /// Host pointer to a physical page for reading, if it can be had. For page walks.
    fn page_of(&mut self, pa: u64) -> Option<*const u8> {
        // Nobody waits for a processor that stands still (a walk for a debugger, or before VM entry).
        if !self.slot.is_running() {
            return None;
        }
        let index = (pa >> 12) as usize & (PAGES - 1);
        let known = self.pages[index];
        if known.0 == pa & PAGE {
            return Some(known.1 as *const u8);
        }
        let result = self.mem.page_ptr(pa & PAGE, false, self.guest_agent());
        if self.slot.poll() {
            self.drop_pointers();
            return None;
        }
        match result {
            Ok(PageAccess::Direct(page)) => {
                self.pages[index] = (pa & PAGE, page as usize);
                Some(page)
            }
            _ => None,
        }
    }

    #[cold]
    fn bus_fault(&mut self, fault: Fault) -> Stop {
        match fault {
            Fault::MachineCheck { .. } => self.machine_check(),
            // Hardware reports a reserved KeyID found at access time as a page fault or an EPT misconfiguration; the
            // walk checks addresses before, so only a KeyID that lost its key gets here.
            Fault::Bus { .. } => self.machine_check(),
        }
    }

    pub fn phys_read(&mut self, pa: u64, into: &mut [u8]) -> Result<(), Stop> {
        let result = self.mem.read(pa, into, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_write(&mut self, pa: u64, from: &[u8]) -> Result<(), Stop> {
        let result = self.mem.write(pa, from, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_rd64(&mut self, pa: u64) -> Result<u64, Stop> {
        if pa & 7 == 0 {
            if let Some(page) = self.page_of(pa) {
                // SAFETY: the page is readable memory until the pointer is taken back, which `page_of` looked for.
                return Ok(unsafe { u64::load(page.add((pa & 0xfff) as usize)) });
            }
        }
        let result = self.mem.rd64(pa, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_rd32(&mut self, pa: u64) -> Result<u32, Stop> {
        let result = self.mem.rd32(pa, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_wr64(&mut self, pa: u64, value: u64) -> Result<(), Stop> {
        let result = self.mem.wr64(pa, value, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_wr32(&mut self, pa: u64, value: u32) -> Result<(), Stop> {
        let result = self.mem.wr32(pa, value, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_write_line(&mut self, pa: u64, line: &[u8; 64]) -> Result<(), Stop> {
        let result = self.mem.write_line(pa, line, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    pub fn phys_cas(&mut self, pa: u64, size: usize, old: u128, new: u128) -> Result<u128, Stop> {
        let result = self.mem.cas(pa, size, old, new, self.guest_agent());
        self.poll();
        result.map_err(|fault| self.bus_fault(fault))
    }

    // --- fast paths

    /// A load through the TLB's pointer; `Err` (with nothing noted) if there is none for it.
    #[inline(always)]
    pub fn load_fast<T: Int>(&mut self, linear: u64) -> Result<T, Stop> {
        let entry = &self.tlb.hot[Tlb::index(linear, self.tag)];
        // The page of the last byte: an access that crosses pages does not match.
        if entry.read == linear.wrapping_add(T::BYTES - 1) & PAGE | self.tag {
            let at = entry.host.wrapping_add(linear as usize) as *const u8;
            // SAFETY: the tag says that `host` turns this page into readable memory, and the pointer has not been
            // taken back (`poll`).
            return Ok(unsafe { T::load(at) });
        }
        Err(Stop)
    }

    #[inline(always)]
    pub fn store_fast<T: Int>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        let entry = &self.tlb.hot[Tlb::index(linear, self.tag)];
        if entry.write == linear.wrapping_add(T::BYTES - 1) & PAGE | self.tag {
            let at = entry.host.wrapping_add(linear as usize) as *mut u8;
            // SAFETY: as in `load_fast`, for writing.
            unsafe { T::store(at, value) };
            return Ok(());
        }
        Err(Stop)
    }

    #[inline(always)]
    pub fn modify_fast<T: Int>(
        &mut self,
        linear: u64,
        change: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Stop> {
        let entry = &self.tlb.hot[Tlb::index(linear, self.tag)];
        if entry.write == linear.wrapping_add(T::BYTES - 1) & PAGE | self.tag {
            let at = entry.host.wrapping_add(linear as usize) as *mut u8;
            // SAFETY: as in `store_fast`; `change` works on registers and never polls.
            let old = unsafe { T::load(at) };
            let new = change(self, old);
            // SAFETY: as above.
            unsafe { T::store(at, new) };
            return Ok(());
        }
        Err(Stop)
    }

    // --- loads and stores, whatever it takes

    #[inline(always)]
    pub fn load<T: Int>(&mut self, linear: u64) -> Result<T, Stop> {
        match self.load_fast(linear) {
            Ok(value) => Ok(value),
            Err(Stop) => self.load_slow(linear, T::BYTES as usize).map(T::from64),
        }
    }

    #[inline(always)]
    pub fn store<T: Int>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        match self.store_fast(linear, value) {
            Ok(()) => Ok(()),
            Err(Stop) => self.store_slow(linear, value.to64(), T::BYTES as usize),
        }
    }

    /// Read, change, write back; not atomic. Nothing is computed unless the write is known to be allowed.
    #[inline(always)]
    pub fn modify<T: Int>(
        &mut self,
        linear: u64,
        change: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Stop> {
        let entry = &self.tlb.hot[Tlb::index(linear, self.tag)];
        if entry.write == linear.wrapping_add(T::BYTES - 1) & PAGE | self.tag {
            return self.modify_fast(linear, change);
        }
        self.check_write(linear, T::BYTES as usize)?;
        let old = self.load::<T>(linear)?;
        let new = change(self, old);
        self.store::<T>(linear, new)
    }

    /// LOCK: read, change, write back as one access. `change` may run more than once; the last time counts.
    #[inline(always)]
    pub fn modify_locked<T: Int>(
        &mut self,
        linear: u64,
        mut change: impl FnMut(&mut Cpu, T) -> T,
    ) -> Result<T, Stop> {
        let index = Tlb::index(linear, self.tag);
        if self.tlb.hot[index].write != linear & PAGE | self.tag {
            self.pointer(linear, true)?;
        }
        let entry = &self.tlb.hot[index];
        if entry.write == linear & PAGE | self.tag && linear & (T::BYTES - 1) == 0 {
            let at = entry.host.wrapping_add(linear as usize) as *mut u8;
            // SAFETY: as in `modify`, and aligned.
            let mut old = unsafe { T::load(at) };
            loop {
                let new = change(self, old);
                // SAFETY: as above.
                match unsafe { T::cas(at, old, new) } {
                    Ok(()) => return Ok(old),
                    Err(found) => old = found,
                }
            }
        }
        self.check_write(linear, T::BYTES as usize)?;
        self.split_lock(linear, T::BYTES)?;
        let mut old = self.load::<T>(linear)?;
        loop {
            let new = change(self, old);
            let found = self.cas_slow(
                linear,
                T::BYTES as usize,
                old.to64().into(),
                new.to64().into(),
            )?;
            if found as u64 == old.to64() {
                return Ok(old);
            }
            old = T::from64(found as u64);
        }
    }

    /// LOCK CMPXCHG16B of an aligned operand: the value found.
    pub fn cas_16_bytes(&mut self, linear: u64, old: u128, new: u128) -> Result<u128, Stop> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("cmpxchg16b") {
            if let Some(at) = self.pointer(linear, true)? {
                // SAFETY: `pointer` vouches for the page, the caller for the alignment, the line above for the host.
                return Ok(unsafe { host_cas_16_bytes(at, old, new) });
            }
        }
        self.cas_slow(linear, 16, old, new)
    }

    // --- slow paths. They return register pairs, so that handlers keep nothing on the stack.

    #[cold]
    #[inline(never)]
    pub fn load_slow(&mut self, linear: u64, size: usize) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.read_linear(linear, &mut bytes[..size])?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    pub fn store_slow(&mut self, linear: u64, value: u64, size: usize) -> Result<(), Stop> {
        self.write_linear(linear, &value.to_le_bytes()[..size])
    }

    /// Checks that `size` bytes at `linear` may be written, as the write itself would.
    #[cold]
    #[inline(never)]
    pub fn check_write(&mut self, linear: u64, size: usize) -> Result<(), Stop> {
        let in_page = (0x1000 - (linear & 0xfff)) as usize;
        self.both_canonical(linear, linear.wrapping_add(size as u64 - 1))?;
        let pa = self.translate(linear, access::WRITE, self.tag & 3)?;
        self.guard_code(pa, size.min(in_page))?;
        if size > in_page {
            let pa = self.translate(
                self.wrap_linear(linear.wrapping_add(in_page as u64)),
                access::WRITE,
                self.tag & 3,
            )?;
            self.guard_code(pa, size - in_page)?;
        }
        Ok(())
    }

    /// A fault of a stack access: a non-canonical address is #SS(0).
    #[cold]
    #[inline(never)]
    pub fn stack_stop(&mut self, stop: Stop) -> Stop {
        if self.stop == StopKind::Canonical {
            return self.raise(12, Some(0));
        }
        stop
    }

    /// LOCK CMPXCHG of any size and alignment; the write was checked.
    pub fn cas_slow(
        &mut self,
        linear: u64,
        size: usize,
        old: u128,
        new: u128,
    ) -> Result<u128, Stop> {
        self.check_write(linear, size)?;
        let pa = self.translate(linear, access::WRITE, self.tag & 3)?;
        if (linear & 0xfff) as usize + size <= 0x1000 {
            let found = self.phys_cas(pa, size, old, new)?;
            self.watch(linear, size as u64, true);
            return Ok(found);
        }
        // A lock split over pages: hardware locks the bus; here the two halves are not one access.
        let mut bytes = [0; 16];
        self.read_linear(linear, &mut bytes[..size])?;
        let found = u128::from_le_bytes(bytes);
        if found == old {
            self.write_linear(linear, &new.to_le_bytes()[..size])?;
        }
        Ok(found)
    }

    /// Reads guest memory at a linear address with the rights of the running code.
    pub fn read_linear(&mut self, linear: u64, into: &mut [u8]) -> Result<(), Stop> {
        self.read_as(linear, into, self.tag & 3)?;
        self.watch(linear, into.len() as u64, false);
        Ok(())
    }

    /// Writes guest memory; either all of it is writable or nothing is written.
    pub fn write_linear(&mut self, linear: u64, from: &[u8]) -> Result<(), Stop> {
        self.write_as(linear, from, self.tag & 3)?;
        self.watch(linear, from.len() as u64, true);
        Ok(())
    }

    /// Reads with the rights of `privilege` (see [`super::tlb`]).
    pub fn read_as(&mut self, linear: u64, into: &mut [u8], privilege: u64) -> Result<(), Stop> {
        self.counters.slow_accesses += 1;
        let mut done = 0;
        // Both pages are checked before anything is read: an access to a device is not repeated.
        if (linear & 0xfff) as usize + into.len() > 0x1000 {
            self.both_canonical(linear, linear.wrapping_add(into.len() as u64 - 1))?;
            self.translate(linear, access::READ, privilege)?;
            let second = self.wrap_linear((linear & PAGE).wrapping_add(0x1000));
            self.translate(second, access::READ, privilege)?;
        }
        while done < into.len() {
            let at = self.wrap_linear(linear.wrapping_add(done as u64));
            let part = (into.len() - done).min((0x1000 - (at & 0xfff)) as usize);
            let pa = self.translate(at, access::READ, privilege)?;
            self.try_pointer(at, pa, false, privilege)?;
            self.phys_read(pa, &mut into[done..done + part])?;
            done += part;
        }
        Ok(())
    }

    pub fn write_as(&mut self, linear: u64, from: &[u8], privilege: u64) -> Result<(), Stop> {
        self.counters.slow_accesses += 1;
        let mut done = 0;
        if (linear & 0xfff) as usize + from.len() > 0x1000 {
            self.both_canonical(linear, linear.wrapping_add(from.len() as u64 - 1))?;
            let in_page = (0x1000 - (linear & 0xfff)) as usize;
            let first = self.translate(linear, access::WRITE, privilege)?;
            self.guard_code(first, in_page)?;
            let second = self.wrap_linear((linear & PAGE).wrapping_add(0x1000));
            let second = self.translate(second, access::WRITE, privilege)?;
            self.guard_code(second, from.len() - in_page)?;
        }
        while done < from.len() {
            let at = self.wrap_linear(linear.wrapping_add(done as u64));
            let part = (from.len() - done).min((0x1000 - (at & 0xfff)) as usize);
            let pa = self.translate(at, access::WRITE, privilege)?;
            self.guard_code(pa, part)?;
            self.try_pointer(at, pa, true, privilege)?;
            self.phys_write(pa, &from[done..done + part])?;
            done += part;
        }
        Ok(())
    }

    /// Segmentation comes before paging: an operand of which any byte is not canonical faults for that.
    fn both_canonical(&mut self, first: u64, last: u64) -> Result<(), Stop> {
        if self.long_mode() && !(self.canonical(first) && self.canonical(last)) {
            self.stop = StopKind::Canonical;
            return Err(Stop);
        }
        Ok(())
    }

    fn wrap_linear(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Asks for a host pointer to the page, so that the next access is fast.
    fn try_pointer(
        &mut self,
        linear: u64,
        pa: u64,
        write: bool,
        privilege: u64,
    ) -> Result<(), Stop> {
        if self.watched_page(linear) {
            return Ok(());
        }
        let result = self.mem.page_ptr(pa & PAGE, write, self.guest_agent());
        if self.slot.poll() {
            // Taken back while we asked: do without this time.
            self.drop_pointers();
            return Ok(());
        }
        match result {
            Ok(PageAccess::Direct(page)) => {
                let tag = self.tag & !3 | privilege;
                self.tlb.set_pointer(linear, tag, page, write);
                Ok(())
            }
            Ok(PageAccess::Slow) => Ok(()),
            Err(fault) => Err(self.bus_fault(fault)),
        }
    }

    /// Host pointer to `linear` for at most the rest of its page, if it can be had. For string instructions.
    pub fn pointer(&mut self, linear: u64, write: bool) -> Result<Option<*mut u8>, Stop> {
        let wanted = if write { access::WRITE } else { access::READ };
        let index = Tlb::index(linear, self.tag);
        let tag = linear & PAGE | self.tag;
        let have = |cpu: &Cpu| {
            let entry = &cpu.tlb.hot[index];
            (if write { entry.write } else { entry.read }) == tag
        };
        if !have(self) {
            let pa = self.translate(linear, wanted, self.tag & 3)?;
            self.try_pointer(linear, pa, write, self.tag & 3)?;
        }
        let host = self.tlb.hot[index].host;
        Ok(have(self).then(|| host.wrapping_add(linear as usize) as *mut u8))
    }

    /// A store into the running block: the instruction is run again alone, so that what follows is fresh.
    pub fn guard_code(&mut self, pa: u64, size: usize) -> Result<(), Stop> {
        let code = self.code;
        let hits = |start: u64, len: u64| pa < start + len && start < pa + size as u64;
        if !self.step && (hits(code.pa, code.len) || hits(code.pa2, code.len2)) {
            self.stop = StopKind::Restart;
            return Err(Stop);
        }
        Ok(())
    }

    // --- accesses that the processor makes on its own account (descriptor tables, TSS, event delivery)

    /// Privilege of an implicit supervisor access: SMAP applies whatever RFLAGS.AC says.
    fn implicit(&self) -> u64 {
        SUPER
    }

    pub fn read_system(&mut self, linear: u64, into: &mut [u8]) -> Result<(), Stop> {
        let linear = self.wrap_linear(linear);
        self.read_as(linear, into, self.implicit())
    }

    pub fn system_u16(&mut self, linear: u64) -> Result<u16, Stop> {
        let mut bytes = [0; 2];
        self.read_system(linear, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    pub fn system_u32(&mut self, linear: u64) -> Result<u32, Stop> {
        let mut bytes = [0; 4];
        self.read_system(linear, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn system_u64(&mut self, linear: u64) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        self.read_system(linear, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    pub fn write_system(&mut self, linear: u64, from: &[u8]) -> Result<(), Stop> {
        let linear = self.wrap_linear(linear);
        self.write_as(linear, from, self.implicit())
    }

    /// Recomputes the tag's low bits after a change of privilege, RFLAGS.AC, CR4 or the address space.
    pub fn set_tag(&mut self) {
        let privilege = if self.cpl == 3 {
            USER
        } else if self.cr4 & super::state::cr4::SMAP != 0 && self.flags & super::flags::AC == 0 {
            SUPER
        } else {
            super::tlb::SUPER_AC
        };
        self.tag = (self.space & 0x3ff) << 2 | privilege;
    }

    // --- legacy address forms

    #[cold]
    #[inline(never)]
    pub fn ea_legacy(&mut self, uop: &Uop, offset: u64) -> Result<u64, Stop> {
        let base = self.gpr[usize::from(uop.seg)];
        match uop.ea {
            ea::LOW32 => Ok((offset & 0xffff_ffff).wrapping_add(base)),
            form => {
                let offset = if form == ea::LEGACY16 {
                    offset & 0xffff
                } else {
                    offset & 0xffff_ffff
                };
                let segment = self.seg[usize::from(uop.segment)];
                self.check_limit(
                    &segment,
                    usize::from(uop.segment),
                    offset,
                    u64::from(uop.size).max(1),
                )?;
                Ok(offset.wrapping_add(base) & 0xffff_ffff)
            }
        }
    }

    /// Length of a wait for memory by somebody else must not keep an interrupt out: true if one is due.
    pub fn event_due(&self) -> bool {
        self.shared.events.load(Ordering::Relaxed) != 0
    }
}
