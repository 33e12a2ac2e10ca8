"""What the host does to shared memory, and to ordinary VMs', behind the guest's back: the guest never notices."""

import random
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from host_actions import HostedMachine, run_hosted

from softtdx.abi.ghci import VmcallLeaf
from softtdx.hw import preset
from softtdx.kvm import Kvm, KvmError
from softtdx.kvm.memfd import Memfd
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M
from softtdx.vmm.boot import boot_host
from softtdx.vmm.errors import GuestError

MIB = 1 << 20
GIB = 1 << 30
EINVAL, ENOENT, EFAULT = 22, 2, 14


class Backed(HostedMachine):
    """A machine whose memory user space has mapped in a certain way."""

    page_size, file, thp = PAGE, None, False

    def _add_memory(self, slot, gpa, size):
        mm, real = self.kvm.mm, self.kvm.mm.mmap

        def mmap(length):
            if slot:
                return real(length)
            hva = real(length, page_size=self.page_size, file=self.file)
            if self.thp:
                mm.madvise_hugepage(hva)
            return hva

        mm.mmap = mmap
        try:
            super()._add_memory(slot, gpa, size)
        finally:
            del mm.mmap


def backed(**how):
    return type("Machine", (Backed,), how)


def fill(td, pages, value):
    for page in pages:
        td.store(page * PAGE, page ^ value)


def check(td, pages, value):
    for page in pages:
        assert td.load(page * PAGE) == page ^ value


def test_a_vms_pages_are_swapped_out_and_come_back(host):
    pages = range(512, 1024, 7)

    def program(td, vm, do):
        fill(td, pages, 0xABC)
        before, resident = host.memory.free_pages, vm.mm.resident_pages()
        assert do(lambda: vm.mm.shrink(300)) == 300
        assert vm.mm.swapped_pages() == 300
        assert vm.mm.resident_pages() == resident - 300
        assert host.memory.free_pages == before + 300
        assert host.mm.swap.used == 300
        check(td, pages, 0xABC)
        fill(td, pages, 0x123)
        do(lambda: vm.mm.shrink(1 << 20))
        check(td, pages, 0x123)
        assert vm.mm.stats["swapped in"] > 64

    run_hosted(host, program, vm=True)
    assert host.mm.swap.used == 0


def test_what_the_guest_uses_stays_and_what_it_does_not_use_goes(host):
    hot, cold = range(512, 528), range(600, 664)

    def program(td, vm, do):
        fill(td, (*hot, *cold), 1)
        slot = vm.memslots.find(0)
        do(lambda: [vm.mm._young(slot.hva(p * PAGE)) for p in (*hot, *cold)])  # the hand of the clock came by
        fill(td, hot, 2)
        do(lambda: vm.mm._swap_out([h for h in [slot.hva(p * PAGE) for p in (*hot, *cold)] if not vm.mm._young(h)]))
        assert vm.mm.swapped_pages() == len(cold)
        check(td, hot, 2)
        assert vm.mm.stats["swapped in"] == 0
        check(td, cold, 1)

    run_hosted(host, program, vm=True)


@pytest.mark.parametrize("vm", [True, False])
def test_test_young_tells_and_does_not_forget(host, vm):
    page = 0x20_0000

    def program(td, machine_vm, do):
        gpa = page
        if td.is_td:
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, page | td.shared_bit, PAGE).r10 == 0
            gpa = td.shared(page)
        hva = machine_vm.memslots.find(page).hva(page)
        td.store(gpa, 1)
        notifier = machine_vm.mmu_notifier
        do(lambda: notifier.clear_flush_young(hva, hva + PAGE))
        assert not do(lambda: notifier.test_young(hva, hva + PAGE))
        assert td.load(gpa) == 1
        assert do(lambda: notifier.test_young(hva, hva + PAGE))
        assert do(lambda: notifier.test_young(hva, hva + PAGE))
        assert do(lambda: notifier.clear_flush_young(hva, hva + PAGE))
        assert not do(lambda: notifier.clear_flush_young(hva, hva + PAGE))

    run_hosted(host, program, vm=vm)


def test_a_tds_shared_memory_is_swapped_and_moved_and_its_private_memory_is_not(host):
    part = 4 * MIB

    def program(td, vm, do):
        assert td.accept(0x5000) == 0
        td.store(0x5000, 0x5EC)
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, part | td.shared_bit, 64 * PAGE).r10 == 0
        for at in range(part, part + 64 * PAGE, PAGE):
            td.store(td.shared(at), at)
        private = vm.ops.secure.mapped_pages
        assert do(lambda: vm.mm.shrink(10_000)) >= 64
        assert vm.mm.swapped_pages() >= 64
        assert vm.ops.secure.mapped_pages == private
        for at in range(part, part + 64 * PAGE, PAGE):
            assert td.load(td.shared(at)) == at
        slot = vm.memslots.find(part)
        before = vm.mm.get_page(slot.hva(part))
        assert do(lambda: vm.mm.migrate(slot.hva(part), slot.hva(part) + 64 * PAGE)) == 64
        assert vm.mm.get_page(slot.hva(part)) != before
        for at in range(part, part + 64 * PAGE, PAGE):
            assert td.load(td.shared(at)) == at
        assert td.load(0x5000) == 0x5EC

    run_hosted(host, program)


