"""Virtual MSRs of a TD that are computed once: IA32_ARCH_CAPABILITIES, the VMX capability MSRs, the MSR bitmaps."""

from typing import Final

from softtdx.abi.msrs import MsrPolicy, policies
from softtdx.abi.status import Operand, Status

from . import limits, tdcs, vmx_controls
from .errors import LeafError
from .features import CpuidFlag
from .platform import (
    ARCH_CAP_TSX_CTRL,
    IA32_ARCH_CAPABILITIES,
    IA32_MISC_ENABLE,
    IA32_PERF_CAPABILITIES,
    PlatformConfig,
)
from .td import Td

__all__ = ["init_arch_capabilities", "init_vmx_msrs", "l2_cr4_writable", "write_bitmaps"]

# IA32_ARCH_CAPABILITIES
SSB_NO: Final = 1 << 4
RRSBA: Final = 1 << 19
BHI_NO: Final = 1 << 20
PBRSB_NO: Final = 1 << 24
XAPIC_DISABLE_STATUS: Final = 1 << 21
ALLOW_DIRECT: Final = SSB_NO | BHI_NO | PBRSB_NO
FIXED_0: Final = 7 << 9 | 7 << 16 | 3 << 22 | ((1 << 64) - (1 << 25))

MISC_ENABLE_PEBS_UNAVAILABLE: Final = 1 << 12
PERF_METRICS_AVAILABLE: Final = 1 << 15
BITMAP_SIZE: Final = 4096
WRITE_HALF: Final = 2048
HIGH_HALF: Final = 1024
HIGH_MSRS: Final = 0xC000_0000
MSR_RANGE: Final = 0x1FFF
IA32_PERF_METRICS: Final = 0x329


def init_arch_capabilities(config: PlatformConfig, td: Td, configured: bool, wanted: int) -> None:
    """The TD's IA32_ARCH_CAPABILITIES. LeafError OPERAND_INVALID when a bit is configured that may not be."""
    if (not configured and wanted) or wanted & ~(ALLOW_DIRECT | RRSBA):
        raise LeafError(Status.OPERAND_INVALID, Operand.IA32_ARCH_CAPABILITIES_CONFIG)
    value = config.msrs[IA32_ARCH_CAPABILITIES] & ~FIXED_0 | XAPIC_DISABLE_STATUS
    value &= wanted | ~ALLOW_DIRECT
    value |= wanted & RRSBA
    if not td.rd8(tdcs.CPUID_FLAGS + CpuidFlag.TSX):
        value &= ~ARCH_CAP_TSX_CTRL
    td.wr64(tdcs.VIRTUAL_IA32_ARCH_CAPABILITIES, value & ((1 << 64) - 1))


# --- VMX capability MSRs, as the TD's own VMM sees them
VMX_BASIC: Final = 1 << 54 | 1 << 55 | 1 << 56
VMX_MISC: Final = 1 << 5 | 1 << 6 | 1 << 7 | 1 << 14 | 4 << 16 | 1 << 29 | 1 << 30
EPT_VPID_CAP: Final = 1 << 0 | 1 << 16 | 1 << 17 | 1 << 22
EPT_VPID_CAP_SSS: Final = 1 << 23
EPT_VPID_CAP_HLAT_PREFIX: Final = 0x3F << 48
MWAIT_EXITING: Final = 1 << 10
RDPMC_EXITING: Final = 1 << 11
MONITOR_EXITING: Final = 1 << 29
USER_WAIT_PAUSE: Final = 1 << 26
PCONFIG: Final = 1 << 27
EXIT_PERF_GLOBAL_CTRL: Final = 1 << 12 | 1 << 30
ENTRY_PERF_GLOBAL_CTRL: Final = 1 << 13
ENTRY_PKRS: Final = 1 << 22
# Bits that the TD's VMM may write in an L2 VMCS (TDX Module ABI, "L2 VMCS").
PRIMARY_WRITABLE: Final = 0x48D9_9A04
SECONDARY_WRITABLE: Final = 0x0C51_3E0C
TERTIARY_WRITABLE: Final = 0xE
ENTRY_WRITABLE: Final = 0x200
CR4_PKE: Final = 1 << 22
CR4_CET: Final = 1 << 23
CR4_PKS: Final = 1 << 24
CR4_UINTR: Final = 1 << 25
CR4_LASS: Final = 1 << 27
CR4_KEY_LOCKER: Final = 1 << 19
IA32_VMX_CR4_FIXED0: Final = 0x488
IA32_VMX_CR4_FIXED1: Final = 0x489
IA32_VMX_EPT_VPID_CAP: Final = 0x48C
XFAM_PK: Final = 1 << 9
XFAM_CET: Final = 3 << 11
XFAM_ULI: Final = 1 << 14
XFAM_CET_S: Final = 1 << 12


