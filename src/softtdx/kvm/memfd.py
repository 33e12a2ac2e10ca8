"""memfd_create: a file in memory that processes map shared, on small pages or on hugetlb ones (mm/memfd.c).

Its pages belong to the file. A hole that is punched goes through the MMU notifiers of every process that maps it.
"""

import errno
from threading import RLock
from typing import Protocol

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M, HostMemory

__all__ = ["PAGE_SIZES", "Memfd"]

PAGE_SIZES = (PAGE, PAGE_2M, PAGE_1G)


class FileUser(Protocol):
    """An address space that maps a file."""

    def unmap_file(self, file: "Memfd", offset: int, length: int) -> None:
        """Forget translations to this part of the file."""


class Memfd:
    """A file of `size` bytes. Not swappable: reclaim leaves its pages alone."""

    def __init__(self, memory: HostMemory, size: int, page_size: int = PAGE) -> None:
        """EINVAL unless `page_size` is 4 KiB, 2 MiB or 1 GiB (MFD_HUGETLB) and `size` a multiple of it."""
        if page_size not in PAGE_SIZES or size <= 0 or size % page_size:
            raise KvmError(errno.EINVAL, f"a memfd of {size} bytes on pages of {page_size} bytes")
        self.size = size
        self.page_size = page_size
        self._memory = memory
        self._lock = RLock()
        self._pages: dict[int, int] = {}
        self._users: list[FileUser] = []
        self._closed = False

    def page(self, offset: int) -> int:
        """The page that contains `offset`, which comes into being when it is first asked for. EFAULT past the end."""
        if not 0 <= offset < self.size:
            raise KvmError(errno.EFAULT, f"offset {offset:#x} of a memfd of {self.size:#x} bytes (SIGBUS)")
        index = offset // self.page_size
        pa = self._pages.get(index)
        if pa is None:
            pages = self.page_size // PAGE
            new = self._memory.alloc_reclaim(pages, align=self.page_size, zero=True)
            with self._lock:
                pa = self._pages.setdefault(index, new)
            if pa != new:
                self._memory.free(new, pages)
        return pa

    def punch_hole(self, offset: int, length: int) -> None:
        """fallocate(FALLOC_FL_PUNCH_HOLE). EINVAL unless it is whole pages of the file."""
        if offset % self.page_size or length % self.page_size or length <= 0 or not 0 <= offset <= self.size - length:
            raise KvmError(errno.EINVAL, f"hole {offset:#x}+{length:#x} in a memfd of {self.size:#x} bytes")
        for user in list(self._users):
            user.unmap_file(self, offset, length)
        first, last = offset // self.page_size, (offset + length) // self.page_size
        with self._lock:
            doomed = [self._pages.pop(index) for index in [i for i in self._pages if first <= i < last]]
        self._free(doomed)

    @property
    def resident_pages(self) -> int:
        """4 KiB pages that it has."""
        return len(self._pages) * (self.page_size // PAGE)

    def close(self) -> None:
        """The last descriptor is closed; pages stay while a process maps the file."""
        self._closed = True
        self._release()

    def mapped(self, user: FileUser) -> None:
        """A process maps it."""
        self._users.append(user)

    def unmapped(self, user: FileUser) -> None:
        """It does so no longer."""
        self._users.remove(user)
        self._release()

    def _release(self) -> None:
        if self._closed and not self._users:
            with self._lock:
                pages, self._pages = list(self._pages.values()), {}
            self._free(pages)

    def _free(self, pages: list[int]) -> None:
        for pa in pages:
            self._memory.free(pa, self.page_size // PAGE)
