"""Fuzzing: a short slice of every target each time, long ones at night; and campaigns of many seeds."""

import json
import os
import random

import pytest
from click.testing import CliRunner

from softtdx.attack import fuzz as fuzzing
from softtdx.attack.campaign import CampaignError, CampaignState, Job, run_campaign
from softtdx.attack.fuzz import TARGETS, Finding, Fuzzed, fuzz
from softtdx.cli.campaign import campaign
from softtdx.errors import SoftTdxError

SLICE = {"seamcall": 4000, "tdcall": 1000, "code": 200, "ioctl": 2000, "files": 4000}
NIGHT = {"seamcall": 5_000_000, "tdcall": 5_000_000, "code": 120_000, "ioctl": 1_000_000, "files": 1_000_000}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_short_run(target, seed):
    result = fuzz(target, seed, SLICE[target])
    assert result.findings == ()
    assert result.steps >= SLICE[target]


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_long_run(target):
    part = NIGHT[target] // 20
    state = run_campaign([Job(target, seed, part) for seed in range(1000, 1020)], workers=os.cpu_count() or 1)
    assert state.findings == {}
    assert state.steps >= NIGHT[target]


def broken(rng, steps):
    for step in range(steps):
        if rng.randrange(10) == 0:
            raise ZeroDivisionError(f"at {step:#x}")
        yield 1


def test_what_a_target_raises_is_a_finding_and_the_run_goes_on(monkeypatch):
    monkeypatch.setitem(fuzzing.TARGETS, "broken", broken)
    result = fuzz("broken", 3, 200)
    assert len(result.findings) > 5
    assert len({found.signature for found in result.findings}) < len(result.findings)
    assert result == fuzz("broken", 3, 200)
    assert result != fuzz("broken", 4, 200)


def test_a_target_that_does_not_exist_is_refused():
    with pytest.raises(SoftTdxError, match="seamcall"):
        fuzz("seamcal", 1, 1)


@pytest.mark.parametrize("how", ["lock", "plaintext", "module"])
def test_a_broken_invariant_is_seen(how):
    world = fuzzing._TdWorld()
    world.check(thorough=True)
    platform = world.host.platform
    if how == "lock":
        platform.seam.module.g.locks.acquire(0x1000, True)
    elif how == "plaintext":
        platform.memory.write(world.secret, 2 * fuzzing._MARK)
    else:
        platform.seam.unbreakable_shutdown(to_loader=False)
    with pytest.raises(fuzzing._BrokenError):
        world.check(thorough=True)


def numbers(target, seed, steps):
    """A worker: seed 3 finds something, seed 5 dies."""
    if seed == 5:
        os._exit(9)
    found = (Finding(target, seed, 1, "the one cause", "here"),) if seed % 3 == 0 else ()
    return Fuzzed(steps, found)


def test_a_campaign_merges_findings_and_survives_the_death_of_a_worker(tmp_path):
    path = tmp_path / "state.json"
    state = run_campaign([Job("files", seed, 10) for seed in (1, 3, 5, 6)], workers=2, state_file=path, worker=numbers)
    assert set(state.findings) == {"the one cause", "files: the process died"}
    assert state.findings["files: the process died"].seed == 5
    assert state.times["the one cause"] == 2
    assert len(state.done) == 4
    assert CampaignState.load(path).describe() == state.describe()


def test_a_campaign_goes_on_where_it_was(tmp_path):
    path = tmp_path / "state.json"
    first = run_campaign([Job("files", 1, 10)], state_file=path, worker=numbers)
    assert first.steps == 10
    jobs = [Job("files", 1, 10), Job("files", 2, 20), Job("files", 2, 20)]
    tried = []
    again = run_campaign(jobs, state_file=path, worker=numbers, progress=lambda state: tried.append(state.steps))
    assert tried == [30]
    assert again.steps == 30


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2}', '{"version": 1, "done": 3}',
     '{"version":1,"done":{},"findings":[{}],"times":{}}', '{"version":1,"done":{"a":"b"},"findings":[],"times":{}}',
     "\0", "[" * 100_000],
)  # fmt: skip
def test_a_state_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "state.json"
    path.write_text(text)
    with pytest.raises(CampaignError, match="state"):
        CampaignState.load(path)


def test_a_campaign_with_bad_arguments_is_refused(tmp_path):
    with pytest.raises(CampaignError, match="worker"):
        run_campaign([], workers=0)
    with pytest.raises(CampaignError, match="target"):
        run_campaign([Job("nothing", 1, 1)])
    with pytest.raises(CampaignError, match="written"):
        run_campaign([Job("files", 1, 10)], worker=numbers, state_file=tmp_path / "no" / "such" / "folder")


def test_the_command_reports_as_json():
    options = ["--target", "files", "--seeds", "2", "--steps", "100", "--json"]
    result = CliRunner().invoke(campaign, options, standalone_mode=False)
    assert result.return_value == 0
    assert json.loads(result.stdout) == {"jobs": 2, "steps": 200, "findings": []}
    refused = CliRunner().invoke(campaign, ["--target", "nothing"], standalone_mode=False)
    assert isinstance(refused.exception, SoftTdxError)


def test_the_numbers_of_a_seed_are_its_own():
    world = fuzzing._TdWorld()
    first = [world.operand(random.Random(1)) for _ in range(5)]
    assert first == [world.operand(random.Random(1)) for _ in range(5)]
