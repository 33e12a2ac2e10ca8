"""Machines that run under a name, as other processes find and ask them."""

import base64
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softtdx.cli import cli
from softtdx.vmm.errors import GuestError, MachineError
from softtdx.vmm.registry import announce, check_name, find, running, runtime_folder

DATA = bytes(range(64))
FACTS = {"kind": "TD", "program": "p", "vcpus": 1, "memory": 1 << 20, "mrtd": None, "agent": True}
HOLDER = """
import sys, time
from softtdx.vmm.registry import announce
with announce("held", dict):
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def runtime(monkeypatch):
    """A runtime folder of the test's own; the path of a Unix socket must be short."""
    with tempfile.TemporaryDirectory(prefix="td-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield runtime_folder()


@pytest.fixture
def fuzzed(runtime):
    with announce("fuzzed", lambda: FACTS, quote):
        yield


@pytest.fixture
def holder(runtime):
    """A process that runs a machine named `held`."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"there\n"
        yield process
        process.kill()


def quote(data):
    return b"quote of " + data


def talk(name, data, *, finish=False):
    """What the control socket answers to raw bytes; nothing if it hangs up, be it in the middle of them."""
    with socket.socket(socket.AF_UNIX) as stream, suppress(ConnectionError):
        stream.settimeout(60)
        stream.connect(str(runtime_folder() / f"{name}.socket"))
        stream.sendall(data)
        if finish:
            stream.shutdown(socket.SHUT_WR)
        return stream.makefile("rb").read()
    return b""


def softtdx(*args):
    return CliRunner().invoke(cli, [str(a) for a in args], standalone_mode=False)


def test_a_machine_is_found_by_its_name_and_tells_of_itself(runtime):
    with announce("mine", lambda: FACTS, quote):
        (machine,) = running()
        assert machine.name == "mine"
        assert FACTS.items() <= machine.info().items()
        assert machine.info()["pid"] == os.getpid()
        assert find("mine").quote(DATA) == b"quote of " + DATA
    assert running() == []
    assert list(runtime.iterdir()) == []


def test_without_a_name_nothing_is_announced(runtime):
    with announce(None, lambda: FACTS, quote):
        assert not runtime.exists()


def test_only_the_user_himself_may_reach_it(runtime):
    with announce("mine", lambda: FACTS):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [runtime, *runtime.iterdir()]}
    assert modes == {runtime.name: 0o700, "mine.lock": 0o600, "mine.socket": 0o600}


def test_two_names_are_two_machines_and_a_wrong_one_names_them(runtime):
    with announce("one", lambda: FACTS, lambda _: b"1"), announce("two", lambda: FACTS, lambda _: b"2"):
        assert [machine.name for machine in running()] == ["one", "two"]
        assert (find("one").quote(DATA), find("two").quote(DATA)) == (b"1", b"2")
        with pytest.raises(MachineError, match="'three' runs; these run: one, two"):
            find("three")
    with pytest.raises(MachineError, match="none runs"):
        find("one")


def test_a_name_is_one_machines_at_a_time(runtime):
    with (
        announce("mine", lambda: FACTS),
        pytest.raises(MachineError, match="mine runs already"),
        announce("mine", lambda: FACTS),
    ):
        pass
    with announce("mine", lambda: FACTS):
        assert find("mine")


def test_what_a_killed_process_leaves_does_not_count_and_its_name_is_free(holder, runtime):
    assert find("held").info()["pid"] == holder.pid
    with pytest.raises(MachineError, match="held runs already"), announce("held", lambda: FACTS):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (runtime / "held.socket").is_socket()
    assert running() == []
    with pytest.raises(MachineError, match="none runs"):
        find("held")
    with announce("held", lambda: FACTS):
        assert find("held").info()["pid"] == os.getpid()


def test_a_machine_that_ends_while_it_is_asked_says_no_more(runtime):
    with announce("mine", lambda: FACTS, quote):
        machine = find("mine")
    with pytest.raises(MachineError, match="mine does not answer"):
        machine.info()


def test_why_there_is_no_quote_reaches_who_asked(runtime):
    def refuse(_data):
        raise GuestError("the TD is asleep")

    with announce("td", lambda: FACTS, refuse), pytest.raises(MachineError, match="td: the TD is asleep"):
        find("td").quote(DATA)
    with announce("vm", lambda: FACTS), pytest.raises(MachineError, match="vm: it is an ordinary VM"):
        find("vm").quote(DATA)


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "-a", "a b", "a\n", "ä", "x" * 49])
def test_a_name_that_could_lead_elsewhere_is_refused(runtime, name):
    with pytest.raises(MachineError, match="is no name"):
        check_name(name)
    with pytest.raises(MachineError, match="is no name"), announce(name, lambda: FACTS):
        pass


def test_a_path_too_long_for_a_socket_is_refused_with_the_way_out(runtime, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime.parent / ("d" * 100)))
    with pytest.raises(MachineError, match="shorter"), announce("mine", lambda: FACTS):
        pass


def test_a_folder_that_cannot_be_made_is_said_to_be_so(runtime, monkeypatch):
    file = runtime.parent / "file"
    file.write_bytes(b"")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(file))
    with pytest.raises(MachineError, match="no control socket can be made"), announce("mine", lambda: FACTS):
        pass
    assert running() == []


def test_a_lock_that_cannot_be_had_is_said_to_be_so(runtime):
    with announce("other", lambda: FACTS):
        (runtime / "mine.lock").symlink_to(runtime / "elsewhere")
        with pytest.raises(MachineError, match="no machine can be named mine"), announce("mine", lambda: FACTS):
            pass
        assert not (runtime / "elsewhere").exists()


def test_without_a_runtime_folder_the_cache_serves(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runtime_folder() == tmp_path / "softtdx" / "run"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime_folder() == Path.home() / ".cache" / "softtdx" / "run"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{}", "info or quote"),
        (b'{"ask": ["quote"]}', "info or quote"),
        (b"[]", "JSON objects"),
        (b"nonsense \xff", "JSON objects"),
        (b"[" * 100_000, "JSON objects"),
        (b'{"ask": "quote"}', "report_data"),
        (b'{"ask": "quote", "report_data": 7}', "report_data"),
        (b'{"ask": "quote", "report_data": "0g"}', "report_data"),
    ],
)
def test_a_bad_request_gets_an_answer_that_says_so(runtime, line, words):
    with announce("mine", lambda: FACTS, quote):
        assert words in json.loads(talk("mine", line + b"\n"))["error"]


def test_it_outlives_bad_clients_and_serves_64_at_once(runtime):
    with announce("mine", lambda: FACTS, quote):
        assert talk("mine", b"x" * 300_000) == b""
        assert talk("mine", b'{"ask": ', finish=True) == b""
        with socket.socket(socket.AF_UNIX) as silent:
            silent.connect(str(runtime / "mine.socket"))
            with ThreadPoolExecutor(64) as pool:
                answers = list(pool.map(lambda n: find("mine").quote(bytes([n]) * 64), range(64)))
    assert answers == [b"quote of " + bytes([n]) * 64 for n in range(64)]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_line_gets_an_object_for_an_answer(fuzzed, data):
    assert isinstance(json.loads(talk("fuzzed", data.replace(b"\n", b" ") + b"\n")), dict)


def test_an_answer_that_is_no_quote_is_refused(runtime):
    with announce("mine", lambda: FACTS, quote):
        machine = find("mine")
        (runtime / "mine.socket").unlink()
        for nonsense in (b"[]\n", b'{"quote": 7}\n', b'{"quote": "?"}\n', b"", b"{}\n"):
            with socket.socket(socket.AF_UNIX) as impostor, ThreadPoolExecutor(1) as pool:
                impostor.bind(str(runtime / "mine.socket"))
                impostor.listen()
                asked = pool.submit(machine.quote, DATA)
                stream, _ = impostor.accept()
                stream.recv(4096)
                stream.sendall(nonsense)
                stream.close()
                with pytest.raises(MachineError):
                    asked.result(30)
            (runtime / "mine.socket").unlink()


def test_ps_lists_what_runs(runtime):
    with announce("mine", lambda: FACTS, quote):
        (row,) = json.loads(softtdx("ps", "--json").output)
        assert (row["name"], row["kind"], row["agent"]) == ("mine", "TD", True)
        assert "answers" in softtdx("ps").output
    assert json.loads(softtdx("ps", "--json").output) == []


def test_quote_td_writes_what_the_td_gave(runtime, tmp_path):
    with announce("mine", lambda: FACTS, quote):
        done = softtdx("quote", "--td", "mine", "--report-data", "c0ffee", "-o", tmp_path / "q")
        assert done.exception is None
        assert (tmp_path / "q").read_bytes() == b"quote of " + bytes.fromhex("c0ffee").ljust(64, b"\0")
        for extra in (("--version", "5"), ("--pki", tmp_path), ("--qgs", "1"), ("--report", tmp_path / "q")):
            refused = softtdx("quote", "--td", "mine", "-o", tmp_path / "q", *extra)
            assert "--td goes with --report-data only" in str(refused.exception)
        long = softtdx("quote", "--td", "mine", "--report-data", "00" * 65, "-o", tmp_path / "q")
        assert "at most 64 bytes" in str(long.exception)
    gone = softtdx("quote", "--td", "mine", "-o", tmp_path / "q")
    assert "no machine named 'mine' runs" in str(gone.exception)


def test_the_answer_on_the_wire_is_what_the_module_says(runtime):
    with announce("mine", lambda: FACTS, quote):
        answer = json.loads(talk("mine", json.dumps({"ask": "quote", "report_data": DATA.hex()}).encode() + b"\n"))
    assert base64.b64decode(answer["quote"]) == quote(DATA)
