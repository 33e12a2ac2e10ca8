"""The VMCS of a vCPU, and of its L2 VMs, as TDH.VP.INIT makes them.

TDX Module ABI, "TD VMCS" and "L2 VMCS"; Base Spec, "Initial State of Guest Registers".
"""

from typing import Final

from softtdx.abi.exits import MC_VECTOR
from softtdx.abi.msrs import Msr
from softtdx.abi.vmcs import AR_CODE32, AR_DATA32, AR_LDT, AR_TSS_BUSY, AR_UNUSABLE
from softtdx.abi.vmcs_field import VmcsField as F
from softtdx.hw.isa import SeamCpu

from .. import tdcs, tdvps, vmcs
from ..features import (
    ATTR_DEBUG,
    ATTR_KL,
    ATTR_LASS,
    ATTR_PERFMON,
    ATTR_PKS,
    CPUID_FLAGS_SIZE,
    XFAM_CET,
    XFAM_PKU,
    XFAM_ULI,
    CpuidFlag,
)
from ..platform import PlatformConfig
from ..td import Td
from ..virtual_msrs import l2_cr4_writable
from ..vmx_controls import GUEST_CR0_INIT, GUEST_CR4_INIT
from .vcpu import Vcpu

__all__ = ["init_l2_base_masks", "init_td_vmcs", "prepare_vmcs"]

ALL_ONES: Final = (1 << 64) - 1
REVISION_MASK: Final = 0x7FFF_FFFF
NO_VECTOR: Final = 0xFFFF
RESET_VECTOR: Final = 0xFFFF_FFF0
PERF_ALL_GP_COUNTERS: Final = 0xFF
PERF_FIXED_COUNTER_0: Final = 1 << 32
VPID_HKID_SHIFT: Final = 2
MAX_HKID_FOR_VPID: Final = 4096
PAGE: Final = 0xFFF

_SEGMENT_LIMIT: Final = 0xFFFF_FFFF
_TABLE_LIMIT: Final = 0xFFFF

# Guest state that is the same for every vCPU: 32-bit protected mode, flat segments, paging off; LME and NXE are set.
_GUEST_STATE: Final = (
    (F.GUEST_DR7, 0x400),
    (F.GUEST_RIP, RESET_VECTOR),
    (F.GUEST_RFLAGS, 0x2),
    (F.GUEST_CS_LIMIT, _SEGMENT_LIMIT),
    (F.GUEST_CS_ACCESS_RIGHTS, AR_CODE32),
    *((F[f"GUEST_{name}_LIMIT"], _SEGMENT_LIMIT) for name in ("DS", "ES", "FS", "GS", "SS")),
    *((F[f"GUEST_{name}_ACCESS_RIGHTS"], AR_DATA32) for name in ("DS", "ES", "FS", "GS", "SS")),
    (F.GUEST_LDTR_LIMIT, _TABLE_LIMIT),
    (F.GUEST_LDTR_ACCESS_RIGHTS, AR_UNUSABLE | AR_LDT),
    (F.GUEST_TR_LIMIT, _TABLE_LIMIT),
    (F.GUEST_TR_ACCESS_RIGHTS, AR_TSS_BUSY),
    (F.GUEST_GDTR_LIMIT, _TABLE_LIMIT),
    (F.GUEST_IA32_PAT, 0x0007_0406_0007_0406),
    (F.GUEST_IA32_EFER, 0x901),
    (F.GUEST_CR0, GUEST_CR0_INIT),
    (F.GUEST_CR4, GUEST_CR4_INIT),
)

