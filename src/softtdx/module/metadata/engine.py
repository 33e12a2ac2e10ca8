"""Metadata fields by their id: which there are, in which order they follow, who may read and write what.

An access names a context (SYS, TD or VP) and a field id; the field tables of `abi.fields` say where it is and which
bits each party sees. The order of iteration is that of the tables; in the VP context the TD VMCS comes before the
TDVPS, and the VMCS of each L2 VM in the place of its page (TDX Module ABI, "Metadata").
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.fields import (
    CONTEXT_MASK,
    FIELD_CODE_MASK,
    FIELD_ID_RESERVED,
    L2_VMCS_CLASSES,
    NULL_FIELD_ID,
    TDCS_CPUID_CLASS,
    VMCS_CLASS,
    CpuidFieldCode,
    MdContext,
    MdField,
    table,
)
from softtdx.abi.status import Status

from ..errors import LeafError
from ..fatal import ModuleFatal

__all__ = [
    "GUEST",
    "HOST_DEBUG",
    "HOST_PRODUCTION",
    "Context",
    "Location",
    "View",
    "check_single",
    "dump_list",
    "find",
    "is_null",
    "next_element",
    "with_context",
]

MAX_L2_VMS: Final = 3
CLASS_SHIFT: Final = 56
CLASS_MASK: Final = 0x3F
LAST_SHIFT: Final = 34
# Neither LAST_ELEMENT_IN_FIELD nor LAST_FIELD_IN_SEQUENCE may be set in the id of a single element.
SINGLE_RESERVED: Final = FIELD_ID_RESERVED | 0x1FFF << LAST_SHIFT
L2_VMCS_PLACES: Final = {f"L2_VMCS_{number}": L2_VMCS_CLASSES[number - 1] for number in (1, 2, 3)}
MAX_ELEMENTS: Final = 16
LIST_HEADER: Final = 8
SEQUENCE_HEADER: Final = 8


class View(NamedTuple):
    """Who is asking: a function from a table row to its (read, write) masks."""

    name: str
    masks: Callable[[MdField], tuple[int, int]]


HOST_PRODUCTION: Final = View("host", lambda row: (row.prod_rd, row.prod_wr))
HOST_DEBUG: Final = View("host", lambda row: (row.dbg_rd, row.dbg_wr))
GUEST: Final = View("guest", lambda row: (row.guest_rd, row.guest_wr))


class Context(NamedTuple):
    """Which structures exist: the context code, and how many L2 VMs the TD has (None: no TD at hand)."""

    code: MdContext
    l2_vms: int


class Place(NamedTuple):
    """A row of a table in iteration order, and the class code that its fields go by."""

    row: MdField
    class_code: int

    def first_id(self) -> int:
        """Field id of the first element."""
        raw = self.row.field_id & ~(CLASS_MASK << CLASS_SHIFT) | self.class_code << CLASS_SHIFT
        return _first_cpuid(raw) if is_cpuid(self.row) else raw


@dataclass(frozen=True, slots=True)
class Location:
    """Where a field id points. `number` counts elements from the start of the row's array."""

    row: MdField
    class_code: int
    field_code: int
    number: int

    @property
    def field(self) -> int:
        """Which field of the array."""
        return self.number // self.row.num_elements

    @property
    def element(self) -> int:
        """Which element of the field."""
        return self.number % self.row.num_elements


def is_cpuid(row: MdField) -> bool:
    """Whether the row is CPUID_VALUES, whose field codes name leaves."""
    return row.context == MdContext.TD and row.class_code == TDCS_CPUID_CLASS


def is_null(raw: int) -> bool:
    """All ones, the context aside: the start or the end of an iteration."""
    return raw | CONTEXT_MASK == NULL_FIELD_ID


def with_context(raw: int, code: MdContext) -> int:
    """The id in another context; leaves imply the context and ignore what the caller wrote."""
    return raw & ~CONTEXT_MASK | code << 52


def check_single(raw: int) -> None:
    """An id of one element: reserved bits and sequence fields 0. LeafError METADATA_FIELD_ID_INCORRECT."""
    if raw & SINGLE_RESERVED:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)


