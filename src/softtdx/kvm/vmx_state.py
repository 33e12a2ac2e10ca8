"""What VMX leaves in the processor across VM exits: FPU state, debug registers and the MSRs a guest uses directly.

It stays there, since the same vCPU mostly comes back (KVM: fpregs and user-return MSRs). Whoever else wants the
processor first saves it for its owner.
"""

import errno
from typing import Final
from weakref import WeakKeyDictionary

from softtdx.abi.msrs import Msr
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import HostMemory

__all__ = ["MSRS_IN_PROCESSOR", "XSTATE_KEPT", "LeftInProcessor", "evict"]

MSRS_IN_PROCESSOR: Final = (
    Msr.STAR, Msr.LSTAR, Msr.CSTAR, Msr.FMASK, Msr.KERNEL_GS_BASE, Msr.TSC_AUX, Msr.XSS, Msr.SPEC_CTRL,
)  # fmt: skip
_RESET_MSR: Final = 0
XSTATE_KEPT: Final = 0x203
"""State components that the simulated processor has: x87, SSE and PKRU."""
_XCR0_RESET: Final = 1
_IMAGE_SIZE: Final = 4096
_HEADER, _HEADER_END = 512, 576  # XSTATE_BV, XCOMP_BV, 48 reserved bytes
_X87, _SSE = 1, 2
_FCW_RESET, _MXCSR_RESET, _MXCSR_VALID = 0x37F, 0x1F80, 0xFFFF
_MXCSR_AT, _XMM_AT, _XMM_END = 24, 160, 416
_COMPACTED: Final = 1 << 63
_PKRU: Final = 1 << 9
_PKRU_AT, _PKRU_SIZE = 2688, 8  # in the standard format (CPUID 0DH, 9); compacted it follows the header
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
        self._msrs = dict.fromkeys(MSRS_IN_PROCESSOR, _RESET_MSR)

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
        for msr in MSRS_IN_PROCESSOR:
            self._msrs[msr] = core.rdmsr(msr) or 0
        self._saved, self.lp = True, None
        _owners.pop(lp, None)

    # --- for user space
    def image(self) -> bytes:
        """The state in the standard format of XSAVE. It is in a processor, on which the caller runs."""
        lp = self.lp
        assert lp is not None
        self.save(lp)
        image = bytearray(self._memory.read(self.area, _IMAGE_SIZE))
        self.load(lp)
        there = int.from_bytes(image[_HEADER : _HEADER + 8], "little")
        if not there & _X87:  # a component in its initial state is not written
            image[:_MXCSR_AT] = _FCW_RESET.to_bytes(2, "little").ljust(_MXCSR_AT, b"\0")
            image[_MXCSR_AT + 8 : _XMM_AT] = bytes(_XMM_AT - _MXCSR_AT - 8)
        if not there & _SSE:
            image[_MXCSR_AT : _MXCSR_AT + 4] = _MXCSR_RESET.to_bytes(4, "little")
            image[_XMM_AT:_XMM_END] = bytes(_XMM_END - _XMM_AT)
        if there & _PKRU:
            image[_PKRU_AT : _PKRU_AT + _PKRU_SIZE] = image[_HEADER_END : _HEADER_END + _PKRU_SIZE]
        image[_HEADER_END : _HEADER_END + _PKRU_SIZE] = bytes(_PKRU_SIZE)
        image[_HEADER + 8 : _HEADER_END] = bytes(_HEADER_END - _HEADER - 8)
        return bytes(image)

    def set_image(self, lp: LogicalProcessor, image: bytes) -> None:
        """The inverse, into `lp`, which has the state. EINVAL for a header or an MXCSR that XRSTOR refuses."""
        there = int.from_bytes(image[_HEADER : _HEADER + 8], "little")
        mxcsr = int.from_bytes(image[_MXCSR_AT : _MXCSR_AT + 4], "little")
        if there & ~XSTATE_KEPT or any(image[_HEADER + 8 : _HEADER_END]) or mxcsr & ~_MXCSR_VALID:
            raise KvmError(errno.EINVAL, f"extended state with components {there:#x} and MXCSR {mxcsr:#x}")
        compacted = bytearray(image[:_IMAGE_SIZE])
        compacted[_HEADER + 8 : _HEADER + 16] = (_COMPACTED | XSTATE_KEPT).to_bytes(8, "little")
        compacted[_HEADER_END : _HEADER_END + _PKRU_SIZE] = image[_PKRU_AT : _PKRU_AT + _PKRU_SIZE]
        self._memory.write(self.area, bytes(compacted))
        lp.core.xrstor(self.area, XSTATE_KEPT)


def evict(lp: LogicalProcessor) -> None:
    """Save what a vCPU left in `lp`, on which the caller runs."""
    owner = _owners.get(lp)
    if owner is not None:
        owner.save(lp)
