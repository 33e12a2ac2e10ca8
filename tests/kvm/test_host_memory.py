"""The host's page allocator and the account of pages that TDX owns."""

from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx._silicon import Memory
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, PAGE_2M, HostMemory

MIB = 1 << 20


def host_memory(cmrs=((MIB, 31 * MIB),)):
    memory = Memory([(0, 64 * MIB)], keyid_bits=6, first_private_keyid=32)
    return HostMemory(SimpleNamespace(memory=memory, description=SimpleNamespace(cmrs=cmrs)))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60))
def test_no_page_is_handed_out_twice_and_none_is_lost(steps):
    memory = host_memory()
    held = {}
    for take, size in steps:
        if take or not held:
            with suppress(KvmError):
                held[memory.alloc(size)] = size
        else:
            pa = sorted(held)[size % len(held)]
            memory.free(pa, held.pop(pa))
        pages = [page for pa, n in held.items() for page in range(pa, pa + n * PAGE, PAGE)]
        assert len(pages) == len(set(pages))
        assert all(MIB <= page < 32 * MIB for page in pages)
        assert memory.free_pages == memory.total_pages - len(pages)
    for pa, size in held.items():
        memory.free(pa, size)
    assert memory.alloc(8 * MIB // PAGE, align=8 * MIB) % (8 * MIB) == 0


def test_blocks_merge_so_that_a_large_one_is_whole_again():
    memory = host_memory()
    pages = [memory.alloc() for _ in range(memory.total_pages)]
    with pytest.raises(KvmError, match="no 1 contiguous"):
        memory.alloc()
    for page in pages[::2] + pages[1::2]:
        memory.free(page)
    assert memory.alloc(PAGE_2M // PAGE, align=PAGE_2M) % PAGE_2M == 0


def test_a_page_that_tdx_owns_cannot_be_freed():
    memory = host_memory()
    page = memory.alloc()
    memory.give_to_tdx(page, "TDR")
    assert memory.tdx_pages() == {"TDR": 1}
    with pytest.raises(RuntimeError, match="TDR"):
        memory.free(page)
    memory.take_from_tdx(page)
    memory.free(page)
    assert not list(memory.leaked())


def test_zeroed_pages_are_zero_and_the_first_mebibyte_is_never_used():
    memory = host_memory(cmrs=((0, 2 * MIB),))
    page = memory.alloc()
    memory.write(page, b"\xa5" * PAGE)
    memory.free(page)
    assert memory.read(memory.alloc(zero=True), PAGE) == bytes(PAGE)
    assert page >= MIB


@given(
    st.lists(
        st.tuples(st.sampled_from(["give", "take", "free"]), st.integers(0, 2047), st.sampled_from([1, 3, 512, 600])),
        max_size=25,
    )
)
def test_what_tdx_owns_is_counted_page_by_page_however_it_came_and_goes(steps):
    memory = host_memory()
    block = memory.alloc(2048, align=8 * MIB)
    model = {}
    for number, (what, first, count) in enumerate(steps):
        if count == 512:
            first &= -512
        count = min(count, 2048 - first)
        pa, use = block + first * PAGE, f"use {number % 3}"
        pages = range(pa, pa + count * PAGE, PAGE)
        if what == "give" and model.keys().isdisjoint(pages):
            memory.give_to_tdx(pa, use, count)
            model.update(dict.fromkeys(pages, use))
        elif what == "take":
            memory.take_from_tdx(pa, count)
            for page in pages:
                model.pop(page, None)
        elif what == "free" and not model.keys().isdisjoint(pages):
            with pytest.raises(RuntimeError, match="while TDX owns it"):
                memory.free(pa, count)
        assert memory.is_tdx(pa, count) == (not model.keys().isdisjoint(pages))
        assert memory.is_tdx(pa) == (pa in model)
    assert memory.tdx_pages() == Counter(model.values())
    assert memory.leaked() == sorted(model)
