"""Eventfds in KVM: interrupts by GSI, and stores of a guest that go to an eventfd instead of to user space."""

import struct
import threading

import pytest
from host_actions import HostedMachine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ioctl_td import answered, fails
from test_vcpu_state import ENTRY, Machine

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import IoeventfdFlag, IrqfdFlag, KvmExit, KvmIoctl
from softtdx.kvm.eventfd import Eventfd
from softtdx.kvm.ioctl import Process
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import PythonGuest

EBADF, EAGAIN, EBUSY, EEXIST, EINVAL, ENOENT, ENXIO = 9, 11, 16, 17, 22, 2, 6
VECTOR = 0x41
DEVICE = 0x4000_0000


@pytest.fixture
def process(host):
    found = Process(host)
    yield found
    found.exit()


def route(gsi, vector=VECTOR, kind=2, flags=0, high=0):
    return struct.pack("<IIIIIII20x", gsi, kind, flags, 0, 0xFEE0_0000, high, vector)


def routing(*entries, flags=0):
    return bytearray(struct.pack("<II", len(entries), flags) + b"".join(entries))


def irqfd(fd, gsi, flags=0):
    return bytearray(struct.pack("<IIII16x", fd, gsi, flags, 0))


def ioeventfd(fd, address, length, value=0, flags=0):
    return bytearray(struct.pack("<QQIiI36x", value, address, length, fd, flags))


def posted(process, machine):
    return process.file(machine.vcpu).apic.posted_vectors()


def test_a_signalled_eventfd_raises_what_its_gsi_is_routed_to(process):
    machine = Machine(process, apic=True)
    fd = process.eventfd()
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5)))
    machine.ioctl(machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5))
    assert posted(process, machine) == []
    process.write(fd, (3).to_bytes(8, "little"))
    assert posted(process, machine) == [VECTOR]
    fails(EAGAIN, process.read, fd, 8)  # KVM took the signal
    fails(EBUSY, machine.ioctl, machine.vm, KvmIoctl.IRQFD, irqfd(fd, 6))
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5, 0x42)))  # a new table is used at once
    process.write(fd, (1).to_bytes(8, "little"))
    assert posted(process, machine) == [VECTOR, 0x42]
    machine.ioctl(machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5, IrqfdFlag.DEASSIGN))
    process.write(fd, (1).to_bytes(8, "little"))
    assert process.read(fd, 8) == (1).to_bytes(8, "little")


def test_a_signal_that_came_before_the_irqfd_is_not_lost_and_a_closed_eventfd_is_forgotten(process):
    machine = Machine(process, apic=True)
    fd = process.eventfd(1)
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5)))
    machine.ioctl(machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5))
    assert posted(process, machine) == [VECTOR]
    process.close(fd)
    assert not process.file(machine.vm).irqfds._bound


def test_a_vcpu_that_has_halted_in_the_kernel_is_woken_by_an_eventfd(process):
    # hlt; jmp $ ... the handler: out 0x80, al
    machine = Machine(process, bytes.fromhex("f4ebfe").ljust(0x100, b"\xf4") + bytes.fromhex("e680f4"), apic=True)
    machine.handle(VECTOR, ENTRY + 0x100)
    fd = process.eventfd()
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5)))
    machine.ioctl(machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5))
    thread = threading.Thread(target=machine.run)
    thread.start()
    process.write(fd, (1).to_bytes(8, "little"))  # before it halts, or after: it is not lost
    thread.join()
    run = process.kvm_run(machine.vcpu)
    assert (run.exit_reason, run.io.port) == (KvmExit.IO, 0x80)


def test_interrupt_lines_are_messages_too(process):
    machine = Machine(process, apic=True)
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5), route(5, 0x50), route(7, 0x60)))
    line = bytearray(struct.pack("<II", 5, 1))
    machine.ioctl(machine.vm, KvmIoctl.IRQ_LINE_STATUS, line)
    assert struct.unpack("<iI", line) == (2, 1)
    assert posted(process, machine) == [VECTOR, 0x50]
    machine.ioctl(machine.vm, KvmIoctl.IRQ_LINE, bytearray(struct.pack("<II", 7, 0)))
    assert posted(process, machine) == [VECTOR, 0x50]
    unrouted = bytearray(struct.pack("<II", 9, 1))
    machine.ioctl(machine.vm, KvmIoctl.IRQ_LINE_STATUS, unrouted)
    assert struct.unpack("<iI", unrouted)[0] == 0
    bare = Machine(process)
    fails(ENXIO, bare.ioctl, bare.vm, KvmIoctl.IRQ_LINE, line)
    fails(EINVAL, bare.ioctl, bare.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5)))
    fails(EAGAIN, bare.ioctl, bare.vm, KvmIoctl.IRQFD, irqfd(process.eventfd(), 5))


@pytest.mark.parametrize(
    "table",
    [
        routing(flags=1),
        routing(route(5, kind=1)),  # an in-kernel interrupt controller, which is not there
        routing(route(5, kind=9)),
        routing(route(5, flags=2)),
        routing(route(4096)),
        bytearray(struct.pack("<II", 4097, 0)),
    ],
)
def test_a_table_that_cannot_be_is_refused_and_the_old_one_stays(process, table):
    machine = Machine(process, apic=True)
    machine.ioctl(machine.vm, KvmIoctl.SET_GSI_ROUTING, routing(route(5)))
    fails(EINVAL, machine.ioctl, machine.vm, KvmIoctl.SET_GSI_ROUTING, table)
    assert process.file(machine.vm).set_irq(5, 1) == 1


