"""PCI, virtio and the clock, driven as an operating system drives them."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.vmm.errors import MachineError
from softtdx.vmm.pci import PciBus
from softtdx.vmm.rtc import CmosClock
from softtdx.vmm.virtio import VirtioBlock, VirtioConsole, VirtioPci

WINDOW = 0xE000_0000
DESCRIPTORS, AVAILABLE, USED, BUFFERS = 0x1000, 0x2000, 0x3000, 0x4000
NEXT, WRITE, INDIRECT = 1, 2, 4


class Memory:
    """64 KiB of guest memory; what lies outside is refused, as the VMM's own does."""

    def __init__(self):
        self.data = bytearray(1 << 16)

    def read(self, gpa, size):
        if gpa + size > len(self.data):
            raise MachineError("outside")
        return bytes(self.data[gpa : gpa + size])

    def write(self, gpa, data):
        if gpa + len(data) > len(self.data):
            raise MachineError("outside")
        self.data[gpa : gpa + len(data)] = data


class Driver:
    """A device on a bus, found and set up through configuration space and its BAR."""

    def __init__(self, make, queues):
        self.memory = Memory()
        self.device = make(self.memory)
        self.messages = []
        self.bus = PciBus(WINDOW, 1 << 20)
        self.bus.add(VirtioPci(self.device, lambda address, data: self.messages.append((address, data))))
        self.write_config(4, 6, 2)
        self.bar = self.config(0x10)
        self.capabilities = self.find_capabilities()
        self.queues = queues

    def config(self, offset, size=4):
        self.bus.write_port(0xCF8, 1 << 31 | 1 << 11 | offset & 0xFC, 4)
        return self.bus.read_port(0xCFC + (offset & 3), size)

    def write_config(self, offset, value, size):
        self.bus.write_port(0xCF8, 1 << 31 | 1 << 11 | offset & 0xFC, 4)
        self.bus.write_port(0xCFC + (offset & 3), value, size)

    def find_capabilities(self):
        found, at = {}, self.config(0x34, 1)
        while at:
            if self.config(at, 1) == 9:
                found[self.config(at + 3, 1)] = self.bar + self.config(at + 8)
            else:
                self.msix = at
            at = self.config(at + 1, 1)
        return found

    def read(self, kind, offset, size):
        return self.bus.read_memory(self.capabilities[kind] + offset, size)

    def write(self, kind, offset, value, size):
        assert self.bus.write_memory(self.capabilities[kind] + offset, value, size)

    def features(self):
        low, high = (self.write(1, 0, i, 4) or self.read(1, 4, 4) for i in (0, 1))
        return high << 32 | low

    def start(self, queue=0, size=8):
        self.write(1, 20, 0, 1)
        self.write(1, 20, 3, 1)
        for i, part in enumerate((self.features() & 0xFFFF_FFFF, self.features() >> 32)):
            self.write(1, 8, i, 4)
            self.write(1, 12, part, 4)
        self.write(1, 20, 11, 1)
        assert self.read(1, 20, 1) == 11
        self.write_config(self.msix + 2, 1 << 15, 2)
        table = self.bar + (self.config(self.msix + 4) & ~7)
        for at, value in enumerate((0xFEE0_1000, 0, 0x41, 0)):
            assert self.bus.write_memory(table + 16 + 4 * at, value, 4)
        self.write(1, 22, queue, 2)
        self.write(1, 24, size, 2)
        self.write(1, 26, 1, 2)
        for at, value in ((32, DESCRIPTORS), (40, AVAILABLE), (48, USED)):
            self.write(1, at, value, 4)
        self.write(1, 28, 1, 2)
        self.write(1, 20, 15, 1)

    def describe(self, index, address, size, flags=0, following=0):
        self.memory.write(DESCRIPTORS + 16 * index, struct.pack("<QIHH", address, size, flags, following))

    def offer(self, queue, head, number=1):
        self.memory.write(AVAILABLE + 4 + 2 * ((number - 1) % 8), struct.pack("<H", head))
        self.memory.write(AVAILABLE + 2, struct.pack("<H", number & 0xFFFF))
        self.write(2, 4 * queue, queue, 2)

    def used(self):
        (count,) = struct.unpack("<H", self.memory.read(USED + 2, 2))
        return [struct.unpack("<II", self.memory.read(USED + 4 + 8 * i, 8)) for i in range(count)]

    @property
    def broken(self):
        return bool(self.read(1, 20, 1) & 64)


