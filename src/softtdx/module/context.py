"""What a leaf function works on: one `Call` for each logical processor, the module's per-LP data.

A logical processor serves one SEAMCALL at a time, so its `Call` is made once and used again for every call.
"""

from typing import TYPE_CHECKING, Any

from softtdx.hw.isa import HeldLocks, SeamCpu
from softtdx.hw.registers import Registers

from .errors import LeafError
from .locks import LockTable

if TYPE_CHECKING:
    from .state import GlobalState

__all__ = ["Call"]


class Call:
    """The SEAMCALL that a logical processor is serving, and what the module keeps for that processor.

    `cpu`: the instructions; `regs`: the host's registers, operands in and results out; `g`: the module's global
    data. `version` is the leaf's version (RAX bits 23:16). `held` lists the locks that the dispatcher releases when
    the leaf is over, whichever way it ends. `busy`: the processor is in SEAM mode, in the module or in a TD.

    Per-LP data: `lp_initialized` (TDH.SYS.LP.INIT was done); `vp`: what VP.ENTER keeps (last TDVPR and so on);
    `again`: what MR.EXTEND keeps for the next 256 bytes of a page.
    """

    __slots__ = (
        "again",
        "busy",
        "cpu",
        "g",
        "held",
        "locks",
        "lp_initialized",
        "module",
        "regs",
        "version",
        "vp",
    )

    def __init__(self, module: Any, g: "GlobalState", cpu: SeamCpu) -> None:
        """An idle, uninitialised logical processor."""
        self.module = module
        self.g = g
        self.locks: LockTable = g.locks
        self.cpu = cpu
        self.regs = Registers()
        self.version = 0
        self.busy = False
        self.again: Any = None
        self.held = HeldLocks(g.locks.words)
        self.lp_initialized = False
        self.vp: Any = None

    def alone(self) -> bool:
        """Whether no other processor is in SEAM mode."""
        return not any(other.busy and other is not self for other in tuple(self.module.calls.values()))

    def lock(self, key: int, exclusive: bool, operand: int, *, guest: bool = False) -> None:
        """Take a lock for the rest of the leaf. LeafError OPERAND_BUSY[_HOST_PRIORITY] with `operand`."""
        if not self.held.take(key, exclusive):
            busy = self.locks.acquire(key, exclusive, guest)
            if busy:
                raise LeafError(busy, operand)
            self.held.note(key, exclusive)

    def unlock(self, key: int, exclusive: bool) -> None:
        """Give a lock back before the leaf is over."""
        self.held.release(key, exclusive)

    def release_since(self, mark: int) -> None:
        """Give back the locks taken since `len(call.held)` was `mark`: a TDCALL ends, the vCPU's own locks stay."""
        self.held.release_to(mark)

    def release_all(self) -> None:
        """Give back every lock of this leaf, the last first."""
        self.held.release_to()
