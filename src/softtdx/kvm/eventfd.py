"""eventfd(2), and the two ways in which KVM uses one: to be told of a guest's store, and to raise an interrupt.

(Kernel: fs/eventfd.c, virt/kvm/eventfd.c.)
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Final

from softtdx.abi.kvm import IoeventfdFlag, IrqfdFlag
from softtdx.kvm.errors import KvmError

__all__ = ["MMIO", "PIO", "Eventfd", "IoBus", "Irqfds"]

EFD_SEMAPHORE: Final = 1
_EFD_FLAGS: Final = EFD_SEMAPHORE | 0o4000 | 0o2000000  # and EFD_NONBLOCK, EFD_CLOEXEC, which change nothing here
_MAX: Final = (1 << 64) - 2
MMIO, PIO = "mmio", "pio"
_LENGTHS: Final = (0, 1, 2, 4, 8)


class Eventfd:
    """A counter in a file. Who has bound it is called when it is signalled, and when it is closed."""

    def __init__(self, count: int = 0, flags: int = 0) -> None:
        """EINVAL for unknown flags."""
        if flags & ~_EFD_FLAGS or not 0 <= count < 1 << 32:
            raise KvmError(errno.EINVAL, f"eventfd of {count} with flags {flags:#x}")
        self._count = count
        self._semaphore = bool(flags & EFD_SEMAPHORE)
        self._lock = Lock()
        self._bound: list[tuple[Callable[[], None], Callable[[], None]]] = []

    def signal(self, value: int = 1) -> None:
        """Add to the counter. EINVAL for 2^64 - 1, EAGAIN when the counter is full."""
        if not 0 <= value <= _MAX:
            raise KvmError(errno.EINVAL, f"{value:#x} written to an eventfd")
        with self._lock:
            if self._count + value > _MAX:
                raise KvmError(errno.EAGAIN, "the eventfd is full")
            self._count += value
        if value:
            self._tell()

    def ring(self) -> None:
        """What the kernel itself does to it (eventfd_signal): one more, never too many."""
        with self._lock:
            self._count = min(self._count + 1, _MAX + 1)
        self._tell()

    def _tell(self) -> None:
        for signalled, _ in list(self._bound):
            signalled()

    def read(self) -> int:
        """The counter as a reader takes it: it becomes 0, or 1 of it for a semaphore. EAGAIN when it is 0."""
        with self._lock:
            if not self._count:
                raise KvmError(errno.EAGAIN, "the eventfd was not signalled")
            taken = 1 if self._semaphore else self._count
            self._count -= taken
        return taken

    def take(self) -> int:
        """What KVM does with a signal: the counter becomes 0, whatever it was."""
        with self._lock:
            taken, self._count = self._count, 0
        return taken

    def bind(self, signalled: Callable[[], None], closed: Callable[[], None]) -> Callable[[], None]:
        """Call these when it is signalled and closed; returns what undoes it. A signal that waits is taken at once."""
        entry = signalled, closed
        with self._lock:
            self._bound.append(entry)
            waits = self._count > 0
        if waits:
            signalled()

        def undo() -> None:
            with self._lock:
                if entry in self._bound:
                    self._bound.remove(entry)

        return undo

    def close(self) -> None:
        """The last descriptor is gone."""
        for _, closed in list(self._bound):
            closed()


@dataclass(frozen=True)
class _Trap:
    """One KVM_IOEVENTFD."""

    space: str
    address: int
    length: int
    value: int | None
    eventfd: Eventfd

    def takes(self, space: str, address: int, size: int, value: int) -> bool:
        if (space, address) != (self.space, self.address) or (self.length and size != self.length):
            return False
        return self.value is None or value == self.value

    def collides(self, other: "_Trap") -> bool:
        """Whether both could take one store."""
        if (self.space, self.address) != (other.space, other.address):
            return False
        if self.length and other.length and self.length != other.length:
            return False
        return self.value is None or other.value is None or self.value == other.value


class IoBus:
    """KVM_IOEVENTFD: stores of the guest that signal an eventfd instead of going to user space."""

    def __init__(self) -> None:
        """Nothing is registered."""
        self._traps: list[_Trap] = []
        self._lock = Lock()

    def change(self, address: int, length: int, value: int, flags: int, eventfd: Eventfd) -> None:
        """KVM_IOEVENTFD. EINVAL for a bad length or flag, EEXIST for a collision, ENOENT for nothing to take away."""
        if length not in _LENGTHS or address + length > 1 << 64 or flags & ~sum(IoeventfdFlag):
            raise KvmError(errno.EINVAL, f"ioeventfd of {length} bytes at {address:#x} with flags {flags:#x}")
        match = bool(flags & IoeventfdFlag.DATAMATCH)
        if match and not length:
            raise KvmError(errno.EINVAL, "an ioeventfd that matches data of any length")
        trap = _Trap(
            PIO if flags & IoeventfdFlag.PIO else MMIO,
            address,
            length,
            value & (1 << 8 * length) - 1 if match else None,
            eventfd,
        )
        with self._lock:
            if flags & IoeventfdFlag.DEASSIGN:
                if trap not in self._traps:
                    raise KvmError(errno.ENOENT, f"there is no such ioeventfd at {address:#x}")
                self._traps = [other for other in self._traps if other != trap]
                return
            if any(trap.collides(other) for other in self._traps):
                raise KvmError(errno.EEXIST, f"an ioeventfd at {address:#x} collides")
            self._traps = [*self._traps, trap]

    def write(self, space: str, address: int, size: int, value: int) -> bool:
        """A store of the guest; whether an eventfd took it."""
        for trap in self._traps:
            if trap.takes(space, address, size, value):
                trap.eventfd.ring()
                return True
        return False


class Irqfds:
    """KVM_IRQFD: eventfds that raise a GSI when they are signalled."""

    def __init__(self, raise_gsi: Callable[[int], object]) -> None:
        """`raise_gsi` delivers what the GSI is routed to."""
        self._raise = raise_gsi
        self._bound: dict[tuple[int, int], tuple[Eventfd, Callable[[], None]]] = {}
        self._lock = Lock()

    def change(self, eventfd: Eventfd, gsi: int, flags: int) -> None:
        """KVM_IRQFD. EINVAL for flags, or for a resampler (there is no in-kernel I/O APIC); EBUSY when it is bound."""
        if flags & ~int(IrqfdFlag.DEASSIGN):
            raise KvmError(errno.EINVAL, f"irqfd with flags {flags:#x}")
        if flags & IrqfdFlag.DEASSIGN:
            self._drop(lambda bound, number: bound is eventfd and number == gsi)
            return
        with self._lock:
            if any(bound is eventfd for bound, _ in self._bound.values()):
                raise KvmError(errno.EBUSY, "the eventfd raises an interrupt already")
            self._bound[id(eventfd), gsi] = eventfd, lambda: None

        def signalled() -> None:
            with self._lock:  # once it is dropped, the VM's local APICs may be gone
                if (id(eventfd), gsi) in self._bound:
                    eventfd.take()
                    self._raise(gsi)

        undo = eventfd.bind(signalled, lambda: self._drop(lambda bound, _: bound is eventfd))
        with self._lock:
            self._bound[id(eventfd), gsi] = eventfd, undo

    def close(self) -> None:
        """The VM is gone."""
        self._drop(lambda _bound, _gsi: True)

    def _drop(self, which: Callable[[Eventfd, int], bool]) -> None:
        with self._lock:
            gone = [key for key, (eventfd, _) in self._bound.items() if which(eventfd, key[1])]
            undos = [self._bound.pop(key)[1] for key in gone]
        for undo in undos:
            undo()
