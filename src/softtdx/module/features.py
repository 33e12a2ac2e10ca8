"""What a TD may use: bits of ATTRIBUTES, CONFIG_FLAGS, TD_CTLS..., and TDCS.CPUID_FLAGS, their digest for fast checks.

TDX Module ABI, "ATTRIBUTES", "CONFIG_FLAGS", "TD_CTLS", "FEATURE_PARAVIRT_CTLS"; Base Spec, "Reduced #VE".
"""

from enum import IntEnum
from typing import Final

from softtdx.abi import cpuid as cpuid_table

from . import tdcs
from .td import Td

__all__ = ["CpuidFlag", "cpuid_values", "update_mutable_cpuid_flags"]

# --- ATTRIBUTES
ATTR_DEBUG: Final = 1 << 0
ATTR_LASS: Final = 1 << 27
ATTR_SEPT_VE_DISABLE: Final = 1 << 28
ATTR_MIGRATABLE: Final = 1 << 29
ATTR_PKS: Final = 1 << 30
ATTR_KL: Final = 1 << 31
ATTR_PERFMON: Final = 1 << 63

# --- CONFIG_FLAGS
CONFIG_GPAW: Final = 1 << 0
CONFIG_FLEXIBLE_PENDING_VE: Final = 1 << 1
CONFIG_NO_RBP_MOD: Final = 1 << 2
CONFIG_MAXPA_VIRT: Final = 1 << 3
CONFIG_MAXGPA_VIRT: Final = 1 << 4

# --- TD_CTLS, which the TD itself writes
CTL_PENDING_VE_DISABLE: Final = 1 << 0
CTL_ENUM_TOPOLOGY: Final = 1 << 1
CTL_VIRT_CPUID2: Final = 1 << 2
CTL_REDUCE_VE: Final = 1 << 3
CTL_LOCK: Final = 1 << 63

# --- NOTIFY_ENABLES
NOTIFY_EPT_FAULTS: Final = 1 << 0

# --- VM_CTLS: when a TD exit hints that the host had better resume at once
VM_HINT_VINTR_PENDING: Final = 1 << 1
VM_HINT_VINTR_IN_SERVICE: Final = 1 << 2
VM_HINT_VNMI_PENDING: Final = 1 << 3

# --- XFAM
XFAM_SSE: Final = 1 << 1
XFAM_AVX: Final = 1 << 2
XFAM_AVX3: Final = 7 << 5
XFAM_PT: Final = 1 << 8
XFAM_PK: Final = 1 << 9
XFAM_CET: Final = 3 << 11
XFAM_ULI: Final = 1 << 14
XFAM_LBR: Final = 1 << 15
XFAM_AMX: Final = 3 << 17
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

# (flag, leaf's index below, register, bit, bit of FEATURE_PARAVIRT_CTLS): what the TD may change by TD_CTLS.REDUCE_VE.
_LEAF_1: Final = (1, 0)
_LEAF_7: Final = (7, 0)
_MUTABLE: Final = (
    (CpuidFlag.DCA, _LEAF_1, 2, 18, 1),
    (CpuidFlag.TSC_DEADLINE, _LEAF_1, 2, 24, 11),
    (CpuidFlag.EST, _LEAF_1, 2, 7, 2),
    (CpuidFlag.TM2, _LEAF_1, 2, 8, 9),
    (CpuidFlag.NOT_MCE, _LEAF_1, 3, 7, 3),
    (CpuidFlag.NOT_MCA, _LEAF_1, 3, 14, 3),
    (CpuidFlag.NOT_MTRR, _LEAF_1, 3, 12, 4),
    (CpuidFlag.ACPI, _LEAF_1, 3, 22, 8),
    (CpuidFlag.RDT_A, _LEAF_7, 1, 15, 6),
    (CpuidFlag.RDT_M, _LEAF_7, 1, 12, 7),
    (CpuidFlag.TME, _LEAF_7, 2, 13, 10),
    (CpuidFlag.PCONFIG, _LEAF_7, 3, 18, 5),
    (CpuidFlag.NOT_CORE_CAPABILITIES, _LEAF_7, 3, 30, 0),
)
_NEGATIVE: Final = frozenset(
    {CpuidFlag.NOT_MCE, CpuidFlag.NOT_MCA, CpuidFlag.NOT_MTRR, CpuidFlag.NOT_CORE_CAPABILITIES}
)


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
    for flag, key, register, bit, control in _MUTABLE:
        enumerated = values[key][register] >> bit & 1
        if flag in _NEGATIVE:
            value = bool(reduce_ve) and not (wanted >> control & 1 and enumerated)
        else:
            value = bool(enumerated and (not reduce_ve or wanted >> control & 1))
        td.wr8(tdcs.CPUID_FLAGS + flag, value)
