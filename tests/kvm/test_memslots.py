"""Memory slots and the private attribute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.kvm import MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE
from softtdx.kvm.memslots import Memslot, Memslots, PrivateRanges

spans = st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda t: (t[0], t[0] + t[1]))


def slot(number, gpa, size, hva=0):
    return Memslot(number, MemorySlotFlag(0), gpa, size, hva)


@given(st.lists(st.tuples(spans, st.booleans()), max_size=25))
def test_private_ranges_behave_like_a_set_of_frames(steps):
    ranges, model = PrivateRanges(), set()
    for (start, end), private in steps:
        changed = ranges.set(start, end, MEMORY_ATTRIBUTE_PRIVATE if private else 0)
        frames = set(range(start, end))
        expected = frames - model if private else frames & model
        assert {f for s, e in changed for f in range(s, e)} == expected
        model = model | frames if private else model - frames
        for frame in range(60):
            assert ranges.is_private(frame) == (frame in model)
        for s, e in ((0, 60), (start, end), (10, 20)):
            assert ranges.all_private(s, e) == (set(range(s, e)) <= model)
            assert ranges.all_shared(s, e) == (not set(range(s, e)) & model)


def test_a_gpa_is_found_in_the_slot_that_contains_it():
    slots = Memslots(1 << 47)
    for number, gpa, size in ((0, 0, 8 * PAGE), (1, 16 * PAGE, PAGE), (2, 8 * PAGE, 4 * PAGE)):
        slots.check(slot(number, gpa, size))
        slots.put(slot(number, gpa, size))
    assert [s.slot for s in slots] == [0, 2, 1]
    assert slots.find(8 * PAGE - 1).slot == 0
    assert slots.find(8 * PAGE).slot == 2
    assert slots.find(12 * PAGE) is None
    slots.remove(2)
    assert slots.find(8 * PAGE) is None


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (slot(-1, 0x10_0000, PAGE), 22),
        (slot(512, 0x10_0000, PAGE), 22),
        (slot(1, 0x10_0001, PAGE), 22),
        (slot(1, 0x10_0000, PAGE + 1), 22),
        (slot(1, 0x10_0000, 0), 22),
        (slot(1, 0x10_0000, PAGE, hva=1), 22),
        (slot(1, -PAGE, PAGE), 22),
        (slot(1, 1 << 47, PAGE), 22),
        (slot(1, (1 << 47) - PAGE, 2 * PAGE), 22),
        (slot(1, 7 * PAGE, 2 * PAGE), 17),
    ],
)
def test_a_bad_slot_is_refused_with_the_kernels_errno(bad, code):
    slots = Memslots(1 << 47)
    slots.put(slot(0, 0, 8 * PAGE))
    with pytest.raises(KvmError) as error:
        slots.check(bad)
    assert error.value.errno == code
