"""The state of an ordinary VM's vCPU, between its VMCS and what user space reads and writes (arch/x86/kvm/vmx/vmx.c).

Segments, control registers and events. What VMX does not keep in the VMCS is in `vmx_state`, MSRs are in `vmx_msrs`.
"""

import errno
from typing import TYPE_CHECKING, Final

from softtdx.abi import vmcs
from softtdx.abi.kvm import SHADOW_INT_MOV_SS, SHADOW_INT_STI, VcpuEventFlag
from softtdx.abi.kvm_structs import VcpuEventsStruct
from softtdx.abi.msrs import Msr
from softtdx.abi.vmcs import AR_LDT, AR_TSS_BUSY, AR_UNUSABLE
from softtdx.abi.vmcs_field import VmcsField
from softtdx.hw import LogicalProcessor
from softtdx.kvm import emulate
from softtdx.kvm.errors import KvmError
from softtdx.kvm.mmu import walk_guest
from softtdx.kvm.uapi import Segment, Sregs

if TYPE_CHECKING:
    from softtdx.kvm.vmx import VmxVcpu

__all__ = [
    "DR7_FIXED", "EFER_VALID", "PAT_RESET", "cr8", "get_events", "get_sregs", "set_events", "set_sregs", "translate",
    "write_reset_state", "write_sregs",
]  # fmt: skip

DR7_FIXED: Final = 0x400
PAT_RESET: Final = 0x0007_0406_0007_0406
_CR0_PG, _CR0_CD, _CR0_NW, _CR0_PE = 1 << 31, 1 << 30, 1 << 29, 1
_CR4_PAE, _CR4_VMXE = 1 << 5, 1 << 13
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
EFER_VALID: Final = 0xD01  # SCE, LME, LMA, NX
_CS_L: Final = 1 << 13
_SEGMENTS: Final = {name: name.upper() for name in ("es", "cs", "ss", "ds", "fs", "gs", "tr")} | {"ldt": "LDTR"}
_VALID, _HAS_ERROR_CODE = 1 << 31, 1 << 11
_EXTERNAL, _NMI, _EXCEPTION, _SOFT_INTERRUPT = 0, 2, 3, 4
_STI, _MOV_SS, _BLOCKED_BY_NMI = 1, 2, 8
_TPR: Final = 0x80  # in the virtual-APIC page
_U32: Final = 0xFFFF_FFFF


# --- special registers
def get_sregs(ops: "VmxVcpu") -> Sregs:
    """KVM_GET_SREGS2, from the VMCS."""
    with ops.loaded() as lp:
        read = lp.core.vmread
        shadow, cr4 = read(vmcs.CR4_READ_SHADOW), read(vmcs.GUEST_CR4)
        info = read(vmcs.ENTRY_INTERRUPTION_INFO)
        external = info & _VALID and info >> 8 & 7 == _EXTERNAL
        return Sregs(
            **{name: _read_segment(lp, part) for name, part in _SEGMENTS.items()},
            gdt_base=read(vmcs.GUEST_GDTR_BASE),
            gdt_limit=read(vmcs.GUEST_GDTR_LIMIT),
            idt_base=read(vmcs.GUEST_IDTR_BASE),
            idt_limit=read(vmcs.GUEST_IDTR_LIMIT),
            cr0=read(vmcs.GUEST_CR0),
            cr2=lp.core.cr2,
            cr3=read(vmcs.GUEST_CR3),
            cr4=cr4 & ~_CR4_VMXE | shadow & _CR4_VMXE,
            cr8=cr8(ops),
            efer=read(vmcs.GUEST_IA32_EFER),
            apic_base=emulate.read_msr(ops.vcpu, Msr.APIC_BASE),
            pending_interrupt=info & 0xFF if external else None,
        )


