"""Debian's own kernel, as it comes from the package: in a TD, and in an ordinary VM."""

import base64
import re
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from echo_host import EchoHost
from linux_guest import boot

from softtdx.abi.structs import TdReport
from softtdx.attest.dcap import verify_with_dcap_qvl
from softtdx.attest.eventlog import EventLog
from softtdx.attest.measure import LinuxBoot, linux_boot_log
from softtdx.attest.quote import Quote
from softtdx.hw.seamops import SeamOpsStatus
from softtdx.vmm.net import SocketLink

COMPLAINTS = re.compile(r"unexpected #VE|oops|BUG:|WARNING:|Call Trace|unchecked MSR|Kernel panic", re.IGNORECASE)
OUTSIDE = b"asked for from outside".ljust(64, b"\0")
SCRIPT = """
read line
ip link set eth0 up && ip addr add 10.0.0.1/24 dev eth0 && ping -c 3 -w 60 10.0.0.2
echo '<dmesg>'; dmesg; echo '</dmesg>'
mkdir /sys/kernel/config/tsm/report/q
head -c 64 /dev/zero | tr '\\0' A > /sys/kernel/config/tsm/report/q/inblob
echo provider=$(cat /sys/kernel/config/tsm/report/q/provider)
echo quote=$(base64 -w0 /sys/kernel/config/tsm/report/q/outblob)
echo log=$(base64 -w0 /sys/firmware/acpi/tables/data/CCEL)
[ -x /root/report ] && echo report=$(/root/report)
echo nproc=$(nproc)
exit 7
"""


@pytest.fixture(scope="module")
def report_program(tmp_path_factory):
    """A static program for the guest, or None where the compiler cannot make one."""
    compiler = shutil.which("cc")
    target = tmp_path_factory.mktemp("guest") / "report"
    command = [compiler, "-static", "-O2", "-o", str(target), str(Path(__file__).with_name("guest_report.c"))]
    if compiler is None or subprocess.run(command, check=False, capture_output=True).returncode:
        return None
    return target


@pytest.fixture(scope="module")
def td(report_program):
    files = {"root/report": report_program} if report_program else None
    outside = []

    def ask(machine):
        try:
            outside.append(machine.agent.quote(OUTSIDE, timeout=280))  # the boot is part of it
        finally:
            machine.type(b"go on\n")

    network = EchoHost()
    done = boot(SCRIPT, files=files, meanwhile=ask, network=network)
    done.outside, done.frames = outside[0], network.heard
    return done


def field(done, name):
    return re.search(rf"^{name}=(.*)$", done.text, re.MULTILINE)[1]


def dmesg(done):
    return done.text.partition("<dmesg>")[2].partition("</dmesg>")[0]


def test_linux_in_a_td_knows_where_it_is_and_complains_of_nothing(td):
    assert td.report["userspace"]
    assert "tdx: Guest detected" in dmesg(td)
    assert "Memory Encryption Features active: Intel TDX" in dmesg(td)
    assert not COMPLAINTS.search(dmesg(td))


def test_the_guest_commands_status_becomes_the_machines(td):
    assert td.result.status == 7
    assert td.report["guest_status"] == 7
    assert not td.result.ok


def test_the_report_counts_what_happened(td):
    report = td.report
    assert report["guest_instructions"] > 500_000_000
    assert report["tdcalls"]["MEM_PAGE_ACCEPT"] >= 256
    assert report["tdcalls"]["MR_RTMR_EXTEND"] == 8
    assert report["ve"]["IO_INSTRUCTION"] > 0
    assert report["ve"]["CPUID"] > 0
    assert report["td_exits"]["TDVMCALL"] == report["tdcalls"]["VP_VMCALL"]


def test_the_quote_that_the_guest_took_is_accepted(td):
    quote = base64.b64decode(field(td, "quote"))
    assert field(td, "provider") == "tdx_guest"
    assert verify_with_dcap_qvl(quote, td.quoting.pki).status == "UpToDate"
    body = Quote.parse(quote).body
    assert body.report_data == b"A" * 64
    assert body.mr_td.hex() == td.report["mrtd"]
    assert [value.hex() for value in body.rtmrs] == td.report["rtmrs"]


def test_the_agent_in_the_guest_takes_a_quote_for_who_asks_outside(td):
    assert verify_with_dcap_qvl(td.outside, td.quoting.pki).status == "UpToDate"
    body = Quote.parse(td.outside).body
    assert body.report_data == OUTSIDE
    assert [value.hex() for value in body.rtmrs] == td.report["rtmrs"]


