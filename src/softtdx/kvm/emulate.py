"""What KVM answers itself, for ordinary VMs and TDs alike: CPUID, and the few MSRs that it keeps in software."""

from typing import Final

from softtdx.abi.msrs import APIC_BASE_BSP, Msr
from softtdx.hw import PlatformDescription
from softtdx.kvm.uapi import CpuidEntry
from softtdx.kvm.vcpu import Vcpu

__all__ = ["FEATURES", "apic_base", "cpuid", "feature_msr", "host_cpuid", "read_msr", "td_has_msr", "write_msr"]

# Features that a guest may be shown of those the host has: what needs no state or mode beyond x87 and SSE.
_GUEST_FEATURES: Final[dict[tuple[int, int | None], tuple[int, int, int, int]]] = {
    (1, None): (0xFFFF_FFFF, 0x0000_FF00, 0x41F8_2203, 0x0783_FBFF),
    (7, 0): (0, 0x0014_0681, 0x0040_0004, 0),
    (0x8000_0001, None): (0, 0, 0x0000_0101, 0x2C10_0800),
}
_HYPERVISOR: Final = 1 << 31
_NEEDS_APIC: Final = 1 << 21 | 1 << 24  # of leaf 1 ECX: x2APIC, TSC deadline
_COPIED: Final = (0, 2, 4, 0x15, 0x16, 0x8000_0000, 0x8000_0006, 0x8000_0007, 0x8000_0008)

_ON_VIRTUAL_APIC: Final = frozenset(
    (Msr.X2APIC_TPR, Msr.X2APIC_PPR, Msr.X2APIC_EOI, *range(Msr.X2APIC_ISR0, Msr.X2APIC_ESR))
)

FEATURES: Final = (Msr.BIOS_SIGN_ID, Msr.ARCH_CAPABILITIES, Msr.PLATFORM_INFO)
"""KVM_GET_MSR_FEATURE_INDEX_LIST: MSRs that say what the virtual processor can do."""

_APIC_BASE: Final = int(Msr.APIC_BASE)
_APIC_BASE_RESET: Final = 0xFEE0_0C00

# MSRs that software keeps: reset value. Writes are remembered.
_SOFTWARE_MSRS: Final[dict[int, int]] = {
    Msr.MTRRCAP: 0x508,
    Msr.MTRR_DEF_TYPE: 0x6,  # IA32_MTRR_DEF_TYPE: MTRRs off, write-back
    **dict.fromkeys(range(0x200, 0x210), 0),  # variable ranges
    **dict.fromkeys((0x250, 0x258, 0x259, *range(0x268, 0x270)), 0),  # fixed ranges
    Msr.MISC_ENABLE: 1,
    Msr.BIOS_SIGN_ID: 0x1_0000_0000,
    Msr.PLATFORM_ID: 0,
    Msr.APIC_BASE: _APIC_BASE_RESET,
    Msr.MCG_CAP: 0,
    Msr.MCG_STATUS: 0,
    Msr.ARCH_CAPABILITIES: 0,
    Msr.TSC_ADJUST: 0,
    Msr.SPEC_CTRL: 0,
    Msr.PRED_CMD: 0,
    Msr.FEATURE_CONTROL: 1,
    Msr.PLATFORM_INFO: 0,
    Msr.MISC_FEATURES_ENABLES: 0,
    Msr.POWER_CTL: 0,
}
_APIC_BASE_VALID: Final = 0xFFF_FFFF_FD00  # the address, BSP, x2APIC mode, enabled
_MTRRS: Final = (Msr.MTRR_DEF_TYPE, *range(0x200, 0x210), 0x250, 0x258, 0x259, *range(0x268, 0x270))
_MEMORY_TYPES: Final = (0, 1, 4, 5, 6)
_FIXED_MTRRS: Final = frozenset((0x250, 0x258, 0x259, *range(0x268, 0x270)))

# What KVM keeps for a TD (tdx_has_emulated_msr); the rest is the TDX module's, or nobody's.
_OF_A_TD: Final = frozenset(
    {
        Msr.BIOS_SIGN_ID, Msr.ARCH_CAPABILITIES, Msr.POWER_CTL, Msr.MTRRCAP, *_MTRRS, Msr.TSC_DEADLINE,
        Msr.MISC_ENABLE, Msr.PLATFORM_INFO, Msr.MISC_FEATURES_ENABLES, Msr.APIC_BASE, Msr.FEATURE_CONTROL,
        Msr.MCG_CAP, Msr.MCG_STATUS,
    }
)  # fmt: skip
_TD_READS_ONLY: Final = frozenset({Msr.APIC_BASE, Msr.EFER, Msr.FEATURE_CONTROL})


