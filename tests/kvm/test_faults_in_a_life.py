"""A TD's whole life, and at every kind of SEAMCALL in it the module is busy, or fails: nothing is lost.

A module that refuses at the end and does no more later gives back what it kept (Host.reap).
"""

import threading
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from td_build_steps import Build
from unwilling_module import asked_before

from softtdx.abi.kvm import KvmExit, TdxCommand
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Operand, Status
from softtdx.kvm import KvmError
from softtdx.kvm.memory import PAGE
from softtdx.kvm.uapi import TdxInitMemRegion

EIO, EFAULT, EBUSY, EINVAL = 5, 14, 16, 22
BUSY = Status.OPERAND_BUSY | Operand.RCX
FAILED = Status.OPERAND_INVALID | Operand.RCX


class Life(Build):
    """Build, run until the vCPU needs user space, take memory away, close: each step as user space does it."""

    def run(self):
        self.vcpus[0].kvm_run.immediate_exit = 0
        self.reasons = [self.vcpus[0].run().exit_reason]

    def shrink(self):
        self.file.punch_hole(0, PAGE)

    def live(self):
        """Whatever fails, the next steps are tried: so does user space that does not look."""
        errors = []
        for step in (*self.steps, Life.run, Life.shrink):
            try:
                step(self)
            except KvmError as error:
                errors.append(error)
                if error.errno == EIO and self.vm.dead:
                    break
            except (AttributeError, IndexError):
                break  # what an earlier step should have made
        try:
            self.close()
        except KvmError as error:
            errors.append(error)
            self.kvm.mm.close()
        return errors


def everything_is_back(host, free):
    assert host.reap() == 0
    assert set(host.memory.tdx_pages()) == {"PAMT"}
    assert host.tdx.free_keyids == len(host.platform.description.private_keyids) - 1
    assert host.memory.free_pages == free
    assert not host.vms


@pytest.fixture(scope="module")
def leaves(booted_host):
    """How often each leaf is called in a life that goes well."""
    with asked_before(booted_host, lambda _lp, _leaf, _n: None) as counts:
        assert Life(booted_host).live() == []
    return dict(counts)


def test_a_life_uses_these_leaves(leaves):
    names = {Leaf(number).name for number in leaves}
    assert {
        "MNG_CREATE", "MNG_KEY_CONFIG", "MNG_ADDCX", "MNG_INIT", "VP_CREATE", "VP_ADDCX", "VP_INIT", "VP_WR",
        "MEM_SEPT_ADD", "MEM_PAGE_ADD", "MR_EXTEND", "MR_FINALIZE", "VP_ENTER", "MEM_RANGE_BLOCK", "MEM_TRACK",
        "MEM_PAGE_REMOVE", "VP_FLUSH", "MNG_VPFLUSHDONE", "PHYMEM_CACHE_WB", "MNG_KEY_FREEID",
        "PHYMEM_PAGE_RECLAIM", "PHYMEM_PAGE_WBINVD",
    } <= names  # fmt: skip


def test_every_leaf_is_busy_for_a_while_and_user_space_notices_nothing(host, leaves):
    free = host.memory.free_pages
    for number in leaves:
        with asked_before(host, lambda _lp, leaf, n, number=number: BUSY if leaf == number and n % 4 else None):
            assert Life(host).live() == [], Leaf(number)
        everything_is_back(host, free)


def test_a_leaf_that_never_works_again_costs_nothing_once_it_does(host, leaves):
    free = host.memory.free_pages
    for number in leaves:
        with asked_before(host, lambda _lp, leaf, _n, number=number: FAILED if leaf == number else None):
            Life(host).live()
        everything_is_back(host, free)


def test_a_module_that_fails_at_the_end_is_asked_again_when_the_next_td_ends(host):
    used = host.tdx.free_keyids
    with asked_before(host, lambda _lp, leaf, _n: FAILED if leaf == Leaf.MNG_KEY_FREEID else None):
        errors = Life(host).live()
        assert [error.errno for error in errors] == [EIO]
        assert host.tdx.free_keyids == used - 1
        with pytest.raises(KvmError) as error:
            host.disable_tdx()  # a TD still has a KeyID
        assert error.value.errno == EBUSY
    Build(host).do(1).close()
    assert host.tdx.free_keyids == used


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(1, 400), st.sampled_from([BUSY, FAILED])), max_size=12))
def test_any_seamcalls_of_a_life_may_be_refused(host, plan):
    free, refused, calls = host.memory.free_pages, dict(plan), iter(range(1, 1 << 30))
    with asked_before(host, lambda _lp, _leaf, _n: refused.get(next(calls))):
        Life(host).live()
    everything_is_back(host, free)


@pytest.mark.parametrize("steps", range(len(Life.steps) + 2))
def test_the_thread_of_a_vmm_dies_in_the_middle_of_a_build(host, steps):
    """It has done so many steps, and no other thread knows how many; what closes its files finds a TD in any state."""
    free, build = host.memory.free_pages, Life(host)

    def work():
        for step in (*build.steps, Life.run)[:steps]:
            step(build)
        if steps == 5:  # in the middle of an ioctl: its second source page is gone
            source = build.kvm.mm.mmap(PAGE)
            with suppress(KvmError):
                build.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, TdxInitMemRegion(source, 0, 2))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    build.close()
    everything_is_back(host, free)


def test_a_region_that_fails_in_the_middle_says_how_far_it_came(host):
    with Build(host).do(5) as build:
        source = build.kvm.mm.mmap(PAGE)
        region = TdxInitMemRegion(source, 0, 2)
        with pytest.raises(KvmError) as error:
            build.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, region)
        assert error.value.errno == EFAULT
        assert (region.source_addr, region.gpa, region.nr_pages) == (source + PAGE, PAGE, 1)


def test_a_vcpu_that_cannot_be_entered_says_so_and_the_td_can_go_on(host):
    life = Life(host)
    life.do()
    with asked_before(host, lambda _lp, leaf, _n: FAILED if leaf == Leaf.VP_ENTER else None):
        life.run()
    assert life.reasons == [KvmExit.FAIL_ENTRY]
    assert life.vcpus[0].kvm_run.fail_entry.hardware_entry_failure_reason == FAILED
    life.run()
    assert life.reasons == [KvmExit.MEMORY_FAULT]  # its reset vector has no memory: it was entered
    life.close()
