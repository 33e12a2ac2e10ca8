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


def _io(direction: int, number: int, size: int) -> int:
    """_IO, _IOW (direction 1), _IOR (2) and _IOWR (3) of asm-generic/ioctl.h with KVM's type 0xAE."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


class KvmIoctl(IntEnum):
    """Request numbers of ioctl(2) on /dev/kvm, a VM and a vCPU; the size in them is that of the argument."""

    GET_API_VERSION = _io(0, 0x00, 0)
    CREATE_VM = _io(0, 0x01, 0)
    CHECK_EXTENSION = _io(0, 0x03, 0)
    GET_SUPPORTED_CPUID = _io(3, 0x05, 8)
    CREATE_VCPU = _io(0, 0x41, 0)
    GET_DIRTY_LOG = _io(1, 0x42, 16)
    SET_USER_MEMORY_REGION = _io(1, 0x46, 32)
    SET_USER_MEMORY_REGION2 = _io(1, 0x49, 160)
    RUN = _io(0, 0x80, 0)
    GET_REGS = _io(2, 0x81, 144)
    SET_REGS = _io(1, 0x82, 144)
    GET_SREGS = _io(2, 0x83, 312)
    SET_SREGS = _io(1, 0x84, 312)
    GET_FPU = _io(2, 0x8C, 416)
    SET_FPU = _io(1, 0x8D, 416)
    SET_CPUID2 = _io(1, 0x90, 8)
    GET_CPUID2 = _io(3, 0x91, 8)
    GET_DEBUGREGS = _io(2, 0xA1, 128)
    SET_DEBUGREGS = _io(1, 0xA2, 128)
    ENABLE_CAP = _io(1, 0xA3, 104)
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
    MANUAL_DIRTY_LOG_PROTECT2 = 168
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


class UserspaceMemoryRegion(Wire, size=32):
    """struct kvm_userspace_memory_region."""

    slot = uint(0, 4)
    flags = uint(4, 4)
    guest_phys_addr = uint(8, 8)
    memory_size = uint(16, 8)
    userspace_addr = uint(24, 8)


class DirtyLog(Wire, size=16):
    """struct kvm_dirty_log: `dirty_bitmap` is a user address."""

    slot = uint(0, 4)
    dirty_bitmap = uint(8, 8)


class ClearDirtyLog(Wire, size=24):
    """struct kvm_clear_dirty_log."""

    slot = uint(0, 4)
    num_pages = uint(4, 4)
    first_page = uint(8, 8)
    dirty_bitmap = uint(16, 8)


class CreateGuestMemfd(Wire, size=64):
    """struct kvm_create_guest_memfd; bytes 16 to 63 are reserved."""

    size = uint(0, 8)
    flags = uint(8, 8)


class PreFaultMemory(Wire, size=64):
    """struct kvm_pre_fault_memory; on return `gpa` and `size` say what is left. Bytes 24 to 63 must be 0."""

    gpa = uint(0, 8)
    size = uint(8, 8)
    flags = uint(16, 8)


class EnableCap(Wire, size=104):
    """struct kvm_enable_cap."""

    cap = uint(0, 4)
    flags = uint(4, 4)
    args = uints(8, 8, 4)


class Msi(Wire, size=32):
    """struct kvm_msi."""

    address_lo = uint(0, 4)
    address_hi = uint(4, 4)
    data = uint(8, 4)
    flags = uint(12, 4)
    devid = uint(16, 4)


class RegsStruct(Wire, size=144):
    """struct kvm_regs: `gprs` as it has them, rax rbx rcx rdx rsi rdi rsp rbp r8 to r15."""

    gprs = uints(0, 8, 16)
    rip = uint(128, 8)
    rflags = uint(136, 8)


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
