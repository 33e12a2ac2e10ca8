"""TDs and VMs run while the host's daemons, hotplug and other processes move everything that is not nailed down."""

import random
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from softtdx.abi.ghci import VmcallLeaf
from softtdx.hw import preset
from softtdx.kvm import KvmError
from softtdx.kvm.hotplug import MEMORY_BLOCK
from softtdx.vmm import MachineConfig
from softtdx.vmm.boot import boot_host
from softtdx.vmm.python_guest import PythonGuest

PAGE = 4096
MIB = 1 << 20
HUGE = 2 * MIB
GUESTS, STEPS, ROUNDS = 6, 120, 40


@pytest.fixture(scope="module")
def house():
    return boot_host(replace(preset("spr"), packages=2, lps=4))


@pytest.fixture
def host(house):
    before = house.memory.free_pages
    yield house
    assert house.reap() == 0
    assert set(house.memory.tdx_pages()) == {"PAMT"}
    assert house.tdx.keyids_in_use == 0
    assert house.memory.free_pages == before
    assert house.mm.swap.used == 0
    assert not house.vms


class Guest:
    """A guest that keeps a book of what it wrote, in private and in shared memory."""

    def __init__(self, host, seed):
        self.rng, self.failure = random.Random(seed), None
        self.guest = PythonGuest(host, self.program, MachineConfig(memory=6 * MIB, vm=seed % 3 == 0))
        if seed % 2:
            mm = self.guest.machine.kvm.mm
            mm.madvise_hugepage(self.guest.machine.vm.memslots.find(0).userspace_addr)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def program(self, td):
        rng, shared, book = self.rng, set(), {}
        if td.is_td and td.accept(HUGE, 1) != 0:
            for page in range(HUGE, 2 * HUGE, PAGE):
                assert td.accept(page) == 0
        for _ in range(STEPS):
            page = HUGE + rng.randrange(512) * PAGE
            if td.is_td and rng.random() < 0.25:
                page = HUGE + rng.choice((3, 100, 511)) * PAGE
                to_shared = page not in shared
                bit = td.shared_bit if to_shared else 0
                assert td.tdvmcall(VmcallLeaf.MAP_GPA, page | bit, PAGE).r10 == 0
                shared ^= {page}
                book[page] = 0
                if not to_shared:
                    assert td.accept(page) == 0
            at = td.shared(page) if page in shared else page
            assert td.load(at) == book.get(page, 0)
            book[page] = rng.getrandbits(64)
            td.store(at, book[page])
        for page, value in book.items():
            assert td.load(td.shared(page) if page in shared else page) == value

    def run(self):
        try:
            self.guest.run()
        except BaseException as error:
            self.failure = error


def disturb(host, rng, done):
    """What a host does for itself. Every action may be refused; none may cost a guest anything."""
    for _ in range(ROUNDS):
        what = rng.choice(("swap", "swap", "tables", "khugepaged", "numa", "memory", "processor", "move"))
        with suppress(KvmError):
            if what == "swap":
                host.memory.reclaim(rng.randrange(1, 300))
            elif what == "tables":
                host.mm.shrink_page_tables(16)
            elif what == "khugepaged":
                host.mm.khugepaged.scan()
            elif what == "numa":
                host.mm.numa.scan(rng.randrange(1, 400))
            elif what == "memory":
                block = rng.randrange(1, 11) * MEMORY_BLOCK
                host.hotplug.offline_memory(block)
                host.hotplug.online_memory(block)
            elif what == "processor":
                index = rng.randrange(4)
                host.hotplug.cpu_down(index)
                host.hotplug.cpu_up(index)
            elif host.vms:
                vm = rng.choice(list(host.vms))
                vm.migrate_pages(HUGE, HUGE)
        done.append(what)


@pytest.mark.parametrize(
    "seed", [1, pytest.param(2, marks=pytest.mark.nightly), pytest.param(3, marks=pytest.mark.nightly)]
)
def test_nothing_that_the_host_does_with_memory_is_seen_by_a_guest(host, seed):
    guests = [Guest(host, seed * 100 + i) for i in range(GUESTS)]
    done: list[str] = []
    host_threads = [threading.Thread(target=disturb, args=(host, random.Random(seed * 7 + i), done)) for i in range(2)]
    for thread in (*(guest.thread for guest in guests), *host_threads):
        thread.start()
    for thread in (*(guest.thread for guest in guests), *host_threads):
        thread.join()
    for guest in guests:
        guest.guest.close()
    assert [guest.failure for guest in guests] == [None] * GUESTS
    assert len(done) == 2 * ROUNDS
    assert all(host.cpus.is_online(i) for i in range(4))
