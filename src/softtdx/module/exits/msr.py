"""RDMSR and WRMSR: emulated, refused or given to the #VE handler, as the module's MSR table says.

An MSR whose bit in the MSR bitmaps is clear does not come here: the processor does the access. Which bits those are
depends on the TD's features (`virtual_msrs.write_bitmaps`). A few MSRs have code of their own; the others follow their
row (TDX Module ABI, "MSR Virtualization").
"""

from collections.abc import Callable
from typing import Final

from softtdx.abi.exits import PENDING_DEBUG_BS, VeCategory
from softtdx.abi.msrs import Msr, in_bitmap, policy

from .. import tdcs, tdvps, vmcs
from ..atomics import add64
from ..fatal import ModuleFatal
from ..features import (
    CTL_ENUM_TOPOLOGY,
    CTL_REDUCE_VE,
    XFAM_PT,
    CpuidFlag,
)
from ..td import Td
from ..transitions.guest import Guest
from .cpuid import x2apic_id

__all__ = ["rdmsr", "wrmsr"]

RAX, RCX, RDX = 0, 1, 2
U32: Final = 0xFFFF_FFFF
GP: Final = -1  # instead of a #VE category

PERFEVTSEL: Final = range(Msr.PERFEVTSEL0, Msr.PERFEVTSEL0 + 8)
VMX_MSRS: Final = range(Msr.VMX_BASIC, Msr.VMX_PROCBASED_CTLS3 + 1)
SMI_COUNT: Final = 0x34
PPIN_CTL: Final = 0x4E
BIOS_UPDT_TRIG: Final = 0x79
PLATFORM_INFO: Final = 0xCE
FEATURE_ENABLES: Final = 0x140

PERF_CAP_PEBS_OUTPUT_PT: Final = 1 << 16
PERF_CAP_METRICS: Final = 1 << 15
XAPIC_DISABLED: Final = 1
FEATURE_CONTROL_LOCKED: Final = 1

# IA32_DEBUGCTL: LBR 0, BTF 1, TR 6, BTS 7, ENABLE_UNCORE_PMI 13, FREEZE_WHILE_SMM 14, RTM_DEBUG 15
DEBUGCTL_BTF: Final = 1 << 1
DEBUGCTL_TR: Final = 1 << 6
DEBUGCTL_BTS: Final = 1 << 7
DEBUGCTL_UNCORE_PMI: Final = 1 << 13
DEBUGCTL_FREEZE_SMM: Final = 1 << 14
DEBUGCTL_RTM: Final = 1 << 15
DEBUGCTL_RESERVED: Final = 0xFFFF_FFFF_FFFF_0038
EFER_SCE: Final = 1 << 0
EFER_LMA: Final = 1 << 10

# IA32_MISC_ENABLE as a TD with REDUCE_VE sees it
MISC_GP: Final = 0xFFFF_FFFF_FF3A_E776
MISC_PERFMON: Final = 1 << 7
MISC_BTS_UNAVAILABLE: Final = 1 << 11
MISC_PEBS_UNAVAILABLE: Final = 1 << 12
MISC_EST: Final = 1 << 16
MISC_MONITOR: Final = 1 << 18
MISC_LIMIT_CPUID: Final = 1 << 22
MISC_XTPR_DISABLE: Final = 1 << 23
MISC_READ_ONLY: Final = MISC_PERFMON | MISC_BTS_UNAVAILABLE | MISC_PEBS_UNAVAILABLE

PERFEVTSEL_EVENT: Final = 0xFFFF  # event select 7:0, unit mask 15:8
PERFEVTSEL_ENABLE: Final = 1 << 22
PERFEVTSEL_RESERVED: Final = ~0x7_FFFF_FFFF  # the processor's #GP
PERFEVTSEL_FORBIDDEN: Final = 1 << 63  # only in the TDVPS: the event filter has stopped this counter

# GP_OR_VE_BY_<control>: #VE while the TD's flag has this value, else #GP
_BY_FLAG: Final = {
    "GP_OR_VE_BY_EST": (CpuidFlag.EST, 1),
    "GP_OR_VE_BY_TM2": (CpuidFlag.TM2, 1),
    "GP_OR_VE_BY_DCA": (CpuidFlag.DCA, 1),
    "GP_OR_VE_BY_TSC_DEADLINE": (CpuidFlag.TSC_DEADLINE, 1),
    "GP_OR_VE_BY_MTRR": (CpuidFlag.NOT_MTRR, 0),
    "GP_OR_VE_BY_MCA": (CpuidFlag.NOT_MCA, 0),
    "GP_OR_VE_BY_ACPI": (CpuidFlag.ACPI, 1),
    "GP_OR_VE_BY_RDT_M": (CpuidFlag.RDT_M, 1),
    "GP_OR_VE_BY_RDT_A": (CpuidFlag.RDT_A, 1),
    "GP_OR_VE_BY_TME": (CpuidFlag.TME, 1),
    "GP_OR_VE_BY_PCONFIG": (CpuidFlag.PCONFIG, 1),
    "GP_OR_VE_BY_CORE_CAPABILITIES": (CpuidFlag.NOT_CORE_CAPABILITIES, 0),
}
_BY_REDUCED_VE: Final = frozenset({"GP_OR_VE_BY_REDUCED_VE", "GP_OR_VE", "OTHER"})


