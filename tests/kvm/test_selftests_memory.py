"""What the kernel's selftests of guest memory look at, against descriptors and ioctls.

guest_memfd_test, private_mem_conversions_test, private_mem_kvm_exits_test, pre_fault_memory_test,
set_memory_region_test, set_boot_cpu_id, kvm_create_max_vcpus.
"""

import struct

import pytest
from host_actions import run_hosted
from ioctl_td import Td, answered, command, fails, init_vm
from test_vcpu_state import Machine

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import KVM_X86_TDX_VM, KvmCap, KvmExit, KvmIoctl, TdxCommand
from softtdx.abi.msrs import APIC_BASE_BSP, Msr
from softtdx.kvm.ioctl import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, Process
from softtdx.kvm.memory import PAGE

EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, EOPNOTSUPP = 9, 16, 17, 14, 22, 19, 2, 95
MIB = 1 << 20
HUGE = 2 * MIB
PUNCH = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE


@pytest.fixture
def process(host):
    found = Process(host)
    yield found
    found.exit()


def create_td(process):
    vm = process.ioctl(process.open(), KvmIoctl.CREATE_VM, KVM_X86_TDX_VM)
    at = process.mm.mmap(PAGE)
    process.mm.write(at, init_vm())
    process.ioctl(vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(TdxCommand.INIT_VM, at))
    return vm


def memfd(process, vm, size, flags=0):
    return process.ioctl(vm, KvmIoctl.CREATE_GUEST_MEMFD, bytearray(struct.pack("<QQ48x", size, flags)))


def region(process, vm, slot, gpa, size, hva, fd=None, offset=0, flags=None):
    flags = (4 if fd is not None else 0) if flags is None else flags
    data = struct.pack("<IIQQQQI116x", slot, flags, gpa, size, hva, offset, fd or 0)
    process.ioctl(vm, KvmIoctl.SET_USER_MEMORY_REGION2, bytearray(data))


# --- guest_memfd_test
def test_a_guest_memfd_is_no_file_to_read_write_or_map(process):
    vm = create_td(process)
    fd = memfd(process, vm, 4 * PAGE)
    fails(EINVAL, process.read, fd, 8)
    fails(EINVAL, process.write, fd, bytes(8))
    for length in (PAGE, 4 * PAGE):
        fails(ENODEV, process.mmap, fd, length)
    assert answered(process.ioctl, fd, KvmIoctl.RUN) < 0


def test_its_size_is_what_was_asked_for_and_files_are_apart(process):
    vm = create_td(process)
    one, other = memfd(process, vm, PAGE), memfd(process, vm, 2 * PAGE)
    assert (process.fstat(one).st_size, process.fstat(other).st_size) == (PAGE, 2 * PAGE)
    assert process.fstat(one).st_blksize == PAGE
    process.fallocate(other, FALLOC_KEEP_SIZE, 0, 2 * PAGE)
    assert (process.fstat(one).st_blocks, process.fstat(other).st_blocks) == (0, 16)


def test_sizes_and_flags_that_cannot_be(process):
    vm = create_td(process)
    for size in (0, 1, PAGE - 1, PAGE + 1, 3 * PAGE + 8):
        fails(EINVAL, memfd, process, vm, size)
    for bit in (63, 40, 17):
        fails(EINVAL, memfd, process, vm, PAGE, 1 << bit)


