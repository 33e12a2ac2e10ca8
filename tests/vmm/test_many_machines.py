"""Several TDs and VMs at once, more vCPUs than processors, converting memory back and forth."""

import random
import threading

import pytest

from softtdx.abi.ghci import VmcallLeaf
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import PythonGuest

PAGE = 4096
PAGES_EACH = 6
MIB = 1 << 20


def program(seed, steps):
    """A vCPU that works on pages of its own and keeps book of what must be in them."""

    def run(td):
        rng = random.Random(seed * 100 + td.vcpu)
        base = 0x2_0000 + td.vcpu * PAGES_EACH * PAGE
        pages = [base + i * PAGE for i in range(PAGES_EACH)]
        word = dict.fromkeys(pages, 0)
        shared = dict.fromkeys(pages, False)
        if td.is_td:
            for gpa in pages:
                assert td.accept(gpa) == 0
        for _ in range(steps):
            gpa = rng.choice(pages)
            if td.is_td and rng.random() < 0.4:
                shared[gpa] = not shared[gpa]
                bit = td.shared_bit if shared[gpa] else 0
                assert td.tdvmcall(VmcallLeaf.MAP_GPA, gpa | bit, PAGE).r10 == 0
                if not shared[gpa]:
                    assert td.accept(gpa) == 0
                word[gpa] = 0
            address = td.shared(gpa) if shared[gpa] else gpa
            assert td.load(address) == word[gpa]
            word[gpa] = rng.getrandbits(64)
            td.store(address, word[gpa])
        for gpa in pages:
            assert td.load(td.shared(gpa) if shared[gpa] else gpa) == word[gpa]

    return run


def run_together(host, machines, vcpus, steps):
    failures = []

    def one(seed, vm):
        try:
            with PythonGuest(host, [program(seed, steps)] * vcpus, MachineConfig(memory=MIB, vm=vm)) as guest:
                guest.run()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=(i, i % 4 == 3)) for i in range(machines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_four_machines_of_two_vcpus_convert_memory_at_once(host):
    run_together(host, machines=4, vcpus=2, steps=25)


@pytest.mark.nightly
def test_eight_tds_and_four_vms_for_a_long_time(host):
    for _ in range(50):
        run_together(host, machines=12, vcpus=3, steps=400)
