"""struct kvm_run, which a VMM maps from a vCPU's descriptor, and the page of port data behind it.

Kernel: include/uapi/linux/kvm.h; Documentation/virt/kvm/api.rst, "The kvm_run structure" (6.16 and later). Each exit
has a view over the same bytes; what user space answers, it writes there.
"""

from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from typing import Final

from softtdx.abi.kvm import EXIT_IO_OUT, MEMORY_EXIT_FLAG_PRIVATE, KvmExit
from softtdx.abi.wire import Wire, raw, uint, uints

__all__ = [
    "EXIT_AT", "MMAP_SIZE", "FailEntry", "FatalExit", "HypercallExit", "InternalError", "IoExit", "KvmRun",
    "MemoryFaultExit", "MmioExit", "MsrExit", "SystemEventExit", "TdxExit",
]  # fmt: skip

_PAGE: Final = 4096
MMAP_SIZE: Final = 2 * _PAGE  # KVM_GET_VCPU_MMAP_SIZE
EXIT_AT: Final = 32  # of the union that says more of an exit
_IO: Final = Struct("<BBHIQ")  # written as a whole: these are on the path of every exit
_MMIO: Final = Struct("<QQIB")
_VALUE: Final = Struct("<Q")
_AFTER: Final = Struct("<BBHQQ")
_AFTER_AT, _SYNC_AT = 12, 288
_NO_SYNC: Final = bytes(16)
_FATAL_WITH_GPA: Final = 1 << 63
_U32: Final = 0xFFFF_FFFF


class IoExit(Wire, size=MMAP_SIZE):
    """kvm_run.io: one port access; the data are in the page behind struct kvm_run."""

    direction = uint(EXIT_AT, 1)
    size = uint(EXIT_AT + 1, 1)
    port = uint(EXIT_AT + 2, 2)
    count = uint(EXIT_AT + 4, 4)
    data_offset = uint(EXIT_AT + 8, 8)
    data = raw(_PAGE, _PAGE)

    def put(self, write: bool, size: int, port: int, value: int = 0) -> "IoExit":
        """Fill it in; returns itself."""
        _IO.pack_into(self.view, EXIT_AT, write, size, port, 1, _PAGE)
        _VALUE.pack_into(self.view, _PAGE, value)
        return self

    @property
    def write(self) -> bool:
        """Whether the guest writes."""
        return self.direction == EXIT_IO_OUT

    @property
    def value(self) -> int:
        """What the guest writes, or is to read. User space may have changed `size`: at most 4 bytes count."""
        return int.from_bytes(self.view[_PAGE : _PAGE + min(self.size, 4)], "little")

    @value.setter
    def value(self, value: int) -> None:
        _VALUE.pack_into(self.view, _PAGE, value)


class MmioExit(Wire, size=24):
    """kvm_run.mmio: `gpa` (phys_addr), without the shared bit; `size` (len) of `data`; `is_write`."""

    gpa = uint(0, 8)
    data = raw(8, 8)
    size = uint(16, 4)
    is_write = uint(20, 1)

    def put(self, write: bool, size: int, gpa: int, value: int = 0) -> "MmioExit":
        """Fill it in; returns itself."""
        _MMIO.pack_into(self.view, 0, gpa, value, size, write)
        return self

    @property
    def write(self) -> bool:
        """Whether the guest stores."""
        return bool(self.is_write)

    @property
    def value(self) -> int:
        """What the guest stores, or is to load."""
        return int.from_bytes(self.data, "little")

    @value.setter
    def value(self, value: int) -> None:
        self.data = value.to_bytes(8, "little")


class HypercallExit(Wire, size=72):
    """kvm_run.hypercall: for a TD KVM_HC_MAP_GPA_RANGE (gpa, pages, attributes). `ret` goes back."""

    nr = uint(0, 8)
    args = uints(8, 8, 6)
    ret = uint(56, 8)
    flags = uint(64, 8)


class MemoryFaultExit(Wire, size=24):
    """kvm_run.memory_fault: user space has to change the attributes of, or back, this range."""

    flags = uint(0, 8)
    gpa = uint(8, 8)
    size = uint(16, 8)

    @property
    def private(self) -> bool:
        """Whether the access was to private memory."""
        return bool(self.flags & MEMORY_EXIT_FLAG_PRIVATE)


class TdxExit(Wire, size=64):
    """kvm_run.tdx: a TDVMCALL left to user space. `nr` is its leaf, `ret` the status to give.

    `data`: GetQuote has the GPA without the shared bit and the buffer's size; SetupEventNotifyInterrupt the vector;
    GetTdVmCallInfo the leaf, and R11 to R14 to return.
    """

    flags = uint(0, 8)
    nr = uint(8, 8)
    ret = uint(16, 8)
    data = uints(24, 8, 5)

    def put(self, nr: int, data: tuple[int, ...], ret: int) -> "TdxExit":
        """Fill it in; returns itself."""
        self.flags, self.nr, self.ret = 0, nr, ret
        self.data = (*data, *(0,) * (5 - len(data)))
        return self

    def answer_info(self, r11: int, r12: int = 0, r13: int = 0, r14: int = 0) -> None:
        """What GetTdVmCallInfo returns."""
        self.data = (self.data[0], r11, r12, r13, r14)


