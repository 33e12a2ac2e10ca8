"""VM exits that no instruction of the guest asked for: interrupts, NMIs, faults of the guest or of the machine."""

from typing import Final

from softtdx.abi.exits import (
    BLOCKING_BY_NMI,
    INFO_ENTRY_MASK,
    INFO_ERROR_CODE,
    INFO_TYPE_MASK,
    INFO_TYPE_NMI,
    INFO_VALID,
    INFO_VECTOR_MASK,
    MC_VECTOR,
    NMI_VECTOR,
    ExitReason,
)
from softtdx.abi.status import Status

from .. import tdvps, vmcs
from ..fatal import ModuleFatal
from ..transitions.guest import Guest, TdExit

__all__ = [
    "entry_failed",
    "exception_or_nmi",
    "external_interrupt",
    "idt_vectoring",
    "nmi_window",
    "notification",
    "other_smi",
    "page_log_full",
    "tell_host",
    "tell_host_with_event",
    "triple_fault",
    "unexpected",
]

_NMI: Final = INFO_VALID | INFO_TYPE_NMI | NMI_VECTOR
SMI_IS_MSMI: Final = 1 << 0  # exit qualification: the SMI reports a machine check
NOTIFY_CONTEXT_INVALID: Final = 1 << 0
NOTIFY_NMI_UNBLOCKED: Final = 1 << 12
# Exits in the middle of delivering an event that the controls of a TD allow.
_DURING_DELIVERY: Final = frozenset({ExitReason.TASK_SWITCH, ExitReason.EPT_VIOLATION, ExitReason.EPT_MISCONFIGURATION})


def tell_host(guest: Guest) -> None:
    """A TD exit as the processor reported it: task switch, bus lock, INIT."""
    raise TdExit(Status.SUCCESS, guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION))


def tell_host_with_event(guest: Guest) -> None:
    """The same with the interruption information: an SMI in a C-state."""
    raise _with_event(guest, Status.SUCCESS)


def _with_event(guest: Guest, case: int) -> TdExit:
    cpu = guest.cpu
    return TdExit(
        case,
        guest.reason,
        cpu.vmread(vmcs.EXIT_QUALIFICATION),
        interruption=cpu.vmread(vmcs.EXIT_INTERRUPTION_INFO),
    )


def external_interrupt(guest: Guest) -> None:
    """An interrupt for the host, with its vector."""
    raise _with_event(guest, Status.SUCCESS)


def unexpected(guest: Guest) -> None:
    """A reason that the controls of a TD do not produce: a debugger's doing, else the end of the TD."""
    case = Status.SUCCESS if guest.debug else Status.NON_RECOVERABLE_TD
    raise TdExit(case, guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION))


def triple_fault(guest: Guest) -> None:
    """Shutdown of the vCPU: it cannot be entered again."""
    raise TdExit(Status.NON_RECOVERABLE_VCPU, guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION))


def notification(guest: Guest) -> None:
    """The instruction timeout that the host set has passed."""
    qualification = guest.cpu.vmread(vmcs.EXIT_QUALIFICATION)
    if qualification & NOTIFY_NMI_UNBLOCKED:
        guest.block_nmi()
    case = Status.NON_RECOVERABLE_TD if qualification & NOTIFY_CONTEXT_INVALID else Status.SUCCESS
    raise TdExit(case, guest.reason, qualification)


def other_smi(guest: Guest) -> None:
    """An SMI; when it reports a machine check the TD's memory is not to be touched any more."""
    msmi = guest.cpu.vmread(vmcs.EXIT_QUALIFICATION) & SMI_IS_MSMI
    raise _with_event(guest, Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE if msmi else Status.SUCCESS)


def exception_or_nmi(guest: Guest) -> None:
    """An NMI for the host; a machine check, which ends the TD; in a debug TD any exception the debugger asked for."""
    info = guest.cpu.vmread(vmcs.EXIT_INTERRUPTION_INFO)
    if info & INFO_TYPE_MASK == INFO_TYPE_NMI:
        raise _with_event(guest, Status.SUCCESS)
    if info & INFO_VECTOR_MASK == MC_VECTOR:
        raise _with_event(guest, Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE)
    if guest.debug:
        raise _with_event(guest, Status.SUCCESS)
    raise ModuleFatal(f"exception {info & INFO_VECTOR_MASK} of a TD exited although no bit of its bitmap is set")


def page_log_full(guest: Guest) -> None:
    """The page-modification log of a debug TD is full."""
    if not guest.debug:
        raise ModuleFatal("the page-modification log of a TD that has none is full")
    tell_host(guest)


def nmi_window(guest: Guest) -> None:
    """The guest can take an NMI now: inject the one that the host asked for (PEND_NMI), after any #VE was read."""
    cpu = guest.cpu
    if guest.pend_nmi and not cpu.rd32(guest.vp + tdvps.VE_VALID):
        guest.event = _NMI
        cpu.vmwrite(vmcs.ENTRY_INFO, _NMI)
        guest.pend_nmi = False
        cpu.wr8(guest.vp + tdvps.PEND_NMI, 0)
    cpu.vmwrite(vmcs.PRIMARY_CONTROLS, cpu.vmread(vmcs.PRIMARY_CONTROLS) & ~vmcs.PRIMARY_NMI_WINDOW)


def entry_failed(guest: Guest) -> None:
    """VM entry loaded the guest's state and refused it."""
    basic = guest.reason & 0xFFFF
    qualification = guest.cpu.vmread(vmcs.EXIT_QUALIFICATION)
    if basic == ExitReason.ENTRY_FAILURE_GUEST_STATE:
        raise TdExit(Status.SUCCESS if guest.debug else Status.NON_RECOVERABLE_TD, guest.reason, qualification)
    if basic == ExitReason.ENTRY_FAILURE_MACHINE_CHECK:
        raise TdExit(Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE, guest.reason, qualification)
    raise ModuleFatal(f"VM entry of a TD failed with reason {guest.reason:#x}")


def idt_vectoring(guest: Guest, info: int) -> None:
    """The exit interrupted the delivery of an event: deliver it again at the next entry, whatever else happens."""
    cpu = guest.cpu
    if guest.reason & 0xFFFF not in _DURING_DELIVERY:
        if guest.debug:
            raise TdExit(Status.SUCCESS, guest.reason, cpu.vmread(vmcs.EXIT_QUALIFICATION))
        raise ModuleFatal(f"VM exit {guest.reason:#x} of a TD in the middle of event delivery ({info:#x})")
    if info & INFO_TYPE_MASK == INFO_TYPE_NMI:
        cpu.vmwrite(vmcs.INTERRUPTIBILITY, cpu.vmread(vmcs.INTERRUPTIBILITY) & ~BLOCKING_BY_NMI)
    event = info & INFO_ENTRY_MASK
    guest.event = event
    cpu.vmwrite(vmcs.ENTRY_INFO, event)
    if info & INFO_ERROR_CODE:
        cpu.vmwrite(vmcs.ENTRY_ERROR_CODE, cpu.vmread(vmcs.IDT_VECTORING_ERROR_CODE))
    cpu.vmwrite(vmcs.ENTRY_INSTRUCTION_LENGTH, cpu.vmread(vmcs.INSTRUCTION_LENGTH))
