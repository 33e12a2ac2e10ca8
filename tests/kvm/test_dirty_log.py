"""The dirty log of a memory slot: what live migration of an ordinary VM, or of a TD's shared memory, stands on."""

import random

import pytest
from host_actions import run_hosted
from hypothesis import given
from hypothesis import strategies as st
from td_build_steps import Build
from test_user_memory import backed, fill

from softtdx.abi import kvm as abi
from softtdx.abi import kvm_structs as wire
from softtdx.abi.kvm import KVM_X86_TDX_VM, MemorySlotFlag
from softtdx.abi.kvm import KvmIoctl as Ioctl
from softtdx.kvm import Kvm, KvmError
from softtdx.kvm.dirty_log import DIRTY_LOG_INITIALLY_SET, DIRTY_LOG_MANUAL_PROTECT, DirtyBitmap
from softtdx.kvm.ioctl import Process
from softtdx.kvm.memory import PAGE
from softtdx.vmm.python_guest import VeError

MIB = 1 << 20
EINVAL, ENOENT, EFAULT = 22, 2, 14


def log(vm, on=True):
    slot = vm.memslots.get(0)
    flags = MemorySlotFlag.LOG_DIRTY_PAGES if on else 0
    vm.set_user_memory_region2(0, slot.gpa, slot.size, slot.userspace_addr, flags)


def dirty(vm):
    bits = int.from_bytes(vm.get_dirty_log(0), "little")
    return {i for i in range(bits.bit_length()) if bits >> i & 1}


@given(st.lists(st.tuples(st.sampled_from(["mark", "take", "take some"]), st.integers(0, 199), st.binary(max_size=25))))
def test_a_dirty_bitmap_is_a_set_of_pages(steps):
    bitmap, model = DirtyBitmap(200), set()
    for what, page, mask in steps:
        if what == "mark":
            bitmap.mark(page)
            model.add(page)
        elif what == "take":
            assert bitmap.take() == sorted(model)
            model.clear()
        else:
            bits = int.from_bytes(mask, "little")
            assert bitmap.take(bits) == sorted(p for p in model if bits >> p & 1)
            model -= {p for p in model if bits >> p & 1}
        assert len(bitmap) == len(model)
        assert int.from_bytes(bytes(bitmap), "little") == sum(1 << p for p in model)
        assert len(bytes(bitmap)) == 32


@pytest.mark.parametrize("thp", [False, True])
def test_every_page_that_the_guest_writes_is_in_the_log_and_others_are_not(host, thp):
    rng = random.Random(1)

    def program(td, vm, do):
        fill(td, range(512, 2048), 1)
        assert vm.ept.find(4 * MIB).level == int(thp)
        do(lambda: log(vm))
        do(lambda: dirty(vm))  # what the switch itself wrote
        for _ in range(4):
            written = set(rng.sample(range(512, 2048), 60))
            for page in written:
                td.store(page * PAGE, page)
            for page in rng.sample(range(512, 2048), 60):
                td.load(page * PAGE)
            found = do(lambda: dirty(vm))
            assert {page for page in found if page >= 512} == written
        assert vm.ept.find(min(written) * PAGE).level == 0
        do(lambda: log(vm, on=False))
        with pytest.raises(KvmError) as error:
            do(lambda: vm.get_dirty_log(0))
        assert error.value.errno == ENOENT
        fill(td, range(512, 600), 2)
        td.load(4 * MIB)
        assert vm.ept.find(4 * MIB).level == int(thp)

    run_hosted(host, program, machine_class=backed(thp=thp), vm=True)