# --- the exits
def rdmsr(guest: Guest) -> None:
    """RDMSR of the MSR in ECX."""
    msr = guest.cpu.gpr(RCX) & U32
    _finish(guest, _VE_OUT_OF_RANGE if not in_bitmap(msr) else _read(guest, msr))


def wrmsr(guest: Guest) -> None:
    """WRMSR of the MSR in ECX with EDX:EAX."""
    cpu = guest.cpu
    msr = cpu.gpr(RCX) & U32
    value = (cpu.gpr(RDX) & U32) << 32 | cpu.gpr(RAX) & U32
    _finish(guest, _VE_OUT_OF_RANGE if not in_bitmap(msr) else _write(guest, msr, value))


_VE_OUT_OF_RANGE: Final = int(VeCategory.PARAVIRT)
_VE: Final = int(VeCategory.CONFIGURABLE_PARAVIRT)
_VE_UNSUPPORTED: Final = int(VeCategory.UNSUPPORTED_FEATURE)


def _finish(guest: Guest, outcome: int | None) -> None:
    if outcome is None:
        return
    if outcome == GP:
        guest.inject_gp()
    else:
        guest.inject_ve(guest.reason, 0, outcome)


def _answer(guest: Guest, value: int) -> None:
    cpu = guest.cpu
    cpu.set_gpr(RAX, value & U32)
    cpu.set_gpr(RDX, value >> 32)


def _read(guest: Guest, msr: int) -> int | None:
    if msr in PERFEVTSEL:
        return _read_perfevtsel(guest, msr - Msr.PERFEVTSEL0)
    special = _READ.get(msr)
    if special:
        return special(guest)
    if msr in VMX_MSRS:
        at = _VMX_AT.get(msr)
        if at is None:
            return _reduced_or_gp(guest)
        _answer(guest, guest.td.rd64(at))
        return None
    return _by_table(guest, msr, write=False)


def _write(guest: Guest, msr: int, value: int) -> int | None:
    if msr in PERFEVTSEL:
        return _write_perfevtsel(guest, msr, value)
    special = _WRITE.get(msr)
    if special:
        return special(guest, value)
    if msr in VMX_MSRS:
        return GP
    return _by_table(guest, msr, write=True)


def _reduced_or_gp(guest: Guest) -> int:
    """#GP for a TD that has reduced #VE, else #VE."""
    return GP if guest.controls() & CTL_REDUCE_VE else _VE


def _by_table(guest: Guest, msr: int, *, write: bool) -> int:
    row = policy(msr)
    if row is None:
        return _reduced_or_gp(guest)
    action = row.wr_action if write else row.rd_action
    if action == "VE":
        return _VE_OUT_OF_RANGE
    if action == "GP":
        return GP
    if action in _BY_REDUCED_VE:
        return _reduced_or_gp(guest)
    if action == "FATAL_ERROR":
        raise ModuleFatal(f"MSR {msr:#x} exited, whose accesses by a TD never do")
    flag, wanted = _BY_FLAG[action]
    return _VE if guest.flag(flag) == wanted else GP


# --- performance events
def _read_perfevtsel(guest: Guest, counter: int) -> int | None:
    if not guest.perfmon:
        return GP
    if not guest.td.rd16(tdcs.EVENT_FILTERS_NUM):
        raise ModuleFatal("IA32_PERFEVTSEL exited in a TD that has PERFMON and no event filter")
    _answer(guest, guest.vcpu.rd64(tdvps.IA32_PMC_GP_CFG_AX + 8 * counter) & ~PERFEVTSEL_FORBIDDEN)
    return None


