"""Tables of refusals: every way in which a leaf refuses a call, in the order of its checks, and how that is checked."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import combinations
from typing import NamedTuple

from scenario import Row, Scenario
from tdx_machine import Leaf, status

from softtdx.abi.status import Status


class Refusals(NamedTuple):
    """A leaf, operands with which it succeeds, and its refusals in the order of its checks."""

    leaf: Leaf
    good: dict[str, int]
    rows: list[Row]
    version: int = 0


@contextmanager
def _faults(scenario: Scenario, refusals: Refusals, rows: tuple[Row, ...]) -> Iterator[dict[str, int]]:
    operands = dict(refusals.good)
    for row in rows:
        operands |= row.operands
    with ExitStack() as locks:
        for row in rows:
            locks.enter_context(scenario.holding(row.held, operands))
        yield operands


def refuse(scenario: Scenario, refusals: Refusals, rows: tuple[Row, ...]) -> tuple[Status, int]:
    """Make the call with the faults of all `rows`; returns (status, detail)."""
    with _faults(scenario, refusals, rows) as operands:
        return status(scenario.machine.call(refusals.leaf, version=refusals.version, **operands).rax)


def check_each(scenario: Scenario, refusals: Refusals) -> None:
    """Each fault alone has its status, changes nothing and leaves no lock behind."""
    before = scenario.fingerprint()
    for row in refusals.rows:
        assert refuse(scenario, refusals, (row,)) == (row.want, row.detail), row.name
        assert scenario.fingerprint() == before, row.name
        assert scenario.nothing_held(), row.name


def check_order(scenario: Scenario, refusals: Refusals) -> None:
    """Of two faults the one that is checked first is reported."""
    before = scenario.fingerprint()
    for first, second in combinations(refusals.rows, 2):
        if first.operands.keys() & second.operands.keys() or (first.held and first.held == second.held):
            continue
        register = second.held.partition(":")[2]
        if second.held.startswith("page:") and refusals.good[register] in first.operands.values():
            continue  # the lock would be met earlier, under another name
        assert refuse(scenario, refusals, (first, second)) == (first.want, first.detail), f"{first}, {second}"
    assert scenario.fingerprint() == before
    assert scenario.nothing_held()
