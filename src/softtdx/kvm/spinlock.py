"""A lock that is held for microseconds, by many threads often."""

import time
from threading import RLock
from types import TracebackType
from typing import Final

_SPINS: Final = 100


class SpinLock:
    """A re-entrant lock, used in a with statement. Who finds it taken lets others run, and looks again.

    A thread that blocks on a lock gets it before it gets the interpreter's own lock. The one that runs then finds it
    taken at its next turn, blocks as well, and from there on the two change places at every turn (a lock convoy).
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = RLock()
        self._acquire = lock.acquire
        self._release = lock.release

    def __enter__(self) -> None:
        """Take it."""
        if self._acquire(False):
            return
        for _ in range(_SPINS):
            time.sleep(0)
            if self._acquire(False):
                return
        self._acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give it back."""
        self._release()
