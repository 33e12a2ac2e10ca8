"""The quote generation service: QGS messages, their server on a socket, and a client.

Messages as in Intel's `qgs_msg_lib.h` (DCAP, TDX QGS), version 1.0 and 1.1; on a stream each is preceded by its length
in 4 bytes, big endian, as QEMU and Intel's service have it.
"""

from __future__ import annotations

import logging
import socket
import socketserver
import threading
from enum import IntEnum
from pathlib import Path

from softtdx.abi.wire import Wire, uint
from softtdx.attest.errors import MalformedError, ServiceUnavailableError
from softtdx.attest.quoting import QuotingEnclave
from softtdx.errors import SoftTdxError

__all__ = ["MESSAGE_HEADER_SIZE", "QgsClient", "QgsError", "QgsListener", "QgsServer", "QgsType", "parse_address"]

log = logging.getLogger("softtdx.qgs")

MAJOR = 1
NEWEST_MINOR = 1
MAX_MESSAGE = 1 << 16
LENGTH_PREFIX = 4
TIMEOUT = 30.0
MAX_CLIENTS = 256
DEFAULT_PORT = 4050
COLLATERAL_VERSION = (3, 1)
"""Of tdx_ql_qve_collateral_t: CRLs are in DER, texts end in NUL."""


class QgsType(IntEnum):
    """What a message is."""

    GET_QUOTE_REQ = 0
    GET_QUOTE_RESP = 1
    GET_COLLATERAL_REQ = 2
    GET_COLLATERAL_RESP = 3
    GET_PLATFORM_INFO_REQ = 4
    GET_PLATFORM_INFO_RESP = 5


class QgsError(IntEnum):
    """`error_code` of a response."""

    SUCCESS = 0
    UNEXPECTED = 0x12001
    OUT_OF_MEMORY = 0x12002
    INVALID_PARAMETER = 0x12003
    INVALID_VERSION = 0x12004
    INVALID_TYPE = 0x12005
    INVALID_SIZE = 0x12006
    INVALID_CODE = 0x12007


class MessageHeader(Wire, size=16):
    """The head of every message; `size` counts the whole message."""

    major = uint(0, 2)
    minor = uint(2, 2)
    type = uint(4, 4)
    size = uint(8, 4)
    error_code = uint(12, 4)


MESSAGE_HEADER_SIZE = MessageHeader.SIZE


class _RefusedError(Exception):
    """A request that gets an error response."""

    def __init__(self, code: QgsError) -> None:
        super().__init__(code.name)
        self.code = code


def message(kind: int, payload: bytes, *, minor: int = NEWEST_MINOR, error: int = 0) -> bytes:
    """A message with its header."""
    header = MessageHeader()
    header.major, header.minor, header.type, header.error_code = MAJOR, minor, kind, error
    header.size = MessageHeader.SIZE + len(payload)
    return bytes(header) + payload


def _sized(*parts: bytes) -> bytes:
    """Lengths of the parts, four bytes each, then the parts."""
    return b"".join(len(part).to_bytes(4, "little") for part in parts) + b"".join(parts)


def _split(payload: bytes, count: int) -> list[bytes]:
    """The opposite of `_sized`; the parts must make up the payload exactly."""
    at = 4 * count
    sizes = [int.from_bytes(payload[4 * i : 4 * i + 4], "little") for i in range(count)]
    if len(payload) != at + sum(sizes):
        raise _RefusedError(QgsError.INVALID_SIZE)
    parts = []
    for size in sizes:
        parts.append(payload[at : at + size])
        at += size
    return parts


class QgsServer:
    """Answers QGS messages, one by one, in bytes: what stands behind a socket, or behind GetQuote."""

    def __init__(self, enclave: QuotingEnclave) -> None:
        self.enclave = enclave

    def answer(self, request: bytes) -> bytes:
        """The response; a bad request gets a response with an error code."""
        kind, minor = QgsType.GET_QUOTE_RESP, NEWEST_MINOR
        try:
            if len(request) < MessageHeader.SIZE:
                raise _RefusedError(QgsError.INVALID_SIZE)
            header = MessageHeader(request)
            if header.type in (QgsType.GET_COLLATERAL_REQ, QgsType.GET_PLATFORM_INFO_REQ):
                kind = QgsType(header.type + 1)
            if header.major != MAJOR or header.minor > NEWEST_MINOR:
                raise _RefusedError(QgsError.INVALID_VERSION)
            minor = header.minor
            if header.size != len(request):
                raise _RefusedError(QgsError.INVALID_SIZE)
            return message(kind, self._payload(header, request[MessageHeader.SIZE :]), minor=minor)
        except _RefusedError as refusal:
            return message(kind, b"", minor=minor, error=refusal.code)
        except SoftTdxError as error:
            log.warning("request refused: %s", error)
            return message(kind, b"", minor=minor, error=QgsError.UNEXPECTED)

    def _payload(self, header: MessageHeader, payload: bytes) -> bytes:
        if header.error_code:
            raise _RefusedError(QgsError.INVALID_CODE)
        if header.type == QgsType.GET_QUOTE_REQ:
            report, _ = _split(payload, 2)
            if not report:
                raise _RefusedError(QgsError.INVALID_PARAMETER)
            return _sized(b"", self.enclave.quote(report))
        if header.type == QgsType.GET_COLLATERAL_REQ:
            fmspc, ca = _split(payload, 2)
            return self._collateral(fmspc, ca)
        if header.type == QgsType.GET_PLATFORM_INFO_REQ:
            if payload:
                raise _RefusedError(QgsError.INVALID_SIZE)
            options, ids = self.enclave.pki.options, self.enclave.pki.ids
            versions = options.qe.isv_svn.to_bytes(2, "little") + options.tcb.pce_svn.to_bytes(2, "little")
            return versions + _sized(ids.qe_id, options.tcb.cpu_svn)
        raise _RefusedError(QgsError.INVALID_TYPE)

    def _collateral(self, fmspc: bytes, ca: bytes) -> bytes:
        pki = self.enclave.pki
        names = {b"platform": "platform", b"processor": "processor"}
        name = names.get(ca.rstrip(b"\0"))
        if fmspc != pki.options.tcb.fmspc or name is None:
            raise _RefusedError(QgsError.INVALID_PARAMETER)
        parts = (
            _text(pki.pck_crl_issuer_chain(name)),
            pki.root_crl,
            pki.pck_crls[name],
            _text(pki.tcb_issuer_chain),
            _text(pki.tcb_info_response()),
            _text(pki.tcb_issuer_chain),
            _text(pki.qe_identity_response()),
        )
        return b"".join(part.to_bytes(2, "little") for part in COLLATERAL_VERSION) + _sized(*parts)


