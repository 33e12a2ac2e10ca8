"""Metadata fields: MD_FIELD_ID and the tables behind SYS.RD, MNG.RD/WR, VP.RD/WR, TDG.VM.RD/WR and migration.

MD_FIELD_ID (TDX Module ABI, "Metadata Field Identifier"):

    63        61:56  54:52    51          50        46:38       37:34         33:32      23:0
    NON_ARCH  CLASS  CONTEXT  WRITE_MASK  INC_SIZE  LAST_FIELD  LAST_ELEMENT  ELEM_SIZE  FIELD_CODE

Elements of a field, and fields of an array, have consecutive field codes, or every other code with INC_SIZE (as
VMCS fields have). In a sequence header LAST_ELEMENT and LAST_FIELD hold the count minus 1.
CPUID_VALUES of the TDCS is the exception: its field code names a CPUID leaf and subleaf (`CpuidFieldCode`).
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cache
from typing import Final, NamedTuple

from softtdx.abi._data import load

__all__ = [
    "NULL_FIELD_ID",
    "CpuidFieldCode",
    "FieldAttributes",
    "FieldId",
    "FieldPosition",
    "FieldTable",
    "MdContext",
    "MdField",
    "describe",
    "encode_field_id",
    "field_id",
    "table",
    "table_for",
    "tables",
]

NON_ARCH: Final = 1 << 63
WRITE_MASK_VALID: Final = 1 << 51
INC_SIZE: Final = 1 << 50
# Bits 31:24, 49:47, 55 and 62 must be 0.
FIELD_ID_RESERVED: Final = 0xFF << 24 | 7 << 47 | 1 << 55 | 1 << 62
FIELD_CODE_MASK: Final = 0xFF_FFFF
NULL_FIELD_ID: Final = (1 << 64) - 1
CONTEXT_MASK: Final = 7 << 52

# Class codes that need special treatment.
TDCS_CPUID_CLASS: Final = 20
VMCS_CLASS: Final = 0
L2_VMCS_CLASSES: Final = (36, 44, 52)  # the TD VMCS of L2 VM 1, 2 and 3
L2_SEPT_ROOT_CLASSES: Final = (37, 41, 45)
L2_VP_CLASS_STEP: Final = 8
L2_TD_CLASS_STEP: Final = 4


class MdContext(IntEnum):
    """CONTEXT_CODE: whose metadata it is."""

    SYS = 0
    TD = 1
    VP = 2


class FieldAttributes(IntFlag):
    """What a field's value refers to: addresses, private or shared, and in which L2 VMs it exists."""

    NONE = 0
    HPA = 1
    GPA = 2
    PRIVATE = 4
    SHARED = 8
    L1 = 16
    L2 = 32


class FieldId(NamedTuple):
    """An MD_FIELD_ID taken apart; `encode_field_id(*parts)` puts it together."""

    context: int
    class_code: int
    field_code: int
    size_code: int = 3
    last_element: int = 0
    last_field: int = 0
    inc_size: bool = False
    write_mask_valid: bool = False
    non_arch: bool = False

    @property
    def element_size(self) -> int:
        """Bytes of one element: 1, 2, 4 or 8."""
        return 1 << self.size_code

    @property
    def elements(self) -> int:
        """Elements of each field, when the id heads a sequence."""
        return self.last_element + 1

    @property
    def fields(self) -> int:
        """Fields that follow, when the id heads a sequence."""
        return self.last_field + 1


class CpuidFieldCode(NamedTuple):
    """FIELD_CODE of TDCS.CPUID_VALUES: element 0, subleaf 7:1, subleaf-not-applicable 8, leaf 15:9, leaf bit 31 16."""

    leaf: int
    subleaf: int | None
    element: int = 0

    def encode(self) -> int:
        """The 24-bit field code. With no subleaf the subleaf bits are all ones."""
        subleaf = 0xFF if self.subleaf is None else self.subleaf & 0x7F
        return self.element | subleaf << 1 | (self.leaf & 0x7F) << 9 | (self.leaf >> 31 & 1) << 16

    @classmethod
    def decode(cls, field_code: int) -> "CpuidFieldCode":
        """The leaf, subleaf and element that a field code names."""
        leaf = field_code >> 9 & 0x7F | (field_code >> 16 & 1) << 31
        subleaf = None if field_code >> 8 & 1 else field_code >> 1 & 0x7F
        return cls(leaf, subleaf, field_code & 1)


