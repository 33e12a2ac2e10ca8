"""What every fuzzing target shares: a run of one seed, and what a finding is."""

import random
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["EDGES", "Finding", "Fuzzed", "Target", "run_target"]

U64 = (1 << 64) - 1
EDGES = (0, 1, 2, 3, 7, 8, 63, 64, 0xFFF, 0x1000, 0x1FFFFF, 1 << 30, 1 << 47, 1 << 51, 1 << 52, 1 << 63, U64)
"""Numbers at which something changes."""
_MOST_FINDINGS = 100
_CALL = " | "  # in a message, before what belongs to one call only

Target = Callable[[random.Random, int], Iterator[int]]
"""(generator of randomness, steps) -> counts of steps that were done. What it raises is a finding."""


@dataclass(frozen=True)
class Finding:
    """Something that must not happen. `signature` is equal for equal causes; `seed` reproduces it."""

    target: str
    seed: int
    step: int
    signature: str
    detail: str


@dataclass(frozen=True)
class Fuzzed:
    """A run: how many steps were done (calls, files, or thousands of retired instructions) and what was found."""

    steps: int
    findings: tuple[Finding, ...]


def run_target(name: str, target: Target, seed: int, steps: int) -> Fuzzed:
    """Run one seed of a target; after a finding it starts anew, until there are too many of them."""
    done, found = 0, []
    stream = target(random.Random(f"{name} {seed}"), steps)
    while done < steps:
        try:
            for count in stream:
                done += count
            break
        except Exception as error:  # whatever it is, it is what is looked for
            found.append(_finding(name, seed, done, error))
            if len(found) == _MOST_FINDINGS:
                break
            stream = target(random.Random(f"{name} {seed} {len(found)}"), steps - done)
    return Fuzzed(done, tuple(found))


def _finding(target: str, seed: int, step: int, error: Exception) -> Finding:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "softtdx" in f.filename]
    where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.name}" for f in frames[:-4:-1])
    cause = str(error).split(_CALL)[0]
    text = "".join("0" if c in "0123456789abcdef" else c for c in cause)  # addresses differ, the cause does not
    signature = f"{target}: {type(error).__name__} {text[:80]} at {where}"
    return Finding(target, seed, step, signature, f"{type(error).__name__}: {error}")
