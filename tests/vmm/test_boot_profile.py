"""Where the instructions of a boot go: from sampled addresses to names."""

from hypothesis import given
from hypothesis import strategies as st

from softtdx.vmm.linux.profile import place_of_samples

KALLSYMS = b"""\
ffffffff81000000 T _text
ffffffff81000100 t first
ffffffff81000200 W second
ffffffff81000300 d not_code
ffffffffc0000000 t in_a_module\t[tsm]
"""


def test_an_address_belongs_to_the_function_that_starts_below_it():
    samples = [(0xFFFFFFFF81000100, 5), (0xFFFFFFFF810001FF, 2), (0xFFFFFFFF81000350, 3), (0xFFFFFFFFC0000010, 4)]
    assert place_of_samples(samples, KALLSYMS) == {"first": 7, "in_a_module": 4, "second": 3}


def test_low_addresses_are_the_firmwares_or_the_decompressors():
    samples = [(0xFFFF8000, 1), (0xFFFFFFFF, 2), (0x475_0000, 4), (1 << 32, 8)]
    assert place_of_samples(samples, KALLSYMS) == {"decompressor": 12, "firmware": 3}


def test_a_kernel_that_hides_its_addresses_is_one_place():
    hidden = b"0000000000000000 T _text\n0000000000000000 t first\n"
    assert place_of_samples([(0xFFFFFFFF81000100, 5), (0xFFFF800000000000, 2)], hidden) == {"kernel": 7}


def test_the_places_come_with_the_most_first():
    samples = [(0x1000, 1), (0xFFFFFFFF81000100, 9), (0xFFFF8000, 5)]
    assert list(place_of_samples(samples, KALLSYMS)) == ["first", "firmware", "decompressor"]


@given(
    kallsyms=st.one_of(st.binary(max_size=300), st.lists(st.sampled_from(KALLSYMS.split(b"\n"))).map(b"\n".join)),
    samples=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 2**40)), max_size=20),
)
def test_whatever_a_guest_writes_as_its_symbols_no_instruction_is_lost(kallsyms, samples):
    places = place_of_samples(samples, kallsyms)
    assert sum(places.values()) == sum(count for _, count in samples)
