"""TD memory regions: which memory goes to TDX, where the PAMTs lie, and what is reserved.

A TDMR is a multiple of 1 GiB. It covers memory and the holes between; holes, and the PAMTs themselves, become
reserved areas (arch/x86/virt/vmx/tdx/tdx.c, construct_tdmrs).
"""

from dataclasses import dataclass, field
from typing import Protocol

from softtdx.abi.structs import ReservedArea, TdmrInfo
from softtdx.errors import SoftTdxError
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M, HostMemory

__all__ = ["Tdmr", "build_tdmrs"]


class PamtFacts(Protocol):
    """What the module says of TDMRs and PAMTs."""

    @property
    def max_tdmrs(self) -> int:
        """How many TDMRs there may be."""

    @property
    def max_reserved_per_tdmr(self) -> int:
        """How many reserved areas each may have."""

    @property
    def pamt_entry_size(self) -> tuple[int, int, int]:
        """Bytes of PAMT for each 4 KiB, 2 MiB and 1 GiB region."""

    @property
    def cmrs(self) -> tuple[tuple[int, int], ...]:
        """Convertible memory ranges: (base, size)."""


@dataclass
class Tdmr:
    """One TDMR; `pamt` holds (base, size) of the 4K, 2M and 1G PAMT."""

    base: int
    size: int
    pamt: list[tuple[int, int]] = field(default_factory=list)
    reserved: list[tuple[int, int]] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size

    def info(self) -> TdmrInfo:
        """TDMR_INFO for TDH.SYS.CONFIG."""
        info = TdmrInfo()
        info.base, info.size = self.base, self.size
        (info.pamt_4k_base, info.pamt_4k_size), (info.pamt_2m_base, info.pamt_2m_size), one_gig = self.pamt
        info.pamt_1g_base, info.pamt_1g_size = one_gig
        areas: tuple[ReservedArea, ...] = info.reserved_areas
        for area, (start, end) in zip(areas, self.reserved, strict=False):
            area.offset, area.size = start - self.base, end - start
        return info


def build_tdmrs(memory: HostMemory, facts: PamtFacts) -> list[Tdmr]:
    """TDMRs over all memory of the page allocator, with their PAMTs allocated.

    Raises SoftTdxError when memory is not convertible, or is too scattered for the module's limits.
    """
    for start, end in memory.ranges:
        if not any(base <= start and end <= base + size for base, size in facts.cmrs):
            raise SoftTdxError(f"memory {start:#x} to {end:#x} is not convertible, so TDX cannot be enabled on it")
    tdmrs = _cover(memory.ranges)
    if len(tdmrs) > facts.max_tdmrs:
        raise SoftTdxError(f"memory needs {len(tdmrs)} TDMRs, the module takes {facts.max_tdmrs}")
    for tdmr in tdmrs:
        _allocate_pamt(tdmr, memory, facts)
    pamts = [(base, base + size) for tdmr in tdmrs for base, size in tdmr.pamt]
    for tdmr in tdmrs:
        tdmr.reserved = _merge(_holes(tdmr, memory.ranges) + _inside(tdmr, pamts))
        if len(tdmr.reserved) > facts.max_reserved_per_tdmr:
            raise SoftTdxError(
                f"the TDMR at {tdmr.base:#x} needs {len(tdmr.reserved)} reserved areas, "
                f"the module takes {facts.max_reserved_per_tdmr}"
            )
    return tdmrs


def _cover(ranges: list[tuple[int, int]]) -> list[Tdmr]:
    tdmrs: list[Tdmr] = []
    for start, end in ranges:
        base, top = start // PAGE_1G * PAGE_1G, -(-end // PAGE_1G) * PAGE_1G
        if tdmrs and base < tdmrs[-1].end:
            base = tdmrs[-1].end
        if base < top:
            tdmrs.append(Tdmr(base, top - base))
    return tdmrs


def _allocate_pamt(tdmr: Tdmr, memory: HostMemory, facts: PamtFacts) -> None:
    sizes = []
    for region, entry in zip((PAGE, PAGE_2M, PAGE_1G), facts.pamt_entry_size, strict=True):
        sizes.append(-(-(tdmr.size // region * entry) // PAGE) * PAGE)
    base = memory.alloc(sum(sizes) // PAGE)
    memory.give_to_tdx(base, "PAMT", sum(sizes) // PAGE)
    for size in sizes:
        tdmr.pamt.append((base, size))
        base += size


def _holes(tdmr: Tdmr, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    holes, at = [], tdmr.base
    for start, end in ranges:
        if end <= tdmr.base or start >= tdmr.end:
            continue
        if start > at:
            holes.append((at, start))
        at = min(end, tdmr.end)
    if at < tdmr.end:
        holes.append((at, tdmr.end))
    return holes


def _inside(tdmr: Tdmr, areas: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(max(s, tdmr.base), min(e, tdmr.end)) for s, e in areas if s < tdmr.end and e > tdmr.base]


def _merge(areas: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(areas):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
