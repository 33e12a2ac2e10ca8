"""TDG.MEM.PAGE.*: a TD accepts pages, and reads and writes their attributes."""

from typing import Final, NoReturn

from softtdx.abi.exits import (
    EPT_EXECUTABLE,
    EPT_READABLE,
    EPT_USER_EXECUTABLE,
    EPT_WRITABLE,
    EPT_WRITE,
    ExtendedQualification,
)
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.sept import ACCEPT_COUNTER_MASK, HPA_MASK, LEAF, STATE_MASK, TDAL_MASK, TDEL, XU, R, W, X
from softtdx.abi.status import Operand, Status

from .. import sept, sept_l2, tdcs
from ..errors import LeafError, operand_invalid
from ..registry import tdcall
from ..td import Td
from ..transitions.guest import Guest, Resume, TdExit

_ACCEPT_STATES: Final = sept.guest_states(TdcallLeaf.MEM_PAGE_ACCEPT)
_ATTR_RD_STATES: Final = sept.guest_states(TdcallLeaf.MEM_PAGE_ATTR_RD)
_ATTR_WR_STATES: Final = sept.guest_states(TdcallLeaf.MEM_PAGE_ATTR_WR)

PAGES_IN_2M: Final = 512
PAGE: Final = 4096
BURST: Final = 32  # pages zeroed between two looks for an interrupt
PENDING_FLAG: Final = 1 << 62  # in the page information that ATTR.RD and WR return
_VMS: Final = 4
DO_INVEPT: Final = 1 << 15  # in R8 of ATTR.WR, for each VM
EPT_VIOLATION_ON_L2_SEPT_WALK_FAILURE: Final = 1 << 0  # VM_CTLS


@tdcall(TdcallLeaf.MEM_PAGE_ACCEPT)
def mem_page_accept(guest: Guest) -> None:
    """TDG.MEM.PAGE.ACCEPT: take a pending page into use, zeroed.

    In: RCX = GPA | level (0, 1).

    Errors in order: OPERAND_INVALID RCX; PAGE_ALREADY_ACCEPTED with the level found; OPERAND_BUSY RCX;
    PAGE_SIZE_MISMATCH with the level. A page that is not there, blocked, or pending at a larger size is an EPT
    violation for the host, with what was asked for and what was met in the extended exit qualification. An interrupt
    ends the zeroing of a 2 MiB page; the instruction goes on when the guest executes it again.
    """
    info = guest.regs.rcx
    td = guest.td
    cpu = guest.cpu
    level = info & 7
    if not sept.page_info_valid(info, 0, 1) or (info & ~7) & sept.forbidden_private(td):
        raise operand_invalid(Operand.RCX)
    at, entry, reached = sept.walk(cpu, td.sept_root, sept.top_level(td), info, level)
    if reached != level:
        if entry & STATE_MASK in sept.GUEST_ACCESSIBLE:
            raise LeafError(Status.PAGE_ALREADY_ACCEPTED, reached)
        _leave(guest, info, entry, reached, ExtendedQualification.ACCEPT)
    entry = _lock(guest, at, entry)
    state = entry & STATE_MASK
    if state not in _ACCEPT_STATES:
        sept.unlock(cpu, at, entry)
        if not entry & LEAF and state != sept.FREE:
            raise LeafError(Status.PAGE_SIZE_MISMATCH, level)
        if state in sept.GUEST_ACCESSIBLE:
            raise LeafError(Status.PAGE_ALREADY_ACCEPTED, level)
        _leave(guest, info, entry, level, ExtendedQualification.ACCEPT)

    # The page stays the TD's at least until this vCPU leaves: TLB tracking sees to that.
    if level:
        zeroed = _zero_2m(guest, entry)
        if zeroed < PAGES_IN_2M:
            sept.store(cpu, at, entry, (entry & ~ACCEPT_COUNTER_MASK | zeroed * PAGE) & ~TDEL)
            raise Resume
        accepted = entry & ~ACCEPT_COUNTER_MASK
    else:
        cpu.zero_page(entry & HPA_MASK)
        accepted = entry
    if entry & TDAL_MASK:
        sept_l2.unblock_all(td, entry, info, level)
    accepted = sept.with_state(accepted, sept.MAPPED if state == sept.PENDING else sept.EXPORTED_DIRTY) | sept.ACCESS
    sept.store(cpu, at, entry, accepted & ~TDEL)


def _zero_2m(guest: Guest, entry: int) -> int:
    """Zero a pending 2 MiB page from where the last attempt stopped; returns how many 4 KiB parts are done."""
    cpu = guest.cpu
    base = entry & HPA_MASK & ~ACCEPT_COUNTER_MASK
    done = (entry & ACCEPT_COUNTER_MASK) // PAGE
    burst = 1  # an interrupt that waits already is let through after one part
    while True:
        count = min(burst, PAGES_IN_2M - done)
        cpu.zero_page(base + done * PAGE, count)
        done += count
        if done == PAGES_IN_2M or cpu.interrupt_pending():
            return done
        burst = BURST


