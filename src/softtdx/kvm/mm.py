"""A user-space process's address space, as KVM sees it: anonymous memory, faulted in page by page."""

import errno
from threading import RLock

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, HostMemory

__all__ = ["AddressSpace"]

_FIRST = 0x7F00_0000_0000


class AddressSpace:
    """Mappings of a VMM process. Addresses are host-virtual (HVA). Safe for any thread."""

    def __init__(self, memory: HostMemory) -> None:
        """Nothing is mapped."""
        self._memory = memory
        self._lock = RLock()
        self._next = _FIRST
        self._mappings: dict[int, int] = {}
        self._pages: dict[int, int] = {}

    def mmap(self, length: int) -> int:
        """Map `length` bytes of anonymous memory; returns the address, 2 MiB aligned. EINVAL for no length."""
        if length <= 0:
            raise KvmError(errno.EINVAL, f"mmap of {length} bytes")
        size = -(-length // PAGE) * PAGE
        with self._lock:
            address = self._next
            self._next += -(-size // (2 << 20)) * (2 << 20) + (2 << 20)
            self._mappings[address] = size
        return address

    def munmap(self, address: int) -> None:
        """Unmap what `mmap` returned; its pages are freed. EINVAL when nothing starts there."""
        with self._lock:
            size = self._mappings.pop(address, None)
            if size is None:
                raise KvmError(errno.EINVAL, f"nothing is mapped at {address:#x}")
            pages = self._drop(address, address + size)
        for pa in pages:
            self._memory.free(pa)

    def get_page(self, hva: int) -> int:
        """The physical page behind an address, faulted in if need be (get_user_pages). EFAULT when unmapped."""
        page = hva & ~(PAGE - 1)
        with self._lock:
            pa = self._pages.get(page)
            if pa is None:
                if not any(start <= page < start + size for start, size in self._mappings.items()):
                    raise KvmError(errno.EFAULT, f"user address {hva:#x} is not mapped")
                pa = self._pages[page] = self._memory.alloc(zero=True)
            return pa

    def is_mapped(self, hva: int, length: int) -> bool:
        """Whether one mapping covers the range."""
        with self._lock:
            return any(start <= hva and hva + length <= start + size for start, size in self._mappings.items())

    def discard(self, hva: int, length: int) -> None:
        """madvise(MADV_DONTNEED): free the pages, which no VM maps any more; the next access sees zeroes."""
        with self._lock:
            pages = self._drop(hva, hva + length)
        for pa in pages:
            self._memory.free(pa)

    def read(self, hva: int, length: int) -> bytes:
        """What the process reads."""
        parts = []
        while length > 0:
            count = min(length, PAGE - hva % PAGE)
            parts.append(self._memory.read(self.get_page(hva) + hva % PAGE, count))
            hva, length = hva + count, length - count
        return b"".join(parts)

    def write(self, hva: int, data: bytes) -> None:
        """What the process writes."""
        at = 0
        while at < len(data):
            count = min(len(data) - at, PAGE - hva % PAGE)
            self._memory.write(self.get_page(hva) + hva % PAGE, data[at : at + count])
            hva, at = hva + count, at + count

    def _drop(self, start: int, end: int) -> list[int]:
        """Forget the pages of a range, which may be much larger than what is resident."""
        if (end - start) // PAGE > len(self._pages):
            doomed = [hva for hva in self._pages if start <= hva < end]
        else:
            doomed = [hva for hva in range(start, end, PAGE) if hva in self._pages]
        return [self._pages.pop(hva) for hva in doomed]

    def resident_pages(self) -> int:
        """How many pages are faulted in."""
        return len(self._pages)

    def close(self) -> None:
        """The process exits: everything is unmapped."""
        for address in list(self._mappings):
            self.munmap(address)
