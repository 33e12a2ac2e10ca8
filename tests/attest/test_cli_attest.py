"""The attestation commands, as a user types them."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from softtdx._silicon import PAYLOADS
from softtdx.abi.structs import TdInfo
from softtdx.attest.eventlog import EventLog
from softtdx.attest.pcs import PcsListener
from softtdx.attest.qgs import QgsClient
from softtdx.attest.store import load_pki
from softtdx.cli.attest import COMMANDS, platform_tcb
from softtdx.errors import SoftTdxError
from softtdx.hw.description import preset
from softtdx.hw.seamops import RandomSource, SeamIdentity, SeamOpsEngine
from softtdx.kvm.tdx import TdxVm
from softtdx.vmm import Machine, MachineConfig, load_payload, parse_payload
from softtdx.vmm.boot import boot_host
from softtdx.vmm.linux.bzimage import load_bzimage
from softtdx.vmm.linux.machine import LinuxMachine, Stage
from softtdx.vmm.quoting import QuotingService

cli = click.Group(commands=COMMANDS)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], standalone_mode=False)


def ok(*args: str | Path) -> str:
    result = run(*args)
    assert result.exception is None, result.exception
    assert result.return_value in (None, 0), result.output
    return result.output


def error(*args: str | Path) -> str:
    """The one line a user would see."""
    result = run(*args)
    assert isinstance(result.exception, SoftTdxError | click.ClickException), result.exception
    text = str(result.exception)
    assert text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def report() -> bytes:
    """A TDREPORT of the default platform, made by its own SEAMREPORT."""
    description = preset("spr")
    key = RandomSource(description.seed, "report key").bytes(32)
    engine = SeamOpsEngine(key, description.cpu_svn, RandomSource(0, "test"))
    tcb = platform_tcb(description)
    engine.seamextend(SeamIdentity(tcb.tee_tcb_svn, b"\x01" * 48, tcb.mr_signer_seam, 0))
    info = TdInfo()
    info.attributes, info.mrtd = 1 << 28, b"\x03" * 48
    _, head = engine.report(b"\x81\0\0\0", b"\x05" * 64, hashlib.sha384(bytes(info)).digest())
    return head.ljust(512, b"\0") + bytes(info)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, report: bytes) -> Path:
    folder = tmp_path_factory.mktemp("attest")
    (folder / "report.dat").write_bytes(report)
    ok("pki", "init", folder / "pki", "--seed", "5")
    ok("quote", "--report", folder / "report.dat", "--pki", folder / "pki", "-o", folder / "quote.dat")
    return folder


def test_a_report_becomes_a_quote_that_both_verifiers_accept(workplace: Path) -> None:
    output = ok("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--second-opinion")
    assert output.splitlines()[-1] == "accepted: UpToDate"
    assert "dcap-qvl     UpToDate" in output
    assert "MRTD         " + "03" * 48 in output


def test_the_verdict_is_also_json(workplace: Path) -> None:
    found = json.loads(ok("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--json"))
    assert found["accepted"] is True
    assert found["status"] == "UpToDate"
    assert found["quote"]["body"]["mr_td"] == "03" * 48


def test_a_refusal_has_its_exit_status_and_its_reason(workplace: Path) -> None:
    result = run("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--report-data", "06")
    assert result.return_value == 1
    assert "rejected: report data" in result.output
    result = run("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--at", "2060-01-01")
    assert result.return_value == 1


def test_the_collateral_may_come_from_a_file_or_a_service(workplace: Path) -> None:
    root = ("--root", workplace / "pki" / "root.pem")
    collateral = workplace / "pki" / "collateral.json"
    assert "accepted" in ok("verify", workplace / "quote.dat", *root, "--collateral", collateral)
    with PcsListener(load_pki(workplace / "pki"), port=0) as pcs:
        assert "accepted" in ok("verify", workplace / "quote.dat", *root, "--pcs", pcs.url)
    assert "signatures hold" in ok("verify", workplace / "quote.dat", *root, "--signatures-only")


def test_a_policy_file_is_obeyed(workplace: Path) -> None:
    policy = workplace / "policy.toml"
    policy.write_text(f'[td]\nmr_td = "{"03" * 48}"\n')
    assert "accepted" in ok("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--policy", policy)
    policy.write_text(f'[td]\nmr_td = "{"04" * 48}"\n')
    result = run("verify", workplace / "quote.dat", "--pki", workplace / "pki", "--policy", policy)
    assert result.return_value == 1


@pytest.mark.parametrize(
    ("flags", "verdict"),
    [
        (["--tcb-status", "OutOfDate", "--advisory", "INTEL-SA-1"], "rejected: TCB status OutOfDate"),
        (["--module-status", "OutOfDate"], "rejected: TCB status OutOfDate"),
        (["--qe-status", "Revoked"], "Revoked"),
        (["--revoke", "pck"], "revoked"),
        (["--revoke", "platform"], "revoked"),
        (["--expire", "tcb-info"], "ran out"),
        (["--no-match"], "no TCB level matches"),
    ],
)
def test_every_verdict_can_be_set_up_by_a_flag(tmp_path: Path, workplace: Path, flags: list[str], verdict: str) -> None:
    ok("pki", "init", tmp_path / "pki", "--seed", "5", *flags)
    result = run("verify", workplace / "quote.dat", "--pki", tmp_path / "pki")
    assert result.return_value == 1
    assert verdict in result.output.splitlines()[-1]


def test_a_new_td_is_quoted_with_the_report_data_asked_for(tmp_path: Path) -> None:
    ok("quote", "--report-data", "c0ffee", "-o", tmp_path / "quote.dat")
    ok("pki", "init", tmp_path / "pki")
    output = ok("verify", tmp_path / "quote.dat", "--pki", tmp_path / "pki", "--report-data", "c0ffee")
    assert output.splitlines()[-1] == "accepted: UpToDate"


def test_a_random_pki_is_like_no_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        ok("pki", "init", tmp_path / name, "--random")
    assert load_pki(tmp_path / "a").root_der != load_pki(tmp_path / "b").root_der


def test_what_is_missing_or_wrong_is_said_in_one_line(workplace: Path, tmp_path: Path) -> None:
    quote, pki = workplace / "quote.dat", workplace / "pki"
    assert "cannot be read" in error("verify", tmp_path / "absent", "--pki", pki)
    assert "--collateral FILE" in error("verify", quote)
    assert "--root FILE" in error("verify", quote, "--collateral", pki / "collateral.json")
    assert "no time" in error("verify", quote, "--pki", pki, "--at", "soon")
    assert "already holds a PKI" in error("pki", "init", pki)
    assert "no TCB status" in error("pki", "init", tmp_path / "x", "--tcb-status", "Fine")
    assert "softtdx pki init" in error("pki", "show", tmp_path / "x")
    assert "no quote, TDREPORT" in error("inspect", "/dev/null")
    assert "MAC is not this platform's" in error(
        "quote", "--report", _damaged(workplace, tmp_path), "--pki", pki, "-o", tmp_path / "q"
    )
    assert "cannot be written" in error("quote", "--report", workplace / "report.dat", "--pki", pki, "-o", tmp_path)
    assert "--report-data HEX" in error("quote", "-o", tmp_path / "q")
    assert "at most 64" in error("quote", "--report-data", "00" * 65, "-o", tmp_path / "q")
    assert "which PKI" in error("qgs", "serve")
    assert "hexadecimal" in error("measure", "rtmr", "zz")
    assert "no answer" in error("quote", "--report", workplace / "report.dat", "--qgs", "1", "-o", tmp_path / "q")


def _damaged(workplace: Path, tmp_path: Path) -> Path:
    data = bytearray((workplace / "report.dat").read_bytes())
    data[130] ^= 1
    path = tmp_path / "damaged.dat"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("quote.dat", "quote"),
        ("report.dat", "TDREPORT"),
        ("pki/collateral.json", "collateral"),
        ("pki/tcb-info.json", "TCB info"),
        ("pki/qe-identity.json", "QE identity"),
        ("pki/root.pem", "certificates"),
        ("pki/root.der", "certificate"),
        ("pki/pck-chain.pem", "certificates"),
        ("pki/pck-platform.crl", "CRL"),
    ],
)
def test_inspect_knows_what_it_is_given(workplace: Path, name: str, kind: str) -> None:
    assert json.loads(ok("inspect", workplace / name, "--json"))["kind"] == kind
    assert ok("inspect", workplace / name).startswith(f"kind: {kind}\n")


def test_inspect_shows_the_platform_in_the_pck_certificate(workplace: Path) -> None:
    found = json.loads(ok("inspect", workplace / "quote.dat", "--json"))
    assert found["pck_chain"][0]["sgx_extension"]["fmspc"] == "50806f000000"
    assert found["body"]["td_attribute_names"] == ["SEPT_VE_DISABLE"]


def test_a_log_is_replayed_against_a_quote(
    fixture_file: Callable[[str], bytes], tmp_path: Path, workplace: Path
) -> None:
    log, quote = tmp_path / "ccel.dat", tmp_path / "quote.dat"
    log.write_bytes(fixture_file("ccel_data.dat"))
    quote.write_bytes(fixture_file("cos-113-tdx-quote.dat"))
    assert ok("events", "replay", log, "--quote", quote).count("ok") == 4
    assert json.loads(ok("events", "replay", log, "--quote", quote, "--json"))["ok"] is True
    result = run("events", "replay", log, "--report", workplace / "report.dat")
    assert result.return_value == 1
    assert result.output.count("FAIL") == 3
    assert "SecureBoot" in ok("events", "show", log)
    assert "rtmr3: " + "00" * 48 in ok("events", "replay", log)


def halting_kernel() -> bytes:
    """A bzImage whose 64-bit entry halts: enough for the firmware to measure and enter."""
    data = bytearray(4096)
    data[0x1F1] = 1
    data[0x1F4:0x1F8] = ((len(data) - 1024) // 16).to_bytes(4, "little")
    data[0x1FE:0x200], data[0x202:0x206], data[0x206:0x208] = b"\x55\xaa", b"HdrS", b"\x0f\x02"
    data[0x22C:0x230], data[0x230:0x234] = (0x7FFF_FFFF).to_bytes(4, "little"), (0x20_0000).to_bytes(4, "little")
    data[0x234], data[0x236], data[0x238:0x23C] = 1, 3, (2047).to_bytes(4, "little")
    data[0x258:0x260], data[0x260:0x264] = (0x100_0000).to_bytes(8, "little"), (0x10_0000).to_bytes(4, "little")
    data[1024 + 0x200 : 1024 + 0x203] = b"\xf4\xeb\xfd"  # hlt; jmp back
    return bytes(data)


def test_the_reference_values_of_a_linux_boot_are_what_the_td_then_has(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(halting_kernel())
    (tmp_path / "initrd").write_bytes(b"an initial ramdisk" * 500)
    files = ("--kernel", tmp_path / "kernel", "--initrd", tmp_path / "initrd", "--append", "console=ttyS0 quiet")
    log = tmp_path / "ccel.dat"
    found = json.loads(ok("measure", "linux", *files, "--memory", "64M", "--log", log, "--json"))
    assert [value for key, value in found.items() if key.startswith("rtmr")] == [
        value.hex() for value in EventLog.parse(log.read_bytes()).rtmrs()
    ]
    with LinuxMachine(boot_host(), MachineConfig(memory=64 << 20, debug_td=True)) as machine:
        machine.load_kernel(
            load_bzimage(tmp_path / "kernel"), (tmp_path / "initrd").read_bytes(), "console=ttyS0 quiet"
        )
        watch = threading.Thread(target=stop_at_kernel, args=(machine,))
        watch.start()
        machine.run()
        watch.join()
        ops = machine.vm.ops
        assert isinstance(ops, TdxVm)
        words = [ops.read_td_field("RTMR", index).to_bytes(8, "little") for index in range(24)]
        assert machine.mrtd() == bytes.fromhex(found["mrtd"])
    rtmrs = b"".join(words)
    assert [rtmrs[at : at + 48].hex() for at in range(0, 192, 48)] == [found[f"rtmr{number}"] for number in range(4)]


def stop_at_kernel(machine: LinuxMachine) -> None:
    deadline = time.monotonic() + 60
    while machine.stage < Stage.KERNEL and time.monotonic() < deadline:
        time.sleep(0.02)
    machine.stop()


def test_the_mrtd_of_a_payload_is_known_before_it_runs(tmp_path: Path) -> None:
    payload = tmp_path / "demo"
    payload.write_bytes(PAYLOADS["demo"])
    program = load_payload(payload)
    with Machine(boot_host(), MachineConfig(memory=32 << 20, vcpus=2)) as machine:
        machine.load(program)
        mrtd = machine.mrtd()
    assert mrtd is not None
    assert ok("measure", "payload", payload, "--memory", "32M", "--vcpus", "2") == f"mrtd: {mrtd.hex()}\n"


def test_the_quote_that_a_td_asked_for_verifies_under_its_platforms_pki(tmp_path: Path) -> None:
    host = boot_host()
    quoting = QuotingService(host.platform)
    with Machine(host, MachineConfig(memory=32 << 20), quoting=quoting) as machine:
        machine.load(parse_payload(PAYLOADS["demo"]))
        result = machine.run()
    assert quoting.last_quote is not None, result
    (tmp_path / "quote.dat").write_bytes(quoting.last_quote)
    ok("pki", "init", tmp_path / "pki")
    found = json.loads(ok("verify", tmp_path / "quote.dat", "--pki", tmp_path / "pki", "--second-opinion", "--json"))
    assert (found["status"], found["dcap_qvl"]) == ("UpToDate", "UpToDate")
    assert result.mrtd is not None
    assert found["quote"]["body"]["mr_td"] == result.mrtd.hex()
    assert found["quote"]["body"]["rtmr3"] != "00" * 48  # the demo extends it


SAYS = {"qgs": "QGS at", "pcs": "PCS at", "guest-api": "guest API at"}


@pytest.mark.parametrize("service", ["qgs", "pcs", "guest-api"])
def test_a_service_runs_until_interrupted(tmp_path: Path, workplace: Path, report: bytes, service: str) -> None:
    where = ["--listen", f"unix:{tmp_path / 'qgs.socket'}"] if service == "qgs" else ["--port", "0"]
    command = [sys.executable, "-c", "from softtdx.cli import main; main()", service, "serve", "--pki"]
    process = subprocess.Popen([*command, str(workplace / "pki"), *where], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert SAYS[service] in process.stdout.readline()
        if service == "qgs":
            assert QgsClient(tmp_path / "qgs.socket").quote(report)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert not (tmp_path / "qgs.socket").exists()
