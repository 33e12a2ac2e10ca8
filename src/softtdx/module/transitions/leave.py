"""TD exit: the vCPU's state goes to its TDVPS, and the host gets the few registers it may see.

After an asynchronous exit: RAX status | exit reason, RCX exit qualification, RDX extended exit qualification, R8
guest-physical address, R9 interruption information, the others 0. After TDG.VP.VMCALL: RAX 77, RCX the guest's mask,
the registers that the mask selects, the others 0. RBP stays the host's under CONFIG_FLAGS.NO_RBP_MOD (TDX Module ABI,
"TDH.VP.ENTER"; Base Spec, "TD Exit").
"""

import struct
from functools import lru_cache
from typing import Final

from softtdx.abi.exits import EXIT_BUS_LOCK_PREEMPTED, ExitReason
from softtdx.abi.opstate import VcpuState
from softtdx.abi.status import FATAL, HOST_RECOVERABILITY_HINT, NON_RECOVERABLE, Status
from softtdx.hw.registers import GPR_NAMES, Registers

from .. import tdcs, tdr, tdvps, vmcs
from ..features import VM_HINT_VINTR_IN_SERVICE, VM_HINT_VINTR_PENDING, VM_HINT_VNMI_PENDING, XFAM_SSE
from . import xstate
from .guest import NO_REASON, Guest, TdExit
from .msrs import HostMsrs, save_guest_msrs, scrub_msrs

__all__ = ["DEBUG_AND_XCR0", "leave_async", "leave_vmcall", "selected_registers"]

READY: Final = int(VcpuState.READY)
DISABLED: Final = int(VcpuState.DISABLED)
ACTIVE: Final = int(VcpuState.ACTIVE)
NOT_ACCESSIBLE: Final = int(Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE)
TDCALL: Final = int(ExitReason.TDCALL)

DR_RESET: Final = (0, 0, 0, 0, 0xFFFF_0FF0)
QUALIFICATION_VM: Final = 3 << 32  # which VM exited: 0, the TD itself
IMMEDIATE_RESUME_HINT: Final = 1 << 63
FIRST_PASSED: Final = 2  # RAX and RCX are the call's own
PPR: Final = 0xA0  # in the virtual-APIC page
HIGHEST_RESERVED_VECTOR: Final = 30
DETAIL_VINTR_PENDING: Final = 1 << 0  # VCPU_STATE_DETAILS
DETAIL_VINTR_IN_SERVICE: Final = 1 << 4
DETAIL_VNMI_PENDING: Final = 1 << 8
XMM_COUNT: Final = 16
DEBUG_AND_XCR0: Final = struct.Struct("<7Q")  # DR0..DR3, DR6, XCR0, CR2 lie together


def leave_async(guest: Guest, stop: TdExit, host: HostMsrs) -> int:
    """The vCPU leaves for a reason of its own or of the machine; returns RAX."""
    case = stop.case
    reason = 0 if stop.reason == NO_REASON else stop.reason
    if guest.bus_lock and stop.reason != NO_REASON:
        reason |= EXIT_BUS_LOCK_PREEMPTED
    regs = guest.call.regs
    qualification = stop.qualification & ~QUALIFICATION_VM
    if case & FATAL:
        guest.cpu.wr8(guest.td.tdr + tdr.FATAL, 1)
    if case != NOT_ACCESSIBLE:
        state, last = _next_state(guest, case)
        if _resume_hint(guest):
            qualification |= IMMEDIATE_RESUME_HINT
        _save(guest, host, state, last, trap=bool(case & HOST_RECOVERABILITY_HINT))
    _scrub(guest, host)
    _clear(guest, regs)
    regs.rcx = qualification
    regs.rdx = stop.extended
    regs.r8 = stop.gpa
    regs.r9 = stop.interruption
    guest.cpu.publish("td_exit", reason=reason & 0xFFFF)
    return case | reason & 0xFFFF_FFFF


@lru_cache(64)
def selected_registers(control: int) -> tuple[tuple[int, str], ...]:
    """(number, name) of the registers that bits 15:0 of a VMCALL's RCX select."""
    return tuple((index, GPR_NAMES[index]) for index in range(FIRST_PASSED, 16) if control >> index & 1)


def _clear(guest: Guest, regs: Registers) -> None:
    """Nothing of the host's own, nor of the guest's: all but RSP, and RBP if the TD never changes it."""
    if not guest.keeps_rbp:
        regs.rbp = 0
    regs.rcx = regs.rdx = regs.rbx = regs.rsi = regs.rdi = 0
    regs.r8 = regs.r9 = regs.r10 = regs.r11 = regs.r12 = regs.r13 = regs.r14 = regs.r15 = 0
    regs.clear_xmm()


