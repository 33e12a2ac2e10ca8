"""Physical memory: TDH.PHYMEM.PAGE.RDMD, PAGE.RECLAIM, PAGE.WBINVD, CACHE.WB (dynamic PAMT: phymem_pamt)."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.opstate import LifecycleState
from softtdx.abi.status import Operand, Status

from .. import tdr
from ..context import Call
from ..errors import LeafError
from ..locks import EXCLUSIVE, SHARED
from ..pamt import ALIGNMENT, PageSize, PageType, lock_page_any, walk
from ..platform import IA32_WBNOINVDP
from ..registry import seamcall
from ..state import KOT_LOCK, WBT_LOCK, HkidState, PamtBlock
from ..td import Td, open_td_of

RESUME: Final = 1
WITH_BEPOCH: Final = frozenset({PageType.REG, PageType.EPT})
HPA: Final = (1 << 52) - (1 << 12)
LEVEL: Final = 7
RDMD_ADDRESS: Final = (1 << 40) - (1 << 12)  # bits 51:40 of RDMD's operand are admitted, and lost
NON_LEAF: Final = 1 << 63


def _block(call: Call, pa: int, size: int) -> PamtBlock:
    """The PAMT block of a page operand in RCX. LeafError OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR."""
    if pa & (ALIGNMENT[size] | call.g.not_a_page):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    block = call.g.blocks.get(pa >> 30)
    if block is None:
        raise LeafError(Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX)
    return block


@seamcall(SeamcallLeaf.PHYMEM_PAGE_RDMD)
def phymem_page_rdmd(call: Call) -> None:
    """TDH.PHYMEM.PAGE.RDMD: what the PAMT says of a page.

    In: RCX page (with dynamic PAMT a size in bits 2:0). Out: RCX type, RDX owner TDR, R8 size, R9 BEPOCH, R10/R11
    PAMT pages of a non-leaf entry (dynamic PAMT). A page that became free keeps its last owner.
    Statuses in order: OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY (all RCX).
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    raw = regs.rcx
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = regs.r11 = 0
    size = raw & LEVEL
    if raw & ~(HPA | LEVEL) or size > PageSize.SIZE_1G or (size and not g.dynamic_pamt):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    pa = raw & RDMD_ADDRESS
    page = walk(call, pa, _block(call, pa, size), SHARED, size, Operand.RCX)
    kind = page.page_type
    regs.r8 = page.level
    if g.dynamic_pamt and size == PageSize.SIZE_4K and kind == PageType.NDA and page.is_pamt_page():
        regs.rcx = PageType.PAMT
        regs.r8 = PageSize.SIZE_4K
        return
    if kind == PageType.PAMT:
        regs.rcx = kind | NON_LEAF
        regs.r10, regs.r11 = page.node_pages()
        return
    regs.rcx = kind
    regs.rdx = page.owner
    if kind in WITH_BEPOCH:
        regs.r9 = cpu.rd64(page.address + 8)


@seamcall(SeamcallLeaf.PHYMEM_PAGE_RECLAIM)
def phymem_page_reclaim(call: Call) -> None:
    """TDH.PHYMEM.PAGE.RECLAIM: take a page from a TD in TEARDOWN; its TDR comes last.

    In: RCX page. Out: RCX type, RDX owner TDR, R8 size, R9 hint (dynamic PAMT: bit 0, the PAMT pages are unused).
    Statuses in order: OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY, PAGE_METADATA_INCORRECT,
    OPERAND_INVALID (alignment to its size), OPERAND_BUSY (TDR), LIFECYCLE_STATE_INCORRECT, TD_ASSOCIATED_PAGES_EXIST.
    """
    regs, cpu = call.regs, call.cpu
    pa = regs.rcx
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = regs.r11 = 0
    page = walk(call, pa, _block(call, pa, PageSize.SIZE_4K), EXCLUSIVE, PageSize.SIZE_4K, Operand.RCX)
    kind = page.page_type
    if kind in (PageType.NDA, PageType.RSVD):
        raise LeafError(Status.PAGE_METADATA_INCORRECT, Operand.RCX)
    regs.rcx = kind
    regs.rdx = page.owner
    regs.r8 = page.level
    if pa & ALIGNMENT[page.level]:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if kind != PageType.TDR:
        td = open_td_of(call, page, SHARED)
        if td.lifecycle != LifecycleState.TEARDOWN:
            raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
        td.add_children(-(1 << 9 * page.level))
    else:
        td = Td(call, pa, page)
        if td.lifecycle != LifecycleState.TEARDOWN:
            raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
        if cpu.rd64(td.tdr + tdr.CHLDCNT):
            raise LeafError(Status.TD_ASSOCIATED_PAGES_EXIST)
    regs.r9 = page.set_type(PageType.NDA)


@seamcall(SeamcallLeaf.PHYMEM_PAGE_WBINVD)
def phymem_page_wbinvd(call: Call) -> None:
    """TDH.PHYMEM.PAGE.WBINVD: write back the cache lines of a page that is free again.

    In: RCX page, KeyID included. Statuses in order: OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY,
    PAGE_METADATA_INCORRECT (all RCX).
    """
    lock_page_any(call, call.regs.rcx & ~call.g.hkid_mask, PageType.NDA, SHARED, Operand.RCX)
    call.cpu.flush_page(call.regs.rcx)


@seamcall(SeamcallLeaf.PHYMEM_CACHE_WB)
def phymem_cache_wb(call: Call) -> None:
    """TDH.PHYMEM.CACHE.WB: write back this package's caches, so that flushed HKIDs can be freed.

    In: RCX 0 start, 1 resume. Statuses in order: OPERAND_INVALID (RCX), OPERAND_BUSY (WBCACHE, KOT),
    NO_HKID_READY_TO_WBCACHE, WBCACHE_RESUME_ERROR, INTERRUPTED_RESUMABLE.
    """
    g, cpu = call.g, call.cpu
    command = call.regs.rcx
    if command > RESUME:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    package = cpu.package
    call.lock(WBT_LOCK - package, EXCLUSIVE, Operand.WBCACHE)
    call.lock(KOT_LOCK, SHARED, Operand.KOT)
    state = g.packages[package]
    if command != RESUME:
        state.resume_point = 0
        flushed = {hkid for hkid, (what, _) in g.kot.items() if what is HkidState.FLUSHED}
        if not flushed:
            raise LeafError(Status.NO_HKID_READY_TO_WBCACHE)
        state.hkids_flushed = flushed
    elif not state.resume_point:
        raise LeafError(Status.WBCACHE_RESUME_ERROR)
    blocks = g.platform.msrs[IA32_WBNOINVDP]
    while True:
        cpu.flush_caches()
        state.resume_point += 1
        if state.resume_point >= blocks:
            break
        if cpu.interrupt_pending():
            raise LeafError(Status.INTERRUPTED_RESUMABLE)
    state.resume_point = 0
    with g.mutex:
        for hkid in state.hkids_flushed:
            what, packages = g.kot.get(hkid, (HkidState.FREE, 0))
            g.kot[hkid] = (what, packages & ~(1 << package))
