"""The registers of a debug TD (ATTRIBUTES.DEBUG), which the module shows the host: TDH.VP.RD and TDH.VP.WR.

For any other TD the same ioctls are refused (guest_state_protected). The extended state is KVM's to refuse for a debug
TD too (fpstate_set_confidential). Linux, which supports no DEBUG attribute yet, has the rule and no values to show.
"""

import errno
from typing import TYPE_CHECKING, Final

from softtdx.abi.fields import table
from softtdx.abi.msrs import Msr
from softtdx.abi.structs import Attributes
from softtdx.kvm import emulate
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.errors import KvmError
from softtdx.kvm.uapi import Regs, Segment, Sregs
from softtdx.kvm.x86_ops import protected

if TYPE_CHECKING:
    from softtdx.kvm.tdx_vcpu import TdxVcpu

__all__ = ["TD_EFER", "get_debugregs", "get_regs", "get_sregs", "get_xcr0", "set_debugregs", "set_regs"]

TD_EFER: Final = 0xD01
"""SCE, LME, LMA, NX: the mode of every TD."""
_GPRS: Final = ("RAX", "RCX", "RDX", "RBX", None, "RBP", "RSI", "RDI", *(f"R{i}" for i in range(8, 16)))
_RSP, _RIP, _RFLAGS = "Guest RSP", "Guest RIP", "Guest RFLAGS"
_SEGMENTS: Final = {name: name.upper() for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")} | {"ldt": "LDTR"}
_DEBUG_REGISTERS: Final = ("DR0", "DR1", "DR2", "DR3", "DR6")


def get_regs(ops: "TdxVcpu") -> Regs:
    """KVM_GET_REGS."""
    _check(ops, "general registers")
    gprs = tuple(_read(ops, "vmcs", _RSP) if name is None else _read(ops, "vp", name) for name in _GPRS)
    return Regs(gprs, _read(ops, "vmcs", _RIP), _read(ops, "vmcs", _RFLAGS))


def set_regs(ops: "TdxVcpu", regs: Regs) -> None:
    """KVM_SET_REGS."""
    _check(ops, "general registers")
    for name, value in zip(_GPRS, regs.gprs, strict=True):
        _write(ops, *("vmcs", _RSP) if name is None else ("vp", name), value)
    _write(ops, "vmcs", _RIP, regs.rip)
    _write(ops, "vmcs", _RFLAGS, regs.rflags | 2)


def get_sregs(ops: "TdxVcpu") -> Sregs:
    """KVM_GET_SREGS2."""
    _check(ops, "special registers")

    def guest(name: str) -> int:
        return _read(ops, "vmcs", f"Guest {name}")

    sregs = Sregs(
        gdt_base=guest("GDTR base"),
        gdt_limit=guest("GDTR limit"),
        idt_base=guest("IDTR base"),
        idt_limit=guest("IDTR limit"),
        cr0=guest("CR0"),
        cr2=_read(ops, "vp", "CR2"),
        cr3=guest("CR3"),
        cr4=guest("CR4"),
        efer=TD_EFER,
        apic_base=emulate.read_msr(ops.vcpu, Msr.APIC_BASE),
    )
    for name, part in _SEGMENTS.items():
        parts = (guest(f"{part} {what}") for what in ("selector", "base", "limit", "access rights"))
        setattr(sregs, name, Segment(*parts))
    return sregs


def get_xcr0(ops: "TdxVcpu") -> int:
    """KVM_GET_XCRS."""
    _check(ops, "XCR0")
    return _read(ops, "vp", "XCR0")


def get_debugregs(ops: "TdxVcpu") -> tuple[int, ...]:
    """KVM_GET_DEBUGREGS."""
    _check(ops, "debug registers")
    return (*(_read(ops, "vp", name) for name in _DEBUG_REGISTERS), _read(ops, "vmcs", "Guest DR7"))


def set_debugregs(ops: "TdxVcpu", values: tuple[int, ...]) -> None:
    """KVM_SET_DEBUGREGS."""
    _check(ops, "debug registers")
    for name, value in zip(_DEBUG_REGISTERS, values[:5], strict=True):
        _write(ops, "vp", name, value)
    _write(ops, "vmcs", "Guest DR7", values[5])


def _check(ops: "TdxVcpu", what: str) -> None:
    if not ops.td.attributes & Attributes.DEBUG:
        raise protected(what)
    if not ops.is_initialized:
        raise KvmError(errno.EINVAL, f"the {what} of a TD's vCPU before KVM_TDX_INIT_VCPU")


def _read(ops: "TdxVcpu", kind: str, name: str) -> int:
    assert ops.tdvpr is not None
    with ops.vcpu.vm.host.cpus.run(ops.vcpu.cpu) as lp:
        return sc.vp_rd(lp, ops.tdvpr, table(kind)[name].field_id)


def _write(ops: "TdxVcpu", kind: str, name: str, value: int) -> None:
    assert ops.tdvpr is not None
    with ops.vcpu.vm.host.cpus.run(ops.vcpu.cpu) as lp:
        sc.vp_wr(lp, ops.tdvpr, table(kind)[name].field_id, value)