def set_sregs(ops: "VmxVcpu", sregs: Sregs) -> None:
    """KVM_SET_SREGS2. EINVAL for what no processor can have; nothing was changed then."""
    _check(sregs)
    if sregs.apic_base is not None and not emulate.write_msr(ops.vcpu, Msr.APIC_BASE, sregs.apic_base):
        raise KvmError(errno.EINVAL, f"APIC base {sregs.apic_base:#x}")
    ops.sregs = sregs
    if ops.vcpu.apic is not None:
        ops.vcpu.vm.host.memory.write(ops.virtual_apic + _TPR, bytes([sregs.cr8 << 4 & 0xFF]))
    if not ops.set_up and sregs.pending_interrupt is None and not sregs.cr2:
        return  # the VMCS is written when the vCPU first runs
    with ops.loaded() as lp:
        write_sregs(lp, sregs)
        lp.core.cr2 = sregs.cr2
        if sregs.pending_interrupt is not None:
            lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _VALID | sregs.pending_interrupt)


def _check(s: Sregs) -> None:
    """What kvm_is_valid_sregs looks at."""
    paging, long_mode = bool(s.cr0 & _CR0_PG), bool(s.efer & _EFER_LMA)
    wrong = None
    if s.cr0 >> 32 or (s.cr0 & _CR0_NW and not s.cr0 & _CR0_CD) or (paging and not s.cr0 & _CR0_PE):
        wrong = f"CR0 {s.cr0:#x}"
    elif s.efer & ~EFER_VALID:
        wrong = f"EFER {s.efer:#x}"
    elif paging and s.efer & _EFER_LME:
        if not long_mode or not s.cr4 & _CR4_PAE:
            wrong = f"64-bit mode with EFER {s.efer:#x} and CR4 {s.cr4:#x}"
        elif s.cr3 >> 52:
            wrong = f"CR3 {s.cr3:#x}"
    elif long_mode or (s.cs.access & _CS_L and not s.cs.access & AR_UNUSABLE):
        wrong = f"EFER {s.efer:#x} and code segment access rights {s.cs.access:#x} outside of 64-bit mode"
    if s.cr4 >> 32 or s.cr4 & _CR4_VMXE:
        wrong = f"CR4 {s.cr4:#x}"
    if wrong is not None:
        raise KvmError(errno.EINVAL, f"registers that contradict each other: {wrong}")


def write_sregs(lp: LogicalProcessor, s: Sregs) -> None:
    """Write the special registers into the current VMCS."""
    for name, part in _SEGMENTS.items():
        _write_segment(lp, part, getattr(s, name))
    fields = {
        vmcs.GUEST_GDTR_BASE: s.gdt_base,
        vmcs.GUEST_GDTR_LIMIT: s.gdt_limit,
        vmcs.GUEST_IDTR_BASE: s.idt_base,
        vmcs.GUEST_IDTR_LIMIT: s.idt_limit,
        vmcs.GUEST_CR0: s.cr0,
        vmcs.GUEST_CR3: s.cr3,
        vmcs.GUEST_CR4: s.cr4 | _CR4_VMXE,
        vmcs.CR4_READ_SHADOW: s.cr4,
        vmcs.GUEST_IA32_EFER: s.efer,
    }
    for field, value in fields.items():
        lp.core.vmwrite(field, value)


def write_reset_state(lp: LogicalProcessor) -> None:
    """What of the VMCS no special register is: as after reset."""
    for field, value in (
        (vmcs.GUEST_IA32_PAT, PAT_RESET),
        (vmcs.GUEST_DR7, DR7_FIXED),
        (vmcs.GUEST_INTERRUPTIBILITY, 0),
        (vmcs.GUEST_ACTIVITY_STATE, 0),
        (vmcs.ENTRY_INTERRUPTION_INFO, 0),
    ):
        lp.core.vmwrite(field, value)


def _write_segment(lp: LogicalProcessor, part: str, segment: Segment) -> None:
    if part == "LDTR" and segment.access == AR_UNUSABLE:
        segment = Segment(0, 0, 0, AR_LDT | AR_UNUSABLE)
    elif part == "TR" and segment.access == AR_UNUSABLE:
        segment = Segment(0, 0, 0xFFFF, AR_TSS_BUSY)
    for suffix, value in (
        ("SELECTOR", segment.selector),
        ("BASE", segment.base),
        ("LIMIT", segment.limit),
        ("ACCESS_RIGHTS", segment.access),
    ):
        lp.core.vmwrite(_field(part, suffix), value)


