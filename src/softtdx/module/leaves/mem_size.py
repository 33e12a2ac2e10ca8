"""TDH.MEM.PAGE.PROMOTE and DEMOTE: 512 mappings become one of the next size, or one becomes 512."""

from typing import Final, NamedTuple

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import HP, HPA_MASK, STATE_MASK, TDEL, A, D
from softtdx.abi.status import Operand, Status

from .. import pamt_size, sept, sept_l2, tdcs
from ..context import Call
from ..errors import LeafError, operand_invalid
from ..locks import EXCLUSIVE, SHARED
from ..pamt import PageType, PamtPage, implicit, lock_implicit, lock_page
from ..registry import ALL_VERSIONS, seamcall
from ..td import Td, open_td

_PROMOTE_STATES: Final = sept.host_states(SeamcallLeaf.MEM_PAGE_PROMOTE)
_DEMOTE_STATES: Final = sept.host_states(SeamcallLeaf.MEM_PAGE_DEMOTE)

NULL_PA: Final = (1 << 64) - 1
NOT_USED: Final = 1 << 63  # in R9 to R11 of DEMOTE: handed back, it was not needed
L2_REGISTERS: Final = ("r8", "r9", "r10", "r11")  # by VM
TDR_FIELD: Final = 0x000F_FFFF_FFFF_F000
L2_ADD_MODE: Final = 1  # DEMOTE, RDX bit 0: add L2 pages only where there is an L2 alias
_NOT_COMPARED: Final = ~(A | D | HP)


@seamcall(SeamcallLeaf.MEM_PAGE_PROMOTE, versions=ALL_VERSIONS)
def mem_page_promote(call: Call) -> None:
    """TDH.MEM.PAGE.PROMOTE: replace an S-EPT page of 512 like, adjacent mappings by one mapping of the next size.

    In: RCX = GPA | level (1, 2) of the entry above the page, RDX = TDR.
    Out: RCX = the S-EPT page that became free, or RCX, RDX = the entry met, on EPT errors. Version 1: R9 to R11 = the
    pages of the L2 VMs or -1. With dynamic PAMT and level 1: R12 and R13 = the pair of PAMT pages that became free.

    Errors in order: OPERAND_INVALID RAX; those of `open_td`; those of `sept.open_entry` (tree locked exclusively);
    EPT_ENTRY_STATE_INCORRECT, OPERAND_BUSY, GPA_RANGE_NOT_BLOCKED, TLB_TRACKING_NOT_DONE,
    EPT_INVALID_PROMOTE_CONDITIONS RCX; INTERRUPTED_RESTARTABLE; OPERAND_BUSY RCX (PAMT entry).
    """
    regs = call.regs
    info, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    if call.version:
        regs.r9 = regs.r10 = regs.r11 = NULL_PA
        if call.version > 1:
            raise operand_invalid(Operand.RAX)
    td = open_td(call, tdr, SeamcallLeaf.MEM_PAGE_PROMOTE, Operand.RDX)
    at, entry = sept.open_entry(call, td, info, 1, 2, EXCLUSIVE)
    level = info & 7
    cpu = call.cpu
    g = call.g
    try:
        if entry & STATE_MASK not in _PROMOTE_STATES:
            raise _refuse(call, Status.EPT_ENTRY_STATE_INCORRECT, entry, level)
        table_pa = entry & HPA_MASK & g.pa_mask
        table = lock_implicit(call, table_pa, EXCLUSIVE, Operand.RCX)
        sept.require_tracked(td, entry, level, table)
        entries = sept.read_page(cpu, td.keyed(table_pa))
        if not _can_merge(entries, level, g.hkid_mask):
            raise _refuse(call, Status.EPT_INVALID_PROMOTE_CONDITIONS, entry, level)
        l2 = _l2_tables_to_merge(call, td, entry, info, tdr)
        _let_interrupts_through(call, td, info, tdr)
        freed = pamt_size.promote(call, sept.leaf_hpa(entries[0], 0, level - 1) & g.pa_mask, level)
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    sept.store(cpu, at, entry, entries[0] & ~TDEL)
    td.add_children(-1 - len(l2))
    for vm, l2_at, l2_entry, l2_table in l2:
        cpu.wr64(l2_at, l2_entry)
        l2_freed = l2_table.pa | l2_table.set_type(PageType.NDA)
        if call.version:
            setattr(regs, L2_REGISTERS[vm], l2_freed)
    regs.rcx = table_pa | table.set_type(PageType.NDA)
    if freed:
        regs.r12, regs.r13 = freed


