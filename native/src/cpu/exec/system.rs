//! System instructions: control and debug registers, descriptor tables, MSRs, I/O, system calls, caches.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::cpu::decode::{bitness, gpr, immediate, operand_size, segment_number};
use crate::cpu::exception::{kind, Event};
use crate::cpu::exec::control;
use crate::cpu::flags::{Lazy, ARITH, CF, IF, OF, RF, VM, ZF};
use crate::cpu::int::Int;
use crate::cpu::interrupt::HALTED;
use crate::cpu::state::{
    block, cr0, cr4, efer, Cpu, Segment, Stop, CS, DS, ES, FS, GS, LDTR, R11, RAX, RCX, RDX, RSP,
    SS, TR,
};
use crate::cpu::uop::{last, step, Flow, Handler, Ip, Uop};
use crate::cpu::vmx_ctl::{primary, secondary};
use crate::cpu::vmx_exit::reason;
use crate::cpu::walk::access;

fn supervisor(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

// --- segment registers

fn mov_from_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = cpu.seg[usize::from(u.op)].sel;
        if u.mem {
            let at = cpu.ea(u)?;
            return cpu.store::<u16>(at, value);
        }
        match u.size {
            2 => u16::set(cpu, u.dst, value),
            _ => cpu.gpr[usize::from(u.dst)] = value.into(),
        }
        Ok(())
    })
}

fn mov_to_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let value = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let index = usize::from(u.op);
        cpu.load_segment(index, value)?;
        if index == SS {
            cpu.blocking |= block::MOV_SS;
        }
        Ok(cpu.sync_after(u))
    })
}

fn push_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let value = u64::from(cpu.seg[usize::from(u.op)].sel);
        cpu.push_sized(value, u.size)
    })
}

fn pop_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let rsp = cpu.gpr[RSP];
        let value = cpu.pop_sized(u.size)? as u16;
        let index = usize::from(u.op);
        if let Err(stop) = cpu.load_segment(index, value) {
            cpu.gpr[RSP] = rsp;
            return Err(stop);
        }
        if index == SS {
            cpu.blocking |= block::MOV_SS;
        }
        Ok(cpu.sync_after(u))
    })
}

/// LDS, LES, LFS, LGS, LSS.
fn load_pointer(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let offset = cpu.load_sized(at, u.size.into())?;
        let selector = cpu.load::<u16>(at.wrapping_add(u.size.into()))?;
        cpu.load_segment(usize::from(u.op), selector)?;
        match u.size {
            2 => u16::set(cpu, u.dst, offset as u16),
            _ => cpu.gpr[usize::from(u.dst)] = offset,
        }
        Ok(cpu.sync_after(u))
    })
}

// --- control and debug registers

fn mov_to_cr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let mut value = cpu.gpr[usize::from(u.src)];
        if !cpu.long {
            value &= 0xffff_ffff;
        }
        cpu.intercept_cr_write(u.op, u.src, value)?;
        match u.op {
            0 => cpu.write_cr0(value)?,
            2 => cpu.cr2 = value,
            3 => cpu.write_cr3(value)?,
            4 => cpu.write_cr4(value)?,
            _ => {
                if value >> 4 != 0 {
                    return Err(cpu.gp(0));
                }
                if cpu.ctl.primary(primary::TPR_SHADOW) {
                    cpu.vapic_write(0x80, (value << 4) as u32)?;
                    cpu.tpr_changed()?;
                } else {
                    cpu.cr8 = value;
                }
            }
        }
        Ok(cpu.sync_after(u))
    })
}

fn mov_from_cr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        cpu.intercept_cr_read(u.op, u.dst)?;
        let value = match u.op {
            0 => cpu.cr0_seen(),
            2 => cpu.cr2,
            3 => cpu.cr3,
            4 => cpu.cr4_seen(),
            _ if cpu.ctl.primary(primary::TPR_SHADOW) => u64::from(cpu.vapic_read(0x80)? >> 4 & 15),
            _ => cpu.cr8,
        };
        cpu.gpr[usize::from(u.dst)] = if cpu.long { value } else { value & 0xffff_ffff };
        Ok(())
    })
}

fn clts(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let ctl = &cpu.ctl;
        if ctl.cr0_mask & cr0::TS != 0 {
            if ctl.cr0_shadow & cr0::TS != 0 {
                return Err(cpu.exit_with(reason::CR_ACCESS, 2 << 4));
            }
            return Ok(Flow::Next);
        }
        let value = cpu.cr0 & !cr0::TS;
        cpu.write_cr0(value)?;
        Ok(cpu.sync_after(u))
    })
}

fn lmsw(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let source = if u.mem {
            let at = cpu.ea(u)?;
            cpu.exit.linear = at;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let new = u64::from(source & 15);
        let ctl = &cpu.ctl;
        // PE can be set, not cleared; the mask decides bit by bit.
        let differs = (new ^ ctl.cr0_shadow) & ctl.cr0_mask & 0xe != 0
            || new & 1 != 0 && ctl.cr0_mask & 1 != 0 && ctl.cr0_shadow & 1 == 0;
        if differs {
            let linear = cpu.exit.linear;
            let stop = cpu.exit_with(
                reason::CR_ACCESS,
                3 << 4 | u64::from(u.mem) << 6 | u64::from(source) << 16,
            );
            cpu.exit.linear = linear;
            return Err(stop);
        }
        let value = cpu.cr0 & !0xe | new;
        cpu.write_cr0(value)?;
        Ok(cpu.sync_after(u))
    })
}

/// UMIP: SGDT, SIDT, SLDT, SMSW, STR are the supervisor's.
fn umip(cpu: &mut Cpu) -> Result<(), Stop> {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    Ok(())
}

/// Stores a 16-bit system value: memory gets 16 bits, a register its operand size.
fn store_system(cpu: &mut Cpu, u: &Uop, value: u64) -> Result<(), Stop> {
    if u.mem {
        let at = cpu.ea(u)?;
        return cpu.store::<u16>(at, value as u16);
    }
    match u.size {
        2 => u16::set(cpu, u.dst, value as u16),
        4 => cpu.gpr[usize::from(u.dst)] = value & 0xffff_ffff,
        _ => cpu.gpr[usize::from(u.dst)] = value,
    }
    Ok(())
}

