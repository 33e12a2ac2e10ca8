"""A TD's pages move and change size under it, and it notices nothing."""

from contextlib import suppress

import pytest
from host_actions import run_hosted
from td_build_steps import Build

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.hw import Registers
from softtdx.kvm import Kvm, KvmError
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.memory import PAGE

MIB = 1 << 20
HUGE = 2 * MIB
EINVAL, ENOMEM = 22, 12


def where(vm, gpa):
    return vm.ops.secure.lookup(gpa).hpa


def test_a_page_that_moves_keeps_its_contents_and_its_old_place_is_free_and_clean(host):
    def program(td, vm, do):
        for page in range(4):
            assert td.accept(page * PAGE) == 0
            td.store(page * PAGE, page + 0x1234_5678)
        before = [where(vm, page * PAGE) for page in range(4)]
        assert do(lambda: vm.migrate_pages(0, 4 * PAGE)) == 4
        after = [where(vm, page * PAGE) for page in range(4)]
        assert not set(before) & set(after)
        assert not any(vm.host.memory.is_tdx(pa) for pa in before)
        assert all(vm.host.memory.read(pa, PAGE) == bytes(PAGE) for pa in before)
        for page in range(4):
            assert td.load(page * PAGE) == page + 0x1234_5678

    assert run_hosted(host, program)["pages relocated"] == 4


def test_a_large_page_moves_as_a_whole_and_is_one_again(host):
    def program(td, vm, do):
        assert td.accept(HUGE, 1) == 0
        for page in range(0, HUGE, 64 * PAGE):
            td.store(HUGE + page, page + 1)
        before = where(vm, HUGE)
        assert do(lambda: vm.migrate_pages(HUGE, HUGE)) == 512
        assert vm.ops.secure.lookup(HUGE).level == 1
        assert where(vm, HUGE) != before
        for page in range(0, HUGE, 64 * PAGE):
            assert td.load(HUGE + page) == page + 1

    stats = run_hosted(host, program)
    assert stats["promotions"] == 1


def test_pages_go_to_the_node_that_is_asked_for_or_nowhere(host):
    start, end = max(host.memory.ranges, key=lambda r: r[1] - r[0])
    middle = (start + end) // 2 & ~(HUGE - 1)

    def program(td, vm, do):
        assert td.accept(0) == 0
        td.store(0, 77)
        for node in ((start, middle), (middle, end), (start, middle)):
            assert do(lambda node=node: vm.migrate_pages(0, PAGE, node)) == 1
            assert node[0] <= where(vm, 0) < node[1]
            assert td.load(0) == 77
        here = where(vm, 0)
        with pytest.raises(KvmError) as error:
            do(lambda: vm.migrate_pages(0, PAGE, (1 << 51, (1 << 51) + HUGE)))
        assert error.value.errno == ENOMEM
        assert where(vm, 0) == here
        assert td.load(0) == 77

    run_hosted(host, program)


def test_a_part_that_was_shared_and_is_private_again_makes_the_page_large_again(host):
    def program(td, vm, do):
        secure = vm.ops.secure
        assert td.accept(HUGE, 1) == 0
        td.store(HUGE, 5)
        part = HUGE + 3 * PAGE
        # The first time tables of the shared EPT may take the pages that become free: then only a collapse helps.
        for _ in range(2):
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, part | td.shared_bit, 2 * PAGE).r10 == 0
            td.store(td.shared(part), 1)
            assert secure.lookup(HUGE).level == 0
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, part, 2 * PAGE).r10 == 0
            assert td.accept(part) == 0
            assert td.accept(part + PAGE) == 0
            td.tdvmcall(VmcallLeaf.CPUID, 0)  # any exit: the host sees that all is accepted
            by_itself = secure.lookup(HUGE).level == 1
            assert by_itself or do(lambda: vm.collapse(HUGE))
            assert td.load(HUGE) == 5
            assert td.load(part) == 0
        assert by_itself

    assert run_hosted(host, program)["promotions"] == 2


def test_scattered_pages_are_collapsed_into_a_large_one(host):
    def program(td, vm, do):
        for page in range(0, HUGE, PAGE):
            assert td.accept(HUGE + page) == 0
            td.store(HUGE + page, page + 9)
        do(lambda: vm.migrate_pages(HUGE + 7 * PAGE, PAGE))  # one that lies elsewhere for sure
        if vm.ops.secure.lookup(HUGE).level == 0:
            assert do(lambda: vm.collapse(HUGE))
        assert vm.ops.secure.lookup(HUGE).level == 1
        for page in range(0, HUGE, 32 * PAGE):
            assert td.load(HUGE + page) == page + 9
        assert not do(lambda: vm.collapse(HUGE))

    run_hosted(host, program)


def test_a_td_that_accepts_small_pages_of_a_large_one_gets_it_split(host):
    def program(td, vm, do):
        do(lambda: vm.vcpus[0].pre_fault_memory(HUGE, HUGE))
        assert vm.ops.secure.lookup(HUGE).level == 1
        assert td.accept(HUGE + PAGE) == 0
        assert vm.ops.secure.lookup(HUGE).level == 0
        assert td.accept(HUGE) == 0
        td.store(HUGE, 3)
        assert td.load(HUGE) == 3

    assert run_hosted(host, program)["demotions"] == 1


