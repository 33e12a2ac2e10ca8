"""The one table of operations behind KVM's generic part, and the chooser between its two implementations.

`vmx` runs ordinary VMs in VMX non-root mode, `tdx` runs TDs through the TDX module; both side by side on one host.
(Kernel: arch/x86/include/asm/kvm-x86-ops.h, arch/x86/kvm/vmx/main.c.)
"""

import errno
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from softtdx.abi.kvm import KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM
from softtdx.abi.kvm_run import KvmRun
from softtdx.abi.kvm_structs import VcpuEventsStruct
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.uapi import Regs, Sregs

if TYPE_CHECKING:
    from softtdx.kvm.mirror import SecureEpt
    from softtdx.kvm.vcpu import Vcpu
    from softtdx.kvm.vm import Vm

__all__ = ["VcpuOps", "VmOps", "choose", "protected", "supported_types"]


class VmOps(ABC):
    """What a kind of VM does for the VM as a whole."""

    has_private_memory = False
    max_vcpus = 1024  # KVM_CAP_MAX_VCPUS

    def __init__(self, vm: "Vm") -> None:
        """KVM_CREATE_VM."""
        self.vm = vm

    @property
    @abstractmethod
    def shared_bit(self) -> int:
        """The GPA bit that says shared; 0 where there is none."""

    @abstractmethod
    def vcpu_create(self, vcpu: "Vcpu") -> "VcpuOps":
        """KVM_CREATE_VCPU."""

    def memory_encrypt_op(self, command: int, argument: object) -> object:
        """KVM_MEMORY_ENCRYPT_OP of the VM: ENOTTY for a VM that has no such thing."""
        raise KvmError(errno.ENOTTY, f"this type of VM has no KVM_MEMORY_ENCRYPT_OP ({command}, {argument})")

    def zap_private(self, start: int, end: int) -> None:
        """Unmap private memory of [start, end) for good."""
        raise KvmError(errno.EINVAL, f"this type of VM has no private memory ({start:#x} to {end:#x})")

    def migrate_private(self, start: int, end: int, within: tuple[int, int] | None) -> int:
        """Move the private pages of [start, end) to other host pages; returns how many moved."""
        raise KvmError(errno.EINVAL, f"this type of VM has no private memory ({start:#x} to {end:#x}, {within})")

    def collapse_private(self, base: int) -> bool:
        """Make the 2 MiB from `base` on one large page, if that is possible."""
        raise KvmError(errno.EINVAL, f"this type of VM has no private memory ({base:#x})")

    @property
    def secure_ept(self) -> "SecureEpt | None":
        """The mirror of its secure EPT, if it has one."""
        return None

    @abstractmethod
    def release(self) -> None:
        """The VM is going: what must happen while its vCPUs still exist (mmu_release_hkid)."""

    @abstractmethod
    def destroy(self) -> None:
        """The VM and its vCPUs are gone: give back what remains."""


