"""A vCPU of a TD: its making, TDH.VP.ENTER and what follows each TD exit (arch/x86/kvm/vmx/tdx.c)."""

import errno
from enum import Enum

from softtdx.abi.exits import ExitReason, ExtendedQualification
from softtdx.abi.fields import CpuidFieldCode, table
from softtdx.abi.kvm import KvmExit, TdxCommand, VcpuEventFlag
from softtdx.abi.kvm_structs import VcpuEventsStruct
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.msrs import Msr
from softtdx.abi.status import describe, status_of
from softtdx.abi.vmcs import PinBased
from softtdx.hw import LogicalProcessor, Registers
from softtdx.kvm import emulate, td_debug
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.errors import KvmError, SeamcallError
from softtdx.kvm.lapic import NOTIFICATION_VECTOR
from softtdx.kvm.memory import PAGE
from softtdx.kvm.mmu import Fault, pre_fault_private, private_fault, shared_fault
from softtdx.kvm.page_moves import promote_ready
from softtdx.kvm.tdvmcall import handle_tdvmcall
from softtdx.kvm.tdx import TdState, TdxVm
from softtdx.kvm.uapi import CpuidEntry, Regs, Sregs, TdxInitMemRegion
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vmx_state import evict
from softtdx.kvm.x86_ops import VcpuOps

__all__ = ["TdxVcpu"]

_EXTENDED, _ADDRESS_LEAF = 0x8000_0000, 0x8000_0008
_TOLD_LEAVES = 128  # that a field id of a CPUID value can name, and subleaves
_ERROR = 1 << 63
_NON_RECOVERABLE = 1 << 62
_SHARED_EPTP = "Shared EPTP"
_POSTED_VECTOR = "Posted-interrupt notification vector"
_POSTED_DESCRIPTOR = "Posted-interrupt descriptor address"
_PIN_BASED = "Pin-Based VM-Execution Controls"
_TSC_FRACTION = 48  # of the TSC multiplier
_STATE_DETAILS, _PEND_NMI = "VCPU_STATE_DETAILS", "PEND_NMI"
_VINTR_PENDING = 1  # of VCPU_STATE_DETAILS
_U64 = (1 << 64) - 1
_EPT_WRITE = 2  # of an EPT violation's exit qualification
_REQUESTED_LEVEL = 32  # of an ACCEPT's extended exit qualification: bits 34:32


class VcpuState(Enum):
    """How far a vCPU has come."""

    UNINITIALIZED = "created"
    INITIALIZED = "initialised"


