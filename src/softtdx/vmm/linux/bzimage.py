"""A Linux kernel image for x86 (bzImage), checked before anything is started with it.

Header: Linux, Documentation/arch/x86/boot.rst. Anybody may have written the file, so every number in it is checked.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

from softtdx.vmm.errors import PayloadError
from softtdx.vmm.files import read_file

__all__ = ["BzImage", "load_bzimage", "parse_bzimage"]

SECTOR = 512
DEFAULT_SETUP_SECTORS = 4
BOOT_FLAG = 0xAA55
HDRS = b"HdrS"
MIN_VERSION = 0x20C  # the first with xloadflags
XLF_KERNEL_64 = 1 << 0
XLF_ABOVE_4G = 1 << 1
ENTRY64 = 0x200
MAX_FILE = 256 << 20
_KERNEL_VERSION_MAX = 256
_FORMATS = {
    b"\x7fELF": "an ELF file (vmlinux); give the bzImage, usually named vmlinuz",
    b"\x1f\x8b": "a gzip file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
    b"\x28\xb5\x2f\xfd": "a Zstandard file; unpack it",
    b"!<arch>": "a Debian package; unpack it with dpkg-deb -x",
    b"070701": "a cpio archive, so perhaps an initramfs",
}


@dataclass(frozen=True)
class BzImage:
    """A kernel image: what its header says, and the whole file."""

    name: str
    data: bytes
    setup_size: int
    protocol: int
    version: str
    preferred_address: int
    init_size: int
    initrd_max: int
    command_line_max: int

    def fit(self, low_memory: int, initrd: int) -> None:
        """PayloadError unless it and an initrd of that size fit into memory from 0 to `low_memory`."""
        room = max(self.init_size, len(self.data))
        need = self.preferred_address + room + -(-initrd // 4096) * 4096
        if need > min(low_memory, self.initrd_max + 1) if initrd else need > low_memory:
            raise PayloadError(
                f"the kernel {self.name!r} with an initrd of {initrd >> 10} KiB needs {-(-need >> 20)} MiB of memory, "
                f"the machine has {low_memory >> 20} MiB; give --memory more"
            )


def load_bzimage(path: str | Path) -> BzImage:
    """Read and check a kernel. PayloadError for a file that is missing or no bootable 64-bit kernel."""
    return parse_bzimage(read_file(path, "the kernel", MAX_FILE, "bzImage"), Path(path).name)


def parse_bzimage(data: bytes, name: str = "bzImage") -> BzImage:
    """The same from bytes."""

    def refuse(why: str) -> PayloadError:
        return PayloadError(f"the kernel {name!r} cannot be booted: {why}")

    if not data:
        raise refuse("it is empty")
    for magic, what in _FORMATS.items():
        if data.startswith(magic):
            raise refuse(f"it is {what}")
    if len(data) < 2 * SECTOR:
        raise refuse(f"it has only {len(data)} bytes; the file is cut off or no kernel")
    if data[0x1FE:0x200] != BOOT_FLAG.to_bytes(2, "little") or data[0x202:0x206] != HDRS:
        raise refuse("it is no bzImage (there is no boot sector with the header HdrS)")
    (protocol,) = struct.unpack_from("<H", data, 0x206)
    if protocol < MIN_VERSION:
        raise refuse(f"its boot protocol {protocol >> 8}.{protocol & 0xFF:02} is too old; Linux 3.8 or newer is needed")
    (xloadflags,) = struct.unpack_from("<H", data, 0x236)
    if not xloadflags & XLF_KERNEL_64:
        raise refuse("it has no 64-bit entry point; it was built for 32-bit processors")
    setup_sectors = data[0x1F1] or DEFAULT_SETUP_SECTORS
    setup_size = (setup_sectors + 1) * SECTOR
    (paragraphs,) = struct.unpack_from("<I", data, 0x1F4)
    if setup_size + ENTRY64 >= len(data) or setup_size + paragraphs * 16 > len(data):
        expected = setup_size + paragraphs * 16
        raise refuse(f"it is cut off: {len(data)} bytes, but its header describes {expected}")
    (initrd_max,) = struct.unpack_from("<I", data, 0x22C)
    (command_line_max,) = struct.unpack_from("<I", data, 0x238)
    preferred, init_size = struct.unpack_from("<QI", data, 0x258)
    if preferred % 4096 or not 0x21_0000 <= preferred < 1 << 32:
        raise refuse(f"its preferred load address {preferred:#x} is not one that can be used (2 MiB to 4 GiB)")
    if init_size == 0 or preferred + init_size > 1 << 32:
        raise refuse(f"it claims to need {init_size} bytes of memory")
    return BzImage(
        name=name,
        data=data,
        setup_size=setup_size,
        protocol=protocol,
        version=_version(data),
        preferred_address=preferred,
        init_size=init_size,
        initrd_max=initrd_max,
        command_line_max=command_line_max,
    )


def _version(data: bytes) -> str:
    (pointer,) = struct.unpack_from("<H", data, 0x20E)
    if not pointer:
        return ""
    raw = data[pointer + SECTOR : pointer + SECTOR + _KERNEL_VERSION_MAX].split(b"\0", 1)[0]
    return "".join(c for c in raw.decode("ascii", "replace") if c.isprintable())
