"""Loading a payload: an ELF64 program for x86-64, or a flat binary.

A payload brings no dynamic linking: it is linked to a fixed address and entered, in 64-bit mode with identity-mapped
memory, at its entry point. Every number in the file is checked, since anybody may have written it.
"""

import itertools
import struct
from dataclasses import dataclass
from pathlib import Path

from softtdx.vmm.errors import PayloadError
from softtdx.vmm.files import read_file

__all__ = ["FLAT_ADDRESS", "Payload", "Segment", "load_payload", "parse_payload"]

FLAT_ADDRESS = 0x10_0000
"""Where a flat binary is loaded, and entered: 1 MiB."""

_MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_ELFCLASS64, _LITTLE_ENDIAN = 2, 1
_ET_EXEC, _ET_DYN = 2, 3
_EM_X86_64 = 62
_EM_NAMES = {3: "i386", 40: "ARM", 183: "AArch64", 243: "RISC-V"}
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_PF_X = 1
_MAX_FILE = 1 << 30


@dataclass(frozen=True)
class Segment:
    """Bytes to put at a guest-physical address; `size` - len(data) zeroes follow them."""

    address: int
    data: bytes
    size: int
    executable: bool = True

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.size


@dataclass(frozen=True)
class Payload:
    """What is loaded, in ascending order of address, and where it is entered."""

    name: str
    segments: tuple[Segment, ...]
    entry: int


def load_payload(path: str | Path) -> Payload:
    """Read and check a payload. PayloadError for a file that is missing, empty, or not loadable."""
    return parse_payload(read_file(path, "the payload", _MAX_FILE, "flat binary or ELF64"), Path(path).name)


def parse_payload(data: bytes, name: str = "payload") -> Payload:
    """The same from bytes; anything that does not start like an ELF file is a flat binary."""
    if not data:
        raise PayloadError(f"the payload {name!r} is empty")
    if data.startswith(_MAGIC):
        return _parse_elf(data, name)
    return Payload(name, (Segment(FLAT_ADDRESS, data, len(data)),), FLAT_ADDRESS)


def _parse_elf(data: bytes, name: str) -> Payload:
    def refuse(why: str) -> PayloadError:
        return PayloadError(f"the payload {name!r} cannot be loaded: {why}")

    if len(data) < _HEADER.size:
        raise refuse(f"its ELF header is cut off at {len(data)} bytes")
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, *_ = _HEADER.unpack_from(data)
    if ident[4] != _ELFCLASS64 or ident[5] != _LITTLE_ENDIAN:
        raise refuse("it is not a 64-bit little-endian ELF file; build it for x86-64 (-m64)")
    if machine != _EM_X86_64:
        raise refuse(f"it is for {_EM_NAMES.get(machine, f'machine {machine}')}, not for x86-64")
    if kind == _ET_DYN:
        raise refuse("it is position independent or a shared library; link it with -static -no-pie")
    if kind != _ET_EXEC:
        raise refuse(f"its ELF type is {kind}, not an executable; link it first")
    if count == 0:
        raise refuse("it has no program headers")
    if entry_size != _PROGRAM_HEADER.size or table + count * entry_size > len(data):
        raise refuse("its program headers are cut off or of a wrong size")
    segments = []
    for i in range(count):
        kind_, flags, offset, _, address, file_size, size, _ = _PROGRAM_HEADER.unpack_from(data, table + i * entry_size)
        if kind_ in (_PT_INTERP, _PT_DYNAMIC):
            raise refuse("it is dynamically linked; link it with -static")
        if kind_ != _PT_LOAD or size == 0:
            continue
        if offset + file_size > len(data):
            raise refuse(f"segment {i} lies outside the file: it is cut off")
        if file_size > size:
            raise refuse(f"segment {i} has more bytes in the file ({file_size}) than in memory ({size})")
        if address + size > 1 << 52:
            raise refuse(f"segment {i} at {address:#x} with {size:#x} bytes is above any guest memory")
        segments.append(Segment(address, data[offset : offset + file_size], size, bool(flags & _PF_X)))
    if not segments:
        raise refuse("no segment is to be loaded")
    segments.sort(key=lambda s: s.address)
    for left, right in itertools.pairwise(segments):
        if right.address < left.end:
            raise refuse(f"its segments at {left.address:#x} and {right.address:#x} overlap")
    if not any(s.address <= entry < s.end and s.executable for s in segments):
        raise refuse(f"its entry point {entry:#x} is in no executable segment")
    return Payload(name, tuple(segments), entry)
