"""TDH.MR.EXTEND chunk by chunk: what happens in between is noticed."""

import hashlib

import pytest
from tdx_machine import PAGE, Leaf, Td

from softtdx.abi.status import Operand, Status

CONTENT = bytes(range(256)) * 16


@pytest.fixture
def building(machine):
    td = Td.create(machine)
    td.add_path(0)
    td.add_page(0, CONTENT)
    return td


def extend(td: Td, gpa: int, lp: int = 0) -> int:
    return td.machine.call(Leaf.MR_EXTEND, lp=lp, rcx=gpa, rdx=td.tdr).rax


def mrtd(td: Td) -> bytes:
    td.finalize()
    fields = (td.machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=0x1310_0003_0000_0000 | n).r8 for n in range(6))
    return b"".join(value.to_bytes(8, "little") for value in fields)


def record(name: bytes, gpa: int) -> bytes:
    return name.ljust(16, b"\0") + gpa.to_bytes(8, "little") + bytes(104)


def test_chunks_in_any_order_and_from_any_processor(building):
    expected = hashlib.sha384(record(b"MEM.PAGE.ADD", 0))
    order = [0, 256, 512, 512, 0xF00, 0x100, 0x200]
    for number, gpa in enumerate(order):
        assert extend(building, gpa, lp=number % 3 == 2) == 0
        expected.update(record(b"MR.EXTEND", gpa) + CONTENT[gpa : gpa + 256])
    assert mrtd(building) == expected.digest()


@pytest.mark.parametrize("lp", [0, 1])
def test_a_page_that_is_gone_since_the_last_chunk_is_not_measured(building, lp):
    assert extend(building, 0) == extend(building, 256) == 0
    building.machine.ok(Leaf.MEM_RANGE_BLOCK, lp=lp, rcx=0, rdx=building.tdr)
    assert extend(building, 512) == Status.EPT_ENTRY_NOT_PRESENT | Operand.RCX


def test_a_td_that_is_busy_since_the_last_chunk_is_busy(building):
    assert extend(building, 0) == extend(building, 256) == 0
    building.machine.module.g.locks.acquire(building.tdr, False)
    assert extend(building, 512) == Status.OPERAND_BUSY | Operand.RDX
    building.machine.module.g.locks.release(building.tdr, False)
    assert extend(building, 512) == 0


@pytest.mark.parametrize("gpa", [1, 128, 0x2FF, PAGE | 1])
def test_a_chunk_is_aligned(building, gpa):
    assert extend(building, 0) == 0
    assert extend(building, gpa) == Status.OPERAND_INVALID | Operand.RCX


def test_two_tds_measured_in_turn_do_not_mix(machine, building):
    other = Td.create(machine)
    other.add_path(0)
    other.add_page(0, bytes(PAGE))
    for gpa in range(0, PAGE, 256):
        assert extend(building, gpa) == extend(other, gpa) == 0
    digests = []
    for content in (CONTENT, bytes(PAGE)):
        expected = hashlib.sha384(record(b"MEM.PAGE.ADD", 0))
        for gpa in range(0, PAGE, 256):
            expected.update(record(b"MR.EXTEND", gpa) + content[gpa : gpa + 256])
        digests.append(expected.digest())
    assert [mrtd(building), mrtd(other)] == digests


def test_what_another_processor_does_elsewhere_does_not_send_a_measurement_back_to_the_beginning(machine, building):
    other = Td.create(machine)
    other.add_path(0)
    other.add_page(0, bytes(PAGE))
    walks = count_walks(machine)
    for gpa in range(0, PAGE, 256):
        assert extend(building, gpa) == 0
        assert extend(other, gpa, lp=1) == 0
    assert walks() == 2


@pytest.mark.parametrize("lp", [0, 1])
def test_what_any_processor_does_to_the_td_is_looked_at_again(machine, building, lp):
    walks = count_walks(machine)
    assert extend(building, 0) == extend(building, 256) == 0
    assert walks() == 1
    machine.ok(Leaf.MNG_RD, lp=lp, rcx=building.tdr, rdx=0x1310_0003_0000_0000)
    assert extend(building, 512) == extend(building, 768) == 0
    assert walks() == 2


def count_walks(machine):
    """How many walks down an S-EPT the module made since."""
    made = []
    for n in (0, 1):
        cpu = machine.platform.lps[n]._seam_cpu
        walk = cpu.walk_ept

        def counted(*operands, walk=walk):
            made.append(operands)
            return walk(*operands)

        cpu.walk_ept = counted
    return lambda: len(made)