def field_id(raw: int) -> FieldId:
    """Take a 64-bit MD_FIELD_ID apart; reserved bits are dropped (see FIELD_ID_RESERVED)."""
    return FieldId(
        raw >> 52 & 7,
        raw >> 56 & 0x3F,
        raw & FIELD_CODE_MASK,
        raw >> 32 & 3,
        raw >> 34 & 0xF,
        raw >> 38 & 0x1FF,
        bool(raw & INC_SIZE),
        bool(raw & WRITE_MASK_VALID),
        bool(raw & NON_ARCH),
    )


def encode_field_id(
    context: int,
    class_code: int,
    field_code: int,
    size_code: int = 3,
    last_element: int = 0,
    last_field: int = 0,
    inc_size: bool = False,
    write_mask_valid: bool = False,
    non_arch: bool = False,
) -> int:
    """The 64-bit MD_FIELD_ID of these parts."""
    return (
        (context & 7) << 52
        | (class_code & 0x3F) << 56
        | field_code & FIELD_CODE_MASK
        | (size_code & 3) << 32
        | (last_element & 0xF) << 34
        | (last_field & 0x1FF) << 38
        | (INC_SIZE if inc_size else 0)
        | (WRITE_MASK_VALID if write_mask_valid else 0)
        | (NON_ARCH if non_arch else 0)
    )


@dataclass(frozen=True, slots=True)
class MdField:
    """One row of a table: a field, or an array of `num_fields` fields, of `num_elements` elements each.

    `offset` is where the first element lies in TDR, TDCS or TDVPS; None for SYS and VMCS fields. The masks say which
    bits each party may read and write; `guest_*` of an L2 VMCS field are the L1 VMM's. `export` and `import_` are
    the bits that migrate. A special field is read or written by code of its own, not by copying bytes.
    """

    table: str
    index: int
    name: str
    field_id: int
    class_name: str
    context: int
    class_code: int
    field_code: int
    size_code: int
    inc_size: bool
    num_fields: int
    num_elements: int
    offset: int | None
    attributes: FieldAttributes
    special_rd: bool
    special_wr: bool
    mig_export: str
    mig_import: str
    prod_rd: int
    prod_wr: int
    dbg_rd: int
    dbg_wr: int
    guest_rd: int
    guest_wr: int
    migtd_rd: int
    migtd_wr: int
    export: int
    import_: int

    @property
    def element_size(self) -> int:
        """Bytes of one element."""
        return 1 << self.size_code

    @property
    def stride(self) -> int:
        """How far the field codes of two neighbouring elements are apart."""
        return 2 if self.inc_size else 1

    @property
    def span(self) -> int:
        """How many field codes the whole array takes."""
        return self.num_fields * self.num_elements * self.stride

    @property
    def size(self) -> int:
        """Bytes of the whole array."""
        return self.num_fields * self.num_elements * self.element_size

    @property
    def full_name(self) -> str:
        """CLASS.NAME, as documents print it."""
        return f"{self.class_name}.{self.name}"

    @property
    def vmcs_encoding(self) -> int | None:
        """The VMCS encoding: the field code of the TD VMCS classes."""
        return self.field_code if self.table in ("vmcs", "l2_vmcs") else None

    def host_masks(self, debug: bool) -> tuple[int, int]:
        """(read, write) masks of the host VMM; a debug TD shows and lets change more."""
        return (self.dbg_rd, self.dbg_wr) if debug else (self.prod_rd, self.prod_wr)


class FieldPosition(NamedTuple):
    """Where a field id points: the row, the field in its array, the element in the field."""

    entry: MdField
    field: int
    element: int

    @property
    def offset(self) -> int | None:
        """Offset of the element in its control structure."""
        if self.entry.offset is None:
            return None
        return self.entry.offset + (self.field * self.entry.num_elements + self.element) * self.entry.element_size


