"""The virtio network device (Virtio 1.2, 5.1): one pair of queues, no offloads."""

import struct
from collections import deque
from collections.abc import Callable

from softtdx.vmm.virtio.device import VirtioDevice
from softtdx.vmm.virtio.queue import GuestMemory

__all__ = ["MAX_FRAME", "VirtioNet"]

MAX_FRAME = 1514
"""An Ethernet frame without its checksum, at an MTU of 1,500."""
_MIN_FRAME = 14
_RECEIVE, _TRANSMIT = 0, 1
_MAC, _STATUS = 1 << 5, 1 << 16
_LINK_UP = 1
_HEADER = struct.Struct("<BBHHHHH")
_PLAIN = _HEADER.pack(0, 0, 0, 0, 0, 0, 1)  # nothing to finish, one buffer
_BACKLOG = 256  # frames that wait for buffers; what comes on top is lost, as on any network


class VirtioNet(VirtioDevice):
    """A network card. What it is attached to gets the frames that the guest transmits; `feed` is one that arrives."""

    device_id = 1
    class_code = 0x02_0000
    queue_count = 2
    features = _MAC | _STATUS

    def __init__(self, memory: GuestMemory, mac: bytes) -> None:
        """`mac` is 6 bytes. It is attached to nothing yet."""
        super().__init__(memory)
        self._mac = mac
        self._send: Callable[[bytes], None] = lambda _frame: None
        self._waiting: deque[bytes] = deque()

    def attach(self, send: Callable[[bytes], None]) -> None:
        """To a network that takes frames by `send`, which must not wait."""
        self._send = send

    def config(self) -> bytes:
        """MAC address and status; the other fields belong to features that are not offered."""
        return self._mac + struct.pack("<HHH", _LINK_UP, 1, 0)

    def notify(self, index: int) -> None:
        """Transmit what there is, or use fresh buffers for what arrived."""
        if index == _RECEIVE:
            self._deliver()
            return
        queue, interrupt = self.queues[_TRANSMIT], False
        while (chain := queue.pop()) is not None:
            frame = queue.read(chain)[_HEADER.size :]
            interrupt = queue.push(chain, 0) or interrupt
            if _MIN_FRAME <= len(frame) <= MAX_FRAME:
                self._send(frame)
        if interrupt:
            self.interrupt(queue)

    def feed(self, frame: bytes) -> None:
        """A frame from the network; lost while no driver runs, or when too many wait already."""
        with self.lock:
            if self.driver_ok and _MIN_FRAME <= len(frame) <= MAX_FRAME and len(self._waiting) < _BACKLOG:
                self._waiting.append(frame)
                self.guarded(self._deliver)

    def reset(self) -> None:
        """The driver reset the device: nothing waits for it any more."""
        super().reset()
        self._waiting = deque()

    def _deliver(self) -> None:
        queue, interrupt = self.queues[_RECEIVE], False
        while self._waiting and (chain := queue.pop()) is not None:
            written = queue.write(chain, _PLAIN + self._waiting.popleft())
            interrupt = queue.push(chain, written) or interrupt
        if interrupt:
            self.interrupt(queue)
