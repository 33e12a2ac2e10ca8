"""Renders the tables of this package as Markdown: `softtdx abi docs DIR` writes the pages of docs/reference."""

from collections.abc import Iterable, Iterator

from softtdx.abi import MODULE_VERSION, cpuid, exits, explain, fields, ghci, leaves, msrs, sept, status
from softtdx.abi.opstate import HOST_MASKS, OpState

__all__ = ["pages"]


def pages() -> dict[str, str]:
    """File name to text of every page."""
    bodies = {
        "leaves.md": ("Leaf functions", _leaves()),
        "status.md": ("Completion statuses", _statuses()),
        "op-states.md": ("OP_STATE and the leaves it admits", _op_states()),
        "sept.md": ("Secure EPT", _sept()),
        "fields.md": ("Metadata fields", _fields()),
        "structures.md": ("Structures", _structures()),
        "msrs.md": ("MSRs of a TD", _msrs()),
        "cpuid.md": ("CPUID of a TD", _cpuid()),
        "exits.md": ("VM exits and TDG.VP.VMCALL", _exits()),
    }
    note = f"TDX module {MODULE_VERSION}. Written by `softtdx abi docs` from the tables of `softtdx.abi`."
    rendered = {
        name: f"# {title}\n\n{note}\n\n" + "\n".join(lines).rstrip() + "\n" for name, (title, lines) in bodies.items()
    }
    index = "\n".join(f"- [{title}]({name})" for name, (title, _) in bodies.items())
    rendered["README.md"] = f"# ABI reference\n\n{note}\n\n{index}\n"
    return rendered


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    columns = list(head)
    yield "| " + " | ".join(columns) + " |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"
    yield ""


def _leaves() -> Iterator[str]:
    yield f"Nearly every module leaf may return {', '.join(leaves.COMMON_STATUSES)}; a leaf names the others.\n"
    sides = (
        ("TDH.", "Host side: SEAMCALL"),
        ("TDG.", "Guest side: TDCALL"),
        ("SEAMLDR.", "SEAM loader: SEAMCALL, bit 63"),
    )
    for prefix, title in sides:
        yield f"## {title}\n"
        for info in leaves.leaf_infos().values():
            if info.mnemonic.startswith(prefix):
                yield from _leaf(info)


def _leaf(info: leaves.LeafInfo) -> Iterator[str]:
    number = f"{info.number:#x}" if info.number >> 63 else info.number
    yield f"### {info.mnemonic} ({number})\n"
    since = "" if info.since == "1.5.01" else f" Since: {info.since}."
    yield f"{info.summary}. Versions: {info.versions}.{since}\n"
    registers = [("in", *register) for register in info.inputs] + [("out", *register) for register in info.outputs]
    if registers:
        yield from _table(("", "register", "meaning"), registers)
    if info.statuses:
        yield f"Statuses: {', '.join(info.statuses)}.\n"


def _statuses() -> Iterator[str]:
    yield "Flags of RAX: E error (63), N non-recoverable (62), F fatal (61), H host-recoverability hint (60).\n"
    rows = ((f"`{int(s):#018x}`", s.name, _flags(s), s.klass, s.detail_l1, s.detail_kind.value) for s in status.Status)
    yield from _table(("RAX", "status", "flags", "class", "detail L1", "bits 31:0"), rows)
    yield "## Operand ids\n"
    yield from _table(("id", "operand"), ((int(operand), operand.name) for operand in status.Operand))
    yield "## SEAM loader\n"
    yield from _table(("RAX", "status"), ((f"`{int(s):#018x}`", s.name) for s in status.SeamldrStatus))


def _flags(s: status.Status) -> str:
    parts = status.split(int(s))
    letters = zip("ENFH", parts[:4], strict=True)
    return "".join(letter for letter, on in letters if on) or "-"


def _op_states() -> Iterator[str]:
    yield "A leaf without a row does not check OP_STATE by table.\n"
    head = ("leaf", *(f"{state.value} {state.name}" for state in OpState))
    rows = (
        (leaves.SeamcallLeaf(leaf).mnemonic, *("x" if mask >> state & 1 else "" for state in OpState))
        for leaf, mask in HOST_MASKS.items()
    )
    yield from _table(head, rows)


