"""Private memory on pages of 1 GiB; NUMA balancing and khugepaged behind a TD's back; S-EPT pages that come back."""

import threading
from contextlib import suppress
from dataclasses import replace

import pytest
from host_actions import run_hosted
from td_build_steps import Build
from test_user_memory import Backed, roomy, roomy_host  # noqa: F401  fixtures

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUESTMEM_HUGETLB_FLAG_1GB,
    GUESTMEM_HUGETLB_FLAG_2MB,
    MEMORY_ATTRIBUTE_PRIVATE,
    MemorySlotFlag,
)
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.hw import Registers, preset
from softtdx.kvm import KvmError
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.memory import PAGE
from softtdx.vmm.boot import boot_host

MIB = 1 << 20
GIB = 1 << 30
HUGE = 2 * MIB
GIGANTIC_FILE = GUEST_MEMFD_FLAG_HUGETLB | GUESTMEM_HUGETLB_FLAG_1GB


def add_gigabyte(vm, gpa=4 * GIB, flags=GIGANTIC_FILE, size=GIB):
    file = vm.create_guest_memfd(size, flags)
    vm.set_user_memory_region2(9, gpa, size, vm.mm.mmap(size), MemorySlotFlag.GUEST_MEMFD, file)
    vm.set_memory_attributes(gpa, size, MEMORY_ATTRIBUTE_PRIVATE)
    return file


def accept_gigabyte(td, vm, do, gpa=4 * GIB):
    do(lambda: vm.vcpus[0].pre_fault_memory(gpa, GIB))
    for at in range(gpa, gpa + GIB, HUGE):
        assert td.accept(at, 1) == 0
    td.tdvmcall(VmcallLeaf.CPUID, 0)  # an exit: the host sees that all is accepted


def test_a_gigabyte_is_merged_split_by_a_conversion_and_merged_again(roomy_host):  # noqa: F811
    base = 4 * GIB

    def program(td, vm, do):
        secure = vm.ops.secure
        do(lambda: add_gigabyte(vm))
        accept_gigabyte(td, vm, do)
        assert secure.gigantic_pages == 1
        assert secure.lookup(base + 5 * MIB).level == 2
        hpa = secure.lookup(base).hpa
        assert hpa % GIB == 0
        words = range(base, base + GIB, 37 * MIB + 8)
        for at in words:
            td.store(at, at)
        part = base + 100 * MIB
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, part | td.shared_bit, 4 * PAGE).r10 == 0
        td.store(td.shared(part), 1)
        assert (secure.gigantic_pages, secure.huge_pages) == (0, 511)
        assert secure.lookup(part + 4 * PAGE).level == 0
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, part, 4 * PAGE).r10 == 0
        for page in range(part, part + 4 * PAGE, PAGE):
            assert td.accept(page) == 0
        for _ in range(3):  # 4 KiB to 2 MiB, then 2 MiB to 1 GiB
            td.tdvmcall(VmcallLeaf.CPUID, 0)
        assert secure.gigantic_pages == 1
        assert secure.lookup(base).hpa == hpa
        for at in words:
            assert td.load(at) == at

    stats = run_hosted(roomy_host, program)
    assert stats["promotions"] == 3


def test_a_gigabyte_goes_as_one_page_and_comes_back_clean(roomy_host):  # noqa: F811
    counts = roomy_host.platform.events.counts

    def program(td, vm, do):
        file = do(lambda: add_gigabyte(vm))
        accept_gigabyte(td, vm, do)
        assert vm.ops.secure.gigantic_pages == 1
        before = counts["seamcall"]
        do(lambda: file.punch_hole(0, GIB))
        assert counts["seamcall"] - before < 12  # BLOCK, TRACK, REMOVE, and entries of the TD meanwhile
        assert vm.ops.secure.lookup(4 * GIB) is None
        assert td.accept(4 * GIB, 1) == 0
        assert td.load(4 * GIB) == 0

    run_hosted(roomy_host, program)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("leaf", [SeamcallLeaf.MEM_RANGE_BLOCK, SeamcallLeaf.MEM_TRACK, SeamcallLeaf.MEM_PAGE_DEMOTE])
def test_a_gigabyte_that_cannot_be_split_is_as_it_was(roomy_host, monkeypatch, leaf, at):  # noqa: F811
    real, armed, seen = sc.seamcall, [False], []

    def failing(lp, which, version=0, **operands):
        if armed[0] and which == leaf:
            seen.append(which)
            if len(seen) == at + 1:
                return Registers(rax=Status.OPERAND_INVALID | Operand.RCX)
        return real(lp, which, version, **operands)

    monkeypatch.setattr(sc, "seamcall", failing)

    def program(td, vm, do):
        do(lambda: add_gigabyte(vm))
        accept_gigabyte(td, vm, do)
        td.store(4 * GIB + 700 * MIB, 7)
        armed[0] = True
        with suppress(KvmError):
            do(lambda: vm.migrate_pages(4 * GIB + 6 * MIB, PAGE))
        armed[0] = False
        assert td.load(4 * GIB + 700 * MIB) == 7
        assert vm.ops.secure.mapped_pages >= GIB // PAGE

    run_hosted(roomy_host, program)
    assert seen


