"""TD entry, and the loop of VM exits until the vCPU leaves to the host (TDX Module Base Spec, "TD Entry")."""

from typing import Final

from softtdx.abi.exits import (
    EXIT_BASIC_MASK,
    EXIT_BUS_LOCK_PREEMPTED,
    EXIT_ENTRY_FAILED,
    EXIT_PARALLEL,
    EXIT_PENDING_MTF,
    INFO_TYPE_HARDWARE_EXCEPTION,
    INFO_TYPE_MASK,
    INFO_VALID,
    INFO_VECTOR_MASK,
    PF_VECTOR,
    ExitReason,
    ExtendedQualification,
    VeCategory,
)
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.msrs import Msr
from softtdx.abi.opstate import VcpuState
from softtdx.abi.status import HOST_RECOVERABILITY_HINT, Operand, Status
from softtdx.hw.faults import VmFail
from softtdx.hw.registers import GPR_NAMES, Registers

from .. import tdr, tdvps, vmcs
from ..context import Call
from ..errors import LeafError
from ..exits.dispatch import HANDLERS, unexpected
from ..exits.events import entry_failed, idt_vectoring
from ..fatal import ModuleFatal
from ..features import CpuidFlag
from ..locks import SHARED
from ..td import LockId, check_op_state, open_td_of
from . import stepping, xstate
from .guest import Guest, Resume, TdExit, Vmcall
from .leave import DEBUG_AND_XCR0, leave_async, leave_vmcall, selected_registers
from .lp import LpState, lp_state
from .msrs import load_guest_msrs, require_loadable
from .resident import Resident
from .vcpu import Vcpu, flush_td_translations, lock_tdvpr

__all__ = ["enter"]

# RCX of TDH.VP.ENTER
TDVPR_MASK: Final = 0x000F_FFFF_FFFF_F000
HINT: Final = 1 << 52
RESUME_L1: Final = 1 << 53
RESERVED: Final = 0xFFF | 0xFFC0_0000_0000_0000

MISC_LIMIT_CPUID: Final = 1 << 22
MISC_MONITOR: Final = 1 << 18
MISC_ENABLE: Final = int(Msr.MISC_ENABLE)
TSC_ADJUST: Final = int(Msr.TSC_ADJUST)
XSS: Final = int(Msr.XSS)
PRED_CMD: Final = int(Msr.PRED_CMD)
HOST_DEBUGCTL: Final = int(Msr.DEBUGCTL)
PERF_GLOBAL_CTRL: Final = int(Msr.PERF_GLOBAL_CTRL)
IBPB: Final = 1
DEBUGCTL_UNCORE_PMI: Final = 1 << 13
FIXED_COUNTER_0: Final = 1 << 32
SPEC_CTRL_DDPD_U: Final = 1 << 8
MONITOR_MWAIT: Final = int(CpuidFlag.MONITOR_MWAIT)
RAX, RCX = 0, 1
ACTIVE: Final = int(VcpuState.ACTIVE)
READY: Final = int(VcpuState.READY)
EPT_VIOLATION: Final = int(ExitReason.EPT_VIOLATION)
EPT_WRITE: Final = 1 << 1
XSTATE_SSE: Final = 1 << 1
XSAVE_XMM: Final = 160
XSAVE_HEADER: Final = 512
SIGN: Final = 1 << 63
U64: Final = (1 << 64) - 1
REASON_RESERVED: Final = 0x03FF_0000 | EXIT_PENDING_MTF | EXIT_PARALLEL | 1 << 30
TDCALL: Final = int(ExitReason.TDCALL)


