"""A user-space process's address space, as KVM sees it: memory that is faulted in, moved, swapped out and unmapped.

KVM maps what is here into guests and learns of every change by an MMU notifier (include/linux/mmu_notifier.h): the
range is invalidated in each guest before its translation changes. Backings: anonymous memory on small pages or, where
madvise(MADV_HUGEPAGE) allows it, on transparent huge pages; hugetlb; memfd.

Locks: a page is allocated and a notifier called with no lock held, since both may wait for a processor.
"""

import errno
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import NamedTuple, Protocol

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memfd import PAGE_SIZES, Memfd
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M, HostMemory
from softtdx.kvm.swap import SwapArea

__all__ = ["AddressSpace", "MmuNotifier", "UserPage"]

_FIRST = 0x7F00_0000_0000
_PARTS = PAGE_2M // PAGE
_SWAP_CLUSTER = 32  # pages that reclaim unmaps together (SWAP_CLUSTER_MAX)


class MmuNotifier(Protocol):
    """What a secondary MMU is told. Between start and end of an invalidation it maps nothing of the range."""

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Unmap [start, end), and let no processor use it any more."""

    def invalidate_range_end(self, start: int, end: int) -> None:
        """The translation has changed; it may be asked for again."""

    def clear_flush_young(self, start: int, end: int) -> bool:
        """Whether the range was accessed since this was last asked; from now on accesses are noticed anew."""

    def test_young(self, start: int, end: int) -> bool:
        """Whether the range was accessed since then, without starting anew."""


class UserPage(NamedTuple):
    """The host page behind an address: its first byte's physical and virtual address, and its size."""

    pa: int
    hva: int
    size: int

    def at(self, hva: int) -> int:
        """The physical address of `hva`, which is in this page."""
        return self.pa + hva - self.hva


@dataclass
class Vma:
    """One mapping. `page_size` above 4 KiB is hugetlb; `thp` allows transparent huge pages."""

    start: int
    size: int
    page_size: int = PAGE
    file: Memfd | None = None
    offset: int = 0
    thp: bool = False

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.start + self.size


