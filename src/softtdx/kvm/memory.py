"""The host kernel's page allocator, and its own accesses to memory.

A buddy allocator over the convertible memory of the machine (the kernel gives the page allocator only memory that
TDX can use, so that any page may go to a TD). It also keeps account of the pages that TDX owns: they may not be
touched with a shared KeyID until they have been reclaimed, and must be back before the machine is handed on.
"""

import errno
from collections import Counter
from collections.abc import Iterable, Iterator
from threading import RLock

from softtdx.hw import Platform
from softtdx.kvm.errors import KvmError

__all__ = ["PAGE", "PAGE_2M", "HostMemory"]

PAGE = 4096
PAGE_2M = 2 << 20
PAGE_1G = 1 << 30
_BLOCK = PAGE_2M // PAGE
_MAX_ORDER = 18  # 1 GiB
_LOW_MEMORY = 1 << 20  # left to firmware, as every kernel does


class HostMemory:
    """Free pages of the machine. Addresses are physical, KeyID 0; sizes are in pages. Safe for any thread."""

    def __init__(self, platform: Platform) -> None:
        """All convertible memory above 1 MiB is free."""
        self._bus = platform.memory
        self.read = platform.memory.read
        self.write = platform.memory.write
        self._lock = RLock()
        self._free: list[dict[int, None]] = [{} for _ in range(_MAX_ORDER + 1)]
        self.ranges = [
            (max(base, _LOW_MEMORY), base + size)
            for base, size in platform.description.cmrs
            if base + size > _LOW_MEMORY
        ]
        for start, end in reversed(self.ranges):
            self._add(start, end)
        self.total_pages = sum(end - start for start, end in self.ranges) // PAGE
        self.free_pages = self.total_pages
        self._tdx_pages: dict[int, str] = {}
        self._tdx_blocks: dict[int, str] = {}  # 2 MiB that went as one; none of its pages is in `_tdx_pages`

    # --- allocation
    def alloc(
        self, pages: int = 1, *, align: int = PAGE, zero: bool = False, within: tuple[int, int] | None = None
    ) -> int:
        """`pages` contiguous pages, aligned to `align` bytes (a power of two), of the node [start, end) `within`.

        KvmError(ENOMEM) when there are none.
        """
        order = max((pages - 1).bit_length(), (align // PAGE - 1).bit_length())
        if order > _MAX_ORDER:
            raise KvmError(errno.ENOMEM, f"no {pages} contiguous pages exist")
        with self._lock:
            pa = self._pop(order) if within is None else self._pop_within(order, *within)
            if pa is None:
                raise KvmError(errno.ENOMEM, f"the host has no {pages} contiguous free pages left")
            self._add(pa + pages * PAGE, pa + (PAGE << order))
            self.free_pages -= pages
        if zero:
            self.zero(pa, pages)
        return pa

    def alloc_at(self, pa: int) -> bool:
        """Allocate this very page. False when it is not free."""
        with self._lock:
            for order in range(_MAX_ORDER + 1):
                block = pa & -(PAGE << order)
                if block in self._free[order]:
                    del self._free[order][block]
                    self._add(block, pa)
                    self._add(pa + PAGE, block + (PAGE << order))
                    self.free_pages -= 1
                    return True
        return False

    def _pop(self, order: int) -> int | None:
        """A free block of 2 to the power of `order` pages; a larger one is split."""
        found = next((o for o in range(order, _MAX_ORDER + 1) if self._free[o]), None)
        if found is None:
            return None
        pa, _ = self._free[found].popitem()
        self._split(pa, found, order)
        return pa

    def _pop_within(self, order: int, start: int, end: int) -> int | None:
        size = PAGE << order
        for found in range(order, _MAX_ORDER + 1):
            for block in self._free[found]:
                pa = max(block, -(-start // size) * size)
                if pa + size <= min(end, block + (PAGE << found)):
                    del self._free[found][block]
                    self._add(block, pa)
                    self._add(pa + size, block + (PAGE << found))
                    return pa
        return None

    def _split(self, pa: int, order: int, to: int) -> None:
        while order > to:
            order -= 1
            self._free[order][pa + (PAGE << order)] = None

    def free(self, pa: int, pages: int = 1) -> None:
        """Give pages back. A page that TDX still owns is a bug of the caller: RuntimeError."""
        with self._lock:
            owned = next(self._owned(pa, pages), None)
            if owned is not None:
                raise RuntimeError(f"page {owned[0]:#x} is freed while TDX owns it ({owned[1]})")
            self._add(pa, pa + pages * PAGE)
            self.free_pages += pages

    def _add(self, start: int, end: int) -> None:
        """Put a range into the free lists as the largest aligned blocks, merging buddies."""
        while start < end:
            order = min((start & -start).bit_length() - 13 if start else _MAX_ORDER, _MAX_ORDER)
            while PAGE << order > end - start:
                order -= 1
            block = start
            start += PAGE << order
            while order < _MAX_ORDER:
                buddy = block ^ (PAGE << order)
                if buddy not in self._free[order]:
                    break
                del self._free[order][buddy]
                block = min(block, buddy)
                order += 1
            self._free[order][block] = None

    # --- the account of what TDX owns
    def give_to_tdx(self, pa: int, use: str, pages: int = 1) -> None:
        """Note that the pages now belong to the TDX module, as `use`."""
        with self._lock:
            if pages == 1:
                self._tdx_pages[pa] = use
            elif pages == _BLOCK and not pa % PAGE_2M:
                self._tdx_blocks[pa] = use
            else:
                self._tdx_pages.update(dict.fromkeys(range(pa, pa + pages * PAGE, PAGE), use))

    def take_from_tdx(self, pa: int, pages: int = 1) -> None:
        """Note that the pages are the host's again."""
        with self._lock:
            if pages == _BLOCK and pa in self._tdx_blocks:
                del self._tdx_blocks[pa]
                return
            for block in range(pa & -PAGE_2M, pa + pages * PAGE, PAGE_2M):
                use = self._tdx_blocks.pop(block, None)
                if use is not None:
                    self._tdx_pages.update(dict.fromkeys(range(block, block + PAGE_2M, PAGE), use))
            for page in range(pa, pa + pages * PAGE, PAGE):
                self._tdx_pages.pop(page, None)

    def _owned(self, pa: int, pages: int) -> Iterator[tuple[int, str]]:
        """The pages of a range that TDX owns, one of a block for all of it, and their use."""
        end = pa + pages * PAGE
        for block in range(pa & -PAGE_2M, end, PAGE_2M):
            if block in self._tdx_blocks:
                yield max(block, pa), self._tdx_blocks[block]
        inside = range(pa, end, PAGE)
        if not self._tdx_pages.keys().isdisjoint(inside):
            yield from ((page, self._tdx_pages[page]) for page in inside if page in self._tdx_pages)

    def tdx_pages(self) -> Counter[str]:
        """How many pages TDX owns, by use."""
        with self._lock:
            total = Counter(self._tdx_pages.values())
            for use, blocks in Counter(self._tdx_blocks.values()).items():
                total[use] += blocks * _BLOCK
            return total

    def is_tdx(self, pa: int, pages: int = 1) -> bool:
        """Whether TDX owns a page, or any of several."""
        with self._lock:
            return next(self._owned(pa, pages), None) is not None

    def leaked(self) -> Iterable[int]:
        """The pages that TDX owns."""
        with self._lock:
            blocks = [page for block in self._tdx_blocks for page in range(block, block + PAGE_2M, PAGE)]
            return sorted([*self._tdx_pages, *blocks])

    # --- the kernel's own accesses, with KeyID 0
    def rd64(self, pa: int) -> int:
        """Load 8 bytes."""
        return int.from_bytes(self.read(pa, 8), "little")

    def wr64(self, pa: int, value: int) -> None:
        """Store 8 bytes."""
        self.write(pa, value.to_bytes(8, "little"))

    def zero(self, pa: int, pages: int = 1) -> None:
        """Clear whole pages: full cache lines, so poison and another key's contents go without being read."""
        for page in range(pa, pa + pages * PAGE, PAGE):
            self.write(page, _ZEROES)


_ZEROES = bytes(PAGE)
