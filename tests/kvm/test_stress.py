"""Eight TDs and four VMs on four processors, everything at once; a million operations in the nightly run.

Guests convert, load and store against a book of what must be there, and have their host plug memory in and out.
Meanwhile the host moves their pages, merges and splits them, pauses and kills; the module says busy, is interrupted,
or fails. How much is done is fixed, only the order is not.
"""

import random
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from host_actions import PORT, HostedMachine
from unwilling_module import unwilling_module

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.kvm import MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag
from softtdx.abi.leaves import SeamcallLeaf
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
PLUG_SLOT, PLUG, PLUG_PAGES = 9, 1 << 30, 16
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


class Plug:
    """Memory that user space adds to a running guest and takes away again."""

    def __init__(self, machine):
        self.vm, self.mm, self.private = machine.vm, machine.kvm.mm, not machine.config.vm

    def insert(self):
        size, file, flags = PLUG_PAGES * PAGE, None, 0
        self.hva = self.mm.mmap(size)
        if self.private:
            file, flags = self.vm.create_guest_memfd(size), MemorySlotFlag.GUEST_MEMFD
        self.vm.set_user_memory_region2(PLUG_SLOT, PLUG, size, self.hva, flags, file)
        if self.private:
            self.vm.set_memory_attributes(PLUG, size, MEMORY_ATTRIBUTE_PRIVATE)
        self.file = file

    def remove(self):
        self.vm.set_user_memory_region2(PLUG_SLOT, PLUG, 0, self.hva)
        if self.private:
            self.file.punch_hole(0, PLUG_PAGES * PAGE)
        self.mm.munmap(self.hva)


class Guest:
    """One machine, the book that its program keeps, and what the host does to it meanwhile."""

    def __init__(self, room, seed, steps, host_steps, *, vm):
        self.rng = random.Random(seed)
        self.steps, self.host_steps, self.vm, self.done = steps, host_steps, vm, Counter()
        self.machine = HostedMachine(room, MachineConfig(memory=6 * MIB, vm=vm))
        self.guest = PythonGuest(room, self.program, machine=self.machine)
        self.plug = Plug(self.machine)
        self.failure = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.host_done = Counter()
        self.host_thread = threading.Thread(target=self._host, args=(random.Random(seed + 1000),), daemon=True)

    # --- the guest's program
    def program(self, td):
        self.shared, self.word = {}, {}
        if td.is_td:
            self.accept_all(td)
        for _ in range(self.steps):
            self.done["steps"] += 1
            chance = self.rng.random()
            if chance < 0.03:
                self.plug_and_unplug(td)
            elif td.is_td and chance < 0.05:
                self.make_whole(td)
            elif td.is_td and chance < 0.3:
                self.convert(td, HUGE + self.rng.choice(CONVERTED) * PAGE, self.rng.choice((1, 1, 2)))
            gpa = HUGE + self.rng.randrange(512) * PAGE
            address = td.shared(gpa) if self.shared.get(gpa) else gpa
            assert td.load(address) == self.word.get(gpa, 0)
            self.word[gpa] = self.rng.getrandbits(64)
            td.store(address, self.word[gpa])
        for gpa, value in self.word.items():
            assert td.load(td.shared(gpa) if self.shared.get(gpa) else gpa) == value

    def accept_all(self, td):
        """As a guest must: the host may have split the page before it was accepted."""
        if td.accept(HUGE, 1) == 0:
            return
        for page in range(HUGE, 2 * HUGE, PAGE):
            assert td.accept(page) == 0

    def convert(self, td, gpa, pages):
        end = min(gpa + pages * PAGE, 2 * HUGE)
        to_shared = not self.shared.get(gpa, False)
        bit = td.shared_bit if to_shared else 0
        assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa | bit, end - gpa).r10 == 0
        for page in range(gpa, end, PAGE):
            if self.shared.get(page, False) != to_shared:
                self.shared[page], self.word[page] = to_shared, 0
                if not to_shared:
                    assert td.accept(page) == 0
        self.done["conversions"] += 1

    def make_whole(self, td):
        """Everything private again, so that the host can merge it."""
        for gpa in [gpa for gpa, is_shared in self.shared.items() if is_shared]:
            if self.shared[gpa]:
                self.convert(td, gpa, 1)
        self.ask(td, self.merge)
        self.done["merges asked for"] += 1

    def merge(self):
        with suppress(KvmError):  # the module would not
            self.machine.vm.collapse(HUGE)

    def plug_and_unplug(self, td):
        self.ask(td, self.plug.insert)
        for page in self.rng.sample(range(PLUG_PAGES), 3):
            gpa, value = PLUG + page * PAGE, self.rng.getrandbits(64)
            if td.is_td:
                assert td.accept(gpa) == 0
            assert td.load(gpa) == 0
            td.store(gpa, value)
            assert td.load(gpa) == value
        self.ask(td, self.plug.remove)
        self.done["plugs"] += 1

    def ask(self, td, action):
        """Have the host do something now."""
        self.machine.action, self.machine.error = action, None
        if td.is_td:
            td.tdvmcall(VmcallLeaf.IO, 1, 1, PORT, 0)
        else:
            td.outb(PORT, 0)
        if self.machine.error is not None:
            raise self.machine.error

    # --- what happens to it
    def _run(self):
        try:
            self.guest.run()
        except BaseException as error:
            self.failure = error
        finally:
            self.over.set()

    def _host(self, rng):
        vm = self.machine.vm
        for _ in range(self.host_steps):
            gpa = rng.choice((HUGE, HUGE, HUGE, PLUG)) + rng.randrange(PLUG_PAGES) * PAGE * 32 % HUGE
            what = "pause" if self.vm else rng.choice(("pause", "collapse", "move", "move"))
            self.host_done[what] += 1
            try:
                if what == "pause":
                    vm.vcpus[0].kick()
                elif what == "collapse":
                    vm.collapse(HUGE)
                elif rng.random() < 0.1:
                    vm.migrate_pages(HUGE, HUGE)
                else:
                    vm.migrate_pages(gpa, 8 * PAGE)
            except KvmError:
                self.host_done["refused"] += 1
            self.over.wait(0.001)

    def start(self):
        self.thread.start()
        self.host_thread.start()

    def join(self):
        self.thread.join()
        self.host_thread.join()
        stats = self.machine.vm.stats
        self.done.update(self.host_done)
        self.seen = Counter({key: stats[key] for key in ("promotions", "pages relocated", "conversions")})
        self.guest.close()


