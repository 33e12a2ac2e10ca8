"""Fuzzing: a short slice of every target each time, long ones at night; and campaigns of many seeds."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf
from softtdx.attack import fuzz as fuzzing
from softtdx.attack.caches import KEYID_USED_TWICE
from softtdx.attack.campaign import CampaignError, CampaignState, Job, run_campaign
from softtdx.attack.engines import LocalEngine
from softtdx.attack.flawed import Flaw, attackers_key, image_with, signed
from softtdx.attack.fuzz import TARGETS, Finding, Fuzzed, fuzz, machine_code, walls
from softtdx.attack.fuzz import world as world_module
from softtdx.attack.fuzz.calls import fresh, kinds_of
from softtdx.attack.fuzz.feedback import Corpus
from softtdx.attack.fuzz.walls import Walls
from softtdx.attack.fuzz.world import Stage, World
from softtdx.attack.module_image import NO_DEBUG_CHECK
from softtdx.cli.campaign import _STEPS, campaign
from softtdx.errors import SoftTdxError
from softtdx.seamldr.sigstruct import KEY_BITS, signer_hash

SLICE = {"seamcall": 4000, "tdcall": 2000, "guest": 500, "code": 500, "ioctl": 4000, "files": 4000, "loader": 300}
NIGHT = {
    "seamcall": 5_000_000, "tdcall": 5_000_000, "guest": 200_000, "code": 120_000, "ioctl": 1_000_000,
    "files": 1_000_000, "loader": 50_000,
}  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_short_run(target, seed):
    result = fuzz(target, seed, SLICE[target])
    assert result.findings == ()
    assert result.steps == SLICE[target]


@pytest.mark.nightly
@pytest.mark.timeout(0)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_long_run(target):
    part = NIGHT[target] // 20
    state = run_campaign(
        [Job(target, seed, part) for seed in range(1000, 1020)], engine=LocalEngine(os.cpu_count() or 1)
    )
    assert state.findings == {}
    assert state.steps == NIGHT[target]


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


class Defective:
    """A TDX module with a defect: SEAMCALL passes through here."""

    def __init__(self, world, how):
        self.module, self.how = world.platform.seam.module, how
        self.g = self.module.g
        self.word, self.page = world.secrets[0], world.numbers["page"][0]
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.module, name)

    def seam_entry(self, cpu, regs):
        self.module.seam_entry(cpu, regs)
        self.calls += 1
        if self.how == "refuses and writes" and regs.rax >> 63:
            bepoch = self.g.blocks[0].e4k + (self.page >> 12) * 16 + 8
            cpu.wr64(bepoch, self.calls)
        if self.calls % 50:
            return
        if self.how == "keeps a lock":
            self.g.locks.acquire(0x1000, True)
        elif self.how == "leaks a register":
            regs.r11 = self.word
        elif self.how == "makes statuses up":
            regs.rax = 0xC0FF_EE00_0000_0000


@pytest.mark.parametrize("how", ["keeps a lock", "leaks a register", "refuses and writes", "makes statuses up"])
def test_a_defect_of_the_module_is_found(how, monkeypatch):
    populate = World._populate

    def with_defect(world, rng):
        populate(world, rng)
        world.platform.seam.module = Defective(world, how)

    monkeypatch.setattr(World, "_populate", with_defect)
    monkeypatch.setattr(walls, "_STAGES", (Stage.POPULATED,))
    assert fuzz("seamcall", 1, 2000).findings


FLAWS = {
    "a host looks into production TDs": (NO_DEBUG_CHECK,),
    "a KeyID is given twice": KEYID_USED_TWICE,
    "an S-EPT page that is removed stays counted": (
        Flaw("leaves/mem_sept.py", "td.add_children(-1 - len(tables))", "td.add_children(-len(tables))"),
    ),
    "pages are taken for what they are not": (
        Flaw("pamt.py", "    if page.first >> TYPE_SHIFT & 0xFF != expected:\n", "    if False:\n"),
    ),
}


@pytest.mark.parametrize("flaws", FLAWS.values(), ids=FLAWS)
def test_a_flaw_in_one_line_of_the_module_is_found(flaws, monkeypatch):
    release = signed(image_with(*flaws), attackers_key())
    modulus = attackers_key().public_key().public_numbers().n.to_bytes(KEY_BITS // 8, "little")
    trusting = partial(world_module.launch_np_seamldr, signer=signer_hash(modulus))
    monkeypatch.setattr(world_module, "launch_np_seamldr", trusting)
    monkeypatch.setattr(world_module, "development_release", lambda: release)
    assert fuzz("seamcall", 1, 4000).findings


def test_operands_are_of_the_kinds_that_the_leaf_takes():
    assert kinds_of(SeamcallLeaf.MNG_CREATE) == {"rcx": "page", "rdx": "hkid"}
    assert kinds_of(TdcallLeaf.VP_RD) == {"rdx": "field vp"}, "which has the same number"
    assert kinds_of(SeamcallLeaf.MEM_PAGE_ADD) == {"rcx": "info", "rdx": "tdr", "r8": "page", "r9": "page"}
    assert kinds_of(SeamcallLeaf.SYS_CONFIG) == {"rcx": "buffer", "rdx": "edge", "r8": "hkid"}


def test_a_seed_does_the_same_each_time():
    def run(seed):
        walls = Walls(random.Random(seed), enters=0.3, host_inside=0.3, stages=(Stage.POPULATED, Stage.READY))
        while walls.host_calls < 1000:
            walls.step()
        return walls.host.seen, walls.guest.seen, walls.host_calls, walls.guest_calls

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_what_led_to_something_new_is_tried_again():
    rng = random.Random(1)
    corpus = Corpus(rng, lambda: "fresh", lambda step: step + "'")
    assert corpus.learn("a", 0, good=True)
    for feedback in range(1, 9):
        assert not corpus.learn("b", "refused", good=False)
        assert corpus.learn("c", feedback, good=True)
    assert not corpus.learn("d", 8, good=True)
    assert corpus.seen == {"refused", *range(9)}
    done = [corpus.next() for _ in range(1000)]
    assert {"fresh", "a", "c"} <= set(done), "new and known steps"
    assert {"a'", "c'"} & set(done), "and changed ones"
    assert ("b", "c") in set(pairwise(done)), "with what came before them"
    assert "d" not in done


def chance(run):
    return fresh(run.rng, run.rng.choice(run._host_leaves))


def test_feedback_leads_to_more_different_successes_than_chance():
    seen = {}
    for guided in (True, False):
        run = Walls(random.Random(7), enters=0.04, host_inside=0.3, stages=(Stage.POPULATED,))
        if not guided:
            run.host.next = partial(chance, run)
        while run.host_calls < 10_000:
            run.step()
        seen[guided] = sum(status == 0 for _, _, status, *_ in run.host.seen)
    assert seen[True] > seen[False]


def test_only_instructions_that_retired_count(monkeypatch):
    retired = []
    run = machine_code._Guest.run

    def counted(guest, index, wanted):
        retired.append(run(guest, index, wanted))
        return retired[-1]

    monkeypatch.setattr(machine_code._Guest, "run", counted)
    assert fuzz("code", 3, 50).steps == 50
    assert sum(retired) >= 50_000
    assert sum(retired[:-1]) < 50_000, "and no more was run than it took"


def test_every_mode_of_the_processor_is_given_code():
    modes = {machine_code._Guest(random.Random(seed), machine_code.boot_host(tdx=False)).bits for seed in range(12)}
    assert modes == {16, 32, 64}


def numbers(target, seed, steps):
    """A worker: seed 3 finds something, seed 5 dies."""
    if seed == 5:
        os._exit(9)
    found = (Finding(target, seed, 1, "the one cause", "here"),) if seed % 3 == 0 else ()
    return Fuzzed(steps, found)


def test_a_campaign_merges_findings_and_survives_the_death_of_a_worker(tmp_path):
    path = tmp_path / "state.json"
    state = run_campaign(
        [Job("files", seed, 10) for seed in (1, 3, 5, 6)], engine=LocalEngine(2), state_file=path, worker=numbers
    )
    assert set(state.findings) == {"the one cause", "files: the process died"}
    assert state.findings["files: the process died"].seed == 5
    assert state.times["the one cause"] == 2
    assert len(state.done) == 4
    assert CampaignState.load(path).describe() == state.describe()


def hangs(target, seed, steps):
    while True:
        pass


def test_a_worker_that_hangs_is_a_finding():
    state = run_campaign([Job("files", 1, 10)], engine=LocalEngine(patience=0.2), worker=hangs)
    assert set(state.findings) == {"files: the process died"}


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
        LocalEngine(0)
    with pytest.raises(CampaignError, match="target"):
        run_campaign([Job("nothing", 1, 1)])
    with pytest.raises(CampaignError, match="written"):
        run_campaign([Job("files", 1, 10)], worker=numbers, state_file=tmp_path / "no" / "such" / "folder")


def test_the_command_knows_every_target():
    assert set(_STEPS) == set(TARGETS) == set(SLICE) == set(NIGHT)


def test_the_command_reports_as_json():
    options = ["--target", "files", "--seeds", "2", "--steps", "100", "--json"]
    result = CliRunner().invoke(campaign, options, standalone_mode=False)
    assert result.return_value == 0
    assert json.loads(result.stdout) == {"jobs": 2, "steps": 200, "findings": []}
    refused = CliRunner().invoke(campaign, ["--target", "nothing"], standalone_mode=False)
    assert isinstance(refused.exception, SoftTdxError)


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, patience=60):
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_no_worker_outlives_its_campaign(ending):
    endless = ["campaign", "--target", "seamcall", "--seeds", "4", "--steps", "100000000", "--workers", "2"]
    with subprocess.Popen([sys.executable, "-m", "softtdx", *endless], stderr=subprocess.PIPE) as campaign:
        try:
            until(lambda: len(children_of(campaign.pid)) >= 3)  # two workers, and Python's resource tracker
            workers = children_of(campaign.pid)
            campaign.send_signal(ending)
            _, errors = campaign.communicate(timeout=60)
            until(lambda: not any(running(pid) for pid in workers))
        finally:
            campaign.kill()
    if ending == signal.SIGINT:
        assert (campaign.returncode, errors.strip()) == (130, b"softtdx: interrupted")
