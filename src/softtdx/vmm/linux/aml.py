"""As much of ACPI Machine Language as a DSDT of one PCI root needs (ACPI 6.4, chapter 20)."""

import struct

__all__ = [
    "bus_numbers",
    "device",
    "eisa_id",
    "integer",
    "io_ports",
    "memory_window",
    "name",
    "package",
    "resources",
    "scope",
]

_ZERO, _ONE, _BYTE, _WORD, _DWORD, _QWORD = 0x00, 0x01, 0x0A, 0x0B, 0x0C, 0x0E
_NAME, _SCOPE, _BUFFER, _PACKAGE = 0x08, 0x10, 0x11, 0x12
_DEVICE = b"\x5b\x82"
_END_TAG = b"\x79\x00"
_MAX_FIXED, _MIN_FIXED = 1 << 3, 1 << 2  # of an address space descriptor's general flags
_READ_WRITE = 1


def integer(value: int) -> bytes:
    """An integer constant in its shortest form."""
    if value in (0, 1):
        return bytes([_ONE if value else _ZERO])
    for prefix, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no ACPI integer")


def _length(payload: int) -> bytes:
    """PkgLength of a package whose bytes after it are `payload`."""
    if payload + 1 < 1 << 6:
        return bytes([payload + 1])
    for extra in (1, 2, 3):
        total = payload + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"a package of {payload} bytes is too long for ACPI")


def _path(path: str) -> bytes:
    """A single name segment, with a leading backslash for the root."""
    root, segment = (b"\\", path[1:]) if path.startswith("\\") else (b"", path)
    return root + segment.ljust(4, "_").encode("ascii")


def name(path: str, value: bytes) -> bytes:
    """Name(path, value)."""
    return bytes([_NAME]) + _path(path) + value


def scope(path: str, *contents: bytes) -> bytes:
    """Scope(path) { ... }."""
    body = _path(path) + b"".join(contents)
    return bytes([_SCOPE]) + _length(len(body)) + body


def device(path: str, *contents: bytes) -> bytes:
    """Device(path) { ... }."""
    body = _path(path) + b"".join(contents)
    return _DEVICE + _length(len(body)) + body


def package(*values: int) -> bytes:
    """Package of integers."""
    body = bytes([len(values)]) + b"".join(integer(value) for value in values)
    return bytes([_PACKAGE]) + _length(len(body)) + body


def eisa_id(text: str) -> bytes:
    """EisaId("PNP0A03") as an integer."""
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return bytes([_DWORD]) + struct.pack(">I", value)


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate() { ... }: a buffer that ends with an end tag."""
    body = b"".join(descriptors) + _END_TAG
    size = integer(len(body))
    return bytes([_BUFFER]) + _length(len(size) + len(body)) + size + body


def io_ports(base: int, count: int) -> bytes:
    """IO(Decode16, base, base, 1, count)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, count)


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber(ResourceProducer, first .. last)."""
    flags = _MAX_FIXED | _MIN_FIXED
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, flags, 0, 0, first, last, 0, last - first + 1)


def memory_window(base: int, size: int) -> bytes:
    """DWordMemory(ResourceProducer, NonCacheable, ReadWrite, base ..)."""
    flags = _MAX_FIXED | _MIN_FIXED
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, flags, _READ_WRITE, 0, base, base + size - 1, 0, size)
