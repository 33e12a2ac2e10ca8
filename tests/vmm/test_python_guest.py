"""Guests written in Python: every instruction takes the way a TD's instruction takes."""

import hashlib

import pytest

from softtdx.abi.exits import ExitReason
from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.status import Operand, Status, status_of
from softtdx.attest.tdreport import parse_tdreport
from softtdx.hw import Registers
from softtdx.vmm import End, GuestError, MachineConfig, MachineError
from softtdx.vmm.python_guest import GpError, PfError, PythonGuest, VeError, run_python_guest

PAGE = 4096
MIB = 1 << 20
VM = MachineConfig(memory=MIB, vm=True)


def test_a_function_runs_as_a_td_and_learns_who_it_is(host):
    seen = []

    def guest(td):
        info = td.tdcall(TdcallLeaf.VP_INFO)
        seen.append((info.rcx & 0x3F, info.r8 & 0xFFFF_FFFF, info.r9, td.is_td, td.shared_bit))

    assert run_python_guest(host, guest).end is End.HALTED
    assert seen == [(48, 1, 0, True, 1 << 47)]


def test_a_td_of_52_gpa_bits_has_its_shared_bit_at_the_top(host):
    def guest(td):
        assert td.shared_bit == 1 << 51
        assert td.accept(0x3000) == 0
        td.store(0x3000, 1)
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x4000 | td.shared_bit, PAGE).r10 == 0
        td.store(td.shared(0x4000), 2)
        assert (td.load(0x3000), td.load(td.shared(0x4000))) == (1, 2)

    run_python_guest(host, guest, MachineConfig(memory=MIB, gpa_width=52))


def test_the_same_function_runs_in_an_ordinary_vm(host):
    seen = []

    def guest(td):
        seen.append((td.is_td, td.shared_bit, td.cpuid(0)[0] > 0))
        td.write(0x5000, b"no acceptance needed")
        seen.append(td.read(0x5000, 20))
        td.print("from a VM\n")

    result = run_python_guest(host, guest, VM)
    assert seen == [(False, 0, True), b"no acceptance needed"]
    assert result.console == b"from a VM\n"


def test_accepted_memory_is_zero_and_keeps_what_is_written(host):
    def guest(td):
        assert td.accept(0x3000) == 0
        assert td.read(0x3000, PAGE) == bytes(PAGE)
        td.write(0x3FF0, b"sixteen bytes!!!")
        assert td.read(0x3FF0, 16) == b"sixteen bytes!!!"
        td.store(0x3008, 0x1122_3344_5566_7788)
        assert td.load(0x3008) == 0x1122_3344_5566_7788
        assert status_of(td.accept(0x3000)) is Status.PAGE_ALREADY_ACCEPTED

    run_python_guest(host, guest)


def test_two_mebibytes_are_accepted_at_once_and_split_when_a_part_is_shared(host):
    def guest(td):
        assert td.accept(0, level=1) == 0
        td.store(0x1F_F000, 7)
        td.store(0x2000, 9)
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x4000 | td.shared_bit, PAGE).r10 == VmcallStatus.SUCCESS
        td.store(td.shared(0x4000), 5)
        assert (td.load(0x1F_F000), td.load(0x2000), td.load(td.shared(0x4000))) == (7, 9, 5)

    run_python_guest(host, guest, MachineConfig(memory=2 * MIB))


def test_virtualisation_exceptions_arrive_as_python_exceptions(host):
    def guest(td):
        for instruction, reason in (
            (lambda: td.inb(0x3FD), ExitReason.IO_INSTRUCTION),
            (lambda: td.outl(0x80, 1), ExitReason.IO_INSTRUCTION),
            (td.hlt, ExitReason.HLT),
        ):
            with pytest.raises(VeError):
                instruction()
            info = td.ve_info()
            assert info.rcx & 0xFFFF_FFFF == reason
        assert status_of(td.ve_info().rax) is Status.NO_VALID_VE_INFO

    run_python_guest(host, guest)


def test_general_protection_and_page_faults_arrive_too(host):
    def guest(td):
        with pytest.raises(PfError) as pf:
            td.load(0x80_0000_0000)  # 512 GiB: beyond the identity map
        assert pf.value.cr2 == 0x80_0000_0000
        assert pf.value.error_code & 1 == 0
        with pytest.raises(GpError) as gp:
            td.load(1 << 62)  # not canonical
        assert gp.value.error_code == 0

    run_python_guest(host, guest)


