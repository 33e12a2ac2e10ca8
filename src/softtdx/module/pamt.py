"""PAMT, the physical-address metadata table: what each page of TD memory is, and who owns it.

It lies in DRAM under the global private KeyID, at three levels. An entry is 16 bytes (TDX Module Base Spec, "PAMT"):

    63       24 23     16 15   0      127   64
    OWNER>>12   PT        lock        BEPOCH

A walk goes from the 1 GiB entry down while the entry is PT_NDA, and holds shared locks on the way and the lock asked
for on the entry where it ends. The lock word of the real module is a row of `LockTable` here; its bits stay 0.

With dynamic PAMT (TDH.SYS.CONFIG bit 16) the host adds 4 KiB entries by TDH.PHYMEM.PAMT.ADD, two pages for a 2 MiB
range; the 2 MiB entry then is of type PAMT and points to them, and the static 4 KiB area is a bitmap of such pages:

    63       28 20:16 15 0      127      92 73:64
    PAGE0>>12   PT    lock      PAGE1>>12   pages in use
"""

from enum import IntEnum
from typing import Final

from softtdx.abi.status import Status
from softtdx.hw.isa import SeamCpu

from .atomics import add16
from .context import Call
from .errors import LeafError
from .locks import EXCLUSIVE, SHARED
from .state import GlobalState, PamtBlock, Tdmr

__all__ = [
    "ENTRY_SIZE",
    "PageSize",
    "PageType",
    "PamtPage",
    "bitmap_change",
    "bitmap_get",
    "check_page_address",
    "entry_address",
    "implicit",
    "lock_free_range",
    "lock_implicit",
    "lock_page",
    "lock_page_any",
    "make_entry",
    "node_page",
    "owner_of",
    "page_type_of",
    "publish_block",
    "walk",
]

ENTRY_SIZE: Final = 16
TYPE_SHIFT: Final = 16
TYPE_MASK: Final = 0xFF << TYPE_SHIFT
OWNER_SHIFT: Final = 24
NODE_SHIFT: Final = 28  # dynamic PAMT: address bits of a non-leaf entry's two pages
NODE_COUNT_MASK: Final = 0x3FF
REMOVAL_HINT: Final = 1 << 62
KEY_2M: Final = 1
KEY_1G: Final = 2
MASK_2M: Final = ~0x1F_FFFF
MASK_1G: Final = ~0x3FFF_FFFF

ADDRESS_RANGE_ERROR: Final = int(Status.OPERAND_ADDR_RANGE_ERROR)
METADATA_INCORRECT: Final = int(Status.PAGE_METADATA_INCORRECT)
INVALID: Final = int(Status.OPERAND_INVALID)


class PageType(IntEnum):
    """What a page is."""

    NDA = 0  # not directly assigned: free, or split into smaller entries
    RSVD = 1
    REG = 3
    TDR = 4
    TDCX = 5  # a page of TDCS or TDVPS
    TDVPR = 6
    EPT = 8
    PAMT = 15


class PageSize(IntEnum):
    """Size of a page, or level of a PAMT entry."""

    SIZE_4K = 0
    SIZE_2M = 1
    SIZE_1G = 2


ALIGNMENT: Final = (0xFFF, 0x1F_FFFF, 0x3FFF_FFFF)
NDA: Final = int(PageType.NDA)


def page_type_of(entry: int) -> int:
    """PT of an entry's first quadword."""
    return entry >> TYPE_SHIFT & 0xFF


def owner_of(entry: int) -> int:
    """The owner TDR's address in an entry's first quadword."""
    return entry >> OWNER_SHIFT << 12


def make_entry(page_type: int, owner: int) -> int:
    """An entry's first quadword."""
    return page_type << TYPE_SHIFT | owner >> 12 << OWNER_SHIFT


def publish_block(g: GlobalState, tdmr: Tdmr, base: int) -> None:
    """From now on pages of the 1 GiB block at `base` of `tdmr` may be used."""
    offset, key = base - tdmr.base, g.global_key_bits
    g.blocks[base >> 30] = PamtBlock(
        tdmr,
        base,
        tdmr.pamt_1g + (offset >> 30) * ENTRY_SIZE | key,
        tdmr.pamt_2m + (offset >> 21) * ENTRY_SIZE | key,
        (tdmr.pamt_4k if g.dynamic_pamt else tdmr.pamt_4k + (offset >> 12) * ENTRY_SIZE) | key,
        key=key,
        dynamic=g.dynamic_pamt,
    )


