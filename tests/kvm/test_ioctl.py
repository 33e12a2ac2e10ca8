"""A VMM in the kernel's own words: descriptors, request numbers, structures."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ioctl_td import Td, answered, command, fails

from softtdx.abi.kvm import KVM_X86_TDX_VM, KvmExit, KvmIoctl, TdxCommand, argument_size
from softtdx.abi.structs import Attributes
from softtdx.kvm.ioctl import Process
from softtdx.kvm.memory import PAGE

E2BIG, EBADF, EFAULT, EINTR, EINVAL, ENOENT, ENOTTY = 7, 9, 14, 4, 22, 2, 25


@pytest.fixture
def process(host):
    found = Process(host)
    yield found
    found.exit()


def test_the_numbers_are_the_kernels():
    known = {
        "GET_API_VERSION": 0xAE00, "CREATE_VM": 0xAE01, "CHECK_EXTENSION": 0xAE03, "CREATE_VCPU": 0xAE41,
        "RUN": 0xAE80, "GET_REGS": 0x8090AE81, "SET_USER_MEMORY_REGION": 0x4020AE46,
        "SET_USER_MEMORY_REGION2": 0x40A0AE49, "MEMORY_ENCRYPT_OP": 0xC008AEBA, "SET_MEMORY_ATTRIBUTES": 0x4020AED2,
        "CREATE_GUEST_MEMFD": 0xC040AED4, "PRE_FAULT_MEMORY": 0xC040AED5, "SET_CPUID2": 0x4008AE90,
        "SIGNAL_MSI": 0x4020AEA5, "GET_SREGS2": 0x8140AECC, "ENABLE_CAP": 0x4068AEA3,
    }  # fmt: skip
    for name, number in known.items():
        assert KvmIoctl[name] == number, name


def test_a_td_is_built_run_and_closed(process):
    td = Td(process)
    left = struct.unpack("<QQQ", process.mm.read(td.region, 24))
    assert left == (td.source + PAGE, PAGE, 0)
    # Its reset vector lies in memory that nobody gave: user space is told so.
    fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.RUN)
    run = process.kvm_run(td.vcpu)
    assert run.exit_reason is KvmExit.MEMORY_FAULT
    assert (run.memory_fault.gpa, run.memory_fault.size, run.memory_fault.private) == (0xFFFF_F000, PAGE, True)
    process.close(td.vm)
    assert process.ioctl(td.vcpu, KvmIoctl.GET_CPUID2, bytearray(8)) == 0  # the vCPU keeps the VM alive
    process.close(td.vcpu)
    fails(EBADF, process.ioctl, td.vcpu, KvmIoctl.RUN)


def test_descriptors_and_paths_that_are_not_there(process):
    fails(ENOENT, process.open, "/dev/sgx_enclave")
    fails(EBADF, process.ioctl, 77, KvmIoctl.RUN)
    fails(EBADF, process.close, -1)
    kvm = process.open()
    fails(19, process.kvm_run, kvm)
    assert process.ioctl(kvm, KvmIoctl.GET_API_VERSION) == 12
    fails(EINVAL, process.ioctl, kvm, KvmIoctl.GET_API_VERSION, 1)
    fails(EINVAL, process.ioctl, kvm, KvmIoctl.RUN)
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, 0)
    fails(ENOTTY, process.ioctl, vm, KvmIoctl.RUN)
    fails(ENOTTY, process.ioctl, vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(0))
    vcpu = process.ioctl(vm, KvmIoctl.CREATE_VCPU, 0)
    fails(EINVAL, process.ioctl, vcpu, KvmIoctl.CREATE_VM)
    fails(EINVAL, process.ioctl, vcpu, KvmIoctl.RUN, 1)


def test_structures_that_are_not_there_are_efault(process):
    kvm = process.open()
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, KVM_X86_TDX_VM)
    fails(EFAULT, process.ioctl, vm, KvmIoctl.SET_USER_MEMORY_REGION2, bytearray(159))
    fails(EFAULT, process.ioctl, vm, KvmIoctl.SET_USER_MEMORY_REGION2, 0xDEAD000)
    fails(EFAULT, process.ioctl, vm, KvmIoctl.MEMORY_ENCRYPT_OP, bytearray(23))
    fails(EFAULT, process.ioctl, vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(TdxCommand.INIT_VM, 0x1000))
    fails(EFAULT, process.ioctl, kvm, KvmIoctl.GET_SUPPORTED_CPUID, bytearray(4))


def test_cpuid_is_counted_before_it_is_given(process):
    kvm = process.open()
    fails(E2BIG, process.ioctl, kvm, KvmIoctl.GET_SUPPORTED_CPUID, bytearray(8))
    room = bytearray(struct.pack("<II", 256, 0) + bytes(40 * 256))
    process.ioctl(kvm, KvmIoctl.GET_SUPPORTED_CPUID, room)
    count = struct.unpack_from("<I", room)[0]
    assert 0 < count < 256
    del room[8 + 40 * count :]
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, 0)
    vcpu = process.ioctl(vm, KvmIoctl.CREATE_VCPU, 0)
    process.ioctl(vcpu, KvmIoctl.SET_CPUID2, room)
    again = bytearray(struct.pack("<II", count, 0) + bytes(40 * count))
    process.ioctl(vcpu, KvmIoctl.GET_CPUID2, again)
    assert again == room
    fails(E2BIG, process.ioctl, vcpu, KvmIoctl.SET_CPUID2, bytearray(struct.pack("<II", 257, 0)))


def test_the_capabilities_of_tdx(process):
    kvm = process.open()
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, KVM_X86_TDX_VM)
    at = process.mm.mmap(4 * PAGE)
    fails(E2BIG, process.ioctl, vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(TdxCommand.CAPABILITIES, at))
    process.mm.write(at + 2048, (256).to_bytes(4, "little"))
    process.ioctl(vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(TdxCommand.CAPABILITIES, at))
    assert 0 < int.from_bytes(process.mm.read(at + 2048, 4), "little") < 256
    attributes, xfam = struct.unpack("<QQ", process.mm.read(at, 16))
    assert attributes & Attributes.SEPT_VE_DISABLE
    assert xfam & 3 == 3
    for bad in (command(0, at, flags=1), bytearray(struct.pack("<IIQQ", 0, 0, at, 1))):
        fails(EINVAL, process.ioctl, vm, KvmIoctl.MEMORY_ENCRYPT_OP, bad)


def test_the_state_of_a_tds_vcpu_is_refused_and_that_of_a_vm_is_not(process):
    td = Td(process)
    for name in ("REGS", "SREGS", "SREGS2", "FPU", "DEBUGREGS", "XSAVE", "XCRS"):
        for verb in ("GET", "SET"):
            request = KvmIoctl[f"{verb}_{name}"]
            fails(EINVAL, process.ioctl, td.vcpu, request, bytearray(request >> 16 & 0x3FFF))
    vm = process.ioctl(td.kvm, KvmIoctl.CREATE_VM, 0)
    vcpu = process.ioctl(vm, KvmIoctl.CREATE_VCPU, 0)
    values = bytearray(struct.pack("<18Q", *range(1, 17), 0x1000, 2))
    process.ioctl(vcpu, KvmIoctl.SET_REGS, values)
    found = bytearray(144)
    process.ioctl(vcpu, KvmIoctl.GET_REGS, found)
    assert found == values


REAL_MODE_ENTRY = 0x1000


def boot_vm(process, code):
    """An ordinary VM in flat 32-bit mode with `code` at 0x1000."""
    kvm = process.open()
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, 0)
    hva = process.mm.mmap(4 * PAGE)
    process.mm.write(hva + REAL_MODE_ENTRY, code)
    process.ioctl(vm, KvmIoctl.SET_USER_MEMORY_REGION, bytearray(struct.pack("<IIQQQ", 0, 0, 0, 4 * PAGE, hva)))
    vcpu = process.ioctl(vm, KvmIoctl.CREATE_VCPU, 0)

    def segment(selector, kind):
        return struct.pack("<QIH9Bx", 0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0, 0)

    code_segment, data_segment = segment(8, 11), segment(16, 3)
    unusable = struct.pack("<QIH9Bx", 0, 0xFFFF, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    task = struct.pack("<QIH9Bx", 0, 0xFFFF, 0, 11, 1, 0, 0, 0, 0, 0, 0, 0)
    sregs = code_segment + data_segment * 5 + task + unusable + bytes(32) + struct.pack("<8Q", 0x21, *[0] * 7)
    process.ioctl(vcpu, KvmIoctl.SET_SREGS2, bytearray(sregs.ljust(320, b"\0")))
    process.ioctl(vcpu, KvmIoctl.SET_REGS, bytearray(struct.pack("<18Q", *[0] * 16, REAL_MODE_ENTRY, 2)))
    return vcpu


def test_an_ordinary_vm_boots_writes_a_port_and_halts(process):
    vcpu = boot_vm(process, bytes.fromhex("b041e680f4"))  # mov al,'A'; out 0x80,al; hlt
    assert process.ioctl(vcpu, KvmIoctl.RUN) == 0
    run = process.kvm_run(vcpu)
    assert (run.exit_reason, run.io.port, run.io.value) == (KvmExit.IO, 0x80, 0x41)
    process.ioctl(vcpu, KvmIoctl.RUN)
    assert run.exit_reason is KvmExit.HLT


def test_a_signal_ends_a_run_with_eintr(process):
    vcpu = boot_vm(process, bytes.fromhex("ebfe"))
    process.file(vcpu).kick()
    fails(EINTR, process.ioctl, vcpu, KvmIoctl.RUN)


def test_memory_that_user_space_has_to_convert_is_efault(process, monkeypatch):
    td = Td(process)
    vcpu = process.file(td.vcpu)

    def run():
        vcpu.exit_for_memory(0x1000, PAGE, private=True)
        return vcpu.kvm_run

    monkeypatch.setattr(vcpu, "run", run)
    fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.RUN)


def test_after_kvm_gave_a_vm_up_every_ioctl_is_eio(process):
    td = Td(process)
    process.file(td.vm).mark_dead()
    fails(5, process.ioctl, td.vm, KvmIoctl.CHECK_EXTENSION, 0)
    fails(5, process.ioctl, td.vcpu, KvmIoctl.RUN)


HOSTILE = st.one_of(
    st.integers(0, 2**64 - 1),
    st.binary(max_size=80).map(bytearray),
    st.sampled_from([bytearray(b"\xff" * 8192), bytearray(8192), bytearray(b"\x01\0\0\0" * 2048)]),
)
ERRNOS = frozenset((1, 2, 4, 5, 6, 7, 9, 11, 12, 14, 16, 17, 22, 25, 28, 95))  # those that the documentation names


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["td", "vm"]),
    calls=st.lists(
        st.tuples(
            st.sampled_from(["kvm", "vm", "vcpu", "memfd"]),
            st.one_of(st.sampled_from([int(n) for n in KvmIoctl]), st.integers(0, 2**32 - 1)),
            HOSTILE,
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_whatever_a_vmm_sends_it_gets_an_answer_or_an_errno(host, kind, calls):
    process = Process(host)
    target = Td(process) if kind == "td" else VmFiles(process)
    try:
        for on, request, argument in calls:
            process.file(target.vcpu).kick()  # KVM_RUN comes back
            answer = answered(process.ioctl, getattr(target, on), request, argument)
            assert answer >= 0 or -answer in ERRNOS, answer
    finally:
        process.exit()


class VmFiles:
    """The descriptors of an ordinary VM with some memory; there is no guest_memfd, an eventfd is in its place."""

    def __init__(self, process):
        self.vcpu = boot_vm(process, bytes.fromhex("ebfe"))
        self.vm, self.kvm = self.vcpu - 1, self.vcpu - 2
        self.memfd = process.eventfd()


@pytest.mark.parametrize("request_name", [n.name for n in KvmIoctl if argument_size(n)])
def test_a_structure_that_ends_too_early_is_efault_or_refused_before_it_is_read(process, request_name):
    request = KvmIoctl[request_name]
    size = argument_size(request)
    td = Td(process)
    vm = VmFiles(process)
    for fd in (td.kvm, td.vm, td.vcpu, vm.vm, vm.vcpu):
        for argument in (bytearray(size - 1), bytearray(), 0, 1 << 63, (1 << 64) - 1):
            answer = answered(process.ioctl, fd, request, argument)
            assert answer < 0, (fd, argument)
            assert -answer in (EFAULT, EINVAL, ENOTTY, 6), answer
