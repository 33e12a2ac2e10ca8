"""A vCPU while it runs on a logical processor: what VP.ENTER sets up and every VM exit works on.

An exit handler gets a `Guest`. It returns normally when the guest goes on behind the instruction that exited, or
after it called `inject_*`, when the guest goes on with that exception. It raises `TdExit` to leave to the host, and
`Resume` to go on without having completed the instruction.
"""

import struct
from typing import Any, Final, NoReturn

from softtdx.abi.exits import (
    BLOCKING_BY_MOV_SS,
    BLOCKING_BY_NMI,
    BLOCKING_BY_STI,
    DF_VECTOR,
    EPT_HOST_MASK,
    GP_VECTOR,
    INFO_ERROR_CODE,
    INFO_TYPE_HARDWARE_EXCEPTION,
    INFO_VALID,
    INFO_VECTOR_MASK,
    PENDING_DEBUG_BS,
    PF_VECTOR,
    UD_VECTOR,
    VE_VECTOR,
    ExitReason,
    VeCategory,
)
from softtdx.abi.status import Status
from softtdx.hw.registers import Registers

from .. import tdcs, tdvps, vmcs
from ..context import Call
from ..features import ATTR_DEBUG, ATTR_PERFMON, CONFIG_NO_RBP_MOD, CPUID_FLAGS_SIZE
from ..td import Td
from .vcpu import Vcpu

__all__ = ["NO_REASON", "Guest", "Resume", "TdExit", "Vmcall"]

_EXCEPTION: Final = INFO_VALID | INFO_TYPE_HARDWARE_EXCEPTION
_VE: Final = _EXCEPTION | VE_VECTOR
_UD: Final = _EXCEPTION | UD_VECTOR
_INTR_BLOCKING: Final = BLOCKING_BY_MOV_SS | BLOCKING_BY_STI
_U64: Final = (1 << 64) - 1
# EXIT_REASON, VALID, EXIT_QUALIFICATION, GLA, GPA, EPTP_INDEX, INSTRUCTION_LENGTH, INSTRUCTION_INFORMATION, VE_CATEGORY
_VE_INFO: Final = struct.Struct("<IIQQQHxxIIB")
# VCPU_STATE, LAST_TD_EXIT, ASSOC_LPID, VCPU_EPOCH, LAST_EXIT_TSC, PEND_NMI, LAST_EPF_GPA_LIST_IDX,
# POSSIBLY_EPF_STEPPING, LAST_SEAMDB_INDEX, CURR_VM, VM_LAUNCHED, LP_DEPENDENT_HPA_UPDATED,
# MODULE_DEPENDENT_FIELDS_UPDATED
_STATE: Final = struct.Struct("<BB198xI4xQ8xQB15xBB20xQHxxB3xB3xB")
assert tdvps.VCPU_STATE + _STATE.size == tdvps.MODULE_DEPENDENT_FIELDS_UPDATED + 1


NO_REASON: Final = -1  # TdExit.reason of an exit that no VM exit explains


class TdExit(Exception):  # noqa: N818  a change of control, not an error
    """The vCPU leaves to the host asynchronously: what the host will see.

    `case` is the status whose low half is the exit reason; `gpa` has its page offset already cleared where it must.
    """

    def __init__(
        self,
        case: int,
        reason: int,
        qualification: int = 0,
        extended: int = 0,
        gpa: int = 0,
        interruption: int = 0,
    ) -> None:
        """Registers: RAX = case | reason, RCX, RDX, R8 and R9 in this order."""
        self.case = int(case)
        self.reason = reason
        self.qualification = qualification
        self.extended = extended
        self.gpa = gpa
        self.interruption = interruption


class Vmcall(Exception):  # noqa: N818  a change of control, not an error
    """TDG.VP.VMCALL: the vCPU leaves to the host with the registers that it chose."""


class Resume(Exception):  # noqa: N818  a change of control, not an error
    """The guest goes on at the same instruction: an event was injected, or an interrupt must be served first."""


class Stepping:
    """What single-step and zero-step detection remembers of this stay in the TD (see `transitions.stepping`)."""

    __slots__ = (
        "active", "entry_rcx", "entry_retired", "entry_rip", "entry_tsc", "epf_count", "epf_gpas", "init", "interrupt",
        "nmi", "saved_cr8", "steps",
    )  # fmt: skip

    def __init__(self) -> None:
        """Nothing suspicious yet."""
        self.active = False  # the guest is being let forward some instructions, interrupts held back
        self.steps = 0
        self.nmi = False
        self.init = False
        self.interrupt = False
        self.saved_cr8 = 0
        self.entry_rip = 0
        self.entry_rcx = 0
        self.entry_retired = 0
        self.entry_tsc = 0
        self.epf_count = 0  # POSSIBLY_EPF_STEPPING
        self.epf_gpas = 0  # LAST_EPF_GPA_LIST_IDX