def test_fallocate_allocates_within_the_file_and_punches_anywhere(process):
    vm = create_td(process)
    fd = memfd(process, vm, 4 * PAGE)
    process.fallocate(fd, FALLOC_KEEP_SIZE, 0, 4 * PAGE)
    fails(EINVAL, process.fallocate, fd, PUNCH, PAGE - 1, PAGE)
    for offset in (4 * PAGE, 5 * PAGE):
        fails(EINVAL, process.fallocate, fd, FALLOC_KEEP_SIZE, offset, PAGE)
        process.fallocate(fd, PUNCH, offset, PAGE)
    fails(EINVAL, process.fallocate, fd, FALLOC_KEEP_SIZE, PAGE, PAGE - 1)
    process.fallocate(fd, PUNCH, PAGE, PAGE)
    assert process.fstat(fd).st_blocks == 24
    process.fallocate(fd, FALLOC_KEEP_SIZE, PAGE, PAGE)
    assert process.fstat(fd).st_blocks == 32
    for mode in (0, FALLOC_PUNCH_HOLE, 4 | PUNCH, 1 << 20):
        fails(EOPNOTSUPP, process.fallocate, fd, mode, 0, PAGE)
    fails(ENODEV, process.fallocate, vm, PUNCH, 0, PAGE)


@pytest.mark.parametrize("offset", [0, 1, PAGE])
@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1])
def test_holes_are_whole_pages(process, offset, length):
    fd = memfd(process, create_td(process), 4 * PAGE)
    answer = answered(process.fallocate, fd, PUNCH, offset, length)
    assert (answer is None) == (offset % PAGE == length % PAGE == 0)
    assert answer in (None, -EINVAL)


# --- set_memory_region_test
def test_private_slots_need_a_guest_memfd_of_this_vm_that_is_large_enough(process):
    vm, other = create_td(process), create_td(process)
    hva = process.mm.mmap(4 * PAGE)
    fd, foreign = memfd(process, vm, 2 * PAGE), memfd(process, other, 2 * PAGE)
    fails(EINVAL, region, process, vm, 0, 0, PAGE, hva, foreign)
    fails(EINVAL, region, process, vm, 0, 0, PAGE, hva, vm)
    fails(EBADF, region, process, vm, 0, 0, PAGE, hva, 99)
    for offset in (1, PAGE + 8, 2 * PAGE, 3 * PAGE, (1 << 64) - PAGE):
        fails(EINVAL, region, process, vm, 0, 0, PAGE, hva, fd, offset)
    fails(EINVAL, region, process, vm, 0, 0, 3 * PAGE, hva, fd)
    region(process, vm, 0, 0, PAGE, hva, fd)
    fails(EEXIST, region, process, vm, 1, 1 * MIB, PAGE, hva + PAGE, fd)  # the same part of the file
    region(process, vm, 1, 1 * MIB, PAGE, hva + PAGE, fd, PAGE)
    fails(EEXIST, region, process, vm, 2, 0, PAGE, hva)  # the same guest frames
    region(process, vm, 0, 0, 0, hva, fd)
    region(process, vm, 2, 0, PAGE, hva, fd)


def test_flags_that_do_not_exist_are_einval(process):
    vm, plain = create_td(process), process.ioctl(process.open(), KvmIoctl.CREATE_VM, 0)
    hva = process.mm.mmap(PAGE)
    for bit in range(3, 32):
        fails(EINVAL, region, process, vm, 0, 0, PAGE, hva, None, 0, 1 << bit)
        old = bytearray(struct.pack("<IIQQQ", 0, 1 << bit, 0, PAGE, hva))
        fails(EINVAL, process.ioctl, plain, KvmIoctl.SET_USER_MEMORY_REGION, old)
    with_memfd = bytearray(struct.pack("<IIQQQ", 0, 4, 0, PAGE, hva))
    fails(EINVAL, process.ioctl, vm, KvmIoctl.SET_USER_MEMORY_REGION, with_memfd)  # the old ioctl cannot name one


def test_a_vm_without_memory_runs_into_nothing(process):
    machine = Machine(process)
    region(process, machine.vm, 0, 0, 0, 0)
    assert machine.run().exit_reason is KvmExit.INTERNAL_ERROR


def test_as_many_slots_as_kvm_says_and_no_more(process):
    kvm = process.open()
    vm = process.ioctl(kvm, KvmIoctl.CREATE_VM, 0)
    slots = process.ioctl(kvm, KvmIoctl.CHECK_EXTENSION, KvmCap.NR_MEMSLOTS)
    hva = process.mm.mmap(PAGE)
    for slot in range(slots):
        region(process, vm, slot, slot * MIB, PAGE, hva)
    fails(EINVAL, region, process, vm, slots, slots * MIB, PAGE, hva)


