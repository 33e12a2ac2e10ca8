"""The argument of an ioctl: a number, or the place of a structure in the memory of the process that calls."""

import errno
from collections.abc import Sequence
from typing import TypeVar

from softtdx.abi.kvm import argument_size
from softtdx.abi.wire import Wire
from softtdx.kvm.errors import KvmError
from softtdx.kvm.mm import AddressSpace

__all__ = ["Argument"]

_W = TypeVar("_W", bound=Wire)


class Argument:
    """What the third argument of ioctl(2) is: an address in `mm`, or a bytearray that stands for the memory there."""

    def __init__(self, mm: AddressSpace, request: int, value: int | bytearray) -> None:
        """`request` is the number that it came with."""
        self.request = request
        self.size = argument_size(request)
        self._mm = mm
        self._value = value

    @property
    def number(self) -> int:
        """The argument itself. EINVAL for a structure."""
        if not isinstance(self._value, int):
            raise KvmError(errno.EINVAL, "this ioctl takes a number")
        return self._value

    def nothing(self) -> None:
        """EINVAL unless the argument is 0."""
        if self._value:
            raise KvmError(errno.EINVAL, f"ioctl {self.request:#x} takes no argument")

    def at(self, address: int) -> "Argument":
        """Another place in the same memory, to which a structure points."""
        return Argument(self._mm, self.request, address)

    def read(self, size: int, offset: int = 0) -> bytes:
        """copy_from_user. EFAULT for what is not there."""
        if isinstance(self._value, int):
            return self._mm.read(self._value + offset, size)
        if len(self._value) < offset + size:
            raise KvmError(errno.EFAULT, f"a structure of {offset + size} bytes in {len(self._value)} bytes")
        return bytes(self._value[offset : offset + size])

    def write(self, data: bytes | Wire, offset: int = 0) -> None:
        """copy_to_user."""
        raw = bytes(data)
        if isinstance(self._value, int):
            self._mm.write(self._value + offset, raw)
            return
        if len(self._value) < offset + len(raw):
            raise KvmError(errno.EFAULT, f"a structure of {offset + len(raw)} bytes in {len(self._value)} bytes")
        self._value[offset : offset + len(raw)] = raw

    def parse(self, kind: type[_W], offset: int = 0) -> _W:
        """A copy of a structure. Reserved bytes are for the caller to look at: the kernel ignores most."""
        return kind.parse(self.read(kind.SIZE, offset), strict=False)

    def parse_list(self, kind: type[_W], count: int, offset: int) -> list[_W]:
        """`count` structures that follow each other."""
        data = self.read(kind.SIZE * count, offset)
        return [kind.parse(data[at : at + kind.SIZE], strict=False) for at in range(0, len(data), kind.SIZE)]

    def write_list(self, items: Sequence[bytes | Wire], offset: int) -> None:
        """The inverse."""
        self.write(b"".join(bytes(item) for item in items), offset)
