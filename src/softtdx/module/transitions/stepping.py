"""Detecting a host that steps a TD one instruction at a time, or not even one.

Single step: interrupts that come right after each TD entry let a host watch single instructions. A TD that retired
no more than one instruction when an interrupt came is let forward a random number of instructions first, with the
monitor trap flag and the interrupt held back.

Zero step: EPT violations over and over at one RIP let a host watch which pages an instruction touches. After
`EPF_THRESHOLD` of them the pages are noted, and the vCPU is not entered before all of them are mapped again (TDX Module
Base Spec, "Side Channel Attack Mitigation", "Zero-Step and Single-Step").
"""

import struct
from typing import Final

from softtdx.abi.exits import (
    BLOCKING_BY_MOV_SS,
    BLOCKING_BY_NMI,
    BLOCKING_BY_STI,
    EPT_NMI_UNBLOCKED,
    INFO_VALID,
    INFO_VECTOR_MASK,
    NMI_VECTOR,
    PENDING_DEBUG_BS,
    PENDING_DEBUG_ENABLED,
    PENDING_DEBUG_RTM,
    ExitReason,
)
from softtdx.abi.msrs import APIC_BASE_ENABLE, Msr
from softtdx.abi.sept import LEAF, STATE_MASK
from softtdx.abi.status import Operand, Status

from .. import sept, tdcs, tdvps, vmcs
from ..features import CTL_PENDING_VE_DISABLE, NOTIFY_EPT_FAULTS
from ..locks import SHARED
from ..td import LockId
from .guest import Guest, TdExit

__all__ = ["check_entry", "filter_exit", "log_ept_fault", "may_notify"]

EPF_THRESHOLD: Final = 6
EPF_GPA_LIST_SIZE: Final = 32
TSC_THRESHOLD: Final = 4096
MAX_INSTRUCTION_LENGTH: Final = 15
MAX_STEPS_MASK: Final = 0x1F
BLOCK_INTERRUPTS: Final = 15  # CR8
SMI_IS_MSMI: Final = 1 << 0
DR7_ENABLED: Final = 0xFF
_PENDING: Final = PENDING_DEBUG_ENABLED | PENDING_DEBUG_BS | PENDING_DEBUG_RTM
_SUSPICIOUS: Final = frozenset(
    map(
        int,
        (
            ExitReason.EXTERNAL_INTERRUPT,
            ExitReason.MONITOR_TRAP_FLAG,
            ExitReason.OTHER_SMI,
            ExitReason.EXCEPTION_OR_NMI,
            ExitReason.INIT,
        ),
    )
)
_EPTP_LEVEL_SHIFT: Final = 3


# --- TD entry
def check_entry(guest: Guest) -> int | None:
    """Zero-step check of TDH.VP.ENTER; notes where the guest stands.

    Returns a GPA that was noted as faulting and would fault again: the vCPU must not be entered. LeafError
    OPERAND_BUSY (SEPT_TREE); the lock stays held for the caller to release.
    """
    cpu = guest.cpu
    stepping = guest.stepping
    stepping.entry_rip = cpu.vmread(vmcs.RIP)
    count = stepping.epf_gpas
    if not count:
        return None
    guest.td.lock(LockId.SEPT, SHARED, Operand.SEPT_TREE)
    for (gpa,) in struct.iter_unpack("<Q", guest.vcpu.read(tdvps.LAST_EPF_GPA_LIST, 8 * min(count, EPF_GPA_LIST_SIZE))):
        if _would_fault(guest, gpa):
            return int(gpa)
    return None


def _would_fault(guest: Guest, gpa: int) -> bool:
    """Whether touching a private GPA would be an EPT violation for the host."""
    td = guest.td
    top = td.rd64(tdcs.EPTP) >> _EPTP_LEVEL_SHIFT & 7
    _, entry, level = sept.walk(guest.cpu, td.sept_root, top, gpa, 0)
    if entry & 7 == 7 and (entry & LEAF or not level):
        return False
    pending = entry & STATE_MASK in sept.ACCEPTABLE
    return not pending or bool(guest.controls() & CTL_PENDING_VE_DISABLE)


