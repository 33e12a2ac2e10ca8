"""Any number of the ABI, decoded: plain dictionaries for the command line, for JSON and for error messages."""

from typing import Any

from softtdx.abi import cpuid, exits, fields, leaves, msrs, sept, status, structs
from softtdx.abi.opstate import GUEST_MASKS, HOST_MASKS, OpState
from softtdx.abi.wire import Array, Bits, Field, Part, Wire
from softtdx.errors import SoftTdxError

__all__ = [
    "explain_cpuid",
    "explain_exit",
    "explain_field",
    "explain_leaf",
    "explain_msr",
    "explain_sept",
    "explain_status",
    "explain_struct",
    "parse_u64",
    "structures",
]

_U64 = (1 << 64) - 1
CPUID_MASKS = (
    "verify_mask",
    "verify_value",
    "verify_same",
    "fixed1",
    "fixed0_or_dynamic",
    "config_direct",
    "allow_direct",
)
FIELD_MASKS = ("prod_rd", "prod_wr", "dbg_rd", "dbg_wr", "guest_rd", "guest_wr", "migtd_rd", "migtd_wr", "export")


def parse_u64(text: str) -> int:
    """A number as people write it: 0x..., decimal, underscores allowed, or bare hex with a letter in it."""
    cleaned = text.strip().replace("_", "").replace("`", "").lower()
    try:
        value = int(cleaned, 0) if cleaned.startswith(("0x", "0b", "0o")) else _bare(cleaned)
    except ValueError:
        raise SoftTdxError(f"{text!r} is not a number; write hexadecimal (0x...) or decimal") from None
    if not 0 <= value <= _U64:
        raise SoftTdxError(f"{text!r} does not fit in 64 unsigned bits")
    return value


def _bare(text: str) -> int:
    return int(text, 10) if text.isdecimal() else int(text.removesuffix("h"), 16)


def explain_leaf(text: str) -> dict[str, Any]:
    """A leaf by name, or by number with its side: `seamcall 9`, `tdcall 4`."""
    info = leaves.find_leaf(text) or _leaf_by_number(text)
    if info is None:
        raise SoftTdxError(f"no leaf {text!r}; names are like TDH.MNG.CREATE (list: softtdx abi leaves)")
    allowed = _op_states(info)
    states = _sept_states(info)
    return {
        "name": info.mnemonic,
        "number": info.number,
        "versions": info.versions,
        "since": info.since,
        "summary": info.summary,
        "in": {register.name: register.meaning for register in info.inputs},
        "out": {register.name: register.meaning for register in info.outputs},
        "statuses": list(info.statuses),
        "op_states": allowed,
        "sept_states": states,
    }


def _leaf_by_number(text: str) -> leaves.LeafInfo | None:
    words = text.lower().split()
    if len(words) != 2 or words[0] not in ("seamcall", "tdcall", "tdh", "tdg"):
        return None
    number, prefix = parse_u64(words[1]), "TDH." if words[0] in ("seamcall", "tdh") else "TDG."
    infos = leaves.leaf_infos().values()
    return next((i for i in infos if i.number == number and i.mnemonic.startswith((prefix, "SEAMLDR."))), None)


def _op_states(info: leaves.LeafInfo) -> list[str] | None:
    masks = HOST_MASKS if info.mnemonic.startswith("TDH.") else GUEST_MASKS
    if info.number not in masks or info.mnemonic.startswith("SEAMLDR."):
        return None
    return [state.name for state in OpState if masks[info.number] >> state & 1]


def _sept_states(info: leaves.LeafInfo) -> list[str] | None:
    allowed = sept.HOST_ALLOWED if info.mnemonic.startswith("TDH.") else sept.GUEST_ALLOWED
    if info.number not in allowed or info.mnemonic.startswith("SEAMLDR."):
        return None
    return [state.name for state in sept.SeptState if int(state) in allowed[info.number]]