# Control fields with fixed values; addresses of structures that a TD has not are all ones.
_CONTROL_STATE: Final = (
    (F.APIC_ACCESS_ADDRESS, ALL_ONES),
    (F.POSTED_INTERRUPT_VECTOR, NO_VECTOR),
    (F.POSTED_INTERRUPT_DESCRIPTOR, ALL_ONES),
    (F.EXCEPTION_BITMAP, 1 << MC_VECTOR),
    (F.IO_BITMAP_A, ALL_ONES),
    (F.IO_BITMAP_B, ALL_ONES),
    (F.EPTP_LIST_ADDRESS, ALL_ONES),
    (F.VMREAD_BITMAP, ALL_ONES),
    (F.VMWRITE_BITMAP, ALL_ONES),
    (F.ENCLS_EXITING_BITMAP, ALL_ONES),
    (F.PML_ADDRESS, ALL_ONES),
    (F.PCONFIG_EXITING_BITMAP, ALL_ONES),
    (F.EXECUTIVE_VMCS_POINTER, ALL_ONES),
    (F.EXIT_MSR_STORE_ADDRESS, ALL_ONES),
    (F.EXIT_MSR_LOAD_ADDRESS, ALL_ONES),
    (F.ENTRY_MSR_LOAD_ADDRESS, ALL_ONES),
    (F.VMCS_LINK_POINTER, ALL_ONES),
    (F.GUEST_PDPTE0, ALL_ONES),
    (F.GUEST_PDPTE1, ALL_ONES),
    (F.GUEST_PDPTE2, ALL_ONES),
    (F.GUEST_PDPTE3, ALL_ONES),
)

# CR0 and CR4 bits that belong to the module whatever the processor fixes.
CR0_OWNED: Final = 1 << 0 | 1 << 5 | 1 << 29 | 1 << 30 | 0xFFFF_FFFF_0000_0000 | 0x1FFA_FFC0
CR0_PE: Final = 1 << 0
CR0_NE: Final = 1 << 5
CR0_PG: Final = 1 << 31
CR0_SHADOW: Final = 1 << 0 | 1 << 5
CR4_MCE: Final = 1 << 6
CR4_VMXE: Final = 1 << 13
CR4_OWNED: Final = CR4_MCE | CR4_VMXE | 1 << 14 | 1 << 15 | 1 << 26 | 0xFFFF_FFFE_E000_0000
# (CR4 bit, bits of XFAM that must all be set) and (CR4 bit, bit of ATTRIBUTES): without them the bit is the module's
_CR4_BY_XFAM: Final = ((1 << 22, XFAM_PKU), (1 << 23, XFAM_CET), (1 << 25, XFAM_ULI))
_CR4_BY_ATTRIBUTE: Final = ((1 << 19, ATTR_KL), (1 << 24, ATTR_PKS), (1 << 27, ATTR_LASS))


def prepare_vmcs(cpu: SeamCpu, region: int, platform: PlatformConfig) -> None:
    """Make a zeroed page a VMCS: revision identifier, then VMCLEAR."""
    cpu.wr32(region, platform.msrs[Msr.VMX_BASIC] & REVISION_MASK)
    cpu.vmclear(region)


def init_td_vmcs(td: Td, vcpu: Vcpu, platform: PlatformConfig, vm: int = 0) -> None:
    """VMWRITE the VMCS of L1, or of L2 VM number `vm`, of a new vCPU; it is current."""
    vmwrite = td.call.cpu.vmwrite
    attributes = td.rd64(tdcs.ATTRIBUTES)
    for field, value in _GUEST_STATE:
        vmwrite(field, value)
    vmwrite(F.GUEST_IA32_PERF_GLOBAL_CTRL, PERF_ALL_GP_COUNTERS if attributes & ATTR_PERFMON else PERF_FIXED_COUNTER_0)
    for field, value in _CONTROL_STATE:
        vmwrite(field, value)
    if platform.controls.secondary & vmcs.SECONDARY_ENCLV:
        vmwrite(F.ENCLV_EXITING_BITMAP, ALL_ONES)
    _write_addresses(td, vcpu, vm)
    _write_controls(td, attributes, platform, vm)
    if vm:
        _write_l2_masks(td, vcpu, vm, platform)
    else:
        _write_masks(td, vcpu, attributes, platform)
    hkid = td.hkid
    vmwrite(F.VPID, hkid << VPID_HKID_SHIFT | vm if hkid < MAX_HKID_FOR_VPID else 0)