fn smsw(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        umip(cpu)?;
        let value = cpu.cr0_seen();
        store_system(cpu, u, value)
    })
}

fn mov_dr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let to = u.rep == 0xff;
        let register = if to { u.src } else { u.dst };
        let mut number = usize::from(u.op);
        if number > 7 {
            return Err(cpu.ud());
        }
        if matches!(number, 4 | 5) {
            if cpu.cr4 & cr4::DE != 0 {
                return Err(cpu.ud());
            }
            number += 2;
        }
        if cpu.ctl.primary(primary::MOV_DR) {
            let qualification = u64::from(u.op) | u64::from(!to) << 4 | u64::from(register) << 8;
            return Err(cpu.exit_with(reason::DR_ACCESS, qualification));
        }
        if cpu.dr[7] & 1 << 13 != 0 {
            cpu.pending_debug |= 1 << 13;
            return Err(cpu.raise(1, None));
        }
        if !to {
            let value = cpu.dr[number];
            cpu.gpr[usize::from(register)] = if cpu.long { value } else { value & 0xffff_ffff };
            return Ok(Flow::Next);
        }
        let value = cpu.gpr[usize::from(register)];
        let value = if cpu.long { value } else { value & 0xffff_ffff };
        if number >= 6 && value >> 32 != 0 {
            return Err(cpu.gp(0));
        }
        cpu.dr[number] = match number {
            6 => value & 0xe00f | 0xffff_0ff0,
            7 => value & 0xffff_2bff | 0x400,
            _ => value,
        };
        Ok(cpu.sync_after(u))
    })
}

// --- descriptor tables

fn table(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        // `op`: 0 SGDT, 1 SIDT, 2 LGDT, 3 LIDT.
        let load = u.op >= 2;
        if load {
            supervisor(cpu)?;
        } else {
            umip(cpu)?;
        }
        if cpu.ctl.secondary(secondary::DESCRIPTOR) {
            let offset = u.disp;
            let stop = cpu.exit_with(reason::GDTR_IDTR, offset);
            cpu.exit.info = cpu.instruction_info(u, u32::from(u.op) << 28);
            return Err(stop);
        }
        let at = cpu.ea(u)?;
        let wide = u.size == 8;
        if load {
            let limit = cpu.load::<u16>(at)?;
            let base = if wide {
                cpu.load::<u64>(at.wrapping_add(2))?
            } else {
                let base = u64::from(cpu.load::<u32>(at.wrapping_add(2))?);
                if u.size == 2 {
                    base & 0xff_ffff
                } else {
                    base
                }
            };
            if wide && !cpu.canonical(base) {
                return Err(cpu.gp(0));
            }
            let register = if u.op == 2 {
                &mut cpu.gdtr
            } else {
                &mut cpu.idtr
            };
            register.base = base;
            register.limit = limit.into();
        } else {
            let register = if u.op == 0 { cpu.gdtr } else { cpu.idtr };
            let mut bytes = [0; 10];
            bytes[..2].copy_from_slice(&(register.limit as u16).to_le_bytes());
            bytes[2..].copy_from_slice(&register.base.to_le_bytes());
            cpu.write_linear(at, &bytes[..if wide { 10 } else { 6 }])?;
        }
        Ok(Flow::Next)
    })
}

/// SLDT, STR, LLDT, LTR: `op` 0 to 3.
fn system_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if !cpu.protected() || cpu.flags & VM != 0 {
            return Err(cpu.ud());
        }
        if u.op >= 2 {
            supervisor(cpu)?;
        } else {
            umip(cpu)?;
        }
        if cpu.ctl.secondary(secondary::DESCRIPTOR) {
            let stop = cpu.exit_with(reason::LDTR_TR, u.disp);
            cpu.exit.info = cpu.instruction_info(u, u32::from(u.op) << 28);
            return Err(stop);
        }
        let index = if u.op & 1 == 0 { LDTR } else { TR };
        if u.op < 2 {
            let value = u64::from(cpu.seg[index].sel);
            store_system(cpu, u, value)?;
            return Ok(Flow::Next);
        }
        let selector = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        cpu.load_system_segment(index, selector)?;
        Ok(Flow::Next)
    })
}

/// LAR, LSL, VERR, VERW: `op` 0 to 3.
fn probe_segment(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if !cpu.protected() || cpu.flags & VM != 0 {
            return Err(cpu.ud());
        }
        let selector = if u.mem {
            let at = cpu.ea(u)?;
            cpu.load::<u16>(at)?
        } else {
            u16::get(cpu, u.src)
        };
        let found = cpu.probe_descriptor(selector, u.op)?;
        let flags = cpu.cc.all() & !ZF;
        cpu.cc = Lazy::bits(flags | if found.is_some() { ZF } else { 0 });
        if let (Some(value), 0 | 1) = (found, u.op) {
            match u.size {
                2 => u16::set(cpu, u.dst, value as u16),
                _ => cpu.gpr[usize::from(u.dst)] = value.into(),
            }
        }
        Ok(())
    })
}