@pytest.fixture
def printed():
    return bytearray()


@pytest.fixture
def console(printed):
    return Driver(lambda memory: VirtioConsole(memory, printed.extend), 2)


def test_an_empty_slot_reads_all_ones_and_the_bridge_is_there(console):
    bus = console.bus
    bus.write_port(0xCF8, 1 << 31, 4)
    assert bus.read_port(0xCFC, 2) == 0x1B36
    bus.write_port(0xCF8, 1 << 31 | 5 << 11, 4)
    assert bus.read_port(0xCFC, 4) == 0xFFFF_FFFF
    bus.write_port(0xCF8, 1 << 31 | 1 << 16, 4)
    assert bus.read_port(0xCFC, 4) == 0xFFFF_FFFF


def test_a_bar_tells_its_size_and_moves(console):
    console.write_config(0x10, 0xFFFF_FFFF, 4)
    assert console.config(0x10) == 0xFFFF_8000
    console.write_config(0x10, WINDOW + 0x8_0000, 4)
    assert console.bus.read_memory(WINDOW, 4) is None
    assert console.bus.read_memory(WINDOW + 0x8_0000 + 18, 2) == 2
    console.write_config(4, 0, 2)
    assert console.bus.read_memory(WINDOW + 0x8_0000, 4) is None


def test_the_console_prints_and_interrupts(console, printed):
    console.start(queue=1)
    console.memory.write(BUFFERS, b"hello, world")
    console.describe(0, BUFFERS, 5, NEXT, 1)
    console.describe(1, BUFFERS + 5, 7)
    console.offer(1, 0)
    assert printed == b"hello, world"
    assert console.used() == [(0, 0)]
    assert console.messages == [(0xFEE0_1000, 0x41)]


def test_a_driver_that_wants_no_interrupt_gets_none(console):
    console.start(queue=1)
    console.memory.write(AVAILABLE, b"\x01\x00")
    console.describe(0, BUFFERS, 1)
    console.offer(1, 0)
    assert console.used() == [(0, 0)]
    assert console.messages == []


def test_a_masked_interrupt_comes_when_it_is_unmasked(console):
    console.start(queue=1)
    console.write_config(console.msix + 2, 3 << 14, 2)
    console.describe(0, BUFFERS, 1)
    console.offer(1, 0)
    assert console.messages == []
    console.write_config(console.msix + 2, 1 << 15, 2)
    assert console.messages == [(0xFEE0_1000, 0x41)]


def test_what_is_typed_waits_for_buffers(console):
    console.device.feed(b"abc")
    console.start(queue=0)
    console.describe(0, BUFFERS, 2, WRITE)
    console.describe(1, BUFFERS + 16, 8, WRITE)
    console.offer(0, 0)
    console.offer(0, 1, 2)
    assert console.memory.read(BUFFERS, 2) == b"ab"
    assert console.memory.read(BUFFERS + 16, 1) == b"c"
    assert console.used() == [(0, 2), (1, 1)]


@pytest.mark.parametrize(
    "descriptor",
    [
        (BUFFERS, 1, NEXT, 0),  # a loop
        (BUFFERS, 1, NEXT, 200),  # out of the table
        (1 << 40, 1, 0, 0),  # no memory
        (BUFFERS, 7, INDIRECT, 0),  # half an entry
        (DESCRIPTORS, 16, INDIRECT, 0),  # indirect from indirect
        (BUFFERS, 1 << 31, 0, 0),  # absurdly large
    ],
)
def test_a_driver_that_breaks_the_rules_has_to_reset(console, printed, descriptor):
    console.start(queue=1)
    console.describe(0, *descriptor)
    console.offer(1, 0)
    assert console.broken
    assert printed == b""
    console.start(queue=1)
    console.memory.write(BUFFERS, b"x")
    console.memory.write(AVAILABLE + 2, bytes(2))
    console.describe(0, BUFFERS, 1)
    console.offer(1, 0)
    assert not console.broken
    assert printed == b"x"


