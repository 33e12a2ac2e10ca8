"""The measured-boot event log of a TD: parse, write, replay.

A TCG2 crypto-agile log (TCG PC Client Platform Firmware Profile, "Event logging"; UEFI 2.10, section 38): one
TCG_PCClientPCREvent that names the digests in use, then TCG_PCR_EVENT2 records. In a TD the register of a record
counts MRTD as 0 and RTMR0 to RTMR3 as 1 to 4; the ACPI table CCEL says where the log lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from softtdx.abi.wire import Wire, raw, uint
from softtdx.attest.errors import MalformedError
from softtdx.attest.wire import Reader

__all__ = [
    "SHA384",
    "CcelTable",
    "Event",
    "EventLog",
    "EventType",
    "ReplayResult",
    "event_type_name",
    "extend",
    "make_ccel",
    "parse_ccel",
    "rtmr_of",
]

SHA1, SHA256, SHA384, SHA512, SM3 = 0x0004, 0x000B, 0x000C, 0x000D, 0x0012
DIGEST_SIZES = {SHA1: 20, SHA256: 32, SHA384: 48, SHA512: 64, SM3: 32}
RTMR_COUNT = 4
RTMR_SIZE = 48
SIGNATURE = b"Spec ID Event03\0"
MAX_ALGORITHMS = 16
FIRST_RTMR_INDEX = 1
FILLERS = (b"\xff", b"\0")
"""What the unused end of a log's area is filled with: the log ends where only one of them is left."""
VARIABLE_HEAD = 32


class EventType(IntEnum):
    """TCG event types a boot is likely to log."""

    PREBOOT_CERT = 0
    POST_CODE = 1
    NO_ACTION = 3
    SEPARATOR = 4
    ACTION = 5
    EVENT_TAG = 6
    S_CRTM_CONTENTS = 7
    S_CRTM_VERSION = 8
    CPU_MICROCODE = 9
    PLATFORM_CONFIG_FLAGS = 0xA
    TABLE_OF_DEVICES = 0xB
    COMPACT_HASH = 0xC
    IPL = 0xD
    IPL_PARTITION_DATA = 0xE
    NONHOST_CODE = 0xF
    NONHOST_CONFIG = 0x10
    NONHOST_INFO = 0x11
    OMIT_BOOT_DEVICE_EVENTS = 0x12
    EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
    EFI_VARIABLE_BOOT = 0x80000002
    EFI_BOOT_SERVICES_APPLICATION = 0x80000003
    EFI_BOOT_SERVICES_DRIVER = 0x80000004
    EFI_RUNTIME_SERVICES_DRIVER = 0x80000005
    EFI_GPT_EVENT = 0x80000006
    EFI_ACTION = 0x80000007
    EFI_PLATFORM_FIRMWARE_BLOB = 0x80000008
    EFI_HANDOFF_TABLES = 0x80000009
    EFI_PLATFORM_FIRMWARE_BLOB2 = 0x8000000A
    EFI_HANDOFF_TABLES2 = 0x8000000B
    EFI_VARIABLE_BOOT2 = 0x8000000C
    EFI_VARIABLE_AUTHORITY = 0x800000E0


VARIABLE_EVENTS = (
    EventType.EFI_VARIABLE_DRIVER_CONFIG,
    EventType.EFI_VARIABLE_BOOT,
    EventType.EFI_VARIABLE_BOOT2,
    EventType.EFI_VARIABLE_AUTHORITY,
)


def event_type_name(kind: int) -> str:
    """`EV_` and the type's name, or its number."""
    return f"EV_{EventType(kind).name}" if kind in set(EventType) else f"{kind:#x}"


@dataclass(frozen=True)
class Event:
    """TCG_PCR_EVENT2: what was measured into a register."""

    index: int
    kind: int
    digests: tuple[tuple[int, bytes], ...]
    data: bytes

    def digest(self, algorithm: int = SHA384) -> bytes | None:
        """The digest of that algorithm, if the event has one."""
        return next((value for name, value in self.digests if name == algorithm), None)

    @property
    def rtmr(self) -> int | None:
        """Which RTMR it extended; None for MRTD and for events that extend nothing."""
        number = self.index - FIRST_RTMR_INDEX
        return number if 0 <= number < RTMR_COUNT and self.kind != EventType.NO_ACTION else None

    def to_bytes(self) -> bytes:
        """The record as it lies in the log."""
        head = b"".join(value.to_bytes(4, "little") for value in (self.index, self.kind, len(self.digests)))
        digests = b"".join(name.to_bytes(2, "little") + value for name, value in self.digests)
        return head + digests + len(self.data).to_bytes(4, "little") + self.data

    def describe(self) -> dict[str, object]:
        """For `softtdx inspect`."""
        digest = self.digest()
        return {
            "register": "MRTD" if self.index == 0 else f"RTMR{self.index - FIRST_RTMR_INDEX}",
            "type": event_type_name(self.kind),
            "digest": digest.hex() if digest else None,
            "bytes": len(self.data),
            "digest_is_of_data": digest == hashlib.sha384(self.data).digest(),
            "text": _variable_name(self.data) if self.kind in VARIABLE_EVENTS else _text(self.data),
        }


