"""What a TD may use: bits of ATTRIBUTES, CONFIG_FLAGS, TD_CTLS..., and TDCS.CPUID_FLAGS, their digest for fast checks.

TDX Module ABI, "ATTRIBUTES", "CONFIG_FLAGS", "TD_CTLS", "FEATURE_PARAVIRT_CTLS"; Base Spec, "Reduced #VE".
"""

from enum import IntEnum
from typing import Final

from softtdx.abi import cpuid as cpuid_table
from softtdx.abi.structs import Attributes, ConfigFlags, FeatureParavirtCtls, TdCtls, Xfam

from . import tdcs
from .td import Td

__all__ = ["CpuidFlag", "cpuid_values", "update_mutable_cpuid_flags", "xcr0_valid"]

# Plain integers of the flags, because exits test them often.
ATTR_DEBUG: Final = int(Attributes.DEBUG)
ATTR_LASS: Final = int(Attributes.LASS)
ATTR_PKS: Final = int(Attributes.PKS)
ATTR_KL: Final = int(Attributes.KL)
ATTR_PERFMON: Final = int(Attributes.PERFMON)

CONFIG_NO_RBP_MOD: Final = int(ConfigFlags.NO_RBP_MOD)
CONFIG_MAXGPA_VIRT: Final = int(ConfigFlags.MAXGPA_VIRT)

CTL_PENDING_VE_DISABLE: Final = int(TdCtls.PENDING_VE_DISABLE)
CTL_ENUM_TOPOLOGY: Final = int(TdCtls.ENUM_TOPOLOGY)
CTL_VIRT_CPUID2: Final = int(TdCtls.VIRT_CPUID2)
CTL_REDUCE_VE: Final = int(TdCtls.REDUCE_VE)
CTL_LOCK: Final = int(TdCtls.LOCK)

NOTIFY_EPT_FAULTS: Final = 1 << 0  # NOTIFY_ENABLES: #VE when a zero-step attack is suspected

# VM_CTLS: when a TD exit hints that the host had better resume at once
VM_HINT_VINTR_PENDING: Final = 1 << 1
VM_HINT_VINTR_IN_SERVICE: Final = 1 << 2
VM_HINT_VNMI_PENDING: Final = 1 << 3

XFAM_SSE: Final = int(Xfam.SSE)
XFAM_AVX: Final = int(Xfam.AVX)
XFAM_PT: Final = int(Xfam.PT)
XFAM_PKU: Final = int(Xfam.PKU)
XFAM_CET: Final = int(Xfam.CET)
XFAM_ULI: Final = int(Xfam.ULI)
XFAM_LBR: Final = int(Xfam.LBR)
XCR0_AVX512: Final = 0xE0
XCR0_AMX: Final = 3 << 17
XCR0_USER_MASK: Final = 0x6_02FF  # components of XFAM that XCR0 enables; IA32_XSS enables the others
XSS_SUPERVISOR_MASK: Final = 0x1_FD00


class CpuidFlag(IntEnum):
    """TDCS.CPUID_FLAGS: one byte each, derived from the virtual CPUID. Those NOT_... have the opposite sense."""

    MONITOR_MWAIT = 0
    DCA = 1
    TSC_DEADLINE = 2
    TSX = 3
    WAITPKG = 4
    TME = 5
    PCONFIG = 6
    XFD = 7
    DDPD = 8
    LA57 = 9
    FRED = 10
    PERFMON_EXT_LEAF = 11
    UMSR = 12
    ARCH_PEBS = 13
    KL_NO_BACKUP = 14
    KL_RANDOM = 15
    AVX10_512VL = 16
    AVX10 = 17
    NOT_CORE_CAPABILITIES = 18
    EST = 19
    NOT_MCE = 20
    NOT_MCA = 21
    NOT_MTRR = 22
    RDT_A = 23
    RDT_M = 24
    ACPI = 25
    TM2 = 26
    XTPR_UPDATE = 27


CPUID_FLAGS_SIZE: Final = 32

