"""What the module keeps for a logical processor between calls about vCPUs: its VMCS and the vCPU that ran last."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from softtdx.abi.msrs import Msr

from ..context import Call

if TYPE_CHECKING:
    from .resident import Resident

__all__ = ["LpState", "lp_state"]

NO_VMCS: Final = (1 << 64) - 1
PAGE: Final = 4096
REVISION_MASK: Final = 0x7FFF_FFFF


class LpState:
    """Per-LP data: `last_tdvpr` is the vCPU that ran here last, 0 for none; `residents` those known here."""

    __slots__ = ("_cpu", "_host_vmcs", "_seam_vmcs", "last_tdvpr", "residents")

    def __init__(self, call: Call) -> None:
        """A processor on which no vCPU has run."""
        cpu = call.cpu
        self._cpu = cpu
        self._host_vmcs = NO_VMCS
        self._seam_vmcs = call.g.seamrr[0] + PAGE * (cpu.apic_id + 1)
        self.last_tdvpr = 0
        self.residents: dict[int, Resident] = {}  # by TDVPR
        revision = call.g.platform.msrs[Msr.VMX_BASIC] & REVISION_MASK
        if cpu.rd32(self._seam_vmcs) != revision:
            cpu.wr32(self._seam_vmcs, revision)

    def load_vmcs(self, region: int) -> None:
        """VMPTRLD of a TD VMCS; `unload_vmcs` must follow."""
        self._host_vmcs = self._cpu.core.vmptrst()
        self._cpu.vmptrld(region)

    def unload_vmcs(self) -> None:
        """Back to the VMCS that was current, or this processor's SEAM transfer VMCS when the host had none."""
        self._cpu.vmptrld(self._seam_vmcs if self._host_vmcs == NO_VMCS else self._host_vmcs)

    @contextmanager
    def td_vmcs(self, region: int) -> Iterator[None]:
        """A TD VMCS is current within the block."""
        self.load_vmcs(region)
        try:
            yield
        finally:
            self.unload_vmcs()

    def clear_vmcs(self, region: int) -> None:
        """VMCLEAR: write back and forget."""
        self._cpu.vmclear(region)


def lp_state(call: Call) -> LpState:
    """The per-LP data of the processor that serves `call`."""
    state: LpState | None = call.vp
    if state is None:
        state = call.vp = LpState(call)
    return state