def _write_addresses(td: Td, vcpu: Vcpu, vm: int) -> None:
    """Pages of TDCS and TDVPS that the processor uses; the shared EPT is empty until the host writes its own.

    The virtual APIC and the #VE information of an L2 VM are its L1 VMM's to choose.
    """
    vmwrite = td.call.cpu.vmwrite
    zero = td.pages[tdcs.ZERO_PAGE >> 12]
    eptp = td.rd64(tdcs.EPTP) & ~td.call.g.hkid_mask
    if vm:
        vmwrite(F.VIRTUAL_APIC_ADDRESS, ALL_ONES)
        vmwrite(F.MSR_BITMAPS, vcpu.pages[(tdvps.L2_MSR_BITMAPS_1 >> 12) + tdvps.PAGES_PER_L2_VM * (vm - 1)])
        vmwrite(F.VE_INFORMATION_ADDRESS, ALL_ONES)
        eptp = eptp & PAGE | td.pages[(tdcs.L2_SEPT_ROOT_1 >> 12) + vm - 1] & ~td.call.g.hkid_mask
    else:
        vmwrite(F.VIRTUAL_APIC_ADDRESS, vcpu.pages[tdvps.VAPIC >> 12])
        vmwrite(F.MSR_BITMAPS, td.pages[tdcs.MSR_BITMAPS >> 12])
        vmwrite(F.VE_INFORMATION_ADDRESS, vcpu.pages[0])
    vmwrite(F.LOW_PASID_DIRECTORY, zero)
    vmwrite(F.HIGH_PASID_DIRECTORY, zero)
    vmwrite(F.SHARED_EPTP, zero)
    vmwrite(F.TD_HKID, td.hkid)
    vmwrite(F.TSC_MULTIPLIER, td.rd64(tdcs.TSC_MULTIPLIER))
    vmwrite(F.TSC_OFFSET, td.rd64(tdcs.TSC_OFFSET))
    vmwrite(F.EPTP, eptp)


def _write_controls(td: Td, attributes: int, platform: PlatformConfig, vm: int) -> None:
    vmwrite = td.call.cpu.vmwrite
    controls = platform.l2_controls if vm else platform.controls
    flags = td.read(tdcs.CPUID_FLAGS, CPUID_FLAGS_SIZE)
    debug = attributes & ATTR_DEBUG

    def choose(value: int, bit: int, on: object) -> int:
        return value | bit if on else value & ~bit

    primary = choose(controls.primary, vmcs.PRIMARY_MWAIT | vmcs.PRIMARY_MONITOR, not flags[CpuidFlag.MONITOR_MWAIT])
    primary = choose(primary, vmcs.PRIMARY_RDPMC, not attributes & ATTR_PERFMON)
    secondary = choose(controls.secondary, vmcs.SECONDARY_USER_WAIT, flags[CpuidFlag.WAITPKG])
    secondary = choose(secondary, vmcs.SECONDARY_PCONFIG, flags[CpuidFlag.PCONFIG])
    tertiary = choose(controls.tertiary, vmcs.TERTIARY_GPAW, td.rd8(tdcs.GPAW))
    if platform.ddpd != bool(flags[CpuidFlag.DDPD]):
        tertiary |= vmcs.TERTIARY_SPEC_CTRL
    vmwrite(F.PIN_BASED_CONTROLS, controls.pin)
    vmwrite(F.PROCESSOR_CONTROLS, primary)
    vmwrite(F.SECONDARY_CONTROLS, secondary)
    vmwrite(F.TERTIARY_CONTROLS, tertiary)
    vmwrite(F.EXIT_CONTROLS, choose(controls.exit, vmcs.EXIT_SAVE_PERF, attributes & ATTR_PERFMON or debug))
    vmwrite(F.ENTRY_CONTROLS, choose(controls.entry, vmcs.ENTRY_PKRS, attributes & ATTR_PKS or debug))


