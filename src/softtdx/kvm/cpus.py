"""The host's scheduler and inter-processor calls, as far as KVM needs them.

A host thread that executes privileged instructions (SEAMCALL, VMLAUNCH, loads with a KeyID) runs on a logical
processor. With more threads than processors they take turns: a thread that waits interrupts the processor that has
been busy longest, and the run loop there yields.
"""

import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from softtdx.hw import LogicalProcessor, Platform
from softtdx.kvm.errors import KvmError

__all__ = ["HostCpus"]

_T = TypeVar("_T")
_TICK = 0.004  # seconds between two attempts to get a busy processor: the scheduler's tick


class _Call(Generic[_T]):
    """A function waiting to run on a processor."""

    def __init__(self, function: Callable[[LogicalProcessor], _T]) -> None:
        self.function = function
        self.done = threading.Event()
        self.result: _T | None = None
        self.error: BaseException | None = None

    def run(self, lp: LogicalProcessor) -> None:
        try:
            self.result = self.function(lp)
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


class HostCpus:
    """The logical processors, and which thread runs on which."""

    def __init__(self, platform: Platform) -> None:
        """All processors are online and idle."""
        self.lps = platform.lps
        self._lock = threading.Condition()
        self._owner: list[int | None] = [None] * len(self.lps)
        self._since = [0] * len(self.lps)
        self._turns = 0
        self._usable = [True] * len(self.lps)  # threads may be scheduled there
        self._online = [True] * len(self.lps)
        self._queue: deque[object] = deque()  # threads that wait for a processor
        self._calls: list[deque[_Call[Any]]] = [deque() for _ in self.lps]
        self._here = threading.local()

    def package_leaders(self) -> list[int]:
        """One online processor of each package that has one."""
        leaders: dict[int, int] = {}
        for lp in self.online():
            leaders.setdefault(lp.package, lp.index)
        return list(leaders.values())

    # --- hotplug
    def is_online(self, index: int) -> bool:
        """Whether threads may run on the processor."""
        return self._usable[index]

    def online(self) -> list[LogicalProcessor]:
        """The processors that are online."""
        return [lp for lp in self.lps if self._usable[lp.index]]

    @property
    def here(self) -> int | None:
        """The processor that the calling thread runs on."""
        return getattr(self._here, "index", None)

    def drain(self, index: int) -> None:
        """Let no thread run on the processor any more, and wait until the one that does has left it.

        It still takes calls. The caller is on no processor.
        """
        with self._lock:
            self._usable[index] = False
            while self._owner[index] is not None:
                self.lps[index].interrupt()
                self._lock.wait(_TICK)

    def set_offline(self, index: int) -> None:
        """A drained processor is gone: calls to it fail."""
        self._online[index] = self._usable[index] = False

    def set_online(self, index: int) -> None:
        """Threads may run there."""
        with self._lock:
            self._online[index] = self._usable[index] = True
            self._lock.notify_all()

    @contextmanager
    def run(self, prefer: int | None = None) -> Iterator[LogicalProcessor]:
        """Run the calling thread on a processor, `prefer` if it is idle. Nested uses stay where they are."""
        index = self.here
        if index is not None:
            yield self.lps[index]
            return
        index = self._take(prefer)
        try:
            yield self.lps[index]
        finally:
            self._give(index)

    def yield_if_wanted(self, lp: LogicalProcessor) -> bool:
        """Run the calls queued for this processor; answer whether another thread waits for one (need_resched)."""
        self._serve(lp.index)
        return bool(self._queue) or not self._usable[lp.index]

    def call_on(self, index: int, function: Callable[[LogicalProcessor], _T]) -> _T:
        """Run `function` on processor `index` and wait for it (an IPI, when another thread runs there).

        KvmError(ENODEV) when the processor is offline.
        """
        if not self._online[index]:
            raise KvmError(errno.ENODEV, f"processor {index} is offline")
        if self.here == index:
            return function(self.lps[index])
        call = _Call(function)
        self._calls[index].append(call)
        while not call.done.is_set():
            with self._lock:
                idle = self._owner[index] is None
                if idle:
                    self._owner[index] = threading.get_ident()
            if idle:
                self._serve(index)
                with self._lock:
                    self._owner[index] = None
                    self._lock.notify_all()
                continue
            self.lps[index].interrupt()
            here = self.here
            if here is not None:
                self._serve(here)  # two processors may be calling each other
            call.done.wait(_TICK)
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]

    def _take(self, prefer: int | None) -> int:
        with self._lock:
            # In turn: who gave way would otherwise be the first to be back, again and again.
            ticket = object()
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or (index := self._idle(prefer)) is None:
                    usable = [index for index in range(len(self.lps)) if self._usable[index]]
                    longest = min(usable, key=self._since.__getitem__)
                    self.lps[longest].interrupt()
                    self._lock.wait(_TICK)
            finally:
                self._queue.remove(ticket)
                self._lock.notify_all()
            self._turns += 1
            self._owner[index], self._since[index] = threading.get_ident(), self._turns
        self._here.index = index
        return index

    def _idle(self, prefer: int | None) -> int | None:
        if prefer is not None and self._owner[prefer] is None and self._usable[prefer]:
            return prefer
        return next((i for i, owner in enumerate(self._owner) if owner is None and self._usable[i]), None)

    def _give(self, index: int) -> None:
        self._serve(index)
        del self._here.index
        with self._lock:
            self._owner[index] = None
            self._lock.notify_all()

    def _serve(self, index: int) -> None:
        lp, calls = self.lps[index], self._calls[index]
        if lp.interrupt_pending:
            lp.acknowledge_interrupt()
        while calls:
            try:
                call = calls.popleft()
            except IndexError:
                return
            before = self.here
            self._here.index = index
            try:
                call.run(lp)
            finally:
                if before is None:
                    del self._here.index
                else:
                    self._here.index = before
