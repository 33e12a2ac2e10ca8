"""TLB tracking: TD epochs (TDX Module Base Spec, "TLB Tracking").

TDCS holds TD_EPOCH and two counters: how many vCPUs run that entered in an even and in an odd epoch. Blocking a range
writes the epoch into PAMT.BEPOCH; once the epoch has advanced and the vCPUs of that epoch have left, no processor can
hold a translation of the range.
"""

import struct
from typing import Final

from softtdx.abi import opstate
from softtdx.abi.status import Status

from . import tdcs
from .errors import LeafError
from .ids import TD_EPOCH
from .td import EXCLUSIVE, LockId, Td

_TRACKING_STATES: Final = frozenset(int(state) for state in opstate.TLB_TRACKING_REQUIRED)
_EPOCH: Final = struct.Struct("<Q2H")
_EPOCH_LOCK: Final = LockId.EPOCH
_MIGRATION_FLAG: Final = 1 << 63  # BEPOCH holds a migration epoch


def current(td: Td) -> int:
    """TD_EPOCH."""
    return td.call.cpu.rd64(td.p0 + tdcs.TD_EPOCH)


def may_run(td: Td) -> bool:
    """Whether the TD may have running vCPUs, so that what is taken from it must have been blocked and tracked."""
    return td.op_state in _TRACKING_STATES


def is_tracked(td: Td, bepoch: int) -> bool:
    """Whether no processor can hold a translation of a page blocked in epoch `bepoch`."""
    if bepoch & _MIGRATION_FLAG:
        return False
    # One load, as the real module's is: the epoch and its counters belong together.
    epoch, even, odd = _EPOCH.unpack(td.call.cpu.read(td.p0 + tdcs.TD_EPOCH, _EPOCH.size))
    if bepoch == epoch - 1:
        return not (odd if bepoch & 1 else even)
    return bool(bepoch < epoch - 1)


def advance(td: Td) -> None:
    """TDH.MEM.TRACK: begin the next epoch. LeafError OPERAND_BUSY TD_EPOCH, PREVIOUS_TLB_EPOCH_BUSY."""
    td.lock(_EPOCH_LOCK, EXCLUSIVE, TD_EPOCH)
    cpu = td.call.cpu
    epoch, even, odd = _EPOCH.unpack(cpu.read(td.p0 + tdcs.TD_EPOCH, _EPOCH.size))
    if even if epoch & 1 else odd:
        raise LeafError(Status.PREVIOUS_TLB_EPOCH_BUSY)
    cpu.wr64(td.p0 + tdcs.TD_EPOCH, epoch + 1)
