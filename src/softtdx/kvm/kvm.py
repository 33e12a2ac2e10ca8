"""/dev/kvm: the system ioctls."""

import errno

from softtdx.abi.kvm import KVM_API_VERSION, KVM_X86_DEFAULT_VM, KvmCap
from softtdx.kvm.dirty_log import DIRTY_LOG_INITIALLY_SET, DIRTY_LOG_MANUAL_PROTECT
from softtdx.kvm.emulate import host_cpuid
from softtdx.kvm.errors import KvmError
from softtdx.kvm.host import Host
from softtdx.kvm.memslots import MAX_SLOTS
from softtdx.kvm.mm import AddressSpace
from softtdx.kvm.uapi import CpuidEntry
from softtdx.kvm.vm import Vm
from softtdx.kvm.x86_ops import supported_types

__all__ = ["MAX_VCPUS", "Kvm"]

MAX_VCPUS = 1024
_CAP_NR_MEMSLOTS = 10


class Kvm:
    """An open /dev/kvm. `mm` is the address space of the process that opened it."""

    def __init__(self, host: Host, mm: AddressSpace | None = None) -> None:
        """Open it for a process; by default for a new one."""
        self.host = host
        self.mm = mm or AddressSpace(host.memory, host.mm.swap)
        self.vms: list[Vm] = []

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return KVM_API_VERSION

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 for what is not there."""
        types = supported_types(self.host.tdx is not None)
        answers: dict[int, int] = {
            _CAP_NR_MEMSLOTS: MAX_SLOTS,
            KvmCap.MAX_VCPUS: MAX_VCPUS,
            KvmCap.VM_TYPES: sum(1 << vm_type for vm_type in types),
            KvmCap.EXIT_HYPERCALL: 1 << 12,
            KvmCap.MEMORY_FAULT_INFO: 1,
            KvmCap.MANUAL_DIRTY_LOG_PROTECT2: DIRTY_LOG_MANUAL_PROTECT | DIRTY_LOG_INITIALLY_SET,
            KvmCap.MEMORY_ATTRIBUTES: 0,
            KvmCap.GUEST_MEMFD: int(self.host.tdx is not None),
        }
        return answers.get(cap, 0)

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: what a guest may be shown."""
        return host_cpuid(self.host.platform.description)

    def create_vm(self, vm_type: int = KVM_X86_DEFAULT_VM) -> Vm:
        """KVM_CREATE_VM. EINVAL for a type that is not supported."""
        if vm_type < 0:
            raise KvmError(errno.EINVAL, f"KVM_CREATE_VM of type {vm_type}")
        vm = Vm(self, vm_type)
        self.vms.append(vm)
        self.host.vms.append(vm)
        return vm