def _text(value: str) -> bytes:
    return value.encode() + b"\0"


Address = Path | tuple[str, int]


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


def _read_exactly(stream: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = stream.recv(size - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


class _Handler(socketserver.BaseRequestHandler):
    """One client: requests until it hangs up, says something unreadable, or falls silent."""

    def handle(self) -> None:
        stream: socket.socket = self.request
        server = self.server
        assert isinstance(server, _Server)
        stream.settimeout(server.timeout_s)
        try:
            while True:
                size = int.from_bytes(_read_exactly(stream, LENGTH_PREFIX), "big")
                if not MessageHeader.SIZE <= size <= MAX_MESSAGE:
                    log.warning("a client announced a message of %d bytes", size)
                    return
                answer = server.qgs.answer(_read_exactly(stream, size))
                stream.sendall(len(answer).to_bytes(LENGTH_PREFIX, "big") + answer)
        except (OSError, EOFError):
            return


class _Server(socketserver.ThreadingMixIn):
    """What the Unix and the TCP server share: a thread a client, and a bound on their number."""

    daemon_threads = True
    block_on_close = False
    qgs: QgsServer
    timeout_s: float
    _slots: threading.BoundedSemaphore

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)  # type: ignore[attr-defined]  # of the server it is mixed into
            return
        super().process_request(request, client_address)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()


class _TcpServer(_Server, socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = 128


class _UnixServer(_Server, socketserver.UnixStreamServer):
    request_queue_size = 128


class QgsListener:
    """A QGS on a Unix socket or a TCP port; `start` serves in a thread, `serve_forever` in this one."""

    def __init__(self, enclave: QuotingEnclave, address: Address, *, timeout_s: float = TIMEOUT) -> None:
        self._path = address if isinstance(address, Path) else None
        try:
            if isinstance(address, Path):
                _remove_stale(address)
                self._server: _TcpServer | _UnixServer = _UnixServer(str(address), _Handler)
            else:
                self._server = _TcpServer(address, _Handler)
        except (OSError, OverflowError) as error:
            raise ServiceUnavailableError(f"the quoting service cannot listen on {address}: {error}") from None
        self._server.qgs = QgsServer(enclave)
        self._server.timeout_s = timeout_s
        self._server._slots = threading.BoundedSemaphore(MAX_CLIENTS)
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

    def start(self) -> QgsListener:
        """Serve in a thread of its own."""
        self._thread = threading.Thread(target=self.serve_forever, name="softtdx-qgs", daemon=True)
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

    def __enter__(self) -> QgsListener:
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


class QgsClient:
    """Asks a QGS, one connection a request."""

    def __init__(self, address: Address, *, timeout_s: float = TIMEOUT) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def request(self, data: bytes) -> bytes:
        """Send a message, return the response's payload; raises `ServiceUnavailableError` or `MalformedError`."""
        try:
            with self._connect() as stream:
                stream.sendall(len(data).to_bytes(LENGTH_PREFIX, "big") + data)
                size = int.from_bytes(_read_exactly(stream, LENGTH_PREFIX), "big")
                if not MessageHeader.SIZE <= size <= MAX_MESSAGE:
                    raise MalformedError(f"the quoting service announced a message of {size} bytes")
                answer = _read_exactly(stream, size)
        except (OSError, EOFError) as error:
            reason = str(error) or "it hung up"
            raise ServiceUnavailableError(f"no answer from the quoting service at {self.address}: {reason}") from None
        header = MessageHeader(answer)
        if header.size != size or header.major != MAJOR:
            raise MalformedError("the quoting service's answer has a header that does not fit it")
        if header.error_code:
            known = {int(code): code.name for code in QgsError}
            name = known.get(header.error_code, "unknown")
            raise MalformedError(f"the quoting service refused: error {header.error_code:#x} ({name})")
        return answer[MessageHeader.SIZE :]

    def _connect(self) -> socket.socket:
        if not isinstance(self.address, Path):
            return socket.create_connection(self.address, self.timeout_s)
        stream = socket.socket(socket.AF_UNIX)
        stream.settimeout(self.timeout_s)
        try:
            stream.connect(str(self.address))
        except OSError:
            stream.close()
            raise
        return stream

    def quote(self, tdreport: bytes) -> bytes:
        """A quote of the TDREPORT."""
        payload = self.request(message(QgsType.GET_QUOTE_REQ, _sized(tdreport, b"")))
        try:
            return _split(payload, 2)[1]
        except _RefusedError:
            raise MalformedError("the quoting service's answer is not a quote") from None
