"""Processors and blocks of memory that go and come back under running guests."""

import threading
from contextlib import suppress
from dataclasses import replace

import pytest
from host_actions import run_hosted
from td_build_steps import Build
from test_user_memory import scarce

from softtdx.hw import Platform, preset
from softtdx.kvm import Host, Kvm, KvmError, TdxUnavailableError
from softtdx.kvm.hotplug import MEMORY_BLOCK
from softtdx.kvm.memory import PAGE
from softtdx.seamldr import development_release
from softtdx.vmm import MachineConfig
from softtdx.vmm.boot import boot_host
from softtdx.vmm.python_guest import PythonGuest

MIB = 1 << 20
HUGE = 2 * MIB
EPERM, EIO, EBUSY, ENODEV, EINVAL = 1, 5, 16, 19, 22


@pytest.fixture(scope="module")
def machine():
    return boot_host(replace(preset("spr"), packages=2, lps=4))


@pytest.fixture
def four(machine):
    before = machine.memory.free_pages
    yield machine
    assert machine.memory.free_pages == before
    assert set(machine.memory.tdx_pages()) == {"PAMT"}
    assert all(machine.cpus.is_online(i) for i in range(4))


def refused(call, code):
    with pytest.raises(KvmError) as error:
        call()
    assert error.value.errno == code


# --- processors
@pytest.mark.parametrize("vm", [False, True])
def test_a_vcpu_moves_off_a_processor_that_goes_and_may_come_back_to_it(four, vm):
    def program(td, machine_vm, do):
        if td.is_td:
            assert td.accept(0x9000) == 0
        td.store(0x9000, 5)
        vcpu = machine_vm.vcpus[0]
        for _ in range(4):
            here = vcpu.cpu
            do(lambda here=here: four.hotplug.cpu_down(here))
            assert vcpu.ops.loaded_on != here or vcpu.cpu != here
            assert td.load(0x9000) == 5
            assert vcpu.cpu != here
            do(lambda here=here: four.hotplug.cpu_up(here))

    run_hosted(four, program, vm=vm)


def test_guests_run_on_while_processors_come_and_go(four):
    def program(td):
        if td.is_td:
            for page in range(0x4000, 0x8000, PAGE):
                assert td.accept(page) == 0
        for i in range(400):
            td.store(0x4000 + 8 * (i % 2048), i)
            assert td.load(0x4000 + 8 * (i % 2048)) == i

    guests = [PythonGuest(four, program, MachineConfig(memory=MIB, vm=i % 2 == 1)) for i in range(6)]
    failures = []

    def run(guest):
        try:
            guest.run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(guest,)) for guest in guests]
    for thread in threads:
        thread.start()
    for i in range(12):
        index = i % 4
        four.hotplug.cpu_down(index)
        four.hotplug.cpu_up(index)
    for thread in threads:
        thread.join()
    for guest in guests:
        guest.close()
    assert not failures


def test_the_last_processor_of_a_package_stays_while_a_td_has_a_keyid(four):
    four.hotplug.cpu_down(2)
    with Build(four).do():
        refused(lambda: four.hotplug.cpu_down(3), EBUSY)
        four.hotplug.cpu_down(0)
        refused(lambda: four.hotplug.cpu_down(1), EBUSY)
        four.hotplug.cpu_up(0)
    four.hotplug.cpu_down(3)
    four.hotplug.cpu_down(1)
    refused(lambda: four.hotplug.cpu_down(0), EBUSY)  # the very last
    refused(lambda: four.hotplug.cpu_down(1), EINVAL)
    refused(lambda: four.cpus.call_on(1, lambda lp: None), ENODEV)
    for index in (-1, 4, 0):
        refused(lambda index=index: four.hotplug.cpu_up(index), EINVAL)
    for index in (1, 2, 3):
        four.hotplug.cpu_up(index)


def test_the_processor_that_asks_cannot_be_the_one_that_goes(four):
    with four.cpus.run() as lp:
        refused(lambda: four.hotplug.cpu_down(lp.index), EBUSY)


def test_tdx_needs_every_processor_when_it_is_enabled_and_one_more_before_that_is_welcome():
    host = Host(Platform(replace(preset("spr"), lps=3)))
    before = host.memory.free_pages
    host.hotplug.cpu_down(2)
    with pytest.raises(TdxUnavailableError, match="processor 2 is offline"):
        host.enable_tdx(development_release())
    assert host.tdx is None
    assert host.memory.free_pages == before
    host.hotplug.cpu_up(2)
    host.enable_tdx(development_release())
    with Build(host).do():
        pass


def test_a_processor_that_the_module_does_not_take_stays_offline(four):
    four.hotplug.cpu_down(3)
    four.tdx._lps_initialized.remove(3)  # as if the module had never seen it
    refused(lambda: four.hotplug.cpu_up(3), EIO)  # it takes no processor after TDH.SYS.CONFIG
    assert not four.cpus.is_online(3)
    four.tdx._lps_initialized.add(3)
    four.hotplug.cpu_up(3)