class PamtPage:
    """A PAMT entry that the leaf holds locked. `address` is the entry's own (global KeyID in it).

    `first` is its first quadword as read under the lock; the setters write DRAM.
    """

    __slots__ = ("_cpu", "address", "block", "first", "level", "pa")

    def __init__(self, call: Call, pa: int, level: int, address: int, first: int, block: PamtBlock) -> None:
        """The entry of page `pa` at `level`."""
        self._cpu = call.cpu
        self.pa = pa
        self.level = level
        self.address = address
        self.first = first
        self.block = block

    @property
    def page_type(self) -> int:
        """PT."""
        return self.first >> TYPE_SHIFT & 0xFF

    @property
    def owner(self) -> int:
        """The owner TDR's address."""
        return self.first >> OWNER_SHIFT << 12

    @property
    def bepoch(self) -> int:
        """BEPOCH: the TD epoch at which the page was blocked."""
        return self._cpu.rd64(self.address + 8)

    def set(self, page_type: int, owner: int, bepoch: int | None = None) -> None:
        """Give a free page a type and an owner (and a BEPOCH)."""
        if self.block.dynamic and self.level == 0:
            self._count(1)
        self.first = first = page_type << TYPE_SHIFT | owner >> 12 << OWNER_SHIFT
        self._cpu.wr64(self.address, first)
        if bepoch is not None:
            self._cpu.wr64(self.address + 8, bepoch)

    def set_type(self, page_type: int) -> int:
        """Change the type and keep the owner: a page that becomes free remembers whose it was.

        Returns REMOVAL_HINT, which leaves OR into what they tell the host of a freed page, when the PAMT pages of its
        2 MiB range serve no other page any more (dynamic PAMT only); else 0.
        """
        self.first = first = self.first & ~TYPE_MASK | page_type << TYPE_SHIFT
        self._cpu.wr64(self.address, first)
        if page_type == NDA and self.block.dynamic and self.level == 0:
            return REMOVAL_HINT if self._count(-1) == 1 else 0
        return 0

    def set_bepoch(self, bepoch: int) -> None:
        """Write BEPOCH."""
        self._cpu.wr64(self.address + 8, bepoch)

    def _count(self, delta: int) -> int:
        """Dynamic PAMT: the number of pages in use below the 2 MiB node; returns what it was."""
        return add16(self._cpu, entry_address(self._cpu, self.block, self.pa, 1) + 8, delta) & NODE_COUNT_MASK

    def is_pamt_page(self) -> bool:
        """Dynamic PAMT: whether the host gave this 4 KiB page to the module to hold PAMT entries."""
        return bitmap_get(self._cpu, self.block, self.pa)

    def node_pages(self) -> tuple[int, int]:
        """The two PAMT pages of a non-leaf entry (type PAMT)."""
        return node_page(self.first), node_page(self._cpu.rd64(self.address + 8))


def node_page(word: int) -> int:
    """The PAMT page that a quadword of a non-leaf entry names, in bits 63:28."""
    return word >> NODE_SHIFT << 12


def entry_address(cpu: SeamCpu, block: PamtBlock, pa: int, level: int) -> int:
    """Where the entry of `pa` at `level` lies, global KeyID included.

    With dynamic PAMT the 4 KiB entries lie in the pages that the 2 MiB entry, then of type PAMT, points to.
    """
    if level == 2:
        return block.e1g
    e2m = block.e2m + ((pa & 0x3FE0_0000) >> 17)
    if level == 1:
        return e2m
    if not block.dynamic:
        return block.e4k + ((pa & 0x3FFF_F000) >> 8)
    half = pa >> 20 & 1
    return node_page(cpu.rd64(e2m + 8 * half)) | block.key | (pa >> 12 & 0xFF) * ENTRY_SIZE


def _bitmap_word(block: PamtBlock, pa: int) -> tuple[int, int]:
    bit = pa - block.tdmr.base >> 12
    return block.e4k + (bit >> 6) * 8, 1 << (bit & 63)


def bitmap_get(cpu: SeamCpu, block: PamtBlock, pa: int) -> bool:
    """Dynamic PAMT: the page's bit in PAMT_PAGE_BITMAP."""
    address, bit = _bitmap_word(block, pa)
    return bool(cpu.rd64(address) & bit)


def bitmap_change(cpu: SeamCpu, block: PamtBlock, pa: int, value: bool) -> bool:
    """Dynamic PAMT: set or clear the page's bit, atomically; returns what it was."""
    address, bit = _bitmap_word(block, pa)
    old = cpu.rd64(address)
    while (found := cpu.cas64(address, old, old | bit if value else old & ~bit)) != old:
        old = found
    return bool(old & bit)


def check_page_address(call: Call, pa: int, operand: int, size: int = PageSize.SIZE_4K) -> None:
    """A private page operand: aligned, no KeyID, below MAXPA. LeafError OPERAND_INVALID."""
    if pa & (ALIGNMENT[size] | call.g.not_a_page):
        raise LeafError(INVALID, operand)