def _l2_tables_to_merge(call: Call, td: Td, entry: int, info: int, tdr: int) -> list[tuple[int, int, int, PamtPage]]:
    """For each L2 VM with a table there: (VM, address of its entry, the entry that maps all, locked table)."""
    level = info & 7
    merged = []
    for vm, at, table in sept_l2.lock_tables(call, td, entry, info, level):
        _let_interrupts_through(call, td, info, tdr)
        l2_entries = sept_l2.can_merge(call.cpu, td.keyed(table.pa), level, call.g.hkid_mask)
        if l2_entries is None:
            raise _refuse(call, Status.EPT_INVALID_PROMOTE_CONDITIONS, entry, level)
        merged.append((vm, at, l2_entries[0], table))
    return merged


def _can_merge(entries: tuple[int, ...], level: int, keyid_mask: int) -> bool:
    """Whether 512 entries say the same of adjacent pages that together are aligned to the size of `level`."""
    size = 1 << (12 + 9 * (level - 1))
    first = sept.without_accept_count(entries[0] & ~keyid_mask, level - 1)
    if sept.leaf_hpa(first, 0, level - 1) & ((size << 9) - 1) or first & STATE_MASK not in sept.MAPPED_OR_PENDING:
        return False
    return all(
        not (sept.without_accept_count(entry & ~keyid_mask, level - 1) ^ (first + size * number)) & _NOT_COMPARED
        for number, entry in enumerate(entries)
    )


@seamcall(SeamcallLeaf.MEM_PAGE_DEMOTE)
def mem_page_demote(call: Call) -> None:
    """TDH.MEM.PAGE.DEMOTE: split a mapping into 512 of the next smaller size, in a new S-EPT page.

    In: RCX = GPA | level (1, 2), RDX = TDR | L2 add mode (bit 0), R8 = the new S-EPT page, R9 to R11 = pages for L2
    VMs 1 to 3 or -1; with dynamic PAMT and level 1, R12 and R13 = the pair of PAMT pages.
    Out: RCX, RDX = the entry met, on EPT errors; R9 to R11 = the L2 pages, bit 63 set for one that was not used.

    Errors in order: OPERAND_INVALID RDX; those of `open_td`; those of `sept.open_entry`; EPT_ENTRY_STATE_INCORRECT,
    GPA_RANGE_NOT_BLOCKED, TLB_TRACKING_NOT_DONE RCX; those of `lock_page` R8; for each L2 VM
    L2_SEPT_PAGE_NOT_PROVIDED, those of `lock_page` R9 to R11, then INTERRUPTED_RESTARTABLE or INTERRUPTED_BUSY,
    L2_SEPT_WALK_FAILED; those of `pamt_size.demote`.
    """
    regs = call.regs
    info, handle, table_pa = regs.rcx, regs.rdx, regs.r8
    l2_pages = [0, regs.r9, regs.r10, regs.r11]
    regs.rcx = regs.rdx = 0
    if handle & ~(TDR_FIELD | L2_ADD_MODE):
        raise operand_invalid(Operand.RDX)
    td = open_td(call, handle & TDR_FIELD, SeamcallLeaf.MEM_PAGE_DEMOTE, Operand.RDX)
    at, entry = sept.open_entry(call, td, info, 1, 2, SHARED)
    level = info & 7
    cpu = call.cpu
    g = call.g
    try:
        if entry & STATE_MASK not in _DEMOTE_STATES:
            raise _refuse(call, Status.EPT_ENTRY_STATE_INCORRECT, entry, level)
        whole = sept.without_accept_count(entry, level)
        large_pa = sept.leaf_hpa(whole, 0, level) & g.pa_mask
        sept.require_tracked(td, entry, level, implicit(call, large_pa, level))
        table = lock_page(call, table_pa, PageType.NDA, EXCLUSIVE, Operand.R8)
        l2_tables = _lock_l2_pages(call, td, whole, l2_pages, sparse=bool(handle & L2_ADD_MODE))
        # The new pages are written before the last check: should that fail, nobody refers to them.
        small = sept.unblocked(whole) & ~TDEL
        sept.write_split(cpu, td.keyed(table_pa), small, level)
        l2 = _split_l2(call, td, l2_tables, info, handle, small, was_blocked=whole & STATE_MASK in sept.ANY_BLOCKED)
        _let_interrupts_through(call, td, info, handle)
        pamt_size.demote(call, large_pa, level, (regs.r12, regs.r13))
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    flags = sum(sept_l2.alias_flag(table.vm) for table in l2)
    for l2_table in l2:
        cpu.wr64(l2_table.at, sept_l2.make_non_leaf(td.keyed(l2_table.page.pa)))
        l2_table.page.set(PageType.EPT, td.pa)
    sept.store(cpu, at, entry, sept.make_non_leaf(td.keyed(table_pa)) | flags)
    table.set(PageType.EPT, td.pa)
    td.add_children(1 + len(l2))
    regs.r9, regs.r10, regs.r11 = l2_pages[1:]


