"""The serial port."""

from hypothesis import given
from hypothesis import strategies as st

from softtdx.kvm.uapi import IoExit
from softtdx.vmm.devices import PortBus
from softtdx.vmm.serial import Serial16550


def test_bytes_sent_come_out_and_the_transmitter_is_always_ready():
    out = bytearray()
    port = Serial16550(out.extend)
    for byte in b"ok":
        assert port.read(5) & 0x60 == 0x60
        port.write(0, byte)
    assert out == b"ok"


def test_the_divisor_latch_hides_the_data_register():
    out = bytearray()
    port = Serial16550(out.extend)
    port.write(3, 0x83)
    port.write(0, 1)
    port.write(1, 0)
    assert (port.read(0), port.read(1)) == (1, 0)
    port.write(3, 0x03)
    assert not out
    assert port.read(3) == 0x03


def test_received_bytes_wait_until_read():
    port = Serial16550(lambda data: None)
    port.feed(b"hi")
    assert port.read(5) & 1
    assert bytes([port.read(0), port.read(0)]) == b"hi"
    assert not port.read(5) & 1


def test_a_loopback_is_how_drivers_find_the_port():
    out = bytearray()
    port = Serial16550(out.extend)
    port.write(4, 0x1E)
    port.write(0, 0x5A)
    assert port.read(0) == 0x5A
    assert not out


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from([1, 2, 4]), st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1)))
)
def test_every_access_to_every_port_is_answered_within_its_width(accesses):
    ended = []
    bus = PortBus(lambda data: None, ended.append, lambda vcpu: None, lambda: None)
    for write, size, port, value in accesses:
        io = IoExit().put(write, size, port, value & ((1 << 8 * size) - 1))
        bus.access(0, io)
        assert 0 <= io.value < 1 << 8 * size
    assert all(0 <= status <= 255 for status in ended)


def test_a_driver_that_polls_learns_what_happened():
    sent = []
    port = Serial16550(sent.append)
    assert port.read(2) & 1
    port.write(1, 3)
    assert port.read(2) & 0xF == 2
    assert port.read(2) & 1
    port.feed(b"a")
    assert port.read(2) & 0xF == 4
    assert port.read(0) == ord("a")
    assert port.read(2) & 1
    port.write(0, ord("b"))
    assert port.read(2) & 0xF == 2
    assert sent == [b"b"]
