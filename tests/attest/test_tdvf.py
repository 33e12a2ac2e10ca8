"""Firmware images with TDX metadata, and the MRTD of a TD built of one."""

from __future__ import annotations

import json
import struct
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.kvm import TdxCommand
from softtdx.attest import MalformedError
from softtdx.attest.tdvf import SectionAttribute, SectionType, mrtd_of_firmware, sections
from softtdx.cli.measurement import measure
from softtdx.errors import SoftTdxError
from softtdx.kvm.uapi import TdxInitMemRegion
from softtdx.vmm import Machine, MachineConfig
from softtdx.vmm.boot import boot_host

SIZE = 0x6000
BASE = (1 << 32) - SIZE
METADATA = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
BFV = (0x2000, 0x4000, BASE + 0x2000, 0x4000, SectionType.BFV, SectionAttribute.MR_EXTEND)
CFV = (0, 0x2000, BASE, 0x2000, SectionType.CFV, 0)
HOB = (0, 0, 0x80_9000, 0x2000, SectionType.TD_HOB, 0)
STACK = (0, 0, 0x80_0000, 0x1000, SectionType.TEMP_MEM, 0)
AUG = (0, 0, 0x10_0000, 0x1000, SectionType.PERM_MEM, SectionAttribute.PAGE_AUG)


def entry(guid: bytes, data: bytes) -> bytes:
    return data + struct.pack("<H", len(data) + 18) + guid


def firmware(*found: tuple[int, ...], version: int = 1, magic: bytes = b"TDVF", count: int | None = None) -> bytes:
    """An image of 24 KiB with these sections; other entries stand around the one of TDX in its table."""
    body = b"".join(struct.pack("<IIQQII", *section) for section in found)
    head = magic + struct.pack("<III", 16 + len(body), version, len(found) if count is None else count)
    image = bytearray((bytes(range(256)) * (SIZE // 256))[:SIZE])
    image[0x5000 : 0x5000 + 16 + len(body)] = head + body
    table = entry(uuid.uuid4().bytes_le, b"before") + entry(METADATA, struct.pack("<I", SIZE - 0x5000))
    table += entry(uuid.uuid4().bytes_le, b"after it")
    table += struct.pack("<H", len(table) + 18) + FOOTER
    image[SIZE - 32 - len(table) : SIZE - 32] = table
    return bytes(image)


GOOD = firmware(BFV, CFV, STACK, HOB, AUG)


def test_the_sections_are_read_in_their_order() -> None:
    found = sections(GOOD)
    assert [section.type for section in found] == [0, 1, 3, 2, 4]
    assert (found[0].gpa, found[0].memory_size, found[0].attributes) == (BASE + 0x2000, 0x4000, 1)


class FirmwareMachine(Machine):
    """Builds its TD as a VMM builds it of a TDVF image: section by section, measured or not."""

    def load_firmware(self, image: bytes) -> None:
        self._add_memory(0, 0, self.config.memory)
        self._add_memory(1, BASE, SIZE)
        self._add_vcpu(0)
        for section in sections(image):
            if section.attributes & SectionAttribute.PAGE_AUG:
                continue
            data = image[section.data_offset : section.data_offset + section.data_size]
            hob = b"\xaa" * section.memory_size if section.type == SectionType.TD_HOB else b""
            self._add(section.gpa, (data or hob).ljust(section.memory_size, b"\0"), section.attributes)
        self.vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
        self._mrtd = self._read_mrtd()

    def _add(self, gpa: int, data: bytes, attributes: int) -> None:
        source = self.kvm.mm.mmap(len(data))
        self.kvm.mm.write(source, data)
        region = TdxInitMemRegion(source, gpa, len(data) // 4096, measure=bool(attributes & 1))
        self.vcpus[0].memory_encrypt_op(TdxCommand.INIT_MEM_REGION, region)


def test_the_mrtd_of_a_firmware_is_that_of_a_td_built_of_it(tmp_path: Path) -> None:
    with FirmwareMachine(boot_host(), MachineConfig(memory=16 << 20)) as machine:
        machine.load_firmware(GOOD)
        mrtd = machine.mrtd()
    assert mrtd_of_firmware(GOOD) == mrtd
    (tmp_path / "OVMF.fd").write_bytes(GOOD)
    result = CliRunner().invoke(measure, ["firmware", str(tmp_path / "OVMF.fd"), "--json"])
    found: dict[str, Any] = json.loads(result.output)
    assert mrtd is not None
    assert found["mrtd"] == mrtd.hex()
    assert [section["type"] for section in found["sections"]] == ["BFV", "CFV", "TEMP_MEM", "TD_HOB", "PERM_MEM"]


def test_what_is_measured_makes_a_difference_and_what_is_not_does_not() -> None:
    measured, unmeasured = bytearray(GOOD), bytearray(GOOD)
    measured[0x2000] ^= 1
    unmeasured[0x1000] ^= 1
    assert mrtd_of_firmware(bytes(measured)) != mrtd_of_firmware(GOOD)
    assert mrtd_of_firmware(bytes(unmeasured)) == mrtd_of_firmware(GOOD)
    assert mrtd_of_firmware(firmware(CFV, BFV, STACK, HOB, AUG)) != mrtd_of_firmware(GOOD)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "no table of GUIDs"),
        (bytes(4096), "no table of GUIDs"),
        (GOOD[:-1], "no table of GUIDs"),
        (GOOD.replace(METADATA, bytes(16)), "built without support"),
        (firmware(BFV, magic=b"TDVE"), "no TDVF descriptor"),
        (firmware(BFV, version=2), "no TDVF descriptor"),
        (firmware(BFV, count=2), "claims 2 sections"),
        (firmware(), "claims 0 sections"),
        (firmware((0, 0, 0x800, 0x1000, 3, 0)), "whole pages"),
        (firmware((0, 0, 0x1000, 0, 3, 0)), "no TD can give"),
        (firmware((0, 0, 0x1000, 1 << 40, 3, 0)), "no TD can give"),
        (firmware((0, 0, 1 << 60, 0x1000, 3, 0)), "no TD can give"),
        (firmware((0x5000, 0x2000, 0x1000, 0x2000, 0, 1)), "outside the image"),
        (firmware((0, 0x2000, 0x1000, 0x1000, 0, 1)), "more than it has memory"),
        (firmware((0, 0, 0x1000, 0x1000, 3, 8)), "attributes"),
    ],
)
def test_an_image_that_cannot_be_is_refused(image: bytes, words: str) -> None:
    with pytest.raises(MalformedError, match=words):
        mrtd_of_firmware(image)


@given(draw=st.data())
def test_any_damage_gives_sections_or_our_error(draw: st.DataObject) -> None:
    image = bytearray(GOOD)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.one_of(st.integers(0x5000, 0x50C0), st.integers(SIZE - 160, SIZE - 1)))
        image[at] = draw.draw(st.integers(0, 255))
    with suppress(SoftTdxError):
        assert len(sections(bytes(image))) <= 64
