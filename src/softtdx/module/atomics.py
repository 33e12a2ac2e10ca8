"""LOCK XADD and friends on module structures in DRAM: two logical processors may be inside the same leaf."""

from softtdx.hw.isa import SeamCpu

__all__ = ["add16", "add32", "add64"]

U64 = (1 << 64) - 1


def add64(cpu: SeamCpu, pa: int, delta: int) -> int:
    """Add to the quadword at `pa` (8-byte aligned); returns what it was."""
    old = cpu.rd64(pa)
    while (found := cpu.cas64(pa, old, old + delta & U64)) != old:
        old = found
    return old


def add32(cpu: SeamCpu, pa: int, delta: int) -> int:
    """Add to the doubleword at `pa` (4-byte aligned); returns what it was."""
    return _add(cpu, pa, delta, 32)


def add16(cpu: SeamCpu, pa: int, delta: int) -> int:
    """Add to the word at `pa` (2-byte aligned); returns what it was."""
    return _add(cpu, pa, delta, 16)


def _add(cpu: SeamCpu, pa: int, delta: int, bits: int) -> int:
    base, shift = pa & ~7, (pa & 7) * 8
    mask = (1 << bits) - 1
    old = cpu.rd64(base)
    while True:
        was = old >> shift & mask
        new = old & ~(mask << shift) | (was + delta & mask) << shift
        found = cpu.cas64(base, old, new)
        if found == old:
            return was
        old = found