def _variable_name(data: bytes) -> str:
    """The name in UEFI_VARIABLE_DATA: a GUID, two lengths, the name in UTF-16."""
    length = int.from_bytes(data[16:24], "little")
    name = data[VARIABLE_HEAD : VARIABLE_HEAD + 2 * length]
    return _text(name) if 0 < 2 * length == len(name) else _text(data)


def _text(data: bytes) -> str:
    """The event's data where it reads as text, else its beginning in hex."""
    for encoding in ("utf-8", "utf-16-le"):
        try:
            text = data.decode(encoding).rstrip("\0")
        except UnicodeDecodeError:
            continue
        if text and text.replace("\n", "").replace("\t", "").isprintable():
            return " ".join(text.split())
    return data[:32].hex() + ("..." if len(data) > len(data[:32]) else "")


@dataclass(frozen=True)
class ReplayResult:
    """The RTMRs that follow from a log, and whether they are those given."""

    computed: tuple[bytes, ...]
    expected: tuple[bytes, ...]

    @property
    def matches(self) -> tuple[bool, ...]:
        """For each RTMR, whether the log explains it."""
        return tuple(a == b for a, b in zip(self.computed, self.expected, strict=True))

    @property
    def ok(self) -> bool:
        """Whether the log explains all of them."""
        return all(self.matches)


@dataclass(frozen=True)
class EventLog:
    """A log: its header event, the digests it names, its events, and what fills the rest of its area."""

    header: Event
    algorithms: tuple[tuple[int, int], ...]
    events: tuple[Event, ...]
    trailer: bytes = b""

    @classmethod
    def empty(cls) -> EventLog:
        """A log of SHA-384 digests with no event yet."""
        sizes = SHA384.to_bytes(2, "little") + RTMR_SIZE.to_bytes(2, "little")
        data = SIGNATURE + bytes(4) + bytes([0, 2, 0, 2]) + (1).to_bytes(4, "little") + sizes + bytes(1)
        header = Event(FIRST_RTMR_INDEX, EventType.NO_ACTION, ((SHA1, bytes(20)),), data)
        return cls(header, ((SHA384, RTMR_SIZE),), ())

    @classmethod
    def parse(cls, data: bytes) -> EventLog:
        """Reads a log, and the area it lies in; raises `MalformedError` for anything else."""
        reader = Reader(data, "event log")
        index, kind = reader.uint(4, "register"), reader.uint(4, "type")
        digest = reader.take(DIGEST_SIZES[SHA1], "digest")
        spec = reader.take(reader.uint(4, "event size"), "event")
        if kind != EventType.NO_ACTION or not spec.startswith(SIGNATURE):
            raise MalformedError("this is no crypto-agile event log: it does not begin with Spec ID Event03")
        algorithms = _algorithms(spec)
        events = []
        end = min(len(data.rstrip(filler)) for filler in FILLERS)
        while reader.at < end:
            events.append(_next_event(reader, dict(algorithms)))
        header = Event(index, kind, ((SHA1, digest),), spec)
        return cls(header, algorithms, tuple(events), reader.take(reader.left(), "trailer"))

    def to_bytes(self) -> bytes:
        """The log and what follows it."""
        head = self.header
        first = head.index.to_bytes(4, "little") + head.kind.to_bytes(4, "little") + head.digests[0][1]
        spec = len(head.data).to_bytes(4, "little") + head.data
        return first + spec + b"".join(event.to_bytes() for event in self.events) + self.trailer

    def measured(self, rtmr: int, kind: int, data: bytes, digest: bytes | None = None) -> EventLog:
        """The log with one more event; the digest is the data's SHA-384 unless given."""
        if not 0 <= rtmr < RTMR_COUNT:
            raise MalformedError(f"RTMR{rtmr} does not exist; there are RTMR0 to RTMR3")
        value = hashlib.sha384(data).digest() if digest is None else digest
        if len(value) != RTMR_SIZE:
            raise MalformedError(f"a digest for an RTMR is {RTMR_SIZE} bytes, this is {len(value)}")
        event = Event(rtmr + FIRST_RTMR_INDEX, kind, ((SHA384, value),), data)
        return replace(self, events=(*self.events, event))

    def rtmrs(self) -> tuple[bytes, ...]:
        """The four RTMRs as the events leave them: each extends by SHA-384(RTMR || digest), from zeroes."""
        registers = [bytes(RTMR_SIZE)] * RTMR_COUNT
        for event in self.events:
            if event.rtmr is None:
                continue
            digest = event.digest()
            if digest is None:
                raise MalformedError(f"an event of RTMR{event.rtmr} has no SHA-384 digest, so it cannot be replayed")
            registers[event.rtmr] = extend(registers[event.rtmr], digest)
        return tuple(registers)

    def replay(self, expected: Sequence[bytes]) -> ReplayResult:
        """Compare with the RTMRs of a quote or a report."""
        return ReplayResult(self.rtmrs(), tuple(expected))

    def describe(self) -> dict[str, object]:
        """For `softtdx inspect`."""
        return {
            "kind": "event log",
            "events": [event.describe() for event in self.events],
            "rtmrs": [value.hex() for value in self.rtmrs()],
            "area_bytes_unused": len(self.trailer),
        }