def _sept() -> Iterator[str]:
    yield "## States of an L1 entry\n"
    rows = ((s.name, f"{s.value:#04x}", sept.PUBLIC_STATE[s], f"`{sept.state_bits(s):#018x}`") for s in sept.SeptState)
    yield from _table(("state", "encoding", "public state", "bits"), rows)
    yield "## States of an L2 entry\n"
    l2_rows = ((s.name, f"{s.value:#04x}", sept.L2_PUBLIC_STATE[s]) for s in sept.L2SeptState)
    yield from _table(("state", "encoding", "public state"), l2_rows)
    yield "## Which leaf acts on which state\n"
    names = [
        *((leaves.SeamcallLeaf(leaf).mnemonic, states) for leaf, states in sept.HOST_ALLOWED.items()),
        *((leaves.TdcallLeaf(leaf).mnemonic, states) for leaf, states in sept.GUEST_ALLOWED.items()),
    ]
    matrix = ((name, *("x" if int(s) in states else "" for s in sept.SeptState)) for name, states in names)
    yield from _table(("leaf", *(s.name for s in sept.SeptState)), matrix)


_FIELD_TITLES = {
    "sys": "Global (TDH.SYS.RD, TDG.SYS.RD)",
    "td": "TD scope: TDR and TDCS",
    "vp": "vCPU scope: TDVPS",
    "vmcs": "vCPU scope: TD VMCS",
    "l2_vmcs": "vCPU scope: TD VMCS of an L2 VM (guest columns: the L1 VMM)",
}


def _fields() -> Iterator[str]:
    yield "Masks are hexadecimal; `-` is none. Shape: fields x elements x bytes. A special field has code of its own.\n"
    for name, title in _FIELD_TITLES.items():
        yield f"## {title}\n"
        head = (
            "field id",
            "field",
            "shape",
            "prod rd",
            "prod wr",
            "debug rd",
            "debug wr",
            "guest rd",
            "guest wr",
            "special",
        )
        yield from _table(head, (_field_row(entry) for entry in fields.table(name).fields))


def _field_row(entry: fields.MdField) -> tuple[object, ...]:
    masks = (entry.prod_rd, entry.prod_wr, entry.dbg_rd, entry.dbg_wr, entry.guest_rd, entry.guest_wr)
    special = "/".join(word for word, on in (("rd", entry.special_rd), ("wr", entry.special_wr)) if on)
    shape = f"{entry.num_fields} x {entry.num_elements} x {entry.element_size}"
    shown = (f"{mask:x}" if mask else "-" for mask in masks)
    return (f"`{entry.field_id:#018x}`", entry.full_name, shape, *shown, special or "-")


def _structures() -> Iterator[str]:
    for name in sorted(explain.structures()):
        facts = explain.explain_struct(name)
        yield f"## {name} ({facts['size']} bytes)\n"
        yield f"{facts['summary']}\n"
        rows = [(f["at"], f["size"], f["name"], f["structure"] or "") for f in facts["fields"]]
        rows += [(gap["at"], gap["size"], "reserved", "") for gap in facts["reserved"]]
        yield from _table(("offset", "bytes", "field", "structure"), sorted(rows))


def _msrs() -> Iterator[str]:
    yield "`no exit`: the TD uses the register itself. An exit becomes #VE, #GP, or is emulated (OTHER).\n"
    rows = []
    for row in msrs.policies():
        facts = explain.explain_msr(hex(row.first))
        number = f"{row.first:#x}" if row.first == row.last else f"{row.first:#x}-{row.last:#x}"
        rows.append((number, row.name, facts["read"], facts["write"]))
    yield from _table(("MSR", "name", "RDMSR", "WRMSR"), rows)


def _cpuid() -> Iterator[str]:
    yield "EAX, EBX, ECX, EDX in each cell; `-` is all zero. Bits in no mask are native.\n"
    head = ("leaf", "subleaf", "config", "fixed to 1", "fixed to 0 or dynamic", "configurable", "clearable")
    rows = (
        (
            f"{row.leaf:#x}",
            "-" if row.subleaf is None else f"{row.subleaf:#x}",
            "-" if row.config_index is None else row.config_index,
            *(_regs(regs) for regs in (row.fixed1, row.fixed0_or_dynamic, row.config_direct, row.allow_direct)),
        )
        for row in cpuid.rows()
    )
    yield from _table(head, rows)


def _regs(regs: cpuid.CpuidRegs) -> str:
    return " ".join(f"{value:08x}" for value in regs) if any(regs) else "-"


def _exits() -> Iterator[str]:
    yield "## Exit reasons\n"
    yield from _table(("reason", "name"), ((int(reason), reason.name) for reason in exits.ExitReason))
    yield "## #VE categories\n"
    yield from _table(("value", "name"), ((int(value), value.name) for value in exits.VeCategory))
    yield "## TDG.VP.VMCALL leaves\n"
    yield from _table(("R11", "name"), ((f"{int(leaf):#x}", leaf.name) for leaf in ghci.VmcallLeaf))
    yield "## TDG.VP.VMCALL statuses\n"
    yield from _table(("R10", "name"), ((f"{int(value):#x}", value.name) for value in ghci.VmcallStatus))
