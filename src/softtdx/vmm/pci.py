"""A PCI bus with configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2) and memory BARs.

One bus, one function a device. BARs are placed before the guest starts; the guest may move them.
"""

from abc import ABC, abstractmethod
from threading import RLock

__all__ = ["ADDRESS_PORT", "DATA_PORT", "HostBridge", "PciBus", "PciDevice"]

ADDRESS_PORT = 0xCF8
DATA_PORT = 0xCFC
_ENABLE = 1 << 31
_CONFIG_SIZE = 256
_COMMAND, _BAR0, _BARS, _CAPABILITY_POINTER = 0x04, 0x10, 6, 0x34
_STATUS_CAPABILITIES = 1 << 4
_COMMAND_MEMORY = 1 << 1
_COMMAND_WRITABLE = 0x0546  # memory, bus master, parity, SERR, INTx disable
_BAR_ADDRESS = 0xFFFF_FFF0


class PciDevice(ABC):
    """A function: its configuration space, with at most one memory BAR of `bar_size` bytes."""

    def __init__(self, vendor: int, device: int, class_code: int, *, subsystem: int = 0, bar_size: int = 0) -> None:
        """Type 0 header. `class_code` is class, subclass, interface; `bar_size` a power of two."""
        self.config = bytearray(_CONFIG_SIZE)
        self._writable = bytearray(_CONFIG_SIZE)
        self.bar_size = bar_size
        self._next_capability = 0x40
        self._last_link = _CAPABILITY_POINTER
        self.put(0x00, vendor, 2)
        self.put(0x02, device, 2)
        self.put(0x08, 1 | class_code << 8, 4)
        self.put(0x2C, vendor, 2)
        self.put(0x2E, subsystem, 2)
        self.allow(_COMMAND, _COMMAND_WRITABLE, 2)
        if bar_size:
            self.allow(_BAR0, _BAR_ADDRESS & ~(bar_size - 1), 4)

    def put(self, offset: int, value: int, size: int) -> None:
        """Set a register's contents."""
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def get(self, offset: int, size: int) -> int:
        """A register's contents."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def allow(self, offset: int, mask: int, size: int) -> None:
        """Let the guest write the bits of `mask`."""
        self._writable[offset : offset + size] = mask.to_bytes(size, "little")

    def add_capability(self, identifier: int, body: bytes) -> int:
        """Append a capability; `body` is what follows its ID and link. Returns its offset."""
        at = self._next_capability
        self.config[at : at + 2 + len(body)] = bytes([identifier, 0]) + body
        self.config[self._last_link] = at
        self._last_link = at + 1
        self._next_capability = -(-(at + 2 + len(body)) // 4) * 4
        self.put(0x06, _STATUS_CAPABILITIES, 2)
        return at

    def read_config(self, offset: int, size: int) -> int:
        """The guest reads configuration space."""
        return self.get(offset, size)

    def write_config(self, offset: int, value: int, size: int) -> None:
        """The guest writes configuration space: read-only bits stay."""
        for i, byte in enumerate(value.to_bytes(size, "little")):
            at, mask = offset + i, self._writable[offset + i]
            self.config[at] = self.config[at] & ~mask | byte & mask

    @property
    def bar(self) -> int | None:
        """Where the BAR answers; None while memory decoding is off."""
        if not self.bar_size or not self.get(_COMMAND, 2) & _COMMAND_MEMORY:
            return None
        return self.get(_BAR0, 4) & _BAR_ADDRESS

    @abstractmethod
    def read_bar(self, offset: int, size: int) -> int:
        """The guest loads from the BAR."""

    @abstractmethod
    def write_bar(self, offset: int, value: int, size: int) -> None:
        """The guest stores to the BAR."""


class HostBridge(PciDevice):
    """Device 0: what tells an operating system that there is a bus."""

    def __init__(self) -> None:
        """A generic PCI host bridge."""
        super().__init__(0x1B36, 0x0008, 0x06_0000)

    def read_bar(self, offset: int, size: int) -> int:
        """There is no BAR."""
        del offset
        return (1 << 8 * size) - 1

    def write_bar(self, offset: int, value: int, size: int) -> None:
        """There is no BAR."""


class PciBus:
    """Bus 0, with the window in which BARs lie. Accesses may come from any vCPU's thread."""

    def __init__(self, window: int, window_size: int) -> None:
        """With a host bridge as device 0."""
        self._window, self._end = window, window + window_size
        self._address = 0
        self._lock = RLock()
        self.devices: list[PciDevice] = [HostBridge()]

    def add(self, device: PciDevice) -> None:
        """Plug a device in, and place its BAR. ValueError when the bus is full."""
        if len(self.devices) >= 32:
            raise ValueError("a PCI bus has 32 slots")
        self.devices.append(device)
        if device.bar_size:
            base = -(-self._window // device.bar_size) * device.bar_size
            if base + device.bar_size > self._end:
                raise ValueError(f"no room for a BAR of {device.bar_size} bytes")
            device.put(_BAR0, base, 4)
            self._window = base + device.bar_size

    def read_port(self, port: int, size: int) -> int:
        """IN from 0xCF8 to 0xCFF."""
        with self._lock:
            if port == ADDRESS_PORT and size == 4:
                return self._address
            device, offset = self._selected(port)
            if device is None or offset % 4 + size > 4:
                return (1 << 8 * size) - 1
            return device.read_config(offset, size)

    def write_port(self, port: int, value: int, size: int) -> None:
        """OUT to 0xCF8 to 0xCFF."""
        with self._lock:
            if port == ADDRESS_PORT:
                if size == 4:
                    self._address = value & (_ENABLE | 0x00FF_FFFC)
                return
            device, offset = self._selected(port)
            if device is not None and offset % 4 + size <= 4:
                device.write_config(offset, value, size)

    def _selected(self, port: int) -> tuple[PciDevice | None, int]:
        address = self._address
        bus, slot, function = address >> 16 & 0xFF, address >> 11 & 31, address >> 8 & 7
        there = port >= DATA_PORT and address & _ENABLE and not bus and not function and slot < len(self.devices)
        return (self.devices[slot] if there else None), (address & 0xFC) + (port & 3)

    def read_memory(self, gpa: int, size: int) -> int | None:
        """A load from a BAR; None where no device answers."""
        device, offset = self._behind(gpa, size)
        return None if device is None else device.read_bar(offset, size)

    def write_memory(self, gpa: int, value: int, size: int) -> bool:
        """A store to a BAR; False where no device answers."""
        device, offset = self._behind(gpa, size)
        if device is None:
            return False
        device.write_bar(offset, value, size)
        return True

    def _behind(self, gpa: int, size: int) -> tuple[PciDevice | None, int]:
        for device in self.devices:
            bar = device.bar
            if bar is not None and bar <= gpa and gpa + size <= bar + device.bar_size:
                return device, gpa - bar
        return None, 0