def _write_masks(td: Td, vcpu: Vcpu, attributes: int, platform: PlatformConfig) -> None:
    """CR0 and CR4 guest/host masks and read shadows, and their copies in the TDVPS."""
    vmwrite = td.call.cpu.vmwrite
    msrs = platform.msrs
    fixed0, fixed1 = msrs[Msr.VMX_CR0_FIXED0], msrs[Msr.VMX_CR0_FIXED1]
    cr0_mask = ((fixed0 | ~fixed1) & ~CR0_PG | CR0_OWNED) & ALL_ONES
    cr0_shadow = fixed0 | CR0_SHADOW
    fixed0, fixed1 = msrs[Msr.VMX_CR4_FIXED0], msrs[Msr.VMX_CR4_FIXED1]
    cr4_mask = (fixed0 | ~fixed1 | CR4_OWNED) & ALL_ONES
    xfam = td.rd64(tdcs.XFAM)
    for bit, needed in _CR4_BY_XFAM:
        if xfam & needed != needed:
            cr4_mask |= bit
    for bit, needed in _CR4_BY_ATTRIBUTE:
        if not attributes & needed:
            cr4_mask |= bit
    cr4_shadow = fixed0 & ~CR4_VMXE | CR4_MCE
    for field, copy, value in (
        (F.CR0_MASK, tdvps.SHADOW_CR0_GUEST_HOST_MASK, cr0_mask),
        (F.CR0_READ_SHADOW, tdvps.SHADOW_CR0_READ_SHADOW, cr0_shadow),
        (F.CR4_MASK, tdvps.SHADOW_CR4_GUEST_HOST_MASK, cr4_mask),
        (F.CR4_READ_SHADOW, tdvps.SHADOW_CR4_READ_SHADOW, cr4_shadow),
    ):
        vmwrite(field, value)
        vcpu.wr64(copy, value)
    if msrs[Msr.VMX_PROCBASED_CTLS3] & vmcs.TERTIARY_SPEC_CTRL:
        vmwrite(F.SPEC_CTRL_MASK, td.rd64(tdcs.IA32_SPEC_CTRL_MASK))


def _write_l2_masks(td: Td, vcpu: Vcpu, vm: int, platform: PlatformConfig) -> None:
    """An L2 VM starts with every bit of CR0 and CR4 owned by its L1 VMM."""
    vmwrite = td.call.cpu.vmwrite
    for field, copy, value, known in (
        (F.CR0_MASK, tdvps.SHADOW_CR0_GUEST_HOST_MASK, ALL_ONES, ALL_ONES),
        (F.CR0_READ_SHADOW, tdvps.SHADOW_CR0_READ_SHADOW, CR0_SHADOW, 0),
        (F.CR4_MASK, tdvps.SHADOW_CR4_GUEST_HOST_MASK, ALL_ONES, ALL_ONES),
        (F.CR4_READ_SHADOW, tdvps.SHADOW_CR4_READ_SHADOW, CR4_MCE | CR4_VMXE, 0),
    ):
        vmwrite(field, value)
        vcpu.wr64(copy + 8 * vm, known)
    if platform.msrs[Msr.VMX_PROCBASED_CTLS3] & vmcs.TERTIARY_SPEC_CTRL:
        vmwrite(F.SPEC_CTRL_MASK, td.rd64(tdcs.IA32_SPEC_CTRL_MASK))


def init_l2_base_masks(td: Td, vcpu: Vcpu, platform: PlatformConfig) -> None:
    """What the module itself owns of CR0 and CR4 in an L2 VM; every vCPU has it, whether its TD has L2 VMs or not."""
    msrs = platform.msrs
    fixed0, fixed1 = msrs[Msr.VMX_CR0_FIXED0], msrs[Msr.VMX_CR0_FIXED1]
    free = ~(CR0_PG | CR0_PE)
    vcpu.wr64(tdvps.BASE_L2_CR0_GUEST_HOST_MASK, ((fixed0 | ~fixed1) & free | CR0_OWNED & ~CR0_PE) & ALL_ONES)
    vcpu.wr64(tdvps.BASE_L2_CR0_READ_SHADOW, fixed0 & free | CR0_NE)
    vcpu.wr64(tdvps.BASE_L2_CR4_GUEST_HOST_MASK, ~l2_cr4_writable(platform, td) & ALL_ONES)
    vcpu.wr64(tdvps.BASE_L2_CR4_READ_SHADOW, msrs[Msr.VMX_CR4_FIXED0] | CR4_MCE | CR4_VMXE)