# --- memory
def block_of(pa):
    return pa & ~(MEMORY_BLOCK - 1)


def test_private_and_shared_memory_moves_out_of_a_block_that_goes(four):
    def program(td, vm, do):
        for page in range(512, 640):
            assert td.accept(page * PAGE) == 0
            td.store(page * PAGE, page)
        assert td.accept(4 * MIB, 1) == 0
        td.store(4 * MIB, 44)
        do(lambda: vm.set_memory_attributes(6 * MIB, 64 * PAGE, 0))
        for page in range(1536, 1600):
            td.store(td.shared(page * PAGE), page)
        total = four.memory.total_pages
        # Where these pages are, kernel pages are too: move them where there are none, and then away from there.
        target = next(b for b in range(8 * MEMORY_BLOCK, 11 * MEMORY_BLOCK, MEMORY_BLOCK) if not four.memory.is_tdx(b))
        node = (target, target + MEMORY_BLOCK)
        do(lambda: vm.migrate_pages(HUGE, 4 * MIB, node))
        slot = vm.memslots.find(0)
        do(lambda: vm.mm.migrate(slot.hva(6 * MIB), slot.hva(6 * MIB) + 64 * PAGE, node))
        assert block_of(vm.ops.secure.lookup(HUGE).hpa) == target
        do(lambda: four.hotplug.offline_memory(target))
        assert four.memory.total_pages == total - MEMORY_BLOCK // PAGE
        assert block_of(vm.ops.secure.lookup(HUGE).hpa) != target
        assert block_of(vm.mm.get_page(slot.hva(6 * MIB))) != target
        for page in range(512, 640):
            assert td.load(page * PAGE) == page
        assert td.load(4 * MIB) == 44
        for page in range(1536, 1600):
            assert td.load(td.shared(page * PAGE)) == page
        refused(lambda: do(lambda: four.hotplug.offline_memory(target)), EINVAL)
        do(lambda: four.hotplug.online_memory(target))
        assert four.memory.total_pages == total

    run_hosted(four, program)


def test_nothing_is_handed_out_from_a_block_that_is_offline(host):
    start = 4 * MEMORY_BLOCK
    host.hotplug.offline_memory(start)
    try:
        pages = []
        with suppress(KvmError):
            while True:
                pages.append(host.memory.alloc(64))
        assert not any(start - 63 * PAGE <= page < start + MEMORY_BLOCK for page in pages)
        for page in pages:
            host.memory.free(page, 64)
    finally:
        host.hotplug.online_memory(start)
    refused(lambda: host.hotplug.online_memory(start), EINVAL)


def test_a_block_with_pages_that_cannot_move_stays(host):
    free, block = host.memory.free_pages, 5 * MEMORY_BLOCK
    page = host.memory.alloc(within=(block, block + MEMORY_BLOCK))  # the kernel's own
    refused(lambda: host.hotplug.offline_memory(block), EBUSY)
    assert host.memory.free_pages == free - 1
    host.memory.give_to_tdx(page, "S-EPT")  # or the module's
    refused(lambda: host.hotplug.offline_memory(block), EBUSY)
    host.memory.take_from_tdx(page)
    host.memory.free(page)
    assert host.memory.free_pages == free
    refused(lambda: host.hotplug.offline_memory(0), EINVAL)  # its first MiB is the firmware's
    for bad in (MIB, -MEMORY_BLOCK, 1 << 40, 12 * MEMORY_BLOCK):
        refused(lambda bad=bad: host.hotplug.offline_memory(bad), EINVAL)


def test_a_block_stays_when_there_is_no_room_elsewhere(host):
    mm = Kvm(host).mm
    hva = mm.mmap(4 * MIB)
    mm.write(hva, b"\5" * (4 * MIB))
    vm = Kvm(host, mm).create_vm()
    block = 5 * MEMORY_BLOCK
    assert mm.migrate(hva, hva + 4 * MIB, (block, block + MEMORY_BLOCK)) == 1024
    with scarce(host, 10):
        refused(lambda: host.hotplug.offline_memory(block), EBUSY)
    assert mm.read(hva, 4 * MIB) == b"\5" * (4 * MIB)
    vm.close()
    mm.close()


def test_memory_that_is_in_no_tdmr_cannot_come_online():
    description = replace(preset("spr"), cmrs=((MIB, 1023 * MIB),))
    host = Host(Platform(description))
    start = 1024 * MIB
    for bad in ((start + MIB, MEMORY_BLOCK), (start, MIB), (0, MEMORY_BLOCK), (1 << 40, MEMORY_BLOCK), (start, 0)):
        refused(lambda bad=bad: host.hotplug.add_memory(*bad), EINVAL)
    host.enable_tdx(development_release())
    refused(lambda: host.hotplug.add_memory(start, MEMORY_BLOCK), EPERM)
    host.disable_tdx()
    free = host.memory.free_pages
    host.hotplug.add_memory(start, MEMORY_BLOCK)
    assert host.memory.free_pages == free + MEMORY_BLOCK // PAGE
    with pytest.raises(Exception, match="not convertible"):
        host.enable_tdx(development_release())
