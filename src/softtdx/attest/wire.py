"""Fixed layouts over bytes: a bounded reader, and dataclasses whose fields say where they stand.

`Layout` is the base of every fixed-size structure of this floor. A subclass lists its fields in order;
`raw(n)` is `n` bytes, `uint(n)` a little-endian unsigned integer of `n` bytes, `zero(n)` reserved bytes,
which are kept as they came, so that parsing and serialising is the identity on any input of the right length.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, fields
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


UINT_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True)
class Layout:
    """A structure of fixed size made of byte strings and little-endian integers."""

    _form: ClassVar[struct.Struct]
    _names: ClassVar[tuple[str, ...]]

    @classmethod
    def form(cls) -> struct.Struct:
        """The structure as `struct` packs it; made once a class."""
        if "_form" not in cls.__dict__:
            items = fields(cls)
            codes = [
                UINT_CODES[item.metadata["size"]] if item.metadata["kind"] == "uint" else f"{item.metadata['size']}s"
                for item in items
            ]
            cls._form = struct.Struct("<" + "".join(codes))
            cls._names = tuple(item.name for item in items)
        return cls._form

    @classmethod
    def size(cls) -> int:
        """The structure's length in bytes."""
        return cls.form().size

    @classmethod
    def offset(cls, name: str) -> int:
        """Where the field of that name begins."""
        at = 0
        for item in fields(cls):
            if item.name == name:
                return at
            at += int(item.metadata["size"])
        raise MalformedError(f"{cls.__name__} has no field {name!r}")

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads the structure from exactly `size()` bytes; raises `MalformedError` on any other length."""
        form = cls.form()
        if len(data) != form.size:
            raise MalformedError(f"{cls.__name__} is {form.size} bytes, this is {len(data)}")
        # What `struct` unpacks has every field's size, so there is nothing for __post_init__ to check.
        self = object.__new__(cls)
        self.__dict__.update(zip(cls._names, form.unpack(data), strict=True))
        return self

    def __post_init__(self) -> None:
        for item in fields(self):
            value, size = getattr(self, item.name), item.metadata["size"]
            if item.metadata["kind"] == "uint":
                if not 0 <= value < 1 << (8 * size):
                    raise MalformedError(f"{type(self).__name__}.{item.name} = {value:#x} is over {size} bytes")
            elif len(value) != size:
                raise MalformedError(f"{type(self).__name__}.{item.name} is {size} bytes, this is {len(value)}")

    def to_bytes(self) -> bytes:
        """The structure as it lies in memory."""
        form = self.form()
        return form.pack(*map(vars(self).__getitem__, self._names))

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