# (flag, leaf, register, bit, the control that keeps it): what the TD may change by TD_CTLS.REDUCE_VE.
_Wish = FeatureParavirtCtls
_LEAF_1: Final = (1, 0)
_LEAF_7: Final = (7, 0)
_MUTABLE: Final = (
    (CpuidFlag.DCA, _LEAF_1, 2, 18, _Wish.DCA),
    (CpuidFlag.TSC_DEADLINE, _LEAF_1, 2, 24, _Wish.TSC_DEADLINE),
    (CpuidFlag.EST, _LEAF_1, 2, 7, _Wish.EST),
    (CpuidFlag.TM2, _LEAF_1, 2, 8, _Wish.TM2),
    (CpuidFlag.NOT_MCE, _LEAF_1, 3, 7, _Wish.MCA),
    (CpuidFlag.NOT_MCA, _LEAF_1, 3, 14, _Wish.MCA),
    (CpuidFlag.NOT_MTRR, _LEAF_1, 3, 12, _Wish.MTRR),
    (CpuidFlag.ACPI, _LEAF_1, 3, 22, _Wish.ACPI),
    (CpuidFlag.RDT_A, _LEAF_7, 1, 15, _Wish.RDT_A),
    (CpuidFlag.RDT_M, _LEAF_7, 1, 12, _Wish.RDT_M),
    (CpuidFlag.TME, _LEAF_7, 2, 13, _Wish.TME),
    (CpuidFlag.PCONFIG, _LEAF_7, 3, 18, _Wish.PCONFIG),
    (CpuidFlag.NOT_CORE_CAPABILITIES, _LEAF_7, 3, 30, _Wish.CORE_CAPABILITIES),
)
_NEGATIVE: Final = frozenset(
    {CpuidFlag.NOT_MCE, CpuidFlag.NOT_MCA, CpuidFlag.NOT_MTRR, CpuidFlag.NOT_CORE_CAPABILITIES}
)


def xcr0_valid(allowed: int, value: int) -> bool:
    """Whether XCR0 may be `value` where `allowed` is what the processor and XFAM have (SDM volume 1, 13.3)."""
    if value & ~allowed or not value & 1:
        return False
    if value & XFAM_AVX and not value & XFAM_SSE:
        return False
    if value & XCR0_AVX512 and not value & XFAM_AVX:
        return False
    return all(value & group in (0, group) for group in (XCR0_AVX512, XCR0_AMX))


def cpuid_values(td: Td, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
    """The TD's virtual CPUID as TDCS.CPUID_VALUES holds it: EAX, EBX, ECX, EDX. The leaf must be in the table."""
    row = cpuid_table.find(leaf, subleaf)
    if row is None:
        raise KeyError(f"CPUID({leaf:#x}, {subleaf:#x}) is not in the virtual CPUID table")
    data = td.read(tdcs.CPUID_VALUES + 16 * row.index, 16)
    eax, ebx, ecx, edx = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4, 8, 12))
    return eax, ebx, ecx, edx


def update_mutable_cpuid_flags(td: Td) -> None:
    """Derive the flags that depend on TD_CTLS.REDUCE_VE and FEATURE_PARAVIRT_CTLS.

    A feature that only a para-virtualised host can serve vanishes under REDUCE_VE unless the TD asked to keep it.
    Those with a negative flag are there for every TD that has not reduced #VE.
    """
    reduce_ve = td.rd64(tdcs.TD_CTLS) & CTL_REDUCE_VE
    wanted = td.rd64(tdcs.FEATURE_PARAVIRT_CTLS)
    values = {key: cpuid_values(td, *key) for key in (_LEAF_1, _LEAF_7)}
    for flag, key, register, bit, wish in _MUTABLE:
        enumerated = values[key][register] >> bit & 1
        if flag in _NEGATIVE:
            value = bool(reduce_ve) and not (wanted & wish and enumerated)
        else:
            value = bool(enumerated and (not reduce_ve or wanted & wish))
        td.wr8(tdcs.CPUID_FLAGS + flag, value)