class AddressSpace:
    """Mappings of a VMM process. Addresses are host-virtual (HVA). Safe for any thread."""

    def __init__(self, memory: HostMemory, swap: SwapArea | None = None) -> None:
        """Nothing is mapped. With a `swap` area the memory can be reclaimed."""
        self._memory = memory
        self.swap = swap
        self._lock = RLock()
        self._next = _FIRST
        self._vmas: list[Vma] = []
        self._starts: list[int] = []
        self._pages: dict[int, int] = {}
        self._huge: dict[int, UserPage] = {}  # by address: transparent and hugetlb pages of 2 MiB and 1 GiB
        self._swapped: dict[int, int] = {}
        self._referenced: set[int] = set()
        self._pins: Counter[int] = Counter()
        self.hinted: dict[int, int] = {}  # NUMA hinting: pages that were unmapped to see who asks for them, last node
        self.stats: Counter[str] = Counter()
        self._notifiers: list[MmuNotifier] = []
        if swap is not None:
            memory.register_shrinker(self.shrink)

    # --- system calls
    def mmap(self, length: int, *, page_size: int = PAGE, file: Memfd | None = None, offset: int = 0) -> int:
        """Map `length` bytes; returns the address, aligned to 2 MiB or the page size. EINVAL for no length.

        Anonymous memory; with `page_size` 2 MiB or 1 GiB hugetlb pages (MAP_HUGETLB); or a part of a memfd, whose
        page size counts.
        """
        if file is not None:
            page_size = file.page_size
        if length <= 0 or page_size not in PAGE_SIZES or (page_size > PAGE and length % page_size):
            raise KvmError(errno.EINVAL, f"mmap of {length} bytes on pages of {page_size} bytes")
        if file is not None and (offset % page_size or not 0 <= offset <= file.size - length):
            raise KvmError(errno.EINVAL, f"mmap of {offset:#x}+{length:#x} of a memfd of {file.size:#x} bytes")
        size = -(-length // PAGE) * PAGE
        step = max(PAGE_2M, page_size)
        with self._lock:
            address = -(-self._next // step) * step
            self._next = address + -(-size // PAGE_2M) * PAGE_2M + PAGE_2M
            at = bisect_right(self._starts, address)
            self._vmas.insert(at, Vma(address, size, page_size, file, offset))
            insort(self._starts, address)
        if file is not None:
            file.mapped(self)
        return address

    def munmap(self, address: int) -> None:
        """Unmap what `mmap` returned; its pages are freed. EINVAL when nothing starts there."""
        vma = self._vma(address)
        if vma is None or vma.start != address:
            raise KvmError(errno.EINVAL, f"nothing is mapped at {address:#x}")
        with self._invalidated(vma.start, vma.end):
            with self._lock:
                at = self._starts.index(address)
                del self._starts[at], self._vmas[at]
                pages = self._drop(vma.start, vma.end)
            self._free(pages)
        if vma.file is not None:
            vma.file.unmapped(self)

    def madvise_hugepage(self, hva: int, *, allow: bool = True) -> None:
        """MADV_HUGEPAGE or MADV_NOHUGEPAGE of the mapping at `hva`. EINVAL where it is not anonymous memory."""
        vma = self._vma(hva)
        if vma is None or vma.file is not None or vma.page_size != PAGE:
            raise KvmError(errno.EINVAL, f"MADV_HUGEPAGE at {hva:#x}, where there is no anonymous memory")
        vma.thp = allow

    def discard(self, hva: int, length: int) -> None:
        """madvise(MADV_DONTNEED): free the pages; the next access sees zeroes.

        EINVAL for a part of a hugetlb page. Of a memfd only the translation goes, as in the kernel.
        """
        for vma in self._overlapping(hva, hva + length):
            start, end = max(hva, vma.start), min(hva + length, vma.end)
            if start % vma.page_size or (end % vma.page_size and end != vma.end):
                raise KvmError(errno.EINVAL, f"MADV_DONTNEED of {start:#x} to {end:#x}: a part of a hugetlb page")
            with self._invalidated(start, end):
                with self._lock:
                    pages = self._drop(start, end)
                self._free(pages)

    def is_mapped(self, hva: int, length: int) -> bool:
        """Whether one mapping covers the range."""
        vma = self._vma(hva)
        return vma is not None and hva + length <= vma.end

    def backing(self, hva: int) -> int:
        """The page size of the mapping at an address: above 4 KiB it is hugetlb. EFAULT when unmapped."""
        vma = self._vma(hva)
        if vma is None:
            raise KvmError(errno.EFAULT, f"user address {hva:#x} is not mapped")
        return vma.page_size

    def close(self) -> None:
        """The process exits: everything is unmapped."""
        for address in list(self._starts):
            self.munmap(address)
        if self.swap is not None:
            self._memory.unregister_shrinker(self.shrink)
            self.swap = None

    # --- pages
    def get_page(self, hva: int) -> int:
        """The physical 4 KiB page behind an address, faulted in if need be (get_user_pages). EFAULT when unmapped."""
        page = hva & ~(PAGE - 1)
        return self._pages.get(page) or self.get_user_page(page).at(page)

    def get_pages_nowait(self, pages: list[int]) -> list[tuple[int, int]]:
        """Of neighbouring addresses those whose small pages are there or can be had without waiting, with the pages."""
        found = []
        with self._lock:
            vma = self._vma(pages[0]) if pages else None
            if vma is None or vma.file is not None or vma.page_size > PAGE:
                return []
            for page in pages:
                pa = self._pages.get(page)
                if pa is None and page not in self._swapped and not vma.thp and page < vma.end:
                    pa = self._try_alloc(1, None)
                    if pa is not None:
                        self._memory.zero(pa)
                        self._pages[page] = pa
                if pa is not None:
                    found.append((page, pa))
        return found

    def get_user_page(self, hva: int, within: tuple[int, int] | None = None) -> UserPage:
        """The page behind an address, of whatever size. `within`: the node to take a new one from, if it has room."""
        page = hva & ~(PAGE - 1)
        while True:
            vma = self._vma(page)
            if vma is None:
                raise KvmError(errno.EFAULT, f"user address {hva:#x} is not mapped")
            if vma.file is not None:
                offset = page - vma.start + vma.offset
                size = vma.file.page_size
                base = offset & ~(size - 1)
                return UserPage(vma.file.page(offset), vma.start + base - vma.offset, size)
            with self._lock:
                found = self._present(page)
            if found is not None:
                return found
            self._fault(vma, page, within)

    def _fault(self, vma: Vma, page: int, within: tuple[int, int] | None) -> None:
        """Bring in a page: allocate without a lock, then see whether it is still wanted."""
        size = vma.page_size
        if size == PAGE and vma.thp and self._may_be_huge(vma, page):
            with self._lock:
                block = self._try_alloc(_PARTS, within)
            if block is not None:
                self._memory.zero(block, _PARTS)
                self._install_huge(vma, page & ~(PAGE_2M - 1), block, PAGE_2M)
                return
        if size > PAGE:
            block = self._memory.alloc_reclaim(size // PAGE, align=size, zero=True)
            self._install_huge(vma, page & ~(size - 1), block, size)
            return
        new = self._try_alloc(1, within) or self._memory.alloc_reclaim()
        with self._lock:
            slot = self._swapped.get(page)
            if self._vma(page) is not vma or self._present(page) is not None:
                self._memory.free(new)
                return
            if slot is None:
                self._memory.zero(new)
            else:
                assert self.swap is not None
                self._memory.write(new, self.swap.load(slot))
                self.swap.free(self._swapped.pop(page))
                self.stats["swapped in"] += 1
            self._pages[page] = new

    def _try_alloc(self, pages: int, within: tuple[int, int] | None) -> int | None:
        if within is not None and (found := self._try_alloc_in(pages, within)) is not None:
            return found
        return self._try_alloc_in(pages, None)

    def _install_huge(self, vma: Vma, base: int, block: int, size: int) -> None:
        with self._lock:
            wanted = self._vma(base) is vma and base not in self._huge
            if wanted and size == PAGE_2M and vma.page_size == PAGE:
                wanted = self._may_be_huge(vma, base)
            if wanted:
                self._huge[base] = UserPage(block, base, size)
                return
        self._memory.free(block, size // PAGE)

    def _may_be_huge(self, vma: Vma, page: int) -> bool:
        base = page & ~(PAGE_2M - 1)
        parts = range(base, base + PAGE_2M, PAGE)
        inside = vma.start <= base and base + PAGE_2M <= vma.end
        return inside and self._pages.keys().isdisjoint(parts) and self._swapped.keys().isdisjoint(parts)

    def _present(self, page: int) -> UserPage | None:
        pa = self._pages.get(page)
        if pa is not None:
            return UserPage(pa, page, PAGE)
        if self._huge:
            return self._huge.get(page & ~(PAGE_2M - 1)) or self._gigantic(page)
        return None

    def _gigantic(self, page: int) -> UserPage | None:
        found = self._huge.get(page & ~(PAGE_1G - 1))
        return found if found is not None and found.size == PAGE_1G else None

    @contextmanager
    def pinned(self, hva: int) -> Iterator[int]:
        """The page behind `hva`, which neither moves nor goes away meanwhile (pin_user_pages)."""
        page = hva & ~(PAGE - 1)
        with self._lock:
            self._pins[page] += 1
        try:
            yield self.get_page(page)
        finally:
            with self._lock:
                self._pins[page] -= 1
                if not self._pins[page]:
                    del self._pins[page]

    # --- what the process reads and writes
    def read(self, hva: int, length: int) -> bytes:
        """What the process reads."""
        parts = []
        while length > 0:
            count = min(length, PAGE - hva % PAGE)
            with self._settled(hva) as pa:
                parts.append(self._memory.read(pa, count))
            hva, length = hva + count, length - count
        return b"".join(parts)

    def write(self, hva: int, data: bytes) -> None:
        """What the process writes."""
        at = 0
        while at < len(data):
            count = min(len(data) - at, PAGE - hva % PAGE)
            with self._settled(hva) as pa:
                self._memory.write(pa, data[at : at + count])
            hva, at = hva + count, at + count

    @contextmanager
    def _settled(self, hva: int) -> Iterator[int]:
        """The physical address of `hva`, with the lock held so that the page stays where it is."""
        page = hva & ~(PAGE - 1)
        while True:
            pa = self.get_page(page)
            with self._lock:
                found = self._pages.get(page)
                if found != pa:
                    vma, present = self._vma(page), self._present(page)
                    gone = vma is None or (vma.file is None and (present is None or present.at(page) != pa))
                    if gone:
                        continue
                self._referenced.add(page)
                yield pa + hva - page
                return

    # --- secondary MMUs
    def register_notifier(self, notifier: MmuNotifier) -> None:
        """mmu_notifier_register."""
        self._notifiers.append(notifier)

    def unregister_notifier(self, notifier: MmuNotifier) -> None:
        """mmu_notifier_unregister."""
        self._notifiers.remove(notifier)

    @contextmanager
    def _invalidated(self, start: int, end: int) -> Iterator[None]:
        """Change translations of [start, end) inside: guests are told before and after."""
        notifiers = list(self._notifiers)
        for notifier in notifiers:
            notifier.invalidate_range_start(start, end)
        try:
            yield
        finally:
            for notifier in notifiers:
                notifier.invalidate_range_end(start, end)

    def unmap_file(self, file: Memfd, offset: int, length: int) -> None:
        """A part of a file is going: its translations go first."""
        for vma in [vma for vma in self._vmas if vma.file is file]:
            start = max(vma.start, vma.start + offset - vma.offset)
            end = min(vma.end, vma.start + offset + length - vma.offset)
            if start < end:
                with self._invalidated(start, end):
                    pass

    # --- reclaim
    def shrink(self, pages: int) -> int:
        """Write up to `pages` pages that were not accessed lately to the swap area; returns how many were freed.

        The clock: a page that was accessed since the hand came by last is passed over once.
        """
        freed, chances = 0, 2
        while freed < pages and chances and self.swap is not None:
            self._split_some_huge()
            with self._lock:
                candidates = [hva for hva in self._pages if hva not in self._pins]
            before = freed
            for at in range(0, len(candidates), _SWAP_CLUSTER):
                cold = [hva for hva in candidates[at : at + _SWAP_CLUSTER] if not self._young(hva)]
                freed += self._swap_out(cold[: max(pages - freed, 1)])
                if freed >= pages:
                    break
            if freed == before:
                chances -= 1
        return freed

    def _young(self, hva: int) -> bool:
        """Whether the page was accessed, by the process or a guest; it is young no longer, and last in turn."""
        young = hva in self._referenced
        self._referenced.discard(hva)
        for notifier in list(self._notifiers):
            young |= notifier.clear_flush_young(hva, hva + PAGE)
        if young:
            with self._lock:
                pa = self._pages.pop(hva, None)
                if pa is not None:
                    self._pages[hva] = pa
        return young

    def _swap_out(self, pages: list[int]) -> int:
        """Unmap the pages, write them to the swap area and free them; returns how many there was room for."""
        freed: list[int] = []
        for start, end in _runs(sorted(pages)):
            with self._invalidated(start, end), self._lock:
                for hva in range(start, end, PAGE):
                    pa = self._pages.get(hva)
                    if pa is None or hva in self._pins or self.swap is None:
                        continue
                    slot = self.swap.store(self._memory.read(pa, PAGE))
                    if slot is None:
                        break
                    self._swapped[hva] = slot
                    freed.append(self._pages.pop(hva))
        self.stats["swapped out"] += len(freed)
        for pa in freed:
            self._memory.free(pa)
        return len(freed)

    def _split_some_huge(self) -> None:
        """Transparent huge pages go as small ones: split the first when there are no small pages to take."""
        with self._lock:
            if len(self._pages) < _SWAP_CLUSTER:
                for page in self._huge.values():
                    vma = self._vma(page.hva)
                    if vma is not None and vma.page_size == PAGE:
                        self._split(page)
                        return

    def _split(self, page: UserPage) -> None:
        del self._huge[page.hva]
        self._pages.update((page.hva + at, page.pa + at) for at in range(0, page.size, PAGE))

    # --- moving
    def migrate(self, start: int, end: int, within: tuple[int, int] | None = None) -> int:
        """Move the anonymous pages of [start, end) to other ones, of the node `within` (migrate_pages).

        Returns how many 4 KiB pages moved; what is pinned, or finds no room, stays.
        """
        with self._lock:
            huge = [page for page in self._huge.values() if page.hva < end and start < page.hva + page.size]
            small = sorted(hva for hva in self._pages if start <= hva < end)
        moved = sum(self._move(page, within) for page in huge)
        for first, last in _runs(small):
            pages = [(hva, self._try_alloc_in(1, within)) for hva in range(first, last, PAGE)]
            with self._invalidated(first, last), self._lock:
                for hva, new in pages:
                    moved += self._replace(hva, new)
        self.stats["migrated"] += moved
        return moved

    def migrate_physical(self, start: int, end: int) -> int:
        """Empty the physical range [start, end) of this process's pages, as far as they can move; how many did."""
        with self._lock:
            small = [hva for hva, pa in self._pages.items() if start <= pa < end]
            huge = [page for page in self._huge.values() if page.pa < end and start < page.pa + page.size]
        return sum(self.migrate(*run) for run in _runs(sorted(small))) + sum(
            self.migrate(page.hva, page.hva + page.size) for page in huge
        )

    def _replace(self, hva: int, new: int | None) -> int:
        """Copy a small page to `new`, which takes its place, or is given back."""
        old = self._pages.get(hva)
        if new is None:
            return 0
        if old is None or hva in self._pins:
            self._memory.free(new)
            return 0
        self._memory.write(new, self._memory.read(old, PAGE))
        self._pages[hva] = new
        self._memory.free(old)
        return 1

    def _move(self, page: UserPage, within: tuple[int, int] | None) -> int:
        count = page.size // PAGE
        block = self._try_alloc_in(count, within)
        if block is None:
            return 0
        with self._invalidated(page.hva, page.hva + page.size), self._lock:
            stays = self._huge.get(page.hva) != page or any(
                page.hva <= hva < page.hva + page.size for hva in self._pins
            )
            if not stays:
                for at in range(0, page.size, PAGE_2M):
                    self._memory.write(block + at, self._memory.read(page.pa + at, PAGE_2M))
                self._huge[page.hva] = UserPage(block, page.hva, page.size)
        self._memory.free(block if stays else page.pa, count)
        return 0 if stays else count

    def _try_alloc_in(self, pages: int, within: tuple[int, int] | None) -> int | None:
        try:
            return self._memory.alloc(pages, align=pages * PAGE, within=within)
        except KvmError:
            return None

    def collapse(self, base: int, max_none: int = 0) -> bool:
        """Make the small pages of the 2 MiB at `base` one huge page (khugepaged's collapse_huge_page).

        `max_none`: how many of them may be missing. False when that is impossible or there is no room.
        """
        parts = range(base, base + PAGE_2M, PAGE)
        vma = self._vma(base)
        if base % PAGE_2M or vma is None or vma.page_size != PAGE or vma.file is not None or base + PAGE_2M > vma.end:
            return False
        if self._missing(parts) > max_none:
            return False
        block = self._try_alloc_in(_PARTS, None)
        if block is None:
            return False
        self._memory.zero(block, _PARTS)
        with self._invalidated(base, base + PAGE_2M), self._lock:
            good = self._missing(parts) <= max_none and self._vma(base) is vma and base not in self._huge
            if good:
                old = [(hva, self._pages.pop(hva)) for hva in parts if hva in self._pages]
                for hva, pa in old:
                    self._memory.write(block + hva - base, self._memory.read(pa, PAGE))
                self._huge[base] = UserPage(block, base, PAGE_2M)
                self._free([(pa, 1) for _, pa in old])
        if not good:
            self._memory.free(block, _PARTS)
        return good

    def _missing(self, parts: range) -> int:
        """How many pages of a range are not there; as many as can be if one is pinned or swapped out."""
        if not self._swapped.keys().isdisjoint(parts) or not self._pins.keys().isdisjoint(parts):
            return _PARTS
        return sum(hva not in self._pages for hva in parts) or 0

    def collapsible(self) -> list[int]:
        """Addresses of the 2 MiB parts of MADV_HUGEPAGE mappings that have small pages."""
        with self._lock:
            bases = sorted({hva & ~(PAGE_2M - 1) for hva in self._pages})
            return [base for base in bases if (vma := self._vma(base)) is not None and vma.thp]

    def hint(self, after: int, count: int) -> tuple[int, int]:
        """Unmap the next `count` pages from guests, so that their next access tells where it comes from.

        NUMA hinting (change_prot_numa). Returns the address to go on after, 0 at the end, and how many were unmapped.
        """
        with self._lock:
            present = sorted(page.hva for page in self._huge.values()) + sorted(self._pages)
            window = sorted(hva for hva in present if hva > after)[:count]
        for start, end in _runs(window):
            with self._invalidated(start, end):
                for hva in range(start, end, PAGE):
                    self.hinted.setdefault(hva, -1)
        return window[-1] if len(window) == count else 0, len(window)

    # --- accounts
    def resident_pages(self) -> int:
        """How many 4 KiB pages are faulted in."""
        return len(self._pages) + sum(page.size // PAGE for page in list(self._huge.values()))

    def huge_pages(self) -> int:
        """How many transparent and hugetlb pages there are."""
        return len(self._huge)

    def swapped_pages(self) -> int:
        """How many pages are in the swap area."""
        return len(self._swapped)

    # --- inside
    def _vma(self, hva: int) -> Vma | None:
        with self._lock:
            at = bisect_right(self._starts, hva) - 1
            return self._vmas[at] if at >= 0 and hva < self._vmas[at].end else None

    def _overlapping(self, start: int, end: int) -> list[Vma]:
        with self._lock:
            return [vma for vma in self._vmas if vma.start < end and start < vma.end]

    def _drop(self, start: int, end: int) -> list[tuple[int, int]]:
        """Forget the pages of a range, which may be much larger than what is resident; (address, pages) of each."""
        for page in list(self._huge.values()):
            if (
                page.hva < end
                and start < page.hva + page.size
                and not (start <= page.hva and page.hva + page.size <= end)
            ):
                self._split(page)
        gone = [self._huge.pop(hva) for hva in [hva for hva in self._huge if start <= hva < end]]
        pages = [(page.pa, page.size // PAGE) for page in gone]
        pages += [(self._pages.pop(hva), 1) for hva in _inside(self._pages, start, end)]
        for hva in _inside(self._swapped, start, end):
            assert self.swap is not None
            self.swap.free(self._swapped.pop(hva))
        for hva in _inside(self.hinted, start, end):
            del self.hinted[hva]
        return pages

    def _free(self, pages: list[tuple[int, int]]) -> None:
        for pa, count in pages:
            self._memory.free(pa, count)


def _inside(pages: dict[int, int], start: int, end: int) -> list[int]:
    if not pages:
        return []
    if (end - start) // PAGE > len(pages):
        return [hva for hva in pages if start <= hva < end]
    return [hva for hva in range(start, end, PAGE) if hva in pages]


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring pages of an ascending list as [start, end)."""
    start = end = -1
    for page in pages:
        if page == end:
            end += PAGE
            continue
        if start >= 0:
            yield start, end
        start, end = page, page + PAGE
    if start >= 0:
        yield start, end