def test_what_cannot_move_or_merge_is_refused(host):
    with Build(host) as build:
        build.do()
        for bad in ((1, PAGE), (0, 1), (0, 0), (-PAGE, PAGE), (1 << 47, PAGE)):
            with pytest.raises(KvmError) as error:
                build.vm.migrate_pages(*bad)
            assert error.value.errno == EINVAL
        for address in (PAGE, -HUGE, 1 << 47):
            with pytest.raises(KvmError) as error:
                build.vm.collapse(address)
            assert error.value.errno == EINVAL
        assert build.vm.migrate_pages(1 << 40, HUGE) == 0
        assert not build.vm.collapse(0)
    kvm = Kvm(host)
    vm = kvm.create_vm()
    for call in (lambda: vm.migrate_pages(0, PAGE), lambda: vm.collapse(0)):
        with pytest.raises(KvmError) as error:
            call()
        assert error.value.errno == EINVAL
    vm.close()


@pytest.mark.parametrize(
    "leaf",
    [
        SeamcallLeaf.MEM_RANGE_BLOCK,
        SeamcallLeaf.MEM_TRACK,
        SeamcallLeaf.MEM_PAGE_RELOCATE,
        SeamcallLeaf.MEM_PAGE_DEMOTE,
        SeamcallLeaf.MEM_PAGE_PROMOTE,
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_when_a_step_of_a_move_fails_the_td_goes_on_as_before(host, monkeypatch, leaf, at):
    real = sc.seamcall
    armed, seen = [False], []

    def failing(lp, which, version=0, **operands):
        if armed[0] and which == leaf:
            seen.append(which)
            if len(seen) == at + 1:
                return Registers(rax=Status.OPERAND_INVALID | Operand.RCX)
        return real(lp, which, version, **operands)

    monkeypatch.setattr(sc, "seamcall", failing)

    def program(td, vm, do):
        assert td.accept(HUGE, 1) == 0
        for page in range(0, HUGE, 128 * PAGE):
            td.store(HUGE + page, page + 1)
        armed[0] = True
        with suppress(KvmError):  # where only the merging at the end fails, it is the TD's page all the same
            do(lambda: vm.migrate_pages(HUGE, HUGE))
        armed[0] = False
        for page in range(0, HUGE, 128 * PAGE):
            assert td.load(HUGE + page) == page + 1
        assert do(lambda: vm.migrate_pages(HUGE, HUGE)) == 512
        for page in range(0, HUGE, 128 * PAGE):
            assert td.load(HUGE + page) == page + 1

    run_hosted(host, program)
    assert seen


def test_a_slot_that_is_deleted_takes_its_large_pages_along(host):
    with Build(host) as build:
        build.do(3)
        file = build.vm.create_guest_memfd(2 * HUGE)
        hva = build.kvm.mm.mmap(2 * HUGE)
        build.vm.set_user_memory_region2(1, 1 << 30, 2 * HUGE, hva, MemorySlotFlag.GUEST_MEMFD, file)
        build.vm.set_memory_attributes(1 << 30, 2 * HUGE, MEMORY_ATTRIBUTE_PRIVATE)
        build.create_vcpu()
        build.init_vcpu()
        build.finalize()
        build.vcpus[0].pre_fault_memory(1 << 30, 2 * HUGE)
        # Pending pages move too; small ones that are not accepted stay small.
        assert build.vm.migrate_pages(1 << 30, HUGE) == 512
        assert build.vm.ops.secure.huge_pages == 2
        assert build.vm.migrate_pages(1 << 30, PAGE) == 1
        assert build.vm.ops.secure.huge_pages == 1
        assert not build.vm.collapse(1 << 30)
        assert build.vm.ops.secure.huge_pages == 1
        build.vm.set_user_memory_region2(1, 0, 0, 0)
        assert build.vm.ops.secure.mapped_pages == 0


def test_a_merge_that_the_module_refuses_costs_the_td_nothing(host, monkeypatch):
    real = sc.mem_page_promote
    refused = []

    def refuse(lp, tdr, gpa, level):
        refused.append(gpa)
        return Registers(rax=Status.OPERAND_INVALID | Operand.RCX)

    def program(td, vm, do):
        secure = vm.ops.secure
        assert td.accept(HUGE, 1) == 0
        td.store(HUGE, 5)
        for promote in (refuse, refuse, real):
            monkeypatch.setattr(sc, "mem_page_promote", promote)
            do(lambda: vm.memslots.find(HUGE).guest_memfd.punch_hole(HUGE + PAGE, PAGE))
            assert td.accept(HUGE + PAGE) == 0
            td.tdvmcall(VmcallLeaf.CPUID, 0)
            assert td.load(HUGE) == 5
            assert td.load(HUGE + PAGE) == 0
        assert secure.lookup(HUGE).level == 1
        assert not secure.promotable

    stats = run_hosted(host, program)
    assert (stats["promotions refused"], stats["promotions"]) == (2, 1)
    assert refused == [HUGE] * 2