def explain_status(text: str) -> dict[str, Any]:
    """A status by RAX value or by name; SEAM loader statuses by value where no TDX status has it, or by name."""
    name = text.strip().upper().removeprefix("TDX_")
    if name in status.SeamldrStatus.__members__ and name not in status.Status.__members__:
        return _seamldr_status(status.SeamldrStatus[name])
    if name in status.Status.__members__:
        rax = int(status.Status[name])
    else:
        try:
            rax = parse_u64(text)
        except SoftTdxError:
            raise SoftTdxError(f"no status {text!r}; give RAX in hexadecimal or a name like OPERAND_BUSY") from None
    parts = status.split(rax)
    found = status.status_of(rax)
    if rax in status.SeamldrStatus._value2member_map_ and found.name.startswith("UNKNOWN_"):
        return _seamldr_status(status.SeamldrStatus(rax))
    return {"rax": f"{rax:#018x}", "status": found.name, "meaning": status.describe(rax)} | parts._asdict()


def _seamldr_status(found: status.SeamldrStatus) -> dict[str, Any]:
    return {"rax": f"{int(found):#018x}", "status": found.name, "meaning": f"SEAM loader: {found.name}"}


def explain_sept(entry: int, *, l2: bool = False) -> dict[str, Any]:
    """An S-EPT entry."""
    state = sept.l2_state_of(entry) if l2 else sept.state_of(entry)
    public: int | None = None
    if isinstance(state, sept.L2SeptState):
        public = sept.L2_PUBLIC_STATE[state]
    elif isinstance(state, sept.SeptState):
        public = sept.PUBLIC_STATE[state]
    return {
        "entry": f"{entry:#018x}",
        "state": state.name if state is not None else None,
        "public_state": public,
        "leaf": sept.is_leaf(entry),
        "hpa": f"{sept.hpa_of(entry):#x}",
        "read": bool(entry & sept.R),
        "write": bool(entry & sept.W),
        "execute": bool(entry & sept.X),
        "memory_type": (entry & sept.MT_MASK) >> sept.MT_SHIFT,
        "meaning": sept.describe(entry) if not l2 else f"L2 entry: {state.name if state is not None else 'no state'}",
        "leaves": _leaves_for_state(state) if isinstance(state, sept.SeptState) else [],
    }


def _leaves_for_state(state: sept.SeptState) -> list[str]:
    host = [leaves.SeamcallLeaf(leaf).mnemonic for leaf, states in sept.HOST_ALLOWED.items() if int(state) in states]
    guest = [leaves.TdcallLeaf(leaf).mnemonic for leaf, states in sept.GUEST_ALLOWED.items() if int(state) in states]
    return host + guest


def explain_field(text: str) -> dict[str, Any]:
    """A metadata field by MD_FIELD_ID or by name (HKID, TDR.HKID, TDCS.EXECUTION_CONTROLS.XFAM)."""
    found = _fields_by_name(text)
    if len(found) > 1:
        names = ", ".join(sorted({f"{entry.table}: {entry.full_name}" for entry in found}))
        raise SoftTdxError(f"{text!r} names {len(found)} fields ({names}); give the full name or the field id")
    raw = found[0].field_id if found else _field_id(text)
    parts = fields.field_id(raw)
    fields_table = fields.table_for(parts.context, parts.class_code)
    position = fields_table.find(parts.class_code, parts.field_code) if fields_table is not None else None
    result: dict[str, Any] = {"field_id": f"{raw:#018x}", "meaning": fields.describe(raw)} | parts._asdict()
    result["reserved_bits_set"] = bool(raw & fields.FIELD_ID_RESERVED)
    if position is not None:
        result["field"] = _field_facts(position)
    return result


def _field_id(text: str) -> int:
    try:
        return parse_u64(text)
    except SoftTdxError:
        raise SoftTdxError(f"no metadata field {text!r}; give its MD_FIELD_ID or its name, like TDCS MRTD") from None


def _fields_by_name(text: str) -> list[fields.MdField]:
    wanted = text.strip().upper().replace(" ", ".")
    everything = [entry for table in fields.tables().values() for entry in table.fields if table.name != "l2_vmcs"]
    return [entry for entry in everything if _answers_to(entry, wanted)]


def _answers_to(entry: fields.MdField, wanted: str) -> bool:
    structure = entry.class_name.split(".", 1)[0]
    name = entry.name.upper().replace(" ", ".")
    return wanted in (name, f"{structure}.{name}", f"{entry.class_name}.{name}".upper())