def _write_perfevtsel(guest: Guest, msr: int, value: int) -> int | None:
    """A filtered event is programmed with its counter disabled, and remembered as the guest wrote it."""
    if not guest.perfmon:
        return GP
    count = guest.td.rd16(tdcs.EVENT_FILTERS_NUM)
    if not count:
        raise ModuleFatal("IA32_PERFEVTSEL exited in a TD that has PERFMON and no event filter")
    if value & PERFEVTSEL_RESERVED:
        return GP
    real = shadow = value
    if value & PERFEVTSEL_ENABLE and not _event_allowed(guest.td, value & PERFEVTSEL_EVENT, count):
        real &= ~PERFEVTSEL_ENABLE
        shadow |= PERFEVTSEL_FORBIDDEN
        add64(guest.cpu, guest.tdc + tdcs.FILTERED_EVENTS_COUNT, 1)
    guest.cpu.core.wrmsr(msr, real)
    guest.vcpu.wr64(tdvps.IA32_PMC_GP_CFG_AX + 8 * (msr - Msr.PERFEVTSEL0), shadow)
    return None


def _event_allowed(td: Td, event: int, count: int) -> bool:
    allowed = td.read(tdcs.EVENT_FILTERS, 2 * count)
    return event.to_bytes(2, "little") in (allowed[at : at + 2] for at in range(0, len(allowed), 2))


# --- MSRs with code of their own
def _reduced_value(value: int) -> Callable[[Guest], int | None]:
    """A constant for a TD that has reduced #VE, #VE for others."""

    def read(guest: Guest) -> int | None:
        if not guest.controls() & CTL_REDUCE_VE:
            return _VE
        _answer(guest, value)
        return None

    return read


def _read_smi_count(guest: Guest) -> int | None:
    if not guest.controls() & CTL_REDUCE_VE:
        return _VE
    _answer(guest, guest.vcpu.rd64(tdvps.MSR_SMI_COUNT))
    return None


def _read_debugctl(guest: Guest) -> None:
    _answer(guest, guest.cpu.vmread(vmcs.DEBUGCTL) & ~DEBUGCTL_UNCORE_PMI)


def _read_misc_enable(guest: Guest) -> None:
    _answer(guest, guest.vcpu.rd64(tdvps.IA32_MISC_ENABLE))


def _read_perf_capabilities(guest: Guest) -> None:
    if not guest.perfmon:
        _answer(guest, 0)
    elif guest.xfam & XFAM_PT:
        raise ModuleFatal("IA32_PERF_CAPABILITIES exited in a TD that has PERFMON and PT")
    else:
        _answer(guest, guest.platform.msrs[Msr.PERF_CAPABILITIES] & ~PERF_CAP_PEBS_OUTPUT_PT)


def _read_arch_capabilities(guest: Guest) -> None:
    _answer(guest, guest.td.rd64(tdcs.VIRTUAL_IA32_ARCH_CAPABILITIES))


def _read_x2apic_id(guest: Guest) -> int | None:
    if not guest.controls() & CTL_ENUM_TOPOLOGY:
        return _VE
    _answer(guest, x2apic_id(guest))
    return None


def _read_xapic_disable(guest: Guest) -> None:
    _answer(guest, XAPIC_DISABLED)


def _write_smi_count(guest: Guest, value: int) -> int | None:
    if not guest.controls() & CTL_REDUCE_VE:
        return _VE
    guest.vcpu.wr64(tdvps.MSR_SMI_COUNT, value)
    return None


def _write_ignored(guest: Guest, value: int) -> int | None:
    del value
    return None if guest.controls() & CTL_REDUCE_VE else _VE


def _write_feature_enables(guest: Guest, value: int) -> int | None:
    if not guest.controls() & CTL_REDUCE_VE:
        return _VE
    return GP if value else None


def _write_misc_enable(guest: Guest, value: int) -> int | None:
    if not guest.controls() & CTL_REDUCE_VE:
        return _VE
    if value & MISC_GP:
        return GP
    before = guest.vcpu.rd64(tdvps.IA32_MISC_ENABLE)
    if value & MISC_EST and not guest.flag(CpuidFlag.EST):
        return GP
    if (value ^ before) & MISC_MONITOR or value & MISC_LIMIT_CPUID:
        return _VE_UNSUPPORTED
    if value & MISC_XTPR_DISABLE and not guest.flag(CpuidFlag.XTPR_UPDATE):
        return GP
    guest.vcpu.wr64(tdvps.IA32_MISC_ENABLE, value & ~MISC_READ_ONLY | before & MISC_READ_ONLY)
    return None


def _write_xss(guest: Guest, value: int) -> int | None:
    if value & ~(guest.platform.xss_supported & guest.xfam):
        return GP
    guest.cpu.core.wrmsr(Msr.XSS, value)
    guest.vcpu.wr64(tdvps.IA32_XSS, value)
    return None


