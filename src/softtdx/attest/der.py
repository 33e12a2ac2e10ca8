"""Just enough DER to build and read the SGX extension and the outline of certificates and CRLs."""

from __future__ import annotations

from softtdx.attest.errors import MalformedError

__all__ = [
    "BOOLEAN",
    "ENUMERATED",
    "INTEGER",
    "OCTETS",
    "OID",
    "SEQUENCE",
    "element",
    "elements",
    "integer",
    "tlv",
]

BOOLEAN, INTEGER, OCTETS, OID, ENUMERATED, SEQUENCE = 0x01, 0x02, 0x04, 0x06, 0x0A, 0x30
SHORT_FORM = 0x80
LONGEST_LENGTH = 4


def tlv(tag: int, value: bytes) -> bytes:
    """One element: tag, length in the fewest bytes, value."""
    if len(value) < SHORT_FORM:
        return bytes([tag, len(value)]) + value
    length = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes([tag, SHORT_FORM | len(length)]) + length + value


def integer(value: int) -> bytes:
    """An INTEGER from 0 up."""
    return tlv(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def element(data: bytes, at: int = 0) -> tuple[int, int, int]:
    """The element at `at`: its tag, where its value begins, and where it ends. Indefinite lengths are refused."""
    size = len(data)
    if at + 2 > size:
        raise MalformedError("DER ends inside an element")
    tag, length = data[at], data[at + 1]
    at += 2
    if length >= SHORT_FORM:
        count = length & 0x7F
        if not 1 <= count <= LONGEST_LENGTH or at + count > size:
            raise MalformedError("DER has a length that cannot be")
        length = int.from_bytes(data[at : at + count], "big")
        at += count
    end = at + length
    if end > size:
        raise MalformedError("DER ends inside an element")
    return tag, at, end


def elements(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, value) of each element in turn."""
    out = []
    at = 0
    while at < len(data):
        tag, start, at = element(data, at)
        out.append((tag, data[start:at]))
    return out