def test_descriptors_that_are_no_eventfds(process):
    machine = Machine(process, apic=True)
    for fd, code in ((99, EBADF), (machine.vm, EINVAL)):
        fails(code, machine.ioctl, machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5))
        fails(code, machine.ioctl, machine.vm, KvmIoctl.IOEVENTFD, ioeventfd(fd, 0x80, 1))
        fails(code, process.write, fd, bytes(8))
    fd = process.eventfd()
    for flags in (4, IrqfdFlag.RESAMPLE):
        fails(EINVAL, machine.ioctl, machine.vm, KvmIoctl.IRQFD, irqfd(fd, 5, flags))
    fails(EINVAL, process.write, fd, b"short")
    fails(EINVAL, process.write, fd, b"\xff" * 8)
    fails(EINVAL, process.read, fd, 4)
    process.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
    fails(EAGAIN, process.write, fd, (1).to_bytes(8, "little"))
    fails(EINVAL, process.eventfd, 0, 1 << 5)
    semaphore = process.eventfd(2, 1)
    assert [process.read(semaphore, 8)[0] for _ in range(2)] == [1, 1]
    fails(EAGAIN, process.read, semaphore, 8)


def test_a_guests_store_signals_and_user_space_sees_only_the_others(process):
    # mov al, 1; out 0x80, al; mov al, 2; out 0x80, al; out 0x81, al; hlt
    machine = Machine(process, bytes.fromhex("b001e680b002e680e681f4"))
    one, any_value = process.eventfd(), process.eventfd()
    pio = IoeventfdFlag.PIO
    change = lambda *args: machine.ioctl(machine.vm, KvmIoctl.IOEVENTFD, ioeventfd(*args))  # noqa: E731
    change(one, 0x80, 1, 1, pio | IoeventfdFlag.DATAMATCH)
    change(any_value, 0x81, 0, 0, pio)
    fails(EEXIST, change, any_value, 0x80, 0, 0, pio)
    fails(ENOENT, change, any_value, 0x80, 1, 1, pio | IoeventfdFlag.DATAMATCH | IoeventfdFlag.DEASSIGN)
    run = machine.run()
    assert (run.exit_reason, run.io.port, run.io.value) == (KvmExit.IO, 0x80, 2)
    assert machine.run().exit_reason is KvmExit.HLT
    assert process.read(one, 8)[0] == process.read(any_value, 8)[0] == 1
    change(one, 0x80, 1, 1, pio | IoeventfdFlag.DATAMATCH | IoeventfdFlag.DEASSIGN)
    for bad in ((one, 0x80, 3), (one, 0x80, 16), (one, (1 << 64) - 1, 2), (one, 0x80, 1, 0, 16), (one, 0, 0, 0, 1)):
        fails(EINVAL, change, *bad)


def test_a_doorbell_that_nobody_answers_is_rung_without_harm(process):
    machine = Machine(process, bytes.fromhex("e680e680f4"))  # out 0x80, al; out 0x80, al; hlt
    fd = process.eventfd()
    process.write(fd, ((1 << 64) - 2).to_bytes(8, "little"))
    machine.ioctl(machine.vm, KvmIoctl.IOEVENTFD, ioeventfd(fd, 0x80, 1, 0, IoeventfdFlag.PIO))
    assert machine.run().exit_reason is KvmExit.HLT
    assert process.read(fd, 8) == b"\xff" * 8


def test_a_tds_mmio_and_port_hypercalls_signal_too(host):
    machine = HostedMachine(host, MachineConfig(memory=1 << 20))
    doorbell, port = Eventfd(), Eventfd()
    machine.vm.io_bus.change(DEVICE, 4, 7, IoeventfdFlag.DATAMATCH, doorbell)
    machine.vm.io_bus.change(0x70, 1, 0, IoeventfdFlag.PIO, port)

    def program(td):
        for value in (7, 7, 8):
            assert td.tdvmcall(VmcallLeaf.REQUEST_MMIO, 4, 1, DEVICE | td.shared_bit, value).r10 == 0
        assert td.tdvmcall(VmcallLeaf.IO, 1, 1, 0x70, 1).r10 == 0

    with PythonGuest(host, program, machine=machine) as guest:
        guest.run()
    assert (doorbell.read(), port.read()) == (2, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from([KvmIoctl.IRQFD, KvmIoctl.IOEVENTFD, KvmIoctl.SET_GSI_ROUTING, KvmIoctl.IRQ_LINE]),
            st.integers(0, 9),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, 1 << 33),
            st.integers(0, 20),
        ),
        max_size=8,
    )
)
def test_whatever_is_bound_and_unbound_nothing_stays_behind(host, calls):
    process = Process(host)
    try:
        machine = Machine(process, apic=True)
        for _ in range(3):
            process.eventfd()
        for request, fd, address, value, flags in calls:
            argument = {
                KvmIoctl.IRQFD: lambda fd=fd, v=value, f=flags: irqfd(fd, v & 0xFFFF_FFFF, f),
                KvmIoctl.IOEVENTFD: lambda fd=fd, a=address, v=value, f=flags: ioeventfd(fd, a, v % 10, v, f),
                KvmIoctl.SET_GSI_ROUTING: lambda v=value, f=flags: routing(route(v % 8192, v % 256, f % 4)),
                KvmIoctl.IRQ_LINE: lambda v=value, f=flags: bytearray(struct.pack("<II", v & 0xFFFF_FFFF, f & 1)),
            }[request]()
            answer = answered(machine.ioctl, machine.vm, request, argument)
            assert answer == 0 or -answer in (EBADF, EINVAL, EBUSY, EEXIST, ENOENT)
            answered(process.write, fd, (1).to_bytes(8, "little"))
    finally:
        process.exit()
