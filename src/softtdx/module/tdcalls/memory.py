"""Memory operands of TDCALL leaves: translating a guest-physical address as the processor would.

An operand that does not translate makes no status: the TD exits with an EPT violation or misconfiguration, or gets a
#VE, as if the TDCALL instruction itself had touched the page (TDX Module Base Spec, "Guest-Side Memory Operands").
"""

from typing import Final

from softtdx.abi.exits import EPT_READ, EPT_WRITE, ExitReason, ExtendedQualification, VeCategory
from softtdx.abi.sept import STATE_MASK
from softtdx.abi.status import Status

from .. import sept, tdcs, vmcs
from ..errors import LeafError
from ..features import CTL_PENDING_VE_DISABLE
from ..shared import is_shared
from ..transitions.guest import Guest, Resume, TdExit

__all__ = ["guest_pa"]

PAGE: Final = 0xFFF
ADDRESS: Final = 0x000F_FFFF_FFFF_F000
LEAF: Final = 1 << 7
SUPPRESS_VE: Final = 1 << 63
RWX: Final = 7
READABLE_SHIFT: Final = 3  # permissions in an exit qualification: bits 5:3
_EPTP_LEVEL_SHIFT: Final = 3


def guest_pa(guest: Guest, gpa: int, operand: int, *, write: bool = False, private: bool = True) -> int:
    """The bus address behind a GPA operand, KeyID included; good up to the end of its page.

    `private`: a shared GPA is refused. LeafError OPERAND_INVALID (`operand`) for a GPA that the TD cannot have;
    TdExit or Resume when it does not translate.
    """
    shared = guest.shared_bit
    if gpa & (~0 << min(guest.virt_maxpa or 52, 52 if guest.gpaw else 48) & ~shared | (shared if private else 0)):
        raise LeafError(Status.OPERAND_INVALID, operand)
    if gpa & shared:
        return _translate_shared(guest, gpa, EPT_READ | EPT_WRITE if write else EPT_READ)
    cpu = guest.cpu
    td = guest.td
    top = td.rd64(tdcs.EPTP) >> _EPTP_LEVEL_SHIFT & 7
    _, entry, level = sept.walk(cpu, td.sept_root, top, gpa, 0)
    wanted = EPT_READ | EPT_WRITE if write else EPT_READ
    if entry & wanted == wanted and (entry & LEAF or not level):
        return sept.leaf_hpa(entry, gpa, level)
    qualification = _qualification(write, entry)
    if entry & STATE_MASK not in sept.ACCEPTABLE:
        guest.exit_ept_violation(gpa, qualification)
    if guest.controls() & CTL_PENDING_VE_DISABLE:
        guest.exit_ept_violation(gpa, qualification, ExtendedQualification.PENDING_EPT_VIOLATION)
    guest.inject_ve(ExitReason.EPT_VIOLATION, qualification, VeCategory.PENDING_PAGE, gpa)
    raise Resume


def _qualification(write: bool, permissions: int) -> int:
    return (EPT_WRITE if write else EPT_READ) | (permissions & RWX) << READABLE_SHIFT


def _translate_shared(guest: Guest, gpa: int, wanted: int) -> int:
    """The walk of the host's EPT, with the faults of the processor's own."""
    cpu = guest.cpu
    g = guest.g
    table = cpu.vmread(vmcs.SHARED_EPTP) & ADDRESS
    level = guest.td.rd64(tdcs.EPTP) >> _EPTP_LEVEL_SHIFT & 7
    permissions = RWX
    while True:
        shift = 12 + 9 * level
        entry = cpu.rd64(table + (gpa >> shift << 3 & 0xFF8))
        permissions &= entry
        leaf = not level or bool(entry & LEAF)
        if _misconfigured(guest, entry, level, leaf):
            raise TdExit(Status.SUCCESS, ExitReason.EPT_MISCONFIGURATION, gpa=gpa & ~PAGE)
        if not entry & RWX or entry & wanted != wanted:
            _violation(guest, gpa, _qualification(bool(wanted & EPT_WRITE), permissions), entry, leaf)
        if leaf:
            break
        table = entry & ADDRESS
        level -= 1
    offset = (1 << shift) - 1
    pa = entry & ADDRESS & ~offset | gpa & offset
    if not is_shared(g, pa, 4096 - (pa & PAGE)):
        raise TdExit(Status.SUCCESS, ExitReason.EPT_MISCONFIGURATION, gpa=gpa & ~PAGE)
    return pa


def _misconfigured(guest: Guest, entry: int, level: int, leaf: bool) -> bool:
    """As the processor has it; and the host's tables must be where the host may put them."""
    if sept.misconfigured(entry, level, leaf):
        return True
    return bool(entry & RWX) and not leaf and not is_shared(guest.g, entry & ADDRESS, 4096)


def _violation(guest: Guest, gpa: int, qualification: int, entry: int, leaf: bool) -> None:
    """#VE where the host did not suppress it, else a TD exit."""
    if (not entry & RWX or leaf) and not entry & SUPPRESS_VE:
        guest.inject_ve(ExitReason.EPT_VIOLATION, qualification, VeCategory.ARCHITECTURAL, gpa)
        raise Resume
    guest.exit_ept_violation(gpa, qualification)
