"""The virtio block device (Virtio 1.2, 5.2) on a file or bytes."""

import struct
from typing import BinaryIO

from softtdx.vmm.virtio.device import VirtioDevice
from softtdx.vmm.virtio.queue import Chain, GuestMemory, Queue, QueueError

__all__ = ["VirtioBlock"]

_SECTOR = 512
_READ_ONLY, _FLUSH = 1 << 5, 1 << 9
_IN, _OUT, _FLUSH_REQUEST, _GET_ID = 0, 1, 4, 8
_OK, _IOERR, _UNSUPPORTED = 0, 1, 2
_HEADER = struct.Struct("<IIQ")
_ID_SIZE = 20


class VirtioBlock(VirtioDevice):
    """A disk. What lies behind a file's last whole sector is not part of it."""

    device_id = 2
    class_code = 0x01_0000
    features = _FLUSH

    def __init__(self, memory: GuestMemory, file: BinaryIO, *, read_only: bool = False) -> None:
        """`file` is seekable, and stays open as long as the machine runs."""
        super().__init__(memory)
        self._file = file
        self._sectors = file.seek(0, 2) // _SECTOR
        self._read_only = read_only
        if read_only:
            self.features = _FLUSH | _READ_ONLY

    def config(self) -> bytes:
        """Capacity in sectors; the other fields belong to features that are not offered."""
        return struct.pack("<Q", self._sectors).ljust(60, b"\0")

    def notify(self, index: int) -> None:
        """Serve all requests."""
        queue, interrupt = self.queues[index], False
        while (chain := queue.pop()) is not None:
            interrupt = queue.push(chain, self._serve(queue, chain)) or interrupt
        if interrupt:
            self.interrupt(queue)

    def _serve(self, queue: Queue, chain: Chain) -> int:
        request = queue.read(chain)
        if len(request) < _HEADER.size or chain.room < 1:
            raise QueueError("a block request without header or status")
        kind, _, sector = _HEADER.unpack_from(request)
        room = chain.room - 1  # the last byte is the status
        answer, status = b"", _OK
        if kind == _IN:
            if room % _SECTOR or sector + room // _SECTOR > self._sectors:
                status = _IOERR
            else:
                self._file.seek(sector * _SECTOR)
                answer = self._file.read(room)
        elif kind == _OUT:
            data = request[_HEADER.size :]
            if self._read_only or len(data) % _SECTOR or sector + len(data) // _SECTOR > self._sectors:
                status = _IOERR
            else:
                self._file.seek(sector * _SECTOR)
                self._file.write(data)
        elif kind == _FLUSH_REQUEST:
            self._file.flush()
        elif kind == _GET_ID:
            answer = b"softtdx"[:room].ljust(min(room, _ID_SIZE), b"\0")
        else:
            status = _UNSUPPORTED
        return queue.write(chain, answer.ljust(room, b"\0") + bytes([status]))
