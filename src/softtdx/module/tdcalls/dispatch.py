"""The guest dispatcher: a TDCALL exit leads here, and here RAX of the answer is built.

A guest-side leaf is written like a host-side one:

    @tdcall(TdcallLeaf.VP_INFO)
    def vp_info(guest: Guest) -> int | None:
        '''TDG.VP.INFO: ... operands, statuses in the order checked, specification.'''
        regs = guest.regs              # the guest's registers: operands in, results out
        ...

- `guest.td`, `guest.vcpu`: TDCS and TDVPS accessors. `guest.version`: the leaf's version.
- Locks are taken with `guest.call.lock(..., guest=True)` and given back when the leaf is over.
- `raise LeafError(status, operand)` ends it with an error; registers written before stay written.
- `raise TdExit(...)` leaves to the host instead (see `Guest.exit_ept_violation`), `raise Resume` goes back to the
  guest with the TDCALL not executed: after injecting a #VE, or to let an interrupt be served first.
- Memory operands go through `memory.guest_pa`, which does both by itself when the address does not translate.
"""

from typing import Final

from softtdx.abi.leaves import RAX_RESERVED, TdcallLeaf
from softtdx.abi.status import Operand, Status

from .. import tdcs, tdvps
from ..errors import LeafError
from ..registry import guest_leaves
from ..transitions.guest import NO_REASON, Guest, Resume, TdExit, Vmcall
from .vp import vmcall_allowed

__all__ = ["handle_tdcall"]

VP_VMCALL: Final = int(TdcallLeaf.VP_VMCALL)
_INVALID_RAX: Final = int(Status.OPERAND_INVALID) | Operand.RAX
_BUSY: Final = int(Status.OPERAND_BUSY)
_BUSY_HOST_PRIORITY: Final = int(Status.OPERAND_BUSY_HOST_PRIORITY)
_STATUS: Final = 0xFFFF_FFFF_0000_0000
_DETAIL: Final = 0xFFFF_FFFF

# Other leaves with another version than 0 are unknown; these judge their version themselves.
_VERSIONED: Final = frozenset({TdcallLeaf.VM_RD, TdcallLeaf.VP_VEINFO_GET})


def handle_tdcall(guest: Guest) -> None:
    """TDCALL (exit reason 77): #GP(0) outside 64-bit mode, else the leaf in RAX."""
    if not guest.in_64bit_mode():
        guest.inject_gp()
        return
    cpu = guest.cpu
    call = guest.call
    regs = guest.regs
    guest.gprs = values = cpu.gprs()
    rax = values[0]
    if rax == VP_VMCALL and vmcall_allowed(guest, values[1]):  # by far the most frequent
        cpu.publish("tdcall", leaf=VP_VMCALL)
        raise Vmcall
    (
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi,
        regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ) = values  # fmt: skip
    leaf = rax & 0xFFFF
    cpu.publish("tdcall", leaf=leaf)
    mark = len(call.held)
    try:
        status = _call(guest, rax, leaf)
    except (TdExit, Resume) as stop:
        regs.rax = rax
        cpu.set_gprs(regs.values())
        if isinstance(stop, Resume) and not guest.event:
            guest.clear_shadows()
            guest.retired += 2
        raise
    finally:
        if len(call.held) > mark:
            call.release_since(mark)
    vp = guest.vp
    if status & _STATUS == _BUSY_HOST_PRIORITY:
        status = _host_has_priority(guest, _BUSY | status & _DETAIL)
    elif cpu.rd8(vp + tdvps.HP_LOCK_BUSY):
        cpu.wr8(vp + tdvps.HP_LOCK_BUSY, 0)
    regs.rax = status
    cpu.set_gprs(regs.values())


def _call(guest: Guest, rax: int, leaf: int) -> int:
    if rax & RAX_RESERVED:
        return _INVALID_RAX
    guest.version = version = rax >> 16
    if version and leaf not in _VERSIONED:
        return _INVALID_RAX
    handler = guest_leaves.get(leaf)
    if handler is None:
        return _INVALID_RAX
    try:
        return handler(guest) or 0
    except LeafError as stop:
        return stop.rax


def _host_has_priority(guest: Guest, status: int) -> int:
    """A guest kept from a lock by the host's priority sees OPERAND_BUSY; after HP_LOCK_TIMEOUT the host is told."""
    cpu = guest.cpu
    vp = guest.vp
    if not cpu.rd8(vp + tdvps.HP_LOCK_BUSY):
        cpu.wr8(vp + tdvps.HP_LOCK_BUSY, 1)
        cpu.wr64(vp + tdvps.HP_LOCK_BUSY_START, cpu.rdtsc())
    elif cpu.rdtsc() - cpu.rd64(vp + tdvps.HP_LOCK_BUSY_START) >= guest.td.rd64(tdcs.HP_LOCK_TIMEOUT):
        cpu.wr8(vp + tdvps.HP_LOCK_BUSY, 0)
        guest.regs.rax = status
        cpu.set_gprs(guest.regs.values())
        raise TdExit(Status.HOST_PRIORITY_BUSY_TIMEOUT, NO_REASON)
    return status