impl Cpu {
    fn probe_descriptor(&mut self, selector: u16, op: u8) -> Result<Option<u32>, Stop> {
        if selector & !3 == 0 {
            return Ok(None);
        }
        let (base, limit) = if selector & 4 != 0 {
            let ldt = self.seg[LDTR];
            if ldt.unusable() {
                return Ok(None);
            }
            (ldt.base, ldt.limit)
        } else {
            (self.gdtr.base, self.gdtr.limit)
        };
        let offset = u32::from(selector & !7);
        if offset + 7 > limit {
            return Ok(None);
        }
        let raw = self.system_u64(base.wrapping_add(offset.into()))?;
        let descriptor = crate::cpu::segment::Descriptor { raw, at: 0 };
        let rpl = (selector & 3) as u8;
        let conforming = descriptor.code() && descriptor.conforming();
        let visible = conforming || descriptor.dpl() >= self.cpl.max(rpl);
        if !visible {
            return Ok(None);
        }
        let long = self.long_mode();
        let system_ok = match op {
            0 if long => matches!(descriptor.kind(), 2 | 9 | 11 | 12),
            0 => matches!(descriptor.kind(), 1 | 2 | 3 | 4 | 5 | 9 | 11 | 12),
            1 if long => matches!(descriptor.kind(), 2 | 9 | 11),
            1 => matches!(descriptor.kind(), 1 | 2 | 3 | 9 | 11),
            _ => false,
        };
        let ok = match op {
            0 | 1 => descriptor.ordinary() || system_ok,
            2 => descriptor.ordinary() && (!descriptor.code() || descriptor.permits()),
            _ => descriptor.ordinary() && !descriptor.code() && descriptor.permits(),
        };
        Ok(ok.then(|| {
            if op == 0 {
                (descriptor.raw >> 32) as u32 & 0x00ff_ff00
            } else {
                descriptor.limit()
            }
        }))
    }

    /// VM-exit instruction information of a memory operand (SDM vol. 3, 27.2.5), with `extra` bits added.
    pub fn instruction_info(&self, u: &Uop, extra: u32) -> u32 {
        use crate::cpu::state::{BLOCK, ZERO};
        let register = |index: u8| {
            if usize::from(index) < 16 {
                u32::from(index)
            } else {
                0
            }
        };
        let mut info = extra | u32::from(u.scale & 3);
        info |= match u.ea {
            crate::cpu::uop::ea::FLAT => 2,
            crate::cpu::uop::ea::LEGACY16 => 0,
            _ => 1,
        } << 7;
        if !u.mem {
            info |= 1 << 10 | register(u.src) << 3;
        }
        info |= u32::from(u.segment) << 15;
        info |= register(u.index) << 18 | u32::from(usize::from(u.index) == ZERO) << 22;
        info |= register(u.base) << 23
            | u32::from(usize::from(u.base) == ZERO || usize::from(u.base) == BLOCK) << 27;
        info
    }
}

// --- MSRs, counters, processor identification

fn rdmsr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let msr = cpu.gpr[RCX] as u32;
        if cpu.msr_exits(msr, false)? {
            return Err(cpu.exit_with(reason::RDMSR, 0));
        }
        let value = match cpu.x2apic_read(msr)? {
            Some(value) => value,
            None if msr == crate::cpu::msr::index::TSC => cpu.tsc_at(u),
            None => match cpu.msr_read(msr) {
                Some(value) => value,
                None => return Err(cpu.gp(0)),
            },
        };
        cpu.gpr[RAX] = value & 0xffff_ffff;
        cpu.gpr[RDX] = value >> 32;
        Ok(())
    })
}

fn wrmsr(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let msr = cpu.gpr[RCX] as u32;
        if cpu.msr_exits(msr, true)? {
            return Err(cpu.exit_with(reason::WRMSR, 0));
        }
        let value = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
        if !cpu.x2apic_write(msr, value)? && cpu.msr_write(msr, value).is_err() {
            return Err(cpu.gp(0));
        }
        cpu.refresh();
        Ok(cpu.sync_after(u))
    })
}

impl Cpu {
    fn msr_exits(&mut self, msr: u32, write: bool) -> Result<bool, Stop> {
        if !self.ctl.primary(primary::MSR_BITMAPS) {
            return Ok(true);
        }
        let half = match msr {
            0..=0x1fff => 0,
            0xc000_0000..=0xc000_1fff => 0x400,
            _ => return Ok(true),
        };
        let bit = msr & 0x1fff;
        let at = (self.ctl.msr_bitmap | self.ctl.hkid)
            + half
            + u64::from(write) * 0x800
            + u64::from(bit >> 5) * 4;
        Ok(self.phys_rd32(at)? >> (bit & 31) & 1 != 0)
    }

    /// Virtualized x2APIC reads: `None` if the MSR is not one of them.
    fn x2apic_read(&mut self, msr: u32) -> Result<Option<u64>, Stop> {
        if !(0x800..=0x8ff).contains(&msr) || !self.ctl.secondary(secondary::X2APIC) {
            return Ok(None);
        }
        if msr != 0x808 && !self.ctl.secondary(secondary::APIC_REGISTER) {
            return Ok(None);
        }
        let offset = u64::from(msr & 0xff) << 4;
        let low = self.vapic_read(offset)?;
        let high = if msr == 0x830 {
            self.vapic_read(offset + 4)?
        } else {
            0
        };
        Ok(Some(u64::from(high) << 32 | u64::from(low)))
    }

    /// Virtualized x2APIC writes; `false` if the MSR is not one of them.
    fn x2apic_write(&mut self, msr: u32, value: u64) -> Result<bool, Stop> {
        if !self.ctl.secondary(secondary::X2APIC) {
            return Ok(false);
        }
        let delivery = self.ctl.secondary(secondary::VIRTUAL_INT);
        match msr {
            0x808 => {
                if value >> 8 != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0x80, value as u32)?;
                self.tpr_changed()?;
            }
            0x80b if delivery => {
                if value != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0xb0, 0)?;
                self.virtual_eoi()?;
            }
            0x83f if delivery => {
                if value >> 8 != 0 {
                    return Err(self.gp(0));
                }
                self.vapic_write(0x3f0, value as u32)?;
                if value >> 4 == 0 {
                    // Vectors below 16 go to the monitor.
                    let stop = self.exit_with(reason::APIC_WRITE, 0x3f0);
                    self.exit.after = true;
                    return Err(stop);
                }
                self.virtual_self_ipi(value as u8)?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The guest's TSC at `u`, instructions of the running block before it included.
    pub fn tsc_at(&mut self, u: &Uop) -> u64 {
        let before = self.icount;
        self.icount += u64::from(u.n);
        let tsc = self.guest_tsc();
        self.icount = before;
        tsc
    }

    /// RDRAND and RDSEED: seeded, so that runs repeat.
    fn random(&mut self) -> u64 {
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.rng ^ self.options.seed.rotate_left(17);
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }
}

fn cpuid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| Err(cpu.exit_with(reason::CPUID, 0)))
}

