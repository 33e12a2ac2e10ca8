"""What VMX leaves in the processor across VM exits: FPU state, debug registers and the MSRs a guest uses directly.

It stays there, since the same vCPU mostly comes back (KVM: fpregs and user-return MSRs). Whoever else wants the
processor first saves it for its owner.
"""

from typing import Final
from weakref import WeakKeyDictionary

from softtdx.abi.msrs import Msr
from softtdx.hw import LogicalProcessor
from softtdx.kvm.memory import HostMemory

__all__ = ["XSTATE_KEPT", "LeftInProcessor", "evict"]

_MSRS: Final = (0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102, 0xC000_0103, Msr.XSS, Msr.SPEC_CTRL)
_RESET_MSR: Final = 0
XSTATE_KEPT: Final = 0x203
"""State components that the simulated processor has: x87, SSE and PKRU."""
_XCR0_RESET: Final = 1
_DR_RESET: Final = (0, 0, 0, 0, 0xFFFF_0FF0)

_owners: "WeakKeyDictionary[LogicalProcessor, LeftInProcessor]" = WeakKeyDictionary()
"""Whose state is in a logical processor."""


class LeftInProcessor:
    """One vCPU's state of this kind: in the processor named by `lp`, or in memory while that is None."""

    def __init__(self, memory: HostMemory) -> None:
        """The state after reset."""
        self._memory = memory
        self.area = memory.alloc(zero=True)
        self.lp: LogicalProcessor | None = None
        self._saved = False
        self._xcr0 = _XCR0_RESET
        self._cr2 = 0
        self._dr = list(_DR_RESET)
        self._msrs = dict.fromkeys(_MSRS, _RESET_MSR)

    def free(self) -> None:
        """Give the XSAVE area back."""
        if self.lp is not None and _owners.get(self.lp) is self:
            del _owners[self.lp]
        self._memory.free(self.area)

    def load(self, lp: LogicalProcessor) -> None:
        """Bring the state into `lp`, on which the caller runs."""
        if _owners.get(lp) is self:
            return
        evict(lp)
        core = lp.core
        if self._saved:
            core.xrstor(self.area, XSTATE_KEPT)
        else:
            core.xinit(XSTATE_KEPT)
        core.xcr0, core.cr2, core.dr = self._xcr0, self._cr2, self._dr
        for msr, value in self._msrs.items():
            core.wrmsr(msr, value)
        _owners[lp], self.lp = self, lp

    def save(self, lp: LogicalProcessor) -> None:
        """Take the state out of `lp`."""
        core = lp.core
        self._memory.zero(self.area)
        core.xsave(self.area, XSTATE_KEPT)
        self._xcr0, self._cr2, self._dr = core.xcr0, core.cr2, core.dr
        for msr in _MSRS:
            self._msrs[msr] = core.rdmsr(msr) or 0
        self._saved, self.lp = True, None
        _owners.pop(lp, None)


def evict(lp: LogicalProcessor) -> None:
    """Save what a vCPU left in `lp`, on which the caller runs."""
    owner = _owners.get(lp)
    if owner is not None:
        owner.save(lp)