def _write_debugctl(guest: Guest, value: int) -> int | None:
    cpu = guest.cpu
    before = cpu.vmread(vmcs.DEBUGCTL)
    if value & DEBUGCTL_RESERVED:
        return GP
    if value & (DEBUGCTL_TR | DEBUGCTL_BTS) == DEBUGCTL_TR:
        return _VE_UNSUPPORTED
    value = value & ~DEBUGCTL_UNCORE_PMI | before & DEBUGCTL_UNCORE_PMI
    if value & DEBUGCTL_FREEZE_SMM and not guest.perfmon:
        return GP
    if value & DEBUGCTL_RTM and not guest.flag(CpuidFlag.TSX):
        return GP
    cpu.vmwrite(vmcs.DEBUGCTL, value)
    if cpu.vmread(vmcs.RFLAGS) & vmcs.RFLAGS_TF and (value ^ before) & DEBUGCTL_BTF:
        pending = cpu.vmread(vmcs.PENDING_DEBUG) & ~PENDING_DEBUG_BS
        cpu.vmwrite(vmcs.PENDING_DEBUG, pending | (PENDING_DEBUG_BS if before & DEBUGCTL_BTF else 0))
    return None


def _write_efer(guest: Guest, value: int) -> int | None:
    """Only SCE may change; LMA is the processor's."""
    cpu = guest.cpu
    before = cpu.vmread(vmcs.EFER)
    value = value & ~EFER_LMA | before & EFER_LMA
    if (value ^ before) & ~EFER_SCE:
        return _VE_UNSUPPORTED
    cpu.vmwrite(vmcs.EFER, value)
    return None


_READ: Final[dict[int, Callable[[Guest], int | None]]] = {
    SMI_COUNT: _read_smi_count,
    Msr.FEATURE_CONTROL: _reduced_value(FEATURE_CONTROL_LOCKED),
    PPIN_CTL: _reduced_value(FEATURE_CONTROL_LOCKED),
    Msr.BIOS_SIGN_ID: _reduced_value(U32),
    PLATFORM_INFO: _reduced_value(0),
    FEATURE_ENABLES: _reduced_value(0),
    Msr.DEBUGCTL: _read_debugctl,
    Msr.MISC_ENABLE: _read_misc_enable,
    Msr.PERF_CAPABILITIES: _read_perf_capabilities,
    Msr.ARCH_CAPABILITIES: _read_arch_capabilities,
    Msr.X2APIC_APICID: _read_x2apic_id,
    Msr.XAPIC_DISABLE_STATUS: _read_xapic_disable,
}

_WRITE: Final[dict[int, Callable[[Guest, int], int | None]]] = {
    SMI_COUNT: _write_smi_count,
    BIOS_UPDT_TRIG: _write_ignored,
    Msr.BIOS_SIGN_ID: _write_ignored,
    FEATURE_ENABLES: _write_feature_enables,
    Msr.MISC_ENABLE: _write_misc_enable,
    Msr.XSS: _write_xss,
    Msr.DEBUGCTL: _write_debugctl,
    Msr.EFER: _write_efer,
}

_VMX_AT: Final[dict[int, int]] = {
    Msr.VMX_BASIC: tdcs.VIRTUAL_IA32_VMX_BASIC,
    Msr.VMX_MISC: tdcs.VIRTUAL_IA32_VMX_MISC,
    Msr.VMX_CR0_FIXED0: tdcs.VIRTUAL_IA32_VMX_CR0_FIXED0,
    Msr.VMX_CR0_FIXED1: tdcs.VIRTUAL_IA32_VMX_CR0_FIXED1,
    Msr.VMX_CR4_FIXED0: tdcs.VIRTUAL_IA32_VMX_CR4_FIXED0,
    Msr.VMX_CR4_FIXED1: tdcs.VIRTUAL_IA32_VMX_CR4_FIXED1,
    Msr.VMX_PROCBASED_CTLS2: tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS2,
    Msr.VMX_EPT_VPID_CAP: tdcs.VIRTUAL_IA32_VMX_EPT_VPID_CAP,
    Msr.VMX_TRUE_PINBASED_CTLS: tdcs.VIRTUAL_IA32_VMX_TRUE_PINBASED_CTLS,
    Msr.VMX_TRUE_PROCBASED_CTLS: tdcs.VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS,
    Msr.VMX_TRUE_EXIT_CTLS: tdcs.VIRTUAL_IA32_VMX_TRUE_EXIT_CTLS,
    Msr.VMX_TRUE_ENTRY_CTLS: tdcs.VIRTUAL_IA32_VMX_TRUE_ENTRY_CTLS,
    Msr.VMX_VMFUNC: tdcs.VIRTUAL_IA32_VMX_VMFUNC,
    Msr.VMX_PROCBASED_CTLS3: tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS3,
}
