"""The base of every structure that crosses a wall: a table of fields laid over bytes.

A structure is a view. It lies over a fresh zeroed buffer, over given bytes (then read-only), or over any writable
buffer such as guest memory. Integers are little endian. Bytes that no field claims are reserved. Overlapping fields
and fields beyond the end are refused when the class is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

from softtdx.errors import SoftTdxError

__all__ = [
    "Array",
    "Bits",
    "Field",
    "LayoutError",
    "Part",
    "Raw",
    "UInt",
    "UInts",
    "Wire",
    "array",
    "bits",
    "part",
    "raw",
    "uint",
    "uints",
]

Buffer = bytes | bytearray | memoryview
_MAX_INTEGER_SIZE = 8


class LayoutError(SoftTdxError):
    """Bytes do not have the size or the reserved zeros of the structure they are read as."""


@dataclass(frozen=True)
class Field:
    """Where a field lies: what tests, documentation and dumps walk."""

    name: str
    at: int
    size: int
    count: int = 1

    @property
    def end(self) -> int:
        """The offset of the first byte after the field."""
        return self.at + self.size


class _Descriptor:
    """What all kinds of fields share: a place, and the name the class body gives."""

    def __init__(self, at: int, size: int, count: int = 1) -> None:
        self.at, self.size, self.count, self.name = at, size, count, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def misfit(self, wire: Wire, problem: str) -> LayoutError:
        """The exception for a value that this field cannot take."""
        return LayoutError(f"{type(wire).__name__}.{self.name}: {problem}")

    def field(self) -> Field:
        """What the structure's table of fields says of this one."""
        return Field(self.name, self.at, self.size, self.count)

    def bytes_of(self, wire: Wire) -> memoryview:
        """The bytes of this field in a structure."""
        return wire.view[self.at : self.at + self.size]


class UInt(_Descriptor):
    """A little-endian unsigned integer."""

    def __init__(self, at: int, size: int) -> None:
        if not 1 <= size <= _MAX_INTEGER_SIZE:
            raise TypeError(f"an integer field of {size} bytes")
        super().__init__(at, size)

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> int: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | int:
        if wire is None:
            return self
        view, at, size = wire.view, self.at, self.size
        if size <= 2:  # cheaper than a slice
            return view[at] if size == 1 else view[at] | view[at + 1] << 8
        return int.from_bytes(view[at : at + size], "little")

    def __set__(self, wire: Wire, value: int) -> None:
        try:
            encoded = int(value).to_bytes(self.size, "little")
        except OverflowError:
            raise self.misfit(wire, f"{value:#x} does not fit in {8 * self.size} bits") from None
        wire.view[self.at : self.at + self.size] = encoded


class Bits(_Descriptor):
    """Some bits of an integer field that the class declares before."""

    def __init__(self, of: UInt, low: int, width: int = 1) -> None:
        if low < 0 or width < 1 or low + width > 8 * of.size:
            raise TypeError(f"bits {low + width - 1}:{low} of an integer of {of.size} bytes")
        super().__init__(of.at, of.size)
        self.of, self.low, self.mask = of, low, (1 << width) - 1

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> int: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | int:
        if wire is None:
            return self
        return self.of.__get__(wire, owner) >> self.low & self.mask

    def __set__(self, wire: Wire, value: int) -> None:
        if not 0 <= value <= self.mask:
            raise self.misfit(wire, f"{value:#x} does not fit in {self.mask.bit_length()} bits")
        whole = self.of.__get__(wire, type(wire))
        self.of.__set__(wire, whole & ~(self.mask << self.low) | value << self.low)


class Raw(_Descriptor):
    """Bytes with no structure of their own."""

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> bytes: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | bytes:
        return self if wire is None else bytes(self.bytes_of(wire))

    def __set__(self, wire: Wire, value: Buffer) -> None:
        if len(value) != self.size:
            raise self.misfit(wire, f"{self.size} bytes, not {len(value)}")
        wire.view[self.at : self.at + self.size] = value


class UInts(_Descriptor):
    """An array of integers, read as a tuple and written as a whole."""

    def __init__(self, at: int, size: int, count: int) -> None:
        super().__init__(at, size * count, count)
        self.element = size

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> tuple[int, ...]: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | tuple[int, ...]:
        if wire is None:
            return self
        view, step = self.bytes_of(wire), self.element
        return tuple(int.from_bytes(view[i : i + step], "little") for i in range(0, self.size, step))

    def __set__(self, wire: Wire, values: tuple[int, ...] | list[int]) -> None:
        if len(values) != self.count:
            raise self.misfit(wire, f"{self.count} elements, not {len(values)}")
        try:
            encoded = b"".join(int(value).to_bytes(self.element, "little") for value in values)
        except OverflowError:
            raise self.misfit(wire, f"an element does not fit in {8 * self.element} bits") from None
        wire.view[self.at : self.at + self.size] = encoded


_W = TypeVar("_W", bound="Wire")


class Part(_Descriptor, Generic[_W]):
    """Another structure inside this one; reading it gives a view over the same bytes."""

    def __init__(self, at: int, kind: type[_W]) -> None:
        super().__init__(at, kind.SIZE)
        self.kind = kind

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> _W: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | _W:
        return self if wire is None else self.kind(self.bytes_of(wire))

    def __set__(self, wire: Wire, value: _W | Buffer) -> None:
        data = bytes(value)
        if len(data) != self.size:
            raise self.misfit(wire, f"{self.size} bytes, not {len(data)}")
        wire.view[self.at : self.at + self.size] = data


