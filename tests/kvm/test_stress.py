"""Eight TDs and four VMs on four processors, everything at once; a million operations in the nightly run.

Guests convert, load and store against a book of what must be there. Meanwhile the host moves their pages, merges and
splits them, pauses and kills; the module says busy, is interrupted, or fails.
"""

import random
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.hw import preset
from softtdx.kvm import KvmError
from softtdx.vmm import MachineConfig
from softtdx.vmm.boot import boot_host
from softtdx.vmm.errors import GuestError
from softtdx.vmm.python_guest import PythonGuest

PAGE = 4096
MIB = 1 << 20
HUGE = 2 * MIB
TDS, VMS = 8, 4
CONVERTED = (3, 100, 511)  # few, so that all 512 pages are private often enough to be merged
SIZES = frozenset({SeamcallLeaf.MEM_PAGE_PROMOTE, SeamcallLeaf.MEM_PAGE_DEMOTE})
OPTIONAL = frozenset({SeamcallLeaf.MEM_PAGE_RELOCATE, SeamcallLeaf.MEM_PAGE_PROMOTE})
MEMORY = frozenset(leaf for leaf in SeamcallLeaf if leaf.name.startswith("MEM_"))


@pytest.fixture(scope="module")
def four_processors():
    return boot_host(replace(preset("spr"), lps=4))


@pytest.fixture
def machine_room(four_processors):
    """The host; afterwards nothing may be missing."""
    host = four_processors
    before = host.memory.free_pages
    yield host
    assert set(host.memory.tdx_pages()) == {"PAMT"}
    assert host.tdx.free_keyids == len(host.platform.description.private_keyids) - 1
    assert host.memory.free_pages == before
    assert not host.vms
    assert not host.platform.escapes


@contextmanager
def unwilling_module(host, seed, *, failing=frozenset(), failures=0.0):
    """SEAMCALLs are by chance busy, interrupted where the leaf can be, or, those of `failing`, refused."""
    rng, answers = random.Random(seed), Counter()

    def wrap(lp, real):
        def seamcall(regs):
            number = regs.rax & 0xFFFF
            if not regs.rax >> 63:
                status = None
                chance = rng.random()
                if number in failing and chance < failures:
                    status = Status.OPERAND_INVALID | Operand.RCX
                elif chance < 0.04:
                    status = Status.OPERAND_BUSY | Operand.RCX
                elif chance < 0.2 and number in SIZES:
                    status = int(Status.INTERRUPTED_RESTARTABLE)
                elif chance < 0.5 and number == SeamcallLeaf.PHYMEM_CACHE_WB:
                    lp.interrupt()  # the module itself must stop, or it would not know where to go on
                    answers["interrupted"] += 1
                if status is not None:
                    answers[status >> 32] += 1
                    regs.rax = status
                    return regs
            return real(regs)

        return seamcall

    for lp in host.platform.lps:
        lp.seamcall = wrap(lp, lp.seamcall)
    try:
        yield answers
    finally:
        for lp in host.platform.lps:
            del lp.seamcall


