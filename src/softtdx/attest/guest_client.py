"""For an application: its TD's report and quote, by whatever interface there is.

In a TD these are Linux's own; outside one, SOFTTDX_GUEST_API names the service that stands in for them
(`softtdx guest-api serve`), so that the same code runs in both.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from pathlib import Path

import httpx

from softtdx.abi.structs import REPORTDATA_SIZE, TdReport
from softtdx.attest.errors import MalformedError, ServiceUnavailableError

__all__ = ["API_VARIABLE", "get_quote", "get_tdreport"]

API_VARIABLE = "SOFTTDX_GUEST_API"
TSM = Path("/sys/kernel/config/tsm/report")
DEVICE = Path("/dev/tdx_guest")
TIMEOUT = 60.0

# TDX_CMD_GET_REPORT0: _IOWR('T', 1, struct tdx_report_req) (include/uapi/linux/tdx-guest.h).
GET_REPORT0 = 3 << 30 | (REPORTDATA_SIZE + TdReport.SIZE) << 16 | ord("T") << 8 | 1


def get_tdreport(report_data: bytes) -> bytes:
    """The TDREPORT of the TD this runs in, with 64 bytes of report data."""
    _check(report_data)
    if url := os.environ.get(API_VARIABLE):
        with httpx.Client(timeout=TIMEOUT) as client:
            return _call(client, "POST", f"{url.rstrip('/')}/dev/tdx_guest", report_data)
    request = bytearray(report_data + bytes(TdReport.SIZE))
    try:
        with DEVICE.open("r+b", buffering=0) as device:
            fcntl.ioctl(device, GET_REPORT0, request)
    except OSError as error:
        raise ServiceUnavailableError(_not_here(DEVICE, error)) from None
    return bytes(request[REPORTDATA_SIZE:])


def get_quote(report_data: bytes) -> bytes:
    """A quote of the TD this runs in, with 64 bytes of report data."""
    _check(report_data)
    name = f"softtdx-{uuid.uuid4().hex}"
    if url := os.environ.get(API_VARIABLE):
        return _quote_by_http(f"{url.rstrip('/')}{TSM}/{name}", report_data)
    entry = TSM / name
    try:
        entry.mkdir()
        try:
            (entry / "inblob").write_bytes(report_data)
            return (entry / "outblob").read_bytes()
        finally:
            with contextlib.suppress(OSError):
                entry.rmdir()
    except OSError as error:
        raise ServiceUnavailableError(_not_here(TSM, error)) from None


def _quote_by_http(entry: str, report_data: bytes) -> bytes:
    with httpx.Client(timeout=TIMEOUT) as client:
        _call(client, "PUT", entry)
        try:
            _call(client, "PUT", f"{entry}/inblob", report_data)
            return _call(client, "GET", f"{entry}/outblob")
        finally:
            with contextlib.suppress(ServiceUnavailableError):
                _call(client, "DELETE", entry)


def _call(client: httpx.Client, method: str, url: str, data: bytes | None = None) -> bytes:
    try:
        answer = client.request(method, url, content=data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServiceUnavailableError(f"no answer from {url} ({API_VARIABLE}): {error}") from None
    if answer.is_error:
        raise ServiceUnavailableError(f"{method} {url}: {answer.text[:100]}")
    return answer.content


def _check(report_data: bytes) -> None:
    if len(report_data) != REPORTDATA_SIZE:
        raise MalformedError(f"report data is {REPORTDATA_SIZE} bytes, this is {len(report_data)}")


def _not_here(what: Path, error: OSError) -> str:
    return f"{what}: {error.strerror}; this is no TD (set {API_VARIABLE} to the URL of `softtdx guest-api serve`)"