class Array(_Descriptor, Generic[_W]):
    """An array of structures: a tuple of views over the same bytes."""

    def __init__(self, at: int, kind: type[_W], count: int) -> None:
        super().__init__(at, kind.SIZE * count, count)
        self.kind = kind

    @overload
    def __get__(self, wire: None, owner: type) -> Self: ...
    @overload
    def __get__(self, wire: Wire, owner: type) -> tuple[_W, ...]: ...
    def __get__(self, wire: Wire | None, owner: type) -> Self | tuple[_W, ...]:
        if wire is None:
            return self
        view, step = self.bytes_of(wire), self.kind.SIZE
        return tuple(self.kind(view[i : i + step]) for i in range(0, self.size, step))


def uint(at: int, size: int) -> UInt:
    """An integer of `size` bytes at offset `at`."""
    return UInt(at, size)


def uints(at: int, size: int, count: int) -> UInts:
    """`count` integers of `size` bytes from offset `at`."""
    return UInts(at, size, count)


def bits(of: UInt, low: int, width: int = 1) -> Bits:
    """Bits `low + width - 1` to `low` of an integer field."""
    return Bits(of, low, width)


def raw(at: int, size: int) -> Raw:
    """`size` bytes at offset `at`."""
    return Raw(at, size)


def part(at: int, kind: type[_W]) -> Part[_W]:
    """A structure at offset `at`."""
    return Part(at, kind)


def array(at: int, kind: type[_W], count: int) -> Array[_W]:
    """`count` structures from offset `at`."""
    return Array(at, kind, count)


class Wire:
    """A structure of fixed size; subclasses name their size and fields.

    >>> class CmrInfo(Wire, size=16):
    ...     base = uint(0, 8)
    ...     size = uint(8, 8)
    """

    SIZE: ClassVar[int] = 0
    fields: ClassVar[tuple[Field, ...]] = ()
    view: memoryview

    __slots__ = ("view",)

    def __init_subclass__(cls, size: int, **kwargs: Any) -> None:
        """Collect the fields; overlaps and overruns are programming errors."""
        super().__init_subclass__(**kwargs)
        cls.SIZE = size
        found = [v.field() for v in vars(cls).values() if isinstance(v, _Descriptor) and not isinstance(v, Bits)]
        cls.fields = tuple(sorted(found, key=lambda field: field.at))
        end = 0
        for field in cls.fields:
            if field.at < end or field.end > size:
                raise TypeError(f"{cls.__name__}.{field.name} at {field.at} overlaps or overruns the structure")
            end = field.end

    def __init__(self, buffer: Buffer | None = None, at: int = 0) -> None:
        """Lie over `buffer` from offset `at`, or over a new zeroed buffer."""
        if buffer is None:
            self.view = memoryview(bytearray(self.SIZE))
            return
        view = memoryview(buffer).cast("B")
        if at < 0 or at + self.SIZE > len(view):
            raise LayoutError(f"{type(self).__name__} takes {self.SIZE} bytes; {len(view) - at} are there")
        self.view = view[at : at + self.SIZE]

    @classmethod
    def parse(cls, data: Buffer, *, strict: bool = True) -> Self:
        """Read exactly these bytes; with `strict`, reserved bytes must be zero. The result is a writable copy."""
        if len(data) != cls.SIZE:
            raise LayoutError(f"{cls.__name__} has {cls.SIZE} bytes, not {len(data)}")
        wire = cls(bytearray(data))
        if strict:
            wire.check_reserved()
        return wire

    @classmethod
    def reserved(cls) -> tuple[tuple[int, int], ...]:
        """The ranges (offset, size) that no field claims."""
        gaps, end = [], 0
        for field in cls.fields:
            if field.at > end:
                gaps.append((end, field.at - end))
            end = field.end
        if end < cls.SIZE:
            gaps.append((end, cls.SIZE - end))
        return tuple(gaps)

    def reserved_is_zero(self) -> bool:
        """Whether all reserved bytes are zero, also those of structures inside."""
        if any(any(self.view[at : at + size]) for at, size in self.reserved()):
            return False
        return all(inner.reserved_is_zero() for inner in self._inner())

    def check_reserved(self) -> None:
        """Refuse a structure with a reserved byte that is not zero."""
        for at, size in self.reserved():
            for offset in range(at, at + size):
                if self.view[offset]:
                    raise LayoutError(
                        f"{type(self).__name__}: reserved byte {offset} is {self.view[offset]:#04x}, must be 0"
                    )
        for inner in self._inner():
            inner.check_reserved()

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values: ints, hex strings, dicts and lists; ready for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in self.fields}

    def _inner(self) -> Iterator[Wire]:
        for descriptor in vars(type(self)).values():
            if isinstance(descriptor, Part):
                yield descriptor.__get__(self, type(self))
            elif isinstance(descriptor, Array):
                yield from descriptor.__get__(self, type(self))

    def __bytes__(self) -> bytes:
        """The structure as it lies in memory."""
        return bytes(self.view)

    def __eq__(self, other: object) -> bool:
        """Equal when of the same type and with the same bytes."""
        return type(other) is type(self) and bytes(self) == bytes(other)

    __hash__ = None  # type: ignore[assignment]  # a view over bytes that may change

    def __repr__(self) -> str:
        """The type and every field."""
        shown = ", ".join(f"{field.name}={_shown(getattr(self, field.name))}" for field in self.fields)
        return f"{type(self).__name__}({shown})"


def _plain(value: Any) -> Any:
    if isinstance(value, Wire):
        return value.as_dict()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return hex(value) if isinstance(value, int) else repr(value)
