"""Ordinary VMs in VMX non-root mode, on the same silicon and beside TDs (arch/x86/kvm/vmx/vmx.c).

The VMCS of each vCPU is made by VMWRITE on the processor it runs on; the EPT is the host's own. Interrupts and NMIs of
the host exit; CPUID, I/O, HLT, and the MSRs outside the bitmap are emulated.
"""

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from softtdx.abi import vmcs
from softtdx.abi.exits import ExitReason
from softtdx.abi.kvm import KvmExit
from softtdx.abi.msrs import Msr
from softtdx.abi.vmcs import AR_LDT, AR_TSS_BUSY, AR_UNUSABLE, EntryControls, ExitControls, PinBased, Primary, Secondary
from softtdx.abi.vmcs_field import VmcsField
from softtdx.hw import LogicalProcessor
from softtdx.hw.faults import VmFail
from softtdx.kvm import emulate
from softtdx.kvm.ept import Ept
from softtdx.kvm.errors import KvmError
from softtdx.kvm.mmu import Fault, shared_fault, walk_guest
from softtdx.kvm.uapi import IoExit, MsrExit, Regs, Segment, Sregs
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.x86_ops import VcpuOps, VmOps

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["VmxVcpu", "VmxVm"]

_RAX, _RCX, _RDX, _RBX, _RSP, _RSI, _RDI = 0, 1, 2, 3, 4, 6, 7
_U32 = 0xFFFF_FFFF
_U64 = (1 << 64) - 1
_ENTRY_FAILURE = 1 << 31
_EFER_LMA = 1 << 10
_CR4_VMXE = 1 << 13
_DIRECTION = 1 << 10  # RFLAGS.DF
_BLOCKED_BY_STI_OR_MOV_SS = 3
_MSR_BITMAP_OPEN = (  # the guest reads and writes these without an exit
    Msr.SYSENTER_CS, Msr.SYSENTER_ESP, Msr.SYSENTER_EIP,
    0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103,
)  # fmt: skip
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")


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
        memory.write(self.msr_bitmap, _msr_bitmap())
        lp = vcpu.vm.host.cpus.lps[0]
        memory.write(self.vmcs, (lp.rdmsr(Msr.VMX_BASIC) & 0x7FFF_FFFF).to_bytes(4, "little"))
        self.gprs = [0] * 16
        self.rip, self.rflags = 0xFFF0, 2
        self.sregs = Sregs()
        self._cpu: int | None = None
        self._launched = False
        self._set_up = False
        self._dirty = True
        self._reason = 0

    # --- state
    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        return Regs(tuple(self.gprs), self.rip, self.rflags)

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self.gprs, self.rip, self.rflags = list(regs.gprs), regs.rip, regs.rflags | 2
        self._dirty = True

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS2."""
        self.sregs = sregs
        self._set_up = False

    # --- scheduling
    def load(self, lp: LogicalProcessor) -> None:
        """Make the VMCS current here, cleared first where it was."""
        if self._cpu is not None and self._cpu != lp.index:
            self.flush()
        lp.core.vmptrld(self.vmcs)
        self._cpu = lp.index

    def flush(self) -> None:
        """VMCLEAR on the processor that has the VMCS."""
        if self._cpu is None:
            return
        region = self.vmcs
        self.vcpu.vm.host.cpus.call_on(self._cpu, lambda lp: lp.core.vmclear(region))
        self._cpu, self._launched = None, False

    def free(self) -> None:
        """Give the VMCS back."""
        self.vcpu.vm.host.memory.free(self.vmcs)
        self.vcpu.vm.host.memory.free(self.msr_bitmap)

    # --- running
    def run(self, lp: LogicalProcessor) -> None:
        """VMLAUNCH or VMRESUME."""
        core = lp.core
        core.vmptrld(self.vmcs)
        if not self._set_up:
            self._write_controls(lp)
            self._write_guest_state(lp)
            self._set_up = True
        if self._dirty:
            core.vmwrite(vmcs.GUEST_RIP, self.rip)
            core.vmwrite(vmcs.GUEST_RSP, self.gprs[_RSP])
            core.vmwrite(vmcs.GUEST_RFLAGS, self.rflags)
            self._dirty = False
        core.set_gprs(tuple(self.gprs))
        try:
            self._reason = lp.vmenter(not self._launched)
        except VmFail as fail:
            raise KvmError(errno.EIO, f"VM entry failed: VM-instruction error {fail.error}") from fail
        self._launched = True
        self.gprs = list(core.gprs())
        self.rip, self.gprs[_RSP] = core.vmread(vmcs.GUEST_RIP), core.vmread(vmcs.GUEST_RSP)
        self.rflags = core.vmread(vmcs.GUEST_RFLAGS)

    def handle_exit(self, lp: LogicalProcessor) -> bool:
        """Answer a VM exit; False to go to user space."""
        reason, run = self._reason & 0xFFFF, self.vcpu.kvm_run
        if self._reason & _ENTRY_FAILURE:
            run.detail = f"VM entry refused the guest state ({_NAMES.get(reason, reason)})"
            return self.vcpu.exit_to_user(KvmExit.FAIL_ENTRY)
        self.vcpu.vm.stats[f"exits:{_NAMES.get(reason, reason)}"] += 1
        handler = _HANDLERS.get(reason)
        if handler is None:
            run.detail = f"VM exit {_NAMES.get(reason, reason)} at RIP {self.rip:#x}"
            return self.vcpu.exit_to_user(KvmExit.INTERNAL_ERROR)
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
        lp.core.xcr0 = self.gprs[_RDX] << 32 | self.gprs[_RAX] & _U32
        self._skip(lp)
        return True

    def _nothing(self, lp: LogicalProcessor) -> bool:
        self._skip(lp)
        return True

    def _rdmsr(self, lp: LogicalProcessor) -> bool:
        index = self.gprs[_RCX] & _U32
        value = lp.core.vmread(vmcs.GUEST_IA32_EFER) if index == Msr.EFER else emulate.read_msr(self.vcpu, index)
        if value is None:
            return self._unknown_msr(lp, MsrExit(False, index))
        self.gprs[_RAX], self.gprs[_RDX] = value & _U32, value >> 32
        self._skip(lp)
        return True

    def _wrmsr(self, lp: LogicalProcessor) -> bool:
        index, value = self.gprs[_RCX] & _U32, (self.gprs[_RDX] & _U32) << 32 | self.gprs[_RAX] & _U32
        if index == Msr.EFER:
            lma = lp.core.vmread(vmcs.GUEST_IA32_EFER) & _EFER_LMA
            lp.core.vmwrite(vmcs.GUEST_IA32_EFER, value & ~_EFER_LMA | lma)
        elif not emulate.write_msr(self.vcpu, index, value):
            return self._unknown_msr(lp, MsrExit(True, index, value))
        self._skip(lp)
        return True

    def _unknown_msr(self, lp: LogicalProcessor, access: MsrExit) -> bool:
        """#GP(0), as the kernel does for an MSR that nobody has."""
        del access
        core = lp.core
        core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, 1 << 31 | 1 << 11 | 3 << 8 | 13)
        core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, 0)
        return True

    def _io(self, lp: LogicalProcessor) -> bool:
        qualification = lp.core.vmread(vmcs.EXIT_QUALIFICATION)
        size, port = (qualification & 7) + 1, qualification >> 16 & 0xFFFF
        write, string, rep = not qualification & 8, qualification & 0x10, qualification & 0x20
        mask = (1 << 8 * size) - 1
        if rep and not self.gprs[_RCX]:
            self._skip(lp)
            return True
        access = IoExit(write, size, port)
        if write:
            access.value = self._load_guest(lp, self.gprs[_RSI], size) if string else self.gprs[_RAX] & mask
        self.vcpu.kvm_run.io = access
        if not string:
            self._skip(lp)

            def complete() -> None:
                if not write:
                    keep = 0 if size == 4 else self.gprs[_RAX] & ~mask
                    self.gprs[_RAX] = keep | access.value & mask

            return self.vcpu.exit_to_user(KvmExit.IO, complete)

        cr3 = lp.core.vmread(vmcs.GUEST_CR3)
        index = _RSI if write else _RDI
        step = -size if self.rflags & _DIRECTION else size
        last = not rep or self.gprs[_RCX] == 1
        if last:
            self._skip(lp)

        def complete_string() -> None:
            if not write:
                self._store_guest(cr3, self.gprs[_RDI], (access.value & mask).to_bytes(size, "little"))
            self.gprs[index] = self.gprs[index] + step & _U64
            if rep:
                self.gprs[_RCX] = self.gprs[_RCX] - 1 & _U64

        return self.vcpu.exit_to_user(KvmExit.IO, complete_string)

    def _load_guest(self, lp: LogicalProcessor, address: int, size: int) -> int:
        vm = self.vcpu.vm
        cr3 = lp.core.vmread(vmcs.GUEST_CR3)
        data = b""
        for i in range(size):
            gpa = walk_guest(vm, cr3, address + i)
            data += vm.mm.read(self._hva(gpa), 1)
        return int.from_bytes(data, "little")

    def _store_guest(self, cr3: int, address: int, data: bytes) -> None:
        vm = self.vcpu.vm
        for i, byte in enumerate(data):
            vm.mm.write(self._hva(walk_guest(vm, cr3, address + i)), bytes([byte]))

    def _hva(self, gpa: int) -> int:
        slot = self.vcpu.vm.memslots.find(gpa)
        if slot is None:
            raise KvmError(errno.EFAULT, f"string I/O with GPA {gpa:#x}, where there is no memory")
        return slot.hva(gpa)

    def _ept_violation(self, lp: LogicalProcessor) -> bool:
        gpa = lp.core.vmread(vmcs.GUEST_PHYSICAL_ADDRESS)
        fault = shared_fault(self.vcpu, gpa)
        if fault is Fault.NO_MEMORY:
            self.vcpu.kvm_run.detail = f"access to GPA {gpa:#x}, where there is no memory, at RIP {self.rip:#x}"
            return self.vcpu.exit_to_user(KvmExit.INTERNAL_ERROR)
        return fault is Fault.FIXED

    # --- the VMCS
    def _write_controls(self, lp: LogicalProcessor) -> None:
        vm = self.vcpu.vm
        assert vm.ept is not None
        pin = PinBased.EXTERNAL_INTERRUPT_EXITING | PinBased.NMI_EXITING
        primary = (
            Primary.HLT_EXITING
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
        exit_controls = (
            ExitControls.HOST_ADDRESS_SPACE_SIZE
            | ExitControls.SAVE_EFER
            | ExitControls.LOAD_EFER
            | ExitControls.ACK_INTERRUPT
        )
        fields = {
            vmcs.PIN_BASED_CONTROLS: _allowed(lp, Msr.VMX_TRUE_PINBASED_CTLS, pin),
            vmcs.PROCESSOR_CONTROLS: _allowed(lp, Msr.VMX_TRUE_PROCBASED_CTLS, primary),
            vmcs.SECONDARY_CONTROLS: secondary,
            vmcs.EXIT_CONTROLS: _allowed(lp, Msr.VMX_TRUE_EXIT_CTLS, exit_controls),
            vmcs.ENTRY_CONTROLS: _allowed(lp, Msr.VMX_TRUE_ENTRY_CTLS, EntryControls.LOAD_EFER),
            vmcs.MSR_BITMAPS: self.msr_bitmap,
            vmcs.EPTP: vm.ept.eptp,
            vmcs.VMCS_LINK_POINTER: _U64,
            vmcs.EXCEPTION_BITMAP: 0,
            vmcs.CR0_MASK: 0,
            vmcs.CR4_MASK: _CR4_VMXE,
            vmcs.HOST_CR0: 0x8005_0033,
            vmcs.HOST_CR4: 0x0035_26F0,
            vmcs.HOST_IA32_EFER: 0xD01,
            vmcs.HOST_CS_SELECTOR: 0x10,
            vmcs.HOST_TR_SELECTOR: 0x40,
        }
        for field, value in fields.items():
            lp.core.vmwrite(field, int(value))

    def _write_guest_state(self, lp: LogicalProcessor) -> None:
        core, s = lp.core, self.sregs
        for name in _SEGMENTS:
            self._write_segment(lp, name.upper(), getattr(s, name))
        self._write_segment(
            lp, "LDTR", s.ldt if s.ldt.access != AR_UNUSABLE else Segment(0, 0, 0, AR_LDT | AR_UNUSABLE)
        )
        self._write_segment(lp, "TR", s.tr if s.tr.access != AR_UNUSABLE else Segment(0, 0, 0xFFFF, AR_TSS_BUSY))
        fields = {
            vmcs.GUEST_GDTR_BASE: s.gdt_base,
            vmcs.GUEST_GDTR_LIMIT: s.gdt_limit,
            vmcs.GUEST_IDTR_BASE: s.idt_base,
            vmcs.GUEST_IDTR_LIMIT: s.idt_limit,
            vmcs.GUEST_CR0: s.cr0,
            vmcs.GUEST_CR3: s.cr3,
            vmcs.GUEST_CR4: s.cr4 | _CR4_VMXE,
            vmcs.CR4_READ_SHADOW: s.cr4,
            vmcs.GUEST_IA32_EFER: s.efer,
            vmcs.GUEST_DR7: 0x400,
            vmcs.GUEST_INTERRUPTIBILITY: 0,
            vmcs.GUEST_ACTIVITY_STATE: 0,
        }
        for field, value in fields.items():
            core.vmwrite(field, value)

    def _write_segment(self, lp: LogicalProcessor, name: str, segment: Segment) -> None:
        for part, value in (
            ("SELECTOR", segment.selector),
            ("BASE", segment.base),
            ("LIMIT", segment.limit),
            ("ACCESS_RIGHTS", segment.access),
        ):
            lp.core.vmwrite(VmcsField[f"GUEST_{name}_{part}"].value, value)


def _allowed(lp: LogicalProcessor, msr: int, wanted: int) -> int:
    """Controls with the bits that must be 1; a wanted bit that may not be 1 is an error of this machine."""
    value = lp.rdmsr(msr)
    required, possible = value & _U32, value >> 32
    if wanted & ~possible:
        raise KvmError(errno.EIO, f"the processor lacks VMX controls {wanted & ~possible:#x} (MSR {msr:#x})")
    return wanted | required


def _msr_bitmap() -> bytes:
    """Everything exits but the MSRs that hardware saves or keeps: reads low, reads high, writes low, writes high."""
    bitmap = bytearray(b"\xff" * 4096)
    for msr in _MSR_BITMAP_OPEN:
        base = 1024 if msr >= 0xC000_0000 else 0
        byte, bit = divmod(msr & 0x1FFF, 8)
        for half in (0, 2048):
            bitmap[half + base + byte] &= ~(1 << bit) & 0xFF
    return bytes(bitmap)


_NAMES = {int(reason): reason.name for reason in ExitReason}

_HANDLERS: dict[int, Callable[[VmxVcpu, LogicalProcessor], bool]] = {
    ExitReason.EXCEPTION_OR_NMI: VmxVcpu._interrupted,
    ExitReason.EXTERNAL_INTERRUPT: VmxVcpu._interrupted,
    ExitReason.TRIPLE_FAULT: VmxVcpu._triple_fault,
    ExitReason.CPUID: VmxVcpu._cpuid,
    ExitReason.HLT: VmxVcpu._hlt,
    ExitReason.IO_INSTRUCTION: VmxVcpu._io,
    ExitReason.RDMSR: VmxVcpu._rdmsr,
    ExitReason.WRMSR: VmxVcpu._wrmsr,
    ExitReason.EPT_VIOLATION: VmxVcpu._ept_violation,
    ExitReason.XSETBV: VmxVcpu._xsetbv,
    ExitReason.WBINVD: VmxVcpu._nothing,
    ExitReason.INVD: VmxVcpu._nothing,
}
