"""The module's locks: shared/exclusive try-locks, host priority among them.

Nobody waits: an acquisition succeeds or fails at once (TDX Module Base Spec, "Concurrency Restrictions and Host
Priority"). A lock is a word that LOCK-prefixed instructions change (`hw.isa.LockWords`), keyed by what it protects;
`Call.held` takes one that nobody else holds, and here is what is done about all the others.

State of a lock: bit 0 exclusive, bit 1 host priority, bits above: number of shared holders. A free lock has no row.

Host priority: when the host finds a lock held it leaves a mark, and until the host has had the lock a guest is told
OPERAND_BUSY_HOST_PRIORITY instead of getting it.
"""

from typing import Final

from softtdx.abi.status import Status
from softtdx.hw.isa import LockWords

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

    __slots__ = ("words",)

    def __init__(self) -> None:
        """No lock is held."""
        self.words = LockWords()

    @property
    def state(self) -> dict[int, int]:
        """Every lock that is not free, as it is now."""
        return self.words.rows()

    def acquire(self, key: int, exclusive: bool, guest: bool = False) -> int:
        """0 when the lock was taken, else the status: OPERAND_BUSY or OPERAND_BUSY_HOST_PRIORITY."""
        words = self.words
        held = words.load(key)
        while True:
            if guest and held & HOST_PRIORITY and (not exclusive or held == HOST_PRIORITY):
                return BUSY_HOST_PRIORITY
            busy = held & HELD or (exclusive and held & ~HOST_PRIORITY)
            if busy and guest:
                return BUSY
            taken = HELD if exclusive else (held & ~HOST_PRIORITY) + READER
            new = held | HOST_PRIORITY if busy else taken
            found = words.cas(key, held, new)
            if found == held:
                return BUSY if busy else 0
            held = found

    def release(self, key: int, exclusive: bool) -> None:
        """Give back what `acquire` gave. ValueError here is a defect of the module, not of a caller."""
        self.words.release(key, exclusive)

    def promote(self, key: int) -> int:
        """Shared to exclusive: 0, or OPERAND_BUSY when there is another reader (the shared lock stays held)."""
        words = self.words
        held = words.load(key)
        while True:
            alone = held & ~HOST_PRIORITY == READER
            found = words.cas(key, held, HELD if alone else held | HOST_PRIORITY)
            if found == held:
                return 0 if alone else BUSY
            held = found

    def host_waits(self, key: int) -> bool:
        """Whether a host found this lock held, so that who holds it should hurry."""
        return bool(self.words.load(key) & HOST_PRIORITY)

    def demote(self, key: int) -> None:
        """Exclusive to shared: cannot fail."""
        words = self.words
        held = words.load(key)
        while (found := words.cas(key, held, READER)) != held:
            held = found