def campaign(room, seed, steps, host_steps, *, kill=0):
    """All guests at once; `kill` of them are stopped in the middle. Returns what was done, and what failed."""
    guests = [Guest(room, seed * 100 + i, steps, host_steps, vm=i >= TDS) for i in range(TDS + VMS)]
    for guest in guests:
        guest.start()
    for guest in guests[:kill]:
        guest.over.wait(0.05)
        guest.machine.stop()
    for guest in guests:
        guest.join()
    done = sum((guest.done for guest in guests), Counter())
    seen = sum((guest.seen for guest in guests), Counter())
    return done, seen, [guest.failure for guest in guests if guest.failure is not None]


def test_everything_at_once_with_a_busy_module_that_cannot_always_move_or_merge(machine_room):
    steps, host_steps = 150, 40
    with unwilling_module(machine_room, failing=OPTIONAL, fail_every=400) as answers:
        done, seen, failures = campaign(machine_room, 1, steps, host_steps)
    assert not failures, failures[0]
    assert done["steps"] == (TDS + VMS) * steps
    assert done["pause"] + done["collapse"] + done["move"] == (TDS + VMS) * host_steps
    assert min(done[what] for what in ("conversions", "plugs", "merges asked for")) > 0
    assert seen["conversions"] > done["conversions"]  # and those that plugging means
    assert answers["busy"] > 0
    assert answers["interrupted"] > 0


def test_guests_that_are_killed_in_the_middle_leave_nothing(machine_room):
    _, _, failures = campaign(machine_room, 2, steps=200, host_steps=40, kill=10)
    assert not failures, failures[0]


def test_whatever_fails_below_guests_may_die_and_nothing_is_lost(machine_room):
    with unwilling_module(machine_room, failing=MEMORY, fail_every=100) as answers:
        _, _, failures = campaign(machine_room, 3, steps=100, host_steps=40)
    assert not [failure for failure in failures if not isinstance(failure, (GuestError, KvmError))]
    assert answers["refused"] > 0


@pytest.mark.nightly
def test_a_million_operations(machine_room):
    total, seen, seed = Counter(), Counter(), 10
    while sum(total.values()) < 1_000_000:
        with unwilling_module(machine_room, failing=OPTIONAL, fail_every=2000) as answers:
            done, what, failures = campaign(machine_room, seed, steps=2000, host_steps=500, kill=seed % 4)
        assert not failures, (seed, failures[0])
        total, seen, seed = total + done, seen + what + answers, seed + 1
        print(f"{sum(total.values())} operations: {dict(total)}; pages {dict(seen)}", flush=True)
    assert min(seen[what] for what in ("promotions", "MEM_PAGE_DEMOTE", "busy", "restarted", "refused")) > 0
