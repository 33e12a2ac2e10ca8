"""The boot window: what the VMM hands the firmware in shared memory (native/guests/firmware.h).

A header that names the parts, then kernel, initrd, command line and ACPI tables, each from a page boundary. The
firmware takes private copies, checks and measures them; nothing here is trusted.
"""

import struct

from softtdx.vmm.errors import MachineError, PayloadError
from softtdx.vmm.linux.acpi import build_tables
from softtdx.vmm.linux.bzimage import BzImage
from softtdx.vmm.linux.layout import BOOT_WINDOW_MAX, COMMAND_LINE_MAX, MemoryMap

__all__ = ["build_window"]

_MAGIC = 0x42584454544F5346
_VERSION = 1
_HEADER = struct.Struct("<13Q")
_PAGE = 4096


def build_window(
    kernel: BzImage, initrd: bytes, command_line: str, memory: MemoryMap, vcpus: int, *, td: bool
) -> bytes:
    """The window's contents. PayloadError or MachineError for parts that no machine of this size can take."""
    try:
        line = command_line.encode("ascii")
    except UnicodeEncodeError as error:
        raise PayloadError(f"the kernel command line has a character that is not ASCII: {command_line!r}") from error
    limit = min(COMMAND_LINE_MAX - 1, kernel.command_line_max or 255)
    if len(line) > limit or b"\0" in line:
        raise PayloadError(f"the kernel command line has {len(line)} bytes; this kernel takes up to {limit}, no NUL")
    kernel.fit(memory.low, len(initrd))
    parts = (kernel.data, initrd, line, build_tables(vcpus, td=td))
    fields = [_MAGIC, _VERSION, memory.low, memory.high, vcpus]
    contents, offset = b"", _PAGE
    for part in parts:
        fields += (offset, len(part))
        padded = part.ljust(-(-len(part) // _PAGE) * _PAGE, b"\0")
        contents += padded
        offset += len(padded)
    if offset > BOOT_WINDOW_MAX:
        raise MachineError(f"kernel and initrd have {offset >> 20} MiB; more than {BOOT_WINDOW_MAX >> 20} is not taken")
    return _HEADER.pack(*fields).ljust(_PAGE, b"\0") + contents
