"""MSRs that the guest uses directly and VMX does not switch: loaded at TD entry, saved and scrubbed at TD exit.

The host finds its own values of some and the INIT value of the others (TDX Module Base Spec, "TD Entry", "TD Exit").
"""

import struct
from typing import Final, NamedTuple

from softtdx.abi.exits import ExitReason, ExtendedQualification
from softtdx.abi.msrs import Msr
from softtdx.abi.status import Status

from .. import tdvps
from ..features import XFAM_LBR, CpuidFlag
from .guest import Guest, TdExit

__all__ = ["HostMsrs", "load_guest_msrs", "require_loadable", "save_guest_msrs", "scrub_msrs"]

FMASK_RESET: Final = 0x2_0200
TSX_DISABLED: Final = 3  # IA32_TSX_CTRL: RTM_DISABLE, TSX_CPUID_CLEAR
ARCH_CAP_TSX_CTRL: Final = 1 << 7
MISC_PEBS_UNAVAILABLE: Final = 1 << 12
PERF_CAP_METRICS: Final = 1 << 15
GP_COUNTERS: Final = 8
FIXED_COUNTERS: Final = 7
PERFEVTSEL_FORBIDDEN: Final = 1 << 63
PERFEVTSEL_ENABLE: Final = 1 << 22

# Plain integers, and five fields that lie together in the TDVPS.
STAR, LSTAR, FMASK, KERNEL_GS_BASE, TSC_AUX = map(
    int, (Msr.STAR, Msr.LSTAR, Msr.FMASK, Msr.KERNEL_GS_BASE, Msr.TSC_AUX)
)
SPEC_CTRL, DS_AREA, UARCH_MISC_CTL, TSX_CTRL = map(int, (Msr.SPEC_CTRL, Msr.DS_AREA, Msr.UARCH_MISC_CTL, Msr.TSX_CTRL))
_ALWAYS: Final = (SPEC_CTRL, DS_AREA, UARCH_MISC_CTL, STAR, LSTAR, FMASK, KERNEL_GS_BASE, TSC_AUX)
_SYSCALL: Final = struct.Struct("<5Q")
# Bits that WRMSR refuses in what a debugger may write of a vCPU (SDM vol. 4).
_UMWAIT_RESERVED: Final = ~0xFFFF_FFFD
_TSX_RESERVED: Final = ~3
_UARCH_MISC_RESERVED: Final = ~1
_TSC_AUX_RESERVED: Final = ~0xFFFF_FFFF
_SPEC_CTRL_RESERVED: Final = ~0x5FF
_U64: Final = (1 << 64) - 1
_LBR_DEPTHS: Final = range(8, 65, 8)


class _Switched(NamedTuple):
    """An MSR that some TDs use: its number, where the TDVPS keeps the guest's value, and what the host finds."""

    msr: int
    at: int
    init: int = 0


class HostMsrs(NamedTuple):
    """The host's values to restore at TD exit."""

    spec_ctrl: int
    ds_area: int
    tsx_ctrl: int | None  # None: nothing to restore
    optional: tuple[_Switched, ...]


def _optional(guest: Guest) -> tuple[_Switched, ...]:
    flags = guest.flags
    found: list[_Switched] = []
    if guest.xfam & XFAM_LBR:
        found.append(_Switched(Msr.LBR_DEPTH, tdvps.IA32_LBR_DEPTH, guest.platform.max_lbr_depth))
    if flags[CpuidFlag.WAITPKG]:
        found.append(_Switched(Msr.UMWAIT_CONTROL, tdvps.IA32_UMWAIT_CONTROL))
    if flags[CpuidFlag.TSX]:
        found.append(_Switched(Msr.TSX_CTRL, tdvps.IA32_TSX_CTRL))
    if flags[CpuidFlag.XFD]:
        found.append(_Switched(Msr.XFD, tdvps.IA32_XFD))
        found.append(_Switched(Msr.XFD_ERR, tdvps.IA32_XFD_ERR))
    if guest.perfmon:
        _add_perfmon(guest, found)
    return tuple(found)


