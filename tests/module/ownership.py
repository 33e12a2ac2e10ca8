"""An independent model of who owns which page, and a campaign of random calls that is checked against it.

The model knows nothing of the module's code: it keeps a dictionary of secure-EPT entries for each TD and one of what
each physical page is, and says from them what every call must answer. After each call the campaign walks the real
structures in DRAM and compares.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from guest_thread import GuestThread
from tdx_machine import MIB2, PAGE, SOURCE, Leaf, Machine, status
from tdx_machine import Td as TdPages

from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.sept import SeptState
from softtdx.abi.status import Operand, Status
from softtdx.abi.structs import PageType
from softtdx.attack.oracle import Oracle
from softtdx.hw.faults import BusFault

POOL = 0x100_0000  # where the machine takes control pages from
RANGES = [0x1000_0000 + n * MIB2 for n in range(6)]
SMALL_PER_RANGE = (48, 1, 1, 0, 0, 0)
GPAS = [0, PAGE, 5 * PAGE, MIB2, MIB2 + PAGE, 2 * MIB2, 1 << 30, 1 << 39]
BAD_INFO = [1 << 47, PAGE | 1, 8, 7, 1 << 52, 1 << 63 | 1, MIB2 | 5]
SECRET = b"a TD's own words "
OK = (Status.SUCCESS, 0)
INVALID_RCX = (Status.OPERAND_INVALID, Operand.RCX)
STATE_WRONG = (Status.EPT_ENTRY_STATE_INCORRECT, Operand.RCX)
WALK_FAILED = (Status.EPT_WALK_FAILED, Operand.RCX)
NOT_BLOCKED = (Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)
NOT_TRACKED = (Status.TLB_TRACKING_NOT_DONE, Operand.RCX)
METADATA_R8 = (Status.PAGE_METADATA_INCORRECT, Operand.R8)

Answer = tuple[Status, int]


class Chooser(Protocol):
    """Where randomness comes from: hypothesis in the tests, a seeded generator in long campaigns."""

    def pick(self, options: Sequence[Any]) -> Any: ...


@dataclass
class Entry:
    """What the model knows of an S-EPT entry that is not free."""

    state: SeptState
    page: int
    bepoch: int = 0
    accepted: bool = False  # the TD may know its content


@dataclass
class Tracked:
    """A TD in the model."""

    pages: TdPages
    vcpu: int
    name: int
    runnable: bool = False
    stage: str = "keyed"  # keyed, blocked, teardown
    entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    epoch: int = 1
    in_epoch: list[int] = field(default_factory=lambda: [0, 0])
    guest: GuestThread | None = None
    guest_epoch: int = 0
    lp: int | None = 0  # the processor it is associated with: VP.INIT did that

    @property
    def tdr(self) -> int:
        return self.pages.tdr

    def walk(self, gpa: int, level: int) -> tuple[int, Entry | None]:
        """(level reached, the entry there)."""
        for at in range(3, level, -1):
            entry = self.entries.get((gpa & -(1 << 12 + 9 * at), at))
            if entry is None or entry.state is not SeptState.NL_MAPPED:
                return at, entry
        return level, self.entries.get((gpa, level))

    def tracked(self, entry: Entry) -> bool:
        """Whether no vCPU can still use what was blocked."""
        if entry.bepoch == self.epoch - 1:
            return not self.in_epoch[entry.bepoch & 1]
        return entry.bepoch < self.epoch - 1


BLOCKED_OF = {
    SeptState.NL_MAPPED: SeptState.NL_BLOCKED,
    SeptState.MAPPED: SeptState.BLOCKED,
    SeptState.PENDING: SeptState.PENDING_BLOCKED,
}
UNBLOCKED_OF = {blocked: state for state, blocked in BLOCKED_OF.items()}
LEAF_STATES = {SeptState.MAPPED, SeptState.BLOCKED, SeptState.PENDING, SeptState.PENDING_BLOCKED}
NON_LEAF = {SeptState.NL_MAPPED, SeptState.NL_BLOCKED}


class Campaign:
    """One machine, its model, and the operations that a chooser picks from."""

    def __init__(self, chooser: Chooser) -> None:
        self.choose = chooser
        self.machine = Machine()
        self.oracle = Oracle(self.machine.platform)
        self.tds: list[Tracked] = []
        self.small = {
            base + n * PAGE: "" for base, count in zip(RANGES, SMALL_PER_RANGE, strict=True) for n in range(count)
        }  # page -> use
        self.large = dict.fromkeys(RANGES, "")
        self.beyond: set[int] = set()  # 4 KiB pages in use that are not in the pool: parts of a range that was split
        self.calls = 0
        self.names = 0
        for base in RANGES:
            self.machine.host_write(base, b"the host's words" * (MIB2 // 16))
        self.free_hkids = list(range(33, 64))
        self.operations: list[Callable[[], None]] = [
            self.create_td, self.grow, self.grow, self.add_table, self.add_page, self.add_page, self.finalize,
            self.aug, self.aug, self.aug_large, self.aug_large, self.block, self.unblock, self.track, self.remove,
            self.remove_table, self.promote, self.demote, self.relocate, self.retire, self.retire, self.merge,
            self.split, self.thaw, self.enter, self.enter, self.leave, self.accept, self.accept, self.accept,
            self.guest_writes, self.host_writes, self.host_snoops, self.garbage, self.end_td, self.reclaim,
        ]  # fmt: skip

    def step(self) -> None:
        """One random operation, and all that must hold after it."""
        self.choose.pick(self.operations)()
        self.check()

    def close(self) -> None:
        """Let every vCPU thread end."""
        for td in self.tds:
            if td.guest:
                td.guest.stop()

    # --- choosing operands
    def _td(self) -> Tracked | None:
        return self.choose.pick(self.tds) if self.tds else None

    def _info(self, td: Tracked, levels: Sequence[int], *, existing: bool = True) -> int:
        """Page information: mostly of an entry that can be reached, sometimes of any, sometimes malformed."""
        kind = self.choose.pick(range(16))
        if kind == 0:
            return self.choose.pick(BAD_INFO)
        level = self.choose.pick(levels)
        if kind > 2:
            there = [gpa | at for (gpa, at) in td.entries if at in levels][:64]
            if there and existing and kind > 5:
                return self.choose.pick(there)
            below = [gpa for (gpa, at), entry in td.entries.items() if at == level + 1 and entry.state in NON_LEAF]
            if level == 3 or below:
                base = 0 if level == 3 else self.choose.pick(below)
                return (
                    base + self.choose.pick([0, 1, 5] if level != 1 else [0, 1, 4, 5, 6, 7]) * (1 << 12 + 9 * level)
                    | level
                )
        return self.choose.pick(GPAS) & -(1 << 12 + 9 * level) | level

    def _call(self, leaf: Leaf, want: Answer | None, **operands: int) -> Any:
        self.calls += 1
        regs = self.machine.call(leaf, **operands)
        answer = status(regs.rax)
        if want is not None:
            shown = {name: hex(value) for name, value in operands.items()}
            assert answer == want, f"{leaf.name} {shown}: {answer}, the model says {want}"
        return regs

    # --- the checks that leaves share, as the model sees them
    def _refused(self, td: Tracked, info: int, levels: Sequence[int], *, exclusive: bool = False) -> Answer | None:
        """TD state and page information."""
        if exclusive and td.guest:
            return Status.OPERAND_BUSY, Operand.RDX
        if td.stage != "keyed":
            return Status.TD_KEYS_NOT_CONFIGURED, 0
        if exclusive and td.runnable:
            return Status.OP_STATE_INCORRECT, 2
        level = info & 7
        if level not in levels or info & ((1 << 12 + 9 * level) - 8) or info >> 47:
            return INVALID_RCX
        return None

    def _found(
        self, td: Tracked, info: int, levels: Sequence[int], states: set[SeptState | None], *, exclusive: bool = False
    ) -> tuple[Answer | None, Entry | None]:
        refused = self._refused(td, info, levels, exclusive=exclusive)
        if refused:
            return refused, None
        reached, entry = td.walk(info & ~7, info & 7)
        if reached != info & 7:
            return WALK_FAILED, None
        if (entry.state if entry else None) not in states:
            return STATE_WRONG, entry
        return None, entry

    def _untracked(self, td: Tracked, entry: Entry) -> Answer | None:
        """Running TDs give nothing away that is not blocked and tracked."""
        if not td.runnable:
            return None
        if entry.state in BLOCKED_OF:
            return NOT_BLOCKED
        return None if td.tracked(entry) else NOT_TRACKED

    def _free_small(self, page: int) -> Answer | None:
        base = page & -MIB2
        if self.large.get(base):
            return METADATA_R8
        if page in self.small:
            return METADATA_R8 if self.small[page] else None
        return METADATA_R8 if page in self.beyond else None

    def _free_large(self, base: int) -> Answer | None:
        if self.large[base] or any(use for page, use in self.small.items() if page & -MIB2 == base):
            return METADATA_R8
        return METADATA_R8 if any(page & -MIB2 == base for page in self.beyond) else None

    def _small_page(self) -> int:
        """Any page of the pool, more often a free one."""
        free = [page for page in self.small if self._free_small(page) is None]
        return self.choose.pick(free if free and self.choose.pick(range(4)) else list(self.small))

    def _large_page(self) -> int:
        """Any 2 MiB range, more often a free one."""
        free = [base for base in RANGES if self._free_large(base) is None]
        return self.choose.pick(free if free and self.choose.pick(range(4)) else RANGES)

    def _use(self, page: int, use: str) -> None:
        if page in self.small:
            self.small[page] = use
        elif use:
            self.beyond.add(page)
        else:
            self.beyond.discard(page)

    # --- host operations
    def create_td(self) -> None:
        if len(self.tds) >= 3 or not self.free_hkids:
            return
        self.machine.next_hkid = self.free_hkids.pop(0)
        pages = TdPages.create(self.machine)
        self.names += 1
        self.tds.append(Tracked(pages, pages.add_vcpu(), self.names))
        self.calls += 16

    def add_table(self) -> None:
        if not (td := self._td()):
            return
        info, page = self._info(td, [1, 1, 1, 2, 2, 3, 0], existing=False), self._small_page()
        states: set[SeptState | None] = {None, SeptState.NL_MAPPED}
        want, entry = self._found(td, info, range(1, 4), states)
        if not want and entry:
            want = STATE_WRONG
        want = want or self._free_small(page)
        self._call(Leaf.MEM_SEPT_ADD, want or OK, rcx=info, rdx=td.tdr, r8=page)
        if not want:
            td.entries[info & ~7, info & 7] = Entry(SeptState.NL_MAPPED, page)
            self._use(page, "table")

    def grow(self) -> None:
        """All the tables that a 4 KiB page at some GPA needs."""
        if not (td := self._td()) or td.stage != "keyed":
            return
        gpa = self.choose.pick(GPAS[:6])
        for level in (3, 2, 1):
            base = gpa & -(1 << 12 + 9 * level)
            page = next((page for page in self.small if self._free_small(page) is None), None)
            if page is None or td.walk(base, level)[0] != level or (base, level) in td.entries:
                continue
            self._call(Leaf.MEM_SEPT_ADD, OK, rcx=base | level, rdx=td.tdr, r8=page)
            td.entries[base, level] = Entry(SeptState.NL_MAPPED, page)
            self._use(page, "table")

    def add_page(self) -> None:
        if not (td := self._td()):
            return
        info, page = self._info(td, [0, 0, 0, 0, 1], existing=False), self._small_page()
        want, _ = self._found(td, info, [0], {None}, exclusive=True)
        want = want or self._free_small(page)
        self.machine.host_write(SOURCE, self._secret(td, info))
        self._call(Leaf.MEM_PAGE_ADD, want or OK, rcx=info, rdx=td.tdr, r8=page, r9=SOURCE)
        if not want:
            td.entries[info & ~7, 0] = Entry(SeptState.MAPPED, page, accepted=True)
            self._use(page, "page")

    def finalize(self) -> None:
        if not (td := self._td()) or self.choose.pick(range(3)):
            return
        want: Answer = OK
        if td.guest:
            want = Status.OPERAND_BUSY, Operand.RCX
        elif td.stage != "keyed":
            want = Status.TD_KEYS_NOT_CONFIGURED, 0
        elif td.runnable:
            want = Status.OP_STATE_INCORRECT, 2
        self._call(Leaf.MR_FINALIZE, want, rcx=td.tdr)
        td.runnable |= want == OK

    def aug(self) -> None:
        if not (td := self._td()):
            return
        info, page = self._info(td, [0], existing=False), self._small_page()
        want, _ = self._found(td, info, range(2), {None})
        if not want and info & 7:
            return
        want = want or self._free_small(page)
        self._call(Leaf.MEM_PAGE_AUG, want or OK, rcx=info, rdx=td.tdr, r8=page)
        if not want:
            td.entries[info & ~7, 0] = Entry(SeptState.PENDING, page)
            self._use(page, "page")

    def aug_large(self) -> None:
        if not (td := self._td()):
            return
        info, base = self._info(td, [1], existing=False), self._large_page()
        want, _ = self._found(td, info, range(2), {None})
        if not want and not info & 7:
            return
        want = want or self._free_large(base)
        self._call(Leaf.MEM_PAGE_AUG, want or OK, rcx=info, rdx=td.tdr, r8=base)
        if not want:
            td.entries[info & ~7, 1] = Entry(SeptState.PENDING, base)
            self.large[base] = "page"

    def block(self, td: Tracked | None = None, info: int | None = None) -> None:
        if not (td := td or self._td()):
            return
        info = self._info(td, [0, 0, 0, 0, 0, 0, 1, 1, 1, 2]) if info is None else info
        want, entry = self._found(td, info, range(4), set(BLOCKED_OF))
        if want == STATE_WRONG and entry and entry.state in UNBLOCKED_OF:
            want = Status.GPA_RANGE_ALREADY_BLOCKED, Operand.RCX
        self._call(Leaf.MEM_RANGE_BLOCK, want or OK, rcx=info, rdx=td.tdr)
        if not want and entry:
            entry.state, entry.bepoch = BLOCKED_OF[entry.state], td.epoch

    def unblock(self, td: Tracked | None = None, info: int | None = None) -> None:
        if not (td := td or self._td()):
            return
        info = self._info(td, [0, 0, 0, 1, 1, 2, 3]) if info is None else info
        want, entry = self._found(td, info, range(4), set(UNBLOCKED_OF))
        if not want and entry:
            want = self._untracked(td, entry)
        self._call(Leaf.MEM_RANGE_UNBLOCK, want or OK, rcx=info, rdx=td.tdr)
        if not want and entry:
            entry.state = UNBLOCKED_OF[entry.state]

    def track(self, td: Tracked | None = None) -> None:
        if not (td := td or self._td()):
            return
        want: Answer = OK
        if td.stage != "keyed":
            want = Status.TD_KEYS_NOT_CONFIGURED, 0
        elif td.in_epoch[1 - (td.epoch & 1)]:
            want = Status.PREVIOUS_TLB_EPOCH_BUSY, 0
        self._call(Leaf.MEM_TRACK, want, rcx=td.tdr)
        td.epoch += want == OK

    def remove(self, td: Tracked | None = None, info: int | None = None) -> None:
        if not (td := td or self._td()):
            return
        info = self._info(td, [0, 0, 0, 1, 2]) if info is None else info
        want, entry = self._found(td, info, range(3), set(LEAF_STATES))
        if not want and entry:
            want = self._untracked(td, entry)
        regs = self._call(Leaf.MEM_PAGE_REMOVE, want or OK, rcx=info, rdx=td.tdr)
        if not want and entry:
            assert regs.rcx == entry.page
            del td.entries[info & ~7, info & 7]
            self._freed(entry.page, info & 7)

    def _freed(self, page: int, level: int) -> None:
        if level:
            self.large[page] = ""
        else:
            self._use(page, "")
        content = self.machine.lps[0].read(page, PAGE)
        assert SECRET not in content, "a page came back with the TD's words in it"

    def remove_table(self) -> None:
        if not (td := self._td()):
            return
        info = self._info(td, [1, 1, 2, 3])
        want, entry = self._found(td, info, range(1, 4), set(NON_LEAF))
        if not want and entry:
            want = self._untracked(td, entry)
            if not want and self._children(td, info):
                want = Status.EPT_PAGE_NOT_FREE, Operand.RCX
        regs = self._call(Leaf.MEM_SEPT_REMOVE, want or OK, rcx=info, rdx=td.tdr)
        if not want and entry:
            assert regs.rcx == entry.page
            del td.entries[info & ~7, info & 7]
            self._freed(entry.page, 0)

    def _children(self, td: Tracked, info: int) -> dict[int, Entry]:
        """The entries in the table below `info`, by GPA."""
        gpa, level = info & ~7, info & 7
        size = 1 << 12 + 9 * level
        return {at: e for (at, below), e in td.entries.items() if below == level - 1 and gpa <= at < gpa + size}

    def promote(self, td: Tracked | None = None, info: int | None = None) -> None:
        if not (td := td or self._td()):
            return
        info = self._info(td, [1, 1, 1, 2]) if info is None else info
        want, entry = self._found(td, info, range(1, 3), set(NON_LEAF))
        children: dict[int, Entry] = {}
        if not want and entry:
            children = self._children(td, info)
            want = self._untracked(td, entry)
            if not want and not self._mergeable(children, info):
                want = Status.EPT_INVALID_PROMOTE_CONDITIONS, Operand.RCX
        regs = self._call(Leaf.MEM_PAGE_PROMOTE, want or OK, rcx=info, rdx=td.tdr)
        if not want and entry:
            assert regs.rcx == entry.page
            first = children[info & ~7]
            for gpa in children:
                del td.entries[gpa, 0]
            td.entries[info & ~7, 1] = Entry(first.state, first.page, accepted=first.accepted)
            self._use(entry.page, "")
            for page in range(first.page, first.page + MIB2, PAGE):
                self._use(page, "")
            self.large[first.page] = "page"

    def _mergeable(self, children: dict[int, Entry], info: int) -> bool:
        first = children.get(info & ~7)
        if info & 7 != 1 or len(children) != 512 or first is None or first.page % MIB2:
            return False
        if first.state not in (SeptState.MAPPED, SeptState.PENDING):
            return False
        return all(
            entry.state is first.state and entry.page - first.page == gpa - (info & ~7)
            for gpa, entry in children.items()
        )

    def demote(self, td: Tracked | None = None, info: int | None = None) -> None:
        if not (td := td or self._td()):
            return
        info, table = self._info(td, [1, 1, 1, 2]) if info is None else info, self._small_page()
        want, entry = self._found(td, info, range(1, 3), set(LEAF_STATES))
        if not want and entry:
            want = self._untracked(td, entry) or self._free_small(table)
        self._call(Leaf.MEM_PAGE_DEMOTE, want or OK, rcx=info, rdx=td.tdr, r8=table, r9=0, r10=0, r11=0)
        if not want and entry:
            state = UNBLOCKED_OF.get(entry.state, entry.state)
            td.entries[info & ~7, 1] = Entry(SeptState.NL_MAPPED, table)
            self._use(table, "table")
            self.large[entry.page] = ""
            for n in range(512):
                page = entry.page + n * PAGE
                td.entries[(info & ~7) + n * PAGE, 0] = Entry(state, page, accepted=entry.accepted)
                self._use(page, "page")

    # --- whole sequences, so that what needs three calls in a row happens often
    def _reachable(self, td: Tracked, level: int, states: set[SeptState]) -> list[int]:
        return [
            gpa | at
            for (gpa, at), entry in td.entries.items()
            if at == level and entry.state in states and td.walk(gpa, at)[0] == at
        ]

    def _one_of(self, level: int, states: set[SeptState]) -> tuple[Tracked, int] | None:
        td = self._td()
        there = self._reachable(td, level, states) if td and td.stage == "keyed" else []
        return (td, self.choose.pick(there[:64])) if td and there else None

    def retire(self) -> None:
        """Block, track, remove a page."""
        if found := self._one_of(self.choose.pick([0, 0, 0, 1]), LEAF_STATES):
            self.block(*found)
            self.track(found[0])
            self.remove(*found)

    def merge(self) -> None:
        """Block, track, promote; a table full of pages when there is one."""
        full = [
            (td, info)
            for td in self.tds
            if td.stage == "keyed"
            for info in self._reachable(td, 1, NON_LEAF)
            if len(self._children(td, info)) == 512
        ]
        found = self.choose.pick(full) if full else self._one_of(1, NON_LEAF)
        if found:
            self.block(*found)
            self.track(found[0])
            self.promote(*found)
            self.thaw(found[0])

    def split(self) -> None:
        """Block, track, demote; one split range at a time is enough."""
        if len(self.beyond) < 400 and (found := self._one_of(1, LEAF_STATES)):
            self.block(*found)
            self.track(found[0])
            self.demote(*found)

    def thaw(self, td: Tracked | None = None) -> None:
        """Unblock the tables of a TD, from the top."""
        if not (td := td or self._td()) or td.stage != "keyed":
            return
        for level in (3, 2, 1):
            for info in self._reachable(td, level, {SeptState.NL_BLOCKED}):
                self.unblock(td, info)

    def relocate(self) -> None:
        if not (td := self._td()):
            return
        info, page = self._info(td, [0]), self._small_page()
        want, entry = self._found(td, info, [0], set(LEAF_STATES))
        if not want and entry:
            if entry.page == page:
                want = Status.OPERAND_INVALID, Operand.R8
            want = want or self._untracked(td, entry) or self._free_small(page)
        regs = self._call(Leaf.MEM_PAGE_RELOCATE, want or OK, rcx=info, rdx=td.tdr, r8=page)
        if not want and entry:
            assert regs.rcx == entry.page
            self._use(page, "page")
            old, entry.page = entry.page, page
            entry.state = UNBLOCKED_OF.get(entry.state, entry.state)
            self._freed(old, 0)

    # --- the guest
    def enter(self) -> None:
        """A vCPU runs on the second processor."""
        td = self._td()
        if td is None or td.guest or any(other.guest for other in self.tds) or td.stage != "keyed" or not td.runnable:
            return
        if td.lp == 0:
            self.machine.ok(Leaf.VP_FLUSH, rcx=td.vcpu)
        td.lp = 1
        td.guest = GuestThread(self.machine.lps[1], td.vcpu)
        assert td.guest.exit is None, status(td.guest.exit.rax)
        td.guest_epoch = td.epoch
        td.in_epoch[td.epoch & 1] += 1
        self.calls += 1

    def leave(self) -> None:
        for td in self.tds:
            if td.guest:
                td.guest.interrupt()
                self._left(td)

    def _left(self, td: Tracked) -> None:
        td.guest = None
        td.in_epoch[td.guest_epoch & 1] -= 1

    def accept(self) -> None:
        td = next((td for td in self.tds if td.guest), None)
        if td is None or td.guest is None:
            return
        info = self._info(td, [0, 0, 0, 1])
        pending = [gpa | at for (gpa, at), entry in td.entries.items() if entry.state is SeptState.PENDING]
        if pending and self.choose.pick(range(2)):
            info = self.choose.pick(sorted(pending, key=lambda info: -(info & 7))[:8])
        want = self._accept_answer(td, info)
        self.calls += 1
        answer = td.guest.tdcall(TdcallLeaf.MEM_PAGE_ACCEPT, rcx=info)
        if want is None:
            assert answer is None, f"ACCEPT {info:#x}: {answer}, the model says TD exit"
            self._left(td)
            return
        assert answer is not None, f"ACCEPT {info:#x}: TD exit, the model says {want}"
        assert status(answer.rax) == want, f"ACCEPT {info:#x}"
        if want == OK:
            entry = td.entries[info & ~7, info & 7]
            entry.state, entry.accepted = SeptState.MAPPED, True
            size = MIB2 if info & 7 else PAGE
            assert not any(self._td_read(td, entry.page, size)), "an accepted page is zero"

    def _accept_answer(self, td: Tracked, info: int) -> Answer | None:
        """None: an EPT violation for the host."""
        level = info & 7
        if level > 1 or info & ((1 << 12 + 9 * level) - 8) or info >> 47:
            return INVALID_RCX
        reached, entry = td.walk(info & ~7, level)
        mapped = entry is not None and entry.state is SeptState.MAPPED
        if mapped:
            return Status.PAGE_ALREADY_ACCEPTED, reached
        if reached != level:
            return None
        if entry is not None and entry.state in NON_LEAF:
            return Status.PAGE_SIZE_MISMATCH, level
        return OK if entry is not None and entry.state is SeptState.PENDING else None

    def _keyed(self, td: Tracked, page: int) -> int:
        return page | td.pages.hkid << self.machine.module.g.hkid_shift

    def _td_read(self, td: Tracked, page: int, size: int) -> bytes:
        return self.machine.platform.memory.read(self._keyed(td, page), size, seam=True)

    def _secret(self, td: Tracked, gpa: int) -> bytes:
        return (SECRET + f"{td.name} {gpa:#x} ".encode()).ljust(64, b".") * 64

    def guest_writes(self) -> None:
        """The TD fills its pages with its secret, as stores through its S-EPT would."""
        td = next((td for td in self.tds if td.guest), None)
        if td is None:
            return
        for (gpa, level), entry in td.entries.items():
            if entry.state is SeptState.MAPPED and td.walk(gpa, level)[0] == level:
                self.machine.platform.memory.write(self._keyed(td, entry.page), self._secret(td, gpa), seam=True)

    # --- the host tries things
    def host_writes(self) -> None:
        """The host uses a page that is its own."""
        base = self.choose.pick(RANGES)
        if self._free_large(base) is None:
            for page in (base, base + PAGE, base + MIB2 - PAGE):
                self.machine.host_write(page, b"the host's words" * 256)

    def host_snoops(self) -> None:
        """The host reads pages of TDs through KeyIDs of all kinds."""
        if not (td := self._td()):
            return
        lp = self.machine.lps[0]
        for entry in list(td.entries.values())[:8]:
            keyid = self.choose.pick(range(32))
            assert SECRET not in lp.read(entry.page | keyid << 46, PAGE)
        keyid = self.choose.pick([32, td.pages.hkid, 63])
        try:
            lp.read(td.pages.tdcx[0] | keyid << 46, 8)
        except BusFault:
            return
        raise AssertionError(f"the host read through the private KeyID {keyid}")

    def garbage(self) -> None:
        """A call that makes no sense: it fails, and the checks after the step find nothing changed."""
        leaf = self.choose.pick([leaf for leaf in Leaf if leaf.name.startswith(("MEM_", "MR_"))])
        junk = [0, 1, PAGE, self._small_page(), (1 << 64) - 1, 1 << 52, 1 << 46, 0x6000_0000]
        operands = {name: self.choose.pick(junk) for name in ("rcx", "rdx", "r8", "r9")}
        regs = self._call(leaf, None, **operands)
        assert status(regs.rax)[0].is_error, leaf.name

    # --- the end of a TD
    def end_td(self) -> None:
        """One step further towards the end of a TD; only now and then, that TDs get old."""
        td = self._td()
        if td is None or self.choose.pick(range(15)) or td.guest or (td.lp and any(other.guest for other in self.tds)):
            return
        if td.stage == "keyed":
            if td.lp is not None:
                self.machine.ok(Leaf.VP_FLUSH, td.lp, rcx=td.vcpu)
                td.lp = None
            self._call(Leaf.MNG_VPFLUSHDONE, OK, rcx=td.tdr)
            td.stage = "blocked"
        elif td.stage == "blocked":
            self._call(Leaf.PHYMEM_CACHE_WB, OK, rcx=0)
            self._call(Leaf.MNG_KEY_FREEID, OK, rcx=td.tdr)
            self.free_hkids.append(td.pages.hkid)
            td.stage = "teardown"

    def reclaim(self) -> None:
        """PHYMEM.PAGE.RECLAIM of any page: only pages of a TD that is being torn down come back."""
        td = self._td()
        if td is None:
            return
        if td.stage != "teardown":
            for entry in list(td.entries.values())[:1]:
                self._call(Leaf.PHYMEM_PAGE_RECLAIM, (Status.LIFECYCLE_STATE_INCORRECT, 0), rcx=entry.page)
            return
        if td.entries:
            self._call(Leaf.PHYMEM_PAGE_RECLAIM, (Status.TD_ASSOCIATED_PAGES_EXIST, 0), rcx=td.tdr)
            for (gpa, level), entry in list(td.entries.items()):
                self._call(Leaf.PHYMEM_PAGE_RECLAIM, OK, rcx=entry.page)
                del td.entries[gpa, level]
                self._freed(entry.page, level if entry.state in LEAF_STATES else 0)
        td.pages.reclaim_control_pages()
        self.tds.remove(td)

    # --- what must hold after every step
    def check(self) -> None:
        """The structures in DRAM are sound, and say what the model says."""
        control = range(POOL, self.machine.next_page + MIB2, MIB2)
        views = self.oracle.check([*control, *RANGES], running=any(td.guest for td in self.tds))
        owned: dict[int, tuple[int, int, int]] = {}  # page -> (level, PAMT type, owner)
        entries = 0
        for td in self.tds:
            if td.stage != "teardown":
                view = views[td.tdr]
                assert view.entries == {at: (e.state, e.page) for at, e in td.entries.items()}
                assert view.children == self._children_of(td)
                assert (view.epoch, list(view.refcounts)) == (td.epoch, td.in_epoch)
            for (_, level), entry in td.entries.items():
                table = entry.state in NON_LEAF
                owned[entry.page] = (0, PageType.EPT, td.tdr) if table else (level, PageType.REG, td.tdr)
            entries += len(td.entries)
        assert len(owned) == entries, "a page has two owners"
        assert self.oracle.owned(RANGES) == owned

    def _children_of(self, td: Tracked) -> int:
        leaves = [level for (_, level), entry in td.entries.items() if entry.state in LEAF_STATES]
        tables = len(td.entries) - len(leaves)
        return sum(512**level for level in leaves) + tables + 12  # 6 TDCS pages, 6 TDVPS pages
