"""A TD with an entry of every kind in its secure EPT, and operands one bit off: for refusals of the memory leaves."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

from tdx_machine import ATTRIBUTES_DEBUG, HOST, MIB2, PAGE, Leaf, Machine, Td, td_params

from softtdx.abi.sept import HP, TDEL
from softtdx.abi.status import Operand, Status
from softtdx.module import pamt
from softtdx.module.td import LockId

# Where the TD has what.
MAPPED, BLOCKED, PENDING, FREE, FRESHLY_BLOCKED, PENDING_BLOCKED = (n * PAGE for n in range(6))
LARGE_PENDING = 2 * MIB2
LARGE_BLOCKED = 3 * MIB2
LARGE_FREE = 4 * MIB2
EMPTY_TABLE = 5 * MIB2  # an S-EPT page, blocked and tracked, all entries free
UNTRACKED_TABLE = 6 * MIB2  # the same, blocked but not tracked
SMALL_RUN = 7 * MIB2  # 512 adjacent pages, blocked and tracked
NO_TABLE = 1 << 39  # nothing below the root there

SHARED_BIT = 1 << 47
KEYED = 33 << 46
SHARED_KEYED = 1 << 46
NOT_IN_TDMR = HOST
RESERVED = 0x1000  # PT_RSVD


@dataclass(frozen=True)
class Row:
    """One way to be refused: operands that differ from the good call, a lock that somebody holds, and the answer."""

    name: str
    want: Status
    detail: int
    operands: dict[str, int] = field(default_factory=dict)
    held: str = ""

    def __str__(self) -> str:
        return self.name


class Scenario:
    """The machine with the TD `td` (runnable), a debug TD, and TDs in states that the leaves do not admit."""

    def __init__(self) -> None:
        self.machine = m = Machine()
        self.td = td = Td.create(m)
        td.add_path(MAPPED)
        self.mapped_page = td.add_page(MAPPED, b"mapped")
        td.add_page(BLOCKED, b"blocked")
        td.add_page(FRESHLY_BLOCKED, b"freshly blocked")
        for gpa in (EMPTY_TABLE, UNTRACKED_TABLE, SMALL_RUN):
            td.add_path(gpa)
        self.small_run_page = large = m.large()
        for n in range(512):
            m.ok(Leaf.MEM_PAGE_AUG, rcx=SMALL_RUN + n * PAGE, rdx=td.tdr, r8=large + n * PAGE)
        self.vcpu = td.finalize()
        td.aug(PENDING)
        td.aug(PENDING_BLOCKED)
        td.aug(LARGE_PENDING, 1)
        self.large_blocked_page = td.aug(LARGE_BLOCKED, 1)
        for gpa, level in ((BLOCKED, 0), (PENDING_BLOCKED, 0), (LARGE_BLOCKED, 1), (EMPTY_TABLE, 1), (SMALL_RUN, 1)):
            td.block(gpa, level)
        td.track()
        td.block(FRESHLY_BLOCKED)
        td.block(UNTRACKED_TABLE, 1)
        self.free_page = m.page()
        self.free_large = m.large()
        self.debug = debug = Td.create(m, params=td_params(attributes=ATTRIBUTES_DEBUG))
        debug.add_path(0)
        debug.add_page(0, b"debuggee")
        debug.finalize()
        debug.aug(PENDING)
        self.building = building = Td.create(m)
        building.add_path(0)
        building.add_page(0, b"measured")
        building.aug(PENDING)
        self.uninitialized = Td.create(m, initialize=False)
        self.keyless = Td(m, m.page(), m.next_hkid)
        m.ok(Leaf.MNG_CREATE, rcx=self.keyless.tdr, rdx=m.next_hkid)
        self.bare = Td(m, m.page(), m.next_hkid + 1)
        m.ok(Leaf.MNG_CREATE, rcx=self.bare.tdr, rdx=self.bare.hkid)
        m.ok(Leaf.MNG_KEY_CONFIG, rcx=self.bare.tdr)

    # --- what a refused call must not change
    def fingerprint(self) -> tuple[bytes, ...]:
        """All control structures of all TDs, and the PAMT of the pages in use; HP marks and locks aside."""
        m = self.machine
        memory, shift = m.platform.memory, m.module.g.hkid_shift
        parts = [memory.read(m.module.g.blocks[0].e4k + (0x100_0000 >> 8), 0x8000, seam=True)]
        parts.append(memory.read(m.module.g.blocks[0].e2m, 0x2000, seam=True))
        for td in (self.td, self.debug, self.building, self.uninitialized):
            parts.append(memory.read(td.tdr | m.module.g.global_key_bits, PAGE, seam=True))
            for page in [*td.tdcx, *td.tables.values()]:
                content = memory.read(page | td.hkid << shift, PAGE, seam=True)
                is_table = page in td.tables.values() or page == td.tdcx[3:4]
                parts.append(_without_marks(content) if is_table else content)
        return tuple(parts)

    def nothing_held(self) -> bool:
        """No lock is held; marks of host priority may stay."""
        return all(value & ~2 == 0 for value in self.machine.module.g.locks.state.values())

    # --- locks that another processor holds
    def holding(self, what: str, operands: dict[str, int]) -> AbstractContextManager[None]:
        """Hold a lock as another processor would.

        tdr, tdr-shared, op_state, sept, sept-shared, epoch: of the TD in RDX or :register; entry: the one in RCX;
        page:register, range:register: PAMT entries of what a register names; pa:address: of a page; key:number: a
        lock of the module by its key.
        """
        kind, _, rest = what.partition(":")
        tdr = operands.get(rest, operands.get("rdx", operands["rcx"])) & -PAGE
        if kind == "":
            return nullcontext()
        if kind == "tdr":
            return self._locked(tdr, True)
        if kind == "tdr-shared":
            return self._locked(tdr, False)
        if kind == "op_state":
            return self._locked(tdr | LockId.OP_STATE, True)
        if kind == "sept":
            return self._locked(tdr | LockId.SEPT, True)
        if kind == "sept-shared":
            return self._locked(tdr | LockId.SEPT, False)
        if kind == "epoch":
            return self._locked(tdr | LockId.EPOCH, False)
        if kind == "page":
            return self._locked(operands[rest], False)
        if kind == "range":
            return self._locked(operands[rest] & -MIB2 | pamt.KEY_2M, False)
        if kind == "key":
            return self._locked(int(rest), False)
        if kind == "pa":
            return self._locked(int(rest, 0), False)
        gpa, level = operands["rcx"] & ~7, operands["rcx"] & 7
        assert kind == "entry", kind
        if level > 3 or (level < 3 and (gpa & -(1 << (21 + 9 * level)), level + 1) not in self.td.tables):
            return nullcontext()  # another fault hides the entry
        return self._locked_entry(gpa & -(1 << (12 + 9 * level)), level)

    @contextmanager
    def _locked(self, key: int, exclusive: bool) -> Iterator[None]:
        locks = self.machine.module.g.locks
        assert locks.acquire(key, exclusive) == 0
        yield
        locks.release(key, exclusive)

    @contextmanager
    def _locked_entry(self, gpa: int, level: int) -> Iterator[None]:
        at = self.entry_address(self.td, gpa, level)
        memory = self.machine.platform.memory
        entry = int.from_bytes(memory.read(at, 8, seam=True), "little")
        assert not entry & TDEL
        memory.write(at, (entry | TDEL).to_bytes(8, "little"), seam=True)
        yield
        now = int.from_bytes(memory.read(at, 8, seam=True), "little")
        assert now | HP == entry | TDEL | HP, "a host that finds an entry locked leaves its mark and nothing else"
        memory.write(at, entry.to_bytes(8, "little"), seam=True)

    def entry_address(self, td: Td, gpa: int, level: int) -> int:
        """Where an entry lies: bus address under the TD's KeyID."""
        above = gpa & -(1 << (12 + 9 * (level + 1)))
        table = td.tdcx[3] if level == 3 else td.tables[above, level + 1]
        return (table | td.hkid << self.machine.module.g.hkid_shift) + (gpa >> (12 + 9 * level) & 0x1FF) * 8


