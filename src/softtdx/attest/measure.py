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

__all__ = ["LinuxBoot", "Mrtd", "Region", "linux_boot_log", "mrtd_of"]

PAGE = 4096
CHUNK = 256
RECORD = 128
GPA_AT = 16
PAGE_ADD, MR_EXTEND = b"MEM.PAGE.ADD", b"MR.EXTEND"
SEPARATED = (0, 1, 2)
"""RTMRs that a separator ends; RTMR3 is the application's."""


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


@dataclass(frozen=True)
class LinuxBoot:
    """What the TD firmware is handed to boot Linux, each part as it is measured.

    `configuration` is the header of the boot window, `acpi` the ACPI tables: the machine's part. Without them RTMR0
    cannot be told.
    """

    kernel: bytes
    command_line: str
    initrd: bytes = b""
    configuration: bytes | None = None
    acpi: bytes | None = None


def linux_boot_log(boot: LinuxBoot) -> EventLog:
    """The log that the TD firmware (native/guests/firmware.c) leaves behind, and with it the RTMRs.

    The machine's configuration goes into RTMR0, the kernel into RTMR1, command line and initrd into RTMR2; a separator
    ends each.
    """
    try:
        line = boot.command_line.encode("ascii")
    except UnicodeEncodeError:
        raise MalformedError(f"the kernel command line {boot.command_line!r} is not ASCII") from None
    log = EventLog.empty()
    if boot.configuration is not None:
        log = log.measured(0, EventType.PLATFORM_CONFIG_FLAGS, boot.configuration)
    if boot.acpi is not None:
        log = log.measured(0, EventType.PLATFORM_CONFIG_FLAGS, b"ACPI DATA", _sha(boot.acpi))
    log = log.measured(1, EventType.IPL, b"kernel", _sha(boot.kernel))
    log = log.measured(2, EventType.IPL, line)
    if boot.initrd:
        log = log.measured(2, EventType.IPL, b"initrd", _sha(boot.initrd))
    for rtmr in SEPARATED:
        log = log.measured(rtmr, EventType.SEPARATOR, bytes(4))
    return log


def _sha(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()