def enter(call: Call) -> int:
    """TDH.VP.ENTER; returns RAX. The checks are in the order that `leaves.vp` documents."""
    cpu = call.cpu
    operand = call.regs.rcx
    misc_enable = cpu.rdmsr(MISC_ENABLE)
    if misc_enable & MISC_LIMIT_CPUID:
        raise LeafError(Status.LIMIT_CPUID_MAXVAL_SET)
    if operand & RESERVED:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    pa = operand & TDVPR_MASK
    lp = lp_state(call)
    resident = lp.residents.get(pa)
    if resident is not None and resident.lock(call):
        guest = resident.guest
        guest.begin()
    else:
        resident = None
        tdvpr = lock_tdvpr(call, pa, SHARED)
        td = open_td_of(call, tdvpr)
        check_op_state(call, td, SeamcallLeaf.VP_ENTER, SHARED)
        guest = Guest(call, td, Vcpu(call, td, pa))
    vcpu = guest.vcpu
    newly_bound = False
    if guest.state != READY or guest.associated != cpu.apic_id or guest.last_module != call.g.seamdb_index:
        newly_bound = vcpu.associate()
    if resident is None:
        lp.residents[pa] = Resident(call, tdvpr, guest)
    lp.load_vmcs(vcpu.vmcs)
    _check_vcpu(guest, operand, misc_enable)
    guest.epoch = vcpu.enter_epoch(guest.epoch, newly_bound=newly_bound)
    refused = _check_stepping(guest)
    if refused is not None:
        return refused
    return _run(guest, lp, operand)


def _check_vcpu(guest: Guest, operand: int, misc_enable: int) -> None:
    cpu = guest.cpu
    if operand & HINT and guest.last_exit != tdvps.LAST_EXIT_ASYNC_TRAP:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if operand & RESUME_L1 and not guest.curr_vm:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if cpu.rdmsr(TSC_ADJUST) != guest.platform.msrs[TSC_ADJUST]:
        raise LeafError(Status.INCONSISTENT_MSR, TSC_ADJUST)
    if cpu.rdtsc() - guest.last_exit_tsc & SIGN:
        raise LeafError(Status.TSC_ROLLBACK)
    if guest.flags[MONITOR_MWAIT] and not misc_enable & MISC_MONITOR:
        raise LeafError(Status.INCORRECT_MSR_VALUE, MISC_ENABLE)


def _check_stepping(guest: Guest) -> int | None:
    """Zero-step detection: None to go on, or RAX of an EPT-violation exit without entry."""
    try:
        faulting = stepping.check_entry(guest)
    except LeafError:
        guest.vcpu.leave_epoch(guest.epoch)
        raise
    if faulting is not None:
        guest.vcpu.leave_epoch(guest.epoch)
        return _refuse_entry(guest, faulting)
    if stepping.wants_notification(guest):
        cpu = guest.cpu
        reason = cpu.vmread(vmcs.EXIT_REASON)
        qualification = cpu.vmread(vmcs.EXIT_QUALIFICATION)
        gpa = cpu.vmread(vmcs.PHYSICAL_ADDRESS)
        if (
            reason & EXIT_BASIC_MASK == EPT_VIOLATION
            and not gpa & guest.shared_bit
            and stepping.may_notify(guest, qualification)
        ):
            guest.inject_ve(reason, qualification, VeCategory.ARCHITECTURAL, gpa)
    return None


def _refuse_entry(guest: Guest, gpa: int) -> int:
    """As if the vCPU had been entered and had touched the noted page again."""
    guest.cpu.core.xinit(guest.xfam)
    guest.vcpu.wr8(tdvps.VCPU_STATE, READY)
    guest.vcpu.wr8(tdvps.LAST_TD_EXIT, tdvps.LAST_EXIT_ASYNC_FAULT)
    regs = guest.call.regs
    for name in GPR_NAMES:
        if name != "rsp" and not (name == "rbp" and guest.keeps_rbp):
            setattr(regs, name, 0)
    regs.rcx = EPT_WRITE
    regs.r8 = gpa & ~0xFFF
    regs.clear_xmm()
    return EPT_VIOLATION


