"""What the attestation commands share: files, hexadecimal, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from softtdx.attest.errors import MalformedError

__all__ = ["hex_bytes", "json_option", "read_file", "show", "write_file"]

_F = TypeVar("_F", bound=Callable[..., Any])
_MAX_FILE = 64 << 20


def json_option(function: _F) -> _F:
    """`--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def read_file(path: Path) -> bytes:
    """A file of at most 64 MiB."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise MalformedError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise MalformedError(f"{path} is larger than {_MAX_FILE >> 20} MiB")
    return data


def write_file(path: Path, data: bytes) -> None:
    """The bytes to a file."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise MalformedError(f"{path} cannot be written: {error.strerror}") from None


def hex_bytes(text: str, what: str, size: int | None = None) -> bytes:
    """Bytes that a user wrote in hexadecimal."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise MalformedError(f"{what} {text!r} is not hexadecimal") from None
    if size is not None and len(data) != size:
        raise MalformedError(f"{what} {text} is {len(data)} bytes, not {size}")
    return data


def _lines(value: Any, indent: int = 0) -> Iterable[str]:
    """Nested mappings and lists as indented lines."""
    pad = " " * indent
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        nested = isinstance(item, Mapping) or (isinstance(item, list) and any(isinstance(i, Mapping) for i in item))
        if nested and item:
            yield f"{pad}{key}:"
            yield from _lines(item, indent + 2)
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            yield f"{pad}{key}: {text}"


def show(value: Mapping[str, Any], as_json: bool) -> None:
    """Print as JSON, or as indented lines."""
    if as_json:
        click.echo(json.dumps(value, indent=2))
    else:
        click.echo("\n".join(_lines(value)))