def _without_marks(content: bytes) -> bytes:
    """An S-EPT page without the HP bits."""
    words = (int.from_bytes(content[at : at + 8], "little") & ~HP for at in range(0, PAGE, 8))
    return b"".join(word.to_bytes(8, "little") for word in words)


# --- rows that many leaves share
def tdr_rows(scenario: Scenario, register: str = "rdx", *, exclusive: bool = False, flag: bool = False) -> list[Row]:
    """The checks of a TDR operand, in order. `flag`: bit 0 of the operand is a flag of the leaf."""
    operand = Operand[register.upper()]
    td = scenario.td
    invalid = Status.OPERAND_INVALID
    rows = [
        Row("TDR misaligned", invalid, operand, {register: td.tdr | 0x800}),
        Row("TDR with a KeyID", invalid, operand, {register: td.tdr | KEYED}),
        Row("TDR with a shared KeyID", invalid, operand, {register: td.tdr | SHARED_KEYED}),
        Row("TDR above MAXPA", invalid, operand, {register: td.tdr | 1 << 52}),
        Row("TDR operand all ones", invalid, operand, {register: (1 << 64) - 1}),
        Row("TDR outside any TDMR", Status.OPERAND_ADDR_RANGE_ERROR, operand, {register: NOT_IN_TDMR}),
        Row(
            "TDR lock held",
            Status.OPERAND_BUSY,
            operand,
            held=f"tdr-shared:{register}" if exclusive else f"tdr:{register}",
        ),
        Row("a reserved page for a TDR", Status.PAGE_METADATA_INCORRECT, operand, {register: RESERVED}),
        Row("a free page for a TDR", Status.PAGE_METADATA_INCORRECT, operand, {register: scenario.free_page}),
        Row("a TDCS page for a TDR", Status.PAGE_METADATA_INCORRECT, operand, {register: td.tdcx[0]}),
        Row("a page of the TD for a TDR", Status.PAGE_METADATA_INCORRECT, operand, {register: scenario.mapped_page}),
    ]
    if not flag:
        rows.insert(0, Row("TDR with bit 0", invalid, operand, {register: td.tdr | 1}))
    return rows