def test_transparent_huge_pages_are_mapped_as_such_split_by_reclaim_and_collapsed_again(host):
    pages = range(1024, 1536, 9)

    def program(td, vm, do):
        fill(td, pages, 0x77)
        base = vm.memslots.find(0).hva(4 * MIB)
        assert vm.ept.find(4 * MIB).level == 1
        huge = vm.mm.huge_pages()
        while vm.mm.huge_pages() == huge or vm.mm.get_user_page(base).size > PAGE:
            do(lambda: vm.mm.shrink(64))
        check(td, pages, 0x77)
        assert vm.ept.find(4 * MIB).level == 0
        do(lambda: [vm.mm.get_page(base + i * PAGE) for i in range(512)])
        assert do(lambda: vm.mm.collapse(base))
        check(td, pages, 0x77)
        assert vm.ept.find(4 * MIB).level == 1

    run_hosted(host, program, machine_class=backed(thp=True), vm=True)


def test_a_page_that_is_split_for_a_discarded_part_keeps_the_rest(host):
    def program(td, vm, do):
        pages = range(512, 1024, 5)
        fill(td, pages, 0x99)
        hva = vm.memslots.find(0).hva(2 * MIB)
        assert vm.mm.get_user_page(hva).size == PAGE_2M
        do(lambda: vm.mm.discard(hva + 5 * PAGE, PAGE))
        assert td.load((512 + 5) * PAGE) == 0
        check(td, [p for p in pages if p != 517], 0x99)

    run_hosted(host, program, machine_class=backed(thp=True), vm=True)


@pytest.mark.parametrize("page_size", [PAGE, PAGE_2M])
def test_a_memfd_is_shared_between_processes_and_its_holes_reach_the_guest(host, page_size):
    file = Memfd(host.memory, 8 * MIB, page_size)
    other = Kvm(host).mm

    def program(td, vm, do):
        pages = range(1024, 1024 + 16)
        fill(td, pages, 3)
        hva = do(lambda: other.mmap(8 * MIB, file=file))
        assert do(lambda: other.read(hva + 1025 * PAGE, 8)) == (1025 ^ 3).to_bytes(8, "little")
        assert vm.ept.find(4 * MIB).level == (page_size > PAGE)
        do(lambda: other.write(hva + 1026 * PAGE, b"from a neighbour"[:8]))
        assert td.load(1026 * PAGE) == int.from_bytes(b"from a n", "little")
        do(lambda: file.punch_hole(4 * MIB, 2 * MIB))
        assert vm.ept.find(4 * MIB) is None
        assert td.load(1025 * PAGE) == 0
        assert do(lambda: vm.mm.shrink(100)) >= 0  # of a file nothing is swapped
        assert file.resident_pages > 0

    run_hosted(host, program, machine_class=backed(file=file), vm=True)
    other.close()
    file.close()


@pytest.fixture(scope="module")
def roomy():
    """A host with aligned gigabytes."""
    return boot_host(replace(preset("spr"), ram=((0, 6 * GIB),), cmrs=((MIB, 1535 * MIB), (2 * GIB, 4 * GIB)), lps=2))


@pytest.fixture
def roomy_host(roomy):
    before = roomy.memory.free_pages
    yield roomy
    assert set(roomy.memory.tdx_pages()) == {"PAMT"}
    assert roomy.memory.free_pages == before


def test_a_vm_on_gigantic_pages_runs_on_one_leaf(roomy_host):
    def program(td, vm, do):
        pages = range(0x1_0000, 0x3_0000, 0x1111)
        fill(td, pages, 0x4242)
        assert vm.ept.find(256 * MIB).level == 2
        assert vm.ept.large[2] == 1
        with pytest.raises(KvmError) as error:
            do(lambda: vm.mm.discard(vm.memslots.find(0).hva(2 * MIB), PAGE))
        assert error.value.errno == EINVAL
        assert do(lambda: vm.mm.shrink(64)) == 0 or vm.ept.large[2] == 1
        check(td, pages, 0x4242)

    run_hosted(roomy_host, program, machine_class=backed(page_size=PAGE_1G), vm=True, memory=GIB)


