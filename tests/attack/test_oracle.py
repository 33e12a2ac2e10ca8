"""The oracle is sound and not blind: a good machine passes, and each kind of contradiction is seen."""

import random
import struct

import pytest

from softtdx.abi import sept
from softtdx.abi.opstate import LifecycleState, OpState
from softtdx.abi.structs import PageType
from softtdx.attack.fuzz.world import PAGE, Stage, World
from softtdx.attack.oracle import BrokenInvariantError
from softtdx.module import tdcs, tdr

_READ_ALL = 8  # checks until plaintext is looked for


@pytest.fixture
def world():
    world = World(random.Random(1), Stage.POPULATED, dynamic_pamt=False)
    world.check()
    return world


def running_td(world):
    """A TD that runs, and its memory's first page."""
    views = world.oracle.check(world.ranges).values()
    return next(view for view in views if view.op_state is OpState.RUNNABLE)


def poke(world, pa, hkid, value, size=8):
    key = world.oracle.state.keyed(pa, hkid)
    world.platform.memory.write(key, value.to_bytes(size, "little"), seam=True)


def peek(world, pa, hkid, size=8):
    return int.from_bytes(world.platform.memory.read(world.oracle.state.keyed(pa, hkid), size, seam=True), "little")


def last_table(world, td):
    """The S-EPT page that maps the first 2 MiB."""
    return td.entries[0, 1][1]


def pamt_entry(world, pa):
    block = world.oracle.state.blocks[0]
    return (block.e4k & ~world.oracle.state.hkid_mask) + (pa >> 12) * 16


def lock(world, td):
    world.oracle.state.locks.acquire(0x1000, True)


def gone(world, td):
    world.platform.seam.unbreakable_shutdown(to_loader=False)


def plaintext(world, td):
    page = world.numbers["page"][0]
    world.platform.memory.write(page, world.secrets[0].to_bytes(8, "little") * 512)


def freed_but_mapped(world, td):
    poke(world, pamt_entry(world, td.entries[0, 0][1]), world.oracle.state.hkid, 0)


def of_another_td(world, td):
    other = next(pa for pa, (_, kind, _) in world.oracle.owned(world.ranges).items() if kind == PageType.TDR != td.pa)
    other = next(pa for pa in world.numbers["tdr"] if pa not in (td.pa, other))
    value = PageType.REG << 16 | other >> 12 << 24
    poke(world, pamt_entry(world, td.entries[0, 0][1]), world.oracle.state.hkid, value)


def of_nobody(world, td):
    value = PageType.REG << 16 | world.numbers["page"][3] >> 12 << 24
    poke(world, pamt_entry(world, td.entries[0, 0][1]), world.oracle.state.hkid, value)


def mapped_twice(world, td):
    table = last_table(world, td)
    poke(world, table + 8, td.hkid, peek(world, table, td.hkid))


def entry_locked(world, td):
    table = last_table(world, td)
    poke(world, table, td.hkid, peek(world, table, td.hkid) | sept.TDEL)


def entry_without_permissions(world, td):
    table = last_table(world, td)
    poke(world, table, td.hkid, peek(world, table, td.hkid) & ~sept.RWX)


def one_child_more(world, td):
    poke(world, td.pa + tdr.CHLDCNT, world.oracle.state.hkid, td.children + 1)


def life_goes_back(world, td):
    poke(world, td.pa + tdr.LIFECYCLE_STATE, world.oracle.state.hkid, LifecycleState.HKID_ASSIGNED, 4)


def op_state_goes_back(world, td):
    poke(world, td.tdcx[0] + tdcs.OP_STATE, td.hkid, OpState.INITIALIZED, 4)


def becomes_debug(world, td):
    poke(world, td.tdcx[0] + tdcs.ATTRIBUTES, td.hkid, peek(world, td.tdcx[0] + tdcs.ATTRIBUTES, td.hkid) ^ 1)


def measured_anew(world, td):
    poke(world, td.tdcx[0] + tdcs.MRTD, td.hkid, 1)


def somebody_is_inside(world, td):
    poke(world, td.tdcx[0] + tdcs.REFCOUNT, td.hkid, 1, 2)


def key_of_two(world, td):
    poke(world, td.pa + tdr.HKID, world.oracle.state.hkid, td.hkid + 1, 2)


def key_of_nobody(world, td):
    state = world.oracle.state
    state.kot[60] = state.kot[td.hkid]


def poisoned(world, td):
    world.platform.memory.write(td.pa, b"a host's store")


def look_at_all(world):
    for _ in range(_READ_ALL):
        world.check()


DEFECTS = (
    lock, gone, plaintext, freed_but_mapped, of_another_td, of_nobody, mapped_twice, entry_locked,
    entry_without_permissions, one_child_more, life_goes_back, op_state_goes_back, becomes_debug, measured_anew,
    somebody_is_inside, key_of_two, key_of_nobody, poisoned,
)  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_contradiction_is_seen(world, defect):
    td = running_td(world)
    defect(world, td)
    with pytest.raises(BrokenInvariantError):
        look_at_all(world)


def test_a_fatal_td_may_have_died_within_an_epoch(world):
    td = running_td(world)
    somebody_is_inside(world, td)
    poke(world, td.pa + tdr.FATAL, world.oracle.state.hkid, 1, 1)
    world.check()


def test_pages_that_dynamic_pamt_does_not_count_are_seen():
    world = World(random.Random(1), Stage.POPULATED, dynamic_pamt=True)
    world.check()
    state = world.oracle.state
    entry = (state.blocks[0].e2m & ~state.hkid_mask) + (world.ranges[0] >> 21) * 16 + 8
    poke(world, entry, state.hkid, peek(world, entry, state.hkid) + 1)
    with pytest.raises(BrokenInvariantError, match="counts"):
        world.check()


def test_a_fingerprint_tells_what_changed(world):
    td = running_td(world)
    before = world.oracle.fingerprint(world.ranges)
    assert world.oracle.fingerprint(world.ranges) == before
    table = last_table(world, td)
    marked = peek(world, table, td.hkid) | sept.HP
    poke(world, table, td.hkid, marked)
    assert world.oracle.fingerprint(world.ranges) == before, "a host-priority mark is no change"
    poke(world, table + 8 * 9, td.hkid, sept.make_leaf(world.numbers["page"][0], sept.SeptState.PENDING, permissions=0))
    assert world.oracle.fingerprint(world.ranges) != before


def test_what_the_pamt_says_of_a_page_is_read_one_by_one_and_in_bulk(world):
    owned = world.oracle.owned(world.ranges)
    pages = [base + n * PAGE for base in world.ranges for n in range(512)]
    assert {pa for pa in pages if world.oracle.pamt(pa)[1] not in (PageType.NDA, PageType.RSVD)} == set(owned)
    assert all(world.oracle.pamt(pa) == entry for pa, entry in owned.items())


def test_every_state_of_a_td_is_there(world):
    views = world.oracle.check(world.ranges).values()
    assert {view.lifecycle for view in views} == set(LifecycleState)
    assert {None, OpState.UNINITIALIZED, OpState.INITIALIZED, OpState.RUNNABLE} == {view.op_state for view in views}
    debug = {view.identity[0] & 1 for view in views if view.op_state is OpState.RUNNABLE}
    assert debug == {0, 1}
    assert struct.pack("<Q", world.secrets[0]) != struct.pack("<Q", world.secrets[1])
