"""A TD's attestation interfaces for programs that run outside one: the data of configfs tsm and of /dev/tdx_guest.

Over HTTP, with the paths, rules and errors of Linux (Documentation/ABI/testing/configfs-tsm, drivers/virt/coco):

    PUT    /sys/kernel/config/tsm/report/NAME             mkdir
    PUT    /sys/kernel/config/tsm/report/NAME/inblob      64 bytes of report data
    GET    /sys/kernel/config/tsm/report/NAME/outblob     the quote
    GET    /sys/kernel/config/tsm/report/NAME/provider    tdx_guest
    GET    /sys/kernel/config/tsm/report/NAME/generation  counts writes
    DELETE /sys/kernel/config/tsm/report/NAME             rmdir
    POST   /dev/tdx_guest                                 TDX_CMD_GET_REPORT0: 64 bytes in, the TDREPORT out

An error is the status code nearest to it, with the errno's name as the text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from softtdx.abi.structs import REPORTDATA_SIZE
from softtdx.attest.http_service import HttpListener
from softtdx.errors import SoftTdxError

__all__ = ["DEFAULT_PORT", "GuestApiListener", "TsmReports", "make_app"]

DEFAULT_PORT = 8082
TSM = "/sys/kernel/config/tsm/report"
PROVIDER = "tdx_guest"
MAX_ENTRIES = 1024
MAX_NAME = 255
BLOB = "application/octet-stream"
STATUSES = {"EINVAL": 400, "ENOENT": 404, "EEXIST": 409, "EIO": 502, "ENOSPC": 507}


class _ErrnoError(Exception):
    """What the kernel would answer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass
class _Entry:
    """A report directory: `written` counts writes to its attributes, `read` is the count its outblob is for."""

    inblob: bytes = b""
    outblob: bytes = b""
    written: int = 0
    read: int = 0


class TsmReports:
    """The report directories of configfs tsm, as one TD has them. Safe to use from several threads."""

    def __init__(self, report: Callable[[bytes], bytes], quote: Callable[[bytes], bytes]) -> None:
        """`report` makes the TD's TDREPORT of 64 bytes of report data, `quote` a quote of a TDREPORT."""
        self._report, self._quote = report, quote
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def tdreport(self, report_data: bytes) -> bytes:
        """TDX_CMD_GET_REPORT0."""
        if len(report_data) != REPORTDATA_SIZE:
            raise _ErrnoError("EINVAL")
        try:
            return self._report(report_data)
        except SoftTdxError:
            raise _ErrnoError("EIO") from None

    def make(self, name: str) -> None:
        """Mkdir."""
        with self._lock:
            if name in self._entries:
                raise _ErrnoError("EEXIST")
            if len(self._entries) >= MAX_ENTRIES or len(name.encode()) > MAX_NAME:
                raise _ErrnoError("ENOSPC")
            self._entries[name] = _Entry()

    def remove(self, name: str) -> None:
        """Rmdir."""
        with self._lock:
            self._find(name)
            del self._entries[name]

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise _ErrnoError("ENOENT")
        return self._entries[name]

    def write_inblob(self, name: str, data: bytes) -> None:
        """Set the report data; the outblob is then of another generation."""
        if not 1 <= len(data) <= REPORTDATA_SIZE:
            raise _ErrnoError("EINVAL")
        with self._lock:
            entry = self._find(name)
            entry.inblob = data
            entry.written += 1

    def generation(self, name: str) -> int:
        """How many writes there were."""
        with self._lock:
            return self._find(name).written

    def read_outblob(self, name: str) -> bytes:
        """The quote; made anew only when something was written since the last."""
        with self._lock:
            entry = self._find(name)
            if not entry.inblob:
                raise _ErrnoError("EINVAL")
            if entry.read != entry.written:
                entry.outblob = self._make_quote(entry.inblob)
                entry.read = entry.written
            return entry.outblob

    def _make_quote(self, report_data: bytes) -> bytes:
        report = self.tdreport(report_data)
        try:
            return self._quote(report)
        except SoftTdxError:
            raise _ErrnoError("EIO") from None


class _Api:
    def __init__(self, reports: TsmReports) -> None:
        self.reports = reports

    async def tdx_guest(self, request: Request) -> Response:
        return Response(await run_in_threadpool(self.reports.tdreport, await _body(request)), media_type=BLOB)

    async def directory(self, request: Request) -> Response:
        name = request.path_params["name"]
        (self.reports.make if request.method == "PUT" else self.reports.remove)(name)
        return Response(status_code=204)

    async def inblob(self, request: Request) -> Response:
        self.reports.write_inblob(request.path_params["name"], await _body(request))
        return Response(status_code=204)

    async def outblob(self, request: Request) -> Response:
        name = request.path_params["name"]
        return Response(await run_in_threadpool(self.reports.read_outblob, name), media_type=BLOB)

    async def provider(self, request: Request) -> Response:
        self.reports.generation(request.path_params["name"])
        return PlainTextResponse(PROVIDER + "\n")

    async def generation(self, request: Request) -> Response:
        return PlainTextResponse(f"{self.reports.generation(request.path_params['name'])}\n")


async def _body(request: Request) -> bytes:
    """The request's body, which is never larger than report data may be."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > REPORTDATA_SIZE:
            raise _ErrnoError("EINVAL")
    return data


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, _ErrnoError)
    return PlainTextResponse(error.name, STATUSES[error.name])


def make_app(reports: TsmReports) -> Starlette:
    """The service as an ASGI application."""
    api = _Api(reports)
    entry = f"{TSM}/{{name}}"
    return Starlette(
        routes=[
            Route("/dev/tdx_guest", api.tdx_guest, methods=["POST"]),
            Route(entry, api.directory, methods=["PUT", "DELETE"]),
            Route(f"{entry}/inblob", api.inblob, methods=["PUT"]),
            Route(f"{entry}/outblob", api.outblob, methods=["GET"]),
            Route(f"{entry}/provider", api.provider, methods=["GET"]),
            Route(f"{entry}/generation", api.generation, methods=["GET"]),
        ],
        exception_handlers={_ErrnoError: _refuse},
    )


class GuestApiListener(HttpListener):
    """The service on a TCP port."""

    def __init__(self, reports: TsmReports, host: str = "127.0.0.1", port: int = DEFAULT_PORT) -> None:
        super().__init__(make_app(reports), "guest API", host, port)
