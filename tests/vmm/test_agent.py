"""The agent in a TD: what it gives to who asks outside, and what a hostile or dead one cannot do."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.attest import Quote, Verifier
from softtdx.attest.measure import Region, mrtd_of
from softtdx.kvm.uapi import IoExit
from softtdx.vmm import End, GuestError, Machine, MachineConfig, MachineError, parse_payload
from softtdx.vmm.agent import AGENT_PORT, ChannelAgent, PortAgent
from softtdx.vmm.launcher import FIRMWARE_BASE, firmware_image, lay_out
from softtdx.vmm.quoting import QuotingService

MIB = 1 << 20
DATA = bytes(range(64))
REPORT = bytes(range(256)) * 4
SPIN = bytes.fromhex("f390ebfc")
HALT = bytes.fromhex("f4")


@pytest.fixture
def agent():
    """A PortAgent whose vCPU never sleeps; its signature is the report with a prefix."""
    return PortAgent(lambda report: b"signed " + report, lambda _vcpu, _until: None, lambda: None)


def read(agent, size):
    io = IoExit().put(write=False, port=AGENT_PORT, size=size, value=0)
    agent.access(0, io)
    return io.value


def write(agent, value, size=4):
    agent.access(0, IoExit().put(write=True, port=AGENT_PORT, size=size, value=value))


def take_request(agent):
    """What the launcher does first: wait, then read the report data."""
    while not read(agent, 1):
        pass
    return b"".join(read(agent, 4).to_bytes(4, "little") for _ in range(16))


def give_report(agent, report):
    write(agent, 0)
    for at in range(0, len(report), 4):
        write(agent, int.from_bytes(report[at : at + 4], "little"))


def test_the_launchers_agent_gets_the_report_data_and_its_report_is_quoted(agent):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        assert take_request(agent) == DATA
        give_report(agent, REPORT)
        assert asked.result(30) == b"signed " + REPORT


def test_a_leaf_that_fails_is_told_with_its_status(agent):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        take_request(agent)
        write(agent, 0xC0000100)
        with pytest.raises(GuestError, match="0xc0000100"):
            asked.result(30)


def test_report_data_of_another_size_is_refused(agent):
    with pytest.raises(GuestError, match="64 bytes, this is 3"):
        agent.quote(b"abc")


def test_no_answer_in_time_is_an_error_that_says_whether_anyone_is_there(agent):
    with pytest.raises(GuestError, match="no agent has reported"):
        agent.quote(DATA, timeout=0.01)
    read(agent, 1)
    with pytest.raises(GuestError, match="its agent does not come out"):
        agent.quote(DATA, timeout=0.01)


def test_an_answer_to_a_request_that_was_given_up_is_not_the_next_ones(agent):
    with pytest.raises(GuestError, match="gave no quote"):
        agent.quote(b"\x01" * 64, timeout=0.01)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        assert take_request(agent) == DATA
        give_report(agent, REPORT)
        give_report(agent, bytes(1024))
        assert asked.result(30) == b"signed " + REPORT


def test_when_the_td_ends_who_waits_is_told(agent):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        take_request(agent)
        agent.close("halted")
        with pytest.raises(GuestError, match="has ended: halted"):
            asked.result(30)
    with pytest.raises(GuestError, match="has ended: halted"):
        agent.quote(DATA)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=40))
def test_a_guest_may_do_anything_with_the_port(accesses):
    agent = PortAgent(lambda report: report, lambda _vcpu, _until: None, lambda: None)
    for is_write, size, value in accesses:
        if is_write:
            write(agent, value, size)
        else:
            read(agent, size)
    with pytest.raises(GuestError):
        agent.quote(DATA, timeout=0)


def channel():
    sent = []
    agent = ChannelAgent()
    agent.attach(sent.append)
    return agent, sent


def test_the_channels_agent_is_asked_when_it_is_ready_and_its_answer_is_the_quote():
    agent, sent = channel()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        while not sent:
            agent.receive(b"ready\r\n")
        assert sent[0] == b"1 " + DATA.hex().encode() + b"\n"
        agent.receive(b"2 c3Rhb\n1 cXVv")
        agent.receive(b"dGU=\n")
        assert asked.result(30) == b"quote"


@pytest.mark.parametrize("answer", [b"1\n", b"1 \n", b"1 ???\n"])
def test_a_kernel_that_gives_no_quote_is_said_to_be_so(answer):
    agent, sent = channel()
    agent.receive(b"ready\n")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(agent.quote, DATA)
        while not sent:
            pass
        agent.receive(answer)
        with pytest.raises(GuestError, match="gave no quote"):
            asked.result(30)


@given(st.lists(st.binary(max_size=80), max_size=10))
def test_a_guest_may_say_anything_on_the_channel(parts):
    agent, _ = channel()
    for part in parts:
        agent.receive(part)
    with pytest.raises(GuestError):
        agent.quote(DATA, timeout=0)


def test_a_line_without_end_is_not_kept():
    agent, _ = channel()
    for _ in range(64):
        agent.receive(b"x" * 4096)
    assert len(agent._text) <= 64 << 10


class Spinning:
    """A TD with an agent that runs a payload until it is stopped."""

    def __init__(self, host, payload=SPIN, **config):
        self.quoting = QuotingService(host.platform)
        self.config = MachineConfig(**({"memory": 4 * MIB, "agent": True} | config))
        self.payload = parse_payload(payload, "spin")
        self.machine = Machine(host, self.config, quoting=self.quoting)
        self.result = None

    def __enter__(self):
        self.machine.load(self.payload)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self):
        self.result = self.machine.run()

    def __exit__(self, *_):
        self.machine.stop()
        self._thread.join()
        self.machine.close()


def test_a_running_program_is_quoted_without_its_doing_anything(host):
    with Spinning(host) as td:
        pki = td.quoting.pki
        quotes = [td.machine.agent.quote(bytes([n]) * 64) for n in (1, 2)]
        for n, quote in enumerate(quotes, 1):
            body = Verifier(pki.root_der).verify(quote, pki.collateral()).require().quote.body
            assert body.report_data == bytes([n]) * 64
            assert body.mr_td == td.machine.mrtd()
        assert td.quoting.last_quote is None  # the guest itself asked for none
    assert td.result.end is End.STOPPED
    with pytest.raises(GuestError, match="has ended: stopped"):
        td.machine.agent.quote(DATA)


def test_the_agent_is_part_of_the_measurement(host):
    found = []
    for agent in (False, True):
        layout = lay_out(parse_payload(SPIN, "spin"), 4 * MIB, 1, agent=agent)
        regions = [Region(FIRMWARE_BASE, firmware_image(layout)), *(Region(*part) for part in layout.present)]
        found.append(mrtd_of(regions))
    with Spinning(host) as td:
        assert found[0] != found[1] == td.machine.mrtd()


def test_many_may_ask_at_once(host):
    with Spinning(host) as td, ThreadPoolExecutor(8) as pool:
        quotes = list(pool.map(lambda n: td.machine.agent.quote(bytes([n]) * 64), range(8)))
    assert [Quote.parse(quote).body.report_data[0] for quote in quotes] == list(range(8))


def test_a_waiting_agent_does_not_keep_a_machine_alive_that_has_halted(host):
    with Machine(host, MachineConfig(memory=4 * MIB, agent=True), quoting=QuotingService(host.platform)) as machine:
        machine.load(parse_payload(HALT, "halt"))
        assert machine.run().end is End.HALTED


def test_an_agent_needs_a_td_and_a_quoting_service(host):
    with pytest.raises(MachineError, match="ordinary VM"):
        MachineConfig(vm=True, agent=True)
    with pytest.raises(MachineError, match="quoting service"):
        Machine(host, MachineConfig(agent=True))
    config = MachineConfig(memory=4 * MIB, vcpus=64, agent=True)
    with (
        Machine(host, config, quoting=QuotingService(host.platform)) as machine,
        pytest.raises(MachineError, match="64 vCPUs and the agent's"),
    ):
        machine.load(parse_payload(HALT, "halt"))
