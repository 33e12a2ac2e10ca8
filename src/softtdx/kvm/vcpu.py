"""A vCPU: KVM_RUN and the other ioctls on its file descriptor."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from time import sleep
from typing import TYPE_CHECKING

from softtdx.abi.kvm import KvmExit
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.lapic import LocalApic
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import CpuidEntry, KvmRun, Regs, Sregs

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["Vcpu"]

_INVEPT_ALL = 2


class Vcpu:
    """One vCPU. A thread of the VMM calls `run`; `kick` may come from any thread."""

    def __init__(self, vm: "Vm", vcpu_id: int) -> None:
        """KVM_CREATE_VCPU."""
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.kvm_run = KvmRun()
        self.cpuid: dict[tuple[int, int | None], CpuidEntry] = {}
        self.msrs: dict[int, int] = {}
        self.cpu: int | None = None
        self.tlb_flush_wanted = True  # an EPT before this one may have had its root at the same address
        self.exits = 0
        self.instructions = 0  # that the guest retired
        self._in_guest: LogicalProcessor | None = None
        self._kicked = False
        self._running = Lock()
        self.association = Lock()  # of the vCPU with a processor: held while that changes
        self.apic = LocalApic(self) if vm.irqchip else None
        self._complete: Callable[[], None] | None = None
        self.ops = vm.ops.vcpu_create(self)

    # --- state
    def set_cpuid2(self, entries: "list[CpuidEntry] | tuple[CpuidEntry, ...]") -> None:
        """KVM_SET_CPUID2: what CPUID gives the guest where KVM answers it."""
        self.cpuid = {(entry.function, entry.index): entry for entry in entries}

    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        return self.ops.get_regs()

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self.ops.set_regs(regs)

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS2."""
        self.ops.set_sregs(sregs)

    def memory_encrypt_op(self, command: int, argument: object = None) -> object:
        """KVM_MEMORY_ENCRYPT_OP: a KVM_TDX_* command of the vCPU."""
        if self.vm.dead or self.vm.closed:
            raise KvmError(errno.EIO, "the VM is dead")
        return self.ops.memory_encrypt_op(command, argument)

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY. EINVAL for a misaligned or empty range, ENOENT where there is no memory."""
        if gpa % PAGE or size % PAGE or size <= 0 or gpa < 0:
            raise KvmError(errno.EINVAL, f"KVM_PRE_FAULT_MEMORY of {gpa:#x}+{size:#x}")
        self.ops.pre_fault_memory(gpa, size)

    # --- running
    def run(self) -> KvmRun:
        """KVM_RUN: run the guest until user space is needed; `kvm_run` says why.

        KvmError: EIO for a dead VM, EBUSY while another thread runs this vCPU. KVM_EXIT_MEMORY_FAULT is for memory that
        user space has to provide or convert; a `kick` ends it with KVM_EXIT_INTR (ioctl.py adds EFAULT and EINTR).
        """
        if not self._running.acquire(blocking=False):
            raise KvmError(errno.EBUSY, f"vCPU {self.vcpu_id} is already running")
        try:
            if self._complete is not None:
                complete, self._complete = self._complete, None
                complete()
            while True:
                while not self._slice():
                    pass
                if self.apic is None or self.kvm_run.exit_reason is not KvmExit.HLT or not self.apic.block():
                    break
            if self.apic is not None and self.kvm_run.exit_reason is KvmExit.HLT:
                self._kicked = False
                self.exit_to_user(KvmExit.INTR)
        finally:
            self._running.release()
        return self.kvm_run

    def exit_to_user(self, reason: KvmExit, complete: Callable[[], None] | None = None) -> bool:
        """Used by exit handlers: leave KVM_RUN for `reason`; `complete` runs when user space comes back."""
        self.kvm_run.exit_reason = reason
        self._complete = complete
        return False

    @property
    def running_on(self) -> LogicalProcessor | None:
        """The processor whose guest this vCPU is right now."""
        return self._in_guest

    def kick(self) -> None:
        """A signal for the thread that runs this vCPU: KVM_RUN, now or the next, returns KVM_EXIT_INTR."""
        self._kicked = True
        lp = self._in_guest
        if lp is not None:
            lp.interrupt()
        if self.apic is not None:
            with self.apic.changed:
                self.apic.changed.notify_all()

    @property
    def in_guest(self) -> LogicalProcessor | None:
        """The processor on which the vCPU is in the guest, or about to enter it."""
        return self._in_guest

    @property
    def kick_pending(self) -> bool:
        """Whether KVM_RUN is to return."""
        return self._kicked

    def leave_guest(self) -> None:
        """Return when the vCPU is not, or no longer, in the guest run that it is in now."""
        before = self.exits
        while (lp := self._in_guest) is not None and self.exits == before:
            lp.interrupt()
            sleep(0.0002)

    def _slice(self) -> bool:
        """Run on a processor until user space is wanted (True) or another thread wants the processor (False)."""
        vm, cpus = self.vm, self.vm.host.cpus
        with cpus.run(self.cpu) as lp, self._counted(lp):
            with self.association:
                self.ops.load(lp)
            if self.cpu != lp.index:
                # What this processor cached when the vCPU was here before may be stale (vmx_vcpu_load_vmcs).
                self.cpu, self.tlb_flush_wanted = lp.index, True
            while True:
                if vm.dead:
                    raise KvmError(errno.EIO, "the VM is dead")
                if self._kicked:
                    self._kicked = False
                    self.exit_to_user(KvmExit.INTR)
                    return True
                entered = False
                self._in_guest = lp
                try:
                    if not self._kicked:
                        entered = True
                        # After `_in_guest` is set: who asks for a flush later waits until the vCPU has left again.
                        if self.tlb_flush_wanted:
                            self.tlb_flush_wanted = False
                            lp.core.invept(_INVEPT_ALL, 0)
                        if self.apic is not None:
                            self.apic.enter(lp)
                        self.ops.run(lp)
                finally:
                    self.exits += 1
                    self._in_guest = None
                    if self.apic is not None:
                        self.apic.leave(lp)
                if self._kicked and lp.interrupt_pending:
                    lp.acknowledge_interrupt()
                wanted = cpus.yield_if_wanted(lp)
                if entered and not self.ops.handle_exit(lp):
                    return True
                if wanted:
                    return False

    @contextmanager
    def _counted(self, lp: LogicalProcessor) -> Iterator[None]:
        before = lp.retired_instructions()
        try:
            yield
        finally:
            self.instructions += lp.retired_instructions() - before
