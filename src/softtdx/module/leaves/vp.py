"""TDH.VP.*: the life of a virtual processor (TDX Module ABI, "Host-Side Interface"; Base Spec, "TD VCPU")."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.msrs import Msr
from softtdx.abi.opstate import VcpuState
from softtdx.abi.status import Operand, Status

from .. import tdcs, tdvps
from ..atomics import add32
from ..context import Call
from ..errors import LeafError
from ..features import XFAM_LBR, CpuidFlag
from ..locks import EXCLUSIVE, SHARED
from ..pamt import PageType, lock_page
from ..platform import PlatformConfig
from ..registry import ALL_VERSIONS, seamcall
from ..td import KEYS_CONFIGURED, Td, check_op_state, open_td, open_td_of
from ..transitions.enter import enter
from ..transitions.lp import lp_state
from ..transitions.td_vmcs import init_l2_base_masks, init_td_vmcs, prepare_vmcs
from ..transitions.vcpu import Vcpu, flush_td_translations, lock_tdvpr

__all__: list[str] = []

U64: Final = (1 << 64) - 1
U32: Final = 0xFFFF_FFFF
VERSION_WITH_APIC_ID: Final = 1
XCR0_RESET: Final = 1
DR6_RESET: Final = 0xFFFF_0FF0
FMASK_RESET: Final = 0x2_0200
NO_VECTOR: Final = 0xFFFF
XCOMP_COMPACTED: Final = 1 << 63
XSAVE_HEADER: Final = 512

# Pages of a TDVPS that start as all ones: the MSR bitmaps and shadow MSR bitmaps of L2 VMs.
L2_BITMAP_PAGES: Final = frozenset({7, 8, 10, 11, 13, 14})

# IA32_MISC_ENABLE as a TD starts with it
MISC_FAST_STRINGS: Final = 1 << 0
MISC_PERFMON: Final = 1 << 7
MISC_BTS_UNAVAILABLE: Final = 1 << 11
MISC_PEBS_UNAVAILABLE: Final = 1 << 12
MISC_EST: Final = 1 << 16
MISC_MONITOR: Final = 1 << 18
SPEC_CTRL_DDPD_U: Final = 1 << 8


@seamcall(SeamcallLeaf.VP_CREATE)
def vp_create(call: Call) -> None:
    """TDH.VP.CREATE: make a free page the root (TDVPR) of a new vCPU.

    In: RCX page, RDX TDR. Statuses in order: those of `open_td` for RDX, those of `lock_page` for RCX.
    """
    regs = call.regs
    td = open_td(call, regs.rdx, SeamcallLeaf.VP_CREATE, Operand.RDX)
    page = lock_page(call, regs.rcx, PageType.NDA, EXCLUSIVE, Operand.RCX)
    # Every check has passed: from here the call only writes.
    cpu = call.cpu
    base = td.keyed(regs.rcx)
    cpu.zero_page(base)
    cpu.wr8(base + tdvps.NUM_TDVPS_PAGES, 1)
    cpu.wr32(base + tdvps.ASSOC_LPID, tdvps.NO_LP)
    cpu.wr64(base + tdvps.TDVPS_PAGE_PA, base)
    td.add_children(1)
    page.set(PageType.TDVPR, td.pa)


@seamcall(SeamcallLeaf.VP_ADDCX)
def vp_addcx(call: Call) -> None:
    """TDH.VP.ADDCX: give a vCPU that is not initialised one more page (5 without L2 VMs).

    In: RCX page, RDX TDVPR. Statuses in order: `lock_page` for RDX; the owner TD's state; VCPU_STATE_INCORRECT;
    TDCX_NUM_INCORRECT (it has 15 already); `lock_page` for RCX.
    """
    regs = call.regs
    cpu = call.cpu
    tdvpr = lock_tdvpr(call, regs.rdx, EXCLUSIVE, Operand.RDX)
    td = open_td_of(call, tdvpr)
    check_op_state(call, td, SeamcallLeaf.VP_ADDCX, SHARED)
    base = td.keyed(regs.rdx)
    state = cpu.rd8(base + tdvps.VCPU_STATE)
    if state != VcpuState.UNINITIALIZED:
        raise LeafError(Status.VCPU_STATE_INCORRECT, state)
    count = cpu.rd8(base + tdvps.NUM_TDVPS_PAGES)
    if count >= tdvps.PAGES_MAX:
        raise LeafError(Status.TDCX_NUM_INCORRECT)
    page = lock_page(call, regs.rcx, PageType.NDA, EXCLUSIVE, Operand.RCX)
    # Every check has passed: from here the call only writes.
    added = td.keyed(regs.rcx)
    cpu.zero_page(added)
    if count in L2_BITMAP_PAGES:
        cpu.write(added, b"\xff" * 4096)
    cpu.wr64(base + tdvps.TDVPS_PAGE_PA + 8 * count, added)
    cpu.wr8(base + tdvps.NUM_TDVPS_PAGES, count + 1)
    td.add_children(1)
    page.set(PageType.TDCX, td.pa)


@seamcall(SeamcallLeaf.VP_INIT, versions=ALL_VERSIONS)
def vp_init(call: Call) -> None:
    """TDH.VP.INIT: the vCPU's initial state and its VMCS.

    In: RCX TDVPR, RDX initial value of the guest's RCX and R8; version 1: R8 x2APIC ID.
    Statuses in order: INCONSISTENT_MSR IA32_TSC_ADJUST; OPERAND_INVALID RAX (version above 1); `lock_page` for RCX;
    the owner TD's state; TDCX_NUM_INCORRECT; VCPU_STATE_INCORRECT; MAX_VCPUS_EXCEEDED; OPERAND_INVALID R8 (above 32
    bits); X2APIC_ID_NOT_UNIQUE with the ID.
    """
    regs = call.regs
    cpu = call.cpu
    platform = call.g.platform
    _check_tsc_adjust(call, platform)
    version = call.version
    if version > VERSION_WITH_APIC_ID:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    tdvpr = lock_tdvpr(call, regs.rcx, EXCLUSIVE)
    td = open_td_of(call, tdvpr, EXCLUSIVE if version else SHARED)
    check_op_state(call, td, SeamcallLeaf.VP_INIT, SHARED)
    vcpu = Vcpu(call, td, regs.rcx)
    state = vcpu.rd8(tdvps.VCPU_STATE)
    if state != VcpuState.UNINITIALIZED:
        raise LeafError(Status.VCPU_STATE_INCORRECT, state)
    index = _take_index(td)
    if version:
        try:
            _take_apic_id(td, index, regs.r8)
        except LeafError:
            add32(cpu, td.p0 + tdcs.NUM_VCPUS, -1)
            raise
    else:
        td.wr8(tdcs.TOPOLOGY_ENUM_CONFIGURED, 0)
        td.wr8(tdcs.VE_REDUCTION_VALID, 0)
    # Every check has passed: from here the call only writes.
    vcpu.wr32(tdvps.VCPU_INDEX, index)
    vcpu.wr64(tdvps.LAST_EXIT_TSC, cpu.rdtsc())
    _init_registers(td, vcpu, regs.rdx, index, platform)
    _init_fields(td, vcpu, platform)
    vcpu.wr8(tdvps.VCPU_STATE, VcpuState.READY)
    vcpu.wr8(tdvps.LAST_TD_EXIT, tdvps.LAST_EXIT_ASYNC_FAULT)
    vcpu.bind_new()
    prepare_vmcs(cpu, vcpu.vmcs, platform)
    with lp_state(call).td_vmcs(vcpu.vmcs):
        init_td_vmcs(td, vcpu, platform)
    for vm in range(1, td.rd16(tdcs.NUM_L2_VMS) + 1):
        region = vcpu.pages[(tdvps.L2_VMCS_1 >> 12) + tdvps.PAGES_PER_L2_VM * (vm - 1)]
        prepare_vmcs(cpu, region, platform)
        with lp_state(call).td_vmcs(region):
            init_td_vmcs(td, vcpu, platform, vm)


def _check_tsc_adjust(call: Call, platform: PlatformConfig) -> None:
    if call.cpu.rdmsr(Msr.TSC_ADJUST) != platform.msrs[Msr.TSC_ADJUST]:
        raise LeafError(Status.INCONSISTENT_MSR, Msr.TSC_ADJUST)


def _take_index(td: Td) -> int:
    """The next vCPU index, in the order of initialisation."""
    cpu = td.call.cpu
    index = add32(cpu, td.p0 + tdcs.NUM_VCPUS, 1)
    if index >= td.rd32(tdcs.MAX_VCPUS):
        add32(cpu, td.p0 + tdcs.NUM_VCPUS, -1)
        raise LeafError(Status.MAX_VCPUS_EXCEEDED)
    return index


def _take_apic_id(td: Td, index: int, apic_id: int) -> None:
    if apic_id > U32:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    known = td.read(tdcs.X2APIC_IDS, 4 * index) if index else b""
    if any(int.from_bytes(known[at : at + 4], "little") == apic_id for at in range(0, len(known), 4)):
        raise LeafError(Status.X2APIC_ID_NOT_UNIQUE, apic_id)
    td.wr32(tdcs.X2APIC_IDS + 4 * index, apic_id)


def _init_registers(td: Td, vcpu: Vcpu, value: int, index: int, platform: PlatformConfig) -> None:
    vcpu.wr64(tdvps.GPR_RBX, 52 if td.rd8(tdcs.GPAW) else 48)
    vcpu.wr64(tdvps.GPR_RCX, value)
    vcpu.wr64(tdvps.GPR_R8, value)
    vcpu.wr64(tdvps.GPR_RDX, platform.cpuid_fms)
    vcpu.wr64(tdvps.GPR_RSI, index)
    vcpu.wr64(tdvps.XCR0, XCR0_RESET)
    vcpu.wr64(tdvps.DR6, DR6_RESET)
    vcpu.wr64(tdvps.IA32_FMASK, FMASK_RESET)
    vcpu.wr64(tdvps.XBUFF + XSAVE_HEADER + 8, XCOMP_COMPACTED)
    if td.rd64(tdcs.XFAM) & XFAM_LBR:
        vcpu.wr64(tdvps.IA32_LBR_DEPTH, platform.max_lbr_depth)


def _init_fields(td: Td, vcpu: Vcpu, platform: PlatformConfig) -> None:
    """What the TDVPS keeps beside the registers: shadows of fields that the host may write, L2 controls, MSR images."""
    vms = td.rd16(tdcs.NUM_L2_VMS) + 1
    vcpu.wr64(tdvps.SHADOW_PID_HPA, U64)
    vcpu.wr32(tdvps.SHADOW_PINBASED_EXEC_CTLS, platform.controls.pin)
    vcpu.wr16(tdvps.SHADOW_POSTED_INT_NOTIFICATION_VECTOR, NO_VECTOR)
    for vm in range(vms):
        controls = platform.l2_controls if vm else platform.controls
        vcpu.wr32(tdvps.SHADOW_PROCBASED_EXEC_CTLS2 + 4 * vm, controls.secondary)
        for at in (
            tdvps.SHADOW_SHARED_EPTP,
            tdvps.L2_ENTER_GUEST_STATE_GPA,
            tdvps.L2_ENTER_GUEST_STATE_HPA,
            tdvps.L2_VAPIC_GPA,
            tdvps.L2_VAPIC_HPA,
            tdvps.TSC_DEADLINE,
        ):
            vcpu.wr64(at + 8 * vm, U64)
    init_l2_base_masks(td, vcpu, platform)
    flags = td.read(tdcs.CPUID_FLAGS, 32)
    misc = platform.msrs[Msr.MISC_ENABLE] & (MISC_FAST_STRINGS | MISC_BTS_UNAVAILABLE)
    perfmon = td.rd64(tdcs.ATTRIBUTES) >> 63
    if perfmon:
        misc |= MISC_PERFMON
    else:
        misc |= platform.msrs[Msr.MISC_ENABLE] & MISC_PEBS_UNAVAILABLE
    if flags[CpuidFlag.EST]:
        misc |= MISC_EST
    if flags[CpuidFlag.MONITOR_MWAIT]:
        misc |= MISC_MONITOR
    vcpu.wr64(tdvps.IA32_MISC_ENABLE, misc)
    vcpu.wr64(tdvps.IA32_SPEC_CTRL, SPEC_CTRL_DDPD_U if platform.ddpd and not flags[CpuidFlag.DDPD] else 0)


@seamcall(SeamcallLeaf.VP_FLUSH)
def vp_flush(call: Call) -> None:
    """TDH.VP.FLUSH: write back and forget everything that this processor caches of a vCPU; it may then run elsewhere.

    In: RCX TDVPR. Statuses in order: `lock_page` for RCX; TD_KEYS_NOT_CONFIGURED; TDCX_NUM_INCORRECT;
    VCPU_NOT_ASSOCIATED (with this processor).
    """
    regs = call.regs
    cpu = call.cpu
    tdvpr = lock_tdvpr(call, regs.rcx, EXCLUSIVE)
    td = open_td_of(call, tdvpr)
    if td.lifecycle != KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
    vcpu = Vcpu(call, td, regs.rcx)
    if vcpu.rd32(tdvps.ASSOC_LPID) != cpu.apic_id:
        raise LeafError(Status.VCPU_NOT_ASSOCIATED)
    # Every check has passed: from here the call only writes.
    flush_td_translations(td)
    lp = lp_state(call)
    for vm in range(td.rd16(tdcs.NUM_L2_VMS) + 1):
        region = vcpu.pages[(tdvps.L2_VMCS_1 >> 12) + tdvps.PAGES_PER_L2_VM * (vm - 1)] if vm else vcpu.vmcs
        lp.clear_vmcs(region)
        vcpu.wr8(tdvps.VM_LAUNCHED + vm, 0)
    vcpu.unbind()
    lp.last_tdvpr = 0
    lp.residents.pop(regs.rcx, None)


@seamcall(SeamcallLeaf.VP_ENTER)
def vp_enter(call: Call) -> int | None:
    """TDH.VP.ENTER: run a vCPU until it leaves to the host.

    In: RCX TDVPR | bit 52 host recoverability hint | bit 53 resume L1; after TDG.VP.VMCALL also the registers that the
    guest's RCX selected. Out: see `transitions.leave`.
    Statuses in order: LIMIT_CPUID_MAXVAL_SET; OPERAND_INVALID RCX (reserved bits); `lock_page` for RCX; the owner
    TD's state; TDCX_NUM_INCORRECT; VCPU_STATE_INCORRECT; VCPU_ASSOCIATED; OPERAND_INVALID RCX (hint without a
    trap-like exit, resume L1 without L2); INCONSISTENT_MSR IA32_TSC_ADJUST; TSC_ROLLBACK; INCORRECT_MSR_VALUE
    IA32_MISC_ENABLE; OPERAND_BUSY TD_EPOCH; OPERAND_BUSY SEPT_TREE.
    """
    return enter(call)
