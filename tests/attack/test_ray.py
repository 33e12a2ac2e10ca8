"""Campaigns on Ray: two nodes of this machine, one of which is lost in the middle; a cluster of the campaign's own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softtdx.attack import engines
from softtdx.attack.engines import CampaignError, RayEngine

SCENARIO = Path(__file__).with_name("ray_scenario.py")
PATIENCE = 880  # of a machine that is busy with something else


@pytest.fixture
def ray_installed():
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must install the extra: softtdx[ray]")
        pytest.skip("Ray is not installed: pip install 'softtdx[ray]'")


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(PATIENCE + 20)
def test_a_campaign_survives_the_loss_of_one_of_two_nodes(ray_installed, tmp_path):
    report = run(SCENARIO, tmp_path)
    campaign = report["campaign"]
    assert campaign["jobs"] == 8
    assert campaign["steps"] == 70  # the seed that kills its process does none
    assert {found["signature"]: found["times"] for found in campaign["findings"]} == {
        "the one cause": 2,
        "files: the process died": 1,
    }
    assert report["tries"].count(4) == 3, "a seed that kills its process is tried again, alone, before it is blamed"
    assert report["tries"].count(report["lost"]) >= 2, "what the lost node did was done again"
    assert (report["again"], report["tried_again"]) == (campaign, 0)
    assert report["listening"] == ["127.0.0.1"], "Ray listens on loopback only"


@pytest.mark.timeout(PATIENCE + 20)
def test_the_command_runs_on_a_cluster_of_its_own(ray_installed):
    command = "campaign --engine ray --workers 1 --target files --seeds 2 --steps 100 --json"
    assert run("-m", "softtdx", *command.split()) == {"jobs": 2, "steps": 200, "findings": []}


def test_without_ray_the_way_out_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(CampaignError, match="--engine local"):
        RayEngine()


def test_where_there_is_no_cluster_the_way_out_is_said(monkeypatch):
    class NoCluster:
        @staticmethod
        def init(**_):
            raise ConnectionError("nobody answers")

        @staticmethod
        def shutdown():
            pass

    monkeypatch.setattr(engines, "_import_ray", lambda address: NoCluster)
    with pytest.raises(CampaignError, match="ray start --head"), RayEngine(address="10.0.0.1:6379"):
        pass


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_cluster_that_starts_slowly_is_started_again(failures, monkeypatch):
    done = []

    class Slow:
        @staticmethod
        def init(**options):
            assert options["_node_ip_address"] == "127.0.0.1"
            done.append("start")
            if len(done) <= 2 * failures:
                raise Exception("timed out during startup")

        @staticmethod
        def shutdown():
            done.append("stop")

    monkeypatch.setattr(engines, "_import_ray", lambda address: Slow)
    if failures == 3:
        with pytest.raises(CampaignError, match="timed out"), RayEngine():
            pass
    else:
        with RayEngine():
            pass
    assert done == (["start", "stop"] * 3 if failures == 3 else ["start", "stop"] * failures + ["start", "stop"])


def test_no_workers_are_refused():
    with pytest.raises(CampaignError, match="worker"):
        RayEngine(0)
