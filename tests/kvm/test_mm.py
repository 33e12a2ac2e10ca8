"""User memory and guest_memfd, the two backings of a TD's memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_host_memory import host_memory

from softtdx.kvm.errors import KvmError
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.memory import PAGE, PAGE_2M
from softtdx.kvm.mm import AddressSpace


def test_memory_is_faulted_in_and_goes_back():
    memory = host_memory()
    mm = AddressSpace(memory)
    hva = mm.mmap(3 * PAGE)
    assert mm.read(hva + PAGE - 2, 4) == bytes(4)
    mm.write(hva + PAGE - 2, b"four")
    assert mm.read(hva + PAGE - 2, 4) == b"four"
    assert (mm.resident_pages(), memory.total_pages - memory.free_pages) == (2, 2)
    mm.discard(hva, PAGE)
    assert mm.read(hva + PAGE - 2, 4) == b"\0\0ur"
    mm.close()
    assert memory.free_pages == memory.total_pages


def test_a_mapping_larger_than_the_machine_costs_what_is_touched():
    memory = host_memory()
    mm = AddressSpace(memory)
    hva = mm.mmap(1 << 60)
    mm.write(hva + (1 << 59), b"x")
    mm.discard(hva, 1 << 60)
    assert mm.resident_pages() == 0
    mm.munmap(hva)
    for call in (lambda: mm.read(hva, 1), lambda: mm.munmap(hva), lambda: mm.mmap(0), lambda: mm.mmap(-1)):
        with pytest.raises(KvmError):
            call()


@given(
    st.lists(
        st.tuples(st.sampled_from(["page", "huge", "hole", "move"]), st.integers(0, 2047), st.integers(1, 600)),
        max_size=30,
    )
)
def test_a_guest_memfd_gives_each_index_one_page_and_forgets_holes(steps):
    memory = host_memory()
    file = GuestMemfd(memory, 2048 * PAGE)
    model = {}
    for what, index, count in steps:
        if what == "page":
            pa = file.get_page(index)
            assert model.setdefault(index, pa) == pa
        elif what == "huge":
            base = index // 512 * 512
            pa = file.get_huge_page(base)
            if pa is not None:
                assert pa % PAGE_2M == 0
                for i in range(512):
                    assert model.setdefault(base + i, pa + i * PAGE) == pa + i * PAGE
        elif what == "move" and index in model:
            new = memory.alloc()
            old = file.replace(index, new)
            assert old == model[index]
            memory.free(old)
            model[index] = new
        elif what == "hole":
            end = min(2048, index + count)
            file.punch_hole(index * PAGE, (end - index) * PAGE)
            model = {i: pa for i, pa in model.items() if not index <= i < end}
        assert len(set(model.values())) == len(model) == file.allocated_pages()
        assert memory.total_pages - memory.free_pages == len(model)
    file.close()
    assert memory.free_pages == memory.total_pages
