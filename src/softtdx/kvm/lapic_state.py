"""KVM_GET_LAPIC and KVM_SET_LAPIC: a local APIC as the 1024 bytes of an xAPIC page, a register every 16.

What the processor keeps is on the virtual-APIC page, the rest in `lapic`. (arch/x86/kvm/lapic.c, kvm_apic_get_state.)
"""

import errno
from typing import TYPE_CHECKING, Final

from softtdx.abi.msrs import Msr
from softtdx.kvm.errors import KvmError

if TYPE_CHECKING:
    from softtdx.kvm.vcpu import Vcpu

__all__ = ["SIZE", "get", "put"]

SIZE: Final = 1024
_VECTORS: Final = 256
_ID_SHIFT: Final = 24  # of an xAPIC ID
_ICR2: Final = 0x310


def _at(msr: int) -> int:
    return (msr - Msr.X2APIC_FIRST) * 16


_ID, _TPR, _ISR, _, _IRR, _ICR = (
    _at(m)
    for m in (Msr.X2APIC_APICID, Msr.X2APIC_TPR, Msr.X2APIC_ISR0, Msr.X2APIC_TMR0, Msr.X2APIC_IRR0, Msr.X2APIC_ICR)
)
_FROM_KVM: Final = (Msr.X2APIC_VERSION, Msr.X2APIC_LDR, Msr.X2APIC_ESR, Msr.X2APIC_CUR_COUNT)


def get(vcpu: "Vcpu", virtual_apic: int) -> bytes:
    """The page. EINVAL for a vCPU without a local APIC."""
    apic = vcpu.apic
    if apic is None:
        raise KvmError(errno.EINVAL, "the vCPU has no local APIC")
    memory = vcpu.vm.host.memory
    page = bytearray(memory.read(virtual_apic, SIZE))
    for msr in (*apic.kept, *_FROM_KVM):
        page[_at(msr) : _at(msr) + 4] = (apic.read(msr) or 0).to_bytes(4, "little")
    icr = apic.read(Msr.X2APIC_ICR) or 0
    page[_ICR : _ICR + 4], page[_ICR2 : _ICR2 + 4] = icr.to_bytes(8, "little")[:4], icr.to_bytes(8, "little")[4:]
    shown = apic.id if vcpu.vm.wide_apic_ids else apic.id << _ID_SHIFT & 0xFFFF_FFFF
    page[_ID : _ID + 4] = shown.to_bytes(4, "little")
    for vector in apic.posted_vectors():  # the processor has not taken them yet
        page[_IRR + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
    return bytes(page)


def put(vcpu: "Vcpu", virtual_apic: int, page: bytes) -> None:
    """The inverse. EINVAL for a vCPU without a local APIC, or for another one's ID."""
    apic = vcpu.apic
    if apic is None:
        raise KvmError(errno.EINVAL, "the vCPU has no local APIC")
    if vcpu.vm.wide_apic_ids and int.from_bytes(page[_ID : _ID + 4], "little") != apic.id:
        raise KvmError(errno.EINVAL, f"the local APIC's ID is {apic.id}")
    memory = vcpu.vm.host.memory
    memory.write(virtual_apic + _TPR, page[_TPR : _TPR + 4])
    memory.write(virtual_apic + _ISR, page[_ISR:_IRR])  # ISR and TMR
    apic.restore({msr: int.from_bytes(page[_at(msr) : _at(msr) + 4], "little") for msr in apic.kept})
    for vector in range(_VECTORS):
        if page[_IRR + vector // 32 * 16 + vector % 32 // 8] >> vector % 8 & 1:
            apic.post(vector)