@pytest.mark.parametrize("flags", [DIRTY_LOG_MANUAL_PROTECT, DIRTY_LOG_MANUAL_PROTECT | DIRTY_LOG_INITIALLY_SET])
def test_with_manual_protection_reading_the_log_changes_nothing(host, flags):
    def program(td, vm, do):
        fill(td, range(512, 640), 1)
        do(lambda: vm.enable_manual_dirty_log(flags))
        do(lambda: log(vm))
        pages = vm.memslots.get(0).size // PAGE
        if flags & DIRTY_LOG_INITIALLY_SET:
            assert do(lambda: dirty(vm)) == set(range(pages))
        do(lambda: vm.clear_dirty_log(0, 0, pages, b"\xff" * (pages // 8)))
        td.store(600 * PAGE, 5)
        td.store(601 * PAGE, 5)
        assert {600, 601} <= do(lambda: dirty(vm))
        do(lambda: vm.clear_dirty_log(0, 576, 64, (1 << 600 - 576).to_bytes(8, "little")))
        assert 600 not in do(lambda: dirty(vm))
        assert 601 in do(lambda: dirty(vm))
        td.store(600 * PAGE, 6)
        assert 600 in do(lambda: dirty(vm))

    run_hosted(host, program, vm=True)


def test_a_copy_that_follows_the_log_converges_to_the_guests_memory(host):
    """Pre-copy: pages are sent while the guest writes; what the log names is sent again."""
    rng = random.Random(3)

    def program(td, vm, do):
        slot = vm.memslots.get(0)
        fill(td, range(512, 1024), 0)
        do(lambda: log(vm))
        copy = do(lambda: bytearray(vm.mm.read(slot.userspace_addr, slot.size)))
        do(lambda: dirty(vm))
        for _ in range(3):
            for _ in range(40):
                td.store(rng.randrange(512, 1024) * PAGE + 8 * rng.randrange(512), rng.getrandbits(64))
            do(lambda: vm.mm.shrink(100))  # the log outlives what the host does to the pages
            for page in do(lambda: dirty(vm)):
                copy[page * PAGE : (page + 1) * PAGE] = do(
                    lambda page=page: vm.mm.read(slot.userspace_addr + page * PAGE, PAGE)
                )
        where = slice(512 * PAGE, 1024 * PAGE)
        assert copy[where] == do(lambda: vm.mm.read(slot.userspace_addr, slot.size))[where]

    run_hosted(host, program, vm=True)


def test_shared_memory_of_a_td_is_logged_where_its_slot_has_no_private_side(host):
    gpa = 1 << 33

    def program(td, vm, do):
        def add(flags):
            hva = vm.memslots.get(7).userspace_addr if vm.memslots.get(7) else vm.mm.mmap(MIB)
            vm.set_user_memory_region2(7, gpa, MIB, hva, flags)

        do(lambda: add(0))
        for page in range(8):
            td.store(td.shared(gpa + page * PAGE), page)
        do(lambda: add(MemorySlotFlag.LOG_DIRTY_PAGES))
        do(lambda: vm.get_dirty_log(7))
        assert td.load(td.shared(gpa + PAGE)) == 1
        td.store(td.shared(gpa + 3 * PAGE), 9)
        assert do(lambda: vm.get_dirty_log(7)) == (1 << 3).to_bytes(32, "little")
        with pytest.raises(VeError):
            td.load(td.shared(gpa + 2 * MIB))

    run_hosted(host, program)


def test_private_memory_has_no_dirty_log(host):
    with Build(host) as build:
        build.do(2)
        slot = build.vm.memslots.get(0)
        for flags in (MemorySlotFlag.LOG_DIRTY_PAGES, MemorySlotFlag.READONLY):
            with pytest.raises(KvmError) as error:
                build.vm.set_user_memory_region2(
                    1, 1 << 30, PAGE, slot.userspace_addr, flags | MemorySlotFlag.GUEST_MEMFD, build.file, 0
                )
            assert error.value.errno == EINVAL
            with pytest.raises(KvmError) as error:
                build.vm.set_user_memory_region2(0, 0, slot.size, slot.userspace_addr, flags)
            assert error.value.errno == EINVAL
        with pytest.raises(KvmError) as error:
            build.vm.get_dirty_log(0)
        assert error.value.errno == ENOENT


def test_a_slot_can_be_moved_but_not_resized(host):
    kvm = Kvm(host)
    vm, hva = kvm.create_vm(), kvm.mm.mmap(MIB)
    vm.set_user_memory_region2(0, 0, MIB, hva)
    vm.set_user_memory_region2(0, 2 * MIB, MIB, hva)
    assert vm.memslots.find(0) is None
    assert vm.memslots.find(2 * MIB).slot == 0
    for size, address, flags in (
        (MIB // 2, hva, 0),
        (MIB, hva + PAGE, 0),
        (MIB, hva, MemorySlotFlag.READONLY),
        (MIB, hva, 1 << 7),
    ):
        with pytest.raises(KvmError) as error:
            vm.set_user_memory_region2(0, 2 * MIB, size, address, flags)
        assert error.value.errno in (EINVAL, EFAULT)
    vm.close()
    kvm.mm.close()


@pytest.mark.parametrize(
    ("first", "count", "bitmap", "code"),
    [
        (1, 64, bytes(8), EINVAL),
        (0, 63, bytes(8), EINVAL),
        (0, 0, b"", EINVAL),
        (-64, 64, bytes(8), EINVAL),
        (192, 128, bytes(16), EINVAL),
        (0, 1 << 40, b"", EINVAL),
        (0, 64, bytes(7), EFAULT),
    ],
)
def test_a_clear_of_what_is_not_there_is_refused(host, first, count, bitmap, code):
    kvm = Kvm(host)
    vm, hva = kvm.create_vm(), kvm.mm.mmap(MIB)
    vm.set_user_memory_region2(0, 0, MIB, hva, MemorySlotFlag.LOG_DIRTY_PAGES)
    with pytest.raises(KvmError) as error:
        vm.clear_dirty_log(0, first, count, bitmap)
    assert error.value.errno == code
    with pytest.raises(KvmError) as error:
        vm.clear_dirty_log(3, 0, 64, bytes(8))
    assert error.value.errno == ENOENT
    for flags in (DIRTY_LOG_INITIALLY_SET, 4, -1):
        with pytest.raises(KvmError) as error:
            vm.enable_manual_dirty_log(flags)
        assert error.value.errno == EINVAL
    vm.close()
    kvm.mm.close()


def test_the_dirty_log_by_number(host):
    process = Process(host)
    kvm = process.open()
    vm = process.ioctl(kvm, Ioctl.CREATE_VM, 0)
    assert process.ioctl(kvm, Ioctl.CHECK_EXTENSION, abi.KvmCap.MANUAL_DIRTY_LOG_PROTECT2) == 3
    cap = wire.EnableCap()
    cap.cap, cap.args = abi.KvmCap.MANUAL_DIRTY_LOG_PROTECT2, [3, 0, 0, 0]
    process.ioctl(vm, Ioctl.ENABLE_CAP, bytearray(bytes(cap)))
    region = wire.UserspaceMemoryRegion()
    region.memory_size, region.userspace_addr = MIB, process.mm.mmap(MIB)
    region.flags = MemorySlotFlag.LOG_DIRTY_PAGES
    process.ioctl(vm, Ioctl.SET_USER_MEMORY_REGION, bytearray(bytes(region)))
    where = process.mm.mmap(PAGE)
    wanted = wire.DirtyLog()
    wanted.dirty_bitmap = where
    process.ioctl(vm, Ioctl.GET_DIRTY_LOG, bytearray(bytes(wanted)))
    assert process.mm.read(where, 33) == b"\xff" * 32 + b"\0"
    clear = wire.ClearDirtyLog()
    clear.first_page, clear.num_pages, clear.dirty_bitmap = 64, 64, where
    process.ioctl(vm, Ioctl.CLEAR_DIRTY_LOG, bytearray(bytes(clear)))
    process.ioctl(vm, Ioctl.GET_DIRTY_LOG, bytearray(bytes(wanted)))
    assert process.mm.read(where, 32) == b"\xff" * 8 + bytes(8) + b"\xff" * 16
    wanted.slot = 5
    with pytest.raises(KvmError) as error:
        process.ioctl(vm, Ioctl.GET_DIRTY_LOG, bytearray(bytes(wanted)))
    assert error.value.errno == ENOENT
    process.exit()


def test_a_td_slot_without_private_memory_may_be_logged_but_not_read_only(host):
    kvm = Kvm(host)
    vm, hva = kvm.create_vm(KVM_X86_TDX_VM), kvm.mm.mmap(MIB)
    vm.set_user_memory_region2(0, 0, MIB, hva, MemorySlotFlag.LOG_DIRTY_PAGES)
    assert vm.get_dirty_log(0) == bytes(32)
    with pytest.raises(KvmError) as error:
        vm.set_user_memory_region2(1, MIB, PAGE, hva, MemorySlotFlag.READONLY)
    assert error.value.errno == EINVAL
    vm.close()
    kvm.mm.close()
