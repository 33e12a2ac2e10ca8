"""Operands that name the host's own memory: shared, outside SEAMRR, within the machine."""

from softtdx.abi.status import Status

from .errors import LeafError
from .state import GlobalState

__all__ = ["check_shared", "is_shared"]


def is_shared(g: GlobalState, pa: int, size: int) -> bool:
    """Whether `pa` is an address that the host may hand over as a buffer of `size` bytes: KeyID and SEAMRR checked."""
    if pa >> 52:
        return False
    base, length = g.seamrr
    memory = pa & ~g.hkid_mask
    if memory < base + length and base < memory + size:
        return False
    return (pa & g.hkid_mask) >> g.hkid_shift < g.private_hkid_min


def check_shared(g: GlobalState, pa: int, alignment: int, operand: int, size: int | None = None) -> None:
    """A host buffer aligned to a power of two (and as long, unless `size`). LeafError OPERAND_INVALID."""
    if pa & (alignment - 1) or not is_shared(g, pa, alignment if size is None else size):
        raise LeafError(Status.OPERAND_INVALID, operand)