class Guest:
    """One machine, the book that its program keeps, and what the host does to it meanwhile."""

    def __init__(self, room, seed, steps, *, vm, count):
        self.rng = random.Random(seed)
        self.steps, self.vm, self.count = steps, vm, count
        self.machine_guest = PythonGuest(room, self.program, MachineConfig(memory=6 * MIB, vm=vm))
        self.failure = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.host_thread = threading.Thread(target=self._host, args=(random.Random(seed + 1000),), daemon=True)

    def program(self, td):
        rng, shared, word = self.rng, {}, {}
        if td.is_td:
            self.accept_all(td)
        for _ in range(self.steps):
            self.count["guest"] += 1
            gpa = HUGE + rng.randrange(512) * PAGE
            if td.is_td and rng.random() < 0.3:
                gpa = HUGE + rng.choice(CONVERTED) * PAGE
                pages = rng.choice((1, 1, 2))
                end = min(gpa + pages * PAGE, 2 * HUGE)
                to_shared = not shared.get(gpa, False)
                bit = td.shared_bit if to_shared else 0
                assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa | bit, end - gpa).r10 == 0
                for page in range(gpa, end, PAGE):
                    if shared.get(page, False) != to_shared:
                        shared[page], word[page] = to_shared, 0
                        if not to_shared:
                            assert td.accept(page) == 0
                self.count["conversions"] += 1
            address = td.shared(gpa) if shared.get(gpa) else gpa
            assert td.load(address) == word.get(gpa, 0)
            word[gpa] = rng.getrandbits(64)
            td.store(address, word[gpa])
        for page, value in word.items():
            assert td.load(td.shared(page) if shared.get(page) else page) == value

    def accept_all(self, td):
        """As a guest must: the host may have split the page before it was accepted."""
        if td.accept(HUGE, 1) == 0:
            return
        for page in range(HUGE, 2 * HUGE, PAGE):
            assert td.accept(page) == 0

    def _run(self):
        try:
            self.machine_guest.run()
        except BaseException as error:
            self.failure = error
        finally:
            self.over.set()

    def _host(self, rng):
        vm = self.machine_guest.machine.vm
        while not self.over.wait(0.002):
            gpa = HUGE + rng.randrange(512) * PAGE
            what = rng.choice(("pause", "collapse", "move", "move"))
            self.count[what] += 1
            try:
                if what == "pause" or self.vm:
                    vm.vcpus[0].kick()
                elif what == "collapse":
                    self.count["collapsed"] += vm.collapse(HUGE)
                else:
                    whole = rng.random() < 0.1
                    vm.migrate_pages(HUGE if whole else gpa, HUGE if whole else PAGE * min(8, (2 * HUGE - gpa) // PAGE))
            except KvmError:
                self.count["refused"] += 1

    def start(self):
        self.thread.start()
        self.host_thread.start()

    def join(self):
        self.thread.join()
        self.host_thread.join()
        self.machine_guest.close()


def campaign(room, seed, steps, *, kill=0):
    """All guests at once; `kill` of them are stopped in the middle. Returns what was done and what failed."""
    count = Counter()
    guests = [Guest(room, seed * 100 + i, steps, vm=i >= TDS, count=count) for i in range(TDS + VMS)]
    for guest in guests:
        guest.start()
    for guest in guests[:kill]:
        guest.over.wait(0.05)
        guest.machine_guest.machine.stop()
    for guest in guests:
        guest.join()
    return count, [guest.failure for guest in guests if guest.failure is not None]


def test_everything_at_once_with_a_busy_module_that_cannot_always_move_or_merge(machine_room):
    with unwilling_module(machine_room, 1, failing=OPTIONAL, failures=0.0005) as answers:
        count, failures = campaign(machine_room, seed=1, steps=250)
    assert not failures, failures[0]
    assert min(count[what] for what in ("guest", "conversions", "pause", "collapse", "move")) > 0
    assert len(answers) >= 3  # busy, interrupted, refused


def test_guests_that_are_killed_in_the_middle_leave_nothing(machine_room):
    _, failures = campaign(machine_room, seed=2, steps=400, kill=10)
    assert not failures, failures[0]


def test_whatever_fails_below_guests_may_die_and_nothing_is_lost(machine_room):
    with unwilling_module(machine_room, 3, failing=MEMORY, failures=0.01):
        _, failures = campaign(machine_room, seed=3, steps=150)
    assert not [failure for failure in failures if not isinstance(failure, GuestError)]


@pytest.mark.nightly
def test_a_million_operations(machine_room):
    done, seed = 0, 10
    while done < 1_000_000:
        with unwilling_module(machine_room, seed, failing=OPTIONAL, failures=0.0005):
            count, failures = campaign(machine_room, seed, steps=2000, kill=seed % 4)
        assert not failures, (seed, failures[0])
        done += sum(count.values())
        seed += 1