def state_rows(
    scenario: Scenario, register: str = "rdx", *, op_state_lock: bool = True, wrong: tuple[Td, int] | None = None
) -> list[Row]:
    """The checks of the TD's state, in order; `wrong`: a TD in another OP_STATE that the leaf does not admit."""
    td, state = wrong or (scenario.uninitialized, 0)
    rows = [
        Row("no key", Status.TD_KEYS_NOT_CONFIGURED, 0, {register: scenario.keyless.tdr}),
        Row("no TDCS", Status.TDCS_NOT_ALLOCATED, 0, {register: scenario.bare.tdr}),
    ]
    if op_state_lock:
        rows.append(Row("OP_STATE lock held", Status.OPERAND_BUSY, Operand.OP_STATE, held=f"op_state:{register}"))
    rows.append(Row("OP_STATE", Status.OP_STATE_INCORRECT, state, {register: td.tdr}))
    return rows


def page_info_rows(good: int, levels: range, *, top: int = 3) -> list[Row]:
    """The checks of page information in RCX, in order."""
    invalid, rcx = Status.OPERAND_INVALID, Operand.RCX
    gpa = good & ~7
    level = good & 7
    rows = [
        Row("reserved bit 3", invalid, rcx, {"rcx": good | 8}),
        Row("reserved bit 52", invalid, rcx, {"rcx": good | 1 << 52}),
    ]
    rows.append(Row("reserved bit 63", invalid, rcx, {"rcx": good | 1 << 63}))
    if 0 not in levels:
        rows.append(Row("level too small", invalid, rcx, {"rcx": gpa | levels[0] - 1}))
    rows.append(Row("level too large", invalid, rcx, {"rcx": levels[-1] + 1}))
    rows.append(Row("level 7", invalid, rcx, {"rcx": 7}))
    rows.append(Row("GPA misaligned", invalid, rcx, {"rcx": good ^ (PAGE if level else 0x800)}))
    rows.append(Row("shared GPA", invalid, rcx, {"rcx": good | SHARED_BIT}))
    rows.append(Row("GPA above the width", invalid, rcx, {"rcx": good | 1 << 48}))
    return rows


def free_page_rows(scenario: Scenario, register: str, *, good: int | None = None) -> list[Row]:
    """The checks of an operand that must name a free 4 KiB page, in order."""
    operand = Operand[register.upper()]
    page = scenario.free_page if good is None else good
    return [
        Row("page misaligned", Status.OPERAND_INVALID, operand, {register: page | 0x800}),
        Row("page with a KeyID", Status.OPERAND_INVALID, operand, {register: page | KEYED}),
        Row("page with a shared KeyID", Status.OPERAND_INVALID, operand, {register: page | SHARED_KEYED}),
        Row("page above MAXPA", Status.OPERAND_INVALID, operand, {register: page | 1 << 52}),
        Row("page outside any TDMR", Status.OPERAND_ADDR_RANGE_ERROR, operand, {register: NOT_IN_TDMR}),
        Row("page lock held", Status.OPERAND_BUSY, operand, held=f"page:{register}"),
        Row("page reserved", Status.PAGE_METADATA_INCORRECT, operand, {register: RESERVED}),
        Row("page is a TDCS page", Status.PAGE_METADATA_INCORRECT, operand, {register: scenario.td.tdcx[0]}),
        Row("page of the same TD", Status.PAGE_METADATA_INCORRECT, operand, {register: scenario.mapped_page}),
        Row("page of another TD", Status.PAGE_METADATA_INCORRECT, operand, {register: scenario.debug.tdcx[0]}),
    ]


def walk_rows(good: int) -> list[Row]:
    """The tree lock, the walk and the entry lock, in order."""
    return [
        Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept"),
        Row("no table", Status.EPT_WALK_FAILED, Operand.RCX, {"rcx": NO_TABLE | good & 7}),
        Row("entry locked", Status.OPERAND_BUSY, Operand.RCX, held="entry"),
    ]
