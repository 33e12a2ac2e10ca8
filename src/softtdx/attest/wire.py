"""Fixed layouts over bytes: a bounded reader, and dataclasses whose fields say where they stand.

`Layout` is the base of every fixed-size structure of this floor. A subclass lists its fields in order;
`raw(n)` is `n` bytes, `uint(n)` a little-endian unsigned integer of `n` bytes, `zero(n)` reserved bytes,
which are kept as they came, so that parsing and serialising is the identity on any input of the right length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Self

from softtdx.attest.errors import MalformedError

__all__ = ["Layout", "Reader", "raw", "uint", "zero"]


def raw(size: int) -> Any:
    """A field of `size` bytes, all zero unless given."""
    return field(default=bytes(size), metadata={"size": size, "kind": "raw"})


def uint(size: int, default: int = 0) -> Any:
    """An unsigned little-endian integer of `size` bytes."""
    return field(default=default, metadata={"size": size, "kind": "uint"})


def zero(size: int) -> Any:
    """Reserved bytes: zero when we build the structure, and kept as they are when we parse one."""
    return field(default=bytes(size), metadata={"size": size, "kind": "zero"}, repr=False)


@dataclass(frozen=True)
class Layout:
    """A structure of fixed size made of byte strings and little-endian integers."""

    SIZE: ClassVar[int] = 0

    @classmethod
    def layout(cls) -> Iterator[tuple[Field[Any], int]]:
        """Each field with its offset in bytes."""
        at = 0
        for item in fields(cls):
            yield item, at
            at += item.metadata["size"]

    @classmethod
    def size(cls) -> int:
        """The structure's length in bytes."""
        if not cls.__dict__.get("SIZE"):
            cls.SIZE = sum(item.metadata["size"] for item in fields(cls))
        return cls.SIZE

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads the structure from exactly `size()` bytes; raises `MalformedError` on any other length."""
        if len(data) != cls.size():
            raise MalformedError(f"{cls.__name__} is {cls.size()} bytes, this is {len(data)}")
        values: dict[str, Any] = {}
        for item, at in cls.layout():
            chunk = bytes(data[at : at + item.metadata["size"]])
            values[item.name] = int.from_bytes(chunk, "little") if item.metadata["kind"] == "uint" else chunk
        return cls(**values)

    def __post_init__(self) -> None:
        for item in fields(self):
            value, size = getattr(self, item.name), item.metadata["size"]
            if item.metadata["kind"] == "uint":
                if not 0 <= value < 1 << (8 * size):
                    raise MalformedError(f"{type(self).__name__}.{item.name} = {value:#x} does not fit {size} bytes")
            elif len(value) != size:
                raise MalformedError(f"{type(self).__name__}.{item.name} is {size} bytes, this is {len(value)}")

    def to_bytes(self) -> bytes:
        """The structure as it lies in memory."""
        return b"".join(
            getattr(self, item.name).to_bytes(item.metadata["size"], "little")
            if item.metadata["kind"] == "uint"
            else getattr(self, item.name)
            for item in fields(self)
        )

    def describe(self) -> dict[str, str | int]:
        """Every field, bytes as hex; a reserved one only when it is not zero."""
        out: dict[str, str | int] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata["kind"] == "zero" and not any(value):
                continue
            out[item.name] = value if isinstance(value, int) else value.hex()
        return out


class Reader:
    """Reads forward through bytes and never past their end."""

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.at = 0
        self.what = what

    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.data) - self.at

    def take(self, size: int, field_name: str) -> bytes:
        """The next `size` bytes."""
        if size < 0 or size > self.left():
            raise MalformedError(
                f"{self.what}: {field_name} at byte {self.at} needs {size} bytes, {self.left()} are left"
            )
        chunk = self.data[self.at : self.at + size]
        self.at += size
        return bytes(chunk)

    def uint(self, size: int, field_name: str) -> int:
        """The next `size` bytes as a little-endian unsigned integer."""
        return int.from_bytes(self.take(size, field_name), "little")