# --- private_mem_kvm_exits_test
def test_private_memory_whose_slot_went_or_is_not_private_is_a_memory_fault(process):
    td = Td(process)
    fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.RUN)
    reset = 0xFFFF_F000
    region(process, td.vm, 1, reset, PAGE, process.mm.mmap(PAGE))  # memory, but none that can be private
    process.ioctl(td.vm, KvmIoctl.SET_MEMORY_ATTRIBUTES, bytearray(struct.pack("<QQQQ", reset, PAGE, 8, 0)))
    for _ in range(2):
        fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.RUN)
        run = process.kvm_run(td.vcpu)
        assert run.exit_reason is KvmExit.MEMORY_FAULT
        fault = run.memory_fault
        assert (fault.flags, fault.gpa, fault.size) == (8, reset, PAGE)
    region(process, td.vm, 1, 0, 0, 0)
    fails(EFAULT, process.ioctl, td.vcpu, KvmIoctl.RUN)


# --- pre_fault_memory_test
@pytest.mark.parametrize("private", [False, True])
def test_pre_faulting_goes_as_far_as_there_is_memory(process, private):
    size, gpa = HUGE + PAGE, 1 << 30
    if private:
        td = Td(process)
        vm, vcpu, fd = td.vm, td.vcpu, memfd(process, td.vm, size)
    else:
        machine = Machine(process)
        vm, vcpu, fd = machine.vm, machine.vcpu, None
    region(process, vm, 10, gpa, size, process.mm.mmap(size), fd)
    if private:
        process.ioctl(vm, KvmIoctl.SET_MEMORY_ATTRIBUTES, bytearray(struct.pack("<QQQQ", gpa, size, 8, 0)))

    def pre_fault(offset, length):
        """Until it is done or fails, as user space does: (bytes left, errno)."""
        data = bytearray(struct.pack("<QQ48x", gpa + offset, length))
        while True:
            before = struct.unpack_from("<QQ", data)
            answer = answered(process.ioctl, vcpu, KvmIoctl.PRE_FAULT_MEMORY, data)
            after = struct.unpack_from("<QQ", data)
            assert (after[1] < before[1]) != (answer < 0)
            assert after[0] - before[0] == before[1] - after[1]
            if answer < 0 or not after[1]:
                return after[1], -answer

    assert pre_fault(0, HUGE) == (0, 0)
    assert pre_fault(HUGE, 2 * PAGE) == (PAGE, ENOENT)
    assert pre_fault(size, PAGE) == (PAGE, ENOENT)
    for bad in ((0, 0), (8, PAGE), (0, 8), (PAGE, (1 << 64) - PAGE)):
        data = bytearray(struct.pack("<QQ48x", *bad))
        fails(EINVAL, process.ioctl, vcpu, KvmIoctl.PRE_FAULT_MEMORY, data)
    flags = bytearray(struct.pack("<QQQ40x", gpa, PAGE, 1))
    fails(EINVAL, process.ioctl, vcpu, KvmIoctl.PRE_FAULT_MEMORY, flags)


