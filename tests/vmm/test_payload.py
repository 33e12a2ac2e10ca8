"""Payloads: what is taken, and that bad files are refused with a reason."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx._silicon import PAYLOADS
from softtdx.vmm.errors import MachineError, PayloadError
from softtdx.vmm.launcher import FIRMWARE_SIZE, firmware_image, lay_out
from softtdx.vmm.payload import FLAT_ADDRESS, load_payload, parse_payload

MIB = 1 << 20


def elf(
    segments=((0x20_0000, b"\xf4", 0x1000, 5),),
    entry=0x20_0000,
    machine=62,
    kind=2,
    elf_class=2,
    first_type=1,
    phentsize=56,
):
    table, at = b"", 64 + 56 * len(segments)
    blobs = b""
    for i, (address, data, size, flags) in enumerate(segments):
        p_type = first_type if i == 0 else 1
        table += struct.pack("<IIQQQQQQ", p_type, flags, at + len(blobs), address, address, len(data), size, 1)
        blobs += data
    ident = b"\x7fELF" + bytes([elf_class, 1, 1]) + bytes(9)
    head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, phentsize, len(segments), 0, 0, 0)
    return ident + head + table + blobs


def test_an_elf_program_is_taken_apart_into_its_segments():
    payload = parse_payload(elf(((0x30_0000, b"data", 64, 6), (0x20_0000, b"code", 4, 5)), entry=0x20_0002))
    assert [(s.address, s.data, s.size) for s in payload.segments] == [
        (0x20_0000, b"code", 4),
        (0x30_0000, b"data", 64),
    ]
    assert payload.entry == 0x20_0002


def test_anything_else_is_a_flat_binary_at_one_mebibyte():
    payload = parse_payload(b"\x90\xf4")
    assert payload.entry == FLAT_ADDRESS
    assert payload.segments[0].data == b"\x90\xf4"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"\x7fELF", "cut off"),
        (elf()[:100], "cut off"),
        (elf(elf_class=1), "not a 64-bit"),
        (elf(machine=183), "AArch64"),
        (elf(machine=3), "i386"),
        (elf(kind=3), "-no-pie"),
        (elf(kind=1), "link it first"),
        (elf(segments=()), "no program headers"),
        (elf(phentsize=32), "wrong size"),
        (elf(first_type=3), "dynamically linked"),
        (elf(first_type=4), "no segment"),
        (elf(((0x20_0000, b"1234", 2, 5),)), "more bytes in the file"),
        (elf(((0x20_0000, b"1", 0x1000, 5), (0x20_0800, b"2", 16, 5))), "overlap"),
        (elf(entry=0x30_0000), "entry point"),
        (elf(((0x20_0000, b"1", 0x1000, 6),)), "entry point"),
        (elf(((1 << 60, b"1", 0x1000, 5),), entry=1 << 60), "above any"),
        (elf(((0, b"1", (1 << 64) - 1, 5),), entry=0), "above any"),
    ],
)
def test_a_bad_payload_is_refused_in_one_clear_line(data, why):
    with pytest.raises(PayloadError, match=why) as error:
        parse_payload(data, "p")
    assert "\n" not in str(error.value)


@given(st.binary(max_size=300), st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_no_file_makes_the_loader_do_anything_but_load_or_refuse(tail, at, patch):
    for data in (tail, elf()[:at] + patch + elf()[at + len(patch) :], b"\x7fELF\x02\x01" + tail):
        with contextlib.suppress(PayloadError, MachineError):
            lay_out(parse_payload(data), 4 * MIB, 1)


def test_missing_folders_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(PayloadError, match="No such file"):
        load_payload(tmp_path / "nothing")
    with pytest.raises(PayloadError, match="folder"):
        load_payload(tmp_path)


def test_a_payload_must_fit_and_leave_the_launchers_areas_alone():
    payload = parse_payload(elf(((0x20_0000, b"\xf4", 2 * MIB, 5),)))
    with pytest.raises(MachineError, match="--memory"):
        lay_out(payload, 3 * MIB, 1)
    with pytest.raises(MachineError, match="overlaps the stack"):
        lay_out(payload, 4 * MIB, 1)
    with pytest.raises(MachineError, match="too little"):
        lay_out(parse_payload(b"\xf4"), 256 << 10, 1)
    with pytest.raises(MachineError, match="3 GiB"):
        lay_out(payload, 4 << 30, 1)
    assert lay_out(payload, 8 * MIB, 4).entry == 0x20_0000


def test_the_boot_info_tells_the_launcher_of_every_byte_of_memory_once():
    payload = parse_payload(elf(((0x20_0000, b"x" * 5000, 0x8000, 5), (0x30_0010, b"y", 1, 6))))
    layout = lay_out(payload, 8 * MIB, 2)
    ranges = layout.ranges()
    assert [r[0] for r in ranges[1:]] == [base + size for base, size, _ in ranges[:-1]]
    assert ranges[0][0] == 0
    assert sum(size for _, size, _ in ranges) == 8 * MIB
    assert [(base, size) for base, size, kind in ranges if kind == 1] == [(0x20_0000, 0x2000), (0x30_0000, 0x1000)]
    image = firmware_image(layout)
    assert len(image) == FIRMWARE_SIZE
    magic, vcpus, entry, _, _, count = struct.unpack_from("<6Q", image)
    assert (magic.to_bytes(8, "little"), vcpus, entry, count) == (b"SOFTTDX1", 2, 0x20_0000, len(ranges))
    assert image[0x7FF0] == 0xE9  # the reset vector is a jump


def test_the_programs_that_ship_can_be_loaded():
    payload = parse_payload(PAYLOADS["demo"], "demo")
    assert lay_out(payload, 16 * MIB, 1).present
    assert len(PAYLOADS["launcher"]) == FIRMWARE_SIZE
