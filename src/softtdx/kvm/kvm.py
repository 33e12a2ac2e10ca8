"""/dev/kvm: the system ioctls."""

import errno

from softtdx.abi.kvm import KVM_API_VERSION, KVM_X86_DEFAULT_VM, KvmCap, KvmIoctl, MsrExitReason, argument_size
from softtdx.kvm.dirty_log import DIRTY_LOG_INITIALLY_SET, DIRTY_LOG_MANUAL_PROTECT
from softtdx.kvm.emulate import feature_msr, host_cpuid
from softtdx.kvm.errors import KvmError
from softtdx.kvm.host import Host
from softtdx.kvm.memslots import MAX_SLOTS
from softtdx.kvm.mm import AddressSpace
from softtdx.kvm.uapi import CpuidEntry
from softtdx.kvm.vm import HYPERCALL_EXITS, Vm
from softtdx.kvm.x86_ops import VmOps, supported_types

__all__ = ["Kvm"]

_THERE = (
    KvmCap.USER_MEMORY, KvmCap.USER_MEMORY2, KvmCap.EXT_CPUID, KvmCap.MP_STATE, KvmCap.DESTROY_MEMORY_REGION_WORKS,
    KvmCap.USER_NMI, KvmCap.IRQ_ROUTING, KvmCap.JOIN_MEMORY_REGIONS_WORKS, KvmCap.IRQFD, KvmCap.SET_BOOT_CPU_ID,
    KvmCap.IOEVENTFD, KvmCap.IOEVENTFD_NO_LENGTH, KvmCap.IOEVENTFD_ANY_LENGTH, KvmCap.INTERNAL_ERROR_DATA,
    KvmCap.VCPU_EVENTS, KvmCap.DEBUGREGS, KvmCap.XSAVE, KvmCap.XCRS, KvmCap.GET_TSC_KHZ, KvmCap.VM_TSC_CONTROL,
    KvmCap.TSC_DEADLINE_TIMER, KvmCap.SIGNAL_MSI, KvmCap.ENABLE_CAP_VM, KvmCap.CHECK_EXTENSION_VM,
    KvmCap.SPLIT_IRQCHIP, KvmCap.IMMEDIATE_EXIT, KvmCap.GET_MSR_FEATURES, KvmCap.SREGS2, KvmCap.MEMORY_FAULT_INFO,
    KvmCap.PRE_FAULT_MEMORY,
)  # fmt: skip


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
            **dict.fromkeys(_THERE, 1),
            KvmCap.NR_MEMSLOTS: MAX_SLOTS,
            KvmCap.NR_VCPUS: len(self.host.cpus.lps),
            KvmCap.MAX_VCPUS: VmOps.max_vcpus,
            KvmCap.MAX_VCPU_ID: VmOps.max_vcpus,
            KvmCap.VM_TYPES: sum(1 << vm_type for vm_type in types),
            KvmCap.EXIT_HYPERCALL: HYPERCALL_EXITS,
            KvmCap.MANUAL_DIRTY_LOG_PROTECT2: DIRTY_LOG_MANUAL_PROTECT | DIRTY_LOG_INITIALLY_SET,
            KvmCap.X86_USER_SPACE_MSR: sum(MsrExitReason),
            KvmCap.X2APIC_API: 3,
            KvmCap.XSAVE2: argument_size(KvmIoctl.GET_XSAVE2),
            KvmCap.GUEST_MEMFD: int(self.host.tdx is not None),
        }
        return answers.get(cap, 0)

    def get_supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: what a guest may be shown."""
        return host_cpuid(self.host.platform.description)

    def read_feature_msr(self, index: int) -> int | None:
        """KVM_GET_MSRS on /dev/kvm: an MSR that says what a guest's processor can do; None for another."""
        return feature_msr(index)

    def create_vm(self, vm_type: int = KVM_X86_DEFAULT_VM) -> Vm:
        """KVM_CREATE_VM. EINVAL for a type that is not supported."""
        if vm_type < 0:
            raise KvmError(errno.EINVAL, f"KVM_CREATE_VM of type {vm_type}")
        vm = Vm(self, vm_type)
        self.vms.append(vm)
        self.host.vms.append(vm)
        return vm