/// RDTSC (`op` 0) and RDTSCP.
fn rdtsc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if u.op == 1 && !cpu.ctl.secondary(secondary::RDTSCP) {
            return Err(cpu.ud());
        }
        if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        if cpu.ctl.primary(primary::RDTSC) {
            let reason = if u.op == 1 {
                reason::RDTSCP
            } else {
                reason::RDTSC
            };
            return Err(cpu.exit_with(reason, 0));
        }
        let tsc = cpu.tsc_at(u);
        cpu.gpr[RAX] = tsc & 0xffff_ffff;
        cpu.gpr[RDX] = tsc >> 32;
        if u.op == 1 {
            cpu.gpr[RCX] = cpu.tsc_aux & 0xffff_ffff;
        }
        Ok(())
    })
}

fn rdpid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if !cpu.ctl.secondary(secondary::RDTSCP) {
            return Err(cpu.ud());
        }
        cpu.gpr[usize::from(u.dst)] = cpu.tsc_aux & 0xffff_ffff;
        Ok(())
    })
}

fn rdpmc(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if cpu.cr4 & cr4::PCE == 0 && cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        if cpu.ctl.primary(primary::RDPMC) {
            return Err(cpu.exit_with(reason::RDPMC, 0));
        }
        // No performance counters.
        Err(cpu.gp(0))
    })
}

fn random<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let (control, reason) = if u.op == 0 {
            (secondary::RDRAND, reason::RDRAND)
        } else {
            (secondary::RDSEED, reason::RDSEED)
        };
        if cpu.ctl.secondary(control) {
            let size = match T::BYTES {
                2 => 0,
                4 => 1,
                _ => 2u32,
            };
            let stop = cpu.exit_with(reason, 0);
            cpu.exit.info = u32::from(u.dst) << 3 | size << 11;
            return Err(stop);
        }
        let value = cpu.random();
        T::set(cpu, u.dst, T::from64(value));
        cpu.cc = Lazy::bits(CF);
        Ok(())
    })
}

// --- I/O

impl Cpu {
    /// I/O privilege: IOPL, else the bitmap of the TSS.
    fn io_allowed(&mut self, port: u16, size: u8) -> Result<(), Stop> {
        if !self.protected() || self.cpl <= self.iopl() && self.flags & VM == 0 {
            return Ok(());
        }
        let tss = self.seg[TR];
        if tss.unusable() || tss.rights & 8 == 0 || tss.limit < 103 {
            return Err(self.gp(0));
        }
        let map = u32::from(self.system_u16(tss.base.wrapping_add(102))?);
        let byte = map + u32::from(port >> 3);
        if byte + 1 > tss.limit {
            return Err(self.gp(0));
        }
        let bits = self.system_u16(tss.base.wrapping_add(byte.into()))? >> (port & 7);
        if bits & ((1 << size) - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn io_exits(&mut self, port: u16, size: u8) -> Result<bool, Stop> {
        if !self.ctl.primary(primary::IO_BITMAPS) {
            return Ok(self.ctl.primary(primary::IO));
        }
        for offset in 0..u16::from(size) {
            let Some(port) = port.checked_add(offset) else {
                return Ok(true);
            };
            let (field, bit) = if port < 0x8000 {
                (crate::cpu::vmcs::field::IO_BITMAP_A, port)
            } else {
                (crate::cpu::vmcs::field::IO_BITMAP_B, port - 0x8000)
            };
            let at = self.vmcs.get(field) + u64::from(bit >> 5) * 4;
            if self.phys_rd32(at)? >> (bit & 31) & 1 != 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// IN and OUT. `op` bit 0: IN; bit 1: immediate port.
fn port_io(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let port = if u.op & 2 != 0 {
            u.imm as u16 & 0xff
        } else {
            cpu.gpr[RDX] as u16
        };
        cpu.io_allowed(port, u.size)?;
        if cpu.io_exits(port, u.size)? {
            let qualification = u64::from(u.size - 1)
                | u64::from(u.op & 1) << 3
                | u64::from(u.op & 2 != 0) << 6
                | u64::from(port) << 16;
            return Err(cpu.exit_with(reason::IO, qualification));
        }
        // No device answers on this bus: reads float high.
        if u.op & 1 != 0 {
            match u.size {
                1 => u8::set(cpu, 0, 0xff),
                2 => u16::set(cpu, 0, 0xffff),
                _ => u32::set(cpu, 0, 0xffff_ffff),
            }
        }
        Ok(Flow::Next)
    })
}

/// INS (`op` 1) and OUTS (0), with or without REP: one element an execution.
fn string_io(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let mask = match u.asize {
            2 => 0xffff,
            4 => 0xffff_ffff,
            _ => u64::MAX,
        };
        if u.rep != 0 && cpu.gpr[RCX] & mask == 0 {
            return Ok(Flow::Next);
        }
        let port = cpu.gpr[RDX] as u16;
        cpu.io_allowed(port, u.size)?;
        let input = u.op == 1;
        let (register, segment) = if input {
            (crate::cpu::state::RDI, ES)
        } else {
            (crate::cpu::state::RSI, usize::from(u.segment))
        };
        let at = cpu.string_address(u, register, segment, u.size.into())?;
        if cpu.io_exits(port, u.size)? {
            let qualification = u64::from(u.size - 1)
                | u64::from(input) << 3
                | 1 << 4
                | u64::from(u.rep != 0) << 5
                | u64::from(port) << 16;
            let stop = cpu.exit_with(reason::IO, qualification);
            cpu.exit.linear = at;
            let size = match u.asize {
                2 => 0,
                4 => 1,
                _ => 2u32,
            };
            cpu.exit.info = size << 7 | (segment as u32) << 15;
            return Err(stop);
        }
        if input {
            cpu.store_sized(at, u64::MAX, u.size.into())?;
        } else {
            cpu.load_sized(at, u.size.into())?;
        }
        let delta = if cpu.flags & crate::cpu::flags::DF != 0 {
            u64::from(u.size).wrapping_neg()
        } else {
            u.size.into()
        };
        let mut add = |register: usize, by: u64| {
            let value = cpu.gpr[register].wrapping_add(by) & mask;
            cpu.gpr[register] = if u.asize == 2 {
                cpu.gpr[register] & !0xffff | value
            } else {
                value
            };
        };
        add(register, delta);
        if u.rep != 0 {
            add(RCX, u64::MAX);
            if cpu.gpr[RCX] & mask != 0 {
                // Once more, after a look at events.
                cpu.rip = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u.at.into()));
                cpu.partial = u.n.into();
                cpu.stop = crate::cpu::state::StopKind::Sync;
                return Ok(Flow::Stop);
            }
        }
        Ok(Flow::Next)
    })
}

