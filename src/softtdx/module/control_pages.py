"""A control structure that lies in several pages, none next to the other: the TDCS and the TDVPS, by offset."""

from collections.abc import Sequence
from typing import Final

from softtdx.hw.isa import SeamCpu

from .context import Call

PAGE: Final = 0xFFF


class ControlPages:
    """Accessors by offset; offset bits 63:12 choose one of `pages`, the bus addresses with the KeyID in them."""

    __slots__ = ("_cpu", "call")

    _cpu: SeamCpu
    call: Call

    @property
    def pages(self) -> Sequence[int]:
        """Every page of the structure, in order."""
        raise NotImplementedError

    def address(self, at: int) -> int:
        """The bus address of an offset. LookupError beyond the pages that there are."""
        return self.pages[at >> 12] + (at & PAGE)

    def rd8(self, at: int) -> int:
        """A byte."""
        return self._cpu.rd8(self.pages[at >> 12] + (at & PAGE))

    def rd16(self, at: int) -> int:
        """16 bits."""
        return self._cpu.rd16(self.pages[at >> 12] + (at & PAGE))

    def rd32(self, at: int) -> int:
        """32 bits."""
        return self._cpu.rd32(self.pages[at >> 12] + (at & PAGE))

    def rd64(self, at: int) -> int:
        """64 bits."""
        return self._cpu.rd64(self.pages[at >> 12] + (at & PAGE))

    def wr8(self, at: int, value: int) -> None:
        """Write a byte."""
        self._cpu.wr8(self.pages[at >> 12] + (at & PAGE), value)

    def wr16(self, at: int, value: int) -> None:
        """Write 16 bits."""
        self._cpu.wr16(self.pages[at >> 12] + (at & PAGE), value)

    def wr32(self, at: int, value: int) -> None:
        """Write 32 bits."""
        self._cpu.wr32(self.pages[at >> 12] + (at & PAGE), value)

    def wr64(self, at: int, value: int) -> None:
        """Write 64 bits."""
        self._cpu.wr64(self.pages[at >> 12] + (at & PAGE), value)

    def read(self, at: int, size: int) -> bytes:
        """Bytes within one page."""
        return self._cpu.read(self.pages[at >> 12] + (at & PAGE), size)

    def write(self, at: int, data: bytes) -> None:
        """Write bytes within one page."""
        self._cpu.write(self.pages[at >> 12] + (at & PAGE), data)
