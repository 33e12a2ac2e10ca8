"""The MSRs of an ordinary VM's vCPU: in the VMCS, in the processor, on the virtual-APIC page, or in software."""

from typing import TYPE_CHECKING, Final

from softtdx.abi import vmcs
from softtdx.abi.msrs import Msr
from softtdx.kvm import emulate
from softtdx.kvm.vmx_registers import EFER_VALID
from softtdx.kvm.vmx_state import MSRS_IN_PROCESSOR

if TYPE_CHECKING:
    from softtdx.kvm.vmx import VmxVcpu

__all__ = ["SAVED", "read", "valid_pat", "write"]

_IN_VMCS: Final[dict[int, int]] = {
    Msr.EFER: vmcs.GUEST_IA32_EFER,
    Msr.PAT: vmcs.GUEST_IA32_PAT,
    Msr.SYSENTER_CS: vmcs.GUEST_SYSENTER_CS,
    Msr.SYSENTER_ESP: vmcs.GUEST_SYSENTER_ESP,
    Msr.SYSENTER_EIP: vmcs.GUEST_SYSENTER_EIP,
    Msr.FS_BASE: vmcs.GUEST_FS_BASE,
    Msr.GS_BASE: vmcs.GUEST_GS_BASE,
}
_CANONICAL: Final = frozenset(
    {Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.FS_BASE, Msr.GS_BASE, Msr.LSTAR, Msr.CSTAR, Msr.KERNEL_GS_BASE}
)
_PAT_TYPES: Final = (0, 1, 4, 5, 6, 7)
_ON_VIRTUAL_APIC: Final = frozenset((Msr.X2APIC_TPR, Msr.X2APIC_PPR, *range(Msr.X2APIC_ISR0, Msr.X2APIC_ESR)))
_U64: Final = (1 << 64) - 1

SAVED: Final = (
    Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP, Msr.STAR, Msr.CSTAR, Msr.KERNEL_GS_BASE, Msr.FMASK, Msr.LSTAR,
    Msr.TSC, Msr.PAT, Msr.FEATURE_CONTROL, Msr.TSC_AUX, Msr.SPEC_CTRL,
    Msr.TSC_ADJUST, Msr.TSC_DEADLINE, Msr.ARCH_CAPABILITIES, Msr.MISC_ENABLE, Msr.MCG_STATUS, Msr.PLATFORM_INFO,
    Msr.MISC_FEATURES_ENABLES, Msr.POWER_CTL, Msr.BIOS_SIGN_ID,
)  # fmt: skip
"""KVM_GET_MSR_INDEX_LIST: what user space saves and restores."""


def read(ops: "VmxVcpu", index: int) -> int | None:
    """The value, or None for an MSR that the vCPU does not have."""
    field, apic = _IN_VMCS.get(index), ops.vcpu.apic
    if field is not None:
        with ops.loaded() as lp:
            return lp.core.vmread(field)
    if index in MSRS_IN_PROCESSOR:
        with ops.loaded() as lp:
            return lp.core.rdmsr(index)
    if index == Msr.TSC:
        return ops.guest_tsc()
    if index in _ON_VIRTUAL_APIC and apic is not None:
        at = ops.virtual_apic + (index - Msr.X2APIC_FIRST) * 16
        return int.from_bytes(ops.vcpu.vm.host.memory.read(at, 4), "little")
    return emulate.read_msr(ops.vcpu, index)


def write(ops: "VmxVcpu", index: int, value: int) -> bool:
    """Whether the MSR exists and took the value. User space may write what the guest may only read."""
    field = _IN_VMCS.get(index)
    if index in _CANONICAL and not _is_canonical(value):
        return False
    if (index == Msr.EFER and value & ~EFER_VALID) or (index == Msr.PAT and not valid_pat(value)):
        return False
    if field is not None:
        with ops.loaded() as lp:
            lp.core.vmwrite(field, value)
        return True
    if index in MSRS_IN_PROCESSOR:
        with ops.loaded() as lp:
            lp.core.wrmsr(index, value)
        return True
    if index == Msr.TSC:
        ops.set_tsc(value)
        return True
    return emulate.write_msr(ops.vcpu, index, value)


def _is_canonical(value: int) -> bool:
    return value >> 47 in (0, _U64 >> 47)


def valid_pat(value: int) -> bool:
    """Whether every byte is a memory type (SDM 11.12.2)."""
    return all(kind in _PAT_TYPES for kind in value.to_bytes(8, "little"))