def wants_notification(guest: Guest) -> bool:
    """Whether the TD asked for a #VE when a zero-step attack is suspected (NOTIFY_ENABLES)."""
    return bool(guest.stepping.epf_gpas and guest.td.rd64(tdcs.NOTIFY_ENABLES) & NOTIFY_EPT_FAULTS)


def may_notify(guest: Guest, qualification: int) -> bool:
    """Whether the vCPU can take that #VE now."""
    cpu = guest.cpu
    return not (
        cpu.vmread(vmcs.INTERRUPTIBILITY) & BLOCKING_BY_NMI
        or qualification & EPT_NMI_UNBLOCKED
        or cpu.vmread(vmcs.IDT_VECTORING_INFO) & INFO_VALID
        or cpu.rd32(guest.vp + tdvps.VE_VALID)
    )


# --- VM exit
def filter_exit(guest: Guest, basic: int) -> bool:
    """The first thing that happens to a VM exit; True: the guest goes on at once, the exit is not handled now."""
    stepping = guest.stepping
    if stepping.epf_count or stepping.epf_gpas:
        _reset_if_progress(guest)
    if basic in _SUSPICIOUS and _interrupts(guest, basic) and not _enough_progress(guest):
        if not stepping.active:
            _start(guest)
        if basic == ExitReason.EXCEPTION_OR_NMI:
            stepping.nmi = True
        stepping.init |= basic == ExitReason.INIT
        if stepping.steps > 0:
            _hold_back(guest)
            stepping.steps -= 1
            return True
    if stepping.active:
        _stop(guest, basic)
        if basic == ExitReason.MONITOR_TRAP_FLAG:
            # What was held back comes now, and must not start this again.
            stepping.entry_tsc = 0
            guest.retired += 2
            return True
    return False


def _interrupts(guest: Guest, basic: int) -> bool:
    if basic == ExitReason.EXCEPTION_OR_NMI:
        return guest.cpu.vmread(vmcs.EXIT_INTERRUPTION_INFO) & INFO_VECTOR_MASK == NMI_VECTOR
    if basic == ExitReason.OTHER_SMI:
        return not guest.cpu.vmread(vmcs.EXIT_QUALIFICATION) & SMI_IS_MSMI
    return True


def _enough_progress(guest: Guest) -> bool:
    """Whether the guest ran on since it was entered, so that nobody can be stepping it."""
    stepping = guest.stepping
    if stepping.active:
        return False
    cpu = guest.cpu
    if not guest.perfmon:
        retired = cpu.retired_instructions() - stepping.entry_retired + guest.retired
        if retired > 1:
            return True
        # A REP string instruction retires once but counts RCX down.
        return not retired and (stepping.entry_rcx - cpu.gpr(1)) % (1 << 64) > 1
    moved = abs(cpu.vmread(vmcs.RIP) - stepping.entry_rip)
    return moved > 2 * MAX_INSTRUCTION_LENGTH or cpu.rdtsc() - stepping.entry_tsc > TSC_THRESHOLD


def _start(guest: Guest) -> None:
    cpu = guest.cpu
    if not cpu.rdmsr(Msr.APIC_BASE) & APIC_BASE_ENABLE:
        raise TdExit(
            Status.NON_RECOVERABLE_TD_WRONG_APIC_MODE,
            guest.reason,
            cpu.vmread(vmcs.EXIT_QUALIFICATION),
            interruption=cpu.vmread(vmcs.EXIT_INTERRUPTION_INFO),
        )
    stepping = guest.stepping
    stepping.steps = (cpu.rdrand() & MAX_STEPS_MASK) + 1
    stepping.active = True
    stepping.saved_cr8 = cpu.core.cr8
    cpu.core.cr8 = BLOCK_INTERRUPTS
    stepping.interrupt = guest.reason & 0xFFFF == ExitReason.EXTERNAL_INTERRUPT
    _set_monitor_trap(guest, on=True)