// --- interrupts, system calls

fn software_event(cpu: &mut Cpu, u: &Uop, vector: u8, kind: u8) -> Result<Flow, Stop> {
    cpu.rip = cpu.ip_mask(cpu.gpr[crate::cpu::state::BLOCK].wrapping_add(u.at.into()));
    cpu.take(Event {
        vector,
        kind,
        error: None,
        length: u.length(),
    })?;
    cpu.partial = u32::from(u.n) + 1;
    cpu.stop = crate::cpu::state::StopKind::Sync;
    Ok(Flow::Stop)
}

fn int_n(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, u.imm as u8, kind::SOFT_INT)
    })
}

fn int3(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, 3, kind::SOFT_EXCEPTION)
    })
}

fn int1(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        software_event(cpu, u, 1, kind::PRIVILEGED)
    })
}

fn into(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.cc.of() {
            software_event(cpu, u, 4, kind::SOFT_EXCEPTION)
        } else {
            Ok(Flow::Next)
        }
    })
}

/// Flat segments that system calls load without reading a descriptor.
fn flat(sel: u16, rights: u32) -> Segment {
    Segment {
        sel,
        rights,
        limit: 0xffff_ffff,
        base: 0,
    }
}

const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
const DPL3: u32 = 0x60;

fn syscall(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.efer & efer::SCE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        cpu.gpr[RCX] = cpu.ip_after(u);
        cpu.gpr[R11] = cpu.rflags() & !RF;
        cpu.rip = cpu.lstar;
        let flags = cpu.rflags() & !(cpu.fmask | RF);
        cpu.set_rflags(flags);
        let selector = (cpu.star >> 32) as u16 & !3;
        cpu.seg[CS] = flat(selector, CODE64);
        cpu.seg[SS] = flat(selector + 8, DATA);
        cpu.cpl = 0;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

fn sysret(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.efer & efer::SCE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        let selector = (cpu.star >> 48) as u16;
        let wide = u.size == 8;
        let to = cpu.gpr[RCX];
        if wide && !cpu.canonical(to) {
            return Err(cpu.gp(0));
        }
        cpu.rip = if wide { to } else { to & 0xffff_ffff };
        let flags = cpu.gpr[R11] & 0x3c_7fd7 | 2;
        cpu.set_rflags(flags);
        if wide {
            cpu.seg[CS] = flat(selector.wrapping_add(16) | 3, CODE64 | DPL3);
        } else {
            cpu.seg[CS] = flat(selector | 3, CODE32 | DPL3);
        }
        cpu.seg[SS] = flat(selector.wrapping_add(8) | 3, DATA | DPL3);
        cpu.cpl = 3;
        cpu.refresh();
        cpu.partial = u32::from(u.n) + 1;
        cpu.stop = crate::cpu::state::StopKind::Sync;
        Ok(Flow::Stop)
    })
}

fn sysenter(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        let selector = cpu.sysenter_cs as u16 & !3;
        if !cpu.protected() || selector == 0 {
            return Err(cpu.gp(0));
        }
        let long = cpu.long_mode();
        cpu.flags &= !(IF | VM | RF);
        cpu.gpr[RSP] = if long {
            cpu.sysenter_esp
        } else {
            cpu.sysenter_esp & 0xffff_ffff
        };
        cpu.rip = if long {
            cpu.sysenter_eip
        } else {
            cpu.sysenter_eip & 0xffff_ffff
        };
        cpu.seg[CS] = flat(selector, if long { CODE64 } else { CODE32 });
        cpu.seg[SS] = flat(selector + 8, DATA);
        cpu.cpl = 0;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

fn sysexit(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        let selector = cpu.sysenter_cs as u16;
        if !cpu.protected() || selector & !3 == 0 || cpu.cpl != 0 {
            return Err(cpu.gp(0));
        }
        let wide = u.size == 8;
        let (rip, rsp) = (cpu.gpr[RDX], cpu.gpr[RCX]);
        if wide && (!cpu.canonical(rip) || !cpu.canonical(rsp)) {
            return Err(cpu.gp(0));
        }
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        cpu.rip = rip & mask;
        cpu.gpr[RSP] = rsp & mask;
        let offset = if wide { 32 } else { 16 };
        let rights = if wide { CODE64 } else { CODE32 } | DPL3;
        cpu.seg[CS] = flat(selector.wrapping_add(offset) | 3, rights);
        cpu.seg[SS] = flat(selector.wrapping_add(offset + 8) | 3, DATA | DPL3);
        cpu.cpl = 3;
        cpu.refresh();
        Ok(Flow::Jump)
    })
}

fn swapgs(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if !cpu.long {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.kernel_gs_base);
        cpu.gpr[crate::cpu::state::SEG_BASE + GS] = cpu.seg[GS].base;
        Ok(())
    })
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE: `op` 0 to 3.
fn fsgsbase<T: Int>(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        if cpu.cr4 & cr4::FSGSBASE == 0 || !cpu.long {
            return Err(cpu.ud());
        }
        let index = if u.op & 1 == 0 { FS } else { GS };
        if u.op < 2 {
            let base = cpu.seg[index].base;
            T::set(cpu, u.dst, T::from64(base));
            return Ok(());
        }
        let base = T::get(cpu, u.src).to64();
        if !cpu.canonical(base) {
            return Err(cpu.gp(0));
        }
        cpu.seg[index].base = base;
        cpu.gpr[crate::cpu::state::SEG_BASE + index] = base;
        Ok(())
    })
}

