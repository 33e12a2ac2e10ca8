"""TDH.MEM.RANGE.BLOCK, UNBLOCK and TDH.MEM.TRACK: how translations are taken from a running TD."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import HPA_MASK, LEAF, STATE_MASK, TDAL_MASK, TDEL
from softtdx.abi.status import Operand, Status

from .. import epoch, sept, sept_l2
from ..context import Call
from ..errors import LeafError
from ..ids import RCX, RDX
from ..locks import EXCLUSIVE
from ..pamt import PamtPage, implicit
from ..registry import seamcall
from ..td import open_td

_BLOCK: Final = SeamcallLeaf.MEM_RANGE_BLOCK
_UNBLOCK: Final = SeamcallLeaf.MEM_RANGE_UNBLOCK
_TRACK: Final = SeamcallLeaf.MEM_TRACK
_BLOCK_STATES: Final = sept.host_states(_BLOCK)
_UNBLOCK_STATES: Final = sept.host_states(_UNBLOCK)


def _page_below(call: Call, entry: int, level: int) -> PamtPage:
    """The PAMT entry of what an S-EPT entry points to: a page of this level, or an S-EPT page."""
    pa = entry & HPA_MASK & call.g.pa_mask
    return implicit(call, pa, level if entry & LEAF else 0)


@seamcall(_BLOCK)
def mem_range_block(call: Call) -> None:
    """TDH.MEM.RANGE.BLOCK: admit no new translation through an entry, and note the TD epoch at which that was done.

    In: RCX = GPA | level (0 up to the root's), RDX = TDR. Out: RCX, RDX = the entry met, on EPT errors.

    Errors in order: those of `open_td`; those of `sept.open_entry` (tree locked exclusively);
    GPA_RANGE_ALREADY_BLOCKED or EPT_ENTRY_STATE_INCORRECT RCX.
    """
    regs = call.regs
    info, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _BLOCK, RDX)
    at, entry = sept.open_entry(call, td, info, 0, sept.TREE, EXCLUSIVE)
    level = info & 7
    cpu = call.cpu
    state = entry & STATE_MASK
    if state not in _BLOCK_STATES:
        sept.unlock(cpu, at, entry)
        sept.set_details(regs, entry, level, call.g.hkid_mask)
        already = state in sept.ANY_BLOCKED
        raise LeafError(Status.GPA_RANGE_ALREADY_BLOCKED if already else Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    blocked = sept.blocked(entry, level)
    sept.store(cpu, at, entry, blocked)
    if entry & TDAL_MASK:
        # After the L1 entry, so that an EPT violation of an L2 VM in between is seen to be the host's doing.
        sept_l2.block_all(td, entry, info, level)
    # The epoch is sampled after the entry is blocked: a vCPU that enters later in this epoch finds it blocked.
    _page_below(call, blocked, level).set_bepoch(epoch.current(td))
    sept.unlock(cpu, at, blocked)


@seamcall(_UNBLOCK)
def mem_range_unblock(call: Call) -> None:
    """TDH.MEM.RANGE.UNBLOCK: undo TDH.MEM.RANGE.BLOCK.

    In: RCX = GPA | level (0 up to the root's), RDX = TDR. Out: RCX, RDX = the entry met, on EPT errors.

    Errors in order: those of `open_td`; those of `sept.open_entry` (tree locked exclusively);
    EPT_ENTRY_STATE_INCORRECT, TLB_TRACKING_NOT_DONE RCX.
    """
    regs = call.regs
    info, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _UNBLOCK, RDX)
    at, entry = sept.open_entry(call, td, info, 0, sept.TREE, EXCLUSIVE)
    level = info & 7
    cpu = call.cpu
    try:
        if entry & STATE_MASK not in _UNBLOCK_STATES:
            sept.set_details(regs, entry, level, call.g.hkid_mask)
            raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
        sept.require_tracked(td, entry, level, _page_below(call, entry, level))
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise
    if entry & TDAL_MASK and entry & STATE_MASK not in sept.ANY_PENDING:
        sept_l2.unblock_all(td, entry, info, level)
    sept.store(cpu, at, entry, sept.unblocked(entry) & ~TDEL)


@seamcall(_TRACK)
def mem_track(call: Call) -> None:
    """TDH.MEM.TRACK: begin the TD's next epoch.

    In: RCX = TDR. Errors in order: those of `open_td`; OPERAND_BUSY TD_EPOCH; PREVIOUS_TLB_EPOCH_BUSY.
    """
    epoch.advance(open_td(call, call.regs.rcx, _TRACK, RCX))