def test_a_td_dies_with_gigantic_pages_pending_and_nothing_is_lost(roomy_host):  # noqa: F811
    with Build(roomy_host) as build:
        build.do(3)
        file = add_gigabyte(build.vm)
        build.create_vcpu()
        build.init_vcpu()
        build.finalize()
        build.vcpus[0].pre_fault_memory(4 * GIB, GIB)
        assert build.vm.ops.secure.huge_pages == 512
        # Pending as a whole: a pass of khugepaged leaves it, since the TD may accept it in smaller parts.
        roomy_host.mm.khugepaged.scan()
        assert build.vm.ops.secure.gigantic_pages == 0
        assert file.allocated_pages() == GIB // PAGE


def test_a_file_on_large_pages_keeps_them_while_parts_are_punched_out(host):
    with Build(host) as build:
        build.do(1)
        file = build.vm.create_guest_memfd(4 * MIB, GUEST_MEMFD_FLAG_HUGETLB | GUESTMEM_HUGETLB_FLAG_2MB)
        free = host.memory.free_pages
        first = file.get_page(3)
        assert (first - 3 * PAGE) % HUGE == 0
        assert host.memory.free_pages == free - 512
        file.punch_hole(3 * PAGE, PAGE)
        assert host.memory.free_pages == free - 512
        assert file.get_huge_page(0) == first - 3 * PAGE
        for flags in (GUEST_MEMFD_FLAG_HUGETLB, GUESTMEM_HUGETLB_FLAG_1GB, 1, 1 << 63):
            with pytest.raises(KvmError) as error:
                build.vm.create_guest_memfd(4 * MIB, flags)
            assert error.value.errno == 22
        with pytest.raises(KvmError) as error:
            build.vm.create_guest_memfd(4 * MIB + PAGE, GUEST_MEMFD_FLAG_HUGETLB | GUESTMEM_HUGETLB_FLAG_2MB)
        assert error.value.errno == 22


def test_empty_sept_pages_come_back_under_pressure_and_the_td_goes_on(host):
    def program(td, vm, do):
        secure = vm.ops.secure
        for page in range(4 * MIB, 4 * MIB + 8 * PAGE, PAGE):
            assert td.accept(page) == 0
        td.store(4 * MIB, 1)
        assert td.accept(0x9000) == 0
        td.store(0x9000, 2)
        do(lambda: vm.memslots.find(0).guest_memfd.punch_hole(4 * MIB, 2 * MIB))
        before, free = secure.table_pages, host.memory.free_pages
        assert do(lambda: host.mm.shrink_page_tables(8)) >= 1
        assert secure.table_pages < before
        assert host.memory.free_pages - free >= before - secure.table_pages
        assert td.load(0x9000) == 2
        assert td.accept(4 * MIB) == 0
        assert td.load(4 * MIB) == 0

    run_hosted(host, program)


def test_an_sept_page_that_the_module_keeps_serves_on(host, monkeypatch):
    def refuse(lp, tdr, gpa, level):
        return Registers(rax=Status.OPERAND_INVALID | Operand.RCX)

    def program(td, vm, do):
        assert td.accept(4 * MIB) == 0
        do(lambda: vm.memslots.find(0).guest_memfd.punch_hole(4 * MIB, 2 * MIB))
        before = vm.ops.secure.table_pages
        with monkeypatch.context() as patch:
            patch.setattr(sc, "mem_sept_remove", refuse)
            do(lambda: host.mm.shrink_page_tables(8))
        assert vm.ops.secure.table_pages == before
        assert vm.stats["tables kept"] == 1
        assert td.accept(4 * MIB) == 0
        assert td.load(4 * MIB) == 0

    run_hosted(host, program)


# --- NUMA balancing and khugepaged
@pytest.fixture(scope="module")
def two_nodes():
    return boot_host(replace(preset("spr"), packages=2, lps=2))


@pytest.fixture
def numa_host(two_nodes):
    before = two_nodes.memory.free_pages
    yield two_nodes
    assert set(two_nodes.memory.tdx_pages()) == {"PAMT"}
    assert two_nodes.memory.free_pages == before


def node_of(host, vm, gpa):
    if vm.ops.has_private_memory:
        return host.mm.numa.node_of_page(vm.ops.secure.lookup(gpa).hpa)
    return host.mm.numa.node_of_page(vm.mm.get_page(vm.memslots.find(gpa).hva(gpa)))


