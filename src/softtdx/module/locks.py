"""The module's locks: shared/exclusive try-locks, host priority among them.

Nobody waits: an acquisition succeeds or fails at once (TDX Module Base Spec, "Concurrency Restrictions and Host
Priority"). A lock is a small integer in one table, keyed by what it protects; the table's mutex is the lock prefix of
the real module's atomic instructions and is held for a few bytecodes only.

State of a lock: bit 0 exclusive, bit 1 host priority, bits above: number of shared holders. A free lock has no row.

Host priority: when the host finds a lock held it leaves a mark, and until the host has had the lock a guest is told
OPERAND_BUSY_HOST_PRIORITY instead of getting it.
"""

from threading import Lock
from typing import Final

from softtdx.abi.status import Status

__all__ = ["BUSY", "BUSY_HOST_PRIORITY", "EXCLUSIVE", "HOST_PRIORITY", "READER", "SHARED", "LockTable"]

SHARED: Final = False
EXCLUSIVE: Final = True

HELD: Final = 1  # exclusively
HOST_PRIORITY: Final = 2
READER: Final = 4

BUSY: Final = int(Status.OPERAND_BUSY)
BUSY_HOST_PRIORITY: Final = int(Status.OPERAND_BUSY_HOST_PRIORITY)


class LockTable:
    """All locks of one module instance.

    Keys: the address of a page for its PAMT entry (| 1 for the 2 MiB and | 2 for the 1 GiB entry), the address of a
    TDR | a number from `td.LockId` for a lock in that TD's TDCS, a negative number for a global lock.
    """

    __slots__ = ("mutex", "state")

    def __init__(self) -> None:
        """No lock is held."""
        self.mutex = Lock()
        self.state: dict[int, int] = {}

    def acquire(self, key: int, exclusive: bool, guest: bool = False) -> int:
        """0 when the lock was taken, else the status: OPERAND_BUSY or OPERAND_BUSY_HOST_PRIORITY."""
        with self.mutex:
            return self.acquire_locked(key, exclusive, guest)

    def acquire_locked(self, key: int, exclusive: bool, guest: bool = False) -> int:
        """The same for a caller that holds `mutex`."""
        state = self.state
        held = state.get(key, 0)
        if not held:
            state[key] = HELD if exclusive else READER
            return 0
        if guest and held & HOST_PRIORITY and (not exclusive or held == HOST_PRIORITY):
            return BUSY_HOST_PRIORITY
        if held & HELD or (exclusive and held & ~HOST_PRIORITY):
            if not guest:
                state[key] = held | HOST_PRIORITY
            return BUSY
        state[key] = HELD if exclusive else (held & ~HOST_PRIORITY) + READER
        return 0

    def release(self, key: int, exclusive: bool) -> None:
        """Give back what `acquire` gave. KeyError or ValueError here is a defect of the module, not of a caller."""
        with self.mutex:
            self.release_locked(key, exclusive)

    def release_locked(self, key: int, exclusive: bool) -> None:
        """The same for a caller that holds `mutex`."""
        state = self.state
        held = state[key]
        left = held & HOST_PRIORITY if exclusive else held - READER
        if left < 0 or bool(held & HELD) != exclusive:
            raise ValueError(f"lock {key:#x} is released in a mode in which it is not held ({held:#x})")
        if left:
            state[key] = left
        else:
            del state[key]

    def promote(self, key: int) -> int:
        """Shared to exclusive: 0, or OPERAND_BUSY when there is another reader (the shared lock stays held)."""
        with self.mutex:
            held = self.state[key]
            if held & ~HOST_PRIORITY == READER:
                self.state[key] = HELD
                return 0
            self.state[key] = held | HOST_PRIORITY
            return BUSY

    def host_waits(self, key: int) -> bool:
        """Whether a host found this lock held, so that who holds it should hurry."""
        return bool(self.state.get(key, 0) & HOST_PRIORITY)

    def demote(self, key: int) -> None:
        """Exclusive to shared: cannot fail."""
        with self.mutex:
            self.state[key] = READER