def host_cpuid(description: PlatformDescription) -> list[CpuidEntry]:
    """KVM_GET_SUPPORTED_CPUID: the processor's values, reduced to the features a guest may use."""
    entries = []
    for (leaf, subleaf), values in sorted(description.cpuid.items(), key=lambda row: (row[0][0], row[0][1] or 0)):
        mask = _GUEST_FEATURES.get((leaf, subleaf))
        if mask is not None:
            eax, ebx, ecx, edx = (value & keep for value, keep in zip(values, mask, strict=True))
            ecx |= _HYPERVISOR if leaf == 1 else 0
        elif leaf in _COPIED:
            eax, ebx, ecx, edx = values
        else:
            continue
        entries.append(CpuidEntry(leaf, subleaf, eax, ebx, ecx, edx))
    return entries


def cpuid(vcpu: Vcpu, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """CPUID as the guest sees it: zeroes for a leaf that user space did not set."""
    entry = vcpu.cpuid.get((leaf, None)) or vcpu.cpuid.get((leaf, subleaf))
    if entry is None:
        return 0, 0, 0, 0
    eax, ebx, ecx, edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    if leaf == 1:
        ebx = ebx & 0x00FF_FFFF | (vcpu.vcpu_id & 0xFF) << 24
        if vcpu.apic is None:
            ecx &= ~_NEEDS_APIC
    return eax, ebx, ecx, edx


def is_apic_msr(index: int) -> bool:
    """Whether an MSR belongs to the local APIC."""
    return Msr.X2APIC_FIRST <= index <= Msr.X2APIC_LAST or index == Msr.TSC_DEADLINE


def read_msr(vcpu: Vcpu, index: int) -> int | None:
    """An MSR that KVM keeps; None for one it does not have."""
    if vcpu.apic is not None and is_apic_msr(index):
        return vcpu.apic.read(index)
    if index == Msr.APIC_BASE:
        return apic_base(vcpu)
    default = _SOFTWARE_MSRS.get(index)
    return None if default is None else vcpu.msrs.get(index, default)


def apic_base(vcpu: Vcpu) -> int:
    """IA32_APIC_BASE; the boot processor says that it is one."""
    value = vcpu.msrs.get(_APIC_BASE)
    if value is None:
        return _APIC_BASE_RESET | (APIC_BASE_BSP if vcpu.vcpu_id == vcpu.vm.boot_cpu else 0)
    return value


def write_msr(vcpu: Vcpu, index: int, value: int) -> bool:
    """Write an MSR that KVM keeps; False for one it does not have."""
    if vcpu.apic is not None and is_apic_msr(index):
        return vcpu.apic.write(index, value)
    if index not in _SOFTWARE_MSRS or not _takes(index, value):
        return False
    vcpu.msrs[index] = value
    return True


def _takes(index: int, value: int) -> bool:
    """Whether the MSR may have the value; those that are not named here may have any."""
    if index == Msr.APIC_BASE:
        return not value & ~_APIC_BASE_VALID
    if index in _FIXED_MTRRS:
        return all(kind in _MEMORY_TYPES for kind in value.to_bytes(8, "little"))
    if index == Msr.MTRR_DEF_TYPE:
        return not value & ~0xCFF and value & 0xFF in _MEMORY_TYPES
    return True


def feature_msr(index: int) -> int | None:
    """The value of an MSR-based feature (msr_based_features); None for an MSR that is none."""
    return _SOFTWARE_MSRS[index] if index in FEATURES else None


def td_has_msr(index: int, *, write: bool = False) -> bool:
    """Whether KVM emulates the MSR for a TD: what the processor's virtual APIC and the module have, it does not."""
    if write and index in _TD_READS_ONLY:
        return False
    if Msr.X2APIC_FIRST <= index <= Msr.X2APIC_LAST:
        return index not in _ON_VIRTUAL_APIC
    return index in _OF_A_TD