// --- halting, waiting, caches, translation caches

fn hlt(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        if cpu.ctl.primary(primary::HLT) {
            return Err(cpu.exit_with(reason::HLT, 0));
        }
        let flow = cpu.sync_after(u);
        cpu.activity = HALTED;
        Ok(flow)
    })
}

fn pause(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if cpu.ctl.primary(primary::PAUSE) {
            return Err(cpu.exit_with(reason::PAUSE, 0));
        }
        Ok(Flow::Next)
    })
}

/// MONITOR (`op` 0), MWAIT (1), UMONITOR (2), UMWAIT (3), TPAUSE (4). Waiting ends at once, which is allowed.
fn monitor(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if u.op >= 2 {
            if !cpu.ctl.secondary(secondary::WAIT_PAUSE) {
                return Err(cpu.ud());
            }
            if u.op > 2 {
                if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
                    return Err(cpu.gp(0));
                }
                if cpu.ctl.primary(primary::RDTSC) {
                    let reason = if u.op == 3 {
                        reason::UMWAIT
                    } else {
                        reason::TPAUSE
                    };
                    return Err(cpu.exit_with(reason, 0));
                }
                cpu.cc = Lazy::bits(0);
            }
            return Ok(Flow::Next);
        }
        if cpu.cpl != 0 {
            return Err(cpu.ud());
        }
        let (control, reason) = if u.op == 0 {
            (primary::MONITOR, reason::MONITOR)
        } else {
            (primary::MWAIT, reason::MWAIT)
        };
        if cpu.ctl.primary(control) {
            let armed = u64::from(cpu.monitor.is_some());
            return Err(cpu.exit_with(reason, if u.op == 0 { 0 } else { armed }));
        }
        if u.op == 0 {
            let base = if u.segment as usize >= FS {
                cpu.seg[usize::from(u.segment)].base
            } else {
                0
            };
            cpu.monitor = Some(cpu.gpr[RAX].wrapping_add(base));
        } else {
            cpu.monitor = None;
        }
        Ok(Flow::Next)
    })
}

/// INVD (`op` 0), WBINVD and WBNOINVD (1).
fn invalidate_caches(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        if u.op == 0 {
            return Err(cpu.exit_with(reason::INVD, 0));
        }
        if cpu.ctl.secondary(secondary::WBINVD) {
            return Err(cpu.exit_with(reason::WBINVD, 0));
        }
        Ok(())
    })
}

/// CLFLUSH and its kin: checked like a load of a byte; memory here is always coherent.
fn flush_line(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        cpu.translate(at, access::READ, cpu.tag & 3)?;
        Ok(())
    })
}

fn fence(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |_, _| {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    })
}

fn invlpg(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        supervisor(cpu)?;
        let at = cpu.ea(u)?;
        if cpu.ctl.primary(primary::INVLPG) {
            return Err(cpu.exit_with(reason::INVLPG, at));
        }
        cpu.flush_page(at);
        Ok(cpu.sync_after(u))
    })
}

fn invpcid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if !cpu.ctl.secondary(secondary::INVPCID) {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        if cpu.ctl.primary(primary::INVLPG) {
            let stop = cpu.exit_with(reason::INVPCID, u.disp);
            cpu.exit.info = cpu.instruction_info(u, u32::from(u.src) << 28);
            return Err(stop);
        }
        let at = cpu.ea(u)?;
        let (pcid, linear) = (cpu.load::<u64>(at)?, cpu.load::<u64>(at.wrapping_add(8))?);
        let kind = cpu.gpr[usize::from(u.src)];
        let pcids = cpu.cr4 & cr4::PCIDE != 0;
        let bad = kind > 3
            || kind < 2 && pcid >> 12 != 0
            || kind < 2 && !pcids && pcid != 0
            || kind == 0 && !cpu.canonical(linear);
        if bad {
            return Err(cpu.gp(0));
        }
        if kind == 0 {
            cpu.flush_page(linear);
        } else if kind == 1 && pcids && pcid as u16 != cpu.cr3 as u16 & 0xfff {
            cpu.forget_pcid(pcid as u16);
        } else {
            cpu.flush_tlb();
        }
        Ok(cpu.sync_after(u))
    })
}

/// MOVDIRI and MOVNTI.
fn direct_store(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let value = cpu.gpr[usize::from(u.src)];
        cpu.store_sized(at, value, u.size.into())
    })
}

/// MOVDIR64B: 64 bytes, source read first, destination written whole.
fn direct_line(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let from = cpu.ea(u)?;
        let mut to = cpu.gpr[usize::from(u.dst)];
        if u.asize == 4 {
            to &= 0xffff_ffff;
        }
        if !cpu.long {
            to = to.wrapping_add(cpu.seg[ES].base) & 0xffff_ffff;
        }
        if to & 63 != 0 {
            return Err(cpu.gp(0));
        }
        let mut line = [0; 64];
        cpu.read_linear(from, &mut line)?;
        let pa = cpu.translate(to, access::WRITE, cpu.tag & 3)?;
        cpu.guard_code(pa, 64)?;
        cpu.phys_write_line(pa, &line)
    })
}

fn rdpkru(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, u| {
        if cpu.cr4 & cr4::PKE == 0 {
            return Err(cpu.ud());
        }
        if cpu.gpr[RCX] as u32 != 0 {
            return Err(cpu.gp(0));
        }
        if u.op == 0 {
            cpu.gpr[RAX] = cpu.pkru.into();
            cpu.gpr[RDX] = 0;
            return Ok(Flow::Next);
        }
        if cpu.gpr[RDX] as u32 != 0 {
            return Err(cpu.gp(0));
        }
        cpu.pkru = cpu.gpr[RAX] as u32;
        cpu.flush_tlb();
        Ok(cpu.sync_after(u))
    })
}

