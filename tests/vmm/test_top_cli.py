"""`softtdx top` as a user meets it."""

import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from softtdx.cli import cli
from softtdx.errors import SoftTdxError

# out 0x3f8, al for ever: an exit each time
CHATTY = bytes.fromhex("66baf803b02eeeebfd")


def top(*args):
    return CliRunner().invoke(cli, ["top", *(str(a) for a in args)], standalone_mode=False)


@pytest.fixture
def chatty(tmp_path):
    file = tmp_path / "chatty"
    file.write_bytes(CHATTY)
    return file


def test_a_sample_tells_what_a_td_and_a_vm_do(chatty):
    result = top("--json", "--once", "--interval", "0.5", chatty, f"vm:{chatty}")
    assert result.exception is None
    facts = json.loads(result.stdout)
    assert facts["keyids"] - facts["keyids_free"] == 1
    assert facts["seamcalls_per_s"] > 0
    assert facts["tdx_pages"]["TDR"] == 1
    assert 0.003 < facts["pamt_share"] < 0.006  # 1/256 of what the TDMRs cover
    td, vm = facts["vms"]
    assert (td["kind"], vm["kind"]) == ("TD", "VM")
    assert (td["state"], td["end"]) == ("runnable", "running")
    assert td["huge_pages"] > 0
    assert td["private_pages"] * 4096 >= 16 << 20
    assert td["exits_per_s"]["TDVMCALL"] > 1
    assert vm["keyid"] is None
    assert sum(vm["exits_per_s"].values()) > 1


def test_without_a_program_it_shows_the_demo_and_ends_with_it():
    result = top("--interval", "0.2")
    assert result.exception is None
    for word in ("SEAMCALLs/s", "KeyIDs 1 of", "PAMT", "vm:demo", "exit"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout


def test_how_a_guest_ended_is_shown(tmp_path):
    file = tmp_path / "bad"
    file.write_bytes(bytes.fromhex("0f0b"))  # ud2
    (td,) = json.loads(top("--json", "--once", "--interval", "60", file).stdout)["vms"]
    assert td["end"] == "exit"
    assert td["guest_status"] != 0


def test_a_stream_has_an_object_a_line_until_all_have_ended():
    result = top("--json", "--interval", "0.05")
    assert result.exception is None
    samples = [json.loads(line) for line in result.stdout.splitlines()]
    ends = [[vm["end"] for vm in one["vms"]] for one in samples]
    assert ends[-1] == ["exit", "exit"]
    assert ends == sorted(ends, key=lambda row: row.count("exit"))  # who has ended stays so
    times = [one["time"] for one in samples]
    assert times == sorted(set(times))
    for counter in ("instructions", "conversions"):
        counts = [sum(vm[counter] for vm in one["vms"]) for one in samples]
        assert counts == sorted(counts)


@pytest.fixture
def stream(chatty):
    """`softtdx top --json` as a process, whose first line has been read."""
    command = [sys.executable, "-m", "softtdx", "top", "--json", "--interval", "0.05", str(chatty)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert json.loads(process.stdout.readline())["vms"][0]["end"] == "running"
            yield process
        finally:
            process.kill()


def test_ctrl_c_ends_the_stream_and_says_nothing(stream):
    stream.send_signal(signal.SIGINT)
    out, err = stream.communicate(timeout=60)
    assert stream.returncode == 0
    assert all(json.loads(line) for line in out.splitlines())
    assert not err


def test_when_nobody_reads_the_stream_any_more_it_ends(stream):
    stream.stdout.close()
    stream.wait(timeout=60)
    assert not stream.stderr.read()


@pytest.mark.parametrize("args", [("/nonexistent",), ("vm:/nonexistent",), ("--memory", "64G")])
def test_what_cannot_run_is_said_in_a_line(args):
    result = top(*args)
    assert isinstance(result.exception, SoftTdxError)