class FieldTable:
    """The fields of one structure, in the order iteration follows."""

    def __init__(self, name: str, fields: tuple[MdField, ...]) -> None:
        """Take the rows as the data file orders them."""
        self.name = name
        self.fields = fields
        self.by_name: dict[str, MdField] = {field.name: field for field in fields}
        self._by_class: dict[int, list[MdField]] = {}
        for field in fields:
            self._by_class.setdefault(field.class_code, []).append(field)

    def __getitem__(self, name: str) -> MdField:
        """The field of this name."""
        return self.by_name[name]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.fields)

    def find(self, class_code: int, field_code: int) -> FieldPosition | None:
        """The row that covers a field code, and the position in it.

        CPUID_VALUES is found by its element bit alone; the leaf is for the caller to look up.
        """
        if self.name == "td" and class_code == TDCS_CPUID_CLASS:
            field_code &= 1
        if self.name == "l2_vmcs":
            class_code = VMCS_CLASS
        for entry in self._by_class.get(class_code, ()):
            distance = field_code - entry.field_code
            if 0 <= distance < entry.span:
                number = distance // entry.stride
                return FieldPosition(entry, number // entry.num_elements, number % entry.num_elements)
        return None


_TABLE_FILES: Final = {
    "sys": "fields_sys",
    "td": "fields_td",
    "vp": "fields_vp",
    "vmcs": "fields_vmcs",
    "l2_vmcs": "fields_l2_vmcs",
}
_MASK_COLUMNS: Final = 10


@cache
def table(name: str) -> FieldTable:
    """One of the tables: sys, td (TDR and TDCS), vp (TDVPS), vmcs (TD VMCS), l2_vmcs (TD VMCS of L2 VMs)."""
    rows = load(_TABLE_FILES[name])["rows"]
    return FieldTable(name, tuple(_field(name, index, row) for index, row in enumerate(rows)))


def tables() -> dict[str, FieldTable]:
    """All five tables by name."""
    return {name: table(name) for name in _TABLE_FILES}


def table_for(context: int, class_code: int) -> FieldTable | None:
    """The table that a context and class select; None for a context that does not exist."""
    if context == MdContext.SYS:
        return table("sys")
    if context == MdContext.TD:
        return table("td")
    if context != MdContext.VP:
        return None
    if class_code == VMCS_CLASS:
        return table("vmcs")
    return table("l2_vmcs" if class_code in L2_VMCS_CLASSES else "vp")


def _field(name: str, index: int, row: list[str | int | None]) -> MdField:
    title, raw_id, class_name, fields, elements, offset, attributes, special_rd, special_wr, out, into = row[
        :-_MASK_COLUMNS
    ]
    raw = int(str(raw_id), 16)
    parts = field_id(raw)
    masks = [int(str(mask), 16) for mask in row[-_MASK_COLUMNS:]]
    return MdField(
        name,
        index,
        str(title),
        raw,
        str(class_name),
        parts.context,
        parts.class_code,
        parts.field_code,
        parts.size_code,
        parts.inc_size,
        int(fields or 0),
        int(elements or 0),
        None if offset is None else int(offset),
        FieldAttributes(int(attributes or 0)),
        bool(special_rd),
        bool(special_wr),
        str(out),
        str(into),
        *masks,
    )


def describe(raw: int) -> str:
    """One line for any 64-bit value read as an MD_FIELD_ID."""
    if raw | CONTEXT_MASK == NULL_FIELD_ID:
        return "null field id (start or end of an iteration)"
    parts = field_id(raw)
    fields = table_for(parts.context, parts.class_code)
    found = fields.find(parts.class_code, parts.field_code) if fields is not None else None
    shape = f"context {parts.context}, class {parts.class_code}, field {parts.field_code:#x}"
    if found is None:
        return f"no such field ({shape})"
    name = found.entry.full_name
    if found.entry.name == "CPUID_VALUES" and found.entry.table == "td":
        code = CpuidFieldCode.decode(parts.field_code)
        subleaf = "" if code.subleaf is None else f", {code.subleaf:#x}"
        return f"{name}[leaf {code.leaf:#x}{subleaf}] element {code.element} ({shape})"
    if found.entry.num_fields > 1:
        name += f"[{found.field}]"
    if found.entry.num_elements > 1:
        name += f" element {found.element}"
    if parts.class_code in L2_VMCS_CLASSES and parts.context == MdContext.VP:
        name += f" of L2 VM {L2_VMCS_CLASSES.index(parts.class_code) + 1}"
    return f"{name} ({shape})"
