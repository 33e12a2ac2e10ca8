"""The host's own extended page tables, against a model of 4 KiB pages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_host_memory import host_memory

from softtdx.abi import sept
from softtdx.kvm.ept import Ept
from softtdx.kvm.memory import PAGE, PAGE_2M

PAGES = 3 * 512
BASE = 1 << 30  # physical: nothing is loaded from or stored to what is mapped

steps = st.lists(
    st.tuples(
        st.sampled_from(["map", "map read-only", "map large", "unmap", "protect", "writable", "split", "tables"]),
        st.integers(0, PAGES - 1),
        st.integers(1, 700),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(steps, st.sampled_from([0, 1 << 47]))
def test_an_ept_behaves_like_a_table_of_small_pages(actions, shared_bit):
    memory = host_memory()
    ept = Ept(memory, levels=4, shared_bit=shared_bit)
    model, large = {}, set()  # page -> (physical, writable); numbers of 2 MiB parts that one leaf maps
    for what, page, count in actions:
        end = min(PAGES, page + count)
        if what in ("map", "map read-only"):
            writable = what == "map"
            ept.map(page * PAGE, BASE + page * PAGE, writable=writable)
            model[page] = BASE + page * PAGE, writable
            large.discard(page // 512)
        elif what == "map large":
            part = page // 512
            if ept.map(part * PAGE_2M, BASE + 8 * PAGE_2M + part * PAGE_2M, level=1):
                ept.free_replaced()
            model |= {part * 512 + i: (BASE + 8 * PAGE_2M + (part * 512 + i) * PAGE, True) for i in range(512)}
            large.add(part)
        elif what == "unmap":
            gone = set(range(page, end))
            for part in [p for p in large if gone & set(range(p * 512, p * 512 + 512))]:
                gone |= set(range(part * 512, part * 512 + 512))
                large.remove(part)
            assert ept.unmap(page * PAGE, end * PAGE) == bool(gone & model.keys())
            model = {p: v for p, v in model.items() if p not in gone}
        elif what == "protect":
            touched = set(range(page, end))
            for part in [p for p in large if touched & set(range(p * 512, p * 512 + 512))]:
                touched |= set(range(part * 512, part * 512 + 512))
            had = any(model[p][1] for p in touched & model.keys())
            assert ept.write_protect(page * PAGE, end * PAGE) == had
            model = {p: (pa, w and p not in touched) for p, (pa, w) in model.items()}
        elif what == "writable" and page in model:
            ept.make_writable(page * PAGE, small=True)
            large.discard(page // 512)
            model[page] = model[page][0], True
        elif what == "split":
            parts = {p for p in large if p * 512 < end and page < p * 512 + 512}
            assert ept.split(page * PAGE, end * PAGE) == len(parts)
            large -= parts
        elif what == "tables":
            ept.drop_empty_tables()
            ept.free_replaced()
        assert ept.mapped == len(model)
        assert ept.large[1] == len(large)
    for page in range(PAGES):
        leaf = ept.find(page * PAGE)
        assert (ept.lookup(page * PAGE), leaf and leaf.writable) == model.get(page, (None, None))
        assert leaf is None or leaf.level == (page // 512 in large)
    windows = [p for start in range(0, PAGES, 32) for p in ept.absent(start * PAGE, (start + 32) * PAGE)]
    assert windows == [page * PAGE for page in range(PAGES) if page not in model]
    ept.unmap(0, PAGES * PAGE)
    ept.drop_empty_tables()
    ept.free_replaced()
    assert ept.table_pages == 1
    ept.free()
    assert memory.free_pages == memory.total_pages


def test_a_gigabyte_is_one_leaf_and_can_be_taken_apart():
    memory = host_memory()
    ept = Ept(memory, levels=4)
    ept.map(1 << 30, 1 << 30, level=2)
    assert ept.find((1 << 30) + 5 * PAGE) == (1 << 30, 2, True, False)
    assert ept.lookup((1 << 30) + 5 * PAGE) == (1 << 30) + 5 * PAGE
    ept.make_writable((1 << 30) + PAGE_2M, small=True)
    assert ept.large == [512, 511, 0]
    assert ept.mapped == 1 << 18
    assert ept.find((1 << 30) + PAGE_2M).level == 0
    assert ept.map(1 << 30, 1 << 31, level=2)  # over all its tables
    ept.free_replaced()
    assert (ept.mapped, ept.large, ept.lookup(1 << 30)) == (1 << 18, [0, 0, 1], 1 << 31)
    ept.free()
    assert memory.free_pages == memory.total_pages


def test_the_processors_accessed_bit_is_read_and_cleared_in_an_ordinary_vms_table():
    memory = host_memory()
    ept = Ept(memory, levels=4)
    ept.map(0, BASE)
    assert ept.eptp & 1 << 6
    assert not ept.age(0, PAGE, clear=True)
    at = ept._entry_address(0, 0)
    memory.wr64(at, memory.rd64(at) | sept.A | sept.D)
    assert ept.age(0, PAGE, clear=False)
    assert ept.age(0, 64 * PAGE, clear=True)
    assert not ept.age(0, 64 * PAGE, clear=True)
    assert memory.rd64(at) & sept.D


@pytest.mark.parametrize("level", [0, 1])
def test_a_tds_table_has_no_accessed_bits_and_watches_by_absence(level):
    ept = Ept(host_memory(), levels=4, shared_bit=1 << 47)
    ept.map(0, BASE, level=level)
    assert not ept.eptp & 1 << 6
    assert ept.age(0, PAGE, clear=True)
    assert not ept.age(0, PAGE, clear=True)
    assert ept.find(0) == (BASE, level, True, True)
    _, entry, _ = ept._walk(1 << 47)
    assert (entry & 7, entry >> 63) == (0, 1)  # not present, and #VE suppressed: the access exits
    ept.restore(0)
    assert ept.find(0) == (BASE, level, True, False)
    assert ept.age(0, PAGE, clear=False)
    ept.age(0, PAGE, clear=True)
    assert ept.unmap(0, PAGE)
    assert ept.mapped == 0