# --- private_mem_conversions_test
@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, PAGE), (PAGE, PAGE), (HUGE - PAGE, PAGE), (HUGE - PAGE, 2 * PAGE), (0, HUGE), (HUGE - PAGE, HUGE + 2 * PAGE)],
)
@pytest.mark.parametrize("punch", [False, True])
def test_each_alias_keeps_to_itself_through_conversions(host, offset, size, punch):
    base = 2 * MIB + offset
    first, last = base, base + size - PAGE

    def program(td, vm, do):
        slot = vm.memslots.find(base)

        def host_reads(gpa):
            return int.from_bytes(do(lambda: vm.mm.read(slot.hva(gpa), 8)), "little")

        for page in {first, last}:
            assert td.accept(page) == 0
            td.store(page, 0xAA)
            assert host_reads(page) == 0  # what is private is not user space's
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, base | td.shared_bit, size).r10 == 0
        for page in {first, last}:
            assert td.load(td.shared(page)) == 0  # and nothing of it is shared now
            td.store(td.shared(page), 0xBB)
            assert host_reads(page) == 0xBB
            do(lambda page=page: vm.mm.write(slot.hva(page), b"\xcc" * 8))
            assert td.load(td.shared(page)) & 0xFF == 0xCC
        if punch:
            do(lambda: slot.guest_memfd.punch_hole(slot.file_offset(base), size))
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, base, size).r10 == 0
        for page in {first, last}:
            assert td.accept(page) == 0
            assert td.load(page) == 0  # nor does what was shared come back as private
            td.store(page, 0xDD)
            assert host_reads(page) == 0

    run_hosted(host, program, memory=8 * MIB)


# --- set_boot_cpu_id, kvm_create_max_vcpus
def test_which_vcpu_boots_is_chosen_before_the_first(process):
    vm = process.ioctl(process.open(), KvmIoctl.CREATE_VM, 0)
    process.ioctl(vm, KvmIoctl.SET_BOOT_CPU_ID, 1)
    vcpus = [process.ioctl(vm, KvmIoctl.CREATE_VCPU, i) for i in range(2)]
    fails(EBUSY, process.ioctl, vm, KvmIoctl.SET_BOOT_CPU_ID, 0)
    for i, vcpu in enumerate(vcpus):
        entry = bytearray(struct.pack("<IIIIQ", 1, 0, Msr.APIC_BASE, 0, 0))
        process.ioctl(vcpu, KvmIoctl.GET_MSRS, entry)
        assert bool(struct.unpack_from("<Q", entry, 16)[0] & APIC_BASE_BSP) == (i == 1)
    bad = process.ioctl(process.open(), KvmIoctl.CREATE_VM, 0)
    fails(EINVAL, process.ioctl, bad, KvmIoctl.SET_BOOT_CPU_ID, 1 << 20)


def test_vcpu_ids_go_up_to_what_the_vm_says(process):
    for vm in (process.ioctl(process.open(), KvmIoctl.CREATE_VM, 0), create_td(process)):
        most = process.ioctl(vm, KvmIoctl.CHECK_EXTENSION, KvmCap.MAX_VCPU_ID)
        assert most >= process.ioctl(vm, KvmIoctl.CHECK_EXTENSION, KvmCap.NR_VCPUS)
        fails(EINVAL, process.ioctl, vm, KvmIoctl.CREATE_VCPU, most)
        assert process.ioctl(vm, KvmIoctl.CREATE_VCPU, most - 1) > 0


def test_a_td_chooses_its_tsc_before_its_first_vcpu(process):
    vm = process.ioctl(process.open(), KvmIoctl.CREATE_VM, KVM_X86_TDX_VM)
    khz = process.ioctl(vm, KvmIoctl.GET_TSC_KHZ)
    process.ioctl(vm, KvmIoctl.SET_TSC_KHZ, 1_000_000)
    assert process.ioctl(vm, KvmIoctl.GET_TSC_KHZ) == 1_000_000 != khz
    at = process.mm.mmap(PAGE)
    process.mm.write(at, init_vm())
    process.ioctl(vm, KvmIoctl.MEMORY_ENCRYPT_OP, command(TdxCommand.INIT_VM, at))
    vcpu = process.ioctl(vm, KvmIoctl.CREATE_VCPU, 0)
    assert process.ioctl(vcpu, KvmIoctl.GET_TSC_KHZ) == 1_000_000
    fails(EINVAL, process.ioctl, vm, KvmIoctl.SET_TSC_KHZ, khz)
    plain = process.ioctl(process.open(), KvmIoctl.CREATE_VM, 0)
    fails(EINVAL, process.ioctl, plain, KvmIoctl.SET_TSC_KHZ, 1_000_000)  # a VM's cannot be scaled here
