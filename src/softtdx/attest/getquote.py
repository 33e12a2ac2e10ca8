"""TDG.VP.VMCALL<GetQuote> as the host serves it: the shared buffer, requests in flight, their outcome.

GHCI specification, "TDG.VP.VMCALL<GetQuote>". A TD puts a TDREPORT behind `GetQuoteHeader` in shared memory; the call
returns at once with the header's status IN_FLIGHT; later the quote stands there, the status says how it went, and the
event-notify interrupt is due. A request is also taken in the framing of Intel's attestation library: a 4-byte
big-endian length and a QGS message, answered alike.

How long a request is in flight is the VMM's business: it calls `run_pending` when it wants (the same moment in every
run keeps a run reproducible), or starts `GetQuote` with `threaded`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from softtdx.abi.ghci import GET_QUOTE_VERSION, GetQuoteHeader, QuoteStatus, VmcallStatus
from softtdx.abi.structs import TdReport
from softtdx.attest.errors import ServiceUnavailableError
from softtdx.attest.qgs import MESSAGE_HEADER_SIZE, QgsServer
from softtdx.errors import SoftTdxError

__all__ = ["MAX_BUFFER", "MAX_IN_FLIGHT", "GetQuote", "SharedMemory"]

PAGE = 4096
MAX_BUFFER = 128 * 1024
"""The largest buffer taken, as in QEMU: no TD can make the host hold more."""
MAX_IN_FLIGHT = 16
LENGTH_PREFIX = 4


class SharedMemory(Protocol):
    """The TD's shared memory as the host reaches it. Both raise `SoftTdxError` for a GPA that is not there."""

    def read(self, gpa: int, size: int) -> bytes:
        """`size` bytes from `gpa`."""

    def write(self, gpa: int, data: bytes) -> None:
        """The bytes to `gpa`."""


@dataclass(frozen=True)
class _Request:
    memory: SharedMemory
    gpa: int
    size: int
    data: bytes
    notify: Callable[[], None]


class GetQuote:
    """Serves the GetQuote calls of TDs.

    `quote` makes a quote of a TDREPORT (`QuotingEnclave.quote`, or a `QgsClient`'s); what it raises decides the status:
    `ServiceUnavailableError` is SERVICE_UNAVAILABLE, any other `SoftTdxError` is ERROR.
    """

    def __init__(
        self,
        quote: Callable[[bytes], bytes],
        *,
        qgs: QgsServer | None = None,
        threaded: bool = False,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._quote = quote
        self._qgs = qgs
        self._max = max_in_flight
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight = 0
        self._worker: threading.Thread | None = None
        if threaded:
            self._worker = threading.Thread(target=self._work, name="softtdx-getquote", daemon=True)
            self._worker.start()

    @property
    def threaded(self) -> bool:
        """Whether a worker of its own answers; otherwise someone calls `run_pending`."""
        return self._worker is not None

    @property
    def in_flight(self) -> int:
        """Requests taken and not yet answered."""
        return self._in_flight

    def call(self, memory: SharedMemory, gpa: int, size: int, notify: Callable[[], None]) -> VmcallStatus:
        """R12 and R13 of the hypercall: the buffer's GPA, without the shared bit, and its size in bytes.

        Returns what R10 gets. `notify` is called after the buffer is final: the event-notify interrupt's moment.
        """
        if gpa % PAGE or size % PAGE:
            return VmcallStatus.ALIGN_ERROR
        if not PAGE <= size <= MAX_BUFFER:
            return VmcallStatus.INVALID_OPERAND
        try:
            header = GetQuoteHeader.parse(memory.read(gpa, GetQuoteHeader.SIZE))
            if header.version != GET_QUOTE_VERSION or not 0 < header.in_len <= size - GetQuoteHeader.SIZE:
                return VmcallStatus.INVALID_OPERAND
            data = memory.read(gpa + GetQuoteHeader.SIZE, header.in_len)
            with self._lock:
                if self._in_flight >= self._max:
                    return VmcallStatus.RETRY
                self._in_flight += 1
            header.status, header.out_len = QuoteStatus.IN_FLIGHT, 0
            memory.write(gpa, bytes(header))
        except SoftTdxError:
            return VmcallStatus.INVALID_OPERAND
        self._requests.put(_Request(memory, gpa, size, data, notify))
        return VmcallStatus.SUCCESS

    def run_pending(self) -> int:
        """Answer every request in flight, in the order they came; returns how many. Not for a threaded instance."""
        done = 0
        while True:
            try:
                request = self._requests.get_nowait()
            except queue.Empty:
                return done
            if request is not None:
                self._answer(request)
                done += 1

    def close(self) -> None:
        """Stop the worker, after what is in flight; requests made afterwards stay in flight."""
        if self._worker is not None:
            self._requests.put(None)
            self._worker.join()
            self._worker = None

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            self._answer(request)

    def _answer(self, request: _Request) -> None:
        status, output = self._produce(request.data)
        if len(output) > request.size - GetQuoteHeader.SIZE:
            status, output = QuoteStatus.ERROR, b""
        header = GetQuoteHeader()
        header.version, header.status = GET_QUOTE_VERSION, status
        header.in_len, header.out_len = len(request.data), len(output)
        try:
            # The status goes last: a TD that polls it must not see success before the quote.
            if output:
                request.memory.write(request.gpa + GetQuoteHeader.SIZE, output)
            request.memory.write(request.gpa, bytes(header))
        except SoftTdxError:
            # The TD took its buffer away. There is nowhere to say so, and nobody to blame but the TD.
            pass
        finally:
            with self._lock:
                self._in_flight -= 1
        request.notify()

    def _produce(self, data: bytes) -> tuple[QuoteStatus, bytes]:
        try:
            if len(data) == TdReport.SIZE:
                return QuoteStatus.SUCCESS, self._quote(data)
            framed = int.from_bytes(data[:LENGTH_PREFIX], "big") == len(data) - LENGTH_PREFIX
            if framed and len(data) >= LENGTH_PREFIX + MESSAGE_HEADER_SIZE and self._qgs is not None:
                answer = self._qgs.answer(data[LENGTH_PREFIX:])
                return QuoteStatus.SUCCESS, len(answer).to_bytes(LENGTH_PREFIX, "big") + answer
        except ServiceUnavailableError:
            return QuoteStatus.SERVICE_UNAVAILABLE, b""
        except SoftTdxError:
            pass
        return QuoteStatus.ERROR, b""
