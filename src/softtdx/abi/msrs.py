"""Model-specific registers: numbers (SDM volume 4), and what the TDX module does when a TD touches one.

The policy table is the module's (TDX Module ABI, "MSR Virtualization"): a bitmap meaning says whether the access
exits at all, an action what the module does when it does.
"""

from bisect import bisect_right
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Final

from softtdx.abi._data import load

__all__ = ["Msr", "MsrPolicy", "bitmap_bit", "in_bitmap", "policies", "policy"]


class Msr(IntEnum):
    """MSR numbers."""

    TSC = 0x10
    PLATFORM_ID = 0x17
    APIC_BASE = 0x1B
    FEATURE_CONTROL = 0x3A
    TSC_ADJUST = 0x3B
    SPEC_CTRL = 0x48
    PRED_CMD = 0x49
    MKTME_KEYID_PARTITIONING = 0x87
    BIOS_SIGN_ID = 0x8B  # read as a microcode revision; a write in SEAM mode is NON_FAULTING
    WBINVDP = 0x98
    WBNOINVDP = 0x99
    INTR_PENDING = 0x9A
    SMM_MONITOR_CTL = 0x9B
    MISC_PACKAGE_CTLS = 0xBC
    XAPIC_DISABLE_STATUS = 0xBD
    PMC0 = 0xC1
    PLATFORM_INFO = 0xCE
    CORE_CAPABILITIES = 0xCF
    UMWAIT_CONTROL = 0xE1
    MPERF = 0xE7
    APERF = 0xE8
    MTRRCAP = 0xFE
    ARCH_CAPABILITIES = 0x10A
    FLUSH_CMD = 0x10B
    TSX_CTRL = 0x122
    MCU_OPT_CTRL = 0x123
    MISC_FEATURES_ENABLES = 0x140
    SYSENTER_CS = 0x174
    SYSENTER_ESP = 0x175
    SYSENTER_EIP = 0x176
    MCG_CAP = 0x179
    MCG_STATUS = 0x17A
    PERFEVTSEL0 = 0x186
    MISC_ENABLE = 0x1A0
    OFFCORE_RSP0 = 0x1A6
    OFFCORE_RSP1 = 0x1A7
    XFD = 0x1C4
    XFD_ERR = 0x1C5
    DEBUGCTL = 0x1D9
    SMRR_PHYSBASE = 0x1F2
    SMRR_PHYSMASK = 0x1F3
    SMRR2_PHYSBASE = 0x1F6
    SMRR2_PHYSMASK = 0x1F7
    POWER_CTL = 0x1FC
    LAM_ENABLE = 0x276
    PAT = 0x277
    MTRR_DEF_TYPE = 0x2FF
    FIXED_CTR0 = 0x309
    PERF_METRICS = 0x329
    PERF_CAPABILITIES = 0x345
    FIXED_CTR_CTRL = 0x38D
    PERF_GLOBAL_STATUS = 0x38E
    PERF_GLOBAL_CTRL = 0x38F
    PERF_GLOBAL_STATUS_RESET = 0x390
    PERF_GLOBAL_STATUS_SET = 0x391
    PEBS_ENABLE = 0x3F1
    PEBS_DATA_CFG = 0x3F2
    PEBS_LD_LAT = 0x3F6
    PEBS_FRONTEND = 0x3F7
    VMX_BASIC = 0x480
    VMX_PINBASED_CTLS = 0x481
    VMX_PROCBASED_CTLS = 0x482
    VMX_EXIT_CTLS = 0x483
    VMX_ENTRY_CTLS = 0x484
    VMX_MISC = 0x485
    VMX_CR0_FIXED0 = 0x486
    VMX_CR0_FIXED1 = 0x487
    VMX_CR4_FIXED0 = 0x488
    VMX_CR4_FIXED1 = 0x489
    VMX_VMCS_ENUM = 0x48A
    VMX_PROCBASED_CTLS2 = 0x48B
    VMX_EPT_VPID_CAP = 0x48C
    VMX_TRUE_PINBASED_CTLS = 0x48D
    VMX_TRUE_PROCBASED_CTLS = 0x48E
    VMX_TRUE_EXIT_CTLS = 0x48F
    VMX_TRUE_ENTRY_CTLS = 0x490
    VMX_VMFUNC = 0x491
    VMX_PROCBASED_CTLS3 = 0x492
    VMX_EXIT_CTLS2 = 0x493
    A_PMC0 = 0x4C1
    RTIT_CTL = 0x570
    DS_AREA = 0x600
    U_CET = 0x6A0
    S_CET = 0x6A2
    PL0_SSP = 0x6A4
    PL1_SSP = 0x6A5
    PL2_SSP = 0x6A6
    PL3_SSP = 0x6A7
    INTERRUPT_SSP_TABLE_ADDR = 0x6A8
    TSC_DEADLINE = 0x6E0
    PKRS = 0x6E1
    X2APIC_FIRST = 0x800
    X2APIC_APICID = 0x802
    X2APIC_VERSION = 0x803
    X2APIC_TPR = 0x808
    X2APIC_PPR = 0x80A
    X2APIC_EOI = 0x80B
    X2APIC_LDR = 0x80D
    X2APIC_SIVR = 0x80F
    X2APIC_ISR0 = 0x810
    X2APIC_TMR0 = 0x818
    X2APIC_IRR0 = 0x820
    X2APIC_ESR = 0x828
    X2APIC_LVT_CMCI = 0x82F
    X2APIC_ICR = 0x830
    X2APIC_LVT_TIMER = 0x832
    X2APIC_LVT_THERMAL = 0x833
    X2APIC_LVT_PMI = 0x834
    X2APIC_LVT_LINT0 = 0x835
    X2APIC_LVT_LINT1 = 0x836
    X2APIC_LVT_ERROR = 0x837
    X2APIC_INIT_COUNT = 0x838
    X2APIC_CUR_COUNT = 0x839
    X2APIC_DIV_CONF = 0x83E
    X2APIC_SELF_IPI = 0x83F
    X2APIC_LAST = 0x8FF
    TME_CAPABILITY = 0x981
    TME_ACTIVATE = 0x982
    BNDCFGS = 0xD90
    XSS = 0xDA0
    LBR_CTL = 0x14CE
    LBR_DEPTH = 0x14CF
    SEAMRR_PHYS_BASE = 0x1400
    SEAMRR_PHYS_MASK = 0x1401
    UARCH_MISC_CTL = 0x1B01
    EFER = 0xC000_0080
    STAR = 0xC000_0081
    LSTAR = 0xC000_0082
    CSTAR = 0xC000_0083
    FMASK = 0xC000_0084
    FS_BASE = 0xC000_0100
    GS_BASE = 0xC000_0101
    KERNEL_GS_BASE = 0xC000_0102
    TSC_AUX = 0xC000_0103


