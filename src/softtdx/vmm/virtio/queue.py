"""A split virtqueue, from the device's side (Virtio 1.2, 2.7). The guest may put anything into it."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

__all__ = ["MAX_SIZE", "Chain", "GuestMemory", "Queue", "QueueError"]

MAX_SIZE = 256
_DESCRIPTOR = struct.Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
_MAX_BYTES = 16 << 20  # of one chain


class QueueError(Exception):
    """The driver broke the rules; the device needs a reset."""


class GuestMemory(Protocol):
    """Memory that device and guest share, by guest-physical address."""

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from `gpa`."""

    def write(self, gpa: int, data: bytes) -> None:
        """The bytes to `gpa`."""


@dataclass(frozen=True)
class Chain:
    """A request: what the device reads, and where it may write, as (address, length)."""

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]

    @property
    def room(self) -> int:
        """Bytes that the device may write."""
        return sum(size for _, size in self.writable)


class Queue:
    """One virtqueue. The driver sets size and addresses before it enables the queue."""

    def __init__(self, memory: GuestMemory) -> None:
        """Not enabled."""
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Back to the state after the device's reset."""
        self.size = MAX_SIZE
        self.enabled = False
        self.descriptors = self.available = self.used = 0
        self.vector = 0xFFFF
        self._next_available = 0
        self._next_used = 0

    def read(self, chain: Chain) -> bytes:
        """Everything that the device may read of a request."""
        return b"".join(self._memory.read(address, size) for address, size in chain.readable)

    def write(self, chain: Chain, data: bytes) -> int:
        """Put as much of `data` as fits into a request; returns how much that was."""
        done = 0
        for address, size in chain.writable:
            part = data[done : done + size]
            if not part:
                break
            self._memory.write(address, part)
            done += len(part)
        return done

    def pop(self) -> Chain | None:
        """The next request, if there is one. QueueError for one that is malformed."""
        if not self.enabled:
            return None
        index = self._u16(self.available + 2)
        if index == self._next_available:
            return None
        if (index - self._next_available) & 0xFFFF > self.size:
            raise QueueError("the available ring holds more entries than it has room for")
        head = self._u16(self.available + 4 + 2 * (self._next_available % self.size))
        self._next_available = self._next_available + 1 & 0xFFFF
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        for address, size, flags in self._walk(head):
            if flags & _WRITE:
                writable.append((address, size))
            elif writable:
                raise QueueError("a descriptor to read follows one to write")
            else:
                readable.append((address, size))
        if sum(size for _, size in readable + writable) > _MAX_BYTES:
            raise QueueError("a request is too large")
        return Chain(head, tuple(readable), tuple(writable))

    def push(self, chain: Chain, written: int) -> bool:
        """Give a request back; True when the driver wants an interrupt for it."""
        at = self.used + 4 + 8 * (self._next_used % self.size)
        self._memory.write(at, struct.pack("<II", chain.head, written))
        self._next_used = self._next_used + 1 & 0xFFFF
        self._memory.write(self.used + 2, struct.pack("<H", self._next_used))
        return not self._u16(self.available) & _NO_INTERRUPT

    def _walk(self, head: int) -> Iterator[tuple[int, int, int]]:
        table, entries, index = self.descriptors, self.size, head
        for _ in range(2 * MAX_SIZE):
            if index >= entries:
                raise QueueError(f"descriptor {index} of {entries}")
            raw = self._memory.read(table + _DESCRIPTOR.size * index, _DESCRIPTOR.size)
            address, size, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                if flags & _NEXT or size % _DESCRIPTOR.size or table != self.descriptors:
                    raise QueueError("a malformed indirect descriptor")
                table, entries, index = address, size // _DESCRIPTOR.size, 0
                continue
            yield address, size, flags
            if not flags & _NEXT:
                return
            index = following
        raise QueueError("a request of endless descriptors")

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self._memory.read(gpa, 2), "little")
