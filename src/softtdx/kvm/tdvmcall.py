"""TDG.VP.VMCALL as KVM answers it: instruction leaves, MapGPA, and what is passed on to user space.

Operands and results: GHCI specification. R10 0 says a standard leaf, whose number is in R11; R10 returns the status.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.kvm import HC_MAP_GPA_RANGE, MAP_GPA_RANGE_ENCRYPTED, MAP_GPA_RANGE_PAGE_SZ_4K, KvmExit
from softtdx.hw import Registers
from softtdx.kvm import emulate
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import FatalExit, HypercallExit, IoExit, MmioExit, TdxExit

if TYPE_CHECKING:
    from softtdx.kvm.tdx_vcpu import TdxVcpu

__all__ = ["handle_tdvmcall"]

_MAP_GPA_PART = 2 << 20  # converted in one go; then other work gets its turn
_U32 = 0xFFFF_FFFF
_FATAL_WITH_GPA = 1 << 63
_INFO_LEAF_BASE = 0
_FIRST_VECTOR, _LAST_VECTOR = 32, 255


def handle_tdvmcall(vcpu: "TdxVcpu", regs: Registers) -> bool:
    """Answer a TDVMCALL in place; False when user space has to."""
    vm = vcpu.vcpu.vm
    leaf = regs.r11
    name = _NAMES.get(leaf, "unknown") if regs.r10 == 0 else "vendor"
    vm.stats[f"tdvmcall:{name}"] += 1
    events = vm.host.platform.events
    if events.active:
        events.publish("hypercall", vcpu.vcpu.cpu or 0, name=name, leaf=leaf, r10=regs.r10, operands=_operands(regs))
    handler = _HANDLERS.get(leaf) if regs.r10 == 0 else None
    if handler is None:
        regs.r10 = VmcallStatus.SUBFUNC_UNSUPPORTED if regs.r10 == 0 else VmcallStatus.INVALID_OPERAND
        return True
    return handler(vcpu, regs)


def _operands(regs: Registers) -> list[int]:
    return [regs.r12, regs.r13, regs.r14, regs.r15]


# --- instructions
def _cpuid(vcpu: "TdxVcpu", regs: Registers) -> bool:
    values = emulate.cpuid(vcpu.vcpu, regs.r12 & _U32, regs.r13 & _U32)
    regs.r12, regs.r13, regs.r14, regs.r15 = values
    regs.r10 = VmcallStatus.SUCCESS
    return True


def _hlt(vcpu: "TdxVcpu", regs: Registers) -> bool:
    regs.r10 = VmcallStatus.SUCCESS
    return vcpu.vcpu.exit_to_user(KvmExit.HLT)


def _io(vcpu: "TdxVcpu", regs: Registers) -> bool:
    size, write, port = regs.r12, regs.r13, regs.r14
    if size not in (1, 2, 4) or write not in (0, 1) or port >= 1 << 16:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    access = IoExit(bool(write), size, port, regs.r15 & ((1 << 8 * size) - 1) if write else 0)
    vcpu.vcpu.kvm_run.io = access

    def complete() -> None:
        regs.r10 = VmcallStatus.SUCCESS
        regs.r11 = access.value & ((1 << 8 * size) - 1) if not write else regs.r11

    return vcpu.vcpu.exit_to_user(KvmExit.IO, complete)


def _mmio(vcpu: "TdxVcpu", regs: Registers) -> bool:
    size, write, gpa = regs.r12, regs.r13, regs.r14
    shared = vcpu.td.shared_bit
    bad_size = size not in (1, 2, 4, 8) or write not in (0, 1)
    if bad_size or not gpa & shared or gpa >= shared << 1 or gpa // PAGE != (gpa + size - 1) // PAGE:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    mask = (1 << 8 * size) - 1
    access = MmioExit(bool(write), size, gpa & ~shared, regs.r15 & mask if write else 0)
    vcpu.vcpu.kvm_run.mmio = access

    def complete() -> None:
        regs.r10 = VmcallStatus.SUCCESS
        regs.r11 = access.value & mask if not write else regs.r11

    return vcpu.vcpu.exit_to_user(KvmExit.MMIO, complete)


def _rdmsr(vcpu: "TdxVcpu", regs: Registers) -> bool:
    value = emulate.read_msr(vcpu.vcpu, regs.r12 & _U32)
    if value is None:
        regs.r10 = VmcallStatus.INVALID_OPERAND
    else:
        regs.r10, regs.r11 = VmcallStatus.SUCCESS, value
    return True


def _wrmsr(vcpu: "TdxVcpu", regs: Registers) -> bool:
    known = emulate.write_msr(vcpu.vcpu, regs.r12 & _U32, regs.r13)
    regs.r10 = VmcallStatus.SUCCESS if known else VmcallStatus.INVALID_OPERAND
    return True


def _wbinvd(vcpu: "TdxVcpu", regs: Registers) -> bool:
    del vcpu
    regs.r10 = VmcallStatus.SUCCESS
    return True


# --- services
def _get_info(vcpu: "TdxVcpu", regs: Registers) -> bool:
    if regs.r12 == _INFO_LEAF_BASE:
        # The base set of calls is all there; more would be said bit by bit.
        regs.r10 = VmcallStatus.SUCCESS
        regs.r11 = regs.r12 = regs.r13 = regs.r14 = 0
        return True
    request = TdxExit(regs.r11, (regs.r12, regs.r13, regs.r14), VmcallStatus.INVALID_OPERAND)
    return _to_user(vcpu, regs, request)


def _map_gpa(vcpu: "TdxVcpu", regs: Registers) -> bool:
    start, size, shared = regs.r12, regs.r13, vcpu.td.shared_bit
    top = shared << 1
    if size == 0 or start >= top or start + size > top or bool(start & shared) != bool((start + size - 1) & shared):
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    if start % PAGE or size % PAGE:
        regs.r10 = VmcallStatus.ALIGN_ERROR
        return True
    _map_part(vcpu, regs, start, start + size)
    return False


def _map_part(vcpu: "TdxVcpu", regs: Registers, start: int, end: int) -> None:
    shared = vcpu.td.shared_bit
    size = min(end - start, _MAP_GPA_PART)
    attributes = MAP_GPA_RANGE_PAGE_SZ_4K | (0 if start & shared else MAP_GPA_RANGE_ENCRYPTED)
    request = HypercallExit(HC_MAP_GPA_RANGE, (start & ~shared, size // PAGE, attributes))
    vcpu.vcpu.kvm_run.hypercall = request

    def complete() -> None:
        if request.ret:
            regs.r10, regs.r11 = VmcallStatus.INVALID_OPERAND, start
        elif start + size < end:
            # The guest asks again for the rest: the GHCI allows a part at a time.
            regs.r10, regs.r11 = VmcallStatus.RETRY, start + size
        else:
            regs.r10 = VmcallStatus.SUCCESS

    vcpu.vcpu.exit_to_user(KvmExit.HYPERCALL, complete)


def _get_quote(vcpu: "TdxVcpu", regs: Registers) -> bool:
    gpa, size, shared = regs.r12, regs.r13, vcpu.td.shared_bit
    plain = gpa & ~shared
    if not gpa & shared or gpa % PAGE or size % PAGE or size == 0 or plain + size > shared:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    return _to_user(vcpu, regs, TdxExit(regs.r11, (plain, size), VmcallStatus.SUBFUNC_UNSUPPORTED))


def _event_notify(vcpu: "TdxVcpu", regs: Registers) -> bool:
    vector = regs.r12
    if not _FIRST_VECTOR <= vector <= _LAST_VECTOR:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    return _to_user(vcpu, regs, TdxExit(regs.r11, (vector,), VmcallStatus.SUBFUNC_UNSUPPORTED))


def _to_user(vcpu: "TdxVcpu", regs: Registers, request: TdxExit) -> bool:
    vcpu.vcpu.kvm_run.tdx = request

    def complete() -> None:
        regs.r10 = request.ret
        if request.nr == VmcallLeaf.GET_TDVMCALL_INFO:
            regs.r11, regs.r12, regs.r13, regs.r14 = request.r11, request.r12, 0, 0

    return vcpu.vcpu.exit_to_user(KvmExit.TDX, complete)


def _fatal(vcpu: "TdxVcpu", regs: Registers) -> bool:
    text = b"".join(
        value.to_bytes(8, "little")
        for value in (regs.r14, regs.r15, regs.rbx, regs.rdi, regs.rsi, regs.r8, regs.r9, regs.rdx)
    )
    gpa = regs.r13 if regs.r12 & _FATAL_WITH_GPA else 0
    vcpu.vcpu.kvm_run.fatal = FatalExit(regs.r12 & _U32, text.split(b"\0", 1)[0], gpa)
    return vcpu.vcpu.exit_to_user(KvmExit.SYSTEM_EVENT)


_NAMES = {int(leaf): leaf.name for leaf in VmcallLeaf}

_HANDLERS: dict[int, Callable[["TdxVcpu", Registers], bool]] = {
    VmcallLeaf.CPUID: _cpuid,
    VmcallLeaf.HLT: _hlt,
    VmcallLeaf.IO: _io,
    VmcallLeaf.RDMSR: _rdmsr,
    VmcallLeaf.WRMSR: _wrmsr,
    VmcallLeaf.REQUEST_MMIO: _mmio,
    VmcallLeaf.WBINVD: _wbinvd,
    VmcallLeaf.GET_TDVMCALL_INFO: _get_info,
    VmcallLeaf.MAP_GPA: _map_gpa,
    VmcallLeaf.GET_QUOTE: _get_quote,
    VmcallLeaf.REPORT_FATAL_ERROR: _fatal,
    VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT: _event_notify,
}