def _hold_back(guest: Guest) -> None:
    """Block events for one instruction by MOV-SS blocking, unless the guest itself has something pending."""
    cpu = guest.cpu
    state = cpu.vmread(vmcs.INTERRUPTIBILITY)
    if cpu.vmread(vmcs.PENDING_DEBUG) & _PENDING or state & BLOCKING_BY_STI or _code_breakpoint(guest):
        return
    guest.set_pending_single_step()
    cpu.vmwrite(vmcs.INTERRUPTIBILITY, state | BLOCKING_BY_MOV_SS)


def _code_breakpoint(guest: Guest) -> bool:
    """Whether DR0..DR3 hold an enabled instruction breakpoint at RIP."""
    cpu = guest.cpu
    dr7 = cpu.vmread(vmcs.DR7)
    if not dr7 & DR7_ENABLED:
        return False
    rip = cpu.vmread(vmcs.RIP)
    return any(
        dr7 >> 2 * n & 3 and not dr7 >> (16 + 4 * n) & 0xF and address == rip
        for n, address in enumerate(cpu.core.dr[:4])
    )


def _stop(guest: Guest, basic: int) -> None:
    cpu = guest.cpu
    stepping = guest.stepping
    if stepping.nmi and not (basic == ExitReason.EXCEPTION_OR_NMI and _interrupts(guest, basic)):
        cpu.self_interrupt(nmi=True)
    if stepping.interrupt and basic != ExitReason.EXTERNAL_INTERRUPT:
        cpu.self_interrupt()
    cpu.core.cr8 = stepping.saved_cr8
    _set_monitor_trap(guest, on=False)
    stepping.active = stepping.nmi = stepping.init = stepping.interrupt = False
    stepping.steps = 0


def _set_monitor_trap(guest: Guest, *, on: bool) -> None:
    cpu = guest.cpu
    controls = cpu.vmread(vmcs.PRIMARY_CONTROLS)
    flag = vmcs.PRIMARY_MONITOR_TRAP
    cpu.vmwrite(vmcs.PRIMARY_CONTROLS, controls | flag if on else controls & ~flag)


# --- zero step
def log_ept_fault(guest: Guest, gpa: int) -> None:
    """An EPT violation on a private GPA will leave to the host: count it, and after the threshold note the GPA."""
    stepping = guest.stepping
    _reset_if_progress(guest)
    if stepping.epf_count < EPF_THRESHOLD:
        stepping.epf_count += 1
        guest.cpu.wr8(guest.vp + tdvps.POSSIBLY_EPF_STEPPING, stepping.epf_count)
        return
    count = stepping.epf_gpas
    if count >= EPF_GPA_LIST_SIZE:
        return
    known = struct.unpack(f"<{count}Q", guest.vcpu.read(tdvps.LAST_EPF_GPA_LIST, 8 * count)) if count else ()
    if gpa not in known:
        guest.vcpu.wr64(tdvps.LAST_EPF_GPA_LIST + 8 * count, gpa)
        stepping.epf_gpas = count + 1
        guest.cpu.wr8(guest.vp + tdvps.LAST_EPF_GPA_LIST_IDX, count + 1)


def _reset_if_progress(guest: Guest) -> None:
    stepping = guest.stepping
    if guest.cpu.vmread(vmcs.RIP) != stepping.entry_rip and (stepping.epf_count or stepping.epf_gpas):
        stepping.epf_count = stepping.epf_gpas = 0
        guest.cpu.wr8(guest.vp + tdvps.LAST_EPF_GPA_LIST_IDX, 0)
        guest.cpu.wr8(guest.vp + tdvps.POSSIBLY_EPF_STEPPING, 0)
