"""EPT violations and misconfigurations (TDX Module Base Spec, "EPT Violation" and "GPA Handling")."""

from typing import Final

from softtdx.abi.exits import (
    EPT_FETCH,
    EPT_GLA_VALID,
    EPT_NMI_UNBLOCKED,
    EPT_SHADOW_STACK,
    EPT_WRITE,
    ExtendedQualification,
    VeCategory,
)
from softtdx.abi.sept import STATE_MASK
from softtdx.abi.status import Status

from .. import sept, tdcs, vmcs
from ..fatal import ModuleFatal
from ..features import CONFIG_MAXGPA_VIRT, CTL_PENDING_VE_DISABLE
from ..transitions.guest import Guest, TdExit
from ..transitions.stepping import log_ept_fault

__all__ = ["ept_misconfiguration", "ept_violation", "gpa_has_reserved_bits"]

PAGE: Final = 0xFFF
MAX_PA: Final = 52
_EPTP_LEVEL_SHIFT: Final = 3
# Page-fault error code
PF_PRESENT: Final = 1 << 0
PF_WRITE: Final = 1 << 1
PF_USER: Final = 1 << 2
PF_RESERVED: Final = 1 << 3
PF_FETCH: Final = 1 << 4
PF_SHADOW_STACK: Final = 1 << 6
USER_CPL: Final = 3


def ept_violation(guest: Guest) -> None:
    """An EPT violation: #PF for reserved GPA bits, #VE or a TD exit for a pending page, else a TD exit."""
    cpu = guest.cpu
    qualification = cpu.vmread(vmcs.EXIT_QUALIFICATION)
    gpa = cpu.vmread(vmcs.PHYSICAL_ADDRESS)
    if qualification & EPT_NMI_UNBLOCKED:
        guest.block_nmi()
    if qualification & EPT_GLA_VALID and gpa_has_reserved_bits(guest, gpa):
        _reserved_bits(guest, gpa, qualification)
        return
    extended = 0
    if not gpa & guest.shared_bit:
        if _is_acceptable(guest, gpa):
            if not guest.controls() & CTL_PENDING_VE_DISABLE:
                gla = cpu.vmread(vmcs.LINEAR_ADDRESS)
                guest.inject_ve(guest.reason, qualification, VeCategory.PENDING_PAGE, gpa, gla)
                return
            extended = ExtendedQualification.PENDING_EPT_VIOLATION
        log_ept_fault(guest, gpa)
    guest.exit_ept_violation(gpa, qualification, extended)


def gpa_has_reserved_bits(guest: Guest, gpa: int) -> bool:
    """Whether a GPA sets bits above the width that the TD sees (48 or 52, or its virtual MAXPHYADDR)."""
    width = guest.virt_maxpa or MAX_PA
    if not guest.gpaw and width > 48 and gpa >> 48 & (1 << (width - 48)) - 1:
        return True
    return bool(gpa & (1 << MAX_PA) - (1 << width) & ~guest.shared_bit)


def _reserved_bits(guest: Guest, gpa: int, qualification: int) -> None:
    gla = guest.cpu.vmread(vmcs.LINEAR_ADDRESS)
    if guest.config_flags & CONFIG_MAXGPA_VIRT:
        guest.inject_ve(guest.reason, qualification, VeCategory.RESERVED_GPA_BITS, gpa, gla)
        return
    error = PF_PRESENT | PF_RESERVED
    if qualification & EPT_WRITE:
        error |= PF_WRITE
    if guest.cpl() == USER_CPL:
        error |= PF_USER
    if qualification & EPT_FETCH:
        error |= PF_FETCH
    if qualification & EPT_SHADOW_STACK:
        error |= PF_SHADOW_STACK
    guest.inject_pf(gla, error)


def _is_acceptable(guest: Guest, gpa: int) -> bool:
    """Whether the page waits for the guest's TDG.MEM.PAGE.ACCEPT."""
    td = guest.td
    top = td.rd64(tdcs.EPTP) >> _EPTP_LEVEL_SHIFT & 7
    _, entry, _ = sept.walk(guest.cpu, td.sept_root, top, gpa, 0)
    return entry & STATE_MASK in sept.ACCEPTABLE


def ept_misconfiguration(guest: Guest) -> None:
    """A misconfigured entry of the host's own EPT is told to the host; the secure EPT has none."""
    gpa = guest.cpu.vmread(vmcs.PHYSICAL_ADDRESS)
    if not gpa & guest.shared_bit:
        raise ModuleFatal(f"the secure EPT is misconfigured at GPA {gpa:#x}")
    raise TdExit(Status.SUCCESS, guest.reason, gpa=gpa & ~PAGE)
