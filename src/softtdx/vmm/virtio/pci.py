"""Virtio over PCI, modern interface (Virtio 1.2, 4.1): one memory BAR with all structures and the MSI-X table."""

import struct
from collections.abc import Callable

from softtdx.vmm.errors import MachineError
from softtdx.vmm.pci import PciDevice
from softtdx.vmm.virtio.device import VERSION_1_FEATURES, VirtioDevice
from softtdx.vmm.virtio.queue import MAX_SIZE, Queue, QueueError

__all__ = ["VirtioPci"]

_VENDOR, _FIRST_DEVICE = 0x1AF4, 0x1040
_CAP_VENDOR, _CAP_MSIX = 0x09, 0x11
_COMMON, _NOTIFY, _ISR, _DEVICE = 1, 2, 3, 4
_COMMON_AT, _ISR_AT, _DEVICE_AT, _NOTIFY_AT, _TABLE_AT, _PENDING_AT = range(0, 0x6000, 0x1000)
_BAR_SIZE = 0x8000
_COMMON_SIZE, _PAGE = 56, 0x1000
_FIELD_SIZE = {0: 4, 8: 4, 12: 4, 16: 2, 20: 1, 22: 2, 24: 2, 26: 2, 28: 2}  # of what a driver writes there
_NOTIFY_MULTIPLIER = 4
_NO_VECTOR = 0xFFFF
_DRIVER_OK, _FEATURES_OK, _NEEDS_RESET = 4, 8, 64
_MSIX_ENABLE, _MSIX_MASK_ALL = 1 << 15, 1 << 14
_ENTRY_SIZE, _ENTRY_MASKED = 16, 1


