import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.wire import LayoutError, Wire, array, bits, part, raw, uint, uints
from softtdx.errors import SoftTdxError


class Inner(Wire, size=4):
    low = uint(0, 2)  # bytes 2 and 3 are reserved


class Outer(Wire, size=64):
    tag = uint(0, 1)
    flags = uint(4, 4)
    on = bits(flags, 0)
    level = bits(flags, 1, 3)
    blob = raw(8, 8)
    inner = part(16, Inner)
    list = array(20, Inner, 3)
    words = uints(32, 8, 2)
    odd = uint(48, 5)


def test_fields_lie_where_the_class_says():
    outer = Outer(bytes(range(64)))
    assert outer.tag == 0
    assert outer.flags == 0x07060504
    assert outer.blob == bytes(range(8, 16))
    assert outer.inner.low == 0x1110
    assert [item.low for item in outer.list] == [0x1514, 0x1918, 0x1D1C]
    assert outer.words == (0x2726252423222120, 0x2F2E2D2C2B2A2928)
    assert outer.odd == 0x3433323130


def test_a_structure_is_a_view_over_the_buffer_it_is_given():
    memory = bytearray(256)
    outer = Outer(memory, 100)
    outer.flags = 0xDEADBEEF
    outer.inner.low = 7
    outer.list[2].low = 9
    assert memory[104:108] == b"\xef\xbe\xad\xde"
    assert (memory[116], memory[128]) == (7, 9)
    memory[100] = 5
    assert outer.tag == 5


def test_parsing_copies():
    data = bytearray(64)
    outer = Outer.parse(data)
    data[0] = 1
    assert outer.tag == 0
    outer.tag = 2
    assert data[0] == 1


def test_given_bytes_cannot_be_written():
    with pytest.raises(TypeError):
        Outer(bytes(64)).tag = 1


@given(st.integers(0, 7), st.integers(0, 1), st.integers(0, (1 << 32) - 1))
def test_bits_change_only_themselves(level, on, flags):
    outer = Outer()
    outer.flags = flags
    outer.level, outer.on = level, on
    assert (outer.level, outer.on) == (level, on)
    assert outer.flags & ~0xF == flags & ~0xF


@given(st.binary(min_size=64, max_size=64))
def test_any_bytes_of_the_right_size_survive_a_round_trip(data):
    outer = Outer.parse(data, strict=False)
    assert bytes(outer) == data
    again = Outer()
    for name in ("tag", "flags", "blob", "inner", "words", "odd"):
        setattr(again, name, getattr(outer, name))
    assert (again.tag, again.flags, again.blob, again.words, again.odd) == (
        outer.tag,
        outer.flags,
        outer.blob,
        outer.words,
        outer.odd,
    )
    assert repr(outer)
    assert set(outer.as_dict()) == {field.name for field in Outer.fields}


@given(st.binary(min_size=64, max_size=64))
def test_strict_parsing_refuses_exactly_the_structures_with_reserved_bytes_set(data):
    claimed = {0, *range(4, 18), 20, 21, 24, 25, 28, 29, *range(32, 53)}
    clean = not any(byte for offset, byte in enumerate(data) if offset not in claimed)
    assert Outer.parse(data, strict=False).reserved_is_zero() == clean
    if clean:
        Outer.parse(data)
    else:
        with pytest.raises(LayoutError, match="reserved byte"):
            Outer.parse(data)


def test_reserved_ranges_are_what_no_field_claims():
    assert Outer.reserved() == ((1, 3), (53, 11))
    assert Inner.reserved() == ((2, 2),)


@pytest.mark.parametrize("size", [0, 1, 63, 65, 4096])
def test_parsing_takes_exactly_the_size(size):
    with pytest.raises(SoftTdxError, match=f"Outer has 64 bytes, not {size}"):
        Outer.parse(bytes(size))


@pytest.mark.parametrize(("length", "at"), [(63, 0), (64, 1), (64, -1), (0, 0)])
def test_a_view_must_fit_its_buffer(length, at):
    with pytest.raises(LayoutError, match="takes 64 bytes"):
        Outer(bytearray(length), at)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tag", 256),
        ("tag", -1),
        ("flags", 1 << 32),
        ("odd", 1 << 40),
        ("level", 8),
        ("level", -1),
        ("on", 2),
        ("blob", b"short"),
        ("blob", bytes(9)),
        ("words", (1,)),
        ("words", (1, 2, 3)),
        ("words", (1, 1 << 64)),
        ("inner", bytes(3)),
    ],
)
def test_a_value_that_does_not_fit_is_refused_and_changes_nothing(name, value):
    outer = Outer()
    with pytest.raises(LayoutError, match=f"Outer.{name}"):
        setattr(outer, name, value)
    assert bytes(outer) == bytes(64)


def test_structures_are_equal_when_type_and_bytes_are():
    assert Inner(b"\1\0\0\0") == Inner(bytearray(b"\1\0\0\0"))
    assert Inner(b"\1\0\0\0") != Inner(b"\2\0\0\0")
    assert Inner(b"\1\0\0\0") != b"\1\0\0\0"
    with pytest.raises(TypeError):
        hash(Inner())


def test_overlaps_and_overruns_are_refused_when_the_class_is_made():
    with pytest.raises(TypeError, match="overlaps"):

        class Overlap(Wire, size=8):
            one = uint(0, 4)
            two = uint(3, 4)

    with pytest.raises(TypeError, match="overruns"):

        class Overrun(Wire, size=8):
            one = uint(6, 4)

    with pytest.raises(TypeError, match="integer field of 9 bytes"):
        uint(0, 9)
    with pytest.raises(TypeError, match="bits"):
        bits(uint(0, 1), 6, 3)
