"""The event stream as a file: one JSON object a line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from threading import Lock
from typing import Any

from softtdx.abi.exits import ExitReason
from softtdx.abi.leaves import SEAMLDR_CALL, SeamcallLeaf, SeamldrLeaf, TdcallLeaf
from softtdx.errors import SoftTdxError
from softtdx.hw import Event, EventStream

__all__ = ["write_trace"]


@contextmanager
def write_trace(events: EventStream, path: str | Path | None) -> Iterator[None]:
    """Write every event of the block to `path`; nothing if it is None. SoftTdxError if it cannot be written."""
    if path is None:
        yield
        return
    try:
        file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise SoftTdxError(f"cannot write the trace {str(path)!r}: {error.strerror}") from error
    lock = Lock()
    count = 0

    def write(event: Event) -> None:
        nonlocal count
        with lock:
            row = {"n": count, "kind": event.kind, "lp": event.lp} | _named(event) | event.data
            file.write(json.dumps(row, default=_plain) + "\n")
            count += 1

    end = events.subscribe(write)
    try:
        yield
    finally:
        end()
        with lock:
            file.close()


_LEAVES: dict[str, dict[int, str]] = {
    "seamcall": {int(leaf): leaf.mnemonic for leaf in SeamcallLeaf},
    "tdcall": {int(leaf): leaf.mnemonic for leaf in TdcallLeaf},
    "seamldr": {int(leaf) & ~SEAMLDR_CALL: leaf.mnemonic for leaf in SeamldrLeaf},
}
_REASONS = {int(reason): reason.name for reason in ExitReason}


def _named(event: Event) -> dict[str, str]:
    """What the numbers of an event are called."""
    name = _LEAVES.get(event.kind, {}).get(event.data.get("leaf", -1)) or _REASONS.get(event.data.get("reason", -1))
    return {"name": name} if name is not None else {}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, Enum):
        return value.name
    return str(value)
