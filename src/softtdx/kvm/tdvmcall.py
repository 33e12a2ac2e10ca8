"""TDG.VP.VMCALL as KVM answers it: instruction leaves, MapGPA, and what is passed on to user space.

Operands and results: GHCI specification. R10 0 says a standard leaf, whose number is in R11; R10 returns the status.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.kvm import (
    EXIT_HYPERCALL_LONG_MODE,
    HC_MAP_GPA_RANGE,
    MAP_GPA_RANGE_ENCRYPTED,
    MAP_GPA_RANGE_PAGE_SZ_4K,
    SYSTEM_EVENT_TDX_FATAL,
    KvmExit,
)
from softtdx.hw import Registers
from softtdx.kvm import emulate
from softtdx.kvm.eventfd import MMIO, PIO
from softtdx.kvm.memory import PAGE

if TYPE_CHECKING:
    from softtdx.kvm.tdx_vcpu import TdxVcpu

__all__ = ["handle_tdvmcall"]

_MAP_GPA_PART = 2 << 20  # converted in one go; then other work gets its turn
_U32 = 0xFFFF_FFFF
_INFO_LEAF_BASE, _INFO_LEAF_CALLS = 0, 1
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
    mask = (1 << 8 * size) - 1
    value = regs.r15 & mask if write else 0
    if write and vcpu.vcpu.vm.io_bus.write(PIO, port, size, value):
        regs.r10 = VmcallStatus.SUCCESS
        return True
    access = vcpu.vcpu.kvm_run.io.put(bool(write), size, port, value)

    def complete() -> None:
        regs.r10 = VmcallStatus.SUCCESS
        regs.r11 = access.value & mask if not write else regs.r11

    return vcpu.vcpu.exit_to_user(KvmExit.IO, complete)


def _mmio(vcpu: "TdxVcpu", regs: Registers) -> bool:
    size, write, gpa = regs.r12, regs.r13, regs.r14
    shared = vcpu.td.shared_bit
    bad_size = size not in (1, 2, 4, 8) or write not in (0, 1)
    if bad_size or not gpa & shared or gpa >= shared << 1 or gpa // PAGE != (gpa + size - 1) // PAGE:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    mask = (1 << 8 * size) - 1
    value = regs.r15 & mask if write else 0
    if write and vcpu.vcpu.vm.io_bus.write(MMIO, gpa & ~shared, size, value):
        regs.r10 = VmcallStatus.SUCCESS
        return True
    access = vcpu.vcpu.kvm_run.mmio.put(bool(write), size, gpa & ~shared, value)

    def complete() -> None:
        regs.r10 = VmcallStatus.SUCCESS
        regs.r11 = access.value & mask if not write else regs.r11

    return vcpu.vcpu.exit_to_user(KvmExit.MMIO, complete)


def _rdmsr(vcpu: "TdxVcpu", regs: Registers) -> bool:
    value = vcpu.read_msr(regs.r12 & _U32)
    if value is None:
        return _unknown_msr(vcpu, regs, None)
    regs.r10, regs.r11 = VmcallStatus.SUCCESS, value
    return True


def _wrmsr(vcpu: "TdxVcpu", regs: Registers) -> bool:
    if not vcpu.write_msr(regs.r12 & _U32, regs.r13):
        return _unknown_msr(vcpu, regs, regs.r13)
    regs.r10 = VmcallStatus.SUCCESS
    return True


def _unknown_msr(vcpu: "TdxVcpu", regs: Registers, value: int | None) -> bool:
    """An error for the TD, unless user space wants to see it (KVM_CAP_X86_USER_SPACE_MSR)."""

    def answered(error: bool, read: int | None) -> None:
        regs.r10 = VmcallStatus.INVALID_OPERAND if error else VmcallStatus.SUCCESS
        if not error and read is not None:
            regs.r11 = read

    if not vcpu.vcpu.msr_to_user(regs.r12 & _U32, value, answered):
        return False
    regs.r10 = VmcallStatus.INVALID_OPERAND
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
    if regs.r12 != _INFO_LEAF_CALLS:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    return _to_user(vcpu, regs, (regs.r12,), VmcallStatus.SUCCESS)


def _map_gpa(vcpu: "TdxVcpu", regs: Registers) -> bool:
    start, size, shared = regs.r12, regs.r13, vcpu.td.shared_bit
    top = shared << 1
    status = VmcallStatus.SUCCESS
    if not vcpu.vcpu.vm.hypercall_exits >> HC_MAP_GPA_RANGE & 1:
        status = VmcallStatus.SUBFUNC_UNSUPPORTED  # user space does not convert (KVM_CAP_EXIT_HYPERCALL)
    elif size == 0 or start >= top or start + size > top or bool(start & shared) != bool((start + size - 1) & shared):
        status = VmcallStatus.INVALID_OPERAND
    elif start % PAGE or size % PAGE:
        status = VmcallStatus.ALIGN_ERROR
    if status:
        regs.r10, regs.r11 = status, start
        return True
    _map_part(vcpu, regs, start, start + size)
    return False


def _map_part(vcpu: "TdxVcpu", regs: Registers, start: int, end: int) -> None:
    """Ask user space to convert a part; when it did, the next one, unless an interrupt waits for the TD."""
    shared = vcpu.td.shared_bit
    size = min(end - start, _MAP_GPA_PART)
    attributes = MAP_GPA_RANGE_PAGE_SZ_4K | (0 if start & shared else MAP_GPA_RANGE_ENCRYPTED)
    request = vcpu.vcpu.kvm_run.hypercall
    request.nr, request.args = HC_MAP_GPA_RANGE, (start & ~shared, size // PAGE, attributes, 0, 0, 0)
    request.ret, request.flags = 0, EXIT_HYPERCALL_LONG_MODE

    def complete() -> None:
        if request.ret:
            regs.r10, regs.r11 = VmcallStatus.INVALID_OPERAND, start
        elif start + size == end:
            regs.r10 = VmcallStatus.SUCCESS
        elif vcpu.has_events():
            # The guest takes the interrupt and asks again for the rest: the GHCI allows a part at a time.
            regs.r10, regs.r11 = VmcallStatus.RETRY, start + size
        else:
            _map_part(vcpu, regs, start + size, end)

    vcpu.vcpu.exit_to_user(KvmExit.HYPERCALL, complete)


def _get_quote(vcpu: "TdxVcpu", regs: Registers) -> bool:
    gpa, size, shared = regs.r12, regs.r13, vcpu.td.shared_bit
    plain = gpa & ~shared
    if not gpa & shared or gpa % PAGE or size % PAGE or size == 0 or plain + size > shared:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    return _to_user(vcpu, regs, (plain, size), VmcallStatus.SUBFUNC_UNSUPPORTED)


def _event_notify(vcpu: "TdxVcpu", regs: Registers) -> bool:
    vector = regs.r12
    if not _FIRST_VECTOR <= vector <= _LAST_VECTOR:
        regs.r10 = VmcallStatus.INVALID_OPERAND
        return True
    return _to_user(vcpu, regs, (vector,), VmcallStatus.SUBFUNC_UNSUPPORTED)


def _to_user(vcpu: "TdxVcpu", regs: Registers, data: tuple[int, ...], status: VmcallStatus) -> bool:
    """KVM_EXIT_TDX. `status` is what the TD gets from a user space that does nothing."""
    leaf = regs.r11
    request = vcpu.vcpu.kvm_run.tdx.put(leaf, data, status)

    def complete() -> None:
        regs.r10 = request.ret
        if leaf == VmcallLeaf.GET_TDVMCALL_INFO:
            regs.r11, regs.r12, regs.r13, regs.r14 = request.data[1:]

    return vcpu.vcpu.exit_to_user(KvmExit.TDX, complete)


def _fatal(vcpu: "TdxVcpu", regs: Registers) -> bool:
    event = vcpu.vcpu.kvm_run.system_event
    event.type, event.ndata = SYSTEM_EVENT_TDX_FATAL, 16
    low = (regs.rax, regs.rcx, regs.rdx, regs.rbx, 0, 0, regs.rsi, regs.rdi)
    event.data = (
        *low, regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    )  # fmt: skip
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