fn xgetbv(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, _| {
        if cpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(cpu.ud());
        }
        let value = match cpu.gpr[RCX] as u32 {
            0 => cpu.xcr0,
            1 => cpu.xcr0 & cpu.xinuse(),
            _ => return Err(cpu.gp(0)),
        };
        cpu.gpr[RAX] = value & 0xffff_ffff;
        cpu.gpr[RDX] = value >> 32;
        Ok(())
    })
}

fn xsetbv(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if cpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        Err(cpu.exit_with(reason::XSETBV, 0))
    })
}

/// BOUND and ARPL exist in legacy code only.
fn bound(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let size = u64::from(u.size);
        let (low, high) = (
            cpu.load_sized(at, size)?,
            cpu.load_sized(at.wrapping_add(size), size)?,
        );
        let index = cpu.gpr[usize::from(u.dst)];
        let signed = |value: u64| {
            if size == 2 {
                i64::from(value as i16)
            } else {
                i64::from(value as i32)
            }
        };
        if signed(index) < signed(low) || signed(index) > signed(high) {
            return Err(cpu.raise(5, None));
        }
        Ok(())
    })
}

fn arpl(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let source = u16::get(cpu, u.src);
        let mut raised = false;
        let mut adjust = |old: u16| {
            raised = old & 3 < source & 3;
            if raised {
                old & !3 | source & 3
            } else {
                old
            }
        };
        if u.mem {
            let at = cpu.ea(u)?;
            cpu.modify::<u16>(at, |_, old| adjust(old))?;
        } else {
            let value = adjust(u16::get(cpu, u.dst));
            u16::set(cpu, u.dst, value);
        }
        let flags = cpu.cc.all() & !ZF;
        cpu.cc = Lazy::bits(flags | if raised { ZF } else { 0 });
        Ok(())
    })
}

fn segment_operand(insn: &Instruction, operand: u32) -> Option<u8> {
    (insn.op_kind(operand) == OpKind::Register && insn.op_register(operand).is_segment_register())
        .then(|| segment_number(insn.op_register(operand)) as u8)
}

fn lower_mov(insn: &Instruction, uop: &mut Uop) -> Option<Handler> {
    if let Some(index) = segment_operand(insn, 0) {
        if usize::from(index) == CS {
            return Some(control::invalid(uop));
        }
        uop.op = index;
        if !uop.mem {
            uop.src = gpr(insn.op1_register());
        }
        uop.size = 2;
        uop.ends = true;
        return Some(mov_to_segment);
    }
    if let Some(index) = segment_operand(insn, 1) {
        uop.op = index;
        uop.size = operand_size(insn, 0);
        if !uop.mem {
            uop.dst = gpr(insn.op0_register());
        } else {
            uop.size = 2;
        }
        return Some(mov_from_segment);
    }
    let (to, from) = (insn.op0_register(), insn.op1_register());
    if to.is_cr() {
        uop.op = to.number() as u8;
        uop.src = gpr(from);
        uop.ends = true;
        return Some(if matches!(uop.op, 0 | 2 | 3 | 4 | 8) {
            mov_to_cr
        } else {
            control::invalid(uop)
        });
    }
    if from.is_cr() {
        uop.op = from.number() as u8;
        uop.dst = gpr(to);
        return Some(if matches!(uop.op, 0 | 2 | 3 | 4 | 8) {
            mov_from_cr
        } else {
            control::invalid(uop)
        });
    }
    if to.is_dr() || from.is_dr() {
        let write = to.is_dr();
        uop.op = if write { to.number() } else { from.number() } as u8;
        uop.rep = if write { 0xff } else { 0 };
        uop.src = gpr(from);
        uop.dst = gpr(to);
        uop.ends = true;
        return Some(mov_dr);
    }
    None
}

fn lower_io(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    match insn.mnemonic() {
        Mnemonic::In | Mnemonic::Out => {
            let input = insn.mnemonic() == Mnemonic::In;
            let (data, port) = if input { (0, 1) } else { (1, 0) };
            uop.size = operand_size(insn, data);
            uop.op = u8::from(input);
            if let Some(number) = immediate(insn, port) {
                uop.imm = number;
                uop.op |= 2;
            }
            uop.ends = true;
            Some(port_io)
        }
        Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => {
            (uop.op, uop.size) = match insn.mnemonic() {
                Mnemonic::Insb => (1, 1),
                Mnemonic::Insw => (1, 2),
                Mnemonic::Insd => (1, 4),
                Mnemonic::Outsb => (0, 1),
                Mnemonic::Outsw => (0, 2),
                _ => (0, 4),
            };
            uop.asize = crate::cpu::decode::address_size(insn, mode);
            uop.segment = segment_number(insn.memory_segment()) as u8;
            uop.ends = true;
            Some(string_io)
        }
        _ => None,
    }
}

