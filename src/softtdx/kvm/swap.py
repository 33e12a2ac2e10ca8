"""The swap area: where pages of user memory go when the machine has too few (mm/swapfile.c, mm/page_io.c).

It stands for a disk: what is in it is in no DRAM of the platform. Only user memory goes there. Pages of a guest_memfd
are unevictable, since the host could only store what it cannot read.
"""

from itertools import count

from softtdx.kvm.memory import PAGE

__all__ = ["SwapArea"]

_ZEROES = bytes(PAGE)


class SwapArea:
    """`size` pages. A page of zeroes takes a slot and no room (SWP zeromap)."""

    def __init__(self, size: int) -> None:
        """Swapon: `size` in pages."""
        self.size = size
        self._slots: dict[int, bytes | None] = {}
        self._numbers = count()

    @property
    def used(self) -> int:
        """Pages in it."""
        return len(self._slots)

    def store(self, data: bytes) -> int | None:
        """Write a page; its slot, None when the area is full."""
        if len(self._slots) >= self.size:
            return None
        slot = next(self._numbers)
        self._slots[slot] = None if data == _ZEROES else data
        return slot

    def load(self, slot: int) -> bytes:
        """Read a page."""
        return self._slots[slot] or _ZEROES

    def free(self, slot: int) -> None:
        """The slot is no longer used."""
        del self._slots[slot]
