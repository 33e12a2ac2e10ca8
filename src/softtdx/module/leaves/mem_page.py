"""TDH.MEM.PAGE.ADD, AUG, REMOVE and RELOCATE: pages of TD memory come, go and move."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import HPA_MASK, LEAF, STATE_MASK, TDAL_MASK, TDEL
from softtdx.abi.status import Operand, Status

from .. import measure, sept, sept_l2
from ..context import Call
from ..errors import LeafError, operand_invalid
from ..ids import R8, R9, RCX, RDX
from ..locks import EXCLUSIVE, SHARED
from ..pamt import PageType, lock_free_range, lock_implicit, lock_page
from ..registry import seamcall
from ..shared import check_shared
from ..td import NO_LOCK, open_td

_ADD: Final = SeamcallLeaf.MEM_PAGE_ADD
_AUG: Final = SeamcallLeaf.MEM_PAGE_AUG
_REMOVE: Final = SeamcallLeaf.MEM_PAGE_REMOVE
_RELOCATE: Final = SeamcallLeaf.MEM_PAGE_RELOCATE
_ADD_STATES: Final = sept.host_states(_ADD)
_AUG_STATES: Final = sept.host_states(_AUG)
_REMOVE_STATES: Final = sept.host_states(_REMOVE)
_RELOCATE_STATES: Final = sept.host_states(_RELOCATE)

PAGE: Final = 4096
NDA: Final = int(PageType.NDA)
REG: Final = int(PageType.REG)
STATE_INCORRECT: Final = int(Status.EPT_ENTRY_STATE_INCORRECT)


@seamcall(_ADD)
def mem_page_add(call: Call) -> None:
    """TDH.MEM.PAGE.ADD: add a 4 KiB page with content and measure that it was added, before TDH.MR.FINALIZE.

    In: RCX = GPA | level 0, RDX = TDR, R8 = the page, R9 = the source page (shared KeyID allowed).
    Out: RCX, RDX = the entry met, on EPT errors.

    Errors in order: those of `open_td` (TDR locked exclusively); OPERAND_INVALID RCX; EPT_WALK_FAILED,
    EPT_ENTRY_STATE_INCORRECT RCX; OPERAND_INVALID R9; those of `lock_page` R8.
    """
    regs = call.regs
    info, tdr, pa, source = regs.rcx, regs.rdx, regs.r8, regs.r9
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _ADD, RDX, EXCLUSIVE, NO_LOCK)
    if not sept.page_info_valid(info, 0, 0) or info & sept.forbidden_private(td):
        raise operand_invalid(Operand.RCX)
    # The exclusive TDR lock stands for the tree's and the entry's.
    cpu = call.cpu
    at, entry, level = sept.walk(cpu, td.sept_root, sept.top_level(td), info, 0)
    if level or entry & STATE_MASK not in _ADD_STATES:
        sept.set_details(regs, entry, level, call.g.hkid_mask)
        raise LeafError(Status.EPT_WALK_FAILED if level else STATE_INCORRECT, RCX)
    check_shared(call.g, source, PAGE, R9)
    page = lock_page(call, pa, NDA, EXCLUSIVE, R8)

    # Every check has passed.
    target = pa | td.key_bits
    cpu.copy_page(target, source)
    cpu.wr64(at, sept.make_leaf(target, sept.MAPPED))
    measure.page_added(td, info)
    td.add_children(1)
    page.set(REG, td.pa, 0)


@seamcall(_AUG)
def mem_page_aug(call: Call) -> None:
    """TDH.MEM.PAGE.AUG: give a TD a free page or 2 MiB range; it is pending until the TD accepts it.

    In: RCX = GPA | level (0, 1), RDX = TDR, R8 = the page. The content is not touched: TDG.MEM.PAGE.ACCEPT zeroes it.
    Out: RCX, RDX = the entry met, on EPT errors.

    Errors in order: those of `open_td`; those of `sept.open_entry`; EPT_ENTRY_STATE_INCORRECT RCX; those of
    `lock_free_range` R8.
    """
    regs = call.regs
    info, tdr, pa = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _AUG, RDX)
    at, entry = sept.open_entry(call, td, info, 0, 1, SHARED)
    level = info & 7
    cpu = call.cpu
    try:
        if entry & STATE_MASK not in _AUG_STATES:
            sept.set_details(regs, entry, level, call.g.hkid_mask)
            raise LeafError(STATE_INCORRECT, RCX)
        page = lock_free_range(call, pa, R8, level)
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    sept.store(cpu, at, entry, sept.make_leaf(pa | td.key_bits, sept.PENDING, 0))
    td.add_children(512 if level else 1)
    page.set(REG, td.pa, 0)


@seamcall(_REMOVE)
def mem_page_remove(call: Call) -> None:
    """TDH.MEM.PAGE.REMOVE: take a page away from a TD; the page is free afterwards, its content undefined to all.

    In: RCX = GPA | level (0 to 2), RDX = TDR. Out: RCX = the page, or RCX, RDX = the entry met, on EPT errors.

    Errors in order: those of `open_td`; those of `sept.open_entry`; EPT_ENTRY_STATE_INCORRECT, OPERAND_BUSY,
    GPA_RANGE_NOT_BLOCKED, TLB_TRACKING_NOT_DONE, all RCX.
    """
    regs = call.regs
    info, tdr = regs.rcx, regs.rdx
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _REMOVE, RDX)
    at, entry = sept.open_entry(call, td, info, 0, 2, SHARED)
    level = info & 7
    cpu = call.cpu
    g = call.g
    try:
        if not entry & LEAF or entry & STATE_MASK not in _REMOVE_STATES:
            sept.set_details(regs, entry, level, g.hkid_mask)
            raise LeafError(STATE_INCORRECT, RCX)
        pa = sept.leaf_hpa(sept.without_accept_count(entry, level), 0, level) & g.pa_mask
        page = lock_implicit(call, pa, EXCLUSIVE, RCX, level)
        sept.require_tracked(td, entry, level, page)
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    if entry & TDAL_MASK:
        sept_l2.free_all(td, entry, info, level)
    sept.store(cpu, at, entry, sept.vacated(td))
    td.add_children(-(1 << 9 * level))
    regs.rcx = pa | page.set_type(NDA)


@seamcall(_RELOCATE)
def mem_page_relocate(call: Call) -> None:
    """TDH.MEM.PAGE.RELOCATE: move a blocked 4 KiB page of a TD to another physical page, and unblock it.

    In: RCX = GPA | level 0, RDX = TDR, R8 = the new page. Out: RCX = the old page, which is free; or RCX, RDX = the
    entry met, on EPT errors.

    Errors in order: those of `open_td`; those of `sept.open_entry`; EPT_ENTRY_STATE_INCORRECT RCX; OPERAND_INVALID R8
    (it is the old page); OPERAND_BUSY, GPA_RANGE_NOT_BLOCKED, TLB_TRACKING_NOT_DONE RCX; those of `lock_page` R8.
    """
    regs = call.regs
    info, tdr, new_pa = regs.rcx, regs.rdx, regs.r8
    regs.rcx = regs.rdx = 0
    td = open_td(call, tdr, _RELOCATE, RDX)
    at, entry = sept.open_entry(call, td, info, 0, 0, SHARED)
    cpu = call.cpu
    g = call.g
    try:
        if not entry & LEAF or entry & STATE_MASK not in _RELOCATE_STATES:
            sept.set_details(regs, entry, 0, g.hkid_mask)
            raise LeafError(STATE_INCORRECT, RCX)
        old_pa = entry & HPA_MASK & g.pa_mask
        if old_pa == new_pa:
            raise operand_invalid(Operand.R8)
        old = lock_implicit(call, old_pa, EXCLUSIVE, RCX)
        sept.require_tracked(td, entry, 0, old)
        new = lock_page(call, new_pa, NDA, EXCLUSIVE, R8)
    except LeafError:
        sept.unlock(cpu, at, entry)
        raise

    # Every check has passed.
    target = new_pa | td.key_bits
    if entry & STATE_MASK not in sept.ANY_PENDING:
        cpu.copy_page(target, old_pa | td.key_bits)
    new.set(REG, td.pa, 0)
    if entry & TDAL_MASK:
        sept_l2.move_all(td, entry, info, target)
    sept.store(cpu, at, entry, sept.unblocked(entry & ~HPA_MASK | target) & ~TDEL)
    regs.rcx = old_pa | old.set_type(NDA)
