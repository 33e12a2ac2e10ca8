"""What the kernel's own selftests of TDX and guest_memfd look at: what a TD's guest meets, and what user space sees."""

import pytest
from host_actions import run_hosted

from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.leaves import TdcallLeaf
from softtdx.kvm import KvmError
from softtdx.vmm import End, Machine, MachineConfig
from softtdx.vmm.errors import GuestError
from softtdx.vmm.python_guest import GpError, PythonGuest, VeError, run_python_guest

PAGE = 4096
MIB = 1 << 20
HUGE = 2 * MIB
SMALL = MachineConfig(memory=MIB)
CPUID_EXIT, HLT_EXIT, EPT_EXIT = 10, 12, 48


class Recorder(Machine):
    """A machine that keeps every exit that reached user space, and answers reads with `answer`."""

    answer = 0

    def __init__(self, *args, **kwargs):
        self.exits = []
        super().__init__(*args, **kwargs)

    def _handle(self, vcpu, run):
        self.exits.append(run.exit_reason.name)
        if run.exit_reason.name == "MMIO":
            self.exits[-1] = (run.mmio.write, run.mmio.size, run.mmio.gpa, run.mmio.value)
            run.mmio.value = self.answer
        elif run.exit_reason.name == "IO" and run.io.port == 0x50:
            self.exits[-1] = (run.io.write, run.io.size, run.io.port, run.io.value)
            run.io.value = self.answer
        else:
            super()._handle(vcpu, run)


def recorded(host, program, answer=0, memory=MIB):
    machine = Recorder(host, MachineConfig(memory=memory))
    machine.answer = answer
    with PythonGuest(host, program, machine=machine) as guest:
        guest.run()
    return [e for e in machine.exits if isinstance(e, tuple)]


def test_a_td_lives_and_ends_and_another_can_follow(host):
    for _ in range(3):
        assert run_python_guest(host, lambda td: td.tdcall(TdcallLeaf.VP_INFO), SMALL).end is End.HALTED


@pytest.mark.parametrize("size", [1, 2, 4])
def test_port_accesses_reach_user_space_with_their_size_and_value(host, size):
    value = 0x1122_3344 & ((1 << 8 * size) - 1)

    def program(td):
        assert td.tdvmcall(VmcallLeaf.IO, size, 1, 0x50, value).r10 == 0
        answer = td.tdvmcall(VmcallLeaf.IO, size, 0, 0x50)
        assert (answer.r10, answer.r11) == (0, 0xA5A5_A5A5 & ((1 << 8 * size) - 1))

    assert recorded(host, program, 0xA5A5_A5A5) == [(True, size, 0x50, value), (False, size, 0x50, 0)]


@pytest.mark.parametrize("bad", [(3, 0, 0x50), (8, 1, 0x50), (0, 0, 0x50), (1, 2, 0x50), (1, 0, 1 << 16)])
def test_port_accesses_that_do_not_exist_are_invalid(host, bad):
    def program(td):
        assert td.tdvmcall(VmcallLeaf.IO, *bad).r10 == VmcallStatus.INVALID_OPERAND

    assert recorded(host, program) == []


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_reaches_user_space_without_the_shared_bit(host, size):
    at, mask = 0xC000_0010, (1 << 8 * size) - 1

    def program(td):
        where = at | td.shared_bit
        assert td.tdvmcall(VmcallLeaf.REQUEST_MMIO, size, 1, where, 0x0102_0304_0506_0708 & mask).r10 == 0
        answer = td.tdvmcall(VmcallLeaf.REQUEST_MMIO, size, 0, where)
        assert (answer.r10, answer.r11) == (0, 0xFEED_FACE_CAFE_BEEF & mask)

    expected = [(True, size, at, 0x0102_0304_0506_0708 & mask), (False, size, at, 0)]
    assert recorded(host, program, 0xFEED_FACE_CAFE_BEEF) == expected


def test_mmio_to_private_or_across_pages_is_invalid(host):
    def program(td):
        for size, write, at in (
            (4, 0, 0xC000_0000),
            (4, 0, td.shared_bit | 0xFFE),
            (3, 0, td.shared_bit | 0xC000_0000),
        ):
            assert td.tdvmcall(VmcallLeaf.REQUEST_MMIO, size, write, at).r10 == VmcallStatus.INVALID_OPERAND

    assert recorded(host, program) == []


def test_touching_a_device_gives_ve_that_names_the_address(host):
    def program(td):
        with pytest.raises(VeError):
            td.load(td.shared(0x4000_0000))
        info = td.ve_info()
        assert info.rcx & 0xFFFF_FFFF == EPT_EXIT
        assert info.r9 == 0x4000_0000 | td.shared_bit

    run_python_guest(host, program, SMALL)


def test_cpuid_is_answered_by_the_module_or_gives_ve(host):
    def program(td):
        _, ebx, ecx, edx = td.cpuid(0x21)
        assert b"".join(x.to_bytes(4, "little") for x in (ebx, edx, ecx)) == b"IntelTDX    "
        answer = td.tdvmcall(VmcallLeaf.CPUID, 0, 0)
        assert answer.r10 == 0
        name = b"".join(x.to_bytes(4, "little") for x in (answer.r13, answer.r15, answer.r14))
        assert name == b"GenuineIntel"
        with pytest.raises(VeError):
            td.cpuid(0x4000_0000)
        assert td.ve_info().rcx & 0xFFFF_FFFF == CPUID_EXIT

    run_python_guest(host, program, SMALL)


