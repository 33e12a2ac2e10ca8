"""TD context: TDR and TDCS fields, with the rules of those that are more than bytes (TDH.MNG.RD/WR, TDG.VM.RD/WR)."""

from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.fields import L2_SEPT_ROOT_CLASSES, TDCS_CPUID_CLASS, CpuidFieldCode, MdContext
from softtdx.abi.status import Operand, Status

from .. import features, limits, tdcs
from ..errors import LeafError
from ..platform import FIRST_EXTENDED_LEAF, LAST_BASE_LEAF, LAST_EXTENDED_LEAF
from ..td import Td
from .engine import Context, Location, View, cpuid_row

__all__ = ["context_of", "read_element", "write_element"]

TDR_CLASSES: Final = frozenset({0, 1, 2})
CPUID_CODE_RESERVED: Final = 0xFE_0000
FIXED0_BASE_BITS: Final = 52
US_PER_S: Final = 1_000_000
HP_LOCK_TIMEOUT_US: Final = (10_000, 100_000_000)
TD_CTLS_RESERVED: Final = ((1 << 63) - 1) & ~0xF
U32: Final = 0xFFFF_FFFF
U64: Final = (1 << 64) - 1

NOT_READABLE: Final = Status.METADATA_FIELD_NOT_READABLE
NOT_VALID: Final = Status.METADATA_FIELD_VALUE_NOT_VALID
ID_INCORRECT: Final = Status.METADATA_FIELD_ID_INCORRECT


def context_of(td: Td) -> Context:
    """The TD context of a TD."""
    return Context(MdContext.TD, td.rd16(tdcs.NUM_L2_VMS))


class _Element:
    """One element of a TD's fields: where it lies, its masks and its value before special handling of writes."""

    __slots__ = ("address", "read_mask", "row", "size", "td", "value", "write_mask")

    def __init__(self, td: Td, location: Location, view: View, *, write: bool = False) -> None:
        row = location.row
        self.td = td
        self.row = row
        self.size = row.element_size
        self.read_mask, self.write_mask = view.masks(row)
        number = location.number
        cpuid: tuple[int, abi_cpuid.CpuidRow | None] | None = None
        if location.class_code == TDCS_CPUID_CLASS:
            cpuid = _cpuid(td, location, reads_zero=view.name == "host" and not write)
            number = (cpuid[1].index if cpuid[1] else 0) * 2 + (location.field_code & 1)
        elif location.class_code in L2_SEPT_ROOT_CLASSES:
            vm = L2_SEPT_ROOT_CLASSES.index(location.class_code) + 1
            if td.rd16(tdcs.NUM_L2_VMS) < vm:
                raise LeafError(ID_INCORRECT)
        offset = (row.offset or 0) + number * self.size
        self.address = td.tdr + offset if location.class_code in TDR_CLASSES else td.address(offset)
        value = int.from_bytes(td.call.cpu.read(self.address, self.size), "little")
        if row.special_rd:
            value = _special_read(td, row.name, value, cpuid, reads_zero=view.name == "host" and not write)
        self.value = value & (1 << 8 * self.size) - 1

    def store(self, value: int) -> None:
        """Write the element if nobody changed it meanwhile. LeafError OPERAND_BUSY."""
        cpu, address, size = self.td.call.cpu, self.address, self.size
        base, shift = address & ~7, (address & 7) * 8
        if shift + 8 * size > 64:
            cpu.write(address, value.to_bytes(size, "little"))
            return
        mask = (1 << 8 * size) - 1
        word = cpu.rd64(base)
        new = word & ~(mask << shift) | (value & mask) << shift
        if word >> shift & mask != self.value or cpu.cas64(base, word, new) != word:
            raise LeafError(Status.OPERAND_BUSY, Operand.METADATA_FIELD)


def _cpuid(td: Td, location: Location, *, reads_zero: bool) -> tuple[int, abi_cpuid.CpuidRow | None]:
    """(leaf, row) of a CPUID_VALUES field code; `reads_zero`: it may be a leaf that reads as 0 and has no row."""
    if location.field_code & CPUID_CODE_RESERVED:
        raise LeafError(ID_INCORRECT)
    code = CpuidFieldCode.decode(location.field_code)
    row = cpuid_row(code)
    if row is None and not (reads_zero and is_fixed0(td.rd64(tdcs.CPUID_FIXED0_BITMAP), code.leaf)):
        raise LeafError(NOT_READABLE)
    return code.leaf, row


def is_fixed0(bitmap: int, leaf: int) -> bool:
    """Whether CPUID_FIXED0_BITMAP says that a leaf reads as 0."""
    if leaf <= LAST_BASE_LEAF:
        return bool(bitmap & (1 << FIXED0_BASE_BITS) - 1 & 1 << leaf)
    if FIRST_EXTENDED_LEAF <= leaf <= LAST_EXTENDED_LEAF:
        return bool(bitmap >> FIXED0_BASE_BITS >> leaf - FIRST_EXTENDED_LEAF & 1)
    return False


