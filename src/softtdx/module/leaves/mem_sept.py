"""TDH.MEM.SEPT.*: the pages that the secure EPT itself is made of."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import FREE_ENTRY, HPA_MASK, L2_STATE_MASK, STATE_MASK, TDEL
from softtdx.abi.status import Operand, Status

from .. import sept, sept_l2, tdcs
from ..context import Call
from ..errors import LeafError, operand_invalid
from ..ids import R8, RCX, RDX
from ..locks import EXCLUSIVE, SHARED
from ..pamt import PageType, PamtPage, lock_implicit, lock_page
from ..registry import ALL_VERSIONS, seamcall
from ..td import Td, open_td

NULL_PA: Final = (1 << 64) - 1
NOT_USED: Final = 1 << 63  # in a page operand of SEPT.ADD version 1: handed back, the page is already there
ALLOW_EXISTING: Final = 1
NDA: Final = int(PageType.NDA)
EPT: Final = int(PageType.EPT)
L2_REGISTERS: Final = ("r8", "r9", "r10", "r11")  # by VM
DEBUG: Final = 1  # ATTRIBUTES.DEBUG
TDR_FIELD: Final = 0x000F_FFFF_FFFF_F000

_ADD: Final = SeamcallLeaf.MEM_SEPT_ADD
_RD: Final = SeamcallLeaf.MEM_SEPT_RD
_REMOVE: Final = SeamcallLeaf.MEM_SEPT_REMOVE
_ADD_STATES: Final = sept.host_states(_ADD)
_REMOVE_STATES: Final = sept.host_states(_REMOVE)


@seamcall(_ADD, versions=ALL_VERSIONS)
def mem_sept_add(call: Call) -> None:
    """TDH.MEM.SEPT.ADD: put a free page under an entry of the secure EPT.

    In: RCX = GPA | level of the entry (1 up to the root's), RDX = TDR | allow-existing flag (bit 0), R8 = the page.
    Version 1: R8 may be -1, R9 to R11 = pages for L2 VMs 1 to 3 or -1.
    Out: RCX, RDX = the entry met, on EPT errors. Version 1: R8 to R11 = -1 for a page that was used, bit 63 set for
    one that was not needed.

    Errors in order: OPERAND_INVALID RAX, RDX; those of `open_td`; those of `sept.open_entry`;
    EPT_ENTRY_STATE_INCORRECT RCX; OPERAND_INVALID R8 (no page); those of `lock_page` R8; for each L2 VM
    OPERAND_INVALID, L2_SEPT_WALK_FAILED, L2_SEPT_ENTRY_NOT_FREE; INTERRUPTED_RESUMABLE.
    """
    regs = call.regs
    info, handle = regs.rcx, regs.rdx
    version = call.version
    pages = [regs.r8, regs.r9, regs.r10, regs.r11] if version else [regs.r8]
    regs.rcx = regs.rdx = 0
    if version > 1:
        raise operand_invalid(Operand.RAX)
    pages = [page if page == NULL_PA else page & ~NOT_USED for page in pages]
    try:
        _sept_add(call, info, handle, pages)
    except LeafError as stop:
        if stop.rax in (Status.INTERRUPTED_RESUMABLE, Status.INTERRUPTED_BUSY):
            regs.rcx, regs.rdx = info, handle
        raise
    finally:
        if version:
            regs.r8, regs.r9, regs.r10, regs.r11 = pages


def _sept_add(call: Call, info: int, handle: int, pages: list[int]) -> None:
    """The leaf proper; `pages` is updated to what version 1 returns."""
    if handle & ~(TDR_FIELD | ALLOW_EXISTING):
        raise operand_invalid(Operand.RDX)
    allow_existing = handle & ALLOW_EXISTING
    td = open_td(call, handle & TDR_FIELD, _ADD, RDX)
    at, entry = sept.open_entry(call, td, info, 1, sept.TREE, SHARED)
    cpu = call.cpu
    try:
        state = entry & STATE_MASK
        if state not in _ADD_STATES:
            raise _state_incorrect(call, entry, info & 7)
        page = None
        if pages[0] == NULL_PA:
            if not call.version:
                raise operand_invalid(Operand.R8)
            if state != sept.NL_MAPPED:
                raise _state_incorrect(call, entry, info & 7)
        elif state == sept.FREE:
            page = lock_page(call, pages[0], NDA, EXCLUSIVE, R8)
        elif allow_existing:
            pages[0] |= NOT_USED
        else:
            raise _state_incorrect(call, entry, info & 7)
        l2 = [_prepare_l2(call, td, vm, info, pages, allow_existing) for vm in range(1, len(pages))]
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    new = entry
    if page is not None:
        _take_page(td, page, l2=False)
        new = sept.make_non_leaf(td.keyed(page.pa)) | TDEL
        sept.store(cpu, at, entry, new)
        pages[0] = NULL_PA
    added = page is not None
    for place in l2:
        if place is None:
            continue
        if added:
            stop = _interruption(call, td)
            if stop is not None:
                sept.unlock(cpu, at, new)
                raise stop
        vm, entry_at, l2_page = place
        _take_page(td, l2_page, l2=True)
        sept.store(cpu, at, new, new | sept_l2.alias_flag(vm))
        new |= sept_l2.alias_flag(vm)
        cpu.wr64(entry_at, sept_l2.make_non_leaf(td.keyed(l2_page.pa)))
        pages[vm] = NULL_PA
        added = True
    sept.unlock(cpu, at, new)


def _prepare_l2(
    call: Call, td: Td, vm: int, info: int, pages: list[int], allow_existing: int
) -> tuple[int, int, PamtPage] | None:
    """Check the page for an L2 VM: (VM, address of its entry, locked page), None when there is nothing to add."""
    if pages[vm] == NULL_PA:
        return None
    operand = Operand(Operand.R8 + vm)
    if vm > td.rd16(tdcs.NUM_L2_VMS):
        raise operand_invalid(operand)
    at, entry, reached = sept_l2.walk(td, vm, info, info & 7)
    if reached != info & 7:
        raise sept_l2.refuse(call, td, Status.L2_SEPT_WALK_FAILED, entry, reached, vm)
    if entry & L2_STATE_MASK == sept_l2.FREE:
        return vm, at, lock_page(call, pages[vm], NDA, EXCLUSIVE, operand)
    if not allow_existing:
        raise sept_l2.refuse(call, td, Status.L2_SEPT_ENTRY_NOT_FREE, entry, reached, vm)
    pages[vm] |= NOT_USED
    return None


def _interruption(call: Call, td: Td) -> LeafError | None:
    """Between two pages: whether an interrupt or another processor waits. The host calls again with what is left."""
    if call.cpu.interrupt_pending():
        return LeafError(Status.INTERRUPTED_RESUMABLE)
    return LeafError(Status.INTERRUPTED_BUSY) if sept.somebody_waits(call, td) else None


def _take_page(td: Td, page: PamtPage, *, l2: bool) -> None:
    """A free page becomes an S-EPT page of the TD, all its entries free."""
    if l2:
        td.call.cpu.zero_page(td.keyed(page.pa))
    else:
        sept.write_free_page(td.call.cpu, td.keyed(page.pa))
    page.set(EPT, td.pa, 0)
    td.add_children(1)


def _state_incorrect(call: Call, entry: int, level: int) -> LeafError:
    sept.set_details(call.regs, entry, level, call.g.hkid_mask)
    return LeafError(Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)


@seamcall(_RD)
def mem_sept_rd(call: Call) -> None:
    """TDH.MEM.SEPT.RD: read an entry of the secure EPT, as software may know it.

    In: RCX = GPA | level (0 up to the root's), RDX = TDR | L2 attributes wanted (bit 0, debug TDs only).
    Out: RCX = the entry without its KeyID, RDX = level and state; R8 = the attributes of the L2 VMs, if wanted.

    Errors in order: those of `open_td`; OPERAND_INVALID RDX; those of `sept.open_entry`.
    """
    regs = call.regs
    info, handle = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = open_td(call, handle & ~1, _RD, RDX)
    if handle & 1 and not td.rd64(tdcs.ATTRIBUTES) & DEBUG:
        raise operand_invalid(Operand.RDX)
    at, entry = sept.open_entry(call, td, info, 0, sept.TREE, SHARED)
    sept.unlock(call.cpu, at, entry)
    if handle & 1:
        regs.r8 = _l2_attributes(td, entry, info)
    sept.set_details(regs, entry, info & 7, call.g.hkid_mask)


def _l2_attributes(td: Td, entry: int, info: int) -> int:
    state = entry & STATE_MASK
    if state == sept.FREE:
        return 0
    attributes = 0
    for vm in sept_l2.aliases(entry):
        _, l2_entry = sept_l2.find(td, vm, info, info & 7)
        blockedw, pending = state in sept.ANY_BLOCKEDW, state in sept.ANY_PENDING
        attributes |= sept_l2.attributes_of(l2_entry, blockedw=blockedw, pending=pending) << 16 * vm
    return attributes


@seamcall(_REMOVE, versions=ALL_VERSIONS)
def mem_sept_remove(call: Call) -> None:
    """TDH.MEM.SEPT.REMOVE: take an empty S-EPT page out of the tree.

    In: RCX = GPA | level of the entry above the page (1 up to the root's), RDX = TDR.
    Out: RCX = the page, or RCX, RDX = the entry met, on EPT errors. Version 1: R9 to R11 = the pages of the L2 VMs
    or -1.

    Errors in order: OPERAND_INVALID RAX; those of `open_td`; those of `sept.open_entry`; EPT_ENTRY_STATE_INCORRECT,
    OPERAND_BUSY, GPA_RANGE_NOT_BLOCKED, TLB_TRACKING_NOT_DONE, EPT_PAGE_NOT_FREE, all RCX.
    """
    regs = call.regs
    info, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    if call.version:
        regs.r9 = regs.r10 = regs.r11 = NULL_PA
        if call.version > 1:
            raise operand_invalid(Operand.RAX)
    td = open_td(call, tdr, _REMOVE, RDX)
    at, entry = sept.open_entry(call, td, info, 1, sept.TREE, EXCLUSIVE)
    cpu = call.cpu
    try:
        if entry & STATE_MASK not in _REMOVE_STATES:
            raise _state_incorrect(call, entry, info & 7)
        pa = entry & HPA_MASK & ~call.g.hkid_mask
        page = lock_implicit(call, pa, EXCLUSIVE, RCX)
        sept.require_tracked(td, entry, info & 7, page)
        if not sept.page_is_free(cpu, td.keyed(pa)):
            sept.set_details(regs, entry, info & 7, call.g.hkid_mask)
            raise LeafError(Status.EPT_PAGE_NOT_FREE, Operand.RCX)
        tables = sept_l2.lock_tables(call, td, entry, info, info & 7)
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise
    for vm, l2_at, table in reversed(tables):
        cpu.wr64(l2_at, sept_l2.FREE)
        freed = table.pa | table.set_type(NDA)
        if call.version:
            setattr(regs, L2_REGISTERS[vm], freed)
    sept.store(cpu, at, entry, FREE_ENTRY)
    td.add_children(-1 - len(tables))
    regs.rcx = pa | page.set_type(NDA)