class TdxVcpu(VcpuOps):
    """The TDX half of a vCPU. `regs` holds what the last TD exit left, and what the next entry gives the TD."""

    def __init__(self, vcpu: Vcpu) -> None:
        """KVM_CREATE_VCPU: no page is used yet."""
        super().__init__(vcpu)
        ops = vcpu.vm.ops
        assert isinstance(ops, TdxVm)
        self.td = ops
        self.state = VcpuState.UNINITIALIZED
        self.tdvpr: int | None = None
        self.tdcx: list[int] = []
        self.regs = Registers()

    # --- KVM_MEMORY_ENCRYPT_OP
    def memory_encrypt_op(self, command: int, argument: object) -> object:
        """The KVM_TDX_* commands of a vCPU. EINVAL before the TD is initialised or after it was finalised."""
        if self.td.state is not TdState.INITIALIZED:
            raise KvmError(errno.EINVAL, "this KVM_TDX command needs a TD that is initialised and not yet finalised")
        if command == TdxCommand.INIT_VCPU and isinstance(argument, int):
            self._init(argument)
            return None
        if command == TdxCommand.INIT_MEM_REGION and isinstance(argument, TdxInitMemRegion):
            self._init_mem_region(argument)
            return None
        if command == TdxCommand.GET_CPUID:
            return self._get_cpuid()
        raise KvmError(errno.EINVAL, f"KVM_MEMORY_ENCRYPT_OP {command} on a vCPU with {type(argument).__name__}")

    def _init(self, initial_rcx: int) -> None:
        """The TDVPS. When the module refuses a step, the VM is dead (KVM_BUG_ON): what it has comes back at the end."""
        if self.state is not VcpuState.UNINITIALIZED:
            raise KvmError(errno.EINVAL, "KVM_TDX_INIT_VCPU was done before")
        if not 0 <= initial_rcx < 1 << 64:
            raise KvmError(errno.EINVAL, f"initial RCX {initial_rcx:#x}")
        vm = self.vcpu.vm
        try:
            with vm.host.cpus.run(self.vcpu.cpu) as lp:
                self._make_tdvps(lp)
                self._cpu = lp.index
                self._set_up(lp, initial_rcx)
        except KvmError:
            vm.mark_dead()
            raise
        self.state = VcpuState.INITIALIZED

    def _make_tdvps(self, lp: LogicalProcessor) -> None:
        td, tdr = self.td, self.td.require_tdr()
        tdvpr = self.tdvpr = td.give(lambda page: sc.vp_create(lp, tdr, page), "TDVPR")
        for _ in range(td.tdx.sysinfo.tdvps_pages - 1):
            self.tdcx.append(td.give(lambda page: sc.vp_addcx(lp, tdvpr, page), "TDCX"))

    def _set_up(self, lp: LogicalProcessor, initial_rcx: int) -> None:
        """TDH.VP.INIT, and what the VMCS has of the host's: the shared EPT and posted interrupts."""
        tdvpr, vm, apic, fields = self.tdvpr, self.vcpu.vm, self.vcpu.apic, table("vmcs")
        assert tdvpr is not None
        assert vm.ept is not None
        sc.vp_init(lp, tdvpr, initial_rcx, self.vcpu.vcpu_id)
        sc.vp_wr(lp, tdvpr, fields[_SHARED_EPTP].field_id, vm.ept.root)
        if apic is not None:
            sc.vp_wr(lp, tdvpr, fields[_POSTED_VECTOR].field_id, NOTIFICATION_VECTOR)
            sc.vp_wr(lp, tdvpr, fields[_POSTED_DESCRIPTOR].field_id, apic.descriptor)
            posted = int(PinBased.POSTED_INTERRUPTS)
            sc.vp_wr(lp, tdvpr, fields[_PIN_BASED].field_id, posted, posted)

    def _init_mem_region(self, region: TdxInitMemRegion) -> None:
        """PAGE.ADD and, to measure, MR.EXTEND of each page; the source is user memory (kvm_gmem_populate).

        `region` goes on as pages are done, so that it tells how far it came when one fails.
        """
        vm, td = self.vcpu.vm, self.td
        end = region.gpa + region.nr_pages * PAGE
        if self.state is not VcpuState.INITIALIZED:
            raise KvmError(errno.EINVAL, "KVM_TDX_INIT_MEM_REGION before KVM_TDX_INIT_VCPU")
        if region.gpa % PAGE or region.source_addr % PAGE or region.nr_pages <= 0 or region.gpa < 0:
            raise KvmError(errno.EINVAL, f"KVM_TDX_INIT_MEM_REGION of {region.nr_pages} pages at {region.gpa:#x}")
        if end > td.shared_bit:
            raise KvmError(errno.EINVAL, f"initial memory up to {end:#x} is not private memory of the TD")
        with vm.host.cpus.run(self.vcpu.cpu) as lp:
            while region.nr_pages:
                self._add_page(lp, region)
                region.source_addr, region.gpa = region.source_addr + PAGE, region.gpa + PAGE
                region.nr_pages -= 1
                vm.host.cpus.yield_if_wanted(lp)

    def _add_page(self, lp: LogicalProcessor, region: TdxInitMemRegion) -> None:
        vm, td, gpa = self.vcpu.vm, self.td, region.gpa
        with vm.mm.pinned(region.source_addr) as source, vm.mmu_lock:
            slot = vm.memslots.find(gpa)
            if slot is None or slot.guest_memfd is None or not vm.private.is_private(gpa):
                raise KvmError(errno.EINVAL, f"GPA {gpa:#x} is not private memory with a guest_memfd behind it")
            if td.secure.lookup(gpa) is not None:
                raise KvmError(errno.EEXIST, f"initial memory at GPA {gpa:#x} was added before")
            td.secure.add(lp, gpa, slot.guest_memfd.get_page(slot.file_offset(gpa) // PAGE), source)
            if region.measure:
                sc.mr_extend(lp, td.require_tdr(), gpa, PAGE)

    def _get_cpuid(self) -> list[CpuidEntry]:
        """KVM_TDX_GET_CPUID: every leaf that the module shows the TD, up to the last that it says there is."""
        entries: list[CpuidEntry] = []
        for base in (0, _EXTENDED):
            first = self._cpuid_leaf(base)
            if not first:
                raise KvmError(errno.EIO, f"the module does not tell CPUID leaf {base:#x}")
            entries += first
            for leaf in range(base + 1, min(first[0].eax, base + _TOLD_LEAVES - 1) + 1):
                entries += self._cpuid_leaf(leaf)
        return entries

    def _cpuid_leaf(self, leaf: int) -> list[CpuidEntry]:
        """The leaf without subleaves, or all that it has."""
        whole = self._read_cpuid(leaf, None)
        if whole is not None:
            return [whole]
        found: list[CpuidEntry] = []
        while (entry := self._read_cpuid(leaf, len(found))) is not None:
            found.append(entry)
        return found

    def _read_cpuid(self, leaf: int, subleaf: int | None) -> CpuidEntry | None:
        if subleaf is not None and subleaf >= _TOLD_LEAVES - 1:
            return None
        field, values = table("td")["CPUID_VALUES"].field_id & ~0xFF_FFFF, []
        with self.vcpu.vm.host.cpus.run() as lp:
            for element in (0, 1):
                code = CpuidFieldCode(leaf, subleaf, element).encode()
                try:
                    values.append(sc.mng_rd(lp, self.td.require_tdr(), field | code))
                except SeamcallError:
                    return None
        low, high = values
        eax = low & 0xFFFF_FFFF
        if leaf == _ADDRESS_LEAF:  # where KVM tells the GPA width
            eax = eax & ~(0xFF << 16) | self.td.shared_bit.bit_length() << 16
        return CpuidEntry(leaf, subleaf, eax, low >> 32, high & 0xFFFF_FFFF, high >> 32)

    def pre_fault_memory(self, gpa: int, size: int) -> int:
        """KVM_PRE_FAULT_MEMORY: private pages are given before the TD touches them. EOPNOTSUPP until it is final."""
        if self.td.state is not TdState.RUNNABLE:
            raise KvmError(errno.EOPNOTSUPP, "KVM_PRE_FAULT_MEMORY before KVM_TDX_FINALIZE_VM")
        if gpa >= self.td.shared_bit:
            raise KvmError(errno.EINVAL, f"KVM_PRE_FAULT_MEMORY of {gpa:#x}+{size:#x}, with the shared bit")
        at, end, cpus = gpa, gpa + size, self.vcpu.vm.host.cpus
        with cpus.run(self.vcpu.cpu) as lp:
            while at < end:
                try:
                    at = pre_fault_private(self.vcpu, lp, self.td.secure, at, end)
                except KvmError:
                    if at == gpa:
                        raise
                    break
                cpus.yield_if_wanted(lp)
        return at - gpa

    # --- state: of a debug TD, and what KVM has of any
    @property
    def is_initialized(self) -> bool:
        """Whether KVM_TDX_INIT_VCPU was done."""
        return self.state is VcpuState.INITIALIZED

    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        return td_debug.get_regs(self)

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        td_debug.set_regs(self, regs)

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS2. They cannot be set: KVM owns no control register of a TD."""
        return td_debug.get_sregs(self)

    def get_xcr0(self) -> int:
        """KVM_GET_XCRS."""
        return td_debug.get_xcr0(self)

    def get_debugregs(self) -> tuple[int, ...]:
        """KVM_GET_DEBUGREGS."""
        return td_debug.get_debugregs(self)

    def set_debugregs(self, values: tuple[int, ...]) -> None:
        """KVM_SET_DEBUGREGS."""
        td_debug.set_debugregs(self, values)

    def get_events(self) -> VcpuEventsStruct:
        """KVM_GET_VCPU_EVENTS: KVM knows of an NMI that it has not passed on yet, of nothing else."""
        events = VcpuEventsStruct()
        events.nmi_pending = int(self.vcpu.nmi_pending)
        flags = VcpuEventFlag
        events.flags = flags.VALID_NMI_PENDING | flags.VALID_SHADOW | flags.VALID_SMM
        return events

    def set_events(self, events: VcpuEventsStruct) -> None:
        """KVM_SET_VCPU_EVENTS: an NMI can be given to a TD, nothing else can."""
        if events.flags & VcpuEventFlag.VALID_NMI_PENDING:
            self.vcpu.nmi_pending = bool(events.nmi_pending)

    def read_msr(self, index: int) -> int | None:
        """An MSR that KVM emulates for a TD (tdx_get_msr)."""
        if index == Msr.EFER:
            return td_debug.TD_EFER
        return emulate.read_msr(self.vcpu, index) if emulate.td_has_msr(index) else None

    def write_msr(self, index: int, value: int) -> bool:
        """The same (tdx_set_msr)."""
        return emulate.td_has_msr(index, write=True) and emulate.write_msr(self.vcpu, index, value)

    # --- scheduling
    def load(self, lp: LogicalProcessor) -> None:
        """On another processor than before: flush there first (tdx_vcpu_load)."""
        with self.vcpu.association:
            if self.td.state is not TdState.RUNNABLE or self.state is not VcpuState.INITIALIZED:
                raise KvmError(errno.EINVAL, "KVM_RUN before the TD is finalised or the vCPU is initialised")
            if self._cpu not in (None, lp.index):
                self.flush()
            evict(lp)
            self._cpu = lp.index

    def flush(self) -> None:
        """TDH.VP.FLUSH on the processor that has the vCPU."""
        if self._cpu is None or self.tdvpr is None or self.td.tdx.gone:
            return
        tdvpr = self.tdvpr
        self.vcpu.vm.host.cpus.call_on(self._cpu, lambda lp: sc.vp_flush(lp, tdvpr))
        self._cpu = None

    def free(self) -> None:
        """Reclaim the TDVPS pages, after the KeyID is free."""
        for page in (*self.tdcx, *([self.tdvpr] if self.tdvpr is not None else [])):
            self.td.reclaim_page(page)
        self.tdcx.clear()
        self.tdvpr = None
        self.state = VcpuState.UNINITIALIZED

    # --- time and interrupts
    def guest_tsc(self, lp: LogicalProcessor | None = None) -> int:
        """The TD's TSC: the host's by the TD's own multiplier and offset, which the host may read."""
        if lp is None:
            return super().guest_tsc()
        offset, multiplier = self.td.tsc
        return ((lp.core.rdtsc() * multiplier >> _TSC_FRACTION) + offset) & _U64

    def host_tsc(self, guest_tsc: int) -> int:
        """The inverse, rounded up."""
        offset, multiplier = self.td.tsc
        return -(-((guest_tsc - offset & _U64) << _TSC_FRACTION) // multiplier)

    def advance_tsc(self, ticks: int) -> None:
        """`ticks` of the TD's TSC."""
        _, multiplier = self.td.tsc
        super().advance_tsc(-(-(ticks << _TSC_FRACTION) // multiplier))

    def has_events(self) -> bool:
        """Whether something waits that the TD should take soon (kvm_vcpu_has_events)."""
        apic = self.vcpu.apic
        return self.vcpu.nmi_pending or (apic is not None and apic.posted)

    def interrupt_waits(self) -> bool:
        """VCPU_STATE_DETAILS.VMXIP (tdx_protected_apic_has_interrupt)."""
        assert self.tdvpr is not None
        with self.vcpu.vm.host.cpus.run(self.vcpu.cpu) as lp:
            self.load(lp)  # it may not be the processor that the vCPU ran on
            return bool(sc.vp_rd(lp, self.tdvpr, table("vp")[_STATE_DETAILS].field_id) & _VINTR_PENDING)

    # --- running
    def run(self, lp: LogicalProcessor) -> None:
        """TDH.VP.ENTER. The registers that a TDVMCALL passed go back as its results."""
        assert self.tdvpr is not None
        if self.vcpu.nmi_pending:
            self.vcpu.nmi_pending = False
            sc.vp_wr(lp, self.tdvpr, table("vp")[_PEND_NMI].field_id, 1)
        regs = self.regs
        regs.rax, regs.rcx = Leaf.VP_ENTER, self.tdvpr
        sc.enter(lp, regs)

    def handle_exit(self, lp: LogicalProcessor) -> bool:
        """Answer a TD exit; False to go to user space."""
        regs, vm, stats = self.regs, self.vcpu.vm, self.vcpu.vm.stats
        if self.td.secure.promotable:
            with vm.mmu_lock:
                promote_ready(vm, lp, self.td.secure)
        rax = regs.rax
        if rax & _ERROR:
            if status_of(rax) in sc.TRANSIENT:
                stats["exits:busy"] += 1
                return True
            return self._failed(rax)
        reason = rax & 0xFFFF
        if reason == ExitReason.TDCALL:
            stats["exits:TDVMCALL"] += 1
            return handle_tdvmcall(self, regs)
        stats[f"exits:{_NAMES.get(reason, reason)}"] += 1
        if reason == ExitReason.EPT_VIOLATION:
            return self._ept_violation(lp)
        if reason in (ExitReason.EXTERNAL_INTERRUPT, ExitReason.EXCEPTION_OR_NMI, ExitReason.OTHER_SMI):
            return True
        if reason == ExitReason.TRIPLE_FAULT:
            self.vcpu.kvm_run.detail = "the TD took a triple fault"
            return self.vcpu.exit_to_user(KvmExit.SHUTDOWN)
        return self._internal_error(f"TD exit {_NAMES.get(reason, reason)}, qualification {regs.rcx:#x}")

    def _failed(self, rax: int) -> bool:
        if rax & _NON_RECOVERABLE and rax & 0xFFFF == ExitReason.TRIPLE_FAULT:
            self.vcpu.kvm_run.detail = "the TD took a triple fault"
            return self.vcpu.exit_to_user(KvmExit.SHUTDOWN)
        return self.vcpu.fail_entry(f"TDH.VP.ENTER: {describe(rax)}", rax)

    def _internal_error(self, what: str) -> bool:
        return self.vcpu.internal_error(what, self.regs.rax, self.vcpu.cpu or 0)

    def _ept_violation(self, lp: LogicalProcessor) -> bool:
        extended, gpa, vcpu = self.regs.rdx, self.regs.r8, self.vcpu
        kind = extended & 0xF
        if gpa & self.td.shared_bit:
            plain = gpa & ~self.td.shared_bit
            fault = shared_fault(vcpu, plain, write=bool(self.regs.rcx & _EPT_WRITE))
            if fault is Fault.NO_MEMORY:
                with vcpu.vm.mmu_lock:
                    assert vcpu.vm.ept is not None
                    vcpu.vm.ept.mark_mmio(plain)
                return True
            return fault is Fault.FIXED
        if kind == ExtendedQualification.PENDING_EPT_VIOLATION:
            vcpu.vm.mark_dead()
            raise KvmError(errno.EIO, f"the TD touched private memory at {gpa:#x} before accepting it")
        accept = kind == ExtendedQualification.ACCEPT
        level = extended >> _REQUESTED_LEVEL & 7 if accept else 0
        fault = private_fault(vcpu, lp, self.td.secure, gpa, level, accept=accept)
        if fault is Fault.NO_MEMORY:
            vcpu.exit_for_memory(gpa & ~(PAGE - 1), PAGE, private=True)
            return False
        return fault is Fault.FIXED


_NAMES = {int(reason): reason.name for reason in ExitReason}
