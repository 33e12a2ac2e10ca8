"""Ordinary VMs in VMX non-root mode, on the same silicon and beside TDs (arch/x86/kvm/vmx/vmx.c).

The VMCS of each vCPU is made by VMWRITE on the processor it runs on; the EPT is the host's own. Interrupts and NMIs of
the host exit; CPUID, I/O, HLT, and the MSRs outside the bitmap are emulated.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from softtdx.abi import vmcs
from softtdx.abi.exits import ExitReason
from softtdx.abi.kvm import KvmExit
from softtdx.abi.kvm_run import KvmRun
from softtdx.abi.kvm_structs import VcpuEventsStruct
from softtdx.abi.msrs import Msr
from softtdx.abi.vmcs import EntryControls, ExitControls, PinBased, Primary, Secondary
from softtdx.hw import LogicalProcessor
from softtdx.hw.faults import VmFail
from softtdx.kvm import emulate, lapic_state, vmx_msrs
from softtdx.kvm import vmx_registers as registers
from softtdx.kvm.ept import Ept
from softtdx.kvm.errors import KvmError
from softtdx.kvm.eventfd import MMIO, PIO
from softtdx.kvm.lapic import NOTIFICATION_VECTOR
from softtdx.kvm.memory import PAGE
from softtdx.kvm.mmio import MAX_INSTRUCTION, MmioInstruction, decode_mmio
from softtdx.kvm.mmu import Fault, shared_fault, walk_guest
from softtdx.kvm.uapi import Regs, Sregs
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vmx_state import XSTATE_KEPT, LeftInProcessor
from softtdx.kvm.x86_ops import VcpuOps, VmOps

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["VmxVcpu", "VmxVm"]

_RAX, _RCX, _RDX, _RBX, _RSP, _RSI, _RDI = 0, 1, 2, 3, 4, 6, 7
_U32 = 0xFFFF_FFFF
_U64 = (1 << 64) - 1
_ENTRY_FAILURE = 1 << 31
_CR0_PG = 1 << 31
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10
_CPUID_XSTATE = 0xD
_X87 = 1  # of XCR0
_CR4_VMXE = 1 << 13
_DIRECTION = 1 << 10  # RFLAGS.DF
_BLOCKED_BY_STI_OR_MOV_SS = 3
_EPT_WRITE = 2  # of an EPT violation's exit qualification
_MSR_BITMAP_OPEN = (  # the guest reads and writes these without an exit
    Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP,
    0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103,
)  # fmt: skip
_MSR_BITMAP_READ = (Msr.X2APIC_TPR, Msr.X2APIC_PPR, *range(Msr.X2APIC_ISR0, Msr.X2APIC_ESR))  # from the virtual APIC
_MSR_BITMAP_WRITE = (Msr.X2APIC_TPR, Msr.X2APIC_EOI, Msr.X2APIC_SELF_IPI)
_IN_VMCS: dict[int, int] = {Msr.EFER: vmcs.GUEST_IA32_EFER, Msr.PAT: vmcs.GUEST_IA32_PAT}
_PPR = 0xA0  # in the virtual-APIC page
_VALID = 1 << 31  # of interruption information
_UD = _VALID | 3 << 8 | 6
_VECTORING_UNDEFINED = 1 << 12
_BLOCKED_BY_NMI = 8
_IF = 9  # of RFLAGS


class VmxVm(VmOps):
    """The VMX half of a VM: one EPT."""

    def __init__(self, vm: "Vm") -> None:
        """KVM_CREATE_VM of the default type."""
        super().__init__(vm)
        vm.ept = Ept(vm.host.memory, levels=4)
        vm.memslots.max_gpa = 1 << 48

    @property
    def shared_bit(self) -> int:
        """An ordinary VM has none."""
        return 0

    def vcpu_create(self, vcpu: Vcpu) -> VcpuOps:
        """KVM_CREATE_VCPU."""
        return VmxVcpu(vcpu)

    def release(self) -> None:
        """Nothing needs the vCPUs to exist."""

    def destroy(self) -> None:
        """The generic part frees the EPT."""


class VmxVcpu(VcpuOps):
    """The VMX half of a vCPU: a VMCS and the registers that VMX does not save."""

    def __init__(self, vcpu: Vcpu) -> None:
        """Allocate the VMCS and the MSR bitmap."""
        super().__init__(vcpu)
        memory = vcpu.vm.host.memory
        self.vmcs = memory.alloc(zero=True)
        self.msr_bitmap = memory.alloc(zero=True)
        memory.write(self.msr_bitmap, _msr_bitmap(virtual_apic=vcpu.apic is not None))
        lp = vcpu.vm.host.cpus.lps[0]
        memory.write(self.vmcs, (lp.rdmsr(Msr.VMX_BASIC) & 0x7FFF_FFFF).to_bytes(4, "little"))
        self.gprs = [0] * 16
        self.rip, self.rflags = 0xFFF0, 2
        self.sregs = Sregs()
        self.left = LeftInProcessor(memory)
        self.virtual_apic = memory.alloc(zero=True) if vcpu.apic is not None else 0
        self._launched = False
        self._set_up = False
        self._dirty = True
        self._reason = 0
        self._shadowed = False
        self._tsc_offset = 0
        self._window_wanted = False

    # --- state
    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        return Regs(tuple(self.gprs), self.rip, self.rflags)

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self.gprs, self.rip, self.rflags = list(regs.gprs), regs.rip, regs.rflags | 2
        self._dirty = True

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS2."""
        return registers.get_sregs(self)

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS2."""
        registers.set_sregs(self, sregs)

    def get_fxsave(self) -> bytes:
        """KVM_GET_XSAVE."""
        with self.loaded():
            return self.left.image()

    def set_fxsave(self, image: bytes) -> None:
        """KVM_SET_XSAVE."""
        with self.loaded() as lp:
            self.left.set_image(lp, image)

    def get_xcr0(self) -> int:
        """KVM_GET_XCRS."""
        with self.loaded() as lp:
            return lp.core.xcr0

    def set_xcr0(self, value: int) -> None:
        """KVM_SET_XCRS."""
        if not value & 1 or value & ~XSTATE_KEPT:
            raise KvmError(errno.EINVAL, f"XCR0 {value:#x}; {XSTATE_KEPT:#x} is what this processor has")
        with self.loaded() as lp:
            lp.core.xcr0 = value

    def get_debugregs(self) -> tuple[int, ...]:
        """KVM_GET_DEBUGREGS."""
        with self.loaded() as lp:
            return (*lp.core.dr, lp.core.vmread(vmcs.GUEST_DR7))

    def set_debugregs(self, values: tuple[int, ...]) -> None:
        """KVM_SET_DEBUGREGS."""
        with self.loaded() as lp:
            lp.core.dr = list(values[:5])
            lp.core.vmwrite(vmcs.GUEST_DR7, values[5] | registers.DR7_FIXED)

    def get_events(self) -> VcpuEventsStruct:
        """KVM_GET_VCPU_EVENTS."""
        return registers.get_events(self)

    def set_events(self, events: VcpuEventsStruct) -> None:
        """KVM_SET_VCPU_EVENTS."""
        registers.set_events(self, events)

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC."""
        return lapic_state.get(self.vcpu, self.virtual_apic)

    def set_lapic(self, page: bytes) -> None:
        """KVM_SET_LAPIC."""
        lapic_state.put(self.vcpu, self.virtual_apic, page)

    def queue_interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT, for a VM whose interrupt controllers are user space's. ENXIO when they are not."""
        if self.vcpu.apic is not None:
            raise KvmError(errno.ENXIO, "KVM_INTERRUPT on a vCPU with a local APIC")
        with self.loaded() as lp:
            lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _VALID | vector)

    def translate(self, address: int) -> int | None:
        """KVM_TRANSLATE."""
        return registers.translate(self, address)

    def read_msr(self, index: int) -> int | None:
        """KVM_GET_MSRS."""
        return vmx_msrs.read(self, index)

    def write_msr(self, index: int, value: int) -> bool:
        """KVM_SET_MSRS."""
        return vmx_msrs.write(self, index, value)

    def fill_run(self, run: KvmRun) -> None:
        """IF, CR8 and what an injected interrupt needs."""
        enabled, apic = bool(self.rflags >> _IF & 1), self.vcpu.apic
        run.put_after(
            ready=enabled and apic is None and not self._shadowed,
            if_flag=enabled,
            cr8=0 if apic is None else registers.cr8(self),
            apic_base=emulate.apic_base(self.vcpu),
        )

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY."""
        done = 0
        with self.vcpu.vm.host.cpus.run(self.vcpu.cpu):
            while done < size and shared_fault(self.vcpu, gpa + done) is Fault.FIXED:
                done += PAGE
        if not done:
            raise KvmError(errno.ENOENT, f"there is no memory at GPA {gpa:#x}")
        return done

    # --- scheduling
    def load(self, lp: LogicalProcessor) -> None:
        """Make the VMCS current here, cleared first where it was."""
        with self.vcpu.association:
            if self._cpu is not None and self._cpu != lp.index:
                self.flush()
            lp.core.vmptrld(self.vmcs)
            self.left.load(lp)
            self._cpu = lp.index

    @contextmanager
    def loaded(self) -> Iterator[LogicalProcessor]:
        """For an ioctl that looks at the state: on a processor, with everything in the VMCS and in the processor."""
        with self.vcpu.vm.host.cpus.run(self._cpu) as lp:
            self.load(lp)
            self._prepare(lp)
            yield lp

    def _prepare(self, lp: LogicalProcessor) -> None:
        """Write what was not written yet into the VMCS, which is current."""
        if not self._set_up:
            self._write_controls(lp)
            registers.write_reset_state(lp)
            registers.write_sregs(lp, self.sregs)
            self._set_up = True
        if self._dirty:
            lp.core.vmwrite(vmcs.GUEST_RIP, self.rip)
            lp.core.vmwrite(vmcs.GUEST_RSP, self.gprs[_RSP])
            lp.core.vmwrite(vmcs.GUEST_RFLAGS, self.rflags)
            self._dirty = False

    @property
    def set_up(self) -> bool:
        """Whether the guest's state is in the VMCS; before, `sregs` has it."""
        return self._set_up

    def flush(self) -> None:
        """VMCLEAR on the processor that has the VMCS."""
        if self._cpu is None:
            return
        region, left = self.vmcs, self.left

        def clear(lp: LogicalProcessor) -> None:
            lp.core.vmclear(region)
            if left.lp is lp:
                left.save(lp)

        self.vcpu.vm.host.cpus.call_on(self._cpu, clear)
        self._cpu, self._launched = None, False

    def free(self) -> None:
        """Give the VMCS back."""
        self.vcpu.vm.host.memory.free(self.vmcs)
        self.vcpu.vm.host.memory.free(self.msr_bitmap)
        self.left.free()
        if self.virtual_apic:
            self.vcpu.vm.host.memory.free(self.virtual_apic)

    # --- running
    def run(self, lp: LogicalProcessor) -> None:
        """VMLAUNCH or VMRESUME."""
        core = lp.core
        core.vmptrld(self.vmcs)
        self._prepare(lp)
        if self.vcpu.nmi_pending:
            self._inject_nmi(lp)
        if self.vcpu.apic is None:
            self._watch_for_interrupt_window(lp)
        core.set_gprs(tuple(self.gprs))
        try:
            self._reason = lp.vmenter(not self._launched)
        except VmFail as fail:
            raise KvmError(errno.EIO, f"VM entry failed: VM-instruction error {fail.error}") from fail
        self._launched = True
        self.gprs = list(core.gprs())
        self.rip, self.gprs[_RSP] = core.vmread(vmcs.GUEST_RIP), core.vmread(vmcs.GUEST_RSP)
        self.rflags = core.vmread(vmcs.GUEST_RFLAGS)
        self._shadowed = bool(
            self.rflags >> _IF & 1 and core.vmread(vmcs.GUEST_INTERRUPTIBILITY) & _BLOCKED_BY_STI_OR_MOV_SS
        )
        vectoring = core.vmread(vmcs.IDT_VECTORING_INFO)
        if vectoring & _VALID:
            # The exit came in the middle of an event's delivery: deliver it again (vmx_complete_interrupts).
            core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, vectoring & ~_VECTORING_UNDEFINED)
            core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, core.vmread(vmcs.IDT_VECTORING_ERROR_CODE))
            core.vmwrite(vmcs.ENTRY_INSTRUCTION_LENGTH, core.vmread(vmcs.EXIT_INSTRUCTION_LENGTH))

    def _watch_for_interrupt_window(self, lp: LogicalProcessor) -> None:
        """User space has an interrupt, and wants to know when the guest can take it (kvm_run)."""
        wanted = bool(self.vcpu.kvm_run.request_interrupt_window)
        if wanted is not self._window_wanted:
            self._window_wanted = wanted
            controls = lp.core.vmread(vmcs.PROCESSOR_CONTROLS) & ~int(Primary.INTERRUPT_WINDOW_EXITING)
            window = Primary.INTERRUPT_WINDOW_EXITING if wanted else 0
            lp.core.vmwrite(vmcs.PROCESSOR_CONTROLS, controls | window)

    def _inject_nmi(self, lp: LogicalProcessor) -> None:
        core = lp.core
        blocked = core.vmread(vmcs.GUEST_INTERRUPTIBILITY) & _BLOCKED_BY_NMI
        if not blocked and not core.vmread(vmcs.ENTRY_INTERRUPTION_INFO) & _VALID:
            self.vcpu.nmi_pending = False
            core.vmwrite(vmcs.GUEST_ACTIVITY_STATE, 0)
            core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _VALID | 2 << 8 | 2)

    # --- time
    def guest_tsc(self, lp: LogicalProcessor | None = None) -> int:
        """The host's TSC with the VMCS's offset."""
        if lp is None:
            return super().guest_tsc()
        return lp.core.rdtsc() + self._tsc_offset & _U64

    def host_tsc(self, guest_tsc: int) -> int:
        """The inverse."""
        return guest_tsc - self._tsc_offset & _U64

    def set_tsc(self, value: int) -> None:
        """Let the guest's TSC have this value now."""
        with self.loaded() as lp:
            self._tsc_offset = value - lp.core.rdtsc() & _U64
            lp.core.vmwrite(vmcs.TSC_OFFSET, self._tsc_offset)

    def interrupt_waits(self) -> bool:
        """RVI above PPR: virtual-interrupt delivery would deliver it."""
        if not self.virtual_apic:
            return False
        with self.vcpu.vm.host.cpus.run(self.vcpu.cpu) as lp:
            self.load(lp)
            requested = lp.core.vmread(vmcs.GUEST_INTERRUPT_STATUS) & 0xF0
            return requested > self.vcpu.vm.host.memory.read(self.virtual_apic + _PPR, 1)[0] & 0xF0

    def handle_exit(self, lp: LogicalProcessor) -> bool:
        """Answer a VM exit; False to go to user space."""
        reason = self._reason & 0xFFFF
        if self._reason & _ENTRY_FAILURE:
            what = f"VM entry refused the guest state ({_NAMES.get(reason, reason)})"
            return self.vcpu.fail_entry(what, self._reason)
        self.vcpu.vm.stats[f"exits:{_NAMES.get(reason, reason)}"] += 1
        handler = _HANDLERS.get(reason)
        if handler is None:
            what = f"VM exit {_NAMES.get(reason, reason)} at RIP {self.rip:#x}"
            return self.vcpu.internal_error(what, self._reason, lp.index)
        return handler(self, lp)

    def _skip(self, lp: LogicalProcessor) -> None:
        core = lp.core
        self.rip = self.rip + core.vmread(vmcs.EXIT_INSTRUCTION_LENGTH) & _U64
        core.vmwrite(vmcs.GUEST_RIP, self.rip)
        blocked = core.vmread(vmcs.GUEST_INTERRUPTIBILITY)
        if blocked & _BLOCKED_BY_STI_OR_MOV_SS:
            core.vmwrite(vmcs.GUEST_INTERRUPTIBILITY, blocked & ~_BLOCKED_BY_STI_OR_MOV_SS)

    # --- exits
    def _interrupted(self, lp: LogicalProcessor) -> bool:
        del lp
        return True

    def _window_open(self, lp: LogicalProcessor) -> bool:
        del lp
        return self.vcpu.exit_to_user(KvmExit.IRQ_WINDOW_OPEN)

    def _cpuid(self, lp: LogicalProcessor) -> bool:
        values = emulate.cpuid(self.vcpu, self.gprs[_RAX] & _U32, self.gprs[_RCX] & _U32)
        self.gprs[_RAX], self.gprs[_RBX], self.gprs[_RCX], self.gprs[_RDX] = values
        self._skip(lp)
        return True

    def _hlt(self, lp: LogicalProcessor) -> bool:
        self._skip(lp)
        return self.vcpu.exit_to_user(KvmExit.HLT)

    def _triple_fault(self, lp: LogicalProcessor) -> bool:
        del lp
        self.vcpu.kvm_run.detail = f"the VM took a triple fault at RIP {self.rip:#x}"
        return self.vcpu.exit_to_user(KvmExit.SHUTDOWN)

    def _xsetbv(self, lp: LogicalProcessor) -> bool:
        """XCR0 within what user space gave the guest by CPUID (0xD, 0) and KVM keeps for it (kvm_emulate_xsetbv)."""
        value = (self.gprs[_RDX] & _U32) << 32 | self.gprs[_RAX] & _U32
        eax, _, _, edx = emulate.cpuid(self.vcpu, _CPUID_XSTATE, 0)
        allowed = (edx << 32 | eax) & XSTATE_KEPT | _X87
        if self.gprs[_RCX] & _U32 or not value & _X87 or value & ~allowed:
            return self._general_protection(lp)
        lp.core.xcr0 = value
        self._skip(lp)
        return True

    def _undefined(self, lp: LogicalProcessor) -> bool:
        """SEAMCALL exits whenever the host is in VMX operation; for the guest there is no such instruction: #UD."""
        lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _UD)
        return True

    def _nothing(self, lp: LogicalProcessor) -> bool:
        self._skip(lp)
        return True

    def _rdmsr(self, lp: LogicalProcessor) -> bool:
        index = self.gprs[_RCX] & _U32
        field = _IN_VMCS.get(index)
        if index == Msr.TSC:
            value: int | None = self.guest_tsc(lp)
        else:
            value = emulate.read_msr(self.vcpu, index) if field is None else lp.core.vmread(field)
        if value is None:
            return self._unknown_msr(lp, index, None)
        self.gprs[_RAX], self.gprs[_RDX] = value & _U32, value >> 32
        self._skip(lp)
        return True

    def _wrmsr(self, lp: LogicalProcessor) -> bool:
        index, value = self.gprs[_RCX] & _U32, (self.gprs[_RDX] & _U32) << 32 | self.gprs[_RAX] & _U32
        if index == Msr.EFER:
            before, paging = lp.core.vmread(vmcs.GUEST_IA32_EFER), lp.core.vmread(vmcs.GUEST_CR0) & _CR0_PG
            if value & ~registers.EFER_VALID or (paging and (value ^ before) & _EFER_LME):
                return self._general_protection(lp)
            lp.core.vmwrite(vmcs.GUEST_IA32_EFER, value & ~_EFER_LMA | before & _EFER_LMA)
        elif index == Msr.PAT and vmx_msrs.valid_pat(value):
            lp.core.vmwrite(vmcs.GUEST_IA32_PAT, value)
        elif index == Msr.TSC:
            self.set_tsc(value)
        elif not emulate.write_msr(self.vcpu, index, value):
            return self._unknown_msr(lp, index, value)
        self._skip(lp)
        return True

    def _unknown_msr(self, lp: LogicalProcessor, index: int, value: int | None) -> bool:
        """#GP(0), unless user space wants to see it; `value` of a write."""
        if not self.vcpu.msr_to_user(index, value, self._msr_answered):
            return False
        return self._general_protection(lp)

    def _msr_answered(self, error: bool, value: int | None) -> None:
        """User space comes back from KVM_EXIT_X86_RDMSR or WRMSR; `value` is what a read gives."""
        with self.loaded() as lp:
            if error:
                self._general_protection(lp)
                return
            if value is not None:
                self.gprs[_RAX], self.gprs[_RDX] = value & _U32, value >> 32
            self._skip(lp)

    def _general_protection(self, lp: LogicalProcessor) -> bool:
        """#GP(0) for the instruction that exited: a value or an MSR that the guest does not have."""
        lp.core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, 1 << 31 | 1 << 11 | 3 << 8 | 13)
        lp.core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, 0)
        return True

    def _io(self, lp: LogicalProcessor) -> bool:
        qualification = lp.core.vmread(vmcs.EXIT_QUALIFICATION)
        size, port = (qualification & 7) + 1, qualification >> 16 & 0xFFFF
        write, string, rep = not qualification & 8, bool(qualification & 0x10), bool(qualification & 0x20)
        if rep and not self.gprs[_RCX]:
            self._skip(lp)
            return True
        value = 0
        if write:
            mask = (1 << 8 * size) - 1
            value = self._load_guest(lp, self.gprs[_RSI], size) if string else self.gprs[_RAX] & mask
        finish = self._string_io(lp, size, write, rep) if string else self._plain_io(lp, size, write)
        vcpu = self.vcpu
        if write and vcpu.vm.io_bus.write(PIO, port, size, value):
            finish(0)
            return True
        access = vcpu.kvm_run.io.put(write, size, port, value)
        return vcpu.exit_to_user(KvmExit.IO, lambda: finish(access.value))

    def _plain_io(self, lp: LogicalProcessor, size: int, write: bool) -> Callable[[int], None]:
        """IN and OUT: what to do with the value read."""
        self._skip(lp)
        mask = (1 << 8 * size) - 1

        def finish(value: int) -> None:
            if not write:
                keep = 0 if size == 4 else self.gprs[_RAX] & ~mask
                self.gprs[_RAX] = keep | value & mask

        return finish

    def _string_io(self, lp: LogicalProcessor, size: int, write: bool, rep: bool) -> Callable[[int], None]:
        """INS and OUTS, an element at a time."""
        cr3 = lp.core.vmread(vmcs.GUEST_CR3)
        index, step = _RSI if write else _RDI, -size if self.rflags & _DIRECTION else size
        if not rep or self.gprs[_RCX] == 1:
            self._skip(lp)

        def finish(value: int) -> None:
            if not write:
                data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
                self._store_guest(cr3, self.gprs[_RDI], data)
            self.gprs[index] = self.gprs[index] + step & _U64
            if rep:
                self.gprs[_RCX] = self.gprs[_RCX] - 1 & _U64

        return finish

    def _load_guest(self, lp: LogicalProcessor, address: int, size: int) -> int:
        vm = self.vcpu.vm
        cr3 = lp.core.vmread(vmcs.GUEST_CR3)
        data = b""
        for i in range(size):
            gpa = walk_guest(vm, cr3, address + i)
            data += vm.read_guest(gpa, 1)
        return int.from_bytes(data, "little")

    def _store_guest(self, cr3: int, address: int, data: bytes) -> None:
        vm = self.vcpu.vm
        for i, byte in enumerate(data):
            vm.write_guest(walk_guest(vm, cr3, address + i), bytes([byte]))

    def _ept_violation(self, lp: LogicalProcessor) -> bool:
        gpa = lp.core.vmread(vmcs.GUEST_PHYSICAL_ADDRESS)
        write = bool(lp.core.vmread(vmcs.EXIT_QUALIFICATION) & _EPT_WRITE)
        fault = shared_fault(self.vcpu, gpa, write=write)
        if fault is Fault.NO_MEMORY:
            return self._mmio(lp, gpa)
        return fault is Fault.FIXED

    def _mmio(self, lp: LogicalProcessor, gpa: int) -> bool:
        """A load or store where there is no memory: user space has a device there, or nobody."""
        code = self._instruction(lp)
        instruction = decode_mmio(code)
        if instruction is None:
            what = (
                f"access to GPA {gpa:#x}, where there is no memory, at RIP {self.rip:#x} by an instruction "
                f"that is not emulated ({code.hex()})"
            )
            return self.vcpu.internal_error(what, self._reason, lp.index)
        size, write, mask = instruction.size, instruction.write, (1 << 8 * instruction.size) - 1
        value = 0
        if write:
            value = self.gprs[instruction.reg] >> 8 * instruction.high
            value = (value if instruction.immediate is None else instruction.immediate) & mask
        self.rip = self.rip + instruction.length & _U64
        lp.core.vmwrite(vmcs.GUEST_RIP, self.rip)
        vcpu = self.vcpu
        if write and vcpu.vm.io_bus.write(MMIO, gpa, size, value):
            return True
        access = vcpu.kvm_run.mmio.put(write, size, gpa, value)

        def complete() -> None:
            if not write:
                self._load_register(instruction, access.value & mask)

        return vcpu.exit_to_user(KvmExit.MMIO, complete)

    def _load_register(self, instruction: MmioInstruction, value: int) -> None:
        bits = 8 * instruction.reg_size
        if instruction.signed and value >> 8 * instruction.size - 1:
            value -= 1 << 8 * instruction.size
        if bits >= 32:
            self.gprs[instruction.reg] = value & (1 << bits) - 1
            return
        shift = 8 * instruction.high
        keep = self.gprs[instruction.reg] & ~(((1 << bits) - 1) << shift)
        self.gprs[instruction.reg] = keep | (value & (1 << bits) - 1) << shift

    def _instruction(self, lp: LogicalProcessor) -> bytes:
        """The bytes at RIP, as many as can be read."""
        vm, cr3, code, address = self.vcpu.vm, lp.core.vmread(vmcs.GUEST_CR3), b"", self.rip
        while len(code) < MAX_INSTRUCTION:
            count = min(MAX_INSTRUCTION - len(code), PAGE - address % PAGE)
            try:
                code += vm.read_guest(walk_guest(vm, cr3, address), count)
            except KvmError:
                break
            address += count
        return code

    # --- the VMCS
    def _write_controls(self, lp: LogicalProcessor) -> None:
        vm = self.vcpu.vm
        assert vm.ept is not None
        pin = PinBased.EXTERNAL_INTERRUPT_EXITING | PinBased.NMI_EXITING
        primary = (
            Primary.HLT_EXITING
            | Primary.TSC_OFFSETTING
            | Primary.UNCONDITIONAL_IO_EXITING
            | Primary.MSR_BITMAPS
            | Primary.SECONDARY_CONTROLS
            | Primary.MWAIT_EXITING
            | Primary.MONITOR_EXITING
        )
        secondary = (
            Secondary.ENABLE_EPT
            | Secondary.UNRESTRICTED_GUEST
            | Secondary.ENABLE_RDTSCP
            | Secondary.ENABLE_INVPCID
            | Secondary.WBINVD_EXITING
        )
        if self.vcpu.apic is not None:
            pin |= PinBased.POSTED_INTERRUPTS
            primary |= Primary.TPR_SHADOW
            secondary |= (
                Secondary.VIRTUALIZE_X2APIC
                | Secondary.APIC_REGISTER_VIRTUALIZATION
                | Secondary.VIRTUAL_INTERRUPT_DELIVERY
            )
        exit_controls = (
            ExitControls.HOST_ADDRESS_SPACE_SIZE
            | ExitControls.SAVE_EFER
            | ExitControls.LOAD_EFER
            | ExitControls.SAVE_PAT
            | ExitControls.ACK_INTERRUPT
        )
        fields = {
            vmcs.PIN_BASED_CONTROLS: _allowed(lp, Msr.VMX_TRUE_PINBASED_CTLS, pin),
            vmcs.PROCESSOR_CONTROLS: _allowed(lp, Msr.VMX_TRUE_PROCBASED_CTLS, primary),
            vmcs.SECONDARY_CONTROLS: secondary,
            vmcs.EXIT_CONTROLS: _allowed(lp, Msr.VMX_TRUE_EXIT_CTLS, exit_controls),
            vmcs.ENTRY_CONTROLS: _allowed(
                lp, Msr.VMX_TRUE_ENTRY_CTLS, EntryControls.LOAD_EFER | EntryControls.LOAD_PAT
            ),
            vmcs.MSR_BITMAPS: self.msr_bitmap,
            vmcs.EPTP: vm.ept.eptp,
            vmcs.VMCS_LINK_POINTER: _U64,
            vmcs.EXCEPTION_BITMAP: 0,
            vmcs.TSC_OFFSET: self._tsc_offset,
            vmcs.CR0_MASK: 0,
            vmcs.CR4_MASK: _CR4_VMXE,
            vmcs.HOST_CR0: 0x8005_0033,
            vmcs.HOST_CR4: 0x0035_26F0,
            vmcs.HOST_IA32_EFER: 0xD01,
            vmcs.HOST_CS_SELECTOR: 0x10,
            vmcs.HOST_TR_SELECTOR: 0x40,
        }
        if self.vcpu.apic is not None:
            fields |= {
                vmcs.VIRTUAL_APIC_ADDRESS: self.virtual_apic,
                vmcs.POSTED_INTERRUPT_DESCRIPTOR: self.vcpu.apic.descriptor,
                vmcs.POSTED_INTERRUPT_VECTOR: NOTIFICATION_VECTOR,
                vmcs.GUEST_INTERRUPT_STATUS: 0,
            }
        for field, value in fields.items():
            lp.core.vmwrite(field, int(value))