def _lock(guest: Guest, at: int, entry: int) -> int:
    locked = sept.lock_guest(guest.cpu, at, entry)
    if locked == sept.BUSY:
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)
    if locked == sept.BUSY_HOST_PRIORITY:
        raise LeafError(Status.OPERAND_BUSY_HOST_PRIORITY, Operand.RCX)
    return locked


def _leave(guest: Guest, info: int, entry: int, level: int, kind: ExtendedQualification) -> NoReturn:
    """EPT violation: a write, the rights of the entry met; levels, its state and whether it is a leaf in 63:32."""
    met = info & 7 | level << 3 | sept.public_state(entry) << 6 | (1 << 14 if entry & LEAF else 0)
    guest.exit_ept_violation(info & HPA_MASK, EPT_WRITE | _rights(entry), kind | (met & 0xFFFF_FFFF) << 32)


def _rights(entry: int) -> int:
    """What an entry allows, in the bits of an exit qualification."""
    readable, writable = (EPT_READABLE if entry & R else 0), (EPT_WRITABLE if entry & W else 0)
    return readable | writable | (EPT_EXECUTABLE if entry & X else 0)


@tdcall(TdcallLeaf.MEM_PAGE_ATTR_RD)
def mem_page_attr_rd(guest: Guest) -> None:
    """TDG.MEM.PAGE.ATTR.RD: how a GPA is mapped, and with which rights for L2 VMs.

    In: RCX = GPA. Out: RCX = its page | level | pending (bit 62), RDX = attributes, 16 bits for each VM.

    Errors in order: OPERAND_INVALID RCX; OPERAND_BUSY RCX. A GPA without a page that the TD could use is an EPT
    violation for the host.
    """
    regs = guest.regs
    gpa = regs.rcx
    td = guest.td
    cpu = guest.cpu
    try:
        if gpa & sept.forbidden_private(td):
            raise operand_invalid(Operand.RCX)
        at, entry, level = sept.walk(cpu, td.sept_root, sept.top_level(td), gpa, 0)
        entry = _lock(guest, at, entry)
    except LeafError:
        regs.rcx = regs.rdx = 0
        raise
    state = entry & STATE_MASK
    if state not in _ATTR_RD_STATES:
        sept.unlock(cpu, at, entry)
        guest.exit_ept_violation(gpa, 0)
    attributes = 0
    for vm in sept_l2.aliases(entry):
        attributes |= _attributes(entry, sept_l2.find(td, vm, gpa, level, guest=True)[1]) << 16 * vm
    sept.unlock(cpu, at, entry)
    regs.rcx = gpa & -(1 << (12 + 9 * level)) | level | (PENDING_FLAG if state in sept.ANY_PENDING else 0)
    regs.rdx = attributes


def _attributes(entry: int, l2_entry: int) -> int:
    """The attributes that an L2 entry stands for, under this L1 entry."""
    state = entry & STATE_MASK
    return sept_l2.attributes_of(l2_entry, blockedw=state in sept.ANY_BLOCKEDW, pending=state in sept.ANY_PENDING)


@tdcall(TdcallLeaf.MEM_PAGE_ATTR_WR)
def mem_page_attr_wr(guest: Guest) -> None:
    """TDG.MEM.PAGE.ATTR.WR: change the rights of L2 VMs to a page, which makes and ends their aliases of it.

    In: RCX = GPA | level (0 to 2), RDX = attributes, R8 = their mask and INVEPT flags, 16 bits for each VM; those of
    the L1 VM and of L2 VMs that the TD does not have must be 0. Out: RCX = page information, RDX = the attributes.

    Errors in order: OPERAND_INVALID RDX, R8 (VM by VM), RCX; OPERAND_BUSY RCX; PAGE_SIZE_MISMATCH with the level;
    L2_SEPT_WALK_FAILED (VM, level), PAGE_ATTR_INVALID with the present attributes in RDX. A page that is not there,
    or of a larger size, is an EPT violation for the host; so is a missing L2 S-EPT page if the TD chose that.
    """
    regs = guest.regs
    info = regs.rcx
    try:
        entry, attributes = _attr_wr(guest, info, regs.rdx, regs.r8)
    except LeafError as stop:
        regs.rcx = 0
        if stop.rax != Status.PAGE_ATTR_INVALID:
            regs.rdx = 0
        raise
    regs.rcx = info | (PENDING_FLAG if entry & STATE_MASK in sept.ANY_PENDING else 0)
    regs.rdx = attributes