def _allowed(init: int, writable: int) -> int:
    """Bits 31:0 what must be 1, bits 63:32 what may be 1."""
    return init & ~writable | (init | writable) << 32


def _put(value: int, bits: int, on: bool) -> int:
    return value | bits if on else value & ~bits


def init_vmx_msrs(config: PlatformConfig, td: Td) -> None:
    """IA32_VMX_*: what a VMM inside the TD may choose for its L2 VMs."""
    attributes, xfam = td.rd64(tdcs.ATTRIBUTES), td.rd64(tdcs.XFAM)
    perfmon = bool(attributes & limits.ATTR_PERFMON)
    debug = bool(attributes & limits.ATTR_DEBUG)
    monitor = bool(td.rd8(tdcs.CPUID_FLAGS + CpuidFlag.MONITOR_MWAIT))
    waitpkg = bool(td.rd8(tdcs.CPUID_FLAGS + CpuidFlag.WAITPKG))
    pconfig = bool(td.rd8(tdcs.CPUID_FLAGS + CpuidFlag.PCONFIG))
    base = config.l2_controls
    primary = _put(base.primary, MWAIT_EXITING | MONITOR_EXITING, not monitor)
    primary = _put(primary, RDPMC_EXITING, not perfmon)
    secondary = _put(_put(base.secondary, USER_WAIT_PAUSE, waitpkg), PCONFIG, pconfig)
    leave = _put(base.exit, EXIT_PERF_GLOBAL_CTRL, perfmon or debug)
    enter = _put(base.entry, ENTRY_PERF_GLOBAL_CTRL, perfmon or debug)
    enter = _put(enter, ENTRY_PKRS, bool(attributes & limits.ATTR_PKS) or debug)
    cap = EPT_VPID_CAP | config.msrs[IA32_VMX_EPT_VPID_CAP] & EPT_VPID_CAP_HLAT_PREFIX
    cr4 = l2_cr4_writable(config, td)
    for at, value in (
        (tdcs.VIRTUAL_IA32_VMX_BASIC, VMX_BASIC),
        (tdcs.VIRTUAL_IA32_VMX_MISC, VMX_MISC),
        (tdcs.VIRTUAL_IA32_VMX_TRUE_PINBASED_CTLS, _allowed(base.pin, 0)),
        (
            tdcs.VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS,
            _allowed(primary, _put(PRIMARY_WRITABLE, RDPMC_EXITING, perfmon)),
        ),
        (
            tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS2,
            _allowed(secondary, _put(_put(SECONDARY_WRITABLE, USER_WAIT_PAUSE, waitpkg), PCONFIG, pconfig)),
        ),
        (tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS3, base.tertiary | TERTIARY_WRITABLE),
        (tdcs.VIRTUAL_IA32_VMX_TRUE_EXIT_CTLS, _allowed(leave, 0)),
        (tdcs.VIRTUAL_IA32_VMX_TRUE_ENTRY_CTLS, _allowed(enter, ENTRY_WRITABLE)),
        (tdcs.VIRTUAL_IA32_VMX_EPT_VPID_CAP, cap | (EPT_VPID_CAP_SSS if xfam & XFAM_CET_S else 0)),
        (tdcs.VIRTUAL_IA32_VMX_VMFUNC, 0),
        (
            tdcs.VIRTUAL_IA32_VMX_CR0_FIXED0,
            vmx_controls.GUEST_CR0_INIT & ~vmx_controls.GUEST_CR0_L2_VARIABLE,
        ),
        (tdcs.VIRTUAL_IA32_VMX_CR0_FIXED1, vmx_controls.GUEST_CR0_INIT | vmx_controls.GUEST_CR0_L2_VARIABLE),
        (tdcs.VIRTUAL_IA32_VMX_CR4_FIXED0, vmx_controls.GUEST_CR4_INIT & ~cr4),
        (tdcs.VIRTUAL_IA32_VMX_CR4_FIXED1, vmx_controls.GUEST_CR4_INIT | cr4),
    ):
        td.wr64(at, value)


