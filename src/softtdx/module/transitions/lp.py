"""What the module keeps for a logical processor between calls about vCPUs: its VMCS and the vCPU that ran last."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..context import Call

if TYPE_CHECKING:
    from .resident import Resident

__all__ = ["LpState", "lp_state"]


class LpState:
    """Per-LP data: `last_tdvpr` is the vCPU that ran here last, 0 for none; `residents` those known here.

    The VMCS that is current in SEAM root mode stays so between calls, until TDH.VP.FLUSH clears it: no other processor
    may have it meanwhile.
    """

    __slots__ = ("_cpu", "last_tdvpr", "residents")

    def __init__(self, call: Call) -> None:
        """A processor on which no vCPU has run."""
        self._cpu = call.cpu
        self.last_tdvpr = 0
        self.residents: dict[int, Resident] = {}  # by TDVPR

    def load_vmcs(self, region: int) -> None:
        """VMPTRLD of a TD VMCS."""
        self._cpu.vmptrld(region)

    @contextmanager
    def td_vmcs(self, region: int) -> Iterator[None]:
        """A TD VMCS is current within the block."""
        self._cpu.vmptrld(region)
        yield

    def clear_vmcs(self, region: int) -> None:
        """VMCLEAR: write back and forget."""
        self._cpu.vmclear(region)


def lp_state(call: Call) -> LpState:
    """The per-LP data of the processor that serves `call`."""
    state: LpState | None = call.vp
    if state is None:
        state = call.vp = LpState(call)
    return state
