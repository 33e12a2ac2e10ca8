"""KVM's TDX interface as user space sees it: VM type, KVM_TDX_* commands, exit reasons, structures.

Kernel: Documentation/virt/kvm/x86/intel-tdx.rst, arch/x86/include/uapi/asm/kvm.h, include/uapi/linux/kvm.h (6.16 and
later). Numbers and layouts only; structures with a trailing array hold their fixed head.
"""

from enum import IntEnum, IntFlag
from typing import Final

from softtdx.abi.wire import Wire, raw, uint, uints

KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
KVM_X86_TDX_VM: Final = 5
KVM_API_VERSION: Final = 12


class TdxCommand(IntEnum):
    """struct kvm_tdx_cmd.id of KVM_MEMORY_ENCRYPT_OP."""

    CAPABILITIES = 0
    INIT_VM = 1
    INIT_VCPU = 2
    INIT_MEM_REGION = 3
    FINALIZE_VM = 4
    GET_CPUID = 5


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


MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3
INIT_MEM_REGION_MEASURE: Final = 1 << 0  # struct kvm_tdx_cmd.flags of INIT_MEM_REGION: MR.EXTEND what is added
MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3
SYSTEM_EVENT_SHUTDOWN: Final = 1
SYSTEM_EVENT_RESET: Final = 2
SYSTEM_EVENT_CRASH: Final = 3
SYSTEM_EVENT_TDX_FATAL: Final = 7
HC_MAP_GPA_RANGE: Final = 12
MAP_GPA_RANGE_PAGE_SZ_4K: Final = 0
MAP_GPA_RANGE_ENCRYPTED: Final = 1 << 4


class MemorySlotFlag(IntFlag):
    """Flags of a memory slot."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


class KvmCap(IntEnum):
    """Capabilities a TDX VMM asks for."""

    MAX_VCPUS = 66
    X2APIC_API = 129
    SPLIT_IRQCHIP = 121
    EXIT_HYPERCALL = 201
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    X86_APIC_BUS_CYCLES_NS = 237


class TdxCmd(Wire, size=24):
    """struct kvm_tdx_cmd: the argument of KVM_MEMORY_ENCRYPT_OP. `hw_error` returns the SEAMCALL status on -EIO."""

    id = uint(0, 4)
    flags = uint(4, 4)
    data = uint(8, 8)
    hw_error = uint(16, 8)


class CpuidEntry2(Wire, size=40):
    """struct kvm_cpuid_entry2."""

    function = uint(0, 4)
    index = uint(4, 4)
    flags = uint(8, 4)
    eax = uint(12, 4)
    ebx = uint(16, 4)
    ecx = uint(20, 4)
    edx = uint(24, 4)


CPUID_FLAG_SIGNIFICANT_INDEX: Final = 1 << 0


class Cpuid2Head(Wire, size=8):
    """struct kvm_cpuid2 before its entries."""

    nent = uint(0, 4)


class TdxCapabilitiesHead(Wire, size=2048):
    """struct kvm_tdx_capabilities before its struct kvm_cpuid2."""

    supported_attrs = uint(0, 8)
    supported_xfam = uint(8, 8)
    kernel_tdvmcallinfo_1_r11 = uint(16, 8)
    user_tdvmcallinfo_1_r11 = uint(24, 8)
    kernel_tdvmcallinfo_1_r12 = uint(32, 8)
    user_tdvmcallinfo_1_r12 = uint(40, 8)


class TdxInitVmHead(Wire, size=256):
    """struct kvm_tdx_init_vm before its struct kvm_cpuid2; bytes 160 to 255 are reserved."""

    attributes = uint(0, 8)
    xfam = uint(8, 8)
    mrconfigid = raw(16, 48)
    mrowner = raw(64, 48)
    mrownerconfig = raw(112, 48)


class TdxInitMemRegion(Wire, size=24):
    """struct kvm_tdx_init_mem_region: `nr_pages` of user memory at `source_addr` become private pages from `gpa`."""

    source_addr = uint(0, 8)
    gpa = uint(8, 8)
    nr_pages = uint(16, 8)


class UserspaceMemoryRegion2(Wire, size=160):
    """struct kvm_userspace_memory_region2."""

    slot = uint(0, 4)
    flags = uint(4, 4)
    guest_phys_addr = uint(8, 8)
    memory_size = uint(16, 8)
    userspace_addr = uint(24, 8)
    guest_memfd_offset = uint(32, 8)
    guest_memfd = uint(40, 4)


class MemoryAttributes(Wire, size=32):
    """struct kvm_memory_attributes."""

    address = uint(0, 8)
    size = uint(8, 8)
    attributes = uint(16, 8)
    flags = uint(24, 8)


class MemoryFaultExit(Wire, size=24):
    """kvm_run.memory_fault."""

    flags = uint(0, 8)
    gpa = uint(8, 8)
    size = uint(16, 8)


class HypercallExit(Wire, size=72):
    """kvm_run.hypercall."""

    nr = uint(0, 8)
    args = uints(8, 8, 6)
    ret = uint(56, 8)
    flags = uint(64, 8)


class TdxExit(Wire, size=64):
    """kvm_run.tdx: a TDVMCALL left to user space; `nr` is its leaf, `data` as the views below say."""

    flags = uint(0, 8)
    nr = uint(8, 8)
    ret = uint(16, 8)
    data = uints(24, 8, 5)


class TdxGetQuoteExit(Wire, size=40):
    """kvm_run.tdx with `nr` GetQuote: `gpa` without the shared bit, `size` of the buffer."""

    flags = uint(0, 8)
    nr = uint(8, 8)
    ret = uint(16, 8)
    gpa = uint(24, 8)
    size = uint(32, 8)


class TdxGetInfoExit(Wire, size=64):
    """kvm_run.tdx with `nr` GetTdVmCallInfo."""

    flags = uint(0, 8)
    nr = uint(8, 8)
    ret = uint(16, 8)
    leaf = uint(24, 8)
    r11 = uint(32, 8)
    r12 = uint(40, 8)
    r13 = uint(48, 8)
    r14 = uint(56, 8)


class TdxSetupNotifyExit(Wire, size=32):
    """kvm_run.tdx with `nr` SetupEventNotifyInterrupt."""

    flags = uint(0, 8)
    nr = uint(8, 8)
    ret = uint(16, 8)
    vector = uint(24, 8)
