"""A vCPU that was entered on this logical processor before: its control structures, found already.

When it is entered again the same locks are taken and the words on which the checks decided are read again; only the
way to them is known. Nothing else can have changed: a vCPU that is associated with a processor keeps its pages until
TDH.VP.FLUSH on that processor, where it is resident no more.
"""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.opstate import HOST_MASKS

from .. import tdcs, tdr
from ..context import Call
from ..pamt import PamtPage
from .guest import Guest

__all__ = ["Resident"]

HEAD_BEFORE_COUNT: Final = slice(0, tdr.CHLDCNT)  # FATAL, NUM_TDCX
HEAD_AFTER_COUNT: Final = slice(tdr.CHLDCNT + 8, tdr.HEAD_SIZE)  # LIFECYCLE_STATE, pages, HKID
ENTERABLE: Final = HOST_MASKS[SeamcallLeaf.VP_ENTER]


class Resident:
    """`guest` on its processor, with the locks that VP.ENTER holds for it."""

    __slots__ = ("_address", "_after", "_before", "_first", "_held", "_op_state", "_tdr", "guest")

    def __init__(self, call: Call, tdvpr: PamtPage, guest: Guest) -> None:
        """`call` holds the locks of VP.ENTER, and every check of pages and states has passed."""
        td = guest.td
        self.guest = guest
        self._held = call.held.entries()  # all of them shared
        self._address, self._first = tdvpr.address, tdvpr.first
        self._tdr = td.tdr
        self._op_state = td.p0 + tdcs.OP_STATE
        head = call.cpu.read(td.tdr, tdr.HEAD_SIZE)
        self._before, self._after = head[HEAD_BEFORE_COUNT], head[HEAD_AFTER_COUNT]

    def lock(self, call: Call) -> bool:
        """Take the locks again. False, and nothing is held, when anything is not as it was: check step by step."""
        cpu = call.cpu
        if not call.held.take_all(self._held):  # one is held exclusively, or marked by a waiting host
            return False
        head = cpu.read(self._tdr, tdr.HEAD_SIZE)
        if (
            cpu.rd64(self._address) == self._first
            and head[HEAD_AFTER_COUNT] == self._after
            and head[HEAD_BEFORE_COUNT] == self._before
            and ENTERABLE >> cpu.rd32(self._op_state) & 1
        ):
            return True
        call.release_all()
        return False
