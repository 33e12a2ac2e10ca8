"""The module against recorded behaviour of a real one, and the replayer against recordings that are wrong."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from softtdx.cli.replay import replay_command
from softtdx.replay import Report, TraceError, replay

Step = dict[str, Any]
LATER = "service TDs, migration and L2 VMs come later"


def test_every_comparable_step_of_every_recording_agrees(traces: Path) -> None:
    report = replay(traces)
    assert [str(m) for m in report.mismatches] == []
    assert report.compared > 14_000
    assert set(report.skipped) <= {LATER}


@pytest.fixture
def folder(traces: Path, tmp_path: Path) -> Path:
    """A folder with the machine, the base recording and room for a changed one."""
    for name in ("platform.json", "base_sys.jsonl.gz"):
        shutil.copy(traces / name, tmp_path / name)
    return tmp_path


def steps_of(traces: Path, name: str) -> list[Step]:
    with gzip.open(traces / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def replay_changed(traces: Path, folder: Path, name: str, change: Callable[[list[Step]], None]) -> Report:
    steps = steps_of(traces, name)
    for number, step in enumerate(steps):
        step["n"] = number
    change(steps)
    (folder / "changed.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return replay(folder, ["changed"])


def first(steps: list[Step], **values: Any) -> Step:
    return next(s for s in steps if all(s.get(key) == value for key, value in values.items()))


def only_mismatch(report: Report) -> tuple[str, list[str]]:
    """(what kind of step, what differs in it)."""
    assert report.mismatched == 1, [str(m) for m in report.mismatches]
    return report.mismatches[0].kind, [what for what, _, _ in report.mismatches[0].differences]


def test_another_status_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, name="TDH.MNG.CREATE")["st"] = "0xc000010000000001"

    assert only_mismatch(replay_changed(traces, folder, "02_td_build", change)) == ("TDH.MNG.CREATE", ["st"])


def test_a_register_that_should_have_changed_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, name="TDH.MNG.CREATE")["out"]["r9"] = "0x5"

    assert only_mismatch(replay_changed(traces, folder, "02_td_build", change)) == ("TDH.MNG.CREATE", ["r9"])


def test_memory_that_reads_otherwise_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, op="gread")["data"] = [[0, "11" * 16]]

    kind, differences = only_mismatch(replay_changed(traces, folder, "04_sept_life", change))
    assert kind.startswith("gread")
    assert differences[0] == "offset 0x0"


@pytest.mark.parametrize("gpa", ["0x7f0000000000", "0x9000"])
def test_memory_that_a_td_does_not_have_is_one_difference_and_the_rest_is_played(
    traces: Path, folder: Path, gpa: str
) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, op="gread")["gpa"] = gpa

    report = replay_changed(traces, folder, "04_sept_life", change)
    kind, what = only_mismatch(report)
    assert (kind, what) == ("gread", ["error"])
    assert report.compared > 250, "most of it comes later"


def test_a_guest_register_at_entry_that_differs_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, name="TDH.VP.ENTER", st="entered")["guest"]["rbx"] = "0x31"

    assert only_mismatch(replay_changed(traces, folder, "02_td_build", change)) == ("TDH.VP.ENTER", ["rbx"])


def test_a_tdcall_that_answers_otherwise_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        first(steps, name="TDG.VP.INFO")["out"]["r8"] = "0x77"

    assert only_mismatch(replay_changed(traces, folder, "20_tdcall", change)) == ("TDG.VP.INFO", ["r8"])


def test_a_td_exit_where_the_td_should_go_on_is_reported(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        del steps[steps.index(first(steps, res="tdexit")) + 1 :]
        event = steps[-1]
        event["res"] = "resume"
        event.pop("host")

    kind, differences = only_mismatch(replay_changed(traces, folder, "02_td_build", change))
    assert kind
    assert differences == ["result"]


def test_what_a_discard_group_does_is_undone(traces: Path, folder: Path) -> None:
    def change(steps: list[Step]) -> None:
        create = first(steps, name="TDH.MNG.CREATE")
        at = steps.index(create)
        steps[at:at] = [create | {"discard": 1}, create | {"discard": 2}]

    report = replay_changed(traces, folder, "02_td_build", change)
    assert report.mismatched == 0


@pytest.mark.parametrize("content", ["", "{}\n", '{"op":"header"}\nnothing\n', '{"op":"header"}\n[1]\n'])
def test_a_file_that_is_no_recording_is_refused(folder: Path, content: str) -> None:
    (folder / "broken.jsonl").write_text(content)
    with pytest.raises(TraceError, match=r"broken\.jsonl"):
        replay(folder, ["broken"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"seamrr": 5}'])
def test_a_machine_description_that_says_nothing_is_refused(folder: Path, content: str) -> None:
    (folder / "platform.json").write_text(content)
    with pytest.raises(TraceError, match=r"platform\.json"):
        replay(folder, ["base_sys"])


def test_a_recording_whose_base_is_missing_is_refused(traces: Path, folder: Path) -> None:
    shutil.copy(traces / "02_td_build.jsonl.gz", folder)
    (folder / "base_sys.jsonl.gz").unlink()
    with pytest.raises(TraceError, match="base_sys"):
        replay(folder, ["02_td_build"])


def test_a_damaged_archive_is_refused(folder: Path) -> None:
    path = folder / "base_sys.jsonl.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TraceError, match="base_sys"):
        replay(folder, ["base_sys"])


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no recordings|platform\.json"):
        replay(tmp_path)


def test_the_command_prints_counts_and_exits_with_0(folder: Path) -> None:
    result = CliRunner().invoke(replay_command, [str(folder), "base_sys"])
    assert result.exit_code == 0
    assert "0 mismatched" in result.output


def test_the_command_prints_one_json_object(folder: Path) -> None:
    result = CliRunner().invoke(replay_command, [str(folder), "base_sys", "--json"])
    report = json.loads(result.output)
    assert report["compared"] == report["matched"] > 200


def test_the_command_shows_mismatches_in_full_and_exits_with_1(traces: Path, folder: Path) -> None:
    steps = steps_of(traces, "base_sys")
    first(steps, name="TDH.SYS.INIT")["st"] = "0x1"
    (folder / "changed.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    result = CliRunner().invoke(replay_command, [str(folder), "changed"])
    assert result.exit_code == 1
    assert "TDH.SYS.INIT" in result.output
    assert "recorded 0x1" in result.output