# --- all checks have passed
def _run(guest: Guest, lp: LpState, operand: int) -> int:
    call = guest.call
    td = guest.td
    td.unlock(LockId.OP_STATE, SHARED)
    if guest.stepping.epf_gpas:
        td.unlock(LockId.SEPT, SHARED)
    if lp.last_tdvpr != guest.vcpu.pa:
        # The TLB does not tell vCPUs of one TD from each other, nor does the branch predictor.
        flush_td_translations(td)
        call.cpu.core.wrmsr(PRED_CMD, IBPB)
        lp.last_tdvpr = guest.vcpu.pa
    _restore_registers(guest, operand)
    host = load_guest_msrs(guest)
    try:
        require_loadable(guest)
        _restore_state(guest)
        _exits(guest)
    except TdExit as stop:
        return leave_async(guest, stop, host)
    except Vmcall:
        return leave_vmcall(guest, host)
    raise ModuleFatal("a vCPU left without a reason")


def _restore_registers(guest: Guest, operand: int) -> None:
    """GPRs from the TDVPS; after a VMCALL those that the guest asked for from the host."""
    cpu = guest.cpu
    vp = guest.vp
    cpu.load_gprs(vp + tdvps.GPR_RAX)
    last = guest.last_exit
    if last == tdvps.LAST_EXIT_TDVMCALL:
        _take_vmcall_results(guest)
    elif last == tdvps.LAST_EXIT_ASYNC_TRAP:
        status = cpu.gpr(0) & ~HOST_RECOVERABILITY_HINT
        cpu.set_gpr(0, status | (HOST_RECOVERABILITY_HINT if operand & HINT else 0))
    guest.stepping.entry_rcx = cpu.gpr(1)


def _take_vmcall_results(guest: Guest) -> None:
    cpu = guest.cpu
    host = guest.call.regs
    control = cpu.gpr(RCX)
    set_gpr = cpu.set_gpr
    for index, name in selected_registers(control & 0xFFFF):
        set_gpr(index, getattr(host, name))
    set_gpr(RAX, 0)
    xmm_select = control >> 16 & 0xFFFF
    if xmm_select:
        _take_xmms(guest, xmm_select, host)


def _take_xmms(guest: Guest, select: int, regs: Registers) -> None:
    """Into the XSAVE image, which is restored as a whole afterwards."""
    vcpu = guest.vcpu
    for index in range(16):
        if select >> index & 1:
            vcpu.write(tdvps.XBUFF + XSAVE_XMM + 16 * index, regs.xmm[index].to_bytes(16, "little"))
    header = tdvps.XBUFF + XSAVE_HEADER
    vcpu.wr64(header, vcpu.rd64(header) | XSTATE_SSE)
    vcpu.wr64(header + 8, vcpu.rd64(header + 8) | XSTATE_SSE)


def _restore_state(guest: Guest) -> None:
    """What is neither in the VMCS nor a general-purpose register."""
    cpu = guest.cpu
    core = cpu.core
    vp = guest.vp
    if guest.pend_nmi and not cpu.rd32(vp + tdvps.VE_VALID):
        _open_nmi_window(guest)
    if guest.debug:
        ours = cpu.vmread(vmcs.DEBUGCTL) & ~DEBUGCTL_UNCORE_PMI
        cpu.vmwrite(vmcs.DEBUGCTL, ours | (core.rdmsr(HOST_DEBUGCTL) or 0) & DEBUGCTL_UNCORE_PMI)
    if guest.platform.ddpd and not guest.flags[CpuidFlag.DDPD]:
        cpu.vmwrite(vmcs.SPEC_CTRL_SHADOW, cpu.rd64(vp + tdvps.IA32_SPEC_CTRL) & ~SPEC_CTRL_DDPD_U)
    if not xstate.header_is_valid(guest):
        raise _extended_state_failure()
    try:
        xstate.restore(guest)
    except ValueError:
        raise _extended_state_failure() from None
    guest.loaded_debug = raw = cpu.read(vp + tdvps.DR0, DEBUG_AND_XCR0.size)
    *dr, core.xcr0, core.cr2 = DEBUG_AND_XCR0.unpack(raw)
    core.dr = dr
    core.wrmsr(XSS, cpu.rd64(vp + tdvps.IA32_XSS))
    if not guest.perfmon:
        cpu.vmwrite(vmcs.PERF_GLOBAL_CTRL, (core.rdmsr(PERF_GLOBAL_CTRL) or 0) | FIXED_COUNTER_0)
    guest.stepping.entry_retired = cpu.retired_instructions()
    guest.stepping.entry_tsc = cpu.rdtsc()
    if not guest.host_state_known:
        cpu.wr8(vp + tdvps.MODULE_DEPENDENT_FIELDS_UPDATED, 1)
        cpu.wr8(vp + tdvps.LP_DEPENDENT_HPA_UPDATED, 1)
    cpu.wr8(vp + tdvps.VCPU_STATE, ACTIVE)