class _L2Table(NamedTuple):
    """A new L2 S-EPT page, and the address of the entry that will point to it."""

    vm: int
    page: PamtPage
    at: int


def _lock_l2_pages(call: Call, td: Td, whole: int, pages: list[int], *, sparse: bool) -> list[tuple[int, PamtPage]]:
    """The pages for L2 VMs that are needed: (VM, locked page). `sparse`: only where there is an alias.

    Updates `pages` to what R9 to R11 return. LeafError L2_SEPT_PAGE_NOT_PROVIDED, those of `lock_page`.
    """
    locked = []
    aliases = sept_l2.aliases(whole)
    for vm in range(1, td.rd16(tdcs.NUM_L2_VMS) + 1):
        operand = Operand(Operand.R8 + vm)
        if pages[vm] == NULL_PA:
            if vm in aliases:
                raise LeafError(Status.L2_SEPT_PAGE_NOT_PROVIDED, operand)
        elif not sparse or vm in aliases:
            locked.append((vm, lock_page(call, pages[vm] & ~NOT_USED, PageType.NDA, EXCLUSIVE, operand)))
        else:
            pages[vm] |= NOT_USED
    return locked


def _split_l2(
    call: Call, td: Td, pages: list[tuple[int, PamtPage]], info: int, handle: int, small: int, *, was_blocked: bool
) -> list[_L2Table]:
    """Fill the new L2 S-EPT pages: with what the L2 mapping becomes, or with free entries where there is none.

    LeafError INTERRUPTED_RESTARTABLE, L2_SEPT_WALK_FAILED.
    """
    level = info & 7
    aliases = sept_l2.aliases(small)
    tables = []
    for vm, page in pages:
        _let_interrupts_through(call, td, info, handle)
        at, entry, reached = sept_l2.walk(td, vm, info, level)
        if reached != level:
            raise sept_l2.refuse(call, td, Status.L2_SEPT_WALK_FAILED, entry, reached, vm)
        if vm in aliases:
            if was_blocked and small & STATE_MASK not in sept.ANY_PENDING:
                entry = sept_l2.unblock(entry)
            sept.write_split(call.cpu, td.keyed(page.pa), entry, level)
        else:
            call.cpu.zero_page(td.keyed(page.pa))
        tables.append(_L2Table(vm, page, at))
    return tables


def _let_interrupts_through(call: Call, td: Td, rcx: int, rdx: int) -> None:
    """INTERRUPTED_RESTARTABLE or INTERRUPTED_BUSY when somebody waits: the host starts over with the same operands."""
    if call.cpu.interrupt_pending():
        status = Status.INTERRUPTED_RESTARTABLE
    elif sept.somebody_waits(call, td):
        status = Status.INTERRUPTED_BUSY
    else:
        return
    call.regs.rcx, call.regs.rdx = rcx, rdx
    raise LeafError(status)


def _refuse(call: Call, status: Status, entry: int, level: int) -> LeafError:
    sept.set_details(call.regs, entry, level, call.g.hkid_mask)
    return LeafError(status, Operand.RCX)
