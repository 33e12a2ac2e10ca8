"""How the module virtualises CPUID: per leaf and subleaf, which bits are fixed, native, or the host's to choose.

TDX Module ABI, "CPUID Virtualization": TD_PARAMS.CPUID_CONFIG holds one entry for each `config_index`, in that order.
"""

from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

from softtdx.abi._data import load

__all__ = ["SUBLEAF_NA", "CpuidRegs", "CpuidRow", "configurable", "find", "rows", "xfam_masks"]

SUBLEAF_NA: Final = 0xFFFF_FFFF  # how tables and SYS fields say that a leaf has no subleaves


class CpuidRegs(NamedTuple):
    """One 32-bit value a register."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True, slots=True)
class CpuidRow:
    """One leaf and subleaf. `index` is its place in TDCS.CPUID_VALUES and CPUID_VALID.

    The module checks at SYS.INIT that `native & verify_mask == verify_value`, at SYS.LP.INIT that the bits of
    `verify_same` agree between processors. `fixed1` are bits a TD always sees set, `fixed0_or_dynamic` those it sees
    clear unless code computes them; `config_direct` the host sets freely, `allow_direct` it may only clear native
    ones of. All other bits are native.
    """

    index: int
    leaf: int
    subleaf: int | None
    config_index: int | None
    verify_mask: CpuidRegs
    verify_value: CpuidRegs
    verify_same: CpuidRegs
    fixed1: CpuidRegs
    fixed0_or_dynamic: CpuidRegs
    config_direct: CpuidRegs
    allow_direct: CpuidRegs


@cache
def rows() -> tuple[CpuidRow, ...]:
    """All 79 rows, in the order of TDCS.CPUID_VALUES."""
    return tuple(
        CpuidRow(index, int(row[0], 16), row[1], row[2], *(_regs(cell) for cell in row[3:]))
        for index, row in enumerate(load("cpuid")["rows"])
    )


@cache
def configurable() -> tuple[CpuidRow, ...]:
    """The rows a host may configure, in the order of TD_PARAMS.CPUID_CONFIG."""
    found = [row for row in rows() if row.config_index is not None]
    return tuple(sorted(found, key=lambda row: row.config_index or 0))


def find(leaf: int, subleaf: int) -> CpuidRow | None:
    """The row that answers CPUID with EAX = leaf, ECX = subleaf; a row without subleaves answers any ECX."""
    index = _index()
    return index.get((leaf, None)) or index.get((leaf, subleaf))


@cache
def xfam_masks() -> dict[tuple[int, int | None], dict[int, CpuidRegs]]:
    """By leaf and subleaf: which bits a TD may see only with this XFAM bit set."""
    masks: dict[tuple[int, int | None], dict[int, CpuidRegs]] = {}
    for name, by_bit in load("cpuid")["xfam_masks"].items():
        leaf, subleaf = (int(part, 16) for part in name.split("_"))
        masks[leaf, None if subleaf == SUBLEAF_NA else subleaf] = {
            int(bit): CpuidRegs(**{reg: int(mask, 16) for reg, mask in regs.items()}) for bit, regs in by_bit.items()
        }
    return masks


@cache
def _index() -> dict[tuple[int, int | None], CpuidRow]:
    return {(row.leaf, row.subleaf): row for row in rows()}


def _regs(cell: list[str | None] | None) -> CpuidRegs:
    return CpuidRegs(*(int(value or "0", 16) for value in cell)) if cell else CpuidRegs()
