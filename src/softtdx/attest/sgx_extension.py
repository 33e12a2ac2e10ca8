"""The SGX extension of a PCK certificate (OID 1.2.840.113741.1.13.1): built and read as DER.

Intel "SGX PCK Certificate and CRL Profile Specification", section "Intel SGX PCK certificate extensions".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from softtdx.attest.errors import MalformedError

__all__ = ["SGX_EXTENSION_OID", "PckExtension"]

SGX_EXTENSION_OID = "1.2.840.113741.1.13.1"
BASE = bytes.fromhex("2a864886f84d010d01")
PPID, TCB, PCEID, FMSPC, SGX_TYPE, INSTANCE, CONFIGURATION = (bytes([n]) for n in range(1, 8))
PCESVN, CPUSVN = b"\x11", b"\x12"
COMPONENTS = 16
CONFIGURATION_FLAGS = ("dynamic_platform", "cached_keys", "smt_enabled")

TAG_BOOLEAN, TAG_INTEGER, TAG_OCTETS, TAG_OID, TAG_ENUMERATED, TAG_SEQUENCE = 0x01, 0x02, 0x04, 0x06, 0x0A, 0x30
SHORT_FORM = 0x80
TRUE = b"\xff"


def _tlv(tag: int, value: bytes) -> bytes:
    if len(value) < SHORT_FORM:
        return bytes([tag, len(value)]) + value
    length = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes([tag, SHORT_FORM | len(length)]) + length + value


def _integer(value: int) -> bytes:
    return _tlv(TAG_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _entry(suffix: bytes, value: bytes) -> bytes:
    return _tlv(TAG_SEQUENCE, _tlv(TAG_OID, BASE + suffix) + value)


def _read(data: bytes, at: int) -> tuple[int, bytes, int]:
    """One DER element at `at`: its tag, its value, and where the next begins. Indefinite lengths are refused."""
    try:
        tag, length = data[at], data[at + 1]
        at += 2
        if length >= SHORT_FORM:
            count = length & 0x7F
            if not 1 <= count <= 4 or at + count > len(data):
                raise MalformedError("the SGX extension has a DER length that cannot be")
            length = int.from_bytes(data[at : at + count], "big")
            at += count
    except IndexError:
        raise MalformedError("the SGX extension ends inside a DER element") from None
    if at + length > len(data):
        raise MalformedError("the SGX extension ends inside a DER element")
    return tag, data[at : at + length], at + length


def _entries(value: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    """(OID, tag, value) of each SEQUENCE { OID, value } in turn."""
    at = 0
    while at < len(value):
        tag, entry, at = _read(value, at)
        if tag != TAG_SEQUENCE:
            raise MalformedError(f"the SGX extension has an entry of tag {tag:#04x}, not a SEQUENCE")
        oid_tag, oid, after = _read(entry, 0)
        if oid_tag != TAG_OID:
            raise MalformedError(f"the SGX extension names an entry by tag {oid_tag:#04x}, not an OID")
        item_tag, item, _ = _read(entry, after)
        yield oid, item_tag, item


def _lookup(value: bytes) -> dict[bytes, tuple[int, bytes]]:
    """Entries by OID; the first of a name counts, as it does for the verifiers in use."""
    found: dict[bytes, tuple[int, bytes]] = {}
    for oid, tag, item in _entries(value):
        found.setdefault(oid, (tag, item))
    return found


@dataclass(frozen=True)
class PckExtension:
    """What a PCK certificate says of its platform.

    `cpu_svn` is given twice in the extension: as 16 components and as a string; `components` are the former.
    The last four are only in certificates of a platform CA (multi-package platforms).
    """

    ppid: bytes
    cpu_svn: bytes
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    sgx_type: int = 1
    components: bytes = b""
    platform_instance_id: bytes | None = None
    dynamic_platform: bool | None = None
    cached_keys: bool | None = None
    smt_enabled: bool | None = None

    def to_der(self) -> bytes:
        """The extension's value."""
        components = self.components or self.cpu_svn
        tcb = b"".join(_entry(TCB + bytes([n + 1]), _integer(svn)) for n, svn in enumerate(components))
        tcb += _entry(TCB + PCESVN, _integer(self.pce_svn))
        tcb += _entry(TCB + CPUSVN, _tlv(TAG_OCTETS, self.cpu_svn))
        out = _entry(PPID, _tlv(TAG_OCTETS, self.ppid)) + _entry(TCB, _tlv(TAG_SEQUENCE, tcb))
        out += _entry(PCEID, _tlv(TAG_OCTETS, self.pce_id)) + _entry(FMSPC, _tlv(TAG_OCTETS, self.fmspc))
        out += _entry(SGX_TYPE, _tlv(TAG_ENUMERATED, bytes([self.sgx_type])))
        if self.platform_instance_id is not None:
            out += _entry(INSTANCE, _tlv(TAG_OCTETS, self.platform_instance_id))
            flags = b"".join(
                _entry(CONFIGURATION + bytes([n + 1]), _tlv(TAG_BOOLEAN, TRUE if getattr(self, name) else b"\0"))
                for n, name in enumerate(CONFIGURATION_FLAGS)
            )
            out += _entry(CONFIGURATION, _tlv(TAG_SEQUENCE, flags))
        return _tlv(TAG_SEQUENCE, out)

    @classmethod
    def from_der(cls, data: bytes) -> PckExtension:
        """Reads the extension's value; raises `MalformedError` when a required entry is missing or odd."""
        tag, body, end = _read(data, 0)
        if tag != TAG_SEQUENCE or end != len(data):
            raise MalformedError("the SGX extension is not one DER SEQUENCE")
        top = _lookup(body)
        tcb = _lookup(_need(top, TCB, "TCB"))
        config = _lookup(top[BASE + CONFIGURATION][1]) if BASE + CONFIGURATION in top else {}
        flags = {
            name: _boolean(config[oid][1], name)
            for n, name in enumerate(CONFIGURATION_FLAGS)
            if (oid := BASE + CONFIGURATION + bytes([n + 1])) in config
        }
        sgx_type = _need(top, SGX_TYPE, "SGX type")
        if len(sgx_type) not in (1, 2):
            raise MalformedError(f"the SGX extension's SGX type is {len(sgx_type)} bytes")
        return cls(
            ppid=_need(top, PPID, "PPID"),
            cpu_svn=_need(tcb, TCB + CPUSVN, "CPUSVN", 16),
            pce_svn=_small(_need(tcb, TCB + PCESVN, "PCESVN"), "PCESVN", 2),
            pce_id=_need(top, PCEID, "PCEID"),
            fmspc=_need(top, FMSPC, "FMSPC", 6),
            sgx_type=int.from_bytes(sgx_type, "big"),
            components=bytes(
                _small(_need(tcb, TCB + bytes([n + 1]), f"component {n + 1}"), f"component {n + 1}", 1)
                for n in range(COMPONENTS)
            ),
            platform_instance_id=top[BASE + INSTANCE][1] if BASE + INSTANCE in top else None,
            **flags,
        )


def _need(table: dict[bytes, tuple[int, bytes]], suffix: bytes, name: str, size: int | None = None) -> bytes:
    if BASE + suffix not in table:
        raise MalformedError(f"the PCK certificate's SGX extension has no {name}")
    value = table[BASE + suffix][1]
    if size is not None and len(value) != size:
        raise MalformedError(f"the SGX extension's {name} is {len(value)} bytes, not {size}")
    return value


def _small(value: bytes, name: str, size: int) -> int:
    number = int.from_bytes(value, "big")
    if not value or number >> (8 * size):
        raise MalformedError(f"the SGX extension's {name} is {value.hex() or 'empty'}, not {size} byte(s)")
    return number


def _boolean(value: bytes, name: str) -> bool:
    if len(value) != 1:
        raise MalformedError(f"the SGX extension's {name} is {len(value)} bytes, not a BOOLEAN")
    return value != b"\0"
