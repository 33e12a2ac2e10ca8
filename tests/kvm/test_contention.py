"""A busy module: any SEAMCALL may say OPERAND_BUSY, as when another processor holds a lock, and nothing is lost."""

import random
from contextlib import contextmanager

import pytest
from td_build_steps import Build
from unwilling_module import asked_before

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.vmm import MachineConfig
from softtdx.vmm.python_guest import run_python_guest

PAGE = 4096
MIB = 1 << 20


@contextmanager
def busy(host, seed, share=0.5):
    """Every processor's SEAMCALLs fail by chance with OPERAND_BUSY, without being executed."""
    rng = random.Random(seed)
    refused = []

    def answer(_lp, leaf, _n):
        if rng.random() >= share:
            return None
        refused.append(SeamcallLeaf(leaf))
        return Status.OPERAND_BUSY | Operand.RCX

    with asked_before(host, answer):
        yield refused


@pytest.mark.parametrize("seed", range(5))
def test_a_build_and_a_teardown_get_through(host, seed):
    with busy(host, seed) as refused, Build(host) as build:
        build.do()
    assert len(set(refused)) > 6


@pytest.mark.parametrize("seed", range(3))
def test_a_running_td_that_converts_memory_gets_through(host, seed):
    def program(td):
        for page in range(0x4000, 0x8000, PAGE):
            assert td.accept(page) == 0
            td.store(page, page)
        for page in range(0x4000, 0x8000, PAGE):
            assert td.load(page) == page
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, page | td.shared_bit, PAGE).r10 == 0
            td.store(td.shared(page), 1)
            assert td.tdvmcall(VmcallLeaf.MAP_GPA, page, PAGE).r10 == 0
            assert td.accept(page) == 0
            assert td.load(page) == 0

    with busy(host, seed) as refused:
        run_python_guest(host, program, MachineConfig(memory=MIB))
    assert {"VP_ENTER", "MEM_PAGE_AUG"} <= {leaf.name for leaf in refused}


def test_interrupts_during_the_cache_write_back_are_resumed(host):
    with Build(host) as build:
        build.do()
        for lp in host.platform.lps:
            lp.interrupt()


def test_a_halted_vcpu_is_asked_for_interrupts_on_whichever_processor_is_free(host):
    with Build(host) as build:
        vcpu = build.do().vcpus[0]
        for lp in host.platform.lps:
            with host.cpus.run(lp.index) as here:
                assert here is lp
                assert not vcpu.ops.interrupt_waits()
