"""VP context, L2 VMs: rules of VMCS and control fields that the L1 VMM of a partitioned TD writes."""

from typing import Final

from softtdx.abi.status import Status
from softtdx.abi.vmcs_field import VmcsField as Field

from .. import tdcs, tdvps
from ..errors import LeafError
from ..transitions.vcpu import Vcpu

__all__ = ["write_l2_control", "write_l2_vmcs"]

NOT_VALID: Final = Status.METADATA_FIELD_VALUE_NOT_VALID
U64: Final = (1 << 64) - 1
NULL_PA: Final = U64
ENABLE_SHARED_EPTP: Final = 1
EPTP_SSS: Final = 1 << 7
XFAM_CET_S: Final = 1 << 12
ZERO_PAGE: Final = 4
MULTIPLIER_SHIFT: Final = 48

_CR_FIELDS: Final = {
    int(Field.CR0_MASK): (0, tdvps.SHADOW_CR0_GUEST_HOST_MASK),
    int(Field.CR0_READ_SHADOW): (0, tdvps.SHADOW_CR0_READ_SHADOW),
    int(Field.CR4_MASK): (4, tdvps.SHADOW_CR4_GUEST_HOST_MASK),
    int(Field.CR4_READ_SHADOW): (4, tdvps.SHADOW_CR4_READ_SHADOW),
}
_CONTROLS: Final = {
    int(Field.PROCESSOR_CONTROLS): tdcs.VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS,
    int(Field.SECONDARY_CONTROLS): tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS2,
}


def write_l2_vmcs(vcpu: Vcpu, code: int, vm: int, value: int, mask: int) -> int | None:
    """The value to write into the L2 VM's current VMCS; None when everything is done."""
    from .vp_fields import write_common, write_cr0

    td = vcpu.td
    if code in _CR_FIELDS:
        register, at = _CR_FIELDS[code]
        vcpu.wr64(at + 8 * vm, value)
        combine_cr_controls(vcpu, register, vm)
        return None
    if code == Field.GUEST_CR0:
        base = vcpu.rd64(tdvps.BASE_L2_CR0_GUEST_HOST_MASK), vcpu.rd64(tdvps.BASE_L2_CR0_READ_SHADOW)
        return write_cr0(vcpu, value, *base)
    if code == Field.GUEST_CR4:
        owned, shadow = vcpu.rd64(tdvps.BASE_L2_CR4_GUEST_HOST_MASK), vcpu.rd64(tdvps.BASE_L2_CR4_READ_SHADOW)
        if value & owned != shadow & owned:
            raise LeafError(NOT_VALID)
        return vcpu.call.cpu.vmread(Field.GUEST_CR4) & owned | value & ~owned
    common = write_common(vcpu, code, value)
    if common is not None:
        return common
    if code == Field.EPTP and value & EPTP_SSS and not td.rd64(tdcs.XFAM) & XFAM_CET_S:
        raise LeafError(NOT_VALID)
    if code in _CONTROLS:
        allowed = td.rd64(_CONTROLS[code])
        if mask & (~value & allowed & 0xFFFF_FFFF | value & ~(allowed >> 32)):
            raise LeafError(NOT_VALID)
    elif code == Field.TERTIARY_CONTROLS:
        if value & mask & ~td.rd64(tdcs.VIRTUAL_IA32_VMX_PROCBASED_CTLS3):
            raise LeafError(NOT_VALID)
    elif code in (Field.PLE_GAP, Field.PLE_WINDOW):
        return _ple(vcpu, code, vm, value)
    elif code == Field.SHARED_EPTP:
        vcpu.wr64(tdvps.SHADOW_SHARED_EPTP + 8 * vm, value)
        if not vcpu.rd64(tdvps.L2_CTLS + 8 * vm) & ENABLE_SHARED_EPTP:
            return None
    elif code == Field.VIRTUAL_APIC_ADDRESS:
        vcpu.wr64(tdvps.L2_VAPIC_GPA + 8 * vm, value)
        vcpu.wr64(tdvps.L2_VAPIC_HPA + 8 * vm, NULL_PA)
        return None
    return value