@pytest.mark.parametrize("vm", [False, True])
def test_pages_move_to_the_node_of_the_processor_that_asks_twice(numa_host, vm):
    host = numa_host
    pages = range(600, 632)

    def program(td, machine_vm, do):
        if td.is_td:
            for page in pages:
                assert td.accept(page * PAGE) == 0
        for page in pages:
            td.store(page * PAGE, page)
        cpu = machine_vm.vcpus[0].cpu
        here, away = host.mm.numa.node_of_cpu(cpu), 1 - host.mm.numa.node_of_cpu(cpu)
        place = host.mm.numa.nodes[away]
        first, last = pages.start * PAGE, pages.stop * PAGE

        def banish():
            if machine_vm.ops.has_private_memory:
                return machine_vm.migrate_pages(first, last - first, place)
            slot = machine_vm.memslots.find(first)
            return machine_vm.mm.migrate(slot.hva(first), slot.hva(last - 1) + 1, place)

        assert do(banish) == len(pages)
        assert {node_of(host, machine_vm, page * PAGE) for page in pages} == {away}
        for round_ in range(6):
            assert do(lambda: host.mm.numa.scan(1 << 16)) >= len(pages)
            for page in pages:
                assert td.load(page * PAGE) == page
            if machine_vm.vcpus[0].cpu != cpu:
                return  # the host moved the vCPU: nothing can be said of where the pages belong
            if round_ == 0:
                assert {node_of(host, machine_vm, page * PAGE) for page in pages} == {away}
        assert {node_of(host, machine_vm, page * PAGE) for page in pages} == {here}
        for page in pages:
            assert td.load(page * PAGE) == page

    run_hosted(host, program, vm=vm)


def test_a_host_of_one_node_is_not_scanned(host):
    assert host.mm.numa.scan() == 0


def test_a_blocked_page_can_be_converted_split_and_killed_like_any_other(numa_host):
    host = numa_host

    def program(td, vm, do):
        assert td.accept(HUGE, 1) == 0
        assert td.accept(0x9000) == 0
        td.store(HUGE, 3)
        assert do(lambda: host.mm.numa.scan(1 << 16)) > 1
        assert vm.ops.secure.hinted
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, (HUGE + PAGE) | td.shared_bit, PAGE).r10 == 0
        assert td.load(HUGE) == 3
        do(lambda: host.mm.numa.scan(1 << 16))
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, HUGE + PAGE, PAGE).r10 == 0
        do(lambda: host.mm.numa.scan(1 << 16))
        assert td.accept(HUGE + PAGE) == 0
        do(lambda: host.mm.numa.scan(1 << 16))
        td.tdvmcall(VmcallLeaf.CPUID, 0)
        assert do(lambda: vm.collapse(HUGE)) or vm.ops.secure.lookup(HUGE).level == 1
        assert td.load(HUGE) == 3
        do(lambda: host.mm.numa.scan(1 << 16))

    run_hosted(host, program)


def test_pending_pages_that_are_blocked_can_still_be_accepted(numa_host):
    def program(td, vm, do):
        do(lambda: vm.vcpus[0].pre_fault_memory(4 * MIB, HUGE))
        assert do(lambda: numa_host.mm.numa.scan(1 << 16)) > 0
        assert td.accept(4 * MIB, 1) == 0
        td.store(4 * MIB, 1)
        assert td.load(4 * MIB) == 1

    run_hosted(numa_host, program)


def test_khugepaged_merges_what_a_td_accepted_in_small_pages_here_and_there(host):
    def program(td, vm, do):
        for page in range(512, 1024):
            assert td.accept(page * PAGE) == 0
            td.store(page * PAGE, page)
        do(lambda: vm.migrate_pages(HUGE + 9 * PAGE, PAGE))
        do(lambda: vm.migrate_pages(HUGE + 80 * PAGE, PAGE))
        td.tdvmcall(VmcallLeaf.CPUID, 0)
        if vm.ops.secure.lookup(HUGE).level == 0:
            assert do(host.mm.khugepaged.scan) == 1
        assert vm.ops.secure.lookup(HUGE).level == 1
        assert do(host.mm.khugepaged.scan) == 0
        for page in range(512, 1024, 3):
            assert td.load(page * PAGE) == page

    run_hosted(host, program)


def test_khugepaged_collapses_user_memory_where_that_is_allowed(host):
    def program(td, vm, do):
        for page in range(512, 1000):
            td.store(page * PAGE, page)
        assert do(host.mm.khugepaged.scan) == 0
        hva = vm.memslots.find(0).hva(0)
        do(lambda: vm.mm.madvise_hugepage(hva))
        host.mm.khugepaged.max_none = 0
        try:
            before = do(host.mm.khugepaged.scan)
        finally:
            host.mm.khugepaged.max_none = 511
        assert do(host.mm.khugepaged.scan) + before >= 1
        assert vm.mm.get_user_page(hva + HUGE).size == HUGE
        for page in range(512, 1000):
            assert td.load(page * PAGE) == page
        assert vm.ept.find(HUGE).level == 1

    run_hosted(host, program, machine_class=Backed, vm=True)


def test_the_thread_makes_the_passes_and_ends(host):
    passes, thrice = [], threading.Event()

    def scan():
        passes.append(threading.current_thread())
        if len(passes) >= 3:
            thrice.set()

    host.mm.khugepaged.scan = scan
    try:
        host.mm.start(0.001)
        host.mm.start(0.001)
        assert thrice.wait(60)
        host.mm.stop()
        host.mm.stop()
    finally:
        del host.mm.khugepaged.scan
    assert len(set(passes)) == 1
    assert not passes[0].is_alive()