def lock_page(
    call: Call,
    pa: int,
    expected: int,
    exclusive: bool,
    operand: int,
    size: int = PageSize.SIZE_4K,
    *,
    guest: bool = False,
) -> PamtPage:
    """Check a page operand, walk its PAMT to `size`, lock its entry and require type `expected`.

    The lock lives until the leaf ends. LeafError with `operand`: OPERAND_INVALID (alignment, KeyID, MAXPA),
    OPERAND_ADDR_RANGE_ERROR (no TDMR, or not initialised), OPERAND_BUSY, PAGE_METADATA_INCORRECT (another type, or
    the entry is at another level).
    """
    g = call.g
    if pa & (ALIGNMENT[size] | g.not_a_page):
        raise LeafError(INVALID, operand)
    block = g.blocks.get(pa >> 30)
    if block is None:
        raise LeafError(ADDRESS_RANGE_ERROR, operand)
    page = walk(call, pa, block, exclusive, size, operand, guest)
    if page.level != size:
        status = METADATA_INCORRECT
        if g.dynamic_pamt and page.level == PageSize.SIZE_2M and page.page_type == NDA == expected:
            status = int(Status.MISSING_PAMT_PAGE_PAIR)
        raise LeafError(status, operand)
    if page.first >> TYPE_SHIFT & 0xFF != expected:
        raise LeafError(METADATA_INCORRECT, operand)
    if g.dynamic_pamt and expected == NDA and page.is_pamt_page():
        raise LeafError(METADATA_INCORRECT, operand)
    return page


def lock_page_any(call: Call, pa: int, expected: int, exclusive: bool, operand: int) -> PamtPage:
    """As `lock_page`, but the entry may be at any level; `pa` is 4 KiB aligned."""
    if pa & (0xFFF | call.g.not_a_page):
        raise LeafError(INVALID, operand)
    block = call.g.blocks.get(pa >> 30)
    if block is None:
        raise LeafError(ADDRESS_RANGE_ERROR, operand)
    page = walk(call, pa, block, exclusive, PageSize.SIZE_4K, operand)
    if page.page_type != expected or (block.dynamic and expected == NDA and page.is_pamt_page()):
        raise LeafError(METADATA_INCORRECT, operand)
    return page


def walk(
    call: Call, pa: int, block: PamtBlock, exclusive: bool, size: int, operand: int, guest: bool = False
) -> PamtPage:
    """Walk towards the entry of `pa` at `size`; the page returned may be at a larger level, where the walk ended."""
    if not size and block.path is not None:
        found = call.held.take_page(call.cpu.core, pa, block.path, exclusive)
        if found is not None:  # nearly always: a 4 KiB entry, and nobody is in the way
            return PamtPage(call, pa, 0, found[0], found[1], block)
    mark = len(call.held)
    while (page := _descend(call, pa, block, exclusive, size, operand, guest)) is None:
        call.release_since(mark)
    return page


def _descend(
    call: Call, pa: int, block: PamtBlock, exclusive: bool, size: int, operand: int, guest: bool
) -> PamtPage | None:
    """The walk level by level. None when an entry changed before its lock was taken: again from the top."""
    cpu = call.cpu
    for level, key, below in ((2, pa & MASK_1G | KEY_1G, NDA), (1, pa & MASK_2M | KEY_2M, block.node_type)):
        address = entry_address(cpu, block, pa, level)
        ends = size == level or cpu.rd64(address) & TYPE_MASK != below
        call.lock(key, exclusive if ends else SHARED, operand, guest=guest)
        first = cpu.rd64(address)
        if ends != (size == level or first & TYPE_MASK != below):
            return None
        if ends:
            return PamtPage(call, pa, level, address, first, block)
    call.lock(pa, exclusive, operand, guest=guest)
    address = entry_address(cpu, block, pa, 0)
    return PamtPage(call, pa, 0, address, cpu.rd64(address), block)


def lock_free_range(call: Call, pa: int, operand: int, size: int) -> PamtPage:
    """Lock a free page or a free 2 MiB range exclusively: every 4 KiB entry below a 2 MiB entry must be free too."""
    page = lock_page(call, pa, NDA, EXCLUSIVE, operand, size)
    if size == PageSize.SIZE_2M and _used_below(call.cpu, page):
        raise LeafError(METADATA_INCORRECT, operand)
    return page


def _used_below(cpu: SeamCpu, page: PamtPage) -> bool:
    """Whether any 4 KiB page of a 2 MiB range is in use: its entry says so, or (dynamic) it holds PAMT itself."""
    block = page.block
    if block.dynamic:
        return any(cpu.read(_bitmap_word(block, page.pa)[0], 64))
    start = block.e4k + ((page.pa & 0x3FE0_0000) >> 8)
    return any(cpu.read(start, 512 * ENTRY_SIZE)[2::ENTRY_SIZE])


def lock_implicit(
    call: Call, pa: int, exclusive: bool, operand: int, size: int = PageSize.SIZE_4K, *, guest: bool = False
) -> PamtPage:
    """Lock the entry of a page that the module itself knows (an owner TDR, a mapped page): only its own entry."""
    block = call.g.blocks[pa >> 30]
    address = entry_address(call.cpu, block, pa, size)
    key = pa if size == 0 else pa & MASK_2M | KEY_2M if size == 1 else pa & MASK_1G | KEY_1G
    call.lock(key, exclusive, operand, guest=guest)
    return PamtPage(call, pa, size, address, call.cpu.rd64(address), block)


def implicit(call: Call, pa: int, size: int = PageSize.SIZE_4K) -> PamtPage:
    """The entry of a page that the module knows, without a lock (a lock above it protects it)."""
    block = call.g.blocks[pa >> 30]
    address = entry_address(call.cpu, block, pa, size)
    return PamtPage(call, pa, size, address, call.cpu.rd64(address), block)
