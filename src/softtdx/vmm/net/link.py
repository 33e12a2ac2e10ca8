"""A network cable as a Unix socket: frames behind their length in 4 bytes, big endian, as QEMU's `-netdev stream` has.

So another end may be QEMU, or passt, which is a whole network in user space. Whoever finds nobody at the socket makes
it, and then passes frames on between all who connect.
"""

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from softtdx.vmm.errors import MachineError
from softtdx.vmm.virtio.net import MAX_FRAME

__all__ = ["SocketLink"]

_LENGTH = 4
_MAX_LENGTH = 1 << 16  # of a frame that somebody may announce; one that is too long for the guest is passed over
_MAX_QUEUED = 1 << 20  # bytes that wait for a peer who does not read
_MAX_PEERS = 64
_CHUNK = 1 << 16


class _Peer:
    """Another end, what came of its next frame, and what waits to be sent to it."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self.stream = stream
        self._input = bytearray()
        self.output = bytearray()

    def send(self, frame: bytes) -> None:
        """Queue a frame; it is lost when too much waits already."""
        if len(self.output) + len(frame) <= _MAX_QUEUED:
            self.output += len(frame).to_bytes(_LENGTH, "big") + frame

    def receive(self) -> list[bytes]:
        """The frames that are complete. OSError when the other side is gone, or sends what is none."""
        data = self.stream.recv(_CHUNK)
        if not data:
            raise ConnectionResetError
        self._input += data
        frames = []
        while len(self._input) >= _LENGTH:
            size = int.from_bytes(self._input[:_LENGTH], "big")
            if not 0 < size <= _MAX_LENGTH:
                raise ConnectionAbortedError
            if len(self._input) < _LENGTH + size:
                break
            frames.append(bytes(self._input[_LENGTH : _LENGTH + size]))
            del self._input[: _LENGTH + size]
        return frames

    def flush(self) -> None:
        """Send what the other side takes."""
        with contextlib.suppress(BlockingIOError):
            del self.output[: self.stream.send(self.output)]


class SocketLink:
    """One machine's end. `receive` gets the frames of the others, on a thread of the link's. Close it."""

    def __init__(self, path: Path, receive: Callable[[bytes], None]) -> None:
        """MachineError when there is neither a listener at `path` nor a way to become one."""
        self._receive = receive
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._peers: list[_Peer] = []
        self._listener: socket.socket | None = None
        self._path = path
        self._wake, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        try:
            self._join_or_listen()
        except OSError as error:
            self._shut()
            raise MachineError(f"no network at the socket {str(path)!r}: {error.strerror or error}") from None
        self._over = False
        self._thread = threading.Thread(target=self._run, name="softtdx-link", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """A frame to everybody else. Does not wait."""
        with self._lock:
            for peer in self._peers:
                peer.send(frame)
        self._nudge()

    def close(self) -> None:
        """Unplug."""
        self._over = True
        self._nudge()
        self._thread.join()
        self._shut()

    def __enter__(self) -> "SocketLink":
        """Itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close."""
        self.close()

    def _join_or_listen(self) -> None:
        stream = socket.socket(socket.AF_UNIX)
        try:
            stream.connect(str(self._path))
        except (ConnectionRefusedError, FileNotFoundError) as error:
            stream.close()
            if isinstance(error, ConnectionRefusedError) and self._path.is_socket():
                self._path.unlink()  # left by someone who is gone
        except OSError:
            stream.close()
            raise
        else:
            self._add(stream)
            return
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(self._path))
        except OSError:
            listener.close()
            raise
        self._listener = listener
        self._path.chmod(0o600)
        listener.listen()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def _add(self, stream: socket.socket) -> None:
        if len(self._peers) >= _MAX_PEERS:
            stream.close()
            return
        peer = _Peer(stream)
        self._selector.register(stream, selectors.EVENT_READ, peer)
        with self._lock:
            self._peers.append(peer)

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.stream)
        peer.stream.close()
        with self._lock:
            self._peers.remove(peer)

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):
            self._wake.send(b"\0", socket.MSG_DONTWAIT)

    def _run(self) -> None:
        while not self._over:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    with contextlib.suppress(BlockingIOError):
                        self._woken.recv(_CHUNK)
                elif key.fileobj is self._listener:
                    with contextlib.suppress(OSError):
                        self._add(self._listener.accept()[0])
                else:
                    self._serve(key.data)
            self._flush()

    def _serve(self, peer: _Peer) -> None:
        try:
            frames = peer.receive()
        except BlockingIOError:
            return
        except OSError:
            self._drop(peer)
            return
        for frame in frames:
            with self._lock:
                for other in self._peers:
                    if other is not peer:
                        other.send(frame)
            if len(frame) <= MAX_FRAME:
                self._receive(frame)

    def _flush(self) -> None:
        """Send what can be sent; watch those who do not take everything."""
        for peer in list(self._peers):
            try:
                with self._lock:
                    if peer.output:
                        peer.flush()
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.output else 0)
                self._selector.modify(peer.stream, events, peer)
            except OSError:
                self._drop(peer)

    def _shut(self) -> None:
        for peer in self._peers:
            peer.stream.close()
        if self._listener is not None:
            self._listener.close()
            self._path.unlink(missing_ok=True)
        self._selector.close()
        self._wake.close()
        self._woken.close()
