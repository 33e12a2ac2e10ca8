"""`softtdx run` and `softtdx demo` as a user meets them."""

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from softtdx._silicon import PAYLOADS
from softtdx.cli import cli
from softtdx.errors import SoftTdxError

SPIN = bytes.fromhex("66baf803b02eeeebfe")  # prints a dot, then spins


def softtdx(*args):
    return CliRunner().invoke(cli, [str(a) for a in args], standalone_mode=False)


@pytest.fixture
def demo_payload(tmp_path):
    file = tmp_path / "demo"
    file.write_bytes(PAYLOADS["demo"])
    return file


def test_the_demo_reports_everything_it_promises():
    result = softtdx("demo", "--json")
    assert result.exception is None
    assert result.return_value == 0
    facts = json.loads(result.stdout)
    assert facts["quote_status"] == "UpToDate"
    assert facts["verifier"] == "dcap-qvl"
    assert len(bytes.fromhex(facts["mrtd"])) == 48
    assert [len(r) for r in facts["rtmrs"]] == [96] * 4
    assert "Hello from" in facts["console"]
    for key in ("seamcalls", "td_exits", "guest_instructions"):
        assert facts[key] > 100
    assert 0 < facts["wall_s"] < 600


def test_the_demo_for_people_shows_the_console_and_the_verdict():
    result = softtdx("demo")
    assert result.return_value == 0
    assert "│ Goodbye." in result.stdout
    assert "UpToDate" in result.stdout
    assert "\x1b" not in result.stdout  # no colours off a terminal


def test_a_run_passes_the_guests_console_and_status_on(tmp_path):
    payload = tmp_path / "flat"
    payload.write_bytes(bytes.fromhex("66baf803b041ee66ba0105b003ee"))
    result = softtdx("run", payload, "--memory", "2M")
    assert (result.stdout, result.return_value) == ("A\n", 3)


@pytest.mark.parametrize("extra", [(), ("--vm",), ("--debug-td",)])
def test_json_of_a_run(demo_payload, extra):
    result = softtdx("run", demo_payload, "--memory", "8M", "--json", *extra)
    facts = json.loads(result.stdout)
    assert (facts["end"], facts["guest_status"], result.return_value) == ("exit", 0, 0)
    assert (facts["mrtd"] is None) == ("--vm" in extra)
    assert ("under debug" in facts["console"]) == ("--debug-td" in extra)


def test_quote_and_trace_go_to_files(demo_payload, tmp_path):
    quote, trace = tmp_path / "quote.bin", tmp_path / "trace.jsonl"
    result = softtdx("run", demo_payload, "--memory", "8M", "--quote-out", quote, "--trace", trace)
    assert result.return_value == 0
    assert quote.read_bytes()[:2] == b"\x04\x00"
    rows = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [row["n"] for row in rows] == list(range(len(rows)))
    assert {"seamcall", "tdcall", "hypercall"} <= {row["kind"] for row in rows}


def test_a_platform_file_describes_the_machine(demo_payload, tmp_path):
    file = tmp_path / "machine.toml"
    file.write_text('base = "spr"\nlps = 1\nseed = 7\n')
    assert softtdx("run", demo_payload, "--memory", "8M", "--platform", file).return_value == 0


@pytest.mark.parametrize(
    ("content", "args", "why"),
    [
        (None, (), "No such file"),
        (b"", (), "is empty"),
        (b"\x7fELF\x01\x01", (), "cut off"),
        (bytes(3 << 20), ("--memory", "2M"), "give --memory more"),
        (b"\xf4", ("--memory", "100K"), "at least 1 MiB"),
        (b"\xf4", ("--memory", "8G"), "at most 3 GiB"),
        (b"\xf4", ("--vcpus", "0"), "1 to 64"),
        (b"\xf4", ("--vm", "--debug-td"), "--vm goes without"),
        (b"\xf4", ("--platform", "/nowhere.toml"), "cannot read the platform"),
        (b"\xf4", ("--trace", "/nowhere/trace"), "cannot write the trace"),
        (b"\xf4", ("--quote-out", "quote.bin", "--memory", "2M"), "asked for no quote"),
        (b"\xf4", ("--memory", "2G"), "give --memory less"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(tmp_path, monkeypatch, content, args, why):
    monkeypatch.chdir(tmp_path)
    payload = tmp_path / "payload"
    if content is not None:
        payload.write_bytes(content)
    result = softtdx("run", payload, *args)
    assert isinstance(result.exception, SoftTdxError), result.output
    with pytest.raises(SoftTdxError, match=why):
        raise result.exception
    assert "\n" not in str(result.exception)
    assert {file.name for file in tmp_path.iterdir()} <= {"payload"}


@pytest.mark.parametrize("size", ["64X", "-1", "", "1.5G", "9" * 30])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    result = softtdx("run", tmp_path / "x", f"--memory={size}")
    assert "is not a size" in str(result.exception)


@pytest.mark.parametrize("vm", [(), ("--vm",)])
def test_ctrl_c_stops_a_run_cleanly(tmp_path, vm):
    payload = tmp_path / "spin"
    payload.write_bytes(SPIN)
    command = [sys.executable, "-m", "softtdx", "run", str(payload), "--memory", "2M", *vm]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.read(1) == b"."
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert errors.strip() == b"softtdx: interrupted"