def _special_read(
    td: Td, name: str, value: int, cpuid: tuple[int, abi_cpuid.CpuidRow | None] | None, *, reads_zero: bool
) -> int:
    if name == "HP_LOCK_TIMEOUT":
        return (value & U32) * US_PER_S // td.call.g.platform.tsc_hz
    if name == "NUM_CPUID_VALUES":
        return len(abi_cpuid.rows())
    if cpuid is not None:
        leaf, row = cpuid
        if reads_zero and is_fixed0(td.rd64(tdcs.CPUID_FIXED0_BITMAP), leaf):
            return 0
        if row is None or not td.rd8(tdcs.CPUID_VALID + row.index):
            raise LeafError(NOT_READABLE)
    return value


def read_element(td: Td, location: Location, view: View) -> int:
    """The value of one element as `view` sees it. LeafError: METADATA_FIELD_ID_INCORRECT, FIELD_NOT_READABLE."""
    element = _Element(td, location, view)
    if not element.read_mask:
        raise LeafError(NOT_READABLE)
    return element.value & element.read_mask


def forbidden_bits_change(old: int, new: int, requested: int, writable: int, readable: int) -> bool:
    """Whether the caller tries to change a bit that it may not write, as far as it can read it."""
    forbidden = requested & ~writable
    return old & readable & forbidden != new & forbidden


def write_element(td: Td, location: Location, view: View, value: int, requested: int) -> int:
    """Write the bits in `requested` that are writable; returns the old value as `view` sees it.

    LeafError in this order: METADATA_FIELD_ID_INCORRECT, FIELD_NOT_READABLE (CPUID), FIELD_NOT_WRITABLE,
    FIELD_VALUE_NOT_VALID, WR_MASK_NOT_VALID, OPERAND_BUSY.
    """
    element = _Element(td, location, view, write=True)
    mask = element.write_mask & requested
    if not mask:
        raise LeafError(Status.METADATA_FIELD_NOT_WRITABLE)
    if forbidden_bits_change(element.value, value, requested, element.write_mask, element.read_mask):
        raise LeafError(NOT_VALID)
    new = element.value & ~mask | value & mask
    if not (element.row.special_wr and _special_write(td, element, new, mask)):
        element.store(new)
    return element.value & element.read_mask


def _special_write(td: Td, element: _Element, new: int, mask: int) -> bool:
    """Rules of fields that are more than bytes. True when the field was written here."""
    name = element.row.name
    if name == "FEATURE_PARAVIRT_CTLS":
        _write_paravirt_ctls(td, element.value, new)
        return True
    if name == "TD_CTLS":
        _write_td_ctls(td, element.value, new)
        return True
    if name == "HP_LOCK_TIMEOUT":
        if mask != U64:
            raise LeafError(Status.METADATA_WR_MASK_NOT_VALID)
        low, high = HP_LOCK_TIMEOUT_US
        if not low <= new <= high:
            raise LeafError(NOT_VALID)
        td.wr64(tdcs.HP_LOCK_TIMEOUT, new * td.call.g.platform.tsc_hz // US_PER_S & U32)
        return True
    if name == "MIG_VERSION" and new:
        raise LeafError(NOT_VALID)
    if name == "MIG_DEC_KEY":
        td.wr8(tdcs.MIG_DEC_KEY_SET, 1)
    return False


def _write_paravirt_ctls(td: Td, old: int, new: int) -> None:
    """FEATURE_PARAVIRT_CTLS: which features a TD with reduced #VE still wants served by #VE."""
    if td.rd64(tdcs.TD_CTLS) & features.CTL_LOCK:
        if new != old:
            raise LeafError(NOT_VALID)
        return
    td.wr64(tdcs.FEATURE_PARAVIRT_CTLS, new)
    features.update_mutable_cpuid_flags(td)


def _write_td_ctls(td: Td, old: int, new: int) -> None:
    """TD_CTLS: how the TD wants to be treated; LOCK freezes it."""
    changed = old ^ new
    if old & features.CTL_LOCK:
        if changed:
            raise LeafError(NOT_VALID)
        return
    flexible = td.rd64(tdcs.CONFIG_FLAGS) & limits.CONFIG_FLEXIBLE_PENDING_VE
    if changed & features.CTL_PENDING_VE_DISABLE and not flexible:
        raise LeafError(NOT_VALID)
    if new & features.CTL_REDUCE_VE:
        new |= features.CTL_ENUM_TOPOLOGY | features.CTL_VIRT_CPUID2
    if new & features.CTL_ENUM_TOPOLOGY and not td.rd8(tdcs.TOPOLOGY_ENUM_CONFIGURED):
        raise LeafError(NOT_VALID)
    if new & TD_CTLS_RESERVED:
        raise LeafError(NOT_VALID)
    td.wr64(tdcs.TD_CTLS, new)
    if changed & features.CTL_REDUCE_VE:
        features.update_mutable_cpuid_flags(td)
