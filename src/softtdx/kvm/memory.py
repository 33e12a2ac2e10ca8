"""The host kernel's page allocator, and its own accesses to memory.

A buddy allocator over the convertible memory of the machine (the kernel gives the page allocator only memory that
TDX can use, so that any page may go to a TD). It also keeps account of the pages that TDX owns: they may not be
touched with a shared KeyID until they have been reclaimed, and must be back before the machine is handed on.
"""

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from softtdx.hw import Platform
from softtdx.kvm.errors import KvmError
from softtdx.kvm.spinlock import SpinLock

__all__ = ["PAGE", "PAGE_1G", "PAGE_2M", "HostMemory"]

PAGE = 4096
PAGE_2M = 2 << 20
PAGE_1G = 1 << 30
_BLOCK = PAGE_2M // PAGE
_MAX_ORDER = 18  # 1 GiB
_COSTLY = 8
_RECLAIM_BATCH = 32  # pages, even if one would do (SWAP_CLUSTER_MAX)
_LOW_MEMORY = 1 << 20  # left to firmware, as every kernel does


class HostMemory:
    """Free pages of the machine. Addresses are physical, KeyID 0; sizes are in pages. Safe for any thread."""

    def __init__(self, platform: Platform) -> None:
        """All convertible memory above 1 MiB is free."""
        self._bus = platform.memory
        self.read = platform.memory.read
        self.write = platform.memory.write
        self.cas64 = platform.memory.cas64
        self._lock = SpinLock()
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
        self._isolated: list[tuple[int, int]] = []
        self._captured: set[int] = set()
        self._shrinkers: list[Callable[[int], int]] = []

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

    def alloc_reclaim(
        self, pages: int = 1, *, align: int = PAGE, zero: bool = False, within: tuple[int, int] | None = None
    ) -> int:
        """`alloc`, and where there is nothing free, after reclaim. The caller holds no lock of memory management."""
        while True:
            try:
                return self.alloc(pages, align=align, zero=zero, within=within)
            except KvmError:
                # Reclaim frees pages here and there: it does not help who wants many in a row (costly orders).
                if pages > _COSTLY or not self.reclaim(_RECLAIM_BATCH):
                    raise

    def register_shrinker(self, shrink: Callable[[int], int]) -> None:
        """`shrink(pages)` gives back as many pages as it can, up to about `pages`, and returns how many."""
        self._shrinkers.append(shrink)

    def unregister_shrinker(self, shrink: Callable[[int], int]) -> None:
        """What had the pages is gone."""
        self._shrinkers.remove(shrink)

    def reclaim(self, pages: int) -> int:
        """Direct reclaim: ask whoever can give pages back; returns how many came. No lock may be held."""
        found = 0
        for shrink in list(self._shrinkers):
            found += shrink(pages - found)
            if found >= pages:
                break
        return found

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
        for found in range(order, _MAX_ORDER + 1):
            if self._free[found]:
                pa, _ = self._free[found].popitem()
                self._split(pa, found, order)
                return pa
        return None

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
            if any(start < pa + pages * PAGE and pa < end for start, end in self._isolated):
                self._free_isolated(range(pa, pa + pages * PAGE, PAGE))
                return
            self._add(pa, pa + pages * PAGE)
            self.free_pages += pages

    # --- memory that is to go offline
    def isolate(self, start: int, end: int) -> None:
        """Hand out no page of [start, end) any more; those that are freed from now on stay out too."""
        with self._lock:
            self._isolated.append((start, end))
            for order in range(_MAX_ORDER + 1):
                size = PAGE << order
                for block in [b for b in self._free[order] if b < end and start < b + size]:
                    del self._free[order][block]
                    inside = max(block, start), min(block + size, end)
                    self._captured.update(range(*inside, PAGE))
                    self.free_pages -= (inside[1] - inside[0]) // PAGE
                    self._add(block, inside[0])
                    self._add(inside[1], block + size)

    def unisolate(self, start: int, end: int) -> None:
        """The range is used again: its free pages are free pages of the machine."""
        with self._lock:
            self._isolated.remove((start, end))
            back = sorted(page for page in self._captured if start <= page < end)
            self._captured.difference_update(back)
            for page in back:
                self._add(page, page + PAGE)
            self.free_pages += len(back)

    def add_range(self, start: int, end: int) -> None:
        """New memory: its pages are free."""
        with self._lock:
            self.ranges = sorted([*self.ranges, (start, end)])
            self._add(start, end)
            self.total_pages += (end - start) // PAGE
            self.free_pages += (end - start) // PAGE

    def in_use(self, start: int, end: int) -> list[int]:
        """The pages of an isolated range that somebody still has."""
        with self._lock:
            return [page for page in range(start, end, PAGE) if page not in self._captured]

    def _free_isolated(self, freed: range) -> None:
        for page in freed:
            if any(start <= page < end for start, end in self._isolated):
                self._captured.add(page)
            else:
                self._add(page, page + PAGE)
                self.free_pages += 1

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
                if use is not None and not pa <= block <= pa + (pages - _BLOCK) * PAGE:
                    self._tdx_pages.update(dict.fromkeys(range(block, block + PAGE_2M, PAGE), use))
            if self._tdx_pages:
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
        for at in range(0, pages, _BLOCK):
            self.write(pa + at * PAGE, _ZEROES[: (pages - at) * PAGE])


_ZEROES = bytes(PAGE_2M)
