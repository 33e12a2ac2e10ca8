"""The virtio console (Virtio 1.2, 5.3), one port."""

import struct
from collections.abc import Callable

from softtdx.vmm.virtio.device import VirtioDevice
from softtdx.vmm.virtio.queue import GuestMemory

__all__ = ["VirtioConsole"]

_RECEIVE, _TRANSMIT = 0, 1
_COLUMNS, _ROWS = 80, 25


class VirtioConsole(VirtioDevice):
    """hvc0. `output` gets what the guest prints; `feed` is what is typed."""

    device_id = 3
    class_code = 0x07_8000
    queue_count = 2

    def __init__(self, memory: GuestMemory, output: Callable[[bytes], None]) -> None:
        """An idle console."""
        super().__init__(memory)
        self._output = output
        self._input = bytearray()

    def config(self) -> bytes:
        """Columns, rows, number of ports, emergency write."""
        return struct.pack("<HHII", _COLUMNS, _ROWS, 1, 0)

    def notify(self, index: int) -> None:
        """Print what there is, or use fresh buffers for input."""
        if index == _RECEIVE:
            self._deliver()
            return
        queue, interrupt, printed = self.queues[_TRANSMIT], False, b""
        while (chain := queue.pop()) is not None:
            printed += queue.read(chain)
            interrupt = queue.push(chain, 0) or interrupt
        if printed:
            self._output(printed)
        if interrupt:
            self.interrupt(queue)

    def feed(self, data: bytes) -> None:
        """Bytes that were typed."""
        with self.lock:
            self._input += data
            if self.driver_ok:
                self.guarded(self._deliver)

    def started(self) -> None:
        """What was typed before now arrives."""
        self._deliver()

    def _deliver(self) -> None:
        queue, interrupt = self.queues[_RECEIVE], False
        while self._input and (chain := queue.pop()) is not None:
            written = queue.write(chain, bytes(self._input[: chain.room]))
            del self._input[:written]
            interrupt = queue.push(chain, written) or interrupt
        if interrupt:
            self.interrupt(queue)
