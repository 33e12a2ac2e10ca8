"""The network card and what it is plugged into, with good neighbours and bad."""

import os
import queue
import socket
import stat
import struct
import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from test_virtio import AVAILABLE, BUFFERS, WRITE, Driver

from softtdx.cli import cli
from softtdx.vmm.errors import MachineError
from softtdx.vmm.net import NetworkSpec, SocketLink
from softtdx.vmm.virtio import VirtioConsole, VirtioNet

MAC = bytes.fromhex("525400123456")
HEADER = 12
FRAME = bytes(range(60))
RECEIVE, TRANSMIT = 0, 1


@pytest.fixture
def sent():
    return []


@pytest.fixture
def card(sent):
    driver = Driver(lambda memory: VirtioNet(memory, MAC), 2)
    driver.device.attach(sent.append)
    return driver


def offer_room(card, number=1, size=HEADER + 1514):
    card.describe(0, BUFFERS, size, WRITE)
    card.offer(RECEIVE, 0, number)


def test_it_shows_its_address_and_that_the_link_is_up(card):
    assert bytes(card.read(4, i, 1) for i in range(6)) == MAC
    assert card.read(4, 6, 2) == 1
    assert card.features() & 0xFFFF_FFFF == 1 << 5 | 1 << 16 | 1 << 28


def test_what_the_guest_transmits_goes_out_without_the_header(card, sent):
    card.start(TRANSMIT)
    card.memory.write(BUFFERS, bytes(HEADER) + FRAME)
    card.describe(0, BUFFERS, HEADER + len(FRAME))
    card.offer(TRANSMIT, 0)
    assert sent == [FRAME]
    assert card.used() == [(0, 0)]
    assert card.messages == [(0xFEE0_1000, 0x41)]


@pytest.mark.parametrize("size", [0, 1, HEADER, HEADER + 13, HEADER + 1515])
def test_what_is_no_frame_is_given_back_and_not_sent(card, sent, size):
    card.start(TRANSMIT)
    card.describe(0, BUFFERS, size)
    card.offer(TRANSMIT, 0)
    assert sent == []
    assert card.used() == [(0, 0)]
    assert not card.broken


def test_what_arrives_stands_in_the_guests_buffer_behind_a_plain_header(card):
    card.start(RECEIVE)
    offer_room(card)
    card.device.feed(FRAME)
    assert card.used() == [(0, HEADER + len(FRAME))]
    data = card.memory.read(BUFFERS, HEADER + len(FRAME))
    assert struct.unpack("<BBHHHHH", data[:HEADER]) == (0, 0, 0, 0, 0, 0, 1)
    assert data[HEADER:] == FRAME
    assert card.messages == [(0xFEE0_1000, 0x41)]


def test_frames_wait_in_their_order_until_there_are_buffers(card):
    card.start(RECEIVE)
    for n in range(3):
        card.device.feed(bytes([n]) * 60)
    for n in range(3):
        offer_room(card, n + 1)
        assert card.memory.read(BUFFERS + HEADER, 1) == bytes([n])
    assert len(card.used()) == 3


def test_what_arrives_before_the_driver_or_in_a_flood_is_lost(card):
    card.device.feed(FRAME)
    card.start(RECEIVE)
    for _ in range(1000):
        card.device.feed(FRAME)
    assert len(card.device._waiting) == 256
    for size in (0, 13, 1515):
        card.device.feed(bytes(size))
    assert len(card.device._waiting) == 256
    card.write(1, 20, 0, 1)
    assert not card.device._waiting


@pytest.mark.parametrize("make", [lambda memory: VirtioNet(memory, MAC), lambda memory: VirtioConsole(memory, print)])
def test_a_driver_that_breaks_its_ring_stops_the_device_and_not_who_feeds_it(make):
    driver = Driver(make, 2)
    driver.start(RECEIVE)
    driver.memory.write(AVAILABLE + 2, struct.pack("<H", 9))
    driver.device.feed(FRAME)
    assert driver.broken


@given(st.binary(max_size=64), st.integers(0, 0xFFFF))
def test_any_ring_leaves_the_machine_alive(descriptors, available):
    card = Driver(lambda memory: VirtioNet(memory, MAC), 2)
    card.start(RECEIVE)
    card.memory.write(0x1000, descriptors)
    card.memory.write(AVAILABLE + 2, struct.pack("<H", available))
    card.device.feed(FRAME)
    card.write(2, 0, 0, 2)


# --- the cable
@pytest.fixture
def path():
    with tempfile.TemporaryDirectory(prefix="td-") as folder:
        yield Path(folder) / "net"


class End:
    """A link that keeps what arrives."""

    def __init__(self, path):
        self._frames = queue.SimpleQueue()
        self.link = SocketLink(path, self._frames.put)

    def meets(self, others):
        """Until that many ends are plugged in: what is sent before is lost on them."""
        while len(self.link._peers) < others:
            time.sleep(0.001)

    def next(self):
        return self._frames.get(timeout=120)

    @property
    def empty(self):
        return self._frames.empty()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.link.close()