def _allowed(lp: LogicalProcessor, msr: int, wanted: int) -> int:
    """Controls with the bits that must be 1; a wanted bit that may not be 1 is an error of this machine."""
    value = lp.rdmsr(msr)
    required, possible = value & _U32, value >> 32
    if wanted & ~possible:
        raise KvmError(errno.EIO, f"the processor lacks VMX controls {wanted & ~possible:#x} (MSR {msr:#x})")
    return wanted | required


def _msr_bitmap(*, virtual_apic: bool) -> bytes:
    """Everything exits but the MSRs that hardware saves or keeps: reads low, reads high, writes low, writes high."""
    bitmap = bytearray(b"\xff" * 4096)

    def let_through(msr: int, half: int) -> None:
        byte, bit = divmod(msr & 0x1FFF, 8)
        bitmap[half + (1024 if msr >= 0xC000_0000 else 0) + byte] &= ~(1 << bit) & 0xFF

    for msr in _MSR_BITMAP_OPEN + (_MSR_BITMAP_READ if virtual_apic else ()):
        let_through(msr, 0)
    for msr in _MSR_BITMAP_OPEN + (_MSR_BITMAP_WRITE if virtual_apic else ()):
        let_through(msr, 2048)
    return bytes(bitmap)


_NAMES = {int(reason): reason.name for reason in ExitReason}

_HANDLERS: dict[int, Callable[[VmxVcpu, LogicalProcessor], bool]] = {
    ExitReason.EXCEPTION_OR_NMI: VmxVcpu._interrupted,
    ExitReason.EXTERNAL_INTERRUPT: VmxVcpu._interrupted,
    ExitReason.TRIPLE_FAULT: VmxVcpu._triple_fault,
    ExitReason.INTERRUPT_WINDOW: VmxVcpu._window_open,
    ExitReason.CPUID: VmxVcpu._cpuid,
    ExitReason.HLT: VmxVcpu._hlt,
    ExitReason.IO_INSTRUCTION: VmxVcpu._io,
    ExitReason.RDMSR: VmxVcpu._rdmsr,
    ExitReason.WRMSR: VmxVcpu._wrmsr,
    ExitReason.EPT_VIOLATION: VmxVcpu._ept_violation,
    ExitReason.XSETBV: VmxVcpu._xsetbv,
    ExitReason.WBINVD: VmxVcpu._nothing,
    ExitReason.INVD: VmxVcpu._nothing,
    ExitReason.SEAMCALL: VmxVcpu._undefined,
    ExitReason.TDCALL: VmxVcpu._undefined,
}
