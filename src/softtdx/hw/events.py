"""The one event stream: every crossing of a wall, published where it happens."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Event", "EventStream"]


@dataclass(frozen=True, slots=True)
class Event:
    """One crossing.

    `kind`: "seamcall", "seamldr", "tdcall", "td_exit" (the module left the TD for the host), "vm_exit" (the TD
    or VM left for its VMM's root mode), "ve" (#VE given to a TD), "key" (PCONFIG), "hypercall", "console", ...
    `lp`: index of the logical processor. `data`: what the kind says, JSON-able.
    """

    kind: str
    lp: int
    data: dict[str, Any] = field(default_factory=dict)


class EventStream:
    """Publishes `Event`s to its subscribers, in order, on the thread where they happen.

    Publishers test `stream.active` before they build an event, so with no subscriber a crossing costs one
    attribute look-up. `counts` and `by_number` (kind and leaf, or kind and exit reason, of what the module does) are
    always kept: they are what reports and `top` show.
    """

    def __init__(self) -> None:
        """A stream that nobody listens to."""
        self.active = False
        self.counts: Counter[str] = Counter()
        self.by_number: Counter[tuple[str, int]] = Counter()
        self._subscribers: tuple[Callable[[Event], None], ...] = ()

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event from now on; the function returned ends that."""
        self._subscribers = (*self._subscribers, callback)
        self.active = True

        def unsubscribe() -> None:
            self._subscribers = tuple(s for s in self._subscribers if s is not callback)
            self.active = bool(self._subscribers)

        return unsubscribe

    @contextmanager
    def collect(self, *kinds: str) -> Iterator[list[Event]]:
        """A list that fills with the events (of `kinds`, or all) that happen in the block."""
        events: list[Event] = []
        end = self.subscribe(lambda event: events.append(event) if not kinds or event.kind in kinds else None)
        try:
            yield events
        finally:
            end()

    def publish(self, kind: str, lp: int, **data: Any) -> None:
        """Tell every subscriber. The caller has seen `active`."""
        event = Event(kind, lp, data)
        for subscriber in self._subscribers:
            subscriber(event)