def test_two_machines_share_a_cable_and_it_is_gone_after_them(path):
    with End(path) as one, End(path) as two:
        one.meets(1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        one.link.send(b"to two" * 10)
        assert two.next() == b"to two" * 10
        for n in range(100):
            two.link.send(bytes([n]) * 1514)
        assert [one.next()[0] for _ in range(100)] == list(range(100))
    assert not path.exists()


def test_with_three_the_one_who_made_it_passes_frames_on_and_none_comes_back(path):
    with End(path) as hub, End(path) as one, End(path) as two:
        hub.meets(2)
        one.link.send(b"a" * 60)
        assert hub.next() == two.next() == b"a" * 60
        two.link.send(b"b" * 60)
        assert hub.next() == one.next() == b"b" * 60
        hub.link.send(b"c" * 60)
        assert one.next() == two.next() == b"c" * 60
        assert hub.empty


def test_frames_stand_behind_their_length_as_qemu_and_passt_have_it(path):
    with End(path) as end, socket.socket(socket.AF_UNIX) as other:
        other.settimeout(30)
        other.connect(str(path))
        other.sendall(b"\0\0\0\x3c" + FRAME[:10])
        other.sendall(FRAME[10:] + b"\0\0\x27\x10" + bytes(10_000) + b"\0\0\0\x0e" + bytes(14))
        assert end.next() == FRAME
        assert end.next() == bytes(14)  # the one of 10,000 bytes was too long for a guest
        end.link.send(FRAME)
        assert other.recv(4 + len(FRAME), socket.MSG_WAITALL) == b"\0\0\0\x3c" + FRAME


def test_a_machine_joins_a_network_that_somebody_else_made(path):
    with socket.socket(socket.AF_UNIX) as passt:
        passt.bind(str(path))
        passt.listen()
        with End(path) as end:
            stream, _ = passt.accept()
            with stream:
                stream.sendall(b"\0\0\0\x3c" + FRAME)
                assert end.next() == FRAME
    assert path.exists()  # it was not the machine's


@pytest.mark.parametrize("nonsense", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1\0\1" + bytes(100)])
def test_who_sends_what_is_no_frame_is_unplugged_and_the_others_stay(path, nonsense):
    with End(path) as hub, End(path) as one, socket.socket(socket.AF_UNIX) as bad:
        bad.settimeout(30)
        bad.connect(str(path))
        bad.sendall(nonsense)
        assert bad.recv(1) == b""
        one.link.send(FRAME)
        assert hub.next() == FRAME


def test_who_does_not_read_holds_nobody_up(path):
    with End(path) as hub, End(path) as one, socket.socket(socket.AF_UNIX) as asleep:
        asleep.connect(str(path))
        hub.meets(2)
        for n in range(4000):
            hub.link.send(n.to_bytes(4, "big") + bytes(1510))
            if n % 100 == 0:
                assert int.from_bytes(one.next()[:4], "big") >= 0
        assert all(len(peer.output) <= 1 << 20 for peer in hub.link._peers)


def test_a_socket_whose_owner_died_is_made_anew(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with End(path) as one, End(path) as two:
        one.meets(1)
        one.link.send(FRAME)
        assert two.next() == FRAME


def test_a_place_where_no_socket_can_be_is_said_to_be_so(path):
    with pytest.raises(MachineError, match="no network at the socket"):
        SocketLink(path / "no" / "folder", print)
    path.write_bytes(b"a file")
    with pytest.raises(MachineError, match="no network at the socket"):
        SocketLink(path, print)
    assert path.read_bytes() == b"a file"
    with pytest.raises(MachineError, match="no network at the socket"):
        SocketLink(path.parent / ("n" * 200), print)


# --- what a user asks for
def test_a_network_is_asked_for_by_its_socket_and_an_address():
    spec = NetworkSpec.parse("socket:/tmp/a:b,mac=52:54:00:Ab:cd:ef")
    assert (spec.socket, spec.mac.hex()) == (Path("/tmp/a:b"), "525400abcdef")
    macs = {NetworkSpec.parse("socket:n").mac for _ in range(8)}
    assert len(macs) == 8
    assert all(mac[0] & 3 == 2 for mac in macs)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "user",
        "socket:",
        "tap:x",
        "socket:n,mac=",
        "socket:n,up",
        "socket:n,mac=52:54:00:12:34",
        "socket:n,mac=2:0:0:0:0:0",
        "socket:n,mac=53:54:00:12:34:56",
    ],
)
def test_a_network_that_is_none_is_refused_before_anything_starts(text):
    with pytest.raises(MachineError):
        NetworkSpec.parse(text)
    done = CliRunner().invoke(cli, ["boot", "--net", text, "--kernel", os.devnull], standalone_mode=False)
    assert isinstance(done.exception, MachineError)
