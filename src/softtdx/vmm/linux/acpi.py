"""The ACPI tables of the machine: RSDP, XSDT, FADT, DSDT, MADT with the wake-up mailbox, and in a TD CCEL.

A hardware-reduced platform (ACPI 6.4, 4.1): no PM timer, no SCI; sleep and reset registers are I/O ports. The tables
are linked to a fixed address, to which the firmware copies them before it measures them.
"""

import struct

from softtdx.attest.eventlog import make_ccel
from softtdx.vmm.errors import MachineError
from softtdx.vmm.linux import aml
from softtdx.vmm.linux.layout import (
    ACPI_BASE,
    ACPI_MAX,
    EVENT_LOG,
    EVENT_LOG_SIZE,
    MAILBOX,
    PCI_WINDOW,
    PCI_WINDOW_SIZE,
    TAKE_BACK_VECTOR,
)

__all__ = ["RESET_PORT", "RESET_VALUE", "SLEEP_CONTROL_PORT", "SLEEP_STATUS_PORT", "SLEEP_TYPE_S5", "build_tables"]

SLEEP_CONTROL_PORT = 0x600
SLEEP_STATUS_PORT = 0x601
RESET_PORT = 0x602
RESET_VALUE = 1
SLEEP_TYPE_S5 = 5

_OEM, _TABLE, _CREATOR = b"SOFTDX", b"SOFTTDX ", b"STDX"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_ALIGN = 16
_LOCAL_APIC = 0xFEE0_0000
_MADT_LOCAL_APIC, _MADT_LOCAL_X2APIC, _MADT_WAKEUP = 0, 9, 16
_APIC_ENABLED = 1
_MAILBOX_VERSION = 1  # with a reset vector, by which the OS gives processors back
_FIRST_X2APIC_ONLY = 255
_FADT_SIZE = 276
_FADT_FLAGS = 1 << 4 | 1 << 5 | 1 << 10 | 1 << 20  # no power or sleep button, reset register, hardware reduced
_BOOT_ARCH = 1 << 2 | 1 << 5  # no VGA, no CMOS RTC; no 8042 either
_SYSTEM_IO = 1


def build_tables(vcpus: int, *, td: bool) -> bytes:
    """The tables as they lie from ACPI_BASE on, RSDP first. MachineError when they would not fit."""
    placed: list[tuple[int, bytes]] = []
    at = ACPI_BASE + 2 * 64  # behind RSDP and XSDT

    def place(table: bytes) -> int:
        nonlocal at
        address = at
        placed.append((address, table))
        at = -(-(at + len(table)) // _ALIGN) * _ALIGN
        return address

    dsdt = place(_table(b"DSDT", 2, _dsdt()))
    tables = [place(_fadt(dsdt)), place(_madt(vcpus))]
    if td:
        tables.append(place(make_ccel(EVENT_LOG, EVENT_LOG_SIZE)))
    xsdt = _table(b"XSDT", 1, b"".join(address.to_bytes(8, "little") for address in tables))
    blob = bytearray(at - ACPI_BASE)
    if len(blob) > ACPI_MAX:
        raise MachineError(f"the ACPI tables of {vcpus} vCPUs do not fit into {ACPI_MAX >> 10} KiB")
    for address, table in [(ACPI_BASE, _rsdp(ACPI_BASE + 64)), (ACPI_BASE + 64, xsdt), *placed]:
        blob[address - ACPI_BASE : address - ACPI_BASE + len(table)] = table
    return bytes(blob)


def _sum_to_zero(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([-sum(data) & 0xFF]) + data[at + 1 :]


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    size = _HEADER.size + len(body)
    return _sum_to_zero(_HEADER.pack(signature, size, revision, 0, _OEM, _TABLE, 1, _CREATOR, 1) + body, 9)


def _rsdp(xsdt: int) -> bytes:
    first = _sum_to_zero(struct.pack("<8sB6sBI", b"RSD PTR ", 0, _OEM, 2, 0), 8)
    return _sum_to_zero(first + struct.pack("<IQB3x", 36, xsdt, 0), 32)


def _register(port: int) -> bytes:
    """Generic Address Structure of a byte-wide I/O port."""
    return struct.pack("<BBBBQ", _SYSTEM_IO, 8, 0, 1, port)


def _fadt(dsdt: int) -> bytes:
    table = bytearray(_FADT_SIZE - _HEADER.size)

    def put(offset: int, data: bytes) -> None:
        table[offset - _HEADER.size : offset - _HEADER.size + len(data)] = data

    put(40, dsdt.to_bytes(4, "little"))
    put(109, _BOOT_ARCH.to_bytes(2, "little"))
    put(112, _FADT_FLAGS.to_bytes(4, "little"))
    put(116, _register(RESET_PORT))
    put(128, bytes([RESET_VALUE]))
    put(131, bytes([4]))  # minor version: ACPI 6.4
    put(140, dsdt.to_bytes(8, "little"))
    put(244, _register(SLEEP_CONTROL_PORT))
    put(256, _register(SLEEP_STATUS_PORT))
    return _table(b"FACP", 6, bytes(table))


def _madt(vcpus: int) -> bytes:
    body = struct.pack("<II", _LOCAL_APIC, 0)
    for number in range(vcpus):
        if number < _FIRST_X2APIC_ONLY:
            body += struct.pack("<BBBBI", _MADT_LOCAL_APIC, 8, number, number, _APIC_ENABLED)
        else:
            body += struct.pack("<BBHIII", _MADT_LOCAL_X2APIC, 16, 0, number, _APIC_ENABLED, number)
    body += struct.pack("<BBHIQQ", _MADT_WAKEUP, 24, _MAILBOX_VERSION, 0, MAILBOX, TAKE_BACK_VECTOR)
    return _table(b"APIC", 5, body)


def _dsdt() -> bytes:
    root = aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A03")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name(
            "_CRS",
            aml.resources(
                aml.bus_numbers(0, 0),
                aml.io_ports(0xCF8, 8),
                aml.memory_window(PCI_WINDOW, PCI_WINDOW_SIZE),
            ),
        ),
    )
    serial = aml.device(
        "COM1",  # without an interrupt, so that its driver polls
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.io_ports(0x3F8, 8))),
    )
    return aml.scope("\\_SB", root, serial) + aml.name("\\_S5", aml.package(SLEEP_TYPE_S5, 0, 0, 0))
