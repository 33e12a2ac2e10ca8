"""Which function handles which VM exit of a TD (TDX Module Base Spec, "VM Exit Handling")."""

from collections.abc import Callable
from typing import Final

from softtdx.abi.exits import ExitReason as R

from ..tdcalls.dispatch import handle_tdcall
from ..transitions.guest import Guest
from . import control_registers, cpuid, ept, events, instructions, msr

__all__ = ["HANDLERS", "unexpected"]

Handler = Callable[[Guest], None]

unexpected: Final[Handler] = events.unexpected

HANDLERS: Final[dict[int, Handler]] = {
    **dict.fromkeys(map(int, instructions.PARAVIRT), instructions.give_ve),
    **dict.fromkeys(map(int, instructions.UNDEFINED), instructions.give_ud),
    int(R.PCONFIG): instructions.give_configurable_ve,
    int(R.ENQCMD_PASID): instructions.give_gp,
    int(R.RDPMC): instructions.rdpmc,
    int(R.XSETBV): instructions.xsetbv,
    int(R.CPUID): cpuid.cpuid,
    int(R.RDMSR): msr.rdmsr,
    int(R.WRMSR): msr.wrmsr,
    int(R.CR_ACCESS): control_registers.cr_access,
    int(R.TDCALL): handle_tdcall,
    int(R.EPT_VIOLATION): ept.ept_violation,
    int(R.EPT_MISCONFIGURATION): ept.ept_misconfiguration,
    int(R.EXCEPTION_OR_NMI): events.exception_or_nmi,
    int(R.EXTERNAL_INTERRUPT): events.external_interrupt,
    int(R.TRIPLE_FAULT): events.triple_fault,
    int(R.INIT): events.tell_host,
    int(R.TASK_SWITCH): events.tell_host,
    int(R.BUS_LOCK): events.tell_host,
    int(R.NOTIFY_WINDOW): events.notification,
    int(R.OTHER_SMI): events.other_smi,
    int(R.C_STATE_SMI): events.tell_host_with_event,
    int(R.NMI_WINDOW): events.nmi_window,
    int(R.PML_FULL): events.page_log_full,
}
