"""Random calls of hosts and guests against an independent model of ownership; the long campaign is a nightly job."""

import os
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from ownership import Campaign

NIGHTLY_CALLS = int(os.environ.get("SOFTTDX_NIGHTLY_CALLS", "200000"))
CALLS_PER_MACHINE = 4000


class _Drawn:
    """Hypothesis chooses."""

    def __init__(self) -> None:
        self.data: Any = None

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.data.draw(st.integers(0, len(options) - 1))]


class Ownership(RuleBasedStateMachine):
    """Each rule is one random operation; after it the model and the structures in DRAM agree."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = _Drawn()
        self.campaign = Campaign(self.drawn)

    @rule(data=st.data())
    def something_happens(self, data: Any) -> None:
        self.drawn.data = data
        self.campaign.step()

    def teardown(self) -> None:
        self.campaign.close()


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(
    max_examples=8, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


class Seeded:
    """A seeded generator chooses."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def pick(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)


def run(seed: int, calls: int) -> int:
    """One machine, at least `calls` calls; returns how many were made."""
    campaign = Campaign(Seeded(seed))
    try:
        while campaign.calls < calls:
            campaign.step()
    finally:
        campaign.close()
    return campaign.calls


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_random_calls_break_no_rule_of_ownership(seed: int) -> None:
    assert run(seed, 1000) >= 1000


@pytest.mark.nightly
def test_two_hundred_thousand_random_calls_break_no_rule_of_ownership() -> None:
    made, seed = 0, 1000
    while made < NIGHTLY_CALLS:
        made += run(seed, min(CALLS_PER_MACHINE, NIGHTLY_CALLS - made))
        seed += 1