def _field_facts(position: fields.FieldPosition) -> dict[str, Any]:
    entry = position.entry
    facts: dict[str, Any] = {
        "table": entry.table,
        "name": entry.full_name,
        "element_size": entry.element_size,
        "num_fields": entry.num_fields,
        "num_elements": entry.num_elements,
        "offset": position.offset,
        "mig_export": entry.mig_export,
        "mig_import": entry.mig_import,
    }
    facts |= {mask: f"{getattr(entry, mask):#x}" for mask in FIELD_MASKS}
    return facts | {"import": f"{entry.import_:#x}"}


def explain_msr(text: str) -> dict[str, Any]:
    """An MSR by number or by name: what RDMSR and WRMSR of a TD become."""
    name = text.strip().upper().removeprefix("IA32_").removeprefix("MSR_")
    number = int(msrs.Msr[name]) if name in msrs.Msr.__members__ else parse_u64(text)
    row = msrs.policy(number)
    result: dict[str, Any] = {"msr": f"{number:#x}", "name": row.name if row else _msr_name(number)}
    if row is None:
        return result | {"read": "not in the table: always an exit, #GP or #VE", "write": "the same"}
    return result | {
        "read": _msr_access(row.rd_bitmap, row.rd_action),
        "write": _msr_access(row.wr_bitmap, row.wr_action),
    }


def _msr_name(number: int) -> str | None:
    found = msrs.Msr._value2member_map_.get(number)
    return found.name if found is not None else None


def _msr_access(bitmap: str, action: str) -> str:
    if bitmap == "FIXED_0":
        return "no exit"
    return f"exit, {action}" if bitmap == "FIXED_1" else f"by {bitmap.removeprefix('DYN_')}; on exit, {action}"


def explain_cpuid(leaf: int, subleaf: int = 0) -> dict[str, Any]:
    """How one CPUID leaf and subleaf are virtualised."""
    row = cpuid.find(leaf, subleaf)
    if row is None:
        return {
            "leaf": f"{leaf:#x}",
            "subleaf": f"{subleaf:#x}",
            "meaning": "not in the table: #VE, or 0 above the maximum",
        }
    shown = {
        mask: {reg: f"{value:#010x}" for reg, value in getattr(row, mask)._asdict().items()} for mask in CPUID_MASKS
    }
    return {
        "leaf": f"{row.leaf:#x}",
        "subleaf": None if row.subleaf is None else f"{row.subleaf:#x}",
        "index": row.index,
        "config_index": row.config_index,
    } | shown


def explain_exit(reason: int) -> dict[str, Any]:
    """A VMX exit reason."""
    return {"reason": f"{reason:#x}", "basic": reason & exits.EXIT_BASIC_MASK, "meaning": exits.describe_reason(reason)}


def structures() -> dict[str, type[Wire]]:
    """The structures of `softtdx.abi` by name."""
    from softtdx.abi import ghci, kvm_run, kvm_structs, migration

    return {
        name: value
        for module in (structs, migration, ghci, kvm_structs, kvm_run)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Wire) and value is not Wire
    }


def explain_struct(name: str) -> dict[str, Any]:
    """A structure: its fields, their offsets and sizes, and what is reserved."""
    by_lower = {key.lower(): kind for key, kind in structures().items()}
    kind = by_lower.get(name.strip().lower().replace("_", ""))
    if kind is None:
        raise SoftTdxError(f"no structure {name!r}; there are {', '.join(sorted(structures()))}")
    rows = [_wire_field(kind, field) for field in kind.fields]
    bit_fields = [
        {"of": bits.of.name, "low": bits.low, "width": bits.mask.bit_length(), "name": bits.name}
        for bits in vars(kind).values()
        if isinstance(bits, Bits)
    ]
    return {
        "name": kind.__name__,
        "size": kind.SIZE,
        "summary": (kind.__doc__ or "").strip().split("\n")[0],
        "fields": rows,
        "bits": bit_fields,
        "reserved": [{"at": at, "size": size} for at, size in kind.reserved()],
    }


def _wire_field(kind: type[Wire], field: Field) -> dict[str, Any]:
    descriptor = vars(kind)[field.name]
    inner = descriptor.kind.__name__ if isinstance(descriptor, (Part, Array)) else None
    return {"at": field.at, "size": field.size, "name": field.name, "count": field.count, "structure": inner}