@cache
def places(context: Context) -> tuple[Place, ...]:
    """All rows of a context in iteration order; pages of L2 VMs that the TD has not are cut off."""
    unused = MAX_L2_VMS - context.l2_vms
    if context.code == MdContext.SYS:
        return tuple(Place(row, row.class_code) for row in table("sys").fields)
    if context.code == MdContext.TD:
        rows = table("td").fields
        return tuple(Place(row, row.class_code) for row in rows[: len(rows) - unused])
    found = [Place(row, VMCS_CLASS) for row in table("vmcs").fields]
    rows = table("vp").fields
    for row in rows[: len(rows) - 3 * unused]:
        class_code = L2_VMCS_PLACES.get(row.name)
        if class_code is None:
            found.append(Place(row, row.class_code))
        else:
            found += [Place(inner, class_code) for inner in table("l2_vmcs").fields]
    return tuple(found)


@cache
def _by_class(context: Context) -> dict[int, list[tuple[int, Place]]]:
    index: dict[int, list[tuple[int, Place]]] = {}
    for number, place in enumerate(places(context)):
        index.setdefault(place.class_code, []).append((number, place))
    if context.code == MdContext.VP:
        # The VMCS tables of L2 VMs are found whether or not the TD has them; reading then fails.
        for class_code in L2_VMCS_CLASSES:
            if class_code not in index:
                index[class_code] = [(-1, Place(row, class_code)) for row in table("l2_vmcs").fields]
    return index