def l2_cr4_writable(config: PlatformConfig, td: Td) -> int:
    """CR4 bits that the TD's VMM may write in an L2 VM."""
    attributes, xfam = td.rd64(tdcs.ATTRIBUTES), td.rd64(tdcs.XFAM)
    mask = vmx_controls.GUEST_CR4_L2_VARIABLE & ~config.msrs[IA32_VMX_CR4_FIXED0] & config.msrs[IA32_VMX_CR4_FIXED1]
    mask = mask & ~CR4_KEY_LOCKER
    for bit, allowed in (
        (CR4_PKE, xfam & XFAM_PK),
        (CR4_CET, xfam & XFAM_CET == XFAM_CET),
        (CR4_UINTR, xfam & XFAM_ULI),
        (CR4_PKS, attributes & limits.ATTR_PKS),
        (CR4_LASS, attributes & limits.ATTR_LASS),
    ):
        if not allowed:
            mask &= ~bit
    return mask


def write_bitmaps(config: PlatformConfig, td: Td) -> None:
    """The TD's MSR bitmaps: a clear bit lets the TD touch the register itself. Bits start as ones."""
    page = bytearray(td.read(tdcs.MSR_BITMAPS, BITMAP_SIZE))
    rules = _Rules(config, td)
    for row in policies():
        read, write = rules.native(row, row.rd_bitmap), rules.native(row, row.wr_bitmap)
        if not read and not write:
            continue
        for msr in range(row.first, row.last + 1):
            at = (HIGH_HALF if msr >= HIGH_MSRS else 0) + (msr & MSR_RANGE) // 8
            mask = ~(1 << (msr & 7)) & 0xFF
            if read:
                page[at] &= mask
            if write:
                page[at + WRITE_HALF] &= mask
    td.write(tdcs.MSR_BITMAPS, bytes(page))


class _Rules:
    """Which DYN_ meaning of the MSR table lets a TD touch the register without an exit."""

    def __init__(self, config: PlatformConfig, td: Td) -> None:
        attributes, xfam = td.rd64(tdcs.ATTRIBUTES), td.rd64(tdcs.XFAM)
        flag = {
            name: bool(td.rd8(tdcs.CPUID_FLAGS + name)) for name in (CpuidFlag.WAITPKG, CpuidFlag.XFD, CpuidFlag.TSX)
        }
        self.perfmon = perfmon = bool(attributes & limits.ATTR_PERFMON)
        self.pt = bool(xfam >> 8 & 1)
        self.metrics = bool(config.msrs[IA32_PERF_CAPABILITIES] & PERF_METRICS_AVAILABLE)
        self.filtered = td.rd16(tdcs.EVENT_FILTERS_NUM) != 0
        self.meanings = {
            "FIXED_0": True,
            "FIXED_1": False,
            "DYN_PERFMON": perfmon,
            "DYN_XFAM_CET": bool(xfam >> 11 & 3),
            "DYN_XFAM_PT": self.pt,
            "DYN_XFAM_ULI": bool(xfam >> 14 & 1),
            "DYN_XFAM_LBR": bool(xfam >> 15 & 1),
            "DYN_UMWAIT": flag[CpuidFlag.WAITPKG],
            "DYN_PKS": bool(attributes & limits.ATTR_PKS),
            "DYN_XFD": flag[CpuidFlag.XFD],
            "DYN_TSX": flag[CpuidFlag.TSX],
            "PERFMON_AND_LEGACY_PEBS": perfmon and not config.msrs[IA32_MISC_ENABLE] & MISC_ENABLE_PEBS_UNAVAILABLE,
        }

    def native(self, row: MsrPolicy, meaning: str) -> bool:
        """Whether an access to the MSRs of a row needs no exit."""
        if meaning != "DYN_OTHER":
            return self.meanings[meaning]
        if row.first == IA32_PERF_CAPABILITIES:
            return self.perfmon and self.pt
        if row.first == IA32_PERF_METRICS:
            return self.perfmon and self.metrics
        return self.perfmon and not self.filtered
