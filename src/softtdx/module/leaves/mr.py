"""TDH.MR.EXTEND: measure the content of a TD's initial memory."""

from dataclasses import dataclass
from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import STATE_MASK
from softtdx.abi.status import Operand, Status

from .. import measure, sept
from ..context import Call
from ..errors import LeafError, operand_invalid
from ..ids import RDX
from ..locks import EXCLUSIVE
from ..registry import seamcall
from ..td import NO_LOCK, Td, open_td

_EXTEND: Final = SeamcallLeaf.MR_EXTEND
_STATES: Final = sept.host_states(_EXTEND)


@dataclass(slots=True)
class _Again:
    """The page that the last MR.EXTEND of a processor measured: good while nobody else has had the TDR's lock."""

    tdr: int
    page: int
    td: Td
    source: int  # bus address of the page


@seamcall(_EXTEND)
def mr_extend(call: Call) -> None:
    """TDH.MR.EXTEND: extend MRTD with 256 bytes of a page that was added, before TDH.MR.FINALIZE.

    In: RCX = GPA (256-byte aligned), RDX = TDR. Out: RCX, RDX = the entry met, when it maps nothing.

    Errors in order: those of `open_td` (TDR locked exclusively); OPERAND_INVALID RCX; EPT_ENTRY_NOT_PRESENT RCX
    (nothing mapped), EPT_ENTRY_NOT_PRESENT (mapped, but not in state MAPPED).
    """
    regs = call.regs
    gpa, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    again: _Again | None = call.again
    if again is not None and again.tdr == tdr and again.page == gpa & ~0xF00 and call.held.take_watched(tdr):
        # The next bytes of a page, and no leaf has worked on the TD since: what was checked then still holds.
        measure.extend(again.td, gpa, again.source + (gpa & 0xF00))
        return
    td = open_td(call, tdr, _EXTEND, RDX, EXCLUSIVE, NO_LOCK)
    if gpa & (measure.CHUNK - 1):
        raise operand_invalid(Operand.RCX)
    _, entry, level = sept.walk_to_leaf(td, gpa)
    if entry & STATE_MASK not in _STATES:
        raise LeafError(Status.EPT_ENTRY_NOT_PRESENT)
    source = sept.leaf_hpa(entry, gpa, level)
    measure.extend(td, gpa, source)
    call.again = _Again(tdr, gpa & ~0xF00, td, source & ~0xF00)
    call.held.watch(tdr)
