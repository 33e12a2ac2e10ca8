"""struct kvm_run as a VMM maps it: what each exit writes there, and that KVM believes nothing that is in it."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ioctl_td import answered, fails
from test_vcpu_state import Machine

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.kvm import EXIT_HYPERCALL_LONG_MODE, HC_MAP_GPA_RANGE, MEMORY_EXIT_FLAG_PRIVATE, KvmExit, KvmIoctl
from softtdx.abi.kvm_run import EXIT_AT, KvmRun
from softtdx.kvm.ioctl import Process
from softtdx.kvm.memory import PAGE
from softtdx.vmm import Machine as Vmm
from softtdx.vmm import MachineConfig
from softtdx.vmm.errors import GuestError
from softtdx.vmm.python_guest import PythonGuest

EINTR, EINVAL, ENODEV = 4, 22, 19
MIB = 1 << 20


@pytest.fixture
def process(host):
    found = Process(host)
    yield found
    found.exit()


def test_the_run_is_mapped_from_the_vcpu_and_nothing_else_is(process):
    machine = Machine(process)
    kvm = process.open()
    size = process.ioctl(kvm, KvmIoctl.GET_VCPU_MMAP_SIZE)
    assert size == 2 * PAGE
    run = process.mmap(machine.vcpu, size)
    assert len(process.mmap(machine.vcpu, PAGE, PAGE)) == PAGE
    for bad in ((0, 0), (size + 1, 0), (PAGE, 1), (PAGE, size), (PAGE, -PAGE)):
        fails(EINVAL, process.mmap, machine.vcpu, *bad)
    for fd in (kvm, machine.vm):
        fails(ENODEV, process.mmap, fd, PAGE)
    machine.run()
    assert struct.unpack_from("<I", run, 8)[0] == KvmExit.HLT


def test_a_port_access_is_where_its_offset_says(process):
    # mov eax, 0x11223344; out 0x80, eax; in al, 0x81; hlt
    machine = Machine(process, bytes.fromhex("b844332211e780e481f4"))
    run = process.mmap(machine.vcpu, 2 * PAGE)
    machine.ioctl(machine.vcpu, KvmIoctl.RUN)
    direction, size, port, count, offset = struct.unpack_from("<BBHIQ", run, EXIT_AT)
    assert (direction, size, port, count) == (1, 4, 0x80, 1)
    assert run[offset : offset + 4] == bytes.fromhex("44332211")
    machine.ioctl(machine.vcpu, KvmIoctl.RUN)
    direction, size, port, count, offset = struct.unpack_from("<BBHIQ", run, EXIT_AT)
    assert (direction, size, port, count) == (0, 1, 0x81, 1)
    run[offset] = 0x5A
    machine.ioctl(machine.vcpu, KvmIoctl.RUN)
    regs = bytearray(144)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_REGS, regs)
    assert struct.unpack_from("<Q", regs)[0] == 0x1122_335A


def test_an_immediate_exit_finishes_what_was_begun_and_runs_nothing(process):
    # in al, 0x81; out 0x80, al; hlt
    machine = Machine(process, bytes.fromhex("e481e680f4"))
    run = machine.run()
    run.io.value = 0x33
    run.immediate_exit = 1
    for _ in range(2):
        fails(EINTR, machine.ioctl, machine.vcpu, KvmIoctl.RUN)
        assert run.exit_reason is KvmExit.INTR
    regs = bytearray(144)
    machine.ioctl(machine.vcpu, KvmIoctl.GET_REGS, regs)
    assert struct.unpack_from("<Q", regs)[0] == 0x33
    run.immediate_exit = 0
    machine.run()
    assert (run.exit_reason, run.io.value) == (KvmExit.IO, 0x33)


def test_registers_to_synchronise_are_refused(process):
    machine = Machine(process)
    run = process.kvm_run(machine.vcpu)
    for name in ("kvm_valid_regs", "kvm_dirty_regs"):
        setattr(run, name, 1)
        fails(EINVAL, machine.ioctl, machine.vcpu, KvmIoctl.RUN)
        setattr(run, name, 0)
    assert machine.run().exit_reason is KvmExit.HLT


class Exits(Vmm):
    """A VMM that keeps the bytes of every exit, and answers as `answers` says by exit reason."""

    answers = None

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _handle(self, vcpu, run):
        self.seen.append((run.exit_reason, bytes(run.view)))
        answer = (self.answers or {}).get(run.exit_reason)
        if answer is None or answer(run):
            super()._handle(vcpu, run)


def exits_of(host, program, answers=None):
    machine = Exits(host, MachineConfig(memory=MIB))
    machine.answers = answers or {}
    with PythonGuest(host, program, machine=machine) as guest:
        guest.run()
    return [KvmRun(bytearray(raw)) for _, raw in machine.seen]


def test_a_conversion_is_a_hypercall_exit(host):
    runs = exits_of(host, lambda td: td.tdvmcall(VmcallLeaf.MAP_GPA, 0x8000 | td.shared_bit, 2 * PAGE))
    call = next(run.hypercall for run in runs if run.exit_reason is KvmExit.HYPERCALL)
    assert call.nr == HC_MAP_GPA_RANGE
    assert call.args == (0x8000, 2, 0, 0, 0, 0)
    assert (call.ret, call.flags) == (0, EXIT_HYPERCALL_LONG_MODE)


def test_a_conversion_that_user_space_refuses_or_does_not_do_fails_in_the_td(host):
    def refuse(run):
        run.hypercall.ret = EINVAL

    def program(td):
        answer = td.tdvmcall(VmcallLeaf.MAP_GPA, 0x8000 | td.shared_bit, PAGE)
        assert (answer.r10, answer.r11) == (VmcallStatus.INVALID_OPERAND, 0x8000 | td.shared_bit)

    exits_of(host, program, {KvmExit.HYPERCALL: refuse})
    machine = Exits(host, MachineConfig(memory=MIB))
    machine.vm.hypercall_exits = 0

    def unsupported(td):
        answer = td.tdvmcall(VmcallLeaf.MAP_GPA, 0x8000 | td.shared_bit, PAGE)
        assert answer.r10 == VmcallStatus.SUBFUNC_UNSUPPORTED

    with PythonGuest(host, unsupported, machine=machine) as guest:
        guest.run()


def test_getquote_and_its_companions_are_tdx_exits(host):
    seen = []

    def answer(run):
        seen.append((run.tdx.nr, run.tdx.data, run.tdx.ret))
        if run.tdx.nr == VmcallLeaf.GET_TDVMCALL_INFO:
            run.tdx.answer_info(1, 2, 3, 4)
            return
        run.tdx.ret = VmcallStatus.RETRY

    def program(td):
        assert td.tdvmcall(VmcallLeaf.GET_QUOTE, 0x9000 | td.shared_bit, PAGE).r10 == VmcallStatus.RETRY
        assert td.tdvmcall(VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, 0x40).r10 == VmcallStatus.RETRY
        info = td.tdvmcall(VmcallLeaf.GET_TDVMCALL_INFO, 1)
        assert (info.r10, info.r11, info.r12, info.r13, info.r14) == (0, 1, 2, 3, 4)
        for leaf, operand in ((VmcallLeaf.GET_TDVMCALL_INFO, 2), (VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, 31)):
            assert td.tdvmcall(leaf, operand).r10 == VmcallStatus.INVALID_OPERAND
        assert td.tdvmcall(VmcallLeaf.GET_QUOTE, 0x9000, PAGE).r10 == VmcallStatus.INVALID_OPERAND  # private

    exits_of(host, program, {KvmExit.TDX: answer})
    unsupported = VmcallStatus.SUBFUNC_UNSUPPORTED
    assert seen == [
        (VmcallLeaf.GET_QUOTE, (0x9000, PAGE, 0, 0, 0), unsupported),
        (VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, (0x40, 0, 0, 0, 0), unsupported),
        (VmcallLeaf.GET_TDVMCALL_INFO, (1, 0, 0, 0, 0), VmcallStatus.SUCCESS),
    ]


def test_a_fatal_error_gives_user_space_sixteen_registers(host):
    machine = Exits(host, MachineConfig(memory=MIB))
    with (
        PythonGuest(
            host, lambda td: td.tdvmcall(VmcallLeaf.REPORT_FATAL_ERROR, 0xBAD, 0, 0x6F6F), machine=machine
        ) as guest,
        pytest.raises(GuestError, match="oo"),
    ):
        guest.run()
    run = KvmRun(bytearray(machine.seen[-1][1]))
    assert (run.exit_reason, run.system_event.type, run.system_event.ndata) == (KvmExit.SYSTEM_EVENT, 7, 16)
    assert run.system_event.data[11:15] == (VmcallLeaf.REPORT_FATAL_ERROR, 0xBAD, 0, 0x6F6F)


def test_private_memory_that_is_not_there_is_a_memory_fault(host):
    faults = []

    def keep(run):
        faults.append((run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size))
        return True

    with pytest.raises(GuestError, match="where it has none"):
        exits_of(host, lambda td: td.load(0x7000_0123), {KvmExit.MEMORY_FAULT: keep})
    assert faults == [(MEMORY_EXIT_FLAG_PRIVATE, 0x7000_0000, PAGE)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(writes=st.lists(st.tuples(st.integers(0, 2 * PAGE - 9), st.integers(0, (1 << 64) - 1)), max_size=12))
def test_kvm_believes_nothing_that_user_space_writes_there(host, writes):
    """At every exit user space scribbles over the run; the guest goes on all the same."""
    process = Process(host)
    try:
        # mov ecx, 3; again: in al, 0x81; out 0x80, al; loop again; hlt
        machine = Machine(process, bytes.fromhex("b903000000e481e680e2faf4"))
        run = process.mmap(machine.vcpu, 2 * PAGE)
        for _ in range(12):
            answer = answered(machine.ioctl, machine.vcpu, KvmIoctl.RUN)
            assert answer in (0, -EINTR, -EINVAL)
            if answer == -EINVAL:  # registers to synchronise
                struct.pack_into("<QQ", run, 288, 0, 0)
            run[1] = 0
            for at, value in writes:
                struct.pack_into("<Q", run, at, value)
            struct.pack_into("<QQ", run, 288, 0, 0)
        run[1] = 0
        machine.ioctl(machine.vcpu, KvmIoctl.RUN)
        regs = bytearray(144)
        machine.ioctl(machine.vcpu, KvmIoctl.GET_REGS, regs)
        assert struct.unpack_from("<Q", regs, 16)[0] <= 3
    finally:
        process.exit()
