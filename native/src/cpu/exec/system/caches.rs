//! Halting and waiting, caches, translation caches, direct stores, protection keys, XCR0.

use crate::cpu::flags::{Lazy, ZF};
use crate::cpu::int::Int;
use crate::cpu::interrupt::HALTED;
use crate::cpu::state::{cr4, Cpu, ES, FS, RAX, RCX, RDX};
use crate::cpu::uop::{last, step, Flow, Ip};
use crate::cpu::vmx_ctl::{primary, secondary};
use crate::cpu::vmx_exit::reason;
use crate::cpu::walk::access;

use super::*;

pub(super) fn hlt(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn pause(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if cpu.ctl.primary(primary::PAUSE) {
            return Err(cpu.exit_with(reason::PAUSE, 0));
        }
        Ok(Flow::Next)
    })
}

/// MONITOR (`op` 0), MWAIT (1), UMONITOR (2), UMWAIT (3), TPAUSE (4). Waiting ends at once, which is allowed.
pub(super) fn monitor(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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
pub(super) fn invalidate_caches(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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
pub(super) fn flush_line(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        cpu.translate(at, access::READ, cpu.tag & 3)?;
        Ok(())
    })
}

pub(super) fn fence(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |_, _| {
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(())
    })
}

pub(super) fn invlpg(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn invpcid(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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
pub(super) fn direct_store(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    step(cpu, ip, |cpu, u| {
        let at = cpu.ea(u)?;
        let value = cpu.gpr[usize::from(u.src)];
        cpu.store_sized(at, value, u.size.into())
    })
}

/// MOVDIR64B: 64 bytes, source read first, destination written whole.
pub(super) fn direct_line(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn rdpkru(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn xgetbv(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn xsetbv(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
    last(cpu, ip, |cpu, _| {
        if cpu.cr4 & cr4::OSXSAVE == 0 {
            return Err(cpu.ud());
        }
        supervisor(cpu)?;
        Err(cpu.exit_with(reason::XSETBV, 0))
    })
}

/// BOUND and ARPL exist in legacy code only.
pub(super) fn bound(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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

pub(super) fn arpl(cpu: &mut Cpu, ip: Ip<'_>) -> Flow {
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
