"""What every virtio device has: an ID, features, configuration and queues."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from threading import RLock

from softtdx.vmm.virtio.queue import GuestMemory, Queue

__all__ = ["VERSION_1_FEATURES", "VirtioDevice"]

_RING_INDIRECT = 1 << 28
_VERSION_1 = 1 << 32
_ACCESS_PLATFORM = 1 << 33
VERSION_1_FEATURES = _VERSION_1 | _ACCESS_PLATFORM | _RING_INDIRECT
"""VIRTIO_F_VERSION_1, VIRTIO_F_ACCESS_PLATFORM (which makes a TD use shared memory), VIRTIO_F_INDIRECT_DESC."""


class VirtioDevice(ABC):
    """A device behind a transport, which sets `interrupt`. Methods run on any thread, under `lock`.

    What a device does to its queues without being notified it does through `guarded`, also the transport's: a driver
    that breaks the rules stops the device.
    """

    device_id = 0
    class_code = 0
    queue_count = 1
    features = 0

    def __init__(self, memory: GuestMemory) -> None:
        """As after reset."""
        self.lock = RLock()
        self.queues = [Queue(memory) for _ in range(self.queue_count)]
        self.interrupt: Callable[[Queue], None] = lambda _queue: None
        self.guarded: Callable[[Callable[[], None]], None] = lambda action: action()
        self.driver_ok = False

    @abstractmethod
    def config(self) -> bytes:
        """The device's configuration structure."""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027  most devices have nothing to write there
        """The driver writes configuration."""

    @abstractmethod
    def notify(self, index: int) -> None:
        """The driver made buffers available in a queue. QueueError when they are malformed."""

    def started(self) -> None:  # noqa: B027  most devices wait for a notification
        """The driver said DRIVER_OK."""

    def reset(self) -> None:
        """The driver reset the device."""
        self.driver_ok = False
        for queue in self.queues:
            queue.reset()