class VirtioPci(PciDevice):
    """The transport of one device. `signal(address, data)` sends a message-signalled interrupt."""

    def __init__(self, device: VirtioDevice, signal: Callable[[int, int], object]) -> None:
        """With one MSI-X vector a queue and one for changes of configuration."""
        super().__init__(
            _VENDOR, _FIRST_DEVICE + device.device_id, device.class_code, subsystem=0x1100, bar_size=_BAR_SIZE
        )
        self.device = device
        self._signal = signal
        self._vectors = device.queue_count + 1
        for kind, at, size in (
            (_COMMON, _COMMON_AT, _COMMON_SIZE),
            (_ISR, _ISR_AT, 1),
            (_DEVICE, _DEVICE_AT, _PAGE),
            (_NOTIFY, _NOTIFY_AT, _PAGE),
        ):
            extra = struct.pack("<I", _NOTIFY_MULTIPLIER) if kind == _NOTIFY else b""
            body = struct.pack("<BBBBHII", 16 + len(extra), kind, 0, 0, 0, at, size) + extra
            self.add_capability(_CAP_VENDOR, body)
        self._msix = self.add_capability(_CAP_MSIX, struct.pack("<HII", self._vectors - 1, _TABLE_AT, _PENDING_AT))
        self.allow(self._msix + 2, _MSIX_ENABLE | _MSIX_MASK_ALL, 2)
        device.interrupt, device.guarded = self._interrupt, self._guarded
        self._table = bytearray(_ENTRY_SIZE * self._vectors)
        self._pending: set[int] = set()
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._feature_select = self._driver_select = 0
        self._driver_features = 0
        self._queue_select = 0
        self._config_vector = _NO_VECTOR
        self._isr = 0
        self._pending.clear()
        self.device.reset()

    @property
    def _features(self) -> int:
        return self.device.features | VERSION_1_FEATURES

    # --- the BAR
    def read_bar(self, offset: int, size: int) -> int:
        """The guest loads from a structure."""
        with self.device.lock:
            area, at = offset & ~(_PAGE - 1), offset & _PAGE - 1
            if area == _COMMON_AT:
                data = self._common()[at : at + size]
            elif area == _ISR_AT:
                data, self._isr = bytes([self._isr]), 0
            elif area == _DEVICE_AT:
                data = self.device.config()[at : at + size]
            elif area == _TABLE_AT:
                data = bytes(self._table[at : at + size])
            elif area == _PENDING_AT:
                bits = sum(1 << vector for vector in self._pending)
                data = bits.to_bytes(8, "little")[at : at + size]
            else:
                data = b""
            return int.from_bytes(data, "little")

    def write_bar(self, offset: int, value: int, size: int) -> None:
        """The guest stores to a structure."""
        with self.device.lock:
            area, at = offset & ~(_PAGE - 1), offset & _PAGE - 1
            if area == _COMMON_AT:
                self._write_common(at, value, size)
            elif area == _NOTIFY_AT:
                self._notify(at // _NOTIFY_MULTIPLIER)
            elif area == _DEVICE_AT:
                self.device.write_config(at, value.to_bytes(size, "little"))
            elif area == _TABLE_AT and at + size <= len(self._table):
                self._table[at : at + size] = value.to_bytes(size, "little")
                self._unmasked()

    def write_config(self, offset: int, value: int, size: int) -> None:
        """MSI-X may have been enabled or unmasked."""
        super().write_config(offset, value, size)
        with self.device.lock:
            self._unmasked()

    # --- the common configuration structure
    def _queue(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _common(self) -> bytes:
        queue = self._queue()
        features = self._features >> 32 * self._feature_select & 0xFFFF_FFFF if self._feature_select < 2 else 0
        mine = self._driver_features >> 32 * self._driver_select & 0xFFFF_FFFF if self._driver_select < 2 else 0
        head = struct.pack(
            "<IIIIHHBBH",
            self._feature_select,
            features,
            self._driver_select,
            mine,
            self._config_vector,
            len(self.device.queues),
            self._status,
            0,
            self._queue_select,
        )
        if queue is None:
            return head + bytes(_COMMON_SIZE - len(head))
        return head + struct.pack(
            "<HHHHQQQ",
            queue.size,
            queue.vector,
            int(queue.enabled),
            self._queue_select,
            queue.descriptors,
            queue.available,
            queue.used,
        )

    def _write_common(self, at: int, value: int, size: int) -> None:
        queue = self._queue()
        value &= (1 << 8 * _FIELD_SIZE.get(at, size)) - 1
        if at == 0:
            self._feature_select = value
        elif at == 8:
            self._driver_select = value
        elif at == 12 and self._driver_select < 2 and not self._status & _FEATURES_OK:
            shift = 32 * self._driver_select
            self._driver_features = self._driver_features & ~(0xFFFF_FFFF << shift) | value << shift
        elif at == 16:
            self._config_vector = value if value < self._vectors else _NO_VECTOR
        elif at == 20:
            self._set_status(value)
        elif at == 22:
            self._queue_select = value
        elif queue is not None and not (queue.enabled and at != 26):
            self._set_up_queue(queue, at, value, size)

    def _set_up_queue(self, queue: Queue, at: int, value: int, size: int) -> None:
        if at == 24 and 0 < value <= MAX_SIZE and value & value - 1 == 0:
            queue.size = value
        elif at == 26:
            queue.vector = value if value < self._vectors else _NO_VECTOR
        elif at == 28:
            queue.enabled = value == 1
        elif at in range(32, 56, 4):
            name = ("descriptors", "available", "used")[(at - 32) // 8]
            shift = 32 if at % 8 else 0
            mask = ((1 << 8 * size) - 1) << shift
            setattr(queue, name, getattr(queue, name) & ~mask | value << shift & mask)

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._reset()
            return
        if value & _FEATURES_OK and self._driver_features & ~self._features:
            value &= ~_FEATURES_OK
        self._status = value & 0xFF | self._status & _NEEDS_RESET
        if value & _DRIVER_OK and not self.device.driver_ok:
            self.device.driver_ok = True
            self._guarded(self.device.started)

    def _notify(self, index: int) -> None:
        if index < len(self.device.queues) and self.device.driver_ok:
            self._guarded(lambda: self.device.notify(index))

    def _guarded(self, action: Callable[[], None]) -> None:
        """A driver that breaks the rules stops its device, not the machine."""
        try:
            action()
        except (QueueError, MachineError):
            self._status |= _NEEDS_RESET
            self.device.driver_ok = False

    # --- interrupts
    def _interrupt(self, queue: Queue) -> None:
        self._isr |= 1
        self._raise(queue.vector)

    def _raise(self, vector: int) -> None:
        control = self.get(self._msix + 2, 2)
        if vector >= self._vectors or not control & _MSIX_ENABLE:
            return
        low, high, data, entry_control = struct.unpack_from("<IIII", self._table, _ENTRY_SIZE * vector)
        if control & _MSIX_MASK_ALL or entry_control & _ENTRY_MASKED:
            self._pending.add(vector)
            return
        self._pending.discard(vector)
        self._signal(high << 32 | low, data)

    def _unmasked(self) -> None:
        for vector in list(self._pending):
            self._raise(vector)
