"""Memory slots: which guest-physical ranges have memory behind them, and which of it is private.

A slot of a TD has two backings, a guest_memfd for private and user memory for shared accesses: aliases of one range
of guest frames, told apart by the shared bit of the GPA, which is never part of a slot's address.
"""

import errno
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from softtdx.abi.kvm import MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag
from softtdx.kvm.dirty_log import DirtyBitmap
from softtdx.kvm.errors import KvmError
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.memory import PAGE

__all__ = ["MAX_SLOTS", "Memslot", "Memslots", "PrivateRanges"]

MAX_SLOTS = 512


@dataclass(frozen=True)
class Memslot:
    """One slot. Addresses and sizes in bytes."""

    slot: int
    flags: MemorySlotFlag
    gpa: int
    size: int
    userspace_addr: int
    guest_memfd: GuestMemfd | None = None
    guest_memfd_offset: int = 0
    dirty_bitmap: DirtyBitmap | None = None

    @property
    def read_only(self) -> bool:
        """KVM_MEM_READONLY: a write exits to user space."""
        return bool(self.flags & MemorySlotFlag.READONLY)

    @property
    def end(self) -> int:
        """The first GPA behind it."""
        return self.gpa + self.size

    def hva(self, gpa: int) -> int:
        """The user address behind a GPA of this slot."""
        return self.userspace_addr + gpa - self.gpa

    def gpa_of(self, hva: int) -> int:
        """The GPA of this slot that a user address backs."""
        return self.gpa + hva - self.userspace_addr

    def file_offset(self, gpa: int) -> int:
        """The guest_memfd offset behind a GPA of this slot."""
        return self.guest_memfd_offset + gpa - self.gpa


class Memslots:
    """The slots of one VM, by address."""

    def __init__(self, max_gpa: int) -> None:
        """`max_gpa`: the first address that is not a GPA of this VM (for a TD: its shared bit)."""
        self.max_gpa = max_gpa
        self._slots: dict[int, Memslot] = {}
        self._sorted: list[Memslot] = []
        self._starts: list[int] = []

    def __iter__(self) -> Iterator[Memslot]:
        """The slots in ascending order of address."""
        return iter(self._sorted)

    def get(self, slot: int) -> Memslot | None:
        """A slot by its number."""
        return self._slots.get(slot)

    def find(self, gpa: int) -> Memslot | None:
        """The slot that contains a GPA."""
        at = bisect_right(self._starts, gpa) - 1
        if at < 0:
            return None
        slot = self._sorted[at]
        return slot if gpa - slot.gpa < slot.size else None

    def check(self, new: Memslot) -> None:
        """The kernel's rules for a new slot. KvmError(EINVAL or EEXIST)."""
        if not 0 <= new.slot < MAX_SLOTS:
            raise KvmError(errno.EINVAL, f"memory slot {new.slot}, there are {MAX_SLOTS}")
        if new.gpa % PAGE or new.size % PAGE or new.userspace_addr % PAGE or new.gpa < 0 or new.size <= 0:
            raise KvmError(errno.EINVAL, f"memory slot {new.slot} is not page aligned or has no size")
        if new.end > self.max_gpa:
            raise KvmError(errno.EINVAL, f"memory slot {new.slot} ends at {new.end:#x}, above GPA {self.max_gpa:#x}")
        for old in self._sorted:
            if old.slot != new.slot and old.gpa < new.end and new.gpa < old.end:
                raise KvmError(errno.EEXIST, f"memory slot {new.slot} overlaps slot {old.slot}")

    def put(self, new: Memslot) -> None:
        """Add or replace."""
        self._slots[new.slot] = new
        self._sort()

    def remove(self, slot: int) -> None:
        """Delete."""
        del self._slots[slot]
        self._sort()

    def _sort(self) -> None:
        self._sorted = sorted(self._slots.values(), key=lambda s: s.gpa)
        self._starts = [s.gpa for s in self._sorted]


class PrivateRanges:
    """KVM_MEMORY_ATTRIBUTE_PRIVATE of every guest frame, kept as disjoint ranges."""

    def __init__(self) -> None:
        """Everything is shared, as after VM creation."""
        self._ranges: list[tuple[int, int]] = []

    def set(self, start: int, end: int, attributes: int) -> list[tuple[int, int]]:
        """Make [start, end) private or shared; returns the parts that changed."""
        private = bool(attributes & MEMORY_ATTRIBUTE_PRIVATE)
        inside = [(max(s, start), min(e, end)) for s, e in self._ranges if s < end and start < e]
        changed = _gaps(inside, start, end) if private else inside
        if private:
            touching = [(s, e) for s, e in self._ranges if s <= end and start <= e]
            merged = min([start, *(s for s, _ in touching)]), max([end, *(e for _, e in touching)])
            self._ranges = sorted([r for r in self._ranges if r not in touching] + [merged])
        else:
            kept = []
            for s, e in self._ranges:
                kept += [(s, min(e, start))] if s < start else []
                kept += [(max(s, end), e)] if e > end else []
            self._ranges = sorted(set(kept))
        return changed

    def is_private(self, gpa: int) -> bool:
        """Whether the frame at `gpa` is private."""
        return self.all_private(gpa, gpa + 1)

    def all_private(self, start: int, end: int) -> bool:
        """Whether the whole range is private."""
        return any(s <= start and end <= e for s, e in self._ranges)

    def all_shared(self, start: int, end: int) -> bool:
        """Whether no part of the range is private."""
        return not any(s < end and start < e for s, e in self._ranges)


def _gaps(inside: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    gaps, at = [], start
    for s, e in sorted(inside):
        if s > at:
            gaps.append((at, s))
        at = e
    if at < end:
        gaps.append((at, end))
    return gaps
