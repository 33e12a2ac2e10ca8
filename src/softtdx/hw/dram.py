"""The fault model: what a probe, an interposer or a fault does to the DIMMs, below the memory-encryption engine.

    platform.dram.flip_bits(address, [77])           # a single bit of the ciphertext
    old = platform.dram.record(address)              # an interposer keeps a line with its MAC
    platform.dram.replay(old)                        # and puts it back later
    platform.dram.splice(source, target)             # ciphertext and MAC of one line to another address
    platform.dram.glitch(address, size=4096, seed=1) # flips all over a range, the same for the same seed

Addresses are DRAM addresses without a KeyID. Nothing here is checked by the platform when it happens: the next access
through the processor finds out, or does not.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from softtdx._silicon import Memory
from softtdx.errors import SoftTdxError

__all__ = ["LINE", "Dram", "DramError", "DramLine"]

LINE = 64


class DramError(SoftTdxError):
    """An address that is not DRAM, or does not suit the operation."""


@dataclass(frozen=True)
class DramLine:
    """A cache line as it lies in DRAM: 64 bytes of ciphertext, the MAC (28 bits) and the TD-owner bit beside it."""

    address: int
    data: bytes
    mac: int
    owner: bool
    poisoned: bool = False


class Dram:
    """The DIMMs of a platform, as an attacker with physical access has them. `ranges` are (base, size)."""

    def __init__(self, memory: Memory, ranges: Sequence[tuple[int, int]]) -> None:
        """The DRAM behind `memory`."""
        self._memory = memory
        self._ranges = tuple(ranges)

    # --- looking
    def read(self, address: int, size: int = LINE) -> bytes:
        """What lies on the DIMM: ciphertext, where the engine encrypts."""
        self._check(address, size)
        return self._memory.raw_read(address, size)

    def line(self, address: int) -> DramLine:
        """The line that holds `address`."""
        self._check(address, 1)
        return DramLine(address & -LINE, *self._memory.raw_line(address & -LINE))

    def record(self, address: int, size: int = LINE) -> tuple[DramLine, ...]:
        """The lines of a range, to be replayed. DramError unless address and size are multiples of 64."""
        self._check_lines(address, size)
        return tuple(self.line(at) for at in range(address, address + size, LINE))

    # --- changing
    def write(self, address: int, data: bytes) -> None:
        """Overwrite ciphertext; MACs and owner bits stay."""
        self._check(address, len(data))
        self._memory.raw_write(address, data)

    def flip_bits(self, address: int, bits: Iterable[int]) -> None:
        """Invert bits: bit 0 is the lowest of the byte at `address`, bit 8 the lowest of the next."""
        chosen = sorted(set(bits))
        if not chosen:
            return
        if chosen[0] < 0:
            raise DramError(f"bit {chosen[0]} does not exist: bits are counted up from the address")
        data = bytearray(self.read(address, chosen[-1] // 8 + 1))
        for bit in chosen:
            data[bit // 8] ^= 1 << bit % 8
        self.write(address, bytes(data))

    def splice(self, source: int, target: int, size: int = LINE) -> None:
        """Copy lines with their MACs and owner bits from `source` to `target`."""
        self._check_lines(target, size)
        for line in self.record(source, size):
            self._put(line, target + line.address - source)

    def swap(self, one: int, other: int, size: int = LINE) -> None:
        """Exchange lines of two places, as a DIMM that decodes addresses wrongly."""
        first, second = self.record(one, size), self.record(other, size)
        if abs(one - other) < size:
            raise DramError(f"the ranges at {one:#x} and {other:#x} of {size} bytes overlap")
        self.replay(first, at=other)
        self.replay(second, at=one)

    def replay(self, lines: Sequence[DramLine], *, at: int | None = None) -> None:
        """Put recorded lines back where they were, or from `at` on."""
        if not lines:
            return
        moved = 0 if at is None else at - lines[0].address
        for line in lines:
            self._check_lines(line.address + moved, LINE)
        for line in lines:
            self._put(line, line.address + moved)

    def glitch(self, address: int, size: int = LINE, *, flips: int = 1, seed: int = 0) -> tuple[int, ...]:
        """Flip `flips` different bits somewhere in the range, and say which: a rowhammered row, a voltage glitch."""
        self._check(address, size)
        if not 0 <= flips <= 8 * size:
            raise DramError(f"{flips} flips in {size} bytes")
        bits = tuple(sorted(random.Random(f"{seed} {address} {size}").sample(range(8 * size), flips)))
        self.flip_bits(address, bits)
        return bits

    # ---
    def _put(self, line: DramLine, address: int) -> None:
        self._memory.raw_set_line(address, line.data, line.mac, line.owner)

    def _check(self, address: int, size: int) -> None:
        if size < 0 or not any(base <= address and address + size <= base + length for base, length in self._ranges):
            dram = ", ".join(f"{base:#x}..{base + length:#x}" for base, length in self._ranges)
            raise DramError(f"{address:#x}..{address + size:#x} is not DRAM of this platform, which has {dram}")

    def _check_lines(self, address: int, size: int) -> None:
        if address % LINE or size % LINE or size <= 0:
            raise DramError(f"{address:#x}+{size:#x} are not whole lines of {LINE} bytes")
        self._check(address, size)
