"""The fault model, and what a probe on the memory bus sees."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from softtdx.cli.attack import dram as command
from softtdx.errors import SoftTdxError
from softtdx.hw import DramError, Platform, preset
from softtdx.hw.faults import MachineCheck

AT, SIZE = 0x100_0000, 4096
PRIVATE = 40


@pytest.fixture(scope="module")
def platform():
    platform = Platform(replace(preset("spr"), lps=1))
    platform.memory.set_key(PRIVATE)
    return platform


@pytest.fixture
def keyed(platform):
    """The address of a page under a private KeyID, freshly written."""
    address = platform.description.keyed(AT, PRIVATE)
    platform.memory.write(address, bytes(range(256)) * 32, seam=True)
    return address


def survives(platform, keyed, offset=0, size=SIZE):
    try:
        return platform.memory.read(keyed + offset, size, seam=True) == (bytes(range(256)) * 32)[offset : offset + size]
    except MachineCheck:
        return None


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flip_is_detected_when_the_line_is_read_and_two_equal_flips_are_none(platform, data):
    address = platform.description.keyed(AT, PRIVATE)
    platform.memory.write(address, bytes(range(256)) * 32, seam=True)
    bits = data.draw(st.sets(st.integers(0, 8 * SIZE - 1), min_size=1, max_size=8))
    platform.dram.flip_bits(AT, bits)
    platform.dram.flip_bits(AT, bits)
    assert survives(platform, address)
    platform.dram.flip_bits(AT, bits)
    hit = {bit // 512 for bit in bits}
    for line in range(SIZE // 64):
        assert survives(platform, address, 64 * line, 64) is (None if line in hit else True)


def test_a_spliced_line_is_detected_and_a_replayed_one_is_not(platform, keyed):
    old = platform.dram.record(AT)
    platform.memory.write(keyed, bytes(64), seam=True)
    platform.dram.replay(old)
    assert survives(platform, keyed)
    platform.dram.splice(AT, AT + 64)
    assert survives(platform, keyed, 64, 64) is None


def test_swapped_twice_is_as_before(platform, keyed):
    platform.dram.swap(AT, AT + 2048, 512)
    platform.dram.swap(AT, AT + 2048, 512)
    assert survives(platform, keyed)


def test_a_glitch_is_the_same_for_the_same_seed(platform, keyed):
    first = platform.dram.glitch(AT, SIZE, flips=5, seed=3)
    assert platform.dram.glitch(AT, SIZE, flips=5, seed=3) == first
    assert len(first) == 5
    assert survives(platform, keyed)  # flipped back
    assert platform.dram.glitch(AT, SIZE, flips=5, seed=4) != first


@pytest.mark.parametrize(
    "act",
    [
        lambda dram: dram.read(1 << 45, 64),
        lambda dram: dram.read(AT, -1),
        lambda dram: dram.line(-64),
        lambda dram: dram.write(0x8000_0000 - 1, b"ab"),
        lambda dram: dram.flip_bits(AT, [-1]),
        lambda dram: dram.flip_bits(AT, [1 << 60]),
        lambda dram: dram.record(AT + 1),
        lambda dram: dram.record(AT, 0),
        lambda dram: dram.splice(AT, AT + 32),
        lambda dram: dram.swap(AT, AT + 64, 128),
        lambda dram: dram.replay(dram.record(AT), at=1 << 50),
        lambda dram: dram.glitch(AT, 64, flips=513),
        lambda dram: dram.glitch(AT, 64, flips=-1),
    ],
)
def test_what_is_no_dram_or_no_line_is_refused(platform, act):
    with pytest.raises(DramError):
        act(platform.dram)


def test_an_empty_fault_changes_nothing(platform, keyed):
    platform.dram.flip_bits(AT, [])
    platform.dram.replay([])
    platform.dram.glitch(AT, SIZE, flips=0)
    assert survives(platform, keyed)


def dump(*options):
    result = CliRunner().invoke(command, ["dump", "--json", *options], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def test_the_probe_sees_noise_of_a_td_and_the_host_zeroes():
    raw, loaded = dump("--raw"), dump()
    assert raw["address"] == loaded["address"]
    assert not any(bytes.fromhex(loaded["data"]))
    assert len(set(bytes.fromhex(raw["data"]))) > 64
    assert all(line["td_owner"] for line in raw["lines"])


def test_without_encryption_the_probe_sees_a_vms_code():
    loaded = dump("--vm")
    assert any(bytes.fromhex(loaded["data"]))
    assert dump("--vm", "--raw")["data"] != loaded["data"]
    assert dump("--vm", "--raw", "--no-encryption")["data"] == loaded["data"]
    assert not any(line["td_owner"] for line in loaded["lines"])


@pytest.mark.parametrize(
    "options",
    [
        ["--range", "5..3"],
        ["--range", "x"],
        ["--range", "0..0x100000000"],
        ["--range", "0x800000000..0x800000100"],
        ["--guest", "0xfff..0x1001"],
        ["--guest", "0x90000000..0x90000010"],
        ["--range", "0..64", "--guest", "0..64"],
        ["--no-encryption"],
    ],
)
def test_a_bad_dump_is_refused(options):
    with pytest.raises(SoftTdxError):
        dump(*options)