def _add_perfmon(guest: Guest, found: list[_Switched]) -> None:
    msrs = guest.platform.msrs
    found.append(_Switched(Msr.FIXED_CTR_CTRL, tdvps.IA32_FIXED_CTR_CTRL))
    fixed = [n for n in range(FIXED_COUNTERS) if guest.platform.fixed_counter_bitmap >> n & 1]
    found.extend(_Switched(Msr.FIXED_CTR0 + n, tdvps.IA32_PMC_FX_CTRX + 8 * n) for n in fixed)
    for n in range(GP_COUNTERS):
        found.append(_Switched(Msr.A_PMC0 + n, tdvps.IA32_PMC_GP_CTRX + 8 * n))
        found.append(_Switched(Msr.PERFEVTSEL0 + n, tdvps.IA32_PMC_GP_CFG_AX + 8 * n))
    found.extend(_Switched(Msr.OFFCORE_RSP0 + n, tdvps.MSR_OFFCORE_RSPX + 8 * n) for n in range(2))
    found.append(_Switched(Msr.PERF_GLOBAL_STATUS, tdvps.IA32_PERF_GLOBAL_STATUS))
    if msrs[Msr.PERF_CAPABILITIES] & PERF_CAP_METRICS:
        found.append(_Switched(Msr.PERF_METRICS, tdvps.IA32_PERF_METRICS))
    if not msrs[Msr.MISC_ENABLE] & MISC_PEBS_UNAVAILABLE:
        found.append(_Switched(Msr.PEBS_ENABLE, tdvps.IA32_PEBS_ENABLE))
        found.append(_Switched(Msr.PEBS_DATA_CFG, tdvps.MSR_PEBS_DATA_CFG))
        found.append(_Switched(Msr.PEBS_LD_LAT, tdvps.MSR_PEBS_LD_LAT))
        found.append(_Switched(Msr.PEBS_FRONTEND, tdvps.MSR_PEBS_FRONTEND))


def load_guest_msrs(guest: Guest) -> HostMsrs:
    """WRMSR of everything that the guest's TDVPS holds; returns what the host had."""
    core = guest.cpu.core
    rd64 = guest.cpu.rd64
    vp = guest.vp
    rdmsr, wrmsr = core.rdmsr, core.wrmsr
    tsx: int | None = None
    if not guest.flags[CpuidFlag.TSX] and guest.platform.msrs[Msr.ARCH_CAPABILITIES] & ARCH_CAP_TSX_CTRL:
        tsx = rdmsr(TSX_CTRL) or 0
        wrmsr(TSX_CTRL, TSX_DISABLED)
    optional: tuple[_Switched, ...] | None = guest.switched_msrs
    if optional is None:
        optional = guest.switched_msrs = _optional(guest)
    host = HostMsrs(rdmsr(SPEC_CTRL) or 0, rdmsr(DS_AREA) or 0, tsx, optional)
    values = (
        rd64(vp + tdvps.IA32_SPEC_CTRL),
        rd64(vp + tdvps.IA32_DS_AREA),
        rd64(vp + tdvps.IA32_UARCH_MISC_CTL),
        *_SYSCALL.unpack(guest.cpu.read(vp + tdvps.IA32_STAR, 40)),
    )
    guest.loaded_msrs = values
    spec_ctrl, ds_area, uarch, star, lstar, fmask, kernel_gs, tsc_aux = values
    wrmsr(DS_AREA, ds_area)
    wrmsr(UARCH_MISC_CTL, uarch)
    wrmsr(STAR, star)
    wrmsr(LSTAR, lstar)
    wrmsr(FMASK, fmask)
    wrmsr(KERNEL_GS_BASE, kernel_gs)
    wrmsr(TSC_AUX, tsc_aux)
    for entry in host.optional:
        value = rd64(vp + entry.at)
        if value & PERFEVTSEL_FORBIDDEN and Msr.PERFEVTSEL0 <= entry.msr < Msr.PERFEVTSEL0 + GP_COUNTERS:
            value &= ~(PERFEVTSEL_FORBIDDEN | PERFEVTSEL_ENABLE)
        wrmsr(entry.msr, value)
    wrmsr(SPEC_CTRL, spec_ctrl)
    return host