class VcpuOps(ABC):
    """What a kind of VM does for one vCPU."""

    def __init__(self, vcpu: "Vcpu") -> None:
        """KVM_CREATE_VCPU."""
        self.vcpu = vcpu
        self._cpu: int | None = None

    @property
    def loaded_on(self) -> int | None:
        """The processor that keeps something of this vCPU: its VMCS, or the module's association."""
        return self._cpu

    @abstractmethod
    def load(self, lp: LogicalProcessor) -> None:
        """The vCPU's thread is scheduled on `lp`."""

    @abstractmethod
    def run(self, lp: LogicalProcessor) -> None:
        """Enter the guest and come back with its exit."""

    @abstractmethod
    def handle_exit(self, lp: LogicalProcessor) -> bool:
        """Answer the exit. False: user space has to, struct kvm_run says what."""

    @abstractmethod
    def flush(self) -> None:
        """Dissociate the vCPU from the processor it ran on last."""

    @abstractmethod
    def free(self) -> None:
        """The vCPU is gone."""

    @abstractmethod
    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY: map memory before the guest touches it; returns how many bytes were done."""

    def fill_run(self, run: KvmRun) -> None:
        """What struct kvm_run says of the vCPU after each KVM_RUN (post_kvm_run_save)."""
        run.put_after(ready=False, if_flag=False)

    # --- time and interrupts, for the local APIC
    def guest_tsc(self, lp: LogicalProcessor | None = None) -> int:
        """The guest's TSC now, on `lp` or the processor that the vCPU runs on."""
        if lp is not None:
            return lp.core.rdtsc()
        with self.vcpu.vm.host.cpus.run(self.vcpu.cpu) as here:
            return self.guest_tsc(here)

    def host_tsc(self, guest_tsc: int) -> int:
        """The host's TSC when the guest's has this value."""
        return guest_tsc

    def advance_tsc(self, ticks: int) -> None:
        """The processor was idle for `ticks` of the guest's virtual TSC."""
        with self.vcpu.vm.host.cpus.run(self.vcpu.cpu) as lp:
            lp.core.advance_tsc(ticks)

    def interrupt_waits(self) -> bool:
        """Whether the virtual APIC holds an interrupt that the guest would take now."""
        return False

    def memory_encrypt_op(self, command: int, argument: object) -> object:
        """KVM_MEMORY_ENCRYPT_OP of the vCPU."""
        raise KvmError(errno.ENOTTY, f"this type of vCPU has no KVM_MEMORY_ENCRYPT_OP ({command}, {argument})")

    # --- state. What an implementation leaves as it is here is protected: EINVAL.
    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        raise protected("general registers")

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        del regs
        raise protected("general registers")

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS and KVM_GET_SREGS2."""
        raise protected("special registers")

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS and KVM_SET_SREGS2."""
        del sregs
        raise protected("special registers")

    def get_fxsave(self) -> bytes:
        """The extended state in the standard format of XSAVE, 4096 bytes: for KVM_GET_FPU and KVM_GET_XSAVE."""
        raise protected("extended state")

    def set_fxsave(self, image: bytes) -> None:
        """The inverse. EINVAL for state that the guest cannot have."""
        del image
        raise protected("extended state")

    def get_xcr0(self) -> int:
        """KVM_GET_XCRS."""
        raise protected("XCR0")

    def set_xcr0(self, value: int) -> None:
        """KVM_SET_XCRS. EINVAL for a value that XSETBV refuses."""
        del value
        raise protected("XCR0")

    def get_debugregs(self) -> tuple[int, ...]:
        """KVM_GET_DEBUGREGS: DR0 to DR3, DR6, DR7."""
        raise protected("debug registers")

    def set_debugregs(self, values: tuple[int, ...]) -> None:
        """KVM_SET_DEBUGREGS."""
        del values
        raise protected("debug registers")

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: 1024 bytes, a register every 16 as an xAPIC page has them."""
        raise protected("local APIC")

    def set_lapic(self, page: bytes) -> None:
        """KVM_SET_LAPIC."""
        del page
        raise protected("local APIC")

    def queue_interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: what user space's own interrupt controller has for the vCPU."""
        del vector
        raise protected("interrupt to be injected")

    def translate(self, address: int) -> int | None:
        """KVM_TRANSLATE: the GPA behind a linear address; None where it does not translate, or cannot be seen."""
        del address
        return None

    @abstractmethod
    def get_events(self) -> VcpuEventsStruct:
        """KVM_GET_VCPU_EVENTS."""

    @abstractmethod
    def set_events(self, events: VcpuEventsStruct) -> None:
        """KVM_SET_VCPU_EVENTS, after the generic checks."""

    @abstractmethod
    def read_msr(self, index: int) -> int | None:
        """One MSR of KVM_GET_MSRS; None for one that the vCPU does not have."""

    @abstractmethod
    def write_msr(self, index: int, value: int) -> bool:
        """One MSR of KVM_SET_MSRS; False for one that the vCPU does not have, or that does not take the value."""


def protected(what: str) -> KvmError:
    """What a state ioctl fails with when the guest's state is protected."""
    return KvmError(errno.EINVAL, f"the {what} of this vCPU cannot be seen: the guest's state is protected")


def supported_types(vm_can_tdx: bool) -> list[int]:
    """KVM_CAP_VM_TYPES."""
    return [KVM_X86_DEFAULT_VM, KVM_X86_TDX_VM] if vm_can_tdx else [KVM_X86_DEFAULT_VM]


def choose(vm: "Vm") -> VmOps:
    """The implementation for a VM's type: EINVAL for a type this host does not have."""
    if vm.vm_type not in supported_types(vm.host.tdx is not None):
        hint = ": TDX is not enabled" if vm.vm_type == KVM_X86_TDX_VM else ""
        raise KvmError(errno.EINVAL, f"KVM_CREATE_VM of type {vm.vm_type}{hint}")
    if vm.vm_type == KVM_X86_TDX_VM:
        from softtdx.kvm.tdx import TdxVm

        return TdxVm(vm)
    from softtdx.kvm.vmx import VmxVm

    return VmxVm(vm)
