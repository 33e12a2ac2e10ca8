"""The quote generation service: QGS messages, their server on a socket, and a client.

Messages as in Intel's `qgs_msg_lib.h` (DCAP, TDX QGS), version 1.0 and 1.1; on a stream each is preceded by its length
in 4 bytes, big endian, as QEMU and Intel's service have it.
"""

from __future__ import annotations

import logging
import socket
from enum import IntEnum

from softtdx.abi.wire import Wire, uint
from softtdx.attest.errors import MalformedError, ServiceUnavailableError
from softtdx.attest.quoting import QuotingEnclave
from softtdx.attest.sockets import TIMEOUT, Address, StreamListener, connect, parse_address, read_exactly
from softtdx.errors import SoftTdxError

__all__ = ["MESSAGE_HEADER_SIZE", "QgsClient", "QgsError", "QgsListener", "QgsServer", "QgsType", "parse_address"]

log = logging.getLogger("softtdx.qgs")

MAJOR = 1
NEWEST_MINOR = 1
MAX_MESSAGE = 1 << 16
LENGTH_PREFIX = 4
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


class QgsListener(StreamListener):
    """A QGS on a Unix socket or a TCP port; `start` serves in a thread, `serve_forever` in this one."""

    def __init__(self, enclave: QuotingEnclave, address: Address, *, timeout_s: float = TIMEOUT) -> None:
        self._qgs = QgsServer(enclave)
        super().__init__("quoting service", self._serve, address, timeout_s=timeout_s)

    def _serve(self, stream: socket.socket) -> None:
        """One client: requests until it hangs up, says something unreadable, or falls silent."""
        while True:
            size = int.from_bytes(read_exactly(stream, LENGTH_PREFIX), "big")
            if not MessageHeader.SIZE <= size <= MAX_MESSAGE:
                log.warning("a client announced a message of %d bytes", size)
                return
            answer = self._qgs.answer(read_exactly(stream, size))
            stream.sendall(len(answer).to_bytes(LENGTH_PREFIX, "big") + answer)


class QgsClient:
    """Asks a QGS, one connection a request."""

    def __init__(self, address: Address, *, timeout_s: float = TIMEOUT) -> None:
        self.address = address
        self.timeout_s = timeout_s

    def request(self, data: bytes) -> bytes:
        """Send a message, return the response's payload; raises `ServiceUnavailableError` or `MalformedError`."""
        try:
            with connect(self.address, self.timeout_s) as stream:
                stream.sendall(len(data).to_bytes(LENGTH_PREFIX, "big") + data)
                size = int.from_bytes(read_exactly(stream, LENGTH_PREFIX), "big")
                if not MessageHeader.SIZE <= size <= MAX_MESSAGE:
                    raise MalformedError(f"the quoting service announced a message of {size} bytes")
                answer = read_exactly(stream, size)
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

    def quote(self, tdreport: bytes) -> bytes:
        """A quote of the TDREPORT."""
        payload = self.request(message(QgsType.GET_QUOTE_REQ, _sized(tdreport, b"")))
        try:
            return _split(payload, 2)[1]
        except _RefusedError:
            raise MalformedError("the quoting service's answer is not a quote") from None