pub fn lower(insn: &Instruction, uop: &mut Uop, mode: u32) -> Option<Handler> {
    let bits = bitness(mode);
    let ending = |uop: &mut Uop, handler: Handler| {
        uop.ends = true;
        Some(handler)
    };
    let mnemonic = insn.mnemonic();
    match mnemonic {
        Mnemonic::Mov => lower_mov(insn, uop),
        Mnemonic::Push | Mnemonic::Pop => {
            uop.op = segment_operand(insn, 0)?;
            uop.size = match insn.stack_pointer_increment().unsigned_abs() {
                2 => 2,
                4 => 4,
                8 => 8,
                _ => (bits / 8) as u8,
            };
            if mnemonic == Mnemonic::Push {
                Some(push_segment)
            } else {
                ending(uop, pop_segment)
            }
        }
        Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
            uop.op = match mnemonic {
                Mnemonic::Lds => DS,
                Mnemonic::Les => ES,
                Mnemonic::Lfs => FS,
                Mnemonic::Lgs => GS,
                _ => SS,
            } as u8;
            uop.size = operand_size(insn, 0);
            uop.dst = gpr(insn.op0_register());
            ending(uop, load_pointer)
        }
        Mnemonic::Clts => ending(uop, clts),
        Mnemonic::Lmsw => {
            if !uop.mem {
                uop.src = gpr(insn.op0_register());
            }
            ending(uop, lmsw)
        }
        Mnemonic::Smsw | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Lldt | Mnemonic::Ltr => {
            if uop.mem {
                uop.size = 2;
            } else {
                uop.size = operand_size(insn, 0);
                uop.dst = gpr(insn.op0_register());
                uop.src = uop.dst;
            }
            uop.op = match mnemonic {
                Mnemonic::Smsw => return Some(smsw),
                Mnemonic::Sldt => 0,
                Mnemonic::Str => 1,
                Mnemonic::Lldt => 2,
                _ => 3,
            };
            ending(uop, system_segment)
        }
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt => {
            uop.op = match mnemonic {
                Mnemonic::Sgdt => 0,
                Mnemonic::Sidt => 1,
                Mnemonic::Lgdt => 2,
                _ => 3,
            };
            uop.size = match insn.code() {
                _ if bits == 64 => 8,
                Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
                _ => 4,
            };
            ending(uop, table)
        }
        Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw => {
            uop.op = match mnemonic {
                Mnemonic::Lar => 0,
                Mnemonic::Lsl => 1,
                Mnemonic::Verr => 2,
                _ => 3,
            };
            let source = if uop.op < 2 { 1 } else { 0 };
            if uop.op < 2 {
                uop.dst = gpr(insn.op0_register());
                uop.size = operand_size(insn, 0);
            }
            if !uop.mem {
                uop.src = gpr(insn.op_register(source));
            }
            Some(probe_segment)
        }
        Mnemonic::Rdmsr => Some(rdmsr),
        Mnemonic::Wrmsr => ending(uop, wrmsr),
        Mnemonic::Cpuid => ending(uop, cpuid),
        Mnemonic::Rdtsc => Some(rdtsc),
        Mnemonic::Rdtscp => {
            uop.op = 1;
            Some(rdtsc)
        }
        Mnemonic::Rdpid => {
            uop.dst = gpr(insn.op0_register());
            Some(rdpid)
        }
        Mnemonic::Rdpmc => Some(rdpmc),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            uop.op = u8::from(mnemonic == Mnemonic::Rdseed);
            uop.dst = gpr(insn.op0_register());
            Some(match operand_size(insn, 0) {
                2 => random::<u16>,
                4 => random::<u32>,
                _ => random::<u64>,
            })
        }
        Mnemonic::Int => {
            uop.imm = u64::from(insn.immediate8());
            ending(uop, int_n)
        }
        Mnemonic::Int3 => ending(uop, int3),
        Mnemonic::Int1 => ending(uop, int1),
        Mnemonic::Into => ending(uop, into),
        Mnemonic::Syscall => ending(uop, syscall),
        Mnemonic::Sysret | Mnemonic::Sysretq => {
            uop.size = if insn.code() == Code::Sysretq { 8 } else { 4 };
            ending(uop, sysret)
        }
        Mnemonic::Sysenter => ending(uop, sysenter),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => {
            uop.size = if insn.code() == Code::Sysexitq { 8 } else { 4 };
            ending(uop, sysexit)
        }
        Mnemonic::Swapgs => Some(swapgs),
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            uop.op = match mnemonic {
                Mnemonic::Rdfsbase => 0,
                Mnemonic::Rdgsbase => 1,
                Mnemonic::Wrfsbase => 2,
                _ => 3,
            };
            uop.dst = gpr(insn.op0_register());
            uop.src = uop.dst;
            Some(if operand_size(insn, 0) == 4 {
                fsgsbase::<u32>
            } else {
                fsgsbase::<u64>
            })
        }
        Mnemonic::Hlt => ending(uop, hlt),
        Mnemonic::Pause => ending(uop, pause),
        Mnemonic::Monitor
        | Mnemonic::Mwait
        | Mnemonic::Umonitor
        | Mnemonic::Umwait
        | Mnemonic::Tpause => {
            uop.op = match mnemonic {
                Mnemonic::Monitor => 0,
                Mnemonic::Mwait => 1,
                Mnemonic::Umonitor => 2,
                Mnemonic::Umwait => 3,
                _ => 4,
            };
            uop.segment = segment_number(insn.segment_prefix()) as u8;
            ending(uop, monitor)
        }
        Mnemonic::Invd => Some(invalidate_caches),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => {
            uop.op = 1;
            Some(invalidate_caches)
        }
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => {
            uop.size = 1;
            Some(flush_line)
        }
        Mnemonic::Lfence | Mnemonic::Sfence | Mnemonic::Mfence | Mnemonic::Serialize => Some(fence),
        Mnemonic::Invlpg => {
            uop.size = 1;
            ending(uop, invlpg)
        }
        Mnemonic::Invpcid => {
            uop.src = gpr(insn.op0_register());
            uop.size = 16;
            ending(uop, invpcid)
        }
        Mnemonic::Movdiri | Mnemonic::Movnti => {
            uop.src = gpr(insn.op1_register());
            uop.size = operand_size(insn, 0);
            Some(direct_store)
        }
        Mnemonic::Movdir64b => {
            uop.dst = gpr(insn.op0_register());
            uop.asize = operand_size(insn, 0);
            uop.size = 64;
            Some(direct_line)
        }
        Mnemonic::Rdpkru => ending(uop, rdpkru),
        Mnemonic::Wrpkru => {
            uop.op = 1;
            ending(uop, rdpkru)
        }
        Mnemonic::Xgetbv => Some(xgetbv),
        Mnemonic::Xsetbv => ending(uop, xsetbv),
        Mnemonic::Bound => {
            uop.dst = gpr(insn.op0_register());
            uop.size = operand_size(insn, 0);
            Some(bound)
        }
        Mnemonic::Arpl => {
            uop.src = gpr(insn.op1_register());
            uop.dst = gpr(insn.op0_register());
            uop.size = 2;
            Some(arpl)
        }
        _ => lower_io(insn, uop, mode),
    }
}

const _: (u64, u64, Register) = (ARITH, OF, Register::None);
