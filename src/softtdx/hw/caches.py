"""Dirty cache lines: what a processor wrote and DRAM does not have yet.

Memory and caches are one in this machine, and a store is in DRAM at once. The rules of TDX on write-back are about the
time between the two: a line lies in a cache as plaintext, under its address *and KeyID*; caches are not coherent
between KeyIDs; and a line is encrypted when it is evicted, with the key that its KeyID has by then. So that a host that
skips a write-back can be tried, lines may be held here as dirty:

    platform.caches.hold(pa, 64)   # bus address, KeyID included: as the line is now, it is still dirty in a cache
    ...                            # the page is given to somebody else, the KeyID gets another key
    platform.caches.evict()        # the cache wants room: the line is written over whatever is there

Which lines are still dirty is the experimenter's choice, as it is chance on hardware; any line may be that was written
since the last write-back. Write-backs (IA32_WBNOINVDP, CLFLUSH of a page) empty the cache as they should.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from softtdx._silicon import BusFault, Memory

__all__ = ["Caches", "DirtyLine"]

LINE = 64


@dataclass(frozen=True)
class DirtyLine:
    """A line that is newer in a cache of `package` than in DRAM; `pa` holds its KeyID."""

    pa: int
    data: bytes
    package: int


class Caches:
    """The dirty lines of all packages: none, unless somebody holds some."""

    def __init__(self, memory: Memory) -> None:
        """Empty caches before `memory`."""
        self._memory = memory
        self._lines: dict[int, DirtyLine] = {}
        self._lock = Lock()

    @property
    def dirty(self) -> tuple[DirtyLine, ...]:
        """What is held, in the order in which it was."""
        return tuple(self._lines.values())

    def hold(self, pa: int, size: int = LINE, *, package: int = 0) -> None:
        """The lines of the range, as they read now under the KeyID in `pa`, are still dirty in a cache.

        ValueError unless address and size are multiples of 64. BusFault, MachineCheck: nothing reads under that KeyID.
        """
        if pa % LINE or size % LINE:
            raise ValueError(f"{pa:#x}+{size:#x} are not whole lines of {LINE} bytes")
        data = self._memory.read(pa, size, seam=True)
        with self._lock:
            for at in range(0, size, LINE):
                self._lines[pa + at] = DirtyLine(pa + at, data[at : at + LINE], package)

    def evict(self) -> int:
        """All that is held is written to DRAM, under the key that its KeyID has now; returns how many lines."""
        return self._take(lambda line: bool(line.data))

    def write_back(self, package: int) -> int:
        """IA32_WBNOINVDP of one package."""
        return self._take(lambda line: line.package == package)

    def flush(self, pa: int, size: int) -> int:
        """CLFLUSH of a range under the KeyID in `pa`, in every package."""
        return self._take(lambda line: pa <= line.pa < pa + size)

    def _take(self, which: Callable[[DirtyLine], bool]) -> int:
        if not self._lines:
            return 0
        with self._lock:
            taken = [line for line in self._lines.values() if which(line)]
            for line in taken:
                del self._lines[line.pa]
        for line in taken:
            try:
                self._memory.write(line.pa, line.data, seam=True)
            except BusFault:  # a KeyID without a key: there is nothing to encrypt the line with, it is lost
                continue
        return len(taken)
