"""A vCPU: KVM_RUN and the other ioctls on its file descriptor."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from time import sleep
from typing import TYPE_CHECKING

from softtdx.abi.kvm import (
    INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    MAX_CPUID_ENTRIES,
    MEMORY_EXIT_FLAG_PRIVATE,
    KvmExit,
    MpState,
    MsrExitReason,
)
from softtdx.abi.kvm_run import KvmRun
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.lapic import LocalApic
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import CpuidEntry, Regs, Sregs

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["Vcpu"]

_INVEPT_ALL = 2
_TICK = 0.004  # seconds
_ADDRESS_LEAF, _LINEAR_WIDTHS = 0x8000_0008, (0, 48, 57)
_NEEDS_APIC = (MpState.UNINITIALIZED, MpState.HALTED, MpState.AP_RESET_HOLD)


class Vcpu:
    """One vCPU. A thread of the VMM calls `run`; `kick` may come from any thread."""

    def __init__(self, vm: "Vm", vcpu_id: int) -> None:
        """KVM_CREATE_VCPU. Every vCPU starts RUNNABLE: firmware parks the others, there is no INIT and SIPI."""
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.kvm_run = KvmRun()
        self.mp_state = MpState.RUNNABLE
        self.nmi_pending = False
        self.cpuid: dict[tuple[int, int | None], CpuidEntry] = {}
        self.msrs: dict[int, int] = {}
        self.cpu: int | None = None
        self.tlb_flush_wanted = True  # an EPT before this one may have had its root at the same address
        self.exits = 0
        self.instructions = 0  # that the guest retired
        self._has_run = False
        self._in_guest: LogicalProcessor | None = None
        self._kicked = False
        self._mutex = Lock()
        self.association = RLock()  # of the vCPU with a processor: held while that changes
        self._reason = KvmExit.UNKNOWN  # what kvm_run says, which user space may overwrite
        self.apic = LocalApic(self) if vm.irqchip else None
        self._complete: Callable[[], None] | None = None
        try:
            self.ops = vm.ops.vcpu_create(self)
        except KvmError:
            if self.apic is not None:
                self.apic.free()
            raise

    # --- state
    @contextmanager
    def taken(self) -> Iterator[None]:
        """vcpu->mutex: one ioctl on a vCPU at a time, KVM_RUN among them. EIO when the VM is dead."""
        with self._mutex:
            if self.vm.dead or self.vm.closed:
                raise KvmError(errno.EIO, "the VM is dead")
            yield

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2: what CPUID gives the guest where KVM answers it.

        E2BIG for more than 256 entries. EINVAL for a linear address width that does not exist, and for a change after
        the vCPU has run.
        """
        wanted = list(entries)
        if len(wanted) > MAX_CPUID_ENTRIES:
            raise KvmError(errno.E2BIG, f"{len(wanted)} CPUID entries; there may be {MAX_CPUID_ENTRIES}")
        chosen = {(entry.function, entry.index): entry for entry in wanted}
        if self._has_run and chosen != self.cpuid:
            raise KvmError(errno.EINVAL, "KVM_SET_CPUID2 with other values after the vCPU has run")
        for entry in wanted:
            if entry.function == _ADDRESS_LEAF and entry.eax >> 8 & 0xFF not in _LINEAR_WIDTHS:
                raise KvmError(errno.EINVAL, f"{entry.eax >> 8 & 0xFF} linear address bits; 48 or 57 are possible")
        self.cpuid = chosen

    def get_regs(self) -> Regs:
        """KVM_GET_REGS. EINVAL for a TD without the DEBUG attribute, as every access to registers below."""
        return self.ops.get_regs()

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self.ops.set_regs(regs)

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS2."""
        return self.ops.get_sregs()

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS2. EINVAL for control registers that contradict each other."""
        self.ops.set_sregs(sregs)

    def set_mp_state(self, state: int) -> None:
        """KVM_SET_MP_STATE. EINVAL for a state that does not exist here, or that needs a local APIC."""
        if state != MpState.RUNNABLE and (state not in _NEEDS_APIC or self.apic is None):
            raise KvmError(errno.EINVAL, f"multiprocessing state {state}")
        self.mp_state = MpState(state)

    def nmi(self) -> None:
        """KVM_NMI: a non-maskable interrupt for the vCPU, from any thread."""
        self.nmi_pending = True
        self.leave_guest()
        if self.apic is not None:
            self.apic.wake()

    def memory_encrypt_op(self, command: int, argument: object = None) -> object:
        """KVM_MEMORY_ENCRYPT_OP: a KVM_TDX_* command of the vCPU."""
        if self.vm.dead or self.vm.closed:
            raise KvmError(errno.EIO, "the VM is dead")
        return self.ops.memory_encrypt_op(command, argument)

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY; returns how many bytes were done, which may be less when something stood in the way.

        KvmError if not even the first page could be: EINVAL for a misaligned or empty range, ENOENT where there is no
        memory, EOPNOTSUPP for a TD that is not final.
        """
        if gpa % PAGE or size % PAGE or size <= 0 or gpa < 0 or gpa + size >= 1 << 64:
            raise KvmError(errno.EINVAL, f"KVM_PRE_FAULT_MEMORY of {gpa:#x}+{size:#x}")
        return self.ops.pre_fault_memory(gpa, size)

    # --- running
    def run(self) -> KvmRun:
        """KVM_RUN: run the guest until user space is needed; `kvm_run` says why.

        KvmError: EIO for a dead VM, EINVAL for registers to synchronise, which this KVM does not. KVM_EXIT_MEMORY_FAULT
        is for memory that user space has to provide or convert; a `kick` or kvm_run.immediate_exit ends it with
        KVM_EXIT_INTR (ioctl.py adds EFAULT and EINTR).
        """
        with self._mutex:
            if self.vm.dead or self.vm.closed:
                raise KvmError(errno.EIO, "the VM is dead")
            if self.kvm_run.wants_sync:
                raise KvmError(errno.EINVAL, "KVM_CAP_SYNC_REGS is not there")
            if self._complete is not None:
                complete, self._complete = self._complete, None
                complete()
            if self._complete is not None:
                pass  # what user space answered leads to another question
            elif self.kvm_run.immediate_exit:
                self.exit_to_user(KvmExit.INTR)
            else:
                self._run()
            self.ops.fill_run(self.kvm_run)
        return self.kvm_run

    def _run(self) -> None:
        while self._wait_until_runnable():
            while not self._slice():
                pass
            if self.apic is None or self._reason is not KvmExit.HLT:
                return
            self.mp_state = MpState.HALTED
        self._kicked = False
        self.exit_to_user(KvmExit.INTR)

    def _wait_until_runnable(self) -> bool:
        """A halted vCPU waits for an interrupt, one that was not started for KVM_SET_MP_STATE. False after a kick."""
        if self.mp_state is MpState.RUNNABLE:
            return True
        assert self.apic is not None
        if self.mp_state is not MpState.HALTED:
            return self.apic.wait_for_kick()
        if not self.apic.block():
            return False
        self.mp_state = MpState.RUNNABLE
        return True

    def exit_to_user(self, reason: KvmExit, complete: Callable[[], None] | None = None) -> bool:
        """Used by exit handlers: leave KVM_RUN for `reason`; `complete` runs when user space comes back."""
        self._reason = reason
        self.kvm_run.exit_number = reason
        self._complete = complete
        return False

    def exit_for_memory(self, gpa: int, size: int, *, private: bool) -> None:
        """KVM_EXIT_MEMORY_FAULT: user space has to change the attribute of a range, or back it."""
        fault = self.kvm_run.memory_fault
        fault.flags, fault.gpa, fault.size = MEMORY_EXIT_FLAG_PRIVATE if private else 0, gpa, size
        self.exit_to_user(KvmExit.MEMORY_FAULT)

    def internal_error(self, what: str, *data: int) -> bool:
        """KVM_EXIT_INTERNAL_ERROR: an exit that KVM has no answer to; `data` as the kernel gives them."""
        self.kvm_run.detail = what
        internal = self.kvm_run.internal
        internal.suberror, internal.ndata = INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, len(data)
        internal.data = (*data, *(0,) * (16 - len(data)))
        return self.exit_to_user(KvmExit.INTERNAL_ERROR)

    def fail_entry(self, what: str, reason: int) -> bool:
        """KVM_EXIT_FAIL_ENTRY: the processor, or the module, would not enter."""
        self.kvm_run.detail = what
        fail = self.kvm_run.fail_entry
        fail.hardware_entry_failure_reason, fail.cpu = reason, self.cpu or 0
        return self.exit_to_user(KvmExit.FAIL_ENTRY)

    def msr_to_user(self, index: int, value: int | None, answered: Callable[[bool, int | None], None]) -> bool:
        """KVM_CAP_X86_USER_SPACE_MSR: False when the access goes to user space, whose answer `answered` gets.

        `value` is that of a WRMSR, None for a RDMSR; the answer is (error, the value read or None).
        """
        from softtdx.kvm import emulate

        reason = MsrExitReason.UNKNOWN if emulate.read_msr(self, index) is None else MsrExitReason.INVAL
        if not self.vm.user_space_msrs & reason:
            return True
        access, read = self.kvm_run.msr, value is None
        access.error, access.reason, access.index, access.data = 0, reason, index, value or 0
        return self.exit_to_user(
            KvmExit.X86_RDMSR if read else KvmExit.X86_WRMSR,
            lambda: answered(bool(access.error), access.data if read else None),
        )

    @property
    def has_run(self) -> bool:
        """Whether the guest was ever entered: what its processor can do does not change any more."""
        return self._has_run

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
            self.apic.wake()

    @property
    def in_guest(self) -> LogicalProcessor | None:
        """The processor on which the vCPU is in the guest, or about to enter it."""
        return self._in_guest

    @property
    def kick_pending(self) -> bool:
        """Whether KVM_RUN is to return."""
        return self._kicked

    def wait_until_out(self) -> None:
        """Return when no ioctl on the vCPU is under way: KVM_RUN of a dead VM ends at once."""
        while not self._mutex.acquire(timeout=_TICK):
            self.kick()
        self._mutex.release()

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
            self.ops.load(lp)
            if self.cpu != lp.index:
                # What this processor cached may be older than the last flush, or of a VM whose tables were there.
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
                        entered = self._has_run = True
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