class Guest:
    """The vCPU that this logical processor runs, and what is true of its TD as long as it runs.

    `regs` are the guest's general-purpose registers during a TDCALL; other handlers use `cpu.gpr` and `cpu.set_gpr`.
    `event` is the VM-entry interruption information prepared since the last exit, 0 for none; `version` that of the
    TDCALL leaf; `bus_lock` says that an exit reported a preempted bus lock that the host has not been told of;
    `gprs` are the registers of the TDG.VP.VMCALL with which it leaves; `host_state_known`: the VMCS has the host state
    of this module and processor. One Guest serves many entries: see `begin`.
    """

    __slots__ = (
        "associated", "attributes", "bus_lock", "call", "config_flags", "cpu", "curr_vm", "debug", "epoch", "event",
        "filtered", "flags", "g", "gpaw", "gprs", "host_state_known", "last_exit", "last_exit_tsc", "last_module",
        "launched", "loaded_debug", "loaded_msrs", "pend_nmi", "perfmon", "platform", "reason", "regs", "retired",
        "shared_bit", "state", "stepping", "switched_msrs", "td", "tdc", "vcpu", "version", "virt_maxpa", "vp", "xfam",
        "xstate_area",
    )  # fmt: skip

    def __init__(self, call: Call, td: Td, vcpu: Vcpu) -> None:
        """`vcpu` of `td` is about to be entered."""
        cpu = call.cpu
        self.call = call
        self.cpu = cpu
        self.g = call.g
        self.platform = call.g.platform
        self.td = td
        self.vcpu = vcpu
        self.tdc = base = td.p0  # the TDCS's first page
        self.vp = vcpu.p0  # the TDVPR
        self.attributes = attributes = cpu.rd64(base + tdcs.ATTRIBUTES)
        self.xfam = cpu.rd64(base + tdcs.XFAM)
        self.config_flags = cpu.rd64(base + tdcs.CONFIG_FLAGS)
        self.gpaw = cpu.rd8(base + tdcs.GPAW)
        self.shared_bit = 1 << (51 if self.gpaw else 47)
        self.virt_maxpa = cpu.rd8(base + tdcs.VIRT_MAXPA)
        self.flags = cpu.read(base + tdcs.CPUID_FLAGS, CPUID_FLAGS_SIZE)  # as of the entry: see `flag`
        self.debug = bool(attributes & ATTR_DEBUG)
        self.perfmon = bool(attributes & ATTR_PERFMON)
        self.filtered = self.perfmon and bool(td.rd16(tdcs.EVENT_FILTERS_NUM))
        self.regs = Registers()
        self.gprs: tuple[int, ...] = ()
        self.version = 0
        self.switched_msrs: Any = None  # of `transitions.msrs`
        self.xstate_area: Any = None  # of `transitions.xstate`
        # What TD entry loaded and TD exit need not save again when it has not changed.
        self.loaded_msrs: tuple[int, ...] = ()
        self.loaded_debug = b""  # DR0..DR3, DR6, XCR0, CR2
        self.stepping = Stepping()
        self.begin()

    def begin(self) -> None:
        """A new entry: what the TDVPS says of the vCPU now, and nothing left of the entry before."""
        epf = self.stepping
        (
            self.state, self.last_exit, self.associated, self.epoch, self.last_exit_tsc, pend_nmi, epf.epf_gpas,
            epf.epf_count, self.last_module, self.curr_vm, launched, lp_known, module_known,
        ) = _STATE.unpack(self.cpu.read(self.vp + tdvps.VCPU_STATE, _STATE.size))  # fmt: skip
        self.launched = launched != 0
        self.host_state_known = bool(lp_known and module_known)
        self.pend_nmi = pend_nmi != 0
        self.event = 0
        self.reason = 0
        self.bus_lock = False
        self.retired = 0  # instructions that the module completed for the guest since the entry
        epf.active = epf.nmi = epf.init = epf.interrupt = False
        epf.steps = 0

    @property
    def keeps_rbp(self) -> bool:
        """CONFIG_FLAGS.NO_RBP_MOD: RBP never crosses between host and TD."""
        return bool(self.config_flags & CONFIG_NO_RBP_MOD)

    def flag(self, which: int) -> int:
        """A byte of TDCS.CPUID_FLAGS, which the TD may change by TD_CTLS while it runs."""
        return self.cpu.rd8(self.tdc + tdcs.CPUID_FLAGS + which)

    def controls(self) -> int:
        """TD_CTLS, which the TD may change while it runs."""
        return self.cpu.rd64(self.tdc + tdcs.TD_CTLS)

    # --- what the guest is doing
    def cpl(self) -> int:
        """The guest's current privilege level."""
        return self.cpu.vmread(vmcs.SS_ACCESS_RIGHTS) >> vmcs.AR_DPL_SHIFT & 3

    def in_64bit_mode(self) -> bool:
        """EFER.LMA and CS.L."""
        cpu = self.cpu
        return bool(cpu.vmread(vmcs.EFER) & 1 << 10 and cpu.vmread(vmcs.CS_ACCESS_RIGHTS) & vmcs.AR_LONG)

    # --- events
    def _inject(self, event: int) -> None:
        self.event = event
        self.cpu.vmwrite(vmcs.ENTRY_INFO, event)

    def _inject_with_error(self, vector: int, error: int) -> None:
        cpu = self.cpu
        protected = cpu.vmread(vmcs.CR0) & vmcs.CR0_PE
        self._inject(_EXCEPTION | vector | (INFO_ERROR_CODE if protected else 0))
        cpu.vmwrite(vmcs.ENTRY_ERROR_CODE, error)

    def _set_resume_flag(self) -> None:
        cpu = self.cpu
        cpu.vmwrite(vmcs.RFLAGS, cpu.vmread(vmcs.RFLAGS) | vmcs.RFLAGS_RF)

    def inject_ud(self) -> None:
        """#UD at the instruction that exited."""
        self._set_resume_flag()
        self._inject(_UD)

    def inject_gp(self) -> None:
        """#GP(0) at the instruction that exited."""
        self._set_resume_flag()
        self._inject_with_error(GP_VECTOR, 0)

    def inject_pf(self, gla: int, error: int) -> None:
        """#PF, with CR2; #DF when a #PF or #VE is already on its way, a shutdown when a #DF is."""
        self.cpu.core.cr2 = gla
        pending = self.event & (INFO_VALID | 0x700)
        vector = self.event & INFO_VECTOR_MASK
        if pending == _EXCEPTION and vector == DF_VECTOR:
            raise TdExit(Status.NON_RECOVERABLE_VCPU, ExitReason.TRIPLE_FAULT)
        if pending == _EXCEPTION and vector in (PF_VECTOR, VE_VECTOR):
            self._inject_with_error(DF_VECTOR, 0)
        else:
            self._inject_with_error(PF_VECTOR, error)
        self._set_resume_flag()

    def inject_ve(
        self, reason: int, qualification: int = 0, category: int = VeCategory.PARAVIRT, gpa: int = 0, gla: int = 0
    ) -> None:
        """#VE, its information in TDVPS.VE_INFO; #DF(0) while the guest has not read the last one's."""
        cpu = self.cpu
        vp = self.vp
        vmread = cpu.vmread
        if cpu.rd32(vp + tdvps.VE_VALID):
            self._inject_with_error(DF_VECTOR, 0)
        else:
            info = _VE_INFO.pack(
                reason & 0xFFFF_FFFF,
                tdvps.VE_INFO_VALID,
                qualification,
                gla,
                gpa,
                vmread(vmcs.EPTP_INDEX),
                vmread(vmcs.INSTRUCTION_LENGTH),
                vmread(vmcs.INSTRUCTION_INFO),
                category,
            )
            cpu.write(vp, info)
            cpu.wr32(vp + tdvps.VE_INTERRUPTIBILITY_STATE, vmread(vmcs.INTERRUPTIBILITY))
            self._inject(_VE)
        self._set_resume_flag()
        cpu.publish("ve", reason=reason & 0xFFFF)

    def block_nmi(self) -> None:
        """NMIs stay blocked: the IRET that unblocked them has not completed."""
        cpu = self.cpu
        cpu.vmwrite(vmcs.INTERRUPTIBILITY, cpu.vmread(vmcs.INTERRUPTIBILITY) | BLOCKING_BY_NMI)

    # --- going on
    def advance_rip(self) -> None:
        """Behind the instruction that exited: blocking by STI and MOV SS ends, a single-step trap becomes pending."""
        cpu = self.cpu
        vmread, vmwrite = cpu.vmread, cpu.vmwrite
        vmwrite(vmcs.RIP, vmread(vmcs.RIP) + vmread(vmcs.INSTRUCTION_LENGTH) & _U64)
        state = vmread(vmcs.INTERRUPTIBILITY)
        if state & _INTR_BLOCKING:
            vmwrite(vmcs.INTERRUPTIBILITY, state & ~_INTR_BLOCKING)
        self.set_pending_single_step()

    def set_pending_single_step(self) -> None:
        """PENDING_DEBUG.BS as the trap flag has it after an instruction."""
        cpu = self.cpu
        pending = cpu.vmread(vmcs.PENDING_DEBUG)
        single = cpu.vmread(vmcs.RFLAGS) & vmcs.RFLAGS_TF and not cpu.vmread(vmcs.DEBUGCTL) & vmcs.DEBUGCTL_BTF
        wanted = pending | PENDING_DEBUG_BS if single else pending & ~PENDING_DEBUG_BS
        if wanted != pending:
            cpu.vmwrite(vmcs.PENDING_DEBUG, wanted)

    def clear_shadows(self) -> None:
        """An interrupted TDCALL is started again later: blocking by STI or MOV SS ends now."""
        cpu = self.cpu
        state = cpu.vmread(vmcs.INTERRUPTIBILITY)
        if state & _INTR_BLOCKING:
            cpu.vmwrite(vmcs.INTERRUPTIBILITY, state & ~_INTR_BLOCKING)

    # --- leaving
    def exit_ept_violation(self, gpa: int, qualification: int, extended: int = 0) -> NoReturn:
        """A TD exit with reason EPT violation, which hides linear-address details and the page offset."""
        raise TdExit(Status.SUCCESS, ExitReason.EPT_VIOLATION, qualification & ~EPT_HOST_MASK, extended, gpa & ~0xFFF)
