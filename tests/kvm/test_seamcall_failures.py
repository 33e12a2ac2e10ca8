"""Any SEAMCALL of a TD's life is interrupted, busy or refused: once, or every time. A TD may die; nothing is lost."""

import random
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from host_actions import run_hosted
from td_build_steps import Build

from softtdx.abi.ghci import VmcallLeaf
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.errors import SoftTdxError
from softtdx.hw import Platform, preset
from softtdx.kvm import Host, KvmError
from softtdx.kvm.memory import PAGE
from softtdx.seamldr import development_release
from softtdx.vmm.boot import boot_host
from softtdx.vmm.errors import GuestError

MIB = 1 << 20
HUGE = 2 * MIB


@contextmanager
def answering(host, answer):
    """Every SEAMCALL is first shown to `answer(leaf)`: a status that is given instead of executing it, or None."""
    seen = Counter()

    def wrap(real):
        def seamcall(regs):
            leaf = regs.rax & 0xFFFF
            if not regs.rax >> 63:
                seen[SeamcallLeaf(leaf)] += 1
                status = answer(SeamcallLeaf(leaf))
                if status is not None:
                    regs.rax = int(status)
                    return regs
            return real(regs)

        return seamcall

    for lp in host.platform.lps:
        lp.seamcall = wrap(lp.seamcall)
    try:
        yield seen
    finally:
        for lp in host.platform.lps:
            del lp.seamcall


class LostError(Exception):
    """The TD read something else than it wrote."""


def check(td):
    if td.load(HUGE) != 5:
        raise LostError


def life(td, vm, do):
    """What a TD and its host do to its memory: every leaf of KVM's is called."""
    assert td.accept(HUGE, 1) == 0
    td.store(HUGE, 5)
    part = HUGE + 3 * PAGE
    assert td.tdvmcall(VmcallLeaf.MAP_GPA, part | td.shared_bit, 2 * PAGE).r10 == 0
    td.store(td.shared(part), 1)
    assert td.tdvmcall(VmcallLeaf.MAP_GPA, part, 2 * PAGE).r10 == 0
    assert td.accept(part) == 0
    assert td.accept(part + PAGE) == 0
    td.tdvmcall(VmcallLeaf.CPUID, 0)
    do(lambda: vm.collapse(HUGE))
    do(lambda: vm.migrate_pages(HUGE, 8 * PAGE))
    do(lambda: vm.host.mm.numa.scan(64))
    check(td)
    do(vm.host.mm.khugepaged.scan)
    assert td.accept(4 * MIB) == 0
    do(lambda: vm.memslots.find(0).guest_memfd.punch_hole(4 * MIB, HUGE))
    do(lambda: vm.host.mm.shrink_page_tables(8))
    check(td)


@pytest.fixture(scope="module")
def machine():
    return boot_host(replace(preset("spr"), packages=2, lps=2))


@pytest.fixture
def two(machine):
    """The host, with two packages; afterwards nothing may be missing."""
    before = machine.memory.free_pages
    yield machine
    assert machine.reap() == 0
    assert set(machine.memory.tdx_pages()) == {"PAMT"}
    assert machine.tdx.keyids_in_use == 0
    assert machine.memory.free_pages == before
    assert not machine.vms


@pytest.fixture(scope="module")
def leaves(machine):
    """The leaves of that life, and how often each is called."""
    with answering(machine, lambda leaf: None) as seen:
        run_hosted(machine, life)
    return seen


