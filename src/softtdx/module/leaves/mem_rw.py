"""TDH.MEM.RD and TDH.MEM.WR: eight bytes of a debug TD's private memory."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import STATE_MASK
from softtdx.abi.status import Operand, Status

from .. import sept, tdcs
from ..context import Call
from ..errors import LeafError, operand_invalid
from ..locks import SHARED
from ..registry import seamcall
from ..td import LockId, open_td

DEBUG: Final = 1  # ATTRIBUTES.DEBUG


@seamcall(SeamcallLeaf.MEM_RD)
def mem_rd(call: Call) -> None:
    """TDH.MEM.RD: read. In: RCX = GPA (8-byte aligned), RDX = TDR. Out: R8 = data; RCX, RDX on EPT errors.

    Errors in order: those of `open_td`; TD_NON_DEBUG; OPERAND_INVALID RCX (alignment); OPERAND_BUSY SEPT_TREE;
    OPERAND_INVALID RCX (GPA); EPT_ENTRY_NOT_PRESENT, OPERAND_BUSY, EPT_ENTRY_STATE_INCORRECT RCX.
    """
    _access(call, SeamcallLeaf.MEM_RD, None)


@seamcall(SeamcallLeaf.MEM_WR)
def mem_wr(call: Call) -> None:
    """TDH.MEM.WR: write. In: RCX = GPA, RDX = TDR, R8 = data. Out: R8 = what was there. Errors as TDH.MEM.RD."""
    _access(call, SeamcallLeaf.MEM_WR, call.regs.r8)


_STATES: Final = {leaf: sept.host_states(leaf) for leaf in (SeamcallLeaf.MEM_RD, SeamcallLeaf.MEM_WR)}


def _access(call: Call, leaf: SeamcallLeaf, data: int | None) -> None:
    regs = call.regs
    gpa, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = regs.r8 = 0
    td = open_td(call, tdr, leaf, Operand.RDX)
    if not td.rd64(tdcs.ATTRIBUTES) & DEBUG:
        raise LeafError(Status.TD_NON_DEBUG)
    if gpa & 7:
        raise operand_invalid(Operand.RCX)
    td.lock(LockId.SEPT, SHARED, Operand.SEPT_TREE)
    at, entry, level = sept.walk_to_leaf(td, gpa)
    cpu = call.cpu
    locked = sept.lock_host(cpu, at, entry)
    if locked < 0:
        sept.set_details(regs, entry, level, call.g.hkid_mask)
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)
    if locked & STATE_MASK not in _STATES[leaf]:
        sept.unlock(cpu, at, locked)
        sept.set_details(regs, locked, level, call.g.hkid_mask)
        raise LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
    pa = sept.leaf_hpa(locked, gpa, level)
    regs.r8 = cpu.rd64(pa)
    if data is not None:
        cpu.wr64(pa, data)
    sept.unlock(cpu, at, locked)
