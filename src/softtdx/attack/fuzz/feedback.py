"""Coverage guidance for calls: which answers a run has seen, and what led to the new ones.

The measure of coverage is what a caller can see: the leaf, its status with the operand it blames, the state of the
module and of what the operands named. A call that succeeded where it never had before is kept with the call before it;
later calls repeat such sequences with changes, and take operands from them. There is no instrumentation, so guidance
costs a dictionary look-up a call.
"""

import random
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["Corpus"]

Step = TypeVar("Step")

_LONGEST = 2  # steps of a kept sequence
_REPEATED, _CHANGED = 0.15, 0.4  # share of draws that begin a known sequence, of its steps that are changed
_CHANGED_OF_A_PLAN = 0.04
_MOST = 4096  # sequences
_RECENT = 32


class Corpus(Generic[Step]):
    """Sequences of steps worth repeating. `seen` are the tuples that were met."""

    def __init__(
        self,
        rng: random.Random,
        fresh: Callable[[], Step],
        change: Callable[[Step], Step],
        scripts: Iterable[tuple[Step, ...]] = (),
    ) -> None:
        """`fresh` makes a step from nothing, `change` one from another; `scripts` are known from the start."""
        self.seen: set[Hashable] = set()
        self._rng, self._fresh, self._change = rng, fresh, change
        self._kept = list(scripts)
        self._queue: deque[Step] = deque()
        self._plan: deque[Step] = deque()
        self._past: deque[Step] = deque(maxlen=_LONGEST)

    def next(self) -> Step:
        """The step to do now: of a sequence that is being repeated, the first of another, or a fresh one."""
        rng = self._rng
        if self._plan:
            step = self._plan.popleft()
            return self._change(step) if rng.random() < _CHANGED_OF_A_PLAN else step
        if not self._queue:
            if not self._kept or rng.random() >= _REPEATED:
                return self._fresh()
            recent = rng.random() < 0.3
            self._queue.extend(rng.choice(self._kept[-_RECENT:] if recent else self._kept))
        step = self._queue.popleft()
        return self._change(step) if rng.random() < _CHANGED else step

    def learn(self, step: Step, signal: Hashable, *, good: bool) -> bool:
        """What a step led to, `good` if it succeeded; whether it was worth keeping."""
        self._past.append(step)
        if signal in self.seen:
            return False
        self.seen.add(signal)
        if not good:
            return False
        sequence = tuple(self._past)[-self._rng.randint(1, _LONGEST) :]
        if len(self._kept) < _MOST:
            self._kept.append(sequence)
        else:
            self._kept[self._rng.randrange(_MOST)] = sequence
        return True

    def plan(self, steps: Iterable[Step]) -> None:
        """What to do next, hardly changed."""
        self._plan.extend(steps)

    def forget_past(self) -> None:
        """The machine is another: what was done to the last one led to nothing here."""
        self._past.clear()
        self._queue.clear()
        self._plan.clear()
