"""CPUID of a machine that boots Linux, on top of what KVM supports: topology and KVM's paravirtual leaves."""

from softtdx.kvm.uapi import CpuidEntry

__all__ = ["guest_cpuid"]

_TOPOLOGY = 0xB
_FREQUENCIES = 0x16
_BUS_MHZ = 100
_LEVEL_SMT, _LEVEL_CORE = 1, 2
_KVM_SIGNATURE, _KVM_FEATURES = 0x4000_0000, 0x4000_0001
_NOP_IO_DELAY = 1 << 1
_MSI_EXT_DEST_ID = 1 << 15


def guest_cpuid(supported: list[CpuidEntry], vcpu_id: int, vcpus: int, tsc_hz: int) -> list[CpuidEntry]:
    """Entries for KVM_SET_CPUID2. `supported` is KVM's own list; each vCPU is a core without SMT."""
    mhz = tsc_hz // 1_000_000
    signature = [int.from_bytes(b"KVMKVMKVM\0\0\0"[i : i + 4], "little") for i in (0, 4, 8)]
    shift = (vcpus - 1).bit_length()
    return [
        *(entry for entry in supported if entry.function not in (_TOPOLOGY, _FREQUENCIES)),
        CpuidEntry(_FREQUENCIES, None, mhz, mhz, _BUS_MHZ, 0),
        CpuidEntry(_TOPOLOGY, 0, 0, 1, _LEVEL_SMT << 8, vcpu_id),
        CpuidEntry(_TOPOLOGY, 1, shift, vcpus, _LEVEL_CORE << 8 | 1, vcpu_id),
        CpuidEntry(_TOPOLOGY, 2, 0, 0, 2, vcpu_id),
        CpuidEntry(_KVM_SIGNATURE, None, _KVM_FEATURES, *signature),
        CpuidEntry(_KVM_FEATURES, None, _NOP_IO_DELAY | _MSI_EXT_DEST_ID, 0, 0, 0),
    ]
