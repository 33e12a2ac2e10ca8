"""PAMT entries change their size: what TDH.MEM.PAGE.PROMOTE and DEMOTE do to the table.

A range is described by one entry of its size, or by 512 entries of the next smaller size under an entry that is
PT_NDA. With dynamic PAMT the 4 KiB entries lie in two pages that the host gives when a 2 MiB range is split and gets
back when it is merged (TDX Module Base Spec, "PAMT Hierarchy", "Dynamic PAMT").
"""

import struct
from typing import Final

from softtdx.abi.status import Operand, Status

from .context import Call
from .errors import LeafError, operand_invalid
from .fatal import ModuleFatal
from .locks import EXCLUSIVE, SHARED
from .pamt import (
    ENTRY_SIZE,
    NODE_SHIFT,
    TYPE_SHIFT,
    PageSize,
    PageType,
    bitmap_change,
    entry_address,
    lock_implicit,
    walk,
)

_CHILDREN: Final = 512
_ENTRIES_IN_PAGE: Final = 256
_ENTRY: Final = struct.Struct("<2Q")
_PAGE_MASK: Final = 0xFFF
_LOCK_BITS: Final = 0xFFFF

Pair = tuple[tuple[int, Operand], tuple[int, Operand]]


def promote(call: Call, pa: int, size: int) -> tuple[int, int] | None:
    """The 512 pages from `pa` on become one page of `size`.

    Returns the two PAMT pages that became free, with dynamic PAMT and 2 MiB. LeafError OPERAND_BUSY RCX: the entry of
    the whole range is in use.
    """
    page = lock_implicit(call, pa, EXCLUSIVE, Operand.RCX, size)
    cpu = call.cpu
    block = page.block
    if block.dynamic and size == PageSize.SIZE_2M:
        pair = page.node_pages()
        cpu.wr64(page.address, cpu.rd64(pair[0] | block.key))
        page.set_bepoch(0)
        for node in pair:
            bitmap_change(cpu, call.g.blocks[node >> 30], node, False)
        return pair
    below = entry_address(cpu, block, pa, size - 1)
    content = bytearray(cpu.read(below, _CHILDREN * ENTRY_SIZE))
    first = int.from_bytes(content[:8], "little")
    if content[2::ENTRY_SIZE] != bytes((first >> TYPE_SHIFT & 0xFF,)) * _CHILDREN:
        raise ModuleFatal(f"PAMT entries from {pa:#x} on differ in a range that the secure EPT maps alike")
    cpu.wr64(page.address, first)
    content[2::ENTRY_SIZE] = bytes(_CHILDREN)  # PT_NDA; owner and BEPOCH stay
    cpu.write(below, bytes(content))
    return None


def demote(call: Call, pa: int, size: int, pair: tuple[int, int]) -> None:
    """A page of `size` becomes 512 of the next smaller size.

    `pair`: the host's pages for 4 KiB entries (R12, R13), looked at with dynamic PAMT and 2 MiB only. LeafError
    OPERAND_BUSY RCX (the entry is in use), then OPERAND_INVALID, OPERAND_ADDR_RANGE_ERROR, OPERAND_BUSY and
    PAGE_NOT_FREE of R12 and R13.
    """
    page = lock_implicit(call, pa, EXCLUSIVE, Operand.RCX, size)
    cpu = call.cpu
    entry = _ENTRY.pack(page.first & ~_LOCK_BITS, 0)
    if not (page.block.dynamic and size == PageSize.SIZE_2M):
        cpu.write(entry_address(cpu, page.block, pa, size - 1), entry * _CHILDREN)
        page.set_type(PageType.NDA)
        return
    first, second = pair
    _take_pair(call, ((first, Operand.R12), (second, Operand.R13)))
    for node in pair:
        cpu.zero_page(node | page.block.key)
        cpu.write(node | page.block.key, entry * _ENTRIES_IN_PAGE)
    cpu.wr64(page.address, PageType.PAMT << TYPE_SHIFT | first >> 12 << NODE_SHIFT)
    cpu.wr64(page.address + 8, second >> 12 << NODE_SHIFT | _CHILDREN)


def _take_pair(call: Call, pair: Pair) -> None:
    """Make two free pages of the host PAMT pages."""
    g = call.g
    for node, operand in pair:
        if node & (_PAGE_MASK | g.not_a_page):
            raise operand_invalid(operand)
    for node, operand in pair:
        if node >> 30 not in g.blocks:
            raise LeafError(Status.OPERAND_ADDR_RANGE_ERROR, operand)
    for node, operand in pair:
        found = walk(call, node, g.blocks[node >> 30], SHARED, PageSize.SIZE_4K, operand)
        if found.page_type != PageType.NDA:
            raise LeafError(Status.PAGE_NOT_FREE, operand)
    taken: list[int] = []
    for node, operand in pair:
        if bitmap_change(call.cpu, g.blocks[node >> 30], node, True):
            for other in taken:
                bitmap_change(call.cpu, g.blocks[other >> 30], other, False)
            raise LeafError(Status.PAGE_NOT_FREE, operand)
        taken.append(node)
