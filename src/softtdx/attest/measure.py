"""Reference values ahead of time: the MRTD and RTMRs that a TD built and booted from given files will report.

MRTD is the SHA-384 of the records of TDH.MEM.PAGE.ADD and TDH.MR.EXTEND in the order of the build (TDX Module base
specification, "Measurement of the initial TD memory"). RTMRs follow from the events that firmware and boot log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from softtdx.attest.errors import MalformedError
from softtdx.attest.eventlog import EventLog, EventType

__all__ = ["Mrtd", "Region", "linux_boot_log", "mrtd_of"]

PAGE = 4096
CHUNK = 256
RECORD = 128
GPA_AT = 16
PAGE_ADD, MR_EXTEND = b"MEM.PAGE.ADD", b"MR.EXTEND"

INITRD_TAG, LOAD_OPTIONS_TAG = 0x8F3B22EC, 0x8F3B22ED
"""Linux, drivers/firmware/efi/libstub/efistub.h: tags of the EFI stub's events."""


@dataclass(frozen=True)
class Region:
    """Private memory that is there when a TD starts: whole pages of `data` from `gpa`, measured or only added."""

    gpa: int
    data: bytes
    measured: bool = True


class Mrtd:
    """MRTD as it grows, call by call."""

    def __init__(self) -> None:
        self._stream = hashlib.sha384()

    def page_add(self, gpa: int) -> None:
        """TDH.MEM.PAGE.ADD of the 4 KiB page at `gpa`."""
        if gpa % PAGE:
            raise MalformedError(f"a page cannot be added at {gpa:#x}: it is not a multiple of 4 KiB")
        self._stream.update(_record(PAGE_ADD, gpa))

    def extend(self, gpa: int, chunk: bytes) -> None:
        """TDH.MR.EXTEND of the 256 bytes at `gpa`."""
        if gpa % CHUNK or len(chunk) != CHUNK:
            raise MalformedError(f"MR.EXTEND takes 256 bytes at a multiple of 256, not {len(chunk)} at {gpa:#x}")
        self._stream.update(_record(MR_EXTEND, gpa) + chunk)

    def value(self) -> bytes:
        """What TDH.MR.FINALIZE makes of it."""
        return self._stream.digest()


def _record(name: bytes, gpa: int) -> bytes:
    return (name.ljust(GPA_AT, b"\0") + gpa.to_bytes(8, "little")).ljust(RECORD, b"\0")


def mrtd_of(regions: Iterable[Region]) -> bytes:
    """The MRTD of a TD whose regions are added in this order, as KVM does it: page by page, and each page that is
    measured extended right after it is added.
    """
    mrtd = Mrtd()
    for region in regions:
        if region.gpa % PAGE or len(region.data) % PAGE:
            raise MalformedError(f"the region at {region.gpa:#x} of {len(region.data)} bytes is not whole pages")
        for at in range(0, len(region.data), PAGE):
            mrtd.page_add(region.gpa + at)
            if region.measured:
                for chunk in range(at, at + PAGE, CHUNK):
                    mrtd.extend(region.gpa + chunk, region.data[chunk : chunk + CHUNK])
    return mrtd.value()


def linux_boot_log(
    kernel: bytes, command_line: str, initrd: bytes | None = None, log: EventLog | None = None
) -> EventLog:
    """The events of a direct Linux boot: the kernel image into RTMR1, command line and initrd into RTMR2.

    The tags are those of Linux's own EFI stub, so that tools which know a stub's log know this one; the digest of the
    initrd is of its bytes, that of the command line of its UTF-16 text with the final zero.
    """
    log = log or EventLog.empty()
    log = log.measured(1, EventType.EFI_BOOT_SERVICES_APPLICATION, b"kernel\0", hashlib.sha384(kernel).digest())
    text = command_line.encode("utf-16-le") + bytes(2)
    log = log.measured(2, EventType.EVENT_TAG, _tagged(LOAD_OPTIONS_TAG, b"LOADED_IMAGE::LoadOptions\0"), _sha(text))
    if initrd is not None:
        log = log.measured(2, EventType.EVENT_TAG, _tagged(INITRD_TAG, b"Linux initrd\0"), _sha(initrd))
    return log


def _sha(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def _tagged(tag: int, name: bytes) -> bytes:
    """TCG_PCClientTaggedEvent."""
    return tag.to_bytes(4, "little") + len(name).to_bytes(4, "little") + name
