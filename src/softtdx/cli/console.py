"""What the commands that run a machine share: sizes, the live console, the report of a run."""

import sys
from typing import Any

import click
from rich.console import Console

from softtdx.attest.tdreport import parse_tdreport
from softtdx.hw import EventStream
from softtdx.vmm.machine import MachineResult
from softtdx.vmm.quoting import QuotingService

__all__ = ["SIZE", "LiveConsole", "result_json", "rich_console", "rtmrs"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _Size(click.ParamType[int]):
    """A size in bytes: 64M, 1G, 512K."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().upper().removesuffix("IB").removesuffix("B")
        number, unit = (text[:-1], text[-1]) if text and text[-1] in _UNITS else (text, "")
        if not number.isdecimal() or not number.isascii() or len(number) > 15:
            self.fail(f"{value!r} is not a size; write 64M, 1G or 512K", param, ctx)
        return int(number) * _UNITS[unit]


SIZE = _Size()


class LiveConsole:
    """Serial output as it comes, whole UTF-8 characters only."""

    def __init__(self, prefix: str = "") -> None:
        """`prefix` stands before each line."""
        self._prefix = prefix
        self._at_start = True

    def __call__(self, data: bytes) -> None:
        """Print bytes of the guest's serial port. Control characters other than newline and tab are not passed on."""
        out = sys.stdout
        for byte in data:
            if byte == 0x0D or (byte < 0x20 and byte not in (0x09, 0x0A)) or byte == 0x7F:
                continue
            if self._at_start and self._prefix:
                out.write(self._prefix)
            out.write(chr(byte) if byte < 0x80 else "\ufffd")
            self._at_start = byte == 0x0A
        out.flush()

    def finish(self) -> None:
        """End an open line."""
        if not self._at_start:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._at_start = True


def rich_console() -> Console:
    """Colours and width only on a terminal."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def rtmrs(quoting: QuotingService | None) -> list[str] | None:
    """The RTMRs in the last TDREPORT that the guest had quoted."""
    if quoting is None or quoting.last_report is None:
        return None
    info = parse_tdreport(quoting.last_report).td_info
    return [value.hex() for value in (info.rtmr0, info.rtmr1, info.rtmr2, info.rtmr3)]


def result_json(result: MachineResult, events: EventStream, quoting: QuotingService | None) -> dict[str, Any]:
    """A run as JSON keys."""
    return {
        "end": result.end.value,
        "guest_status": result.status,
        "message": result.message,
        "console": result.console.decode("utf-8", "replace"),
        "mrtd": result.mrtd.hex() if result.mrtd else None,
        "rtmrs": rtmrs(quoting),
        "quote_bytes": len(quoting.last_quote) if quoting and quoting.last_quote else None,
        "seamcalls": events.counts["seamcall"],
        "td_exits": sum(n for name, n in result.stats.items() if name.startswith("exits:")),
        "exits": {name.removeprefix("exits:"): n for name, n in sorted(result.stats.items()) if ":" in name},
        "guest_instructions": result.instructions,
        "undefined": result.undefined,
        "wall_s": round(result.wall_s, 4),
    }
