"""TDVF: firmware images that say for themselves how a TD is built of them.

Intel "TDX Virtual Firmware Design Guide", section 11, and QEMU's use of it: an OVMF image ends in a table of GUIDs; one
entry leads to a descriptor of sections, each with its place in memory and whether it is measured. KVM adds the pages of
each section in turn, and extends MRTD with those that are to be measured.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from softtdx.attest.errors import MalformedError
from softtdx.attest.measure import PAGE, Region, mrtd_of
from softtdx.attest.wire import Layout, Reader, raw, uint

__all__ = ["Section", "SectionAttribute", "SectionType", "mrtd_of_firmware", "sections"]

TABLE_FOOTER = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
TDX_METADATA_OFFSET = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
FOOTER_FROM_END = 48
GUID_SIZE, LENGTH_SIZE = 16, 2
ENTRY_TAIL = GUID_SIZE + LENGTH_SIZE
MAX_SECTIONS = 64
MAX_SECTION = 256 << 20
MAX_GPA = 1 << 52


class SectionType(IntEnum):
    """What a section is."""

    BFV = 0
    CFV = 1
    TD_HOB = 2
    TEMP_MEM = 3
    PERM_MEM = 4
    PAYLOAD = 5
    PAYLOAD_PARAM = 6


class SectionAttribute(IntFlag):
    """How a section gets into the TD."""

    MR_EXTEND = 1 << 0
    PAGE_AUG = 1 << 1


KNOWN_ATTRIBUTES = int(SectionAttribute.MR_EXTEND | SectionAttribute.PAGE_AUG)


@dataclass(frozen=True)
class Descriptor(Layout):
    """TDX_METADATA's head."""

    signature: bytes = raw(4)
    length: int = uint(4)
    version: int = uint(4)
    count: int = uint(4)


@dataclass(frozen=True)
class Section(Layout):
    """One section: where its data is in the image, and where it goes in the TD's memory."""

    data_offset: int = uint(4)
    data_size: int = uint(4)
    gpa: int = uint(8)
    memory_size: int = uint(8)
    type: int = uint(4)
    attributes: int = uint(4)


def sections(image: bytes) -> tuple[Section, ...]:
    """The sections of a firmware image, in their order; `MalformedError` when it is no TDVF or a section cannot be."""
    at = _metadata_at(image)
    reader = Reader(image, "TDX metadata")
    reader.at = at
    head = Descriptor.parse(reader.take(Descriptor.size(), "descriptor"))
    if head.signature != b"TDVF" or head.version != 1:
        raise MalformedError(f"the TDX metadata at {at:#x} is no TDVF descriptor of version 1")
    if not 1 <= head.count <= MAX_SECTIONS or head.length != Descriptor.size() + head.count * Section.size():
        raise MalformedError(f"the TDVF descriptor claims {head.count} sections in {head.length} bytes")
    found = tuple(Section.parse(reader.take(Section.size(), "section")) for _ in range(head.count))
    for section in found:
        _check(section, len(image))
    return found


def mrtd_of_firmware(image: bytes) -> bytes:
    """The MRTD of a TD that is built of the image and nothing else.

    What the VMM puts into a section that is not measured (the TD HOB) does not matter to it.
    """
    return mrtd_of(_regions(image))


def _regions(image: bytes) -> Iterator[Region]:
    for section in sections(image):
        if section.attributes & SectionAttribute.PAGE_AUG:
            continue  # added when the TD runs, so not part of the measurement
        data = image[section.data_offset : section.data_offset + section.data_size]
        measured = bool(section.attributes & SectionAttribute.MR_EXTEND)
        yield Region(section.gpa, data.ljust(section.memory_size, b"\0"), measured)


def _metadata_at(image: bytes) -> int:
    """Where the descriptor is: its distance from the image's end is in the GUID table, which is read backwards."""
    end = len(image) - FOOTER_FROM_END + GUID_SIZE
    if end < ENTRY_TAIL or image[end - GUID_SIZE : end] != TABLE_FOOTER:
        raise MalformedError("this firmware has no table of GUIDs at its end: it is no OVMF image that knows of TDX")
    at = end - ENTRY_TAIL
    start = end - int.from_bytes(image[at : at + LENGTH_SIZE], "little")
    if start < 0:
        raise MalformedError("the firmware's table of GUIDs is longer than the firmware")
    while at - ENTRY_TAIL >= start:
        guid = image[at - GUID_SIZE : at]
        size = int.from_bytes(image[at - ENTRY_TAIL : at - GUID_SIZE], "little")
        if size < ENTRY_TAIL or at - size < start:
            raise MalformedError(f"the firmware's table of GUIDs has an entry of {size} bytes")
        if guid == TDX_METADATA_OFFSET:
            distance = int.from_bytes(image[at - size : at - ENTRY_TAIL], "little")
            if not Descriptor.size() <= distance <= len(image):
                raise MalformedError(f"the TDX metadata is said to be {distance} bytes before the firmware's end")
            return len(image) - distance
        at -= size
    raise MalformedError("this firmware has no TDX metadata: it was built without support for TDX")


def _check(section: Section, image_size: int) -> None:
    problem = ""
    if section.gpa % PAGE or section.memory_size % PAGE:
        problem = "is not whole pages"
    elif not 0 < section.memory_size <= MAX_SECTION or section.gpa + section.memory_size > MAX_GPA:
        problem = "has a size or a place that no TD can give it"
    elif section.data_offset + section.data_size > image_size or section.data_size > section.memory_size:
        problem = "has data outside the image, or more than it has memory"
    elif section.attributes & ~KNOWN_ATTRIBUTES:
        problem = f"has the attributes {section.attributes:#x}"
    if problem:
        raise MalformedError(f"the TDVF section at {section.gpa:#x} of {section.memory_size:#x} bytes {problem}")
