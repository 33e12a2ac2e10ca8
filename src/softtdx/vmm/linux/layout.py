"""Guest-physical memory of a machine that boots Linux, as the firmware expects it (native/guests/firmware.h)."""

from dataclasses import dataclass

from softtdx.vmm.errors import MachineError

__all__ = [
    "ACPI_BASE",
    "ACPI_MAX",
    "BOOT_WINDOW",
    "BOOT_WINDOW_MAX",
    "COMMAND_LINE_MAX",
    "EVENT_LOG",
    "EVENT_LOG_SIZE",
    "FIRMWARE_BASE",
    "MAILBOX",
    "PCI_WINDOW",
    "PCI_WINDOW_SIZE",
    "TAKE_BACK_VECTOR",
    "USABLE_FROM",
    "MemoryMap",
]

ACPI_BASE = 0x10_0000
ACPI_MAX = 0x1_0000
MAILBOX = 0x11_0000
EVENT_LOG = 0x12_0000
EVENT_LOG_SIZE = 0x1_0000
USABLE_FROM = 0x20_0000
COMMAND_LINE_MAX = 0x1_0000
BOOT_WINDOW = 0xC000_0000
BOOT_WINDOW_MAX = 0x2000_0000
PCI_WINDOW = 0xE000_0000
PCI_WINDOW_SIZE = 0x1000_0000
FIRMWARE_BASE = 0xFFFF_8000
TAKE_BACK_VECTOR = 0xFFFF_FFE0
HIGH_MEMORY = 1 << 32
GRAIN = 2 << 20
MAX_HIGH = 1 << 40


@dataclass(frozen=True)
class MemoryMap:
    """RAM of the guest: `low` bytes from 0, `high` bytes from 4 GiB."""

    low: int
    high: int

    @classmethod
    def of(cls, memory: int) -> "MemoryMap":
        """`memory` bytes of RAM, in whole 2 MiB. MachineError for less than the firmware needs, or too much."""
        if memory % GRAIN:
            raise MachineError(f"{memory} bytes of memory are not a multiple of 2 MiB; give --memory as 512M or 1G")
        low = min(memory, BOOT_WINDOW)
        if low <= USABLE_FROM:
            raise MachineError(f"{memory >> 20} MiB of memory are too little to boot Linux; give --memory 256M or more")
        if memory - low > MAX_HIGH:
            raise MachineError(f"{memory >> 30} GiB of memory are more than a machine can have ({MAX_HIGH >> 30} GiB)")
        return cls(low, memory - low)

    def ranges(self) -> list[tuple[int, int]]:
        """(base, size) of each run of RAM."""
        return [(0, self.low)] + ([(HIGH_MEMORY, self.high)] if self.high else [])
