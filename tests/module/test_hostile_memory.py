"""A host that changes the module's structures in DRAM, on a machine whose memory has no integrity protection."""

from dataclasses import replace

import pytest
import tdx_machine
from hypothesis import given, settings
from hypothesis import strategies as st
from tdx_machine import MIB2, PAGE, SOURCE, Leaf, Machine, Td

from softtdx.hw import Platform, preset
from softtdx.hw.faults import VmFail

LEAVES = [
    Leaf.MEM_PAGE_ADD, Leaf.MEM_SEPT_ADD, Leaf.MEM_PAGE_RELOCATE, Leaf.MEM_PAGE_AUG, Leaf.MEM_RANGE_BLOCK, Leaf.MEM_RD,
    Leaf.MEM_WR, Leaf.MEM_PAGE_DEMOTE, Leaf.MR_EXTEND, Leaf.MEM_PAGE_PROMOTE, Leaf.MEM_SEPT_RD, Leaf.MEM_PAGE_REMOVE,
    Leaf.MEM_SEPT_REMOVE, Leaf.MEM_TRACK, Leaf.MEM_RANGE_UNBLOCK,
]  # fmt: skip


class Unprotected(Machine):
    """A machine with encryption only: what the host writes, the module reads as noise."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        original = tdx_machine.Platform
        tdx_machine.Platform = lambda _: Platform(replace(preset("spr"), integrity="none", seed=seed))
        try:
            super().__init__()
        finally:
            tdx_machine.Platform = original


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 1 << 32))
def test_noise_in_a_structure_ends_in_a_status_or_in_the_end_of_the_module(data, seed):
    machine = Unprotected(seed)
    td = Td.create(machine)
    td.add_path(0)
    td.add_page(0, b"content")
    td.aug(PAGE)
    td.aug(2 * MIB2, 1)
    block = machine.module.g.blocks[0]
    pamt = (block.e4k & (1 << 46) - 1) + (td.tdr >> 8)
    targets = [td.tdr, *td.tdcx, *td.tables.values(), pamt & -PAGE]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(targets)) + data.draw(st.sampled_from([0, 0, 0, *range(0, PAGE, 64)]))
        machine.host_write(at, data.draw(st.binary(min_size=64, max_size=64)))
    try:
        for _ in range(12):
            leaf = data.draw(st.sampled_from(LEAVES))
            info = data.draw(st.sampled_from([0, PAGE, 2 * PAGE, 1, 2, 3, 2 * MIB2 | 1, 2 * MIB2 + PAGE]))
            operands = {"rcx": info, "rdx": td.tdr, "r8": machine.page(), "r9": SOURCE}
            if leaf is Leaf.MEM_TRACK:
                operands["rcx"] = td.tdr
            machine.call(leaf, **operands)
    except VmFail:
        assert machine.platform.seam.module is None


@pytest.mark.parametrize(
    "entry",
    [0x2, 0x6, 0x82, 0x86, 0xF, 0x17, 0x27, 0x47, 0xB7 | 0x20_1000, 0x97, 0x9F, 0xBF],
)
def test_a_walk_that_ends_at_an_entry_no_processor_would_use_is_the_end_of_the_module(entry):
    machine = Machine()
    td = Td.create(machine)
    td.add_path(0)
    place = td.tables[0, 2] | td.hkid << machine.module.g.hkid_shift  # its first entry leads to the 4 KiB entries
    machine.platform.memory.write(place, entry.to_bytes(8, "little"), seam=True)
    with pytest.raises(VmFail, match=f"misconfigured at GPA 0x0, level 1: {entry:#x}"):
        machine.call(Leaf.MEM_SEPT_RD, rcx=0, rdx=td.tdr)
    assert machine.platform.seam.module is None
