"""What crosses /dev/kvm: arguments of the ioctls and struct kvm_run, as Python values.

Numbers are in `softtdx.abi.kvm`. Names follow Documentation/virt/kvm/api.rst and x86/intel-tdx.rst; a VMM calls
methods instead of ioctl(2), and an errno comes as KvmError.
"""

from dataclasses import dataclass, field

from softtdx.abi.kvm import KvmExit

__all__ = [
    "CpuidEntry",
    "FatalExit",
    "HypercallExit",
    "IoExit",
    "KvmRun",
    "MemoryFaultExit",
    "MmioExit",
    "Regs",
    "Segment",
    "Sregs",
    "TdxCapabilities",
    "TdxExit",
    "TdxInitMemRegion",
    "TdxInitVm",
]


@dataclass(frozen=True)
class CpuidEntry:
    """struct kvm_cpuid_entry2; `index` is None where the subleaf is not significant."""

    function: int
    index: int | None = None
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True)
class TdxCapabilities:
    """struct kvm_tdx_capabilities; in `cpuid` the bits that may be configured are set."""

    supported_attrs: int
    supported_xfam: int
    cpuid: tuple[CpuidEntry, ...]


@dataclass(frozen=True)
class TdxInitVm:
    """struct kvm_tdx_init_vm."""

    attributes: int = 0
    xfam: int = 3
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    cpuid: tuple[CpuidEntry, ...] = ()


@dataclass(frozen=True)
class TdxInitMemRegion:
    """struct kvm_tdx_init_mem_region; `measure` is KVM_TDX_MEASURE_MEMORY_REGION."""

    source_addr: int
    gpa: int
    nr_pages: int
    measure: bool = True


# --- struct kvm_run
@dataclass
class IoExit:
    """KVM_EXIT_IO: one access. User space puts the value read into `value`."""

    write: bool
    size: int
    port: int
    value: int = 0


@dataclass
class MmioExit:
    """KVM_EXIT_MMIO."""

    write: bool
    size: int
    gpa: int
    value: int = 0


@dataclass
class HypercallExit:
    """KVM_EXIT_HYPERCALL: for a TD KVM_HC_MAP_GPA_RANGE (gpa, pages, attributes). `ret` goes back."""

    nr: int
    args: tuple[int, ...]
    ret: int = 0


@dataclass
class TdxExit:
    """KVM_EXIT_TDX: a TDVMCALL left to user space; `nr` its leaf, `data` its operands, `ret` the status to give."""

    nr: int
    data: tuple[int, ...]
    ret: int
    r11: int = 0
    r12: int = 0


@dataclass
class FatalExit:
    """KVM_EXIT_SYSTEM_EVENT of type KVM_SYSTEM_EVENT_TDX_FATAL: the registers of ReportFatalError."""

    error: int
    message: bytes
    gpa: int


@dataclass
class MemoryFaultExit:
    """KVM_EXIT_MEMORY_FAULT: user space has to change the attributes of, or back, this range."""

    gpa: int
    size: int
    private: bool


@dataclass
class KvmRun:
    """struct kvm_run: why KVM_RUN returned. The member for `exit_reason` is set, the others are stale."""

    exit_reason: KvmExit = KvmExit.UNKNOWN
    io: IoExit | None = None
    mmio: MmioExit | None = None
    hypercall: HypercallExit | None = None
    tdx: TdxExit | None = None
    fatal: FatalExit | None = None
    memory_fault: MemoryFaultExit | None = None
    detail: str = ""


# --- register state of an ordinary VM
@dataclass
class Segment:
    """struct kvm_segment, with the access rights as the VMCS has them (SDM 25.4.1)."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF_FFFF
    access: int = 1 << 16


@dataclass
class Sregs:
    """struct kvm_sregs2, as far as it is used."""

    cs: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    es: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    ldt: Segment = field(default_factory=Segment)
    gdt_base: int = 0
    gdt_limit: int = 0xFFFF
    idt_base: int = 0
    idt_limit: int = 0xFFFF
    cr0: int = 0
    cr3: int = 0
    cr4: int = 0
    efer: int = 0


@dataclass
class Regs:
    """struct kvm_regs: `gprs` in encoding order (rax, rcx, rdx, rbx, rsp, ...)."""

    gprs: tuple[int, ...] = (0,) * 16
    rip: int = 0
    rflags: int = 2