def _next_state(guest: Guest, case: int) -> tuple[int, int]:
    """(VCPU_STATE, LAST_TD_EXIT)."""
    last = guest.last_exit
    if case & FATAL:
        return guest.vcpu.rd8(tdvps.VCPU_STATE), last
    if case & NON_RECOVERABLE:
        return DISABLED, last
    return READY, tdvps.LAST_EXIT_ASYNC_TRAP if case & HOST_RECOVERABILITY_HINT else tdvps.LAST_EXIT_ASYNC_FAULT


def leave_vmcall(guest: Guest, host: HostMsrs) -> int:
    """TDG.VP.VMCALL: the vCPU leaves behind its TDCALL with the registers it chose; returns RAX."""
    cpu = guest.cpu
    values = guest.gprs
    control = values[1]
    xmm_select = control >> 16 & 0xFFFF
    passed = [(index, cpu.xmm(index)) for index in range(XMM_COUNT) if xmm_select >> index & 1] if xmm_select else ()
    hint = _resume_hint(guest)
    _save(guest, host, READY, tdvps.LAST_EXIT_TDVMCALL, trap=True)
    _scrub(guest, host)
    regs = guest.call.regs
    _clear(guest, regs)
    regs.rcx = control & 0xFFFF_FFFF | (IMMEDIATE_RESUME_HINT if hint else 0)
    for index, name in selected_registers(control & 0xFFFF):
        setattr(regs, name, values[index])
    for index, value in passed:
        regs.xmm[index] = value
    cpu.publish("td_exit", reason=TDCALL)
    return TDCALL | (EXIT_BUS_LOCK_PREEMPTED if guest.bus_lock else 0)


def _resume_hint(guest: Guest) -> bool:
    """Update VCPU_STATE_DETAILS; whether the TD asked that the host resume at once (VM_CTLS)."""
    cpu = guest.cpu
    vcpu = guest.vcpu
    status = cpu.vmread(vmcs.INTERRUPT_STATUS)
    ppr = cpu.rd8(vcpu.pages[tdvps.VAPIC >> 12] + PPR)
    details = 0
    if status & 0xF0 > ppr & 0xF0:
        details |= DETAIL_VINTR_PENDING
    if status >> 8 & 0xFF > HIGHEST_RESERVED_VECTOR:
        details |= DETAIL_VINTR_IN_SERVICE
    if guest.pend_nmi:
        details |= DETAIL_VNMI_PENDING
    cpu.wr64(guest.vp + tdvps.VCPU_STATE_DETAILS, details)
    if not details:
        return False
    wanted = guest.td.rd64(tdcs.VM_CTLS)
    return bool(
        (wanted & VM_HINT_VINTR_PENDING and details & DETAIL_VINTR_PENDING)
        or (wanted & VM_HINT_VINTR_IN_SERVICE and details & DETAIL_VINTR_IN_SERVICE)
        or (wanted & VM_HINT_VNMI_PENDING and details & DETAIL_VNMI_PENDING)
    )


def _save(guest: Guest, host: HostMsrs, state: int, last_exit: int, *, trap: bool) -> None:
    """Everything of the guest that VM exit did not put into the VMCS; the vCPU does not run any more."""
    cpu = guest.cpu
    core = cpu.core
    vp = guest.vp
    save_guest_msrs(guest, host)
    cpu.store_gprs(vp + tdvps.GPR_RAX)
    cpu.wr64(vp + tdvps.GPR_RSP_PLACEHOLDER, 0)
    raw = DEBUG_AND_XCR0.pack(*core.dr, core.xcr0, core.cr2)
    if raw != guest.loaded_debug:
        cpu.write(vp + tdvps.DR0, raw)
    cpu.wr64(vp + tdvps.LAST_EXIT_TSC, cpu.rdtsc())
    cpu.wr8(vp + tdvps.VM_LAUNCHED, guest.launched)
    cpu.wr16(vp + tdvps.VCPU_STATE, state | last_exit << 8)  # and LAST_TD_EXIT
    xstate.save(guest)
    if trap:
        guest.advance_rip()
    guest.vcpu.leave_epoch(guest.epoch)


def _scrub(guest: Guest, host: HostMsrs) -> None:
    """INIT values where the host would otherwise find the guest's."""
    core = guest.cpu.core
    core.xinit(guest.xfam | XFAM_SSE)
    core.cr2 = 0
    core.dr = list(DR_RESET)
    scrub_msrs(guest, host)