LEAVES = [
    "MNG_CREATE", "MNG_KEY_CONFIG", "MNG_ADDCX", "MNG_INIT", "MNG_RD", "VP_CREATE", "VP_ADDCX", "VP_INIT",
    "VP_WR", "MEM_SEPT_ADD", "MEM_SEPT_RD", "MEM_SEPT_REMOVE", "MEM_PAGE_ADD", "MR_EXTEND", "MR_FINALIZE",
    "MEM_PAGE_AUG", "VP_ENTER", "MEM_RANGE_BLOCK", "MEM_RANGE_UNBLOCK", "MEM_TRACK", "MEM_PAGE_REMOVE",
    "MEM_PAGE_DEMOTE", "MEM_PAGE_PROMOTE", "MEM_PAGE_RELOCATE", "VP_FLUSH", "MNG_VPFLUSHDONE", "PHYMEM_CACHE_WB",
    "MNG_KEY_FREEID", "PHYMEM_PAGE_RECLAIM", "PHYMEM_PAGE_WBINVD",
]  # fmt: skip


def test_the_list_is_what_that_life_calls(leaves):
    assert {leaf.name for leaf in leaves} == set(LEAVES)


def tolerate():
    return suppress(KvmError, GuestError, SoftTdxError, AssertionError)


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("when", ["first", "in the middle", "last", "always"])
def test_a_leaf_that_is_refused_may_end_the_td_but_loses_nothing(two, leaves, name, when):
    leaf, count = SeamcallLeaf[name], leaves[SeamcallLeaf[name]]
    number = {"first": 1, "in the middle": count // 2 + 1, "last": count, "always": 0}[when]
    calls = Counter()

    def answer(which):
        calls[which] += 1
        hit = which is leaf and calls[which] >= number > 0 and calls["refused"] == 0
        if hit or (which is leaf and number == 0):
            calls["refused"] += 1
            return Status.OPERAND_INVALID | Operand.RCX
        return None

    with answering(two, answer), tolerate():
        run_hosted(two, life)
    assert calls["refused"] or when != "first"
    assert not two.vms
    # The module is itself again: what could not end does, and another TD lives.
    assert two.reap() == 0
    run_hosted(two, lambda td, vm, do: td.accept(0x9000))


@pytest.mark.parametrize("status", [Status.INTERRUPTED_RESUMABLE, Status.INTERRUPTED_RESTARTABLE, Status.OPERAND_BUSY])
@pytest.mark.parametrize("seed", range(2))
def test_a_td_lives_on_though_every_leaf_is_interrupted_or_busy_by_chance(two, status, seed):
    rng, answers = random.Random(seed), Counter()

    def answer(leaf):
        if rng.random() < 0.4:
            answers[leaf] += 1
            return status
        return None

    with answering(two, answer):
        run_hosted(two, life)
    assert len(answers) > 20


@pytest.mark.parametrize("steps", range(1, 8))
@pytest.mark.parametrize(
    "name", ["VP_FLUSH", "MNG_VPFLUSHDONE", "PHYMEM_CACHE_WB", "MNG_KEY_FREEID", "PHYMEM_PAGE_RECLAIM"]
)
def test_a_half_built_td_that_cannot_end_ends_later(two, name, steps):
    free, keyids = two.memory.free_pages, two.tdx.free_keyids
    build = Build(two)
    build.do(steps)
    leaf = SeamcallLeaf[name]
    with answering(two, lambda which: Status.OPERAND_INVALID if which is leaf else None) as seen, suppress(KvmError):
        build.close()
    build.kvm.mm.close()
    if seen[leaf]:
        assert two.memory.tdx_pages() != {"PAMT": two.memory.tdx_pages()["PAMT"]}
    with Build(two):  # the close of any VM tries again
        pass
    assert (two.memory.free_pages, two.tdx.free_keyids) == (free, keyids)


def test_taking_tdx_down_recovers_what_a_td_left():
    host = Host(Platform(preset("spr")))
    before = host.memory.free_pages
    host.enable_tdx(development_release())
    with answering(host, lambda leaf: Status.OPERAND_INVALID if leaf is SeamcallLeaf.PHYMEM_PAGE_RECLAIM else None):
        with Build(host).do():
            pass
        assert set(host.memory.tdx_pages()) > {"PAMT"}
        host.disable_tdx()
    assert not host.memory.tdx_pages()
    assert host.memory.free_pages == before