def _attr_wr(guest: Guest, info: int, attributes: int, flags: int) -> tuple[int, int]:
    """The leaf proper; returns the L1 entry and what RDX tells of the attributes."""
    td = guest.td
    cpu = guest.cpu
    vms = cpu.rd16(td.p0 + tdcs.NUM_L2_VMS)
    _check_attributes(attributes, flags, vms)
    if not sept.page_info_valid(info, 0, 2) or (info & ~7) & sept.forbidden_private(td):
        raise operand_invalid(Operand.RCX)
    level = info & 7
    at, entry, reached = sept.walk(cpu, td.sept_root, sept.top_level(td), info, level)
    if reached != level:
        _leave(guest, info, entry, reached, ExtendedQualification.ATTR_WR)
    entry = _lock(guest, at, entry)
    state = entry & STATE_MASK
    try:
        if not entry & LEAF and state != sept.FREE:
            raise LeafError(Status.PAGE_SIZE_MISMATCH, level)
        if state not in _ATTR_WR_STATES:
            _leave(guest, info, entry, level, ExtendedQualification.ATTR_WR)
        changes = _plan(guest, info, entry, attributes, flags, vms)
    except (LeafError, TdExit):
        sept.unlock(cpu, at, entry)
        raise
    pending = state in sept.ANY_PENDING
    new, shown = entry, 0
    for vm, asked in enumerate(changes):
        if asked is None:
            shown |= (attributes >> 16 * vm & 0xFFFF) << 16 * vm
            continue
        l2_at, l2_entry, wanted = asked
        if not wanted & sept_l2.ATTR_PRESENT:
            cpu.wr64(l2_at, sept_l2.FREE)
            new &= ~sept_l2.alias_flag(vm)
            wanted = sept_l2.ATTR_VALID
        elif entry & sept_l2.alias_flag(vm):
            cpu.wr64(l2_at, sept_l2.with_attributes(l2_entry, wanted))
        else:
            cpu.wr64(l2_at, sept_l2.make_leaf(entry & HPA_MASK, wanted, blocked=pending))
            new |= sept_l2.alias_flag(vm)
        shown |= wanted << 16 * vm
    for vm in range(1, vms + 1):
        if flags >> 16 * vm & DO_INVEPT:
            cpu.invept(1, _l2_eptp(td, vm, guest.g.pa_mask))
    sept.store(cpu, at, entry, new & ~TDEL)
    return entry, shown


def _l2_eptp(td: Td, vm: int, pa_mask: int) -> int:
    root = td.pages[(tdcs.L2_SEPT_ROOT_1 >> 12) + vm - 1]
    return root & pa_mask | td.rd64(tdcs.EPTP) & (PAGE - 1)


Change = tuple[int, int, int]  # address of the L2 entry, the entry, the attributes it gets


def _plan(guest: Guest, info: int, entry: int, attributes: int, flags: int, vms: int) -> list[Change | None]:
    """What is to be done for each VM, None for nothing; all of it checked.

    LeafError L2_SEPT_WALK_FAILED, PAGE_ATTR_INVALID (then RDX holds the present attributes); TdExit.
    """
    td = guest.td
    level = info & 7
    changes: list[Change | None] = [None] * _VMS
    shown = attributes
    legal = True
    for vm in range(1, vms + 1):
        mask = flags >> 16 * vm & 0xFFFF | sept_l2.ATTR_VALID
        asked = attributes >> 16 * vm & mask
        if not asked & sept_l2.ATTR_VALID:
            continue
        if entry & sept_l2.alias_flag(vm):
            at, l2_entry = sept_l2.find(td, vm, info, level, guest=True)
            present = _attributes(entry, l2_entry)
            wanted = present & ~mask | asked
            if wanted & sept_l2.ATTR_PRESENT and not sept_l2.attributes_legal(wanted):
                legal = False
                wanted = present
        elif not asked & sept_l2.ATTR_PRESENT:
            continue
        elif not sept_l2.attributes_legal(asked):
            legal = False
            at = l2_entry = wanted = 0
        else:
            at, l2_entry, reached = sept_l2.walk(td, vm, info, level, guest=True)
            if reached != level:
                _no_l2_table(guest, info, l2_entry, reached, vm)
            wanted = asked
        changes[vm] = at, l2_entry, wanted
        shown = shown & ~(0xFFFF << 16 * vm) | wanted << 16 * vm
    if not legal:
        guest.regs.rdx = shown
        raise LeafError(Status.PAGE_ATTR_INVALID)
    return changes


def _no_l2_table(guest: Guest, info: int, l2_entry: int, level: int, vm: int) -> NoReturn:
    """The L2 tree has no page there: told to the TD, or, if VM_CTLS says so, to the host as an EPT violation."""
    if not guest.td.rd64(tdcs.VM_CTLS + 8 * vm) & EPT_VIOLATION_ON_L2_SEPT_WALK_FAILURE:
        raise LeafError(Status.L2_SEPT_WALK_FAILED, vm << 16 | level)
    qualification = EPT_WRITE | _rights(l2_entry) | (EPT_USER_EXECUTABLE if l2_entry & XU else 0)
    met = (level << 3 | vm << 20) << 32
    guest.exit_ept_violation(info & HPA_MASK, qualification, ExtendedQualification.GPA_DETAILS | met)


def _check_attributes(attributes: int, flags: int, l2_vms: int) -> None:
    for vm in range(_VMS):
        wanted = attributes >> 16 * vm & 0xFFFF
        if vm and vm <= l2_vms:
            if wanted and not wanted & sept_l2.ATTR_VALID:
                raise operand_invalid(Operand.RDX)
            continue
        if wanted:
            raise operand_invalid(Operand.RDX)
        if flags >> 16 * vm & 0xFFFF:
            raise operand_invalid(Operand.R8)