def test_msrs_belong_to_the_td_to_the_vmm_or_to_nobody(host):
    def program(td):
        td.wrmsr(0xC000_0102, 0x1234_5000)  # KERNEL_GS_BASE: the TD's own
        assert td.rdmsr(0xC000_0102) == 0x1234_5000
        answer = td.tdvmcall(VmcallLeaf.RDMSR, 0xFE)  # MTRRCAP: KVM's
        assert (answer.r10, answer.r11) == (0, 0x508)
        assert td.tdvmcall(VmcallLeaf.WRMSR, 0x250, 0x0606_0606).r10 == 0
        assert td.tdvmcall(VmcallLeaf.RDMSR, 0x250).r11 == 0x0606_0606
        for leaf in (VmcallLeaf.RDMSR, VmcallLeaf.WRMSR):
            assert td.tdvmcall(leaf, 0xDEAD_BEEF).r10 == VmcallStatus.INVALID_OPERAND
        with pytest.raises((VeError, GpError)):
            td.rdmsr(0xDEAD_BEEF)

    run_python_guest(host, program, SMALL)


def test_hlt_gives_ve_and_the_hypercall_halts(host):
    def program(td):
        with pytest.raises(VeError):
            td.hlt()
        assert td.ve_info().rcx & 0xFFFF_FFFF == HLT_EXIT

    assert run_python_guest(host, program, SMALL).end is End.HALTED


def test_a_hypercall_that_is_not_there_is_said_to_be_so(host):
    def program(td):
        assert td.tdvmcall(0x7FFF).r10 == VmcallStatus.SUBFUNC_UNSUPPORTED
        assert td.tdvmcall(VmcallLeaf.GET_TDVMCALL_INFO, 0).r10 == 0

    run_python_guest(host, program, SMALL)


def test_shared_memory_is_user_spaces_and_private_memory_is_not(host):
    page = 0x8000

    def program(td, vm, do):
        slot = vm.memslots.find(page)
        assert td.accept(page) == 0
        td.store(page, 0x5EC_2E7)
        assert do(lambda: vm.mm.read(slot.hva(page), 8)) == bytes(8)
        do(lambda: vm.mm.write(slot.hva(page), b"\xff" * 8))
        assert td.load(page) == 0x5EC_2E7
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, page | td.shared_bit, PAGE).r10 == 0
        td.store(td.shared(page), 0x0BE11)
        assert int.from_bytes(do(lambda: vm.mm.read(slot.hva(page), 8)), "little") == 0x0BE11
        do(lambda: vm.mm.write(slot.hva(page), (77).to_bytes(8, "little")))
        assert td.load(td.shared(page)) == 77

    run_hosted(host, program)


def test_a_conversion_by_touch_is_asked_of_user_space(host):
    """Without MapGPA: the shared alias of a private page is touched, and KVM_EXIT_MEMORY_FAULT converts it."""
    page = 0x8000

    def program(td, vm, do):
        assert td.accept(page) == 0
        td.store(td.shared(page), 5)
        assert not vm.private.is_private(page)
        assert td.load(td.shared(page)) == 5

    assert run_hosted(host, program)["conversions"] >= 2


def test_conversions_that_make_no_sense_are_refused(host):
    def program(td):
        for gpa, size, status in (
            (0, 0, VmcallStatus.INVALID_OPERAND),
            (1, PAGE, VmcallStatus.ALIGN_ERROR),
            (0, PAGE + 1, VmcallStatus.ALIGN_ERROR),
            (td.shared_bit - PAGE, 2 * PAGE, VmcallStatus.INVALID_OPERAND),
            (td.shared_bit << 1, PAGE, VmcallStatus.INVALID_OPERAND),
        ):
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa, size).r10 == status
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x4000_0000, PAGE).r10 != 0  # no memory there

    run_python_guest(host, program, SMALL)


def test_a_large_conversion_is_asked_of_user_space_a_part_at_a_time(host):
    def program(td):
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 2 * MIB | td.shared_bit, 6 * MIB).r10 == 0

    machine = Recorder(host, MachineConfig(memory=8 * MIB))
    with PythonGuest(host, program, machine=machine) as guest:
        assert guest.run().stats["conversions"] == 5  # two of them made the TD's memory private
    assert machine.exits.count("HYPERCALL") == 3


def test_touching_private_memory_before_accepting_it_ends_the_td(host):
    def program(td, vm, do):
        do(lambda: vm.vcpus[0].pre_fault_memory(0x8000, PAGE))
        td.load(0x8000)

    with pytest.raises(GuestError, match="before accepting"):
        run_hosted(host, program)


def test_large_pages_come_from_accepting_large_and_go_by_a_hole(host):
    def program(td, vm, do):
        secure, file = vm.ops.secure, vm.memslots.find(0).guest_memfd
        assert td.accept(HUGE, 1) == 0
        assert secure.lookup(HUGE).level == 1
        do(lambda: file.punch_hole(HUGE + PAGE, PAGE))
        assert secure.lookup(HUGE).level == 0
        assert secure.lookup(HUGE + PAGE) is None
        assert td.accept(HUGE + PAGE) == 0  # a fresh page, zero
        assert td.load(HUGE + PAGE) == 0
        with pytest.raises(KvmError):
            do(lambda: file.punch_hole(HUGE + 1, PAGE))

    run_hosted(host, program)


def test_a_reported_fatal_error_reaches_user_space(host):
    with pytest.raises(GuestError, match="fatal"):
        run_python_guest(host, lambda td: td.tdvmcall(VmcallLeaf.REPORT_FATAL_ERROR, 0xBAD), SMALL)