def test_cpuid_of_a_td_is_the_modules(host):
    def guest(td):
        _, ebx, ecx, edx = td.cpuid(0x21)
        assert b"".join(v.to_bytes(4, "little") for v in (ebx, edx, ecx)) == b"IntelTDX    "

    run_python_guest(host, guest)


def test_shared_memory_is_what_the_host_sees_and_private_memory_is_not(host):
    secret = b"nobody but the TD reads this...."
    message = b"everybody may read this........."

    def guest(td):
        for page in (0x4000, 0x5000):
            assert td.accept(page) == 0
        td.write(0x4000, secret)
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x5000 | td.shared_bit, PAGE).r10 == VmcallStatus.SUCCESS
        td.write(td.shared(0x5000), message)
        slot = python.machine.vm.memslots.find(0x5000)
        assert python.machine.kvm.mm.read(slot.hva(0x5000), len(message)) == message
        mapping = python.machine.vm.ops.secure.lookup(0x4000)
        memory = host.platform.memory
        assert python.machine.vm.ops.secure.lookup(0x5000) is None
        assert secret not in memory.read(mapping.hpa, PAGE)
        assert secret not in memory.raw_read(mapping.hpa, PAGE)

    with PythonGuest(host, guest) as python:
        python.run()


def test_memory_goes_back_and_forth_and_comes_back_empty(host):
    def guest(td):
        assert td.accept(0x6000) == 0
        td.store(0x6000, 0xAA)
        for _ in range(3):
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x6000 | td.shared_bit, PAGE).r10 == 0
            assert td.load(td.shared(0x6000)) == 0
            td.store(td.shared(0x6000), 0xBB)
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, 0x6000, PAGE).r10 == 0
            assert td.accept(0x6000) == 0
            assert td.load(0x6000) == 0
            td.store(0x6000, 0xCC)

    run_python_guest(host, guest)


@pytest.mark.parametrize(
    ("gpa", "size", "status"),
    [
        (0x6000, 0, VmcallStatus.INVALID_OPERAND),
        (0x6001, PAGE, VmcallStatus.ALIGN_ERROR),
        (0x6000, 100, VmcallStatus.ALIGN_ERROR),
        (1 << 48, PAGE, VmcallStatus.INVALID_OPERAND),
        ((1 << 47) - PAGE, 2 * PAGE, VmcallStatus.INVALID_OPERAND),
        (1 << 63, PAGE, VmcallStatus.INVALID_OPERAND),
        (0x4000_0000, PAGE, VmcallStatus.INVALID_OPERAND),
        (0, (1 << 64) - PAGE, VmcallStatus.INVALID_OPERAND),
    ],
)
def test_map_gpa_with_bad_operands_is_refused(host, gpa, size, status):
    def guest(td):
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa, size).r10 == status

    run_python_guest(host, guest)


def test_hypercalls_with_bad_operands_are_refused_and_unknown_ones_too(host):
    def guest(td):
        bad = VmcallStatus.INVALID_OPERAND
        assert td.tdvmcall(VmcallLeaf.IO, 3, 0, 0x3F8).r10 == bad
        assert td.tdvmcall(VmcallLeaf.IO, 1, 2, 0x3F8).r10 == bad
        assert td.tdvmcall(VmcallLeaf.IO, 1, 0, 1 << 16).r10 == bad
        assert td.tdvmcall(VmcallLeaf.REQUEST_MMIO, 4, 0, 0x1000).r10 == bad
        assert td.tdvmcall(VmcallLeaf.RDMSR, 0xDEAD).r10 == bad
        assert td.tdvmcall(VmcallLeaf.WRMSR, 0xDEAD, 1).r10 == bad
        assert td.tdvmcall(VmcallLeaf.GET_QUOTE, 0x1000, PAGE).r10 == bad
        assert td.tdvmcall(VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, 3).r10 == bad
        assert td.tdvmcall(VmcallLeaf.SETUP_EVENT_NOTIFY_INTERRUPT, 60).r10 == 0
        assert td.tdvmcall(VmcallLeaf.GET_TDVMCALL_INFO, 0).r10 == 0
        assert td.tdvmcall(0x7777).r10 == VmcallStatus.SUBFUNC_UNSUPPORTED
        assert td.tdvmcall(VmcallLeaf.RDMSR, 0x1A0).r10 == 0
        assert td.tdvmcall(VmcallLeaf.REQUEST_MMIO, 4, 0, 0x8000_0000 | td.shared_bit).r11 == 0xFFFF_FFFF

    run_python_guest(host, guest)


