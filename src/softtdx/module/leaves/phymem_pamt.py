"""Dynamic PAMT: TDH.PHYMEM.PAMT.ADD and PAMT.REMOVE give and take the pages that hold 4 KiB PAMT entries."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

from ..context import Call
from ..errors import LeafError
from ..locks import EXCLUSIVE, SHARED
from ..pamt import ENTRY_SIZE, NODE_SHIFT, TYPE_SHIFT, PageSize, PageType, PamtPage, bitmap_change, walk
from ..registry import seamcall
from ..state import PamtBlock

PAGE_MASK: Final = 0xFFF
MASK_2M: Final = 0x1F_FFFF
ENTRIES: Final = 256


def _range_operand(call: Call) -> int:
    """RCX: a 2 MiB range with level 1 in bits 2:0. LeafError OPERAND_INVALID."""
    if not call.g.dynamic_pamt:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    raw = call.regs.rcx
    pa = raw & ~PAGE_MASK
    if raw & PAGE_MASK != PageSize.SIZE_2M or pa & (MASK_2M | call.g.not_a_page):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    return pa


def _block(call: Call, pa: int, operand: Operand) -> PamtBlock:
    block = call.g.blocks.get(pa >> 30)
    if block is None:
        raise LeafError(Status.OPERAND_ADDR_RANGE_ERROR, operand)
    return block


def _page_block(call: Call, pa: int, operand: Operand) -> PamtBlock:
    if pa & (PAGE_MASK | call.g.not_a_page):
        raise LeafError(Status.OPERAND_INVALID, operand)
    return _block(call, pa, operand)


def _node(call: Call, pa: int) -> PamtPage:
    return walk(call, pa, _block(call, pa, Operand.RCX), EXCLUSIVE, PageSize.SIZE_2M, Operand.RCX)


@seamcall(SeamcallLeaf.PHYMEM_PAMT_ADD)
def phymem_pamt_add(call: Call) -> None:
    """TDH.PHYMEM.PAMT.ADD: make a free 2 MiB range usable in 4 KiB pages.

    In: RCX range | level 1, RDX and R8 two free pages for its PAMT entries. Statuses in order: OPERAND_INVALID (RAX:
    dynamic PAMT is off; RCX, RDX), OPERAND_ADDR_RANGE_ERROR (RDX), the same for R8, then OPERAND_ADDR_RANGE_ERROR,
    OPERAND_BUSY and HPA_RANGE_NOT_FREE (RCX), OPERAND_BUSY and PAGE_NOT_FREE (RDX, R8).
    """
    regs, cpu = call.regs, call.cpu
    pa = _range_operand(call)
    pages = ((regs.rdx, Operand.RDX), (regs.r8, Operand.R8))
    blocks = [_page_block(call, page, operand) for page, operand in pages]
    node = _node(call, pa)
    if node.level != PageSize.SIZE_2M or node.page_type != PageType.NDA:
        raise LeafError(Status.HPA_RANGE_NOT_FREE, Operand.RCX)
    for (page, operand), block in zip(pages, blocks, strict=True):
        if page >> 21 != pa >> 21:
            entry = walk(call, page, block, SHARED, PageSize.SIZE_4K, operand)
            if entry.page_type != PageType.NDA:
                raise LeafError(Status.PAGE_NOT_FREE, operand)
    if bitmap_change(cpu, blocks[0], regs.rdx, True):
        raise LeafError(Status.PAGE_NOT_FREE, Operand.RDX)
    if bitmap_change(cpu, blocks[1], regs.r8, True):
        bitmap_change(cpu, blocks[0], regs.rdx, False)
        raise LeafError(Status.PAGE_NOT_FREE, Operand.R8)
    for page, _ in pages:
        cpu.zero_page(page | call.g.global_key_bits)
    cpu.wr64(node.address + 8, regs.r8 >> 12 << NODE_SHIFT)
    cpu.wr64(node.address, PageType.PAMT << TYPE_SHIFT | regs.rdx >> 12 << NODE_SHIFT)


@seamcall(SeamcallLeaf.PHYMEM_PAMT_REMOVE)
def phymem_pamt_remove(call: Call) -> None:
    """TDH.PHYMEM.PAMT.REMOVE: take back the PAMT pages of a 2 MiB range in which every page is free.

    In: RCX range | level 1. Out: RDX, R8 the two pages. Statuses in order: OPERAND_INVALID (RAX: dynamic PAMT is off;
    RCX), OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY, NO_PAMT_PAGE_PAIR (RCX), PAMT_PAGE_NOT_EMPTY (which page).
    """
    regs, cpu = call.regs, call.cpu
    node = _node(call, _range_operand(call))
    if node.level != PageSize.SIZE_2M or node.page_type != PageType.PAMT:
        raise LeafError(Status.NO_PAMT_PAGE_PAIR, Operand.RCX)
    pages = node.node_pages()
    for index, page in enumerate(pages):
        if any(cpu.read(page | call.g.global_key_bits, ENTRIES * ENTRY_SIZE)[2::ENTRY_SIZE]):
            raise LeafError(Status.PAMT_PAGE_NOT_EMPTY, index)
    for page in pages:
        bitmap_change(cpu, call.g.blocks[page >> 30], page, False)
    regs.rdx, regs.r8 = pages
    cpu.wr64(node.address, 0)