def _locate(context: Context, raw: int) -> tuple[int, Location] | None:
    class_code = raw >> CLASS_SHIFT & CLASS_MASK
    code = wanted = raw & FIELD_CODE_MASK
    if context.code == MdContext.TD and class_code == TDCS_CPUID_CLASS:
        wanted = code & 1
    for number, place in _by_class(context).get(class_code, ()):
        distance = wanted - place.row.field_code
        if 0 <= distance < place.row.span:
            return number, Location(place.row, class_code, code, distance // place.row.stride)
    return None


def find(context: Context, raw: int) -> Location:
    """Where an id points. LeafError METADATA_FIELD_ID_INCORRECT."""
    found = _locate(context, raw)
    if found is None:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    return found[1]


def next_element(context: Context, raw: int, view: View, *, write: bool = False) -> int:
    """The id of the next element that `view` may read (or write); NULL_FIELD_ID at the end."""
    return _next(context, raw, view, write=write, element=True)[0]


def _next(context: Context, raw: int, view: View, *, write: bool, element: bool) -> tuple[int, int]:
    """(id, index of its place) of the next accessible element or field."""
    index = -1
    if not is_null(raw):
        found = _locate(context, raw)
        assert found is not None  # the caller has just accessed it
        index, location = found
        following = _within(raw, location, element=element)
        if following is not None and _visible(view, location.row, write=write):
            return following, index
    rows = places(context)
    for number in range(index + 1, len(rows)):
        if _visible(view, rows[number].row, write=write):
            return rows[number].first_id(), number
    return NULL_FIELD_ID, -1


def _visible(view: View, row: MdField, *, write: bool) -> bool:
    return bool(view.masks(row)[write])


def _within(raw: int, location: Location, *, element: bool) -> int | None:
    """The next element or field of the same row; None behind the last."""
    row = location.row
    if is_cpuid(row):
        return _next_cpuid(raw, element=element)
    if element:
        if location.number < row.num_fields * row.num_elements - 1:
            return raw + row.stride
    elif location.field < row.num_fields - 1:
        return raw + row.num_elements * row.stride
    return None


def _next_cpuid(raw: int, *, element: bool) -> int | None:
    code = CpuidFieldCode.decode(raw & FIELD_CODE_MASK)
    if element and code.element == 0:
        return raw + 1
    row = cpuid_row(code)
    if row is None:  # a leaf that reads as 0 and has no row: it can be read, but nothing follows it
        raise ModuleFatal(f"TDH.MNG.RD was asked what follows CPUID leaf {code.leaf:#x}, which is in no table")
    rows = abi_cpuid.rows()
    if row.index + 1 >= len(rows):
        return None
    following = rows[row.index + 1]
    return raw & ~FIELD_CODE_MASK | CpuidFieldCode(following.leaf, following.subleaf).encode()


def _first_cpuid(raw: int) -> int:
    first = abi_cpuid.rows()[0]
    return raw & ~FIELD_CODE_MASK | CpuidFieldCode(first.leaf, first.subleaf).encode()


def cpuid_row(code: CpuidFieldCode) -> abi_cpuid.CpuidRow | None:
    """The row that a CPUID field code names: a leaf without subleaves answers for any subleaf."""
    return abi_cpuid.find(code.leaf, abi_cpuid.SUBLEAF_NA if code.subleaf is None else code.subleaf)


# --- lists

ReadField = Callable[[Location], list[int]]
"""All elements of the field at a location; LeafError METADATA_FIELD_NOT_READABLE or METADATA_FIELD_SKIP."""


def dump_list(context: Context, raw: int, view: View, read: ReadField, size: int) -> tuple[bytes, int, int]:
    """A metadata list of all readable fields from `raw` on: (bytes, next field id, status).

    The list has at most `size` bytes; the status is METADATA_LIST_OVERFLOW when fields remain. LeafError
    METADATA_FIELD_ID_INCORRECT for an id that is no start of a field.
    """
    if is_null(raw):
        raw, _ = _next(context, raw, view, write=False, element=False)
        if is_null(raw):
            return b"", raw, int(Status.SUCCESS)
    location = _field_start(context, raw)
    left = size - LIST_HEADER
    sequences: list[bytes] = []
    while left >= SEQUENCE_HEADER + 8 * location.row.num_elements:
        sequence, raw, complete = _dump_sequence(context, raw, view, read, left)
        if sequence:
            sequences.append(sequence)
            left -= len(sequence)
        if not complete or is_null(raw):
            break
        location = find(context, raw)
    body = b"".join(sequences)
    head = (LIST_HEADER + len(body)) | len(sequences) << 16
    status = Status.SUCCESS if is_null(raw) else Status.METADATA_LIST_OVERFLOW
    return head.to_bytes(8, "little") + body, raw, int(status)


def _field_start(context: Context, raw: int) -> Location:
    location = find(context, raw)
    row = location.row
    distance = location.field_code - row.field_code
    aligned = is_cpuid(row) or (distance % row.stride == 0 and location.element == 0)
    if not aligned or raw >> 32 & 3 != row.size_code:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    return location


def _dump_sequence(context: Context, raw: int, view: View, read: ReadField, left: int) -> tuple[bytes, int, bool]:
    """One sequence of neighbouring fields: (bytes or nothing, next id, False when space ran out)."""
    left -= SEQUENCE_HEADER
    header, fields, values = 0, 0, bytearray()
    location = find(context, raw)
    while left >= 8 * location.row.num_elements:
        readable = True
        try:
            elements = read(location)
        except LeafError as stop:
            if stop.rax == Status.METADATA_FIELD_NOT_READABLE:
                readable = False
            elif stop.rax != Status.METADATA_FIELD_SKIP:
                raise
        else:
            if not fields:
                header = raw & ~(SINGLE_RESERVED | 1 << 51) | location.row.num_elements - 1 << LAST_SHIFT
            values += b"".join(value.to_bytes(8, "little") for value in elements)
            left -= 8 * len(elements)
            fields += 1
        following, _ = _next(context, raw, view, write=False, element=False)
        if not readable or is_null(following) or not _sequential(context, raw, location, following):
            return _sequence(header, fields, values), following, True
        raw = following
        location = find(context, raw)
    return _sequence(header, fields, values), raw, False


def _sequence(header: int, fields: int, values: bytearray) -> bytes:
    if not fields:
        return b""
    return (header | fields - 1 << LAST_SHIFT + 4).to_bytes(8, "little") + bytes(values)


def _sequential(context: Context, raw: int, location: Location, following: int) -> bool:
    """Whether a field can go on the sequence: next to its neighbour, of the same shape. CPUID fields never do."""
    row, other = location.row, find(context, following).row
    if is_cpuid(row) and is_cpuid(other):
        return False
    return (
        raw >> CLASS_SHIFT & CLASS_MASK == following >> CLASS_SHIFT & CLASS_MASK
        and (raw & FIELD_CODE_MASK) + row.num_elements * row.stride == following & FIELD_CODE_MASK
        and row.num_elements == other.num_elements
        and row.size_code == other.size_code
    )
