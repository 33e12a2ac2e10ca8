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
from softtdx.kvm.lapic import NOTIFICATION_VECTOR
from softtdx.kvm.memory import PAGE
from softtdx.kvm.mmio import MAX_INSTRUCTION, MmioInstruction, decode_mmio
from softtdx.kvm.mmu import Fault, shared_fault, walk_guest
from softtdx.kvm.uapi import IoExit, MmioExit, MsrExit, Regs, Segment, Sregs
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vmx_state import LeftInProcessor
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
_MSR_BITMAP_READ = (Msr.X2APIC_TPR, Msr.X2APIC_PPR, *range(Msr.X2APIC_ISR0, Msr.X2APIC_ESR))  # from the virtual APIC
_MSR_BITMAP_WRITE = (Msr.X2APIC_TPR, Msr.X2APIC_EOI, Msr.X2APIC_SELF_IPI)
_IN_VMCS: dict[int, int] = {Msr.EFER: vmcs.GUEST_IA32_EFER, Msr.PAT: vmcs.GUEST_IA32_PAT}
_PAT_RESET, _PAT_TYPES = 0x0007_0406_0007_0406, (0, 1, 4, 5, 6, 7)
_PPR = 0xA0  # in the virtual-APIC page
_VALID = 1 << 31  # of interruption information
_UD = _VALID | 3 << 8 | 6
_VECTORING_UNDEFINED = 1 << 12
_BLOCKED_BY_NMI = 8
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
        memory.write(self.msr_bitmap, _msr_bitmap(virtual_apic=vcpu.apic is not None))
        lp = vcpu.vm.host.cpus.lps[0]
        memory.write(self.vmcs, (lp.rdmsr(Msr.VMX_BASIC) & 0x7FFF_FFFF).to_bytes(4, "little"))
        self.gprs = [0] * 16
        self.rip, self.rflags = 0xFFF0, 2
        self.sregs = Sregs()
        self.left = LeftInProcessor(memory)
        self.virtual_apic = memory.alloc(zero=True) if vcpu.apic is not None else 0
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
        self.left.load(lp)
        self._cpu = lp.index

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
        if not self._set_up:
            self._write_controls(lp)
            self._write_guest_state(lp)
            self._set_up = True
        if self._dirty:
            core.vmwrite(vmcs.GUEST_RIP, self.rip)
            core.vmwrite(vmcs.GUEST_RSP, self.gprs[_RSP])
            core.vmwrite(vmcs.GUEST_RFLAGS, self.rflags)
            self._dirty = False
        if self.vcpu.apic is not None and self.vcpu.apic.nmi_pending:
            self._inject_nmi(lp)
        core.set_gprs(tuple(self.gprs))
        try:
            self._reason = lp.vmenter(not self._launched)
        except VmFail as fail:
            raise KvmError(errno.EIO, f"VM entry failed: VM-instruction error {fail.error}") from fail
        self._launched = True
        self.gprs = list(core.gprs())
        self.rip, self.gprs[_RSP] = core.vmread(vmcs.GUEST_RIP), core.vmread(vmcs.GUEST_RSP)
        self.rflags = core.vmread(vmcs.GUEST_RFLAGS)
        vectoring = core.vmread(vmcs.IDT_VECTORING_INFO)
        if vectoring & _VALID:
            # The exit came in the middle of an event's delivery: deliver it again (vmx_complete_interrupts).
            core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, vectoring & ~_VECTORING_UNDEFINED)
            core.vmwrite(vmcs.ENTRY_EXCEPTION_ERROR_CODE, core.vmread(vmcs.IDT_VECTORING_ERROR_CODE))
            core.vmwrite(vmcs.ENTRY_INSTRUCTION_LENGTH, core.vmread(vmcs.EXIT_INSTRUCTION_LENGTH))

    def _inject_nmi(self, lp: LogicalProcessor) -> None:
        core, apic = lp.core, self.vcpu.apic
        blocked = core.vmread(vmcs.GUEST_INTERRUPTIBILITY) & _BLOCKED_BY_NMI
        if apic is not None and not blocked and not core.vmread(vmcs.ENTRY_INTERRUPTION_INFO) & _VALID:
            apic.nmi_pending = False
            core.vmwrite(vmcs.GUEST_ACTIVITY_STATE, 0)
            core.vmwrite(vmcs.ENTRY_INTERRUPTION_INFO, _VALID | 2 << 8 | 2)

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
        value = emulate.read_msr(self.vcpu, index) if field is None else lp.core.vmread(field)
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
        elif index == Msr.PAT and all(kind in _PAT_TYPES for kind in value.to_bytes(8, "little")):
            lp.core.vmwrite(vmcs.GUEST_IA32_PAT, value)
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
            return self._mmio(lp, gpa)
        return fault is Fault.FIXED

    def _mmio(self, lp: LogicalProcessor, gpa: int) -> bool:
        """A load or store where there is no memory: user space has a device there, or nobody."""
        code = self._instruction(lp)
        instruction = decode_mmio(code)
        if instruction is None:
            self.vcpu.kvm_run.detail = (
                f"access to GPA {gpa:#x}, where there is no memory, at RIP {self.rip:#x} by an instruction "
                f"that is not emulated ({code.hex()})"
            )
            return self.vcpu.exit_to_user(KvmExit.INTERNAL_ERROR)
        mask = (1 << 8 * instruction.size) - 1
        access = MmioExit(instruction.write, instruction.size, gpa)
        if instruction.write:
            value = self.gprs[instruction.reg] >> 8 * instruction.high
            access.value = (value if instruction.immediate is None else instruction.immediate) & mask
        self.vcpu.kvm_run.mmio = access
        self.rip = self.rip + instruction.length & _U64
        lp.core.vmwrite(vmcs.GUEST_RIP, self.rip)

        def complete() -> None:
            if not instruction.write:
                self._load_register(instruction, access.value & mask)

        return self.vcpu.exit_to_user(KvmExit.MMIO, complete)

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
                code += vm.mm.read(self._hva(walk_guest(vm, cr3, address)), count)
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
            vmcs.GUEST_IA32_PAT: _PAT_RESET,
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
