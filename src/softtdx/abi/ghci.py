"""TDG.VP.VMCALL as guest and host agree on it: leaf numbers, status codes, GetQuote's buffer.

Intel TDX Guest-Hypervisor Communication Interface (GHCI) specification. R10 = 0 selects the standard leaves, R11 holds
the number; instruction leaves carry the VM-exit reason of the instruction they stand for. R10 returns the status.
"""

from enum import IntEnum
from typing import Final

from softtdx.abi.wire import Wire, uint

__all__ = ["GetQuoteHeader", "MigtdOperation", "QuoteStatus", "VmcallLeaf", "VmcallStatus", "register_mask"]


class VmcallLeaf(IntEnum):
    """TDG.VP.VMCALL leaves (R11 with R10 = 0)."""

    CPUID = 10
    HLT = 12
    IO = 30
    RDMSR = 31
    WRMSR = 32
    REQUEST_MMIO = 48
    WBINVD = 54
    PCONFIG = 65
    GET_TDVMCALL_INFO = 0x10000
    MAP_GPA = 0x10001
    GET_QUOTE = 0x10002
    REPORT_FATAL_ERROR = 0x10003
    SETUP_EVENT_NOTIFY_INTERRUPT = 0x10004
    SERVICE = 0x10005
    MIGTD = 0x10006


class VmcallStatus(IntEnum):
    """What R10 returns."""

    SUCCESS = 0
    RETRY = 1
    INVALID_OPERAND = 0x8000_0000_0000_0000
    GPA_INUSE = 0x8000_0000_0000_0001
    ALIGN_ERROR = 0x8000_0000_0000_0002
    SUBFUNC_UNSUPPORTED = 0x8000_0000_0000_0003


class MigtdOperation(IntEnum):
    """Sub-functions of VmcallLeaf.MIGTD."""

    WAIT_FOR_REQUEST = 1
    REPORT_STATUS = 2
    SEND = 3
    RECEIVE = 4


class QuoteStatus(IntEnum):
    """Status field of a GetQuote buffer."""

    SUCCESS = 0
    IN_FLIGHT = 0xFFFF_FFFF_FFFF_FFFF
    ERROR = 0x8000_0000_0000_0000
    SERVICE_UNAVAILABLE = 0x8000_0000_0000_0001


class GetQuoteHeader(Wire, size=24):
    """Head of the shared buffer of GetQuote; the TDREPORT, later the quote, follows."""

    version = uint(0, 8)
    status = uint(8, 8)
    in_len = uint(16, 4)
    out_len = uint(20, 4)


GET_QUOTE_VERSION: Final = 1

# GPR number in RCX's mask (and in exit qualifications): RSP (4) may not be passed, RAX (0) and RCX (1) never are.
GPR_NUMBERS: Final = {
    "rax": 0,
    "rcx": 1,
    "rdx": 2,
    "rbx": 3,
    "rsp": 4,
    "rbp": 5,
    "rsi": 6,
    "rdi": 7,
    "r8": 8,
    "r9": 9,
    "r10": 10,
    "r11": 11,
    "r12": 12,
    "r13": 13,
    "r14": 14,
    "r15": 15,
}
# Bits of RCX that TDG.VP.VMCALL accepts: GPRs 15:2 without RSP, XMM registers 31:16.
VMCALL_MASK: Final = 0xFFFF_FFEC
STANDARD_MASK: Final = 0xFC00  # R10 to R15, what most leaves pass


def register_mask(*names: str) -> int:
    """RCX of TDG.VP.VMCALL that passes these GPRs."""
    return sum(1 << GPR_NUMBERS[name] for name in names)
