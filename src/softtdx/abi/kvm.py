"""KVM's interface as user space sees it, in numbers: VM types, ioctls, capabilities, exit reasons, flags.

Kernel: Documentation/virt/kvm/api.rst and x86/intel-tdx.rst, arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h
(6.16 and later). The structures are in `kvm_structs`, struct kvm_run is in `kvm_run`.
"""

from enum import IntEnum, IntFlag
from typing import Final

KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
KVM_X86_TDX_VM: Final = 5
KVM_API_VERSION: Final = 12

MAX_CPUID_ENTRIES: Final = 256
MAX_IO_MSRS: Final = 256  # of one KVM_GET_MSRS
MAX_IRQ_ROUTES: Final = 4096
MAX_XCRS: Final = 16


class TdxCommand(IntEnum):
    """struct kvm_tdx_cmd.id of KVM_MEMORY_ENCRYPT_OP."""

    CAPABILITIES = 0
    INIT_VM = 1
    INIT_VCPU = 2
    INIT_MEM_REGION = 3
    FINALIZE_VM = 4
    GET_CPUID = 5


_KVMIO: Final = 0xAE
_SIZE_SHIFT, _SIZE_BITS = 16, 14


def _io(direction: int, number: int, size: int) -> int:
    """_IO, _IOW (direction 1), _IOR (2) and _IOWR (3) of asm-generic/ioctl.h with KVM's type 0xAE."""
    return direction << 30 | size << _SIZE_SHIFT | _KVMIO << 8 | number


def argument_size(request: int) -> int:
    """The size in bytes of a request's argument, as its number says."""
    return request >> _SIZE_SHIFT & (1 << _SIZE_BITS) - 1


class KvmIoctl(IntEnum):
    """Request numbers of ioctl(2) on /dev/kvm, a VM and a vCPU; the size in them is that of the argument."""

    GET_API_VERSION = _io(0, 0x00, 0)
    CREATE_VM = _io(0, 0x01, 0)
    GET_MSR_INDEX_LIST = _io(3, 0x02, 4)
    CHECK_EXTENSION = _io(0, 0x03, 0)
    GET_VCPU_MMAP_SIZE = _io(0, 0x04, 0)
    GET_SUPPORTED_CPUID = _io(3, 0x05, 8)
    GET_MSR_FEATURE_INDEX_LIST = _io(3, 0x0A, 4)
    CREATE_VCPU = _io(0, 0x41, 0)
    GET_DIRTY_LOG = _io(1, 0x42, 16)
    SET_USER_MEMORY_REGION = _io(1, 0x46, 32)
    SET_TSS_ADDR = _io(0, 0x47, 0)
    SET_IDENTITY_MAP_ADDR = _io(1, 0x48, 8)
    SET_USER_MEMORY_REGION2 = _io(1, 0x49, 160)
    CREATE_IRQCHIP = _io(0, 0x60, 0)
    IRQ_LINE = _io(1, 0x61, 8)
    IRQ_LINE_STATUS = _io(3, 0x67, 8)
    SET_GSI_ROUTING = _io(1, 0x6A, 8)
    IRQFD = _io(1, 0x76, 32)
    SET_BOOT_CPU_ID = _io(0, 0x78, 0)
    IOEVENTFD = _io(1, 0x79, 64)
    RUN = _io(0, 0x80, 0)
    GET_REGS = _io(2, 0x81, 144)
    SET_REGS = _io(1, 0x82, 144)
    GET_SREGS = _io(2, 0x83, 312)
    SET_SREGS = _io(1, 0x84, 312)
    TRANSLATE = _io(3, 0x85, 24)
    INTERRUPT = _io(1, 0x86, 4)
    GET_MSRS = _io(3, 0x88, 8)
    SET_MSRS = _io(1, 0x89, 8)
    GET_FPU = _io(2, 0x8C, 416)
    SET_FPU = _io(1, 0x8D, 416)
    GET_LAPIC = _io(2, 0x8E, 1024)
    SET_LAPIC = _io(1, 0x8F, 1024)
    SET_CPUID2 = _io(1, 0x90, 8)
    GET_CPUID2 = _io(3, 0x91, 8)
    GET_MP_STATE = _io(2, 0x98, 4)
    SET_MP_STATE = _io(1, 0x99, 4)
    NMI = _io(0, 0x9A, 0)
    SET_GUEST_DEBUG = _io(1, 0x9B, 72)
    GET_VCPU_EVENTS = _io(2, 0x9F, 64)
    SET_VCPU_EVENTS = _io(1, 0xA0, 64)
    GET_DEBUGREGS = _io(2, 0xA1, 128)
    SET_DEBUGREGS = _io(1, 0xA2, 128)
    SET_TSC_KHZ = _io(0, 0xA2, 0)
    ENABLE_CAP = _io(1, 0xA3, 104)
    GET_TSC_KHZ = _io(0, 0xA3, 0)
    GET_XSAVE = _io(2, 0xA4, 4096)
    SET_XSAVE = _io(1, 0xA5, 4096)
    SIGNAL_MSI = _io(1, 0xA5, 32)
    GET_XCRS = _io(2, 0xA6, 392)
    SET_XCRS = _io(1, 0xA7, 392)
    MEMORY_ENCRYPT_OP = _io(3, 0xBA, 8)
    CLEAR_DIRTY_LOG = _io(3, 0xC0, 24)
    GET_SREGS2 = _io(2, 0xCC, 320)
    SET_SREGS2 = _io(1, 0xCD, 320)
    GET_XSAVE2 = _io(2, 0xCF, 4096)
    SET_MEMORY_ATTRIBUTES = _io(1, 0xD2, 32)
    CREATE_GUEST_MEMFD = _io(3, 0xD4, 64)
    PRE_FAULT_MEMORY = _io(3, 0xD5, 64)