def extend(register: bytes, digest: bytes) -> bytes:
    """What TDG.MR.RTMR.EXTEND makes of a register."""
    return hashlib.sha384(register + digest).digest()


def rtmr_of(digests: Iterable[bytes]) -> bytes:
    """An RTMR that was extended with these digests, from zeroes."""
    register = bytes(RTMR_SIZE)
    for digest in digests:
        register = extend(register, digest)
    return register


def _algorithms(spec: bytes) -> tuple[tuple[int, int], ...]:
    """(algorithm, digest size) from TCG_EfiSpecIDEvent."""
    reader = Reader(spec, "Spec ID event")
    reader.take(len(SIGNATURE) + 8, "class and version")
    count = reader.uint(4, "number of algorithms")
    if not 1 <= count <= MAX_ALGORITHMS:
        raise MalformedError(f"the event log names {count} digest algorithms; 1 to {MAX_ALGORITHMS} can be")
    found = tuple((reader.uint(2, "algorithm"), reader.uint(2, "digest size")) for _ in range(count))
    for name, size in found:
        if DIGEST_SIZES.get(name, size) != size:
            raise MalformedError(f"the event log says that digests of algorithm {name:#x} have {size} bytes")
    reader.take(reader.uint(1, "vendor information size"), "vendor information")
    return found


def _next_event(reader: Reader, sizes: dict[int, int]) -> Event:
    index, kind, count = (reader.uint(4, name) for name in ("register", "type", "digest count"))
    if count > MAX_ALGORITHMS:
        raise MalformedError(f"event log: an event at byte {reader.at - 12} claims {count} digests")
    digests = []
    for _ in range(count):
        name = reader.uint(2, "algorithm")
        if name not in sizes:
            raise MalformedError(f"event log: digest algorithm {name:#x} at byte {reader.at - 2} is not in its header")
        digests.append((name, reader.take(sizes[name], "digest")))
    return Event(index, kind, tuple(digests), reader.take(reader.uint(4, "event size"), "event"))


class CcelTable(Wire, size=56):
    """The ACPI table CCEL: where firmware left the event log (ACPI 6.5, "CC Event Log")."""

    signature = raw(0, 4)
    length = uint(4, 4)
    revision = uint(8, 1)
    checksum = uint(9, 1)
    oem_id = raw(10, 6)
    oem_table_id = raw(16, 8)
    oem_revision = uint(24, 4)
    creator_id = raw(28, 4)
    creator_revision = uint(32, 4)
    cc_type = uint(36, 1)
    cc_subtype = uint(37, 1)
    unclaimed = uint(38, 2)
    log_area_length = uint(40, 8)
    log_area_address = uint(48, 8)


CCEL_SIGNATURE = b"CCEL"
CC_TYPE_TDX = 2


def parse_ccel(data: bytes) -> CcelTable:
    """Reads the table; refuses one with another signature, a length that is not its own or a wrong checksum."""
    if data[:4] != CCEL_SIGNATURE or len(data) != CcelTable.SIZE:
        raise MalformedError(f"this is no CCEL table: {len(data)} bytes beginning with {data[:4]!r}")
    table = CcelTable.parse(data)
    if table.length != len(data) or sum(data) & 0xFF:
        raise MalformedError("the CCEL table's length or checksum is wrong")
    return table


def make_ccel(address: int, length: int) -> bytes:
    """A CCEL table for a TD whose log area is `length` bytes at GPA `address`."""
    table = CcelTable()
    table.signature, table.length, table.revision = CCEL_SIGNATURE, CcelTable.SIZE, 1
    table.oem_id, table.oem_table_id, table.creator_id = b"SOFTDX", b"SOFTTDX ", b"STDX"
    table.oem_revision = table.creator_revision = 1
    table.cc_type, table.log_area_length, table.log_area_address = CC_TYPE_TDX, length, address
    table.checksum = -sum(bytes(table)) & 0xFF
    return bytes(table)
