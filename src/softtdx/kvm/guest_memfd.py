"""guest_memfd: memory of a VM that user space cannot map; what private GPAs of a TD are backed by (kvm_gmem).

Facts: the kernel's virt/kvm/guest_memfd.c. Punching a hole first unmaps the range from the VM (for a TD: BLOCK,
TRACK, REMOVE), then frees the pages. The pages are unevictable: the host could only store what it cannot read.

On hugetlb pages (a posted series, not yet in the kernel) a large page stays the file's while parts of it are punched
out, so that a range that was shared for a while is whole again when it is private again.
"""

import errno
from collections.abc import Callable, Iterator
from threading import RLock

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memfd import PAGE_SIZES
from softtdx.kvm.memory import PAGE, PAGE_2M, HostMemory

__all__ = ["GuestMemfd"]

_HUGE = PAGE_2M // PAGE


class GuestMemfd:
    """One file: page index -> physical page. Pages come into being when they are first asked for."""

    def __init__(self, memory: HostMemory, size: int, page_size: int = PAGE) -> None:
        """A file of `size` bytes on pages of 4 KiB, 2 MiB or 1 GiB. EINVAL unless it is a positive multiple of that."""
        if page_size not in PAGE_SIZES or size <= 0 or size % page_size:
            raise KvmError(errno.EINVAL, f"a guest_memfd of {size} bytes on pages of {page_size} bytes")
        self.size = size
        self.page_size = page_size
        self._memory = memory
        self._lock = RLock()
        self._pages: dict[int, int] = {}
        self._blocks: dict[int, int] = {}  # number of a 2 MiB part -> its block; its pages are not in `_pages`
        self._homes: dict[int, int] = {}  # number of a 2 MiB part -> the block that its pages came from
        self._reserved: dict[int, int] = {}  # number of a hugetlb page of the file -> its block
        self._bindings: list[tuple[int, int, Callable[[int, int], None]]] = []

    def bind(self, offset: int, size: int, invalidate: Callable[[int, int], None]) -> None:
        """A memslot uses [offset, offset + size); `invalidate(offset, size)` unmaps a part of it from the VM.

        EINVAL when the range is not inside the file, EEXIST when another memslot uses a part of it.
        """
        if offset < 0 or offset % PAGE or offset + size > self.size:
            raise KvmError(errno.EINVAL, f"guest_memfd range {offset:#x}+{size:#x} of a file of {self.size:#x} bytes")
        if any(start < offset + size and offset < start + length for start, length, _ in self._bindings):
            raise KvmError(errno.EEXIST, "another memslot is bound to a part of this guest_memfd range")
        self._bindings.append((offset, size, invalidate))

    def unbind(self, offset: int) -> None:
        """The memslot that was bound at `offset` is gone."""
        self._bindings = [binding for binding in self._bindings if binding[0] != offset]

    def get_page(self, index: int) -> int:
        """The 4 KiB page at `index`."""
        with self._lock:
            whole = self._blocks.get(index // _HUGE)
            if whole is not None:
                return whole + index % _HUGE * PAGE
            pa = self._pages.get(index)
            if pa is None and self.page_size > PAGE:
                pa = self._pages[index] = self._reserve(index)
            if pa is None:
                # Back where it was, if it came from a large page: then that can become one again.
                block = self._homes.get(index // _HUGE)
                home = None if block is None else block + index % _HUGE * PAGE
                pa = home if home is not None and self._memory.alloc_at(home) else self._memory.alloc()
                self._pages[index] = pa  # a TD sees it only after PAGE.ADD or ACCEPT wrote it
            return pa

    def _reserve(self, index: int) -> int:
        """Where a page of a hugetlb file lies: in the large page that is the file's from now on."""
        number, inside = divmod(index * PAGE, self.page_size)
        block = self._reserved.get(number)
        if block is None:
            block = self._reserved[number] = self._memory.alloc(self.page_size // PAGE, align=self.page_size)
        return block + inside

    def replace(self, index: int, page: int) -> int | None:
        """The page at `index` was moved to `page`; returns the old one, now the caller's, unless it stays reserved."""
        with self._lock:
            self._split(index // _HUGE)
            old, self._pages[index] = self._pages[index], page
            if index % _HUGE == 0 and page % PAGE_2M == 0:
                self._homes[index // _HUGE] = page
            return None if self._is_reserved(index, old) else old

    def _is_reserved(self, index: int, pa: int) -> bool:
        number, inside = divmod(index * PAGE, self.page_size)
        return self._reserved.get(number, -1) + inside == pa

    def get_huge_page(self, index: int) -> int | None:
        """The aligned, contiguous 2 MiB block at `index`; None when it cannot be one."""
        number, first = divmod(index, _HUGE)
        if first:
            return None
        with self._lock:
            block = self._blocks.get(number)
            if block is not None:
                return block
            pa = self._pages.get(index)
            if pa is not None:
                whole = pa % PAGE_2M == 0 and all(self._pages.get(index + i) == pa + i * PAGE for i in range(_HUGE))
                return pa if whole else None
            if (index + _HUGE) * PAGE > self.size or not self._pages.keys().isdisjoint(range(index, index + _HUGE)):
                return None
            if self.page_size > PAGE:
                pa = self._reserve(index)
            else:
                try:
                    pa = self._memory.alloc(_HUGE, align=PAGE_2M)
                except KvmError:
                    return None
            self._blocks[number] = self._homes[number] = pa
            return pa

    def _split(self, number: int) -> None:
        """From now on the pages of a 2 MiB part go their own ways."""
        block = self._blocks.pop(number, None)
        if block is not None:
            first = number * _HUGE
            self._pages.update(zip(range(first, first + _HUGE), range(block, block + PAGE_2M, PAGE), strict=True))

    def punch_hole(self, offset: int, length: int) -> None:
        """fallocate(FALLOC_FL_PUNCH_HOLE): unmap the range from the VM and free its pages. EINVAL if misaligned."""
        if offset % PAGE or length % PAGE or length <= 0 or offset < 0 or offset + length > self.size:
            raise KvmError(errno.EINVAL, f"hole {offset:#x}+{length:#x} in a guest_memfd of {self.size:#x} bytes")
        for start, size, invalidate in self._bindings:
            first, last = max(start, offset), min(start + size, offset + length)
            if first < last:
                invalidate(first, last - first)
        self._free(range(offset // PAGE, (offset + length) // PAGE))

    def allocated_pages(self) -> int:
        """How many pages the file has."""
        return len(self._pages) + len(self._blocks) * _HUGE

    def close(self) -> None:
        """The last reference is gone: free every page. One that TDX did not give back is lost, not reused."""
        with self._lock:
            for number, block in list(self._blocks.items()):
                if self._memory.is_tdx(block, _HUGE):
                    self._split(number)
            self._pages = {index: pa for index, pa in self._pages.items() if not self._memory.is_tdx(pa)}
        self._free(range(self.size // PAGE))
        for block in self._reserved.values():
            pages = [pa for pa in range(block, block + self.page_size, PAGE) if not self._memory.is_tdx(pa)]
            for start, count in _runs(pages):
                self._memory.free(start, count)
        self._reserved.clear()

    def unmapped_in(self, start: int, end: int) -> list[int]:
        """Indexes of pages in the physical range [start, end) that TDX does not own: no TD maps them."""
        with self._lock:
            for number, block in list(self._blocks.items()):
                if start <= block < end and not self._memory.is_tdx(block, _HUGE):
                    self._split(number)
            return [i for i, pa in self._pages.items() if start <= pa < end and not self._memory.is_tdx(pa)]

    def drop_page(self, index: int) -> bool:
        """Free a page that no TD maps: its contents were the TD's, and are gone. False for a reserved one."""
        with self._lock:
            if self._reserved:
                return False
            self._memory.free(self._pages.pop(index))
            return True

    def _free(self, indexes: range) -> None:
        first, last = indexes.start, indexes.stop - 1
        with self._lock:
            for edge in {first // _HUGE, last // _HUGE}:
                if not (first <= edge * _HUGE and edge * _HUGE + _HUGE - 1 <= last):
                    self._split(edge)
            parts = range(-(-first // _HUGE), (last + 1) // _HUGE)
            blocks = [self._blocks.pop(number) for number in list(self._blocks) if number in parts]
            found = (
                [i for i in indexes if i in self._pages]
                if len(indexes) < len(self._pages)
                else sorted(i for i in self._pages if i in indexes)
            )
            pages = [pa for i in found if not self._is_reserved(i, pa := self._pages.pop(i))]
            if self._reserved:
                blocks = []  # they stay the file's
        for block in blocks:
            self._memory.free(block, _HUGE)
        for start, count in _runs(pages):
            self._memory.free(start, count)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring physical pages as (start, number of pages)."""
    start, count = 0, 0
    for page in pages:
        if count and page == start + count * PAGE:
            count += 1
            continue
        if count:
            yield start, count
        start, count = page, 1
    if count:
        yield start, count