def _read_segment(lp: LogicalProcessor, part: str) -> Segment:
    return Segment(*(lp.core.vmread(_field(part, x)) for x in ("SELECTOR", "BASE", "LIMIT", "ACCESS_RIGHTS")))


def _field(part: str, suffix: str) -> int:
    return VmcsField[f"GUEST_{part}_{suffix}"].value


def cr8(ops: "VmxVcpu") -> int:
    """The task priority, as CR8 shows it; 0 without a local APIC."""
    if not ops.virtual_apic:
        return 0
    return ops.vcpu.vm.host.memory.read(ops.virtual_apic + _TPR, 1)[0] >> 4


def translate(ops: "VmxVcpu", address: int) -> int | None:
    """KVM_TRANSLATE: the guest's page tables walked; without paging the address itself."""
    with ops.loaded() as lp:
        if not lp.core.vmread(vmcs.GUEST_CR0) & _CR0_PG:
            return address & _U32
        if not lp.core.vmread(vmcs.GUEST_IA32_EFER) & _EFER_LMA:
            return None  # the walker knows the tables of 64-bit mode
        try:
            return walk_guest(ops.vcpu.vm, lp.core.vmread(vmcs.GUEST_CR3), address)
        except KvmError:
            return None


# --- events
def get_events(ops: "VmxVcpu") -> VcpuEventsStruct:
    """KVM_GET_VCPU_EVENTS: what waits to be injected, and what blocks it."""
    events = VcpuEventsStruct()
    with ops.loaded() as lp:
        info, blocked = lp.core.vmread(vmcs.ENTRY_INTERRUPTION_INFO), lp.core.vmread(vmcs.GUEST_INTERRUPTIBILITY)
        code = lp.core.vmread(vmcs.ENTRY_EXCEPTION_ERROR_CODE)
    kind = info >> 8 & 7
    if info & _VALID and kind == _EXCEPTION:
        events.exception_injected, events.exception_nr = 1, info & 0xFF
        if info & _HAS_ERROR_CODE:
            events.exception_has_error_code, events.exception_error_code = 1, code
    elif info & _VALID and kind == _EXTERNAL:
        events.interrupt_injected, events.interrupt_nr = 1, info & 0xFF
    elif info & _VALID and kind == _NMI:
        events.nmi_injected = 1
    events.interrupt_shadow = (SHADOW_INT_STI if blocked & _STI else 0) | (
        SHADOW_INT_MOV_SS if blocked & _MOV_SS else 0
    )
    events.nmi_pending, events.nmi_masked = int(ops.vcpu.nmi_pending), int(bool(blocked & _BLOCKED_BY_NMI))
    flags = VcpuEventFlag
    events.flags = flags.VALID_NMI_PENDING | flags.VALID_SHADOW | flags.VALID_SMM
    return events


def set_events(ops: "VmxVcpu", events: VcpuEventsStruct) -> None:
    """KVM_SET_VCPU_EVENTS."""
    info = code = 0
    if events.exception_injected:
        info = _VALID | _EXCEPTION << 8 | events.exception_nr
        if events.exception_has_error_code:
            info, code = info | _HAS_ERROR_CODE, events.exception_error_code
    elif events.nmi_injected:
        info = _VALID | _NMI << 8 | _NMI
    elif events.interrupt_injected:
        info = _VALID | (_SOFT_INTERRUPT if events.interrupt_soft else _EXTERNAL) << 8 | events.interrupt_nr
    with ops.loaded() as lp:
        core = lp.core
        core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, info)
        core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, code)
        blocked = core.vmread(vmcs.GUEST_INTERRUPTIBILITY) & ~_BLOCKED_BY_NMI
        if events.flags & VcpuEventFlag.VALID_SHADOW:
            shadow = events.interrupt_shadow
            blocked &= ~(_STI | _MOV_SS)
            blocked |= _MOV_SS if shadow & SHADOW_INT_MOV_SS else _STI if shadow & SHADOW_INT_STI else 0
        core.vmwrite(vmcs.GUEST_INTERRUPTIBILITY, blocked | (_BLOCKED_BY_NMI if events.nmi_masked else 0))
    if events.flags & VcpuEventFlag.VALID_NMI_PENDING:
        ops.vcpu.nmi_pending = bool(events.nmi_pending)
