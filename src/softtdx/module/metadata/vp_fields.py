"""VP context: TDVPS fields and the TD VMCS, with the rules of those that are more than bytes (TDH/TDG.VP.RD and WR)."""

from typing import Final

from softtdx.abi.fields import L2_VMCS_CLASSES, VMCS_CLASS, FieldAttributes, MdContext
from softtdx.abi.status import Status
from softtdx.abi.vmcs_field import VmcsField as Field
from softtdx.hw.faults import VmFail

from .. import features, limits, sept, tdcs, tdvps
from ..errors import LeafError
from ..shared import is_shared
from ..transitions.vcpu import Vcpu
from .engine import GUEST, Context, Location, View
from .td_fields import forbidden_bits_change

__all__ = ["context_of", "read_element", "read_field", "write_element"]

ID_INCORRECT: Final = Status.METADATA_FIELD_ID_INCORRECT
NOT_VALID: Final = Status.METADATA_FIELD_VALUE_NOT_VALID
NOT_WRITABLE: Final = Status.METADATA_FIELD_NOT_WRITABLE

VMCS_CLASSES: Final = frozenset({VMCS_CLASS, *L2_VMCS_CLASSES})
MSR_BITMAP_CLASSES: Final = (37, 45, 53)
SHADOW_BITMAP_CLASSES: Final = (38, 46, 54)
EXT_STATE_CLASS: Final = 18
L2_STEP: Final = 3 << 12  # a TDVPS has three pages for each L2 VM
PAGE: Final = 4096
HIGH_ACCESS: Final = 1  # VMCS encodings: the upper half of a 64-bit field
U64: Final = (1 << 64) - 1
INVALID_PA: Final = 1 << 63
NULL_PA: Final = U64
POSTED_DESCRIPTOR_SIZE: Final = 64
VECTOR_NOT_SET: Final = 0xFFFF
NO_DESCRIPTOR: Final = U64
XSAVE_HEADER: Final = range(512 // 8, 576 // 8)
XCR0_PT: Final = 8
SVI_NONE: Final = 30
PRIORITY: Final = 0xF0
PPR: Final = 0xA0
CR4_MCE: Final = 1 << 6
CR0_PG: Final = 1 << 31
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
DEBUGCTL_TR: Final = 1 << 6
DEBUGCTL_BTS: Final = 1 << 7
DEBUGCTL_UNCORE_PMI: Final = 1 << 13
CR3_RESERVED: Final = (1 << 3) - 1 | 0x7F << 5 | 0x1FF << 52 | 1 << 63
CR3_LAM: Final = 3 << 61
PROCESS_POSTED_INTERRUPTS: Final = 1 << 7
ENABLE_PML: Final = 1 << 17
MSR_PROCBASED2: Final = 0x48B
VECTOR_MIN, VECTOR_MAX = 0, 0xFF
SPEC_CTRL_DDPD_U: Final = 1 << 8
MISC_ENABLE_READ_ONLY: Final = 1 << 7 | 1 << 11 | 1 << 12
MISC_ENABLE_MUST_BE_0: Final = 0xFFFF_FFFF_FF3A_E776
MISC_ENABLE_EST: Final = 1 << 16
MISC_ENABLE_MONITOR: Final = 1 << 18
MISC_ENABLE_LIMIT_CPUID: Final = 1 << 22
MISC_ENABLE_TPR: Final = 1 << 23


def context_of(vcpu: Vcpu) -> Context:
    """The VP context of a vCPU."""
    return Context(MdContext.VP, vcpu.td.rd16(tdcs.NUM_L2_VMS))


class _Element:
    """One element of a vCPU's fields. `offset` is None for a VMCS field; `vm` is 0 for L1."""

    __slots__ = ("offset", "read_mask", "row", "size", "value", "vm", "write_mask")

    def __init__(self, vcpu: Vcpu, location: Location, view: View) -> None:
        row = location.row
        self.row = row
        self.size = row.element_size
        self.read_mask, self.write_mask = view.masks(row)
        self.vm = _l2_vm(vcpu, location.class_code)
        self.offset: int | None = None
        if location.class_code in VMCS_CLASSES:
            value = _vmread(vcpu, location, self.vm)
        else:
            offset = (row.offset or 0) + location.number * self.size
            if location.class_code in MSR_BITMAP_CLASSES and view.name != "host":
                offset += PAGE  # only a debugger sees the real bitmaps, others their shadow
            self.offset = offset
            value = int.from_bytes(_read(vcpu, offset, self.size), "little")
        if row.special_rd:
            value = _special_read(vcpu, location, value, view, self.vm)
        self.value = value & (1 << 8 * self.size) - 1

    def store(self, vcpu: Vcpu, location: Location, value: int) -> None:
        """Write the element. LeafError METADATA_FIELD_NOT_WRITABLE for a VMCS field that is read-only."""
        if self.offset is not None:
            vcpu.write(self.offset, value.to_bytes(self.size, "little"))
            return
        try:
            vcpu.call.cpu.vmwrite(location.field_code, value)
        except VmFail:
            raise LeafError(NOT_WRITABLE) from None


def _read(vcpu: Vcpu, offset: int, size: int) -> bytes:
    if offset >> 12 >= len(vcpu.pages):
        raise LeafError(ID_INCORRECT)
    return vcpu.read(offset, size)


def _l2_vm(vcpu: Vcpu, class_code: int) -> int:
    """The L2 VM that a class belongs to, 0 for L1. LeafError when the TD has no such VM."""
    for classes in (L2_VMCS_CLASSES, MSR_BITMAP_CLASSES, SHADOW_BITMAP_CLASSES):
        if class_code in classes:
            vm = classes.index(class_code) + 1
            if vm > vcpu.td.rd16(tdcs.NUM_L2_VMS):
                raise LeafError(ID_INCORRECT)
            return vm
    return 0


def _vmread(vcpu: Vcpu, location: Location, vm: int) -> int:
    if location.field_code & HIGH_ACCESS:
        raise LeafError(ID_INCORRECT)
    cpu = vcpu.call.cpu
    cpu.vmptrld(vcpu.pages[1] if vm == 0 else vcpu.pages[(tdvps.L2_VMCS_1 >> 12) + 3 * (vm - 1)])
    try:
        return cpu.vmread(location.field_code)
    except VmFail:
        raise LeafError(ID_INCORRECT) from None


def _special_read(vcpu: Vcpu, location: Location, value: int, view: View, vm: int) -> int:
    name = location.row.name
    if name == "VCPU_STATE_DETAILS":
        if view is GUEST:
            _update_state_details(vcpu)
        return vcpu.rd64(tdvps.VCPU_STATE_DETAILS)
    if name == "IA32_SPEC_CTRL":
        return _virtual_spec_ctrl(vcpu, value)
    if vm and location.class_code in L2_VMCS_CLASSES:
        return _l2_read(vcpu, location.field_code, value, view, vm)
    return value


_L2_SHADOWS: Final = {
    int(Field.CR0_MASK): tdvps.SHADOW_CR0_GUEST_HOST_MASK,
    int(Field.CR0_READ_SHADOW): tdvps.SHADOW_CR0_READ_SHADOW,
    int(Field.CR4_MASK): tdvps.SHADOW_CR4_GUEST_HOST_MASK,
    int(Field.CR4_READ_SHADOW): tdvps.SHADOW_CR4_READ_SHADOW,
}


def _l2_read(vcpu: Vcpu, code: int, value: int, view: View, vm: int) -> int:
    """What an L2 VM's VMCS field is to its L1 VMM: its own masks and shadows, not what the module made of them."""
    if code == Field.SHARED_EPTP:
        return vcpu.rd64(tdvps.SHADOW_SHARED_EPTP + 8 * vm)
    if code == Field.VIRTUAL_APIC_ADDRESS:
        return vcpu.rd64(tdvps.L2_VAPIC_GPA + 8 * vm)
    if view.name == "host":
        return value
    if code in _L2_SHADOWS:
        return vcpu.rd64(_L2_SHADOWS[code] + 8 * vm)
    if code == Field.GUEST_CR0:
        mask = vcpu.rd64(tdvps.BASE_L2_CR0_GUEST_HOST_MASK)
        return value & ~mask | vcpu.rd64(tdvps.BASE_L2_CR0_READ_SHADOW) & mask
    if code == Field.GUEST_CR4:
        mask = vcpu.rd64(tdvps.BASE_L2_CR4_GUEST_HOST_MASK)
        return value & ~mask | vcpu.rd64(tdvps.BASE_L2_CR4_READ_SHADOW) & mask
    if code == Field.PLE_GAP:
        return vcpu.rd32(tdvps.SHADOW_PLE_GAP + 4 * vm)
    if code == Field.PLE_WINDOW:
        return vcpu.rd32(tdvps.SHADOW_PLE_WINDOW + 4 * vm)
    return value


def _update_state_details(vcpu: Vcpu) -> None:
    """VCPU_STATE_DETAILS of L1: bit 0 interrupt pending, 4 in service, 8 NMI pending."""
    status = vcpu.call.cpu.vmread(Field.GUEST_INTERRUPT_STATUS)
    requested, servicing = status & 0xFF, status >> 8 & 0xFF
    details = vcpu.rd64(tdvps.VCPU_STATE_DETAILS) & ~0x111
    if requested & PRIORITY > vcpu.rd8(tdvps.VAPIC + PPR) & PRIORITY:
        details |= 1 << 0
    if servicing > SVI_NONE:
        details |= 1 << 4
    if vcpu.rd8(tdvps.PEND_NMI):
        details |= 1 << 8
    vcpu.wr64(tdvps.VCPU_STATE_DETAILS, details)


def _hides_ddpd(vcpu: Vcpu) -> bool:
    """The CPU has DDPD_U and the TD does not know: the module keeps the bit set behind its back."""
    return vcpu.call.g.platform.ddpd and not vcpu.td.rd8(tdcs.CPUID_FLAGS + features.CpuidFlag.DDPD)


def _virtual_spec_ctrl(vcpu: Vcpu, value: int) -> int:
    return value & ~SPEC_CTRL_DDPD_U if _hides_ddpd(vcpu) else value


def _real_spec_ctrl(vcpu: Vcpu, value: int) -> int:
    if not vcpu.call.g.platform.ddpd:
        return value & ~SPEC_CTRL_DDPD_U
    return value | SPEC_CTRL_DDPD_U if _hides_ddpd(vcpu) else value


def read_element(vcpu: Vcpu, location: Location, view: View) -> int:
    """The value of one element as `view` sees it. LeafError: METADATA_FIELD_ID_INCORRECT, FIELD_NOT_READABLE."""
    element = _Element(vcpu, location, view)
    if not element.read_mask:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    return element.value & element.read_mask


def read_field(vcpu: Vcpu, location: Location, view: View) -> list[int]:
    """All elements of a field: every vCPU field has one."""
    return [read_element(vcpu, location, view)]


def write_element(vcpu: Vcpu, location: Location, view: View, value: int, requested: int) -> int:
    """Write the bits in `requested` that are writable; returns the old value as `view` sees it.

    LeafError in this order: METADATA_FIELD_ID_INCORRECT, FIELD_NOT_WRITABLE, FIELD_VALUE_NOT_VALID, those of the
    field's own rules.
    """
    element = _Element(vcpu, location, view)
    row = element.row
    mask = element.write_mask & requested
    if not mask:
        raise LeafError(NOT_WRITABLE)
    old = element.value & element.read_mask
    # A whole element is replaced without regard to what it held.
    current = 0 if mask == (1 << 8 * element.size) - 1 else element.value
    if row.attributes & (FieldAttributes.GPA | FieldAttributes.HPA) and current & INVALID_PA:
        current &= element.write_mask
    if forbidden_bits_change(current, value, requested, element.write_mask, element.read_mask):
        raise LeafError(NOT_VALID)
    new = current & ~mask | value & mask
    _check_address(vcpu, location, new)
    if row.special_wr:
        rewritten = _special_write(vcpu, location, element, new, mask, current)
        if rewritten is None:
            return old
        new = rewritten
    element.store(vcpu, location, new)
    return old


def _check_address(vcpu: Vcpu, location: Location, value: int) -> None:
    attributes = location.row.attributes
    if value == NULL_PA:
        return
    if attributes & FieldAttributes.HPA and attributes & FieldAttributes.SHARED:
        descriptor = location.class_code in VMCS_CLASSES and location.field_code == Field.POSTED_INTERRUPT_DESCRIPTOR
        if not is_shared(vcpu.call.g, value, POSTED_DESCRIPTOR_SIZE if descriptor else PAGE):
            raise LeafError(NOT_VALID)
    elif attributes & FieldAttributes.GPA and attributes & FieldAttributes.PRIVATE and not _private_gpa(vcpu, value):
        raise LeafError(NOT_VALID)


def _private_gpa(vcpu: Vcpu, gpa: int) -> bool:
    return not gpa & sept.forbidden_private(vcpu.td)


def _special_write(vcpu: Vcpu, location: Location, element: _Element, new: int, mask: int, current: int) -> int | None:
    """Rules of fields that are more than bytes: the value to store, or None when there is nothing left to do."""
    if location.class_code == VMCS_CLASS:
        return _write_vmcs(vcpu, location.field_code, new, mask)
    if location.class_code in L2_VMCS_CLASSES:
        from .l2_fields import write_l2_vmcs

        return write_l2_vmcs(vcpu, location.field_code, element.vm, new, mask)
    if location.class_code in MSR_BITMAP_CLASSES:
        _write_l2_bitmap(vcpu, element.vm, location.number, new)
        return None
    return _write_tdvps(vcpu, location, new, current)


def write_cr0(vcpu: Vcpu, value: int, mask: int, shadow: int) -> int:
    """A CR0 value as if the guest wrote it; EFER.LMA follows PG. LeafError METADATA_FIELD_VALUE_NOT_VALID."""
    cpu = vcpu.call.cpu
    if value & mask != shadow & mask:
        raise LeafError(NOT_VALID)
    value = cpu.vmread(Field.GUEST_CR0) & mask | value & ~mask
    cpu.vmwrite(Field.GUEST_IA32_EFER, _efer(cpu.vmread(Field.GUEST_IA32_EFER), value))
    return value


def _efer(efer: int, cr0: int) -> int:
    active = efer & EFER_LME and cr0 & CR0_PG
    return efer & ~EFER_LMA | (EFER_LMA if active else 0)


def write_common(vcpu: Vcpu, code: int, value: int) -> int | None:
    """Rules that the VMCS of L1 and of L2 VMs share; None when `code` is not among them."""
    cpu, td = vcpu.call.cpu, vcpu.td
    if code == Field.GUEST_IA32_EFER:
        return _efer(value, cpu.vmread(Field.GUEST_CR0))
    if code == Field.GUEST_CR3:
        checked = value & ~CR3_LAM if vcpu.call.g.platform.lam else value
        if value & CR3_RESERVED or not _private_gpa(vcpu, checked):
            raise LeafError(NOT_VALID)
        return value
    if code == Field.GUEST_IA32_DEBUGCTL:
        debug = td.rd64(tdcs.ATTRIBUTES) & limits.ATTR_DEBUG
        if value & (DEBUGCTL_TR | DEBUGCTL_BTS) == DEBUGCTL_TR and not debug:
            raise LeafError(NOT_VALID)
        return value & ~DEBUGCTL_UNCORE_PMI
    return None


def _write_vmcs(vcpu: Vcpu, code: int, value: int, mask: int) -> int:
    cpu = vcpu.call.cpu
    if code == Field.GUEST_CR0:
        return write_cr0(vcpu, value, cpu.vmread(Field.CR0_MASK), cpu.vmread(Field.CR0_READ_SHADOW))
    if code == Field.GUEST_CR4:
        return _write_cr4(vcpu, value)
    common = write_common(vcpu, code, value)
    if common is not None:
        return common
    if code == Field.PIN_BASED_CONTROLS:
        _check_posted_interrupts(vcpu, value)
    elif code == Field.POSTED_INTERRUPT_DESCRIPTOR:
        vcpu.wr64(tdvps.SHADOW_PID_HPA, value)
    elif code == Field.POSTED_INTERRUPT_VECTOR:
        if not VECTOR_MIN <= value <= VECTOR_MAX:
            raise LeafError(NOT_VALID)
        vcpu.wr16(tdvps.SHADOW_POSTED_INT_NOTIFICATION_VECTOR, value)
    elif code == Field.SECONDARY_CONTROLS:
        _check_secondary(vcpu, value, mask)
    elif code == Field.SHARED_EPTP:
        vcpu.wr64(tdvps.SHADOW_SHARED_EPTP, value)
    return value


def _write_cr4(vcpu: Vcpu, value: int) -> int:
    """CR4 as if the guest wrote it: MCE is always on and its virtual value is in the shadow."""
    cpu = vcpu.call.cpu
    mask, shadow = cpu.vmread(Field.CR4_MASK), cpu.vmread(Field.CR4_READ_SHADOW)
    shadow = shadow & ~CR4_MCE | value & CR4_MCE
    cpu.vmwrite(Field.CR4_READ_SHADOW, shadow)
    value |= CR4_MCE
    mask &= ~CR4_MCE
    if value & mask != shadow & mask:
        raise LeafError(NOT_VALID)
    return cpu.vmread(Field.GUEST_CR4) & mask | value & ~mask


def _check_posted_interrupts(vcpu: Vcpu, controls: int) -> None:
    cpu = vcpu.call.cpu
    if controls & PROCESS_POSTED_INTERRUPTS:
        for field, unset in (
            (Field.POSTED_INTERRUPT_VECTOR, VECTOR_NOT_SET),
            (Field.POSTED_INTERRUPT_DESCRIPTOR, NO_DESCRIPTOR),
        ):
            if cpu.vmread(field) == unset:
                raise LeafError(Status.TD_VMCS_FIELD_NOT_INITIALIZED, field)
    vcpu.wr32(tdvps.SHADOW_PINBASED_EXEC_CTLS, controls)


def _check_secondary(vcpu: Vcpu, controls: int, mask: int) -> None:
    capability = vcpu.call.g.platform.msrs[MSR_PROCBASED2]
    must, may = capability & 0xFFFF_FFFF, capability >> 32
    if mask & (~controls & must | controls & ~may):
        raise LeafError(NOT_VALID)
    if controls & ENABLE_PML:
        debug = vcpu.td.rd64(tdcs.ATTRIBUTES) & limits.ATTR_DEBUG
        if not debug or vcpu.call.cpu.vmread(Field.PML_ADDRESS) & INVALID_PA:
            raise LeafError(NOT_VALID)


def _write_l2_bitmap(vcpu: Vcpu, vm: int, number: int, value: int) -> None:
    """An L2 VM's MSR bitmaps: its VMM's choice, and whatever the TD itself may not touch without an exit."""
    base = tdvps.L2_MSR_BITMAPS_1 + L2_STEP * (vm - 1) + 8 * number
    vcpu.wr64(base + PAGE, value)
    vcpu.wr64(base, vcpu.td.rd64(tdcs.MSR_BITMAPS + 8 * number) | value)


def _write_tdvps(vcpu: Vcpu, location: Location, value: int, current: int) -> int | None:
    td, name = vcpu.td, location.row.name
    xfam = td.rd64(tdcs.XFAM)
    if name == "XCR0":
        if not features.xcr0_valid(vcpu.call.g.platform.xcr0_supported & xfam, value):
            raise LeafError(NOT_VALID)
    elif location.class_code == EXT_STATE_CLASS:
        pt = td.rd32(tdcs.XBUFF_OFFSETS + 4 * XCR0_PT) // 8 if xfam >> XCR0_PT & 1 else None
        if location.field_code in XSAVE_HEADER or location.field_code == pt:
            raise LeafError(NOT_WRITABLE)
    elif name == "IA32_MISC_ENABLE":
        return _misc_enable(vcpu, value)
    elif name == "IA32_SPEC_CTRL":
        return _real_spec_ctrl(vcpu, value)
    elif name == "IA32_XSS":
        if value & ~(vcpu.call.g.platform.xss_supported & xfam):
            raise LeafError(NOT_VALID)
    elif name in ("CPUID_CONTROL", "CPUID_SUPERVISOR_VE", "CPUID_USER_VE"):
        if td.rd64(tdcs.TD_CTLS) & features.CTL_LOCK:
            if value != current:
                raise LeafError(NOT_VALID)
            return None
    elif name in ("L2_CTLS", "TSC_DEADLINE"):
        from .l2_fields import write_l2_control

        write_l2_control(vcpu, name, location.number, value)
    return value


def _misc_enable(vcpu: Vcpu, value: int) -> int:
    """IA32_MISC_ENABLE of a TD, as its own WRMSR would do it."""
    flag = vcpu.td.read(tdcs.CPUID_FLAGS, 32)
    before = vcpu.rd64(tdvps.IA32_MISC_ENABLE)
    if (
        value & (MISC_ENABLE_MUST_BE_0 | MISC_ENABLE_LIMIT_CPUID)
        or (value & MISC_ENABLE_EST and not flag[features.CpuidFlag.EST])
        or (value ^ before) & MISC_ENABLE_MONITOR
        or (value & MISC_ENABLE_TPR and not flag[features.CpuidFlag.XTPR_UPDATE])
    ):
        raise LeafError(NOT_VALID)
    return value & ~MISC_ENABLE_READ_ONLY | before & MISC_ENABLE_READ_ONLY