class SystemEventExit(Wire, size=136):
    """kvm_run.system_event; for KVM_SYSTEM_EVENT_TDX_FATAL `data` are the TD's registers in encoding order."""

    type = uint(0, 4)
    ndata = uint(4, 4)
    data = uints(8, 8, 16)


class FailEntry(Wire, size=16):
    """kvm_run.fail_entry."""

    hardware_entry_failure_reason = uint(0, 8)
    cpu = uint(8, 4)


class InternalError(Wire, size=136):
    """kvm_run.internal."""

    suberror = uint(0, 4)
    ndata = uint(4, 4)
    data = uints(8, 8, 16)


class MsrExit(Wire, size=24):
    """kvm_run.msr of KVM_EXIT_X86_RDMSR and WRMSR: user space sets `error`, or for a read `data`."""

    error = uint(0, 1)
    reason = uint(8, 4)
    index = uint(12, 4)
    data = uint(16, 8)


@dataclass(frozen=True)
class FatalExit:
    """What ReportFatalError says (GHCI): the error, the message in registers, and the GPA of more, or 0."""

    error: int
    message: bytes
    gpa: int


class KvmRun(Wire, size=MMAP_SIZE):
    """What is mapped. `detail` is beside it: what the kernel's log would say."""

    detail: str = ""

    request_interrupt_window = uint(0, 1)
    immediate_exit = uint(1, 1)
    exit_number = uint(8, 4)
    ready_for_interrupt_injection = uint(12, 1)
    if_flag = uint(13, 1)
    flags = uint(14, 2)
    cr8 = uint(16, 8)
    apic_base = uint(24, 8)
    exit = raw(EXIT_AT, 256)
    kvm_valid_regs = uint(288, 8)
    kvm_dirty_regs = uint(296, 8)
    sync_regs = raw(304, 2048)
    port_data = raw(_PAGE, _PAGE)

    @property
    def exit_reason(self) -> KvmExit:
        """Why KVM_RUN returned; the member for it is set, the others are stale."""
        try:
            return KvmExit(self.exit_number)
        except ValueError:  # user space wrote to it
            return KvmExit.UNKNOWN

    @property
    def wants_sync(self) -> bool:
        """Whether user space wants registers to be copied (KVM_CAP_SYNC_REGS)."""
        return self.view[_SYNC_AT : _SYNC_AT + len(_NO_SYNC)] != _NO_SYNC

    def put_after(self, *, ready: bool, if_flag: bool, cr8: int = 0, apic_base: int = 0) -> None:
        """What KVM_RUN says of the vCPU whenever it returns."""
        _AFTER.pack_into(self.view, _AFTER_AT, ready, if_flag, 0, cr8, apic_base)

    @cached_property
    def io(self) -> IoExit:
        """KVM_EXIT_IO."""
        return IoExit(self.view)

    @cached_property
    def mmio(self) -> MmioExit:
        """KVM_EXIT_MMIO."""
        return MmioExit(self.view, EXIT_AT)

    @cached_property
    def hypercall(self) -> HypercallExit:
        """KVM_EXIT_HYPERCALL."""
        return HypercallExit(self.view, EXIT_AT)

    @cached_property
    def memory_fault(self) -> MemoryFaultExit:
        """KVM_EXIT_MEMORY_FAULT."""
        return MemoryFaultExit(self.view, EXIT_AT)

    @cached_property
    def tdx(self) -> TdxExit:
        """KVM_EXIT_TDX."""
        return TdxExit(self.view, EXIT_AT)

    @cached_property
    def system_event(self) -> SystemEventExit:
        """KVM_EXIT_SYSTEM_EVENT."""
        return SystemEventExit(self.view, EXIT_AT)

    @cached_property
    def fail_entry(self) -> FailEntry:
        """KVM_EXIT_FAIL_ENTRY."""
        return FailEntry(self.view, EXIT_AT)

    @cached_property
    def internal(self) -> InternalError:
        """KVM_EXIT_INTERNAL_ERROR."""
        return InternalError(self.view, EXIT_AT)

    @cached_property
    def msr(self) -> MsrExit:
        """KVM_EXIT_X86_RDMSR and KVM_EXIT_X86_WRMSR."""
        return MsrExit(self.view, EXIT_AT)

    @property
    def fatal(self) -> FatalExit:
        """KVM_SYSTEM_EVENT_TDX_FATAL, taken apart: R12 the error, R13 a GPA, the text in R14, R15, RBX and so on."""
        regs = self.system_event.data
        text = b"".join(regs[i].to_bytes(8, "little") for i in (14, 15, 3, 7, 6, 8, 9, 2))
        return FatalExit(regs[12] & _U32, text.split(b"\0", 1)[0], regs[13] if regs[12] & _FATAL_WITH_GPA else 0)
