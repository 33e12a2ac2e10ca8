"""Services on a Unix socket or a TCP port that outlive bad clients: bounds on their number and their silence.

A service serves one client a thread; who falls silent, hangs up or comes when all places are taken is dropped.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

from softtdx.attest.errors import MalformedError, ServiceUnavailableError

__all__ = ["TIMEOUT", "Address", "StreamListener", "connect", "parse_address", "read_exactly"]

TIMEOUT = 30.0
MAX_CLIENTS = 256
BACKLOG = 128

Address = Path | tuple[str, int]
"""Of a Unix socket, or host and port."""


def parse_address(text: str) -> Address:
    """`unix:PATH`, a path with a slash, `tcp:HOST:PORT`, `HOST:PORT` or `PORT` (on loopback)."""
    if text.startswith("unix:"):
        return Path(text.removeprefix("unix:"))
    rest = text.removeprefix("tcp:")
    if "/" in rest:
        return Path(rest)
    host, _, port = rest.rpartition(":")
    if not port.isdecimal() or int(port) > 0xFFFF:
        raise MalformedError(f"{text!r} is no address; write unix:PATH, or HOST:PORT")
    return (host.strip("[]") or "127.0.0.1", int(port))


def connect(address: Address, timeout_s: float = TIMEOUT) -> socket.socket:
    """A connection to a service. OSError when nobody is there."""
    if not isinstance(address, Path):
        return socket.create_connection(address, timeout_s)
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(timeout_s)
    try:
        stream.connect(str(address))
    except OSError:
        stream.close()
        raise
    return stream


def read_exactly(stream: socket.socket, size: int) -> bytes:
    """`size` bytes; EOFError when the other side hangs up before."""
    data = b""
    while len(data) < size:
        chunk = stream.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


class _Handler(socketserver.BaseRequestHandler):
    """One client, until it hangs up or is given up."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)
        stream: socket.socket = self.request
        stream.settimeout(server.timeout_s)
        with contextlib.suppress(OSError, EOFError):
            server.serve_client(stream)


class _Server(socketserver.ThreadingMixIn):
    """What the Unix and the TCP server share: a thread a client, and a bound on their number."""

    daemon_threads = True
    block_on_close = False
    timeout_s: float
    serve_client: Callable[[socket.socket], None]
    slots: threading.BoundedSemaphore

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[attr-defined]  # of the server it is mixed into
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()


class _TcpServer(_Server, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = BACKLOG


class _UnixServer(_Server, socketserver.UnixStreamServer):
    request_queue_size = BACKLOG


class StreamListener:
    """A service on a Unix socket or a TCP port; `start` serves in a thread, `serve_forever` in this one.

    `serve` has one client's connection, and returns, or raises OSError or EOFError, when it is done with it.
    """

    def __init__(
        self, what: str, serve: Callable[[socket.socket], None], address: Address, *, timeout_s: float = TIMEOUT
    ) -> None:
        self._what = what
        self._path = address if isinstance(address, Path) else None
        try:
            if isinstance(address, Path):
                _remove_stale(address)
                self._server: _TcpServer | _UnixServer = _UnixServer(str(address), _Handler)
            else:
                self._server = _TcpServer(address, _Handler)
        except (OSError, OverflowError) as error:
            raise ServiceUnavailableError(f"the {what} cannot listen on {address}: {error}") from None
        self._server.serve_client = serve
        self._server.timeout_s = timeout_s
        self._server.slots = threading.BoundedSemaphore(MAX_CLIENTS)
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> Address:
        """Where it listens; the port is the one the system chose if 0 was asked for."""
        if self._path is not None:
            return self._path
        host, port, *_ = self._server.socket.getsockname()
        return str(host), int(port)

    def serve_forever(self) -> None:
        """Serve until `close` from another thread, or an exception in this one."""
        self._server.serve_forever(poll_interval=0.1)

    def start(self) -> Self:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, name=f"softtdx {self._what}", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving and remove the socket."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that is gone; one that answers is left alone."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except OSError:
            return