@given(st.lists(st.tuples(st.integers(0, 0x7FFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))))
def test_no_access_to_the_bar_does_harm(accesses):
    driver = Driver(lambda memory: VirtioConsole(memory, lambda data: None), 2)
    for offset, size, value in accesses:
        driver.bus.write_memory(driver.bar + offset, value & (1 << 8 * size) - 1, size)
        assert 0 <= (driver.bus.read_memory(driver.bar + offset, size) or 0) < 1 << 8 * size


@given(st.binary(min_size=128, max_size=128))
def test_no_descriptor_table_does_harm(table):
    driver = Driver(lambda memory: VirtioBlock(memory, io.BytesIO(bytes(4096))), 1)
    driver.start()
    driver.memory.write(DESCRIPTORS, table)
    driver.offer(0, 0)


# --- block
@pytest.fixture
def disk():
    return io.BytesIO(bytes(range(256)) * 8)


@pytest.fixture
def block(disk):
    driver = Driver(lambda memory: VirtioBlock(memory, disk), 1)
    driver.start()
    return driver


def request(driver, kind, sector, data=b"", room=0):
    driver.memory.write(BUFFERS, struct.pack("<IIQ", kind, 0, sector))
    driver.memory.write(BUFFERS + 0x100, data)
    driver.describe(0, BUFFERS, 16, NEXT, 1)
    if data:
        driver.describe(1, BUFFERS + 0x100, len(data), NEXT, 2)
    else:
        driver.describe(1, BUFFERS + 0x1000, room, WRITE | NEXT, 2)
    driver.describe(2, BUFFERS + 0x800, 1, WRITE)
    driver.offer(0, 0, len(driver.used()) + 1)
    return driver.memory.read(BUFFERS + 0x800, 1)[0], driver.memory.read(BUFFERS + 0x1000, room)


def test_a_disk_is_read_and_written(block, disk):
    assert block.read(4, 0, 8) == 4
    assert request(block, 0, 1, room=512) == (0, bytes(range(256)) * 2)
    assert request(block, 1, 3, b"z" * 512)[0] == 0
    assert disk.getvalue()[1536:] == b"z" * 512
    assert request(block, 8, 0, room=20) == (0, b"softtdx".ljust(20, b"\0"))


def test_what_lies_outside_of_a_disk_is_an_error(block, disk):
    before = disk.getvalue()
    assert request(block, 0, 4, room=512)[0] == 1
    assert request(block, 0, 1 << 63, room=512)[0] == 1
    assert request(block, 1, 4, b"z" * 512)[0] == 1
    assert request(block, 1, 0, b"z" * 100)[0] == 1
    assert request(block, 99, 0, room=512)[0] == 2
    assert disk.getvalue() == before


def test_a_read_only_disk_stays_as_it_is(disk):
    driver = Driver(lambda memory: VirtioBlock(memory, disk, read_only=True), 1)
    driver.start()
    assert driver.features() >> 5 & 1
    assert request(driver, 1, 0, b"z" * 512)[0] == 1
    assert disk.getvalue()[:4] == b"\0\1\2\3"


# --- the clock
def test_the_clock_tells_the_date_in_both_number_forms():
    clock = CmosClock(lambda: 1_795_401_957)  # 2026-11-22 ...

    def register(index):
        clock.write(0x70, index)
        return clock.read(0x71)

    decimal = [register(i) for i in (0x32, 9, 8)]
    assert decimal == [0x20, 0x26, 0x11]
    clock.write(0x70, 11)
    clock.write(0x71, 6)
    assert [register(i) for i in (0x32, 9, 8)] == [20, 26, 11]
    assert register(10) & 0x80 == 0
    assert register(13) == 0x80