def require_loadable(guest: Guest) -> None:
    """TdExit when WRMSR refuses a value: the host wrote it, as the debugger of this TD."""
    if not guest.debug:
        return
    flags = guest.flags
    rd64 = guest.cpu.rd64
    vp = guest.vp
    linear = 57 if guest.platform.la57 else 48
    if (rd64(vp + tdvps.IA32_DS_AREA) + (1 << (linear - 1)) & _U64) >> linear:  # not canonical
        raise _load_failure(DS_AREA)
    if guest.xfam & XFAM_LBR:
        depth = rd64(vp + tdvps.IA32_LBR_DEPTH)
        if depth not in _LBR_DEPTHS or depth > guest.platform.max_lbr_depth:
            raise _load_failure(Msr.LBR_DEPTH)
    for used, msr, at, reserved in (
        (flags[CpuidFlag.WAITPKG], Msr.UMWAIT_CONTROL, tdvps.IA32_UMWAIT_CONTROL, _UMWAIT_RESERVED),
        (flags[CpuidFlag.TSX], TSX_CTRL, tdvps.IA32_TSX_CTRL, _TSX_RESERVED),
        (True, UARCH_MISC_CTL, tdvps.IA32_UARCH_MISC_CTL, _UARCH_MISC_RESERVED),
        (True, TSC_AUX, tdvps.IA32_TSC_AUX, _TSC_AUX_RESERVED),
        (True, SPEC_CTRL, tdvps.IA32_SPEC_CTRL, _SPEC_CTRL_RESERVED),
    ):
        if used and rd64(vp + at) & reserved:
            raise _load_failure(msr)


def _load_failure(msr: int) -> TdExit:
    return TdExit(
        Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        ExitReason.ENTRY_FAILURE_MSR_LOADING,
        extended=ExtendedQualification.MSR_LOAD_FAILURE | msr << 32,
    )


def save_guest_msrs(guest: Guest, host: HostMsrs) -> None:
    """RDMSR into the TDVPS; most of them are as they were loaded, and so is the TDVPS."""
    core = guest.cpu.core
    wr64 = guest.cpu.wr64
    vp = guest.vp
    rdmsr = core.rdmsr
    values = tuple([rdmsr(msr) or 0 for msr in _ALWAYS])
    if values != guest.loaded_msrs:
        wr64(vp + tdvps.IA32_SPEC_CTRL, values[0])
        wr64(vp + tdvps.IA32_DS_AREA, values[1])
        wr64(vp + tdvps.IA32_UARCH_MISC_CTL, values[2])
        guest.cpu.write(vp + tdvps.IA32_STAR, _SYSCALL.pack(*values[3:]))
    for entry in host.optional:
        if guest.filtered and Msr.PERFEVTSEL0 <= entry.msr < Msr.PERFEVTSEL0 + GP_COUNTERS:
            continue  # the TDVPS holds what the guest wrote, the MSR what the event filter left of it
        wr64(vp + entry.at, rdmsr(entry.msr) or 0)


def scrub_msrs(guest: Guest, host: HostMsrs) -> None:
    """The host's values, or INIT values: nothing of the TD stays in an MSR."""
    wrmsr = guest.cpu.core.wrmsr
    wrmsr(DS_AREA, host.ds_area)
    wrmsr(UARCH_MISC_CTL, 0)
    wrmsr(STAR, 0)
    wrmsr(LSTAR, 0)
    wrmsr(FMASK, FMASK_RESET)
    wrmsr(KERNEL_GS_BASE, 0)
    wrmsr(TSC_AUX, 0)
    for entry in host.optional:
        wrmsr(entry.msr, entry.init)
    if host.tsx_ctrl is not None:
        wrmsr(TSX_CTRL, host.tsx_ctrl)
    wrmsr(SPEC_CTRL, host.spec_ctrl)