def combine_cr_controls(vcpu: Vcpu, register: int, vm: int) -> None:
    """CR0 or CR4 mask and shadow of an L2 VM: a bit is its VMM's if that asked for it, else the module's, else free."""
    if register == 0:
        base_mask, base_shadow = tdvps.BASE_L2_CR0_GUEST_HOST_MASK, tdvps.BASE_L2_CR0_READ_SHADOW
        own_mask, own_shadow = tdvps.SHADOW_CR0_GUEST_HOST_MASK, tdvps.SHADOW_CR0_READ_SHADOW
        fields = Field.CR0_MASK, Field.CR0_READ_SHADOW
    else:
        base_mask, base_shadow = tdvps.BASE_L2_CR4_GUEST_HOST_MASK, tdvps.BASE_L2_CR4_READ_SHADOW
        own_mask, own_shadow = tdvps.SHADOW_CR4_GUEST_HOST_MASK, tdvps.SHADOW_CR4_READ_SHADOW
        fields = Field.CR4_MASK, Field.CR4_READ_SHADOW
    own = vcpu.rd64(own_mask + 8 * vm)
    module = vcpu.rd64(base_mask) & ~own
    shadow = module & vcpu.rd64(base_shadow) | own & vcpu.rd64(own_shadow + 8 * vm)
    vcpu.call.cpu.vmwrite(fields[0], own | module)
    vcpu.call.cpu.vmwrite(fields[1], shadow)


def native_tsc(vcpu: Vcpu, virtual: int, offset: int) -> int | None:
    """The native TSC at which the virtual one reads `virtual`; None when it does not fit 64 bits."""
    multiplier = vcpu.td.rd64(tdcs.TSC_MULTIPLIER)
    ticks = virtual - offset & U64
    return None if ticks >> 64 - MULTIPLIER_SHIFT >= multiplier else (ticks << MULTIPLIER_SHIFT) // multiplier


def _ple(vcpu: Vcpu, code: int, vm: int, value: int) -> int:
    """PLE gap and window are given in virtual TSC ticks."""
    vcpu.wr32((tdvps.SHADOW_PLE_GAP if code == Field.PLE_GAP else tdvps.SHADOW_PLE_WINDOW) + 4 * vm, value)
    native = native_tsc(vcpu, value, 0)
    if native is None or native >> 32:
        raise LeafError(NOT_VALID)
    return native


def write_l2_control(vcpu: Vcpu, name: str, vm: int, value: int) -> None:
    """L2_CTLS and TSC_DEADLINE of a VM: what they change beside the field itself."""
    td, cpu = vcpu.td, vcpu.call.cpu
    if not 0 < vm <= td.rd16(tdcs.NUM_L2_VMS):
        return
    if name == "L2_CTLS":
        cpu.vmptrld(vcpu.pages[(tdvps.L2_VMCS_1 >> 12) + 3 * (vm - 1)])
        shared = vcpu.rd64(tdvps.SHADOW_SHARED_EPTP + 8 * vm)
        usable = value & ENABLE_SHARED_EPTP and shared != NULL_PA
        cpu.vmwrite(Field.SHARED_EPTP, shared if usable else td.pages[ZERO_PAGE])
        return
    if value == U64:
        return
    now, offset = cpu.rdtsc(), td.rd64(tdcs.TSC_OFFSET)
    virtual = (now * td.rd64(tdcs.TSC_MULTIPLIER) >> MULTIPLIER_SHIFT) + offset & U64
    deadline: int | None = now
    if value > virtual:
        deadline = native_tsc(vcpu, value, offset)
        if not deadline or deadline - now & 1 << 63:
            raise LeafError(Status.OPERAND_INVALID)
    vcpu.wr64(tdvps.SHADOW_TSC_DEADLINE + 8 * vm, deadline or 0)