def test_rtmrs_and_reports_tell_what_was_measured(host):
    digest = hashlib.sha384(b"event").digest()
    reports = []

    def guest(td):
        assert td.accept(0x8000) == 0
        td.write(0x8000, digest)
        assert td.tdcall(TdcallLeaf.MR_RTMR_EXTEND, rcx=0x8000, rdx=2).rax == 0
        td.write(0x8000, b"R" * 64)
        assert td.tdcall(TdcallLeaf.MR_REPORT, rcx=0x8400, rdx=0x8000, r8=0).rax == 0
        reports.append(td.read(0x8400, 1024))

    with PythonGuest(host, guest) as python:
        result = python.run()
    report = parse_tdreport(reports[0])
    assert report.td_info.rtmr2 == hashlib.sha384(bytes(48) + digest).digest()
    assert report.td_info.rtmr0 == bytes(48)
    assert report.td_info.mrtd == result.mrtd
    assert report.report_mac.report_data == b"R" * 64


def test_two_vcpus_work_on_the_same_memory(host):
    def first(td):
        assert td.accept(0x9000) == 0
        td.store(0x9000, 1)
        while td.load(0x9000) != 2:
            pass

    def second(td):
        assert td.tdcall(TdcallLeaf.VP_INFO).r9 == 1
        while True:
            try:
                if td.load(0xFFFF_8000 + 0) >= 0 and ready(td):
                    break
            except VeError:
                td.ve_info()
        td.store(0x9000, 2)

    def ready(td):
        mapping = python.machine.vm.ops.secure.lookup(0x9000)
        return mapping is not None and td.load(0x9000) == 1

    with PythonGuest(host, [first, second]) as python:
        assert python.run().end is End.HALTED


def test_what_a_guest_function_raises_reaches_the_caller(host):
    def guest(td):
        td.cpuid(0)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run_python_guest(host, guest)


def test_touching_memory_before_accepting_it_ends_the_td(host):
    def guest(td):
        td.load(0x7000)

    with pytest.raises(GuestError, match=r"before accepting"):
        run_python_guest(host, guest)


def test_a_fatal_error_report_ends_the_machine_with_its_message(host):
    def guest(td):
        text = int.from_bytes(b"no good!", "little")
        td.tdcall(TdcallLeaf.VP_VMCALL, rcx=0xFC00, r11=VmcallLeaf.REPORT_FATAL_ERROR, r12=0x2A, r14=text)

    with pytest.raises(GuestError, match=r"0x2a: no good!"):
        run_python_guest(host, guest)


def test_more_python_guests_than_the_stub_has_stacks_are_refused(host):
    with pytest.raises(MachineError, match="1 to 24"):
        run_python_guest(host, [lambda td: None] * 25)
    with pytest.raises(MachineError, match="1 to 24"):
        run_python_guest(host, [])


def test_every_crossing_of_a_wall_is_on_the_event_stream(host):
    def guest(td):
        td.print("x")

    with host.platform.events.collect() as events:
        run_python_guest(host, guest)
    kinds = {event.kind for event in events}
    assert {"seamcall", "tdcall", "hypercall"} <= kinds


def test_raw_dram_shows_nothing_of_a_td_that_is_gone(host):
    secret = hashlib.sha512(b"the secret of a TD").digest()
    places = []

    def guest(td):
        for page in range(0x10000, 0x14000, PAGE):
            assert td.accept(page) == 0
            td.write(page, secret * 4)
            places.append(python.machine.vm.ops.secure.lookup(page).hpa)

    with PythonGuest(host, guest) as python:
        python.run()
    memory = host.platform.memory
    for place in places:
        assert secret[:16] not in memory.raw_read(place, PAGE)
        assert secret[:16] not in memory.read(place, PAGE)
    for base, size in host.platform.description.cmrs:
        for at in range(base, base + min(size, 64 * MIB), MIB):
            assert secret[:16] not in memory.raw_read(at, MIB)


def test_a_page_that_the_host_is_at_is_accepted_once_more(host):
    def guest(td):
        tdcall, answers = td.tdcall, iter([Status.OPERAND_BUSY | Operand.RCX] * 2)

        def busy_at_first(leaf, **operands):
            status = next(answers, None)
            return tdcall(leaf, **operands) if status is None else Registers(rax=status)

        td.tdcall = busy_at_first
        assert td.accept(0x3000) == 0
        td.tdcall = tdcall
        assert status_of(td.accept(0x3000)) == Status.PAGE_ALREADY_ACCEPTED

    assert run_python_guest(host, guest).end is End.HALTED