class KvmExit(IntEnum):
    """struct kvm_run.exit_reason."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    X86_BUS_LOCK = 33
    NOTIFY = 37
    MEMORY_FAULT = 39
    TDX = 40


class MpState(IntEnum):
    """struct kvm_mp_state.mp_state."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class VcpuEventFlag(IntFlag):
    """struct kvm_vcpu_events.flags: which members are meant."""

    VALID_NMI_PENDING = 1 << 0
    VALID_SIPI_VECTOR = 1 << 1
    VALID_SHADOW = 1 << 2
    VALID_SMM = 1 << 3
    VALID_PAYLOAD = 1 << 4
    VALID_TRIPLE_FAULT = 1 << 5


SHADOW_INT_MOV_SS: Final = 1  # struct kvm_vcpu_events.interrupt.shadow
SHADOW_INT_STI: Final = 2
SREGS2_PDPTRS_VALID: Final = 1 << 0

MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
INIT_MEM_REGION_MEASURE: Final = 1 << 0  # struct kvm_tdx_cmd.flags of INIT_MEM_REGION: MR.EXTEND what is added
MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
SYSTEM_EVENT_SHUTDOWN: Final = 1
SYSTEM_EVENT_RESET: Final = 2
SYSTEM_EVENT_CRASH: Final = 3
SYSTEM_EVENT_TDX_FATAL: Final = 7
GUEST_MEMFD_FLAG_HUGETLB: Final = 1 << 1  # these three as in the posted series; the kernel has no such flags yet
GUESTMEM_HUGETLB_FLAG_2MB: Final = 21 << 58
GUESTMEM_HUGETLB_FLAG_1GB: Final = 30 << 58
INTERNAL_ERROR_EMULATION: Final = 1
INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
HC_MAP_GPA_RANGE: Final = 12
MAP_GPA_RANGE_PAGE_SZ_4K: Final = 0
MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4
EXIT_HYPERCALL_LONG_MODE: Final = 1 << 0
EXIT_IO_IN: Final = 0
EXIT_IO_OUT: Final = 1
CPUID_FLAG_SIGNIFICANT_INDEX: Final = 1 << 0


class MemorySlotFlag(IntFlag):
    """Flags of a memory slot."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


class IrqfdFlag(IntFlag):
    """struct kvm_irqfd.flags."""

    DEASSIGN = 1 << 0
    RESAMPLE = 1 << 1


class IoeventfdFlag(IntFlag):
    """struct kvm_ioeventfd.flags."""

    DATAMATCH = 1 << 0
    PIO = 1 << 1
    DEASSIGN = 1 << 2
    VIRTIO_CCW_NOTIFY = 1 << 3  # s390's; the kernel takes it everywhere


class IrqRoutingType(IntEnum):
    """struct kvm_irq_routing_entry.type."""

    IRQCHIP = 1
    MSI = 2


class MsrExitReason(IntFlag):
    """Why KVM_EXIT_X86_RDMSR came, and what KVM_CAP_X86_USER_SPACE_MSR asks for."""

    INVAL = 1 << 0
    UNKNOWN = 1 << 1
    FILTER = 1 << 2


class KvmCap(IntEnum):
    """Capabilities a VMM asks for."""

    USER_MEMORY = 3
    EXT_CPUID = 7
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    MP_STATE = 14
    DESTROY_MEMORY_REGION_WORKS = 21
    USER_NMI = 22
    IRQ_ROUTING = 25
    JOIN_MEMORY_REGIONS_WORKS = 30
    IRQFD = 32
    SET_BOOT_CPU_ID = 34
    IOEVENTFD = 36
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    TSC_DEADLINE_TIMER = 72
    SIGNAL_MSI = 77
    ENABLE_CAP_VM = 98
    IOEVENTFD_NO_LENGTH = 100
    CHECK_EXTENSION_VM = 105
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    MAX_VCPU_ID = 128
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    GET_MSR_FEATURES = 153
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    X86_USER_SPACE_MSR = 188
    SREGS2 = 200
    EXIT_HYPERCALL = 201
    XSAVE2 = 208
    VM_TSC_CONTROL = 214
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    X86_APIC_BUS_CYCLES_NS = 237