# Bits of the MSRs that TDX is made of.
EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11
APIC_BASE_BSP: Final = 1 << 8
APIC_BASE_X2APIC: Final = 1 << 10
APIC_BASE_ENABLE: Final = 1 << 11
MTRRCAP_SEAMRR: Final = 1 << 15
SEAMRR_BASE_CONFIGURED: Final = 1 << 3
SEAMRR_MASK_LOCK: Final = 1 << 10
SEAMRR_MASK_VALID: Final = 1 << 11
SEAMRR_ADDRESS: Final = 0x000F_FFFF_FE00_0000  # 51:25, of base and mask alike
TME_ACTIVATE_LOCK: Final = 1 << 0
TME_ACTIVATE_ENABLE: Final = 1 << 1
TME_ACTIVATE_KEYID_BITS_SHIFT: Final = 32
TME_ACTIVATE_TDX_KEYID_BITS_SHIFT: Final = 36


@dataclass(frozen=True, slots=True)
class MsrPolicy:
    """What the module does with RDMSR and WRMSR of one MSR, or of a range.

    A bitmap meaning is FIXED_0 (no exit: the TD uses the real or virtualised register), FIXED_1 (always an exit), or
    DYN_<feature> (an exit unless the TD has the feature). An action is VE, GP, GP_OR_VE_BY_<control> (#VE when TD_CTLS
    and FEATURE_PARAVIRT_CTLS leave it to the guest's handler, else #GP), FATAL_ERROR (cannot happen) or OTHER (code).
    """

    name: str
    first: int
    last: int
    rd_bitmap: str
    rd_action: str
    wr_bitmap: str
    wr_action: str


@cache
def policies() -> tuple[MsrPolicy, ...]:
    """All rows in ascending order of MSR number."""
    rows = load("msr_policy")["rows"]
    return tuple(MsrPolicy(row[0], int(row[1], 16), int(row[2], 16), *row[3:]) for row in rows)


def policy(msr: int) -> MsrPolicy | None:
    """The row that covers an MSR; None for one the table does not name."""
    starts, by_start = _sorted_policies()
    index = bisect_right(starts, msr) - 1
    if index < 0 or msr > by_start[index].last:
        return None
    return by_start[index]


def in_bitmap(msr: int) -> bool:
    """Whether the MSR bitmaps cover an MSR; others always exit."""
    return msr < 0x2000 or 0xC000_0000 <= msr < 0xC000_2000


def bitmap_bit(msr: int, *, write: bool) -> int | None:
    """The bit of the 4-KiB MSR bitmap page that makes an access to this MSR exit (SDM 25.6.9)."""
    if not in_bitmap(msr):
        return None
    low_half = 0 if msr < 0x2000 else 0x400 * 8
    return (msr & 0x1FFF) + low_half + (0x800 * 8 if write else 0)


@cache
def _sorted_policies() -> tuple[list[int], list[MsrPolicy]]:
    ordered = sorted(policies(), key=lambda row: row.first)
    return [row.first for row in ordered], ordered