def test_the_guest_reaches_the_network_through_shared_memory(td):
    assert "3 packets transmitted, 3 packets received" in td.text
    assert {frame[6:12].hex(":") for frame in td.frames} == {"52:54:00:00:00:01"}


def test_the_event_log_explains_the_rtmrs_of_the_quote(td):
    log = EventLog.parse(base64.b64decode(field(td, "log")))
    rtmrs = Quote.parse(base64.b64decode(field(td, "quote"))).body.rtmrs
    assert log.replay(rtmrs).ok
    assert rtmrs[3] == bytes(48)
    assert len({*rtmrs}) == 4


def test_the_rtmrs_are_those_computed_ahead_of_time(td):
    expected = linux_boot_log(LinuxBoot(td.kernel, td.command_line, td.initrd)).rtmrs()
    assert [value.hex() for value in expected[1:]] == td.report["rtmrs"][1:]


def test_a_tdreport_from_the_device_file_has_a_mac_that_verifies(td, report_program):
    if report_program is None:
        pytest.skip("the compiler makes no static programs")
    raw = bytes.fromhex(field(td, "report"))
    seamops = td.machine.host.platform.seamops
    assert seamops.verify(raw[:256]) is SeamOpsStatus.SUCCESS
    assert seamops.verify(raw[:130] + b"\xff" + raw[131:256]) is not SeamOpsStatus.SUCCESS
    assert TdReport.parse(raw).report_mac.report_data == bytes(range(64))


class Cable:
    """One end of a socket that two guests share."""

    def __init__(self, path):
        self._path = path

    def plug(self, receive):
        self._link = SocketLink(self._path, receive)
        return self._link

    def unplug(self):
        self._link.close()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_two_tds_talk_tcp_with_each_other():
    # Each asks until the other is there, and stays until it has been served.
    script = """
    ip link set eth0 up; ip addr add 10.0.0.{me}/24 dev eth0
    (echo from {me} | nc -l -p 7777; echo served) &
    until heard=$(nc -w 5 10.0.0.{other} 7777) && [ "$heard" ]; do sleep 1; done
    echo "heard: $heard"; wait
    """
    with tempfile.TemporaryDirectory(prefix="td-") as folder, ThreadPoolExecutor(2) as pool:
        ends = [Cable(Path(folder) / "net") for _ in range(2)]
        boots = [
            pool.submit(boot, script.format(me=me, other=3 - me), network=end, mac=bytes([2, 0, 0, 0, 0, me]))
            for me, end in enumerate(ends, 1)
        ]
        texts = [done.result().text for done in boots]
        for end in ends:
            end.unplug()
    assert "heard: from 2" in texts[0]
    assert "heard: from 1" in texts[1]
    assert all("served" in text for text in texts)


@contextmanager
def served(text):
    """A web server on loopback that answers everything with `text`; its port."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        try:
            yield server.server_port
        finally:
            server.shutdown()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_passt_gives_a_td_an_address_and_the_hosts_loopback():
    with tempfile.TemporaryDirectory(prefix="td-") as folder, served(b"from the host") as port:
        Path(folder).chmod(0o777)  # started by root, passt becomes nobody
        path = Path(folder) / "net"
        addresses = ["-a", "10.0.2.15", "-n", "24", "-g", "10.0.2.2"]
        passt = subprocess.Popen(
            ["passt", "--foreground", "--socket", path, "-4", "-t", "none", "-u", "none", *addresses],
            stderr=subprocess.DEVNULL,
        )
        try:
            while not path.exists():
                assert passt.poll() is None, "passt could not start"
                time.sleep(0.05)
            cable = Cable(path)
            text = boot(
                "ip link set eth0 up; udhcpc -i eth0 -n -q -s /bin/true 2>&1; ip addr add 10.0.2.15/24 dev eth0;"
                f"wget -q -O - http://10.0.2.2:{port}/",
                network=cable,
            ).text
            cable.unplug()
        finally:
            passt.kill()
            passt.wait()
    assert "lease of 10.0.2.15 obtained" in text
    assert text.endswith("from the host")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("vcpus", [1, 2])
def test_ten_boots_in_a_row_reach_userspace(vcpus):
    for _ in range(10):
        done = boot("nproc", vcpus=vcpus)
        assert done.report["userspace"]
        assert done.text == f"{vcpus}\n"