def test_a_tds_shared_gigabyte_is_one_leaf_until_a_part_of_it_becomes_private(roomy_host):
    def program(td, vm, do):
        do(lambda: vm.set_memory_attributes(GIB, GIB, 0))
        td.store(td.shared(GIB + 3 * MIB), 5)
        assert vm.ept.find(GIB).level == 2
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, GIB + 8 * MIB, PAGE).r10 == 0
        assert td.accept(GIB + 8 * MIB) == 0
        assert td.load(td.shared(GIB + 3 * MIB)) == 5
        assert vm.ept.find(GIB + 3 * MIB).level == 1
        assert td.load(GIB + 8 * MIB) == 0
        assert vm.ept.find(GIB + 8 * MIB) is None
        do(lambda: vm.set_memory_attributes(GIB + 8 * MIB, PAGE, 0))
        td.store(td.shared(GIB + 8 * MIB), 6)
        assert td.load(td.shared(GIB + 3 * MIB)) == 5

    run_hosted(roomy_host, program, machine_class=backed(page_size=PAGE_1G), memory=2 * GIB)


@contextmanager
def scarce(host, pages):
    """Somebody else has all free memory but `pages` pages."""
    hog = []
    for size in (256, 1):
        with suppress(KvmError):
            while host.memory.free_pages - pages >= size:
                hog.append((host.memory.alloc(size), size))
    try:
        yield
    finally:
        for block in hog:
            host.memory.free(*block)


def test_memory_pressure_swaps_one_vm_out_for_another(host):
    """A second VM gets its pages from the first, which then gets them back."""

    def program(td, vm, do):
        pages = range(512, 4096, 3)
        fill(td, pages, 0x11)

        def second(td2, vm2, do2):
            with scarce(host, 1500):
                fill(td2, range(512, 4096), 0x22)
                check(td2, range(512, 4096), 0x22)
            assert vm.mm.swapped_pages() + vm2.mm.swapped_pages() > 1000

        do(lambda: run_hosted(host, second, vm=True, memory=16 * MIB))
        check(td, pages, 0x11)
        assert vm.mm.stats["swapped out"] > 0

    run_hosted(host, program, vm=True, memory=16 * MIB)
    assert host.mm.swap.used == 0


def test_private_memory_gets_pages_by_reclaim_and_is_never_reclaimed(host):
    mm = Kvm(host).mm
    hva = mm.mmap(32 * MIB)
    mm.write(hva, b"\1" * (32 * MIB))

    def program(td, vm, do):
        with scarce(host, 2500):
            for page in range(512, 4096):
                assert td.accept(page * PAGE) == 0
                td.store(page * PAGE, page)
            assert mm.swapped_pages() > 1000
            private = vm.ops.secure.mapped_pages
            do(lambda: host.memory.reclaim(1 << 20))
            assert vm.ops.secure.mapped_pages == private
            for page in range(512, 4096, 5):
                assert td.load(page * PAGE) == page

    run_hosted(host, program, memory=16 * MIB)
    assert mm.read(hva + 31 * MIB, 4) == b"\1" * 4
    mm.close()


def test_when_there_is_no_memory_and_nothing_to_reclaim_the_fault_says_so(host):
    def program(td, vm, do):
        del vm, do
        with scarce(host, 0):
            host.mm.swap.size, size = 0, host.mm.swap.size
            try:
                td.accept(1024 * PAGE)
            finally:
                host.mm.swap.size = size

    with pytest.raises((KvmError, GuestError)):
        run_hosted(host, program, memory=16 * MIB)


def test_the_background_pass_keeps_the_watermark(host):
    mm = Kvm(host).mm
    hva = mm.mmap(8 * MIB)
    mm.write(hva, b"\7" * (8 * MIB))
    with scarce(host, host.mm.kswapd.low - 500):
        assert host.memory.free_pages == host.mm.kswapd.low - 500
        assert host.mm.kswapd.scan() >= 500
        assert host.memory.free_pages >= host.mm.kswapd.low
        assert host.mm.kswapd.scan() == 0
    assert mm.read(hva, 8 * MIB) == b"\7" * (8 * MIB)
    mm.close()


def test_random_moves_swaps_and_collapses_lose_nothing(host):
    rng = random.Random(7)
    book = {}

    def program(td, vm, do):
        hva = vm.memslots.find(0).hva(0)
        for _ in range(150):
            page = rng.randrange(512, 2048)
            what = rng.choice(("store", "store", "load", "shrink", "migrate", "collapse", "hint", "young"))
            if what == "store":
                book[page] = rng.getrandbits(64)
                td.store(page * PAGE, book[page])
            elif what == "load":
                assert td.load(page * PAGE) == book.get(page, 0)
            elif what == "shrink":
                do(lambda: vm.mm.shrink(rng.randrange(1, 400)))
            elif what == "migrate":
                do(lambda page=page: vm.mm.migrate(hva + page * PAGE, hva + (page + 40) * PAGE))
            elif what == "collapse":
                do(lambda page=page: vm.mm.collapse(hva + page // 512 * PAGE_2M, 511))
            elif what == "hint":
                do(lambda: vm.mm.hint(0, 100))
            else:
                do(lambda page=page: vm.mmu_notifier.clear_flush_young(hva + page * PAGE, hva + (page + 9) * PAGE))
        for page, value in book.items():
            assert td.load(page * PAGE) == value

    run_hosted(host, program, vm=True)
