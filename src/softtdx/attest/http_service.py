"""Small HTTP services that outlive bad clients: bounds on time, size and number before an application sees anything."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from softtdx.attest.errors import ServiceUnavailableError
from softtdx.attest.tls import TlsFiles

__all__ = ["HttpListener"]

REQUEST_TIMEOUT = 10.0
KEEP_ALIVE = 5
MAX_CONNECTIONS = 512
MAX_REQUEST_HEAD = 16 * 1024
BACKLOG = 256


class _PromptProtocol(H11Protocol):
    """HTTP/1.1, and a client that does not come out with its request in time is dropped."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_TIMEOUT, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket whose protocol is named: asyncio turns Nagle's delay off only for such."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class HttpListener:
    """An ASGI application on a TCP port; `start` serves in a thread, `serve_forever` in this one."""

    def __init__(self, app: Starlette, what: str, host: str, port: int, tls: TlsFiles | None = None) -> None:
        try:
            self._socket = _listen(host, port)
        except (OSError, OverflowError) as error:
            raise ServiceUnavailableError(f"the {what} cannot listen on {host}:{port}: {error}") from None
        config = uvicorn.Config(
            app,
            http=_PromptProtocol,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_REQUEST_HEAD,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients find it."""
        host, port, *_ = self._socket.getsockname()
        scheme = "https" if self._server.config.ssl_certfile else "http"
        return f"{scheme}://{host}:{port}"

    def serve_forever(self) -> None:
        """Serve until the process is told to stop."""
        self._server.run(sockets=[self._socket])

    def start(self) -> Self:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, name="softtdx-http", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