def _extended_state_failure() -> TdExit:
    return TdExit(
        Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
        ExitReason.ENTRY_FAILURE_GUEST_STATE,
        extended=ExtendedQualification.XSTATE_LOAD_FAILURE,
    )


def _open_nmi_window(guest: Guest) -> None:
    cpu = guest.cpu
    cpu.vmwrite(vmcs.PRIMARY_CONTROLS, cpu.vmread(vmcs.PRIMARY_CONTROLS) | vmcs.PRIMARY_NMI_WINDOW)


# --- VM exits
def _exits(guest: Guest) -> None:
    """Run the guest and handle its exits; ends by TdExit or Vmcall."""
    cpu = guest.cpu
    vmread = cpu.vmread
    rd8 = cpu.rd8
    fatal_at = guest.td.tdr + tdr.FATAL
    handlers = HANDLERS
    filter_exit = stepping.filter_exit
    while True:
        try:
            reason = cpu.vmenter(not guest.launched)
        except VmFail as failure:
            raise ModuleFatal(f"VM entry of a TD failed with VM-instruction error {failure.error}") from failure
        guest.reason = reason
        guest.event = 0
        basic = reason & EXIT_BASIC_MASK
        if basic != reason:
            _note_reason(guest, reason)
        else:
            guest.launched = True
        if rd8(fatal_at):
            raise TdExit(
                Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
                reason,
                vmread(vmcs.EXIT_QUALIFICATION),
                interruption=vmread(vmcs.EXIT_INTERRUPTION_INFO),
            )
        if filter_exit(guest, basic):
            continue
        info = vmread(vmcs.IDT_VECTORING_INFO)
        if info & INFO_VALID:
            idt_vectoring(guest, info)
        if reason & EXIT_ENTRY_FAILED:
            entry_failed(guest)
        try:
            handlers.get(basic, unexpected)(guest)
        except Resume:
            pass
        else:
            if not guest.event:
                if guest.pend_nmi and not cpu.rd32(guest.vp + tdvps.VE_VALID):
                    _open_nmi_window(guest)
                guest.retired += 1
                guest.advance_rip()
        if guest.bus_lock:
            raise TdExit(Status.SUCCESS, ExitReason.BUS_LOCK)
        if guest.debug and guest.event:
            _tell_debugger(guest)


def _note_reason(guest: Guest, reason: int) -> None:
    """Bits of the exit reason above the basic one."""
    if reason & EXIT_BUS_LOCK_PREEMPTED:
        guest.bus_lock = True
    if not guest.debug and reason & REASON_RESERVED:
        raise ModuleFatal(f"exit reason {reason:#x} of a TD has reserved bits set")
    if not reason & EXIT_ENTRY_FAILED:
        guest.launched = True


def _tell_debugger(guest: Guest) -> None:
    """An exception about to be injected that a debugger asked to see, by the exception bitmap."""
    cpu = guest.cpu
    event = guest.event
    if event & (INFO_VALID | INFO_TYPE_MASK) != INFO_VALID | INFO_TYPE_HARDWARE_EXCEPTION:
        return
    vector = event & INFO_VECTOR_MASK
    if not cpu.vmread(vmcs.EXCEPTION_BITMAP) >> vector & 1:
        return
    if vector == PF_VECTOR:
        error = cpu.vmread(vmcs.EXIT_INTERRUPTION_ERROR_CODE)
        if error & cpu.vmread(vmcs.PAGE_FAULT_MASK) != cpu.vmread(vmcs.PAGE_FAULT_MATCH):
            return
    raise TdExit(Status.SUCCESS, ExitReason.EXCEPTION_OR_NMI, interruption=event)
