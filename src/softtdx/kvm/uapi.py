"""What crosses /dev/kvm: arguments of the ioctls as Python values, and struct kvm_run.

A VMM in Python calls methods instead of ioctl(2), and an errno comes as KvmError. Numbers are in `softtdx.abi.kvm`, the
bytes of the same structures in `softtdx.abi.kvm_structs` and `kvm_run`; `ioctl_structs` turns one into the other.
"""

from dataclasses import dataclass, field

from softtdx.abi.kvm_run import (
    FatalExit,
    HypercallExit,
    IoExit,
    KvmRun,
    MemoryFaultExit,
    MmioExit,
    MsrExit,
    TdxExit,
)

__all__ = [
    "CpuidEntry", "FatalExit", "HypercallExit", "IoExit", "KvmRun", "MemoryFaultExit", "MmioExit", "MsrExit", "Regs",
    "Segment", "Sregs", "TdxCapabilities", "TdxExit", "TdxInitMemRegion", "TdxInitVm",
]  # fmt: skip


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
    """struct kvm_tdx_capabilities; in `cpuid` the bits that may be configured are set.

    The last four say which TDVMCALLs beyond the GHCI's base KVM itself, or user space through it, can answer: R11 and
    R12 of TDG.VP.VMCALL<GetTdVmCallInfo> leaf 1.
    """

    supported_attrs: int
    supported_xfam: int
    cpuid: tuple[CpuidEntry, ...]
    kernel_tdvmcallinfo: tuple[int, int] = (0, 0)
    user_tdvmcallinfo: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class TdxInitVm:
    """struct kvm_tdx_init_vm. Without the CPUID leaf that names the GPA width, it is 48 bits."""

    attributes: int = 0
    xfam: int = 3
    mrconfigid: bytes = bytes(48)
    mrowner: bytes = bytes(48)
    mrownerconfig: bytes = bytes(48)
    cpuid: tuple[CpuidEntry, ...] = ()


@dataclass
class TdxInitMemRegion:
    """struct kvm_tdx_init_mem_region; `measure` is KVM_TDX_MEASURE_MEMORY_REGION. On return it says what is left."""

    source_addr: int
    gpa: int
    nr_pages: int
    measure: bool = True


# --- the registers of a vCPU
@dataclass
class Segment:
    """struct kvm_segment, with the access rights as the VMCS has them (SDM 25.4.1)."""

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF_FFFF
    access: int = 1 << 16


@dataclass
class Sregs:
    """struct kvm_sregs and kvm_sregs2. `apic_base` None leaves IA32_APIC_BASE alone."""

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
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int | None = None
    pending_interrupt: int | None = None  # struct kvm_sregs.interrupt_bitmap


@dataclass
class Regs:
    """struct kvm_regs: `gprs` in encoding order (rax, rcx, rdx, rbx, rsp, ...)."""

    gprs: tuple[int, ...] = (0,) * 16
    rip: int = 0
    rflags: int = 2
