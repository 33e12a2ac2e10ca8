"""`softtdx run --record`: what a program's run asked of the module can be replayed."""

import gzip
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from softtdx._silicon import PAYLOADS
from softtdx.cli.run import run
from softtdx.errors import SoftTdxError
from softtdx.hw import Platform
from softtdx.replay import record, replay
from softtdx.replay.recorder import RECORDING


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("payload") / "demo.elf"
    path.write_bytes(PAYLOADS["demo"])
    return path


@pytest.mark.parametrize("options", [["--vcpus", "2"], ["--debug-td"]], ids=["two vCPUs", "debug"])
def test_a_recorded_run_replays_without_a_difference(demo: Path, tmp_path: Path, options: list[str]) -> None:
    result = CliRunner().invoke(run, [str(demo), "--json", "--record", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    report = replay(tmp_path)
    assert [str(m) for m in report.mismatches] == []
    assert not report.skipped
    assert {"TDH.MEM.PAGE.ADD", "TDH.VP.ENTER", "TDG.MR.REPORT", "TDG.VP.VMCALL"} <= set(report.kinds)


def test_a_recording_holds_what_the_module_read(demo: Path, tmp_path: Path) -> None:
    CliRunner().invoke(run, [str(demo), "--json", "--record", str(tmp_path)])
    with gzip.open(tmp_path / RECORDING, "rt") as lines:
        steps = [json.loads(line) for line in lines]
    assert steps[0] == {"n": 0, "op": "header", "base": None}
    assert [step["n"] for step in steps] == list(range(len(steps)))
    at = next(n for n, step in enumerate(steps) if step.get("name") == "TDH.MNG.INIT")
    assert (steps[at - 1]["op"], steps[at - 1]["len"]) == ("mem", 1024)
    assert steps[at - 1]["pa"] == steps[at]["in"]["rdx"]


def test_an_ordinary_vm_has_nothing_to_record(demo: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(run, [str(demo), "--vm", "--record", str(tmp_path)])
    assert isinstance(result.exception, SoftTdxError)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SoftTdxError, match="file"), record(Platform(), tmp_path / "file" / "folder"):
        pass
