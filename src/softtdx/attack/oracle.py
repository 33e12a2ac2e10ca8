"""What must hold of a TDX module between any two calls, read from DRAM alone.

The oracle knows the layouts of PAMT, TDR, TDCS and S-EPT and none of the module's code paths: it walks the structures
as a logic analyser would and says where they contradict each other. Random campaigns ask it after their calls; the
module's own tests compare what it reads with a model of who owns what.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from softtdx.abi import sept
from softtdx.abi.opstate import LifecycleState, OpState
from softtdx.abi.sept import L2SeptState, SeptState
from softtdx.abi.structs import Attributes, PageType
from softtdx.hw import Platform
from softtdx.hw.faults import BusFault, MachineCheck
from softtdx.module import tdcs, tdr
from softtdx.module.locks import HOST_PRIORITY
from softtdx.module.pamt import ENTRY_SIZE, node_page, owner_of
from softtdx.module.state import GlobalState, HkidState, PamtBlock, SysState

__all__ = ["BrokenInvariantError", "Entries", "Oracle", "TdView"]

_PAGE: Final = 4096
_2M: Final = 1 << 21
_1G: Final = 1 << 30
_USED: Final = re.compile(rb"[^\x00\x01]")  # page types but NDA and RSVD
_FIRST: Final = struct.Struct("<Q")
_NON_LEAF: Final = frozenset({SeptState.NL_MAPPED, SeptState.NL_BLOCKED})
_NO_PAGE: Final = frozenset({SeptState.FREE, SeptState.REMOVED})
_PRESENT: Final = frozenset(
    {SeptState.NL_MAPPED, SeptState.MAPPED, SeptState.BLOCKEDW, SeptState.EXPORTED_BLOCKEDW, SeptState.EXPORTED_DIRTY,
     SeptState.EXPORTED_DIRTY_BLOCKEDW}
)  # fmt: skip
_L2_TABLES: Final = frozenset({L2SeptState.NL_MAPPED, L2SeptState.NL_BLOCKED})
_CONTROL: Final = frozenset({PageType.TDR, PageType.TDCX, PageType.TDVPR})
_TD_OWNED: Final = frozenset({PageType.REG, PageType.TDCX, PageType.TDVPR, PageType.EPT})
_LAST_LIFECYCLE, _LAST_OP_STATE = max(LifecycleState), max(OpState)
_WORDS: Final = struct.Struct("<512Q")
_TABLES_KEPT: Final = 512

Entries = dict[tuple[int, int], tuple[SeptState, int]]
"""S-EPT entries that are not free: (GPA, level) -> (state, address of the page or of the table below)."""


class BrokenInvariantError(Exception):
    """An invariant does not hold."""


@dataclass
class TdView:
    """A TD as its TDR and TDCS say. `op_state` and what follows are None where the TD has no TDCS or no key."""

    pa: int
    uuid: bytes
    fatal: bool
    lifecycle: LifecycleState
    hkid: int
    children: int
    tdcx: list[int]
    op_state: OpState | None = None
    epoch: int = 0
    refcounts: tuple[int, int] = (0, 0)
    identity: bytes = b""
    levels: int = 4
    entries: Entries = field(default_factory=dict)
    tables: set[int] = field(default_factory=set)


class Oracle:
    """Reads the structures of the module that `platform` runs now; remembers of each TD what may not change."""

    def __init__(self, platform: Platform) -> None:
        """For a platform whose module this process loaded."""
        self.platform = platform
        self._tables: dict[bytes, list[tuple[int, SeptState, int]]] = {}
        self._known: dict[bytes, TdView] = {}  # by TD UUID, as of the last check

    @property
    def state(self) -> GlobalState:
        """The module's global data. BrokenInvariantError when there is no module any more."""
        module = self.platform.seam.module
        if module is None:
            raise BrokenInvariantError("the TDX module is gone")
        return cast(GlobalState, module.g)  # type: ignore[attr-defined]

    # --- reading
    def _read(self, pa: int, size: int, hkid: int) -> bytes:
        try:
            return self.platform.memory.read(self.state.keyed(pa, hkid), size, seam=True)
        except (MachineCheck, BusFault) as error:
            raise BrokenInvariantError(f"a structure at {pa:#x} cannot be read under KeyID {hkid}: {error}") from error

    def pamt(self, pa: int) -> tuple[int, int, int]:
        """(level, page type, owner) of the PAMT entry that stands for a page; free where there is no PAMT (yet)."""
        block = self.state.blocks.get(pa >> 30)
        if block is None:
            return 0, 0, 0
        read = self.platform.memory.read
        large = read(block.e2m + ((pa & _1G - 1) >> 17 & -ENTRY_SIZE), ENTRY_SIZE, seam=True)
        if block.dynamic:
            if large[2] & 0x1F != PageType.PAMT:
                return 1, large[2], owner_of(_FIRST.unpack_from(large)[0])
            word = large[:8] if not pa & _2M // 2 else large[8:]
            at = node_page(_FIRST.unpack(word)[0]) | block.key | (pa >> 12 & 0xFF) * ENTRY_SIZE
        elif large[2]:
            return 1, large[2], owner_of(_FIRST.unpack_from(large)[0])
        else:
            at = block.e4k + ((pa & _1G - 1) >> 12) * ENTRY_SIZE
        (first,) = _FIRST.unpack(read(at, 8, seam=True))
        return 0, first >> 16 & 0xFF, owner_of(first)

    def owned(self, ranges: Iterable[int]) -> dict[int, tuple[int, int, int]]:
        """The pages in use of these 2 MiB ranges: address -> (level, type, owner)."""
        found = {}
        for base in ranges:
            block = self.state.blocks.get(base >> 30)
            for level, at, raw in self._levels(block, base) if block is not None else ():
                types = raw[2::ENTRY_SIZE]
                for match in _USED.finditer(types):
                    index = match.start()
                    (first,) = _FIRST.unpack_from(raw, index * ENTRY_SIZE)
                    found[at + index * _PAGE] = level, types[index], first >> 24 << 12
        return found

    def _levels(self, block: PamtBlock, base: int) -> Iterator[tuple[int, int, bytes]]:
        """(level, first page, entries) of the PAMT of a 2 MiB range, as far down as there are entries."""
        read = self.platform.memory.read
        large = read(block.e2m + ((base & _1G - 1) >> 17), ENTRY_SIZE, seam=True)
        if not block.dynamic:
            yield 1, base, large
            if not large[2]:
                yield 0, base, read(block.e4k + ((base & _1G - 1) >> 8), 512 * ENTRY_SIZE, seam=True)
        elif large[2] & 0x1F == PageType.PAMT:
            for half, word in enumerate(struct.unpack("<2Q", large)):
                yield 0, base + half * _2M // 2, read(node_page(word) | block.key, _PAGE, seam=True)
        else:
            yield 1, base, large

    def life_of(self, tdr_pa: int) -> tuple[int, int]:
        """(life-cycle state, OP_STATE or -1) of a TD: less than `td` reads."""
        g = self.state
        (state,) = struct.unpack("<I", self._read(tdr_pa + tdr.LIFECYCLE_STATE, 4, g.hkid))
        (count,) = struct.unpack("<I", self._read(tdr_pa + tdr.NUM_TDCX, 4, g.hkid))
        if state != LifecycleState.KEYS_CONFIGURED or not count:
            return state, -1
        (page,) = struct.unpack("<Q", self._read(tdr_pa + tdr.TDCX_PA, 8, g.hkid))
        (hkid,) = struct.unpack("<H", self._read(tdr_pa + tdr.HKID, 2, g.hkid))
        return state, struct.unpack("<I", self._read(page + tdcs.OP_STATE, 4, hkid))[0]

    def is_debug(self, page: int) -> bool:
        """Whether a page of a vCPU belongs to a TD that its host may look into."""
        _, _, owner = self.pamt(page)
        if self.pamt(owner)[1] != PageType.TDR or not owner:
            return False
        _, op_state = self.life_of(owner)
        if op_state <= OpState.UNINITIALIZED:
            return False
        hkid = self.state.hkid
        (first,) = _FIRST.unpack(self._read(owner + tdr.TDCX_PA, 8, hkid))
        (key,) = struct.unpack("<H", self._read(owner + tdr.HKID, 2, hkid))
        return bool(self._read(first + tdcs.ATTRIBUTES, 1, key)[0] & Attributes.DEBUG)

    def td(self, pa: int) -> TdView:
        """The TD whose TDR is at `pa`."""
        g = self.state
        head = self._read(pa, _PAGE, g.hkid)
        (children,) = struct.unpack_from("<Q", head, tdr.CHLDCNT)
        (count, lifecycle) = (struct.unpack_from("<I", head, at)[0] for at in (tdr.NUM_TDCX, tdr.LIFECYCLE_STATE))
        (hkid,) = struct.unpack_from("<H", head, tdr.HKID)
        if count > tdcs.PAGES_MAX or lifecycle > _LAST_LIFECYCLE:
            raise BrokenInvariantError(f"the TDR at {pa:#x} has {count} TDCX pages and life-cycle state {lifecycle}")
        pages = list(struct.unpack_from(f"<{count}Q", head, tdr.TDCX_PA))
        uuid = head[tdr.TD_UUID : tdr.TD_UUID + 32]
        view = TdView(pa, uuid, bool(head[tdr.FATAL]), LifecycleState(lifecycle), hkid, children, pages)
        keyed = view.lifecycle in (LifecycleState.KEYS_CONFIGURED, LifecycleState.BLOCKED)
        if keyed and count >= tdcs.PAGES_BASE:
            self._read_tdcs(view)
        return view

    def _read_tdcs(self, view: TdView) -> None:
        first = self._read(view.tdcx[0], _PAGE, view.hkid)
        (op_state,) = struct.unpack_from("<I", first, tdcs.OP_STATE)
        if op_state > _LAST_OP_STATE:
            raise BrokenInvariantError(f"the TD at {view.pa:#x} is in OP_STATE {op_state}")
        view.op_state = OpState(op_state)
        view.epoch, *counts = struct.unpack_from("<Q2H", first, tdcs.TD_EPOCH)
        view.refcounts = counts[0], counts[1]
        eptp = struct.unpack_from("<Q", first, tdcs.EPTP)[0]
        view.levels = (eptp >> 3 & 7) + 1
        view.identity = first[tdcs.ATTRIBUTES : tdcs.EPTP] + first[tdcs.MRTD : tdcs.RTMR]
        if view.op_state is not OpState.UNINITIALIZED:
            view.entries = self.sept(view)
            view.tables |= self._l2_tables(view)

    def sept(self, view: TdView) -> Entries:
        """The secure EPT: every entry that is not free, down to the smallest pages."""
        found: Entries = {}
        stack = [(view.tdcx[tdcs.SEPT_ROOT >> 12], 0, view.levels - 1)]
        while stack:
            page, base, level = stack.pop()
            for index, state, hpa in self._parse(self._read(page, _PAGE, view.hkid)):
                gpa = base + (index << 12 + 9 * level)
                found[gpa, level] = state, hpa
                if state in _NON_LEAF:
                    if level == 0:
                        raise BrokenInvariantError(f"the S-EPT entry of {gpa:#x} at level 0 has a table below it")
                    stack.append((hpa, gpa, level - 1))
        return found

    def _parse(self, content: bytes) -> list[tuple[int, SeptState, int]]:
        """(index, state, address) of the entries that are not free; tables seldom change from call to call."""
        parsed = self._tables.get(content)
        if parsed is None:
            parsed = []
            mask = sept.HPA_MASK & ~self.state.hkid_mask
            for index, entry in enumerate(_WORDS.unpack(content)):
                state = sept.state_of(entry)
                if state is None or entry & sept.TDEL:
                    raise BrokenInvariantError(f"the S-EPT entry {entry:#x} is locked or in no state")
                if bool(entry & sept.RWX) != (state in _PRESENT):
                    raise BrokenInvariantError(f"the S-EPT entry {entry:#x} is {state.name} with these permissions")
                if state is not SeptState.FREE:
                    parsed.append((index, state, entry & mask))
            if len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            self._tables[content] = parsed
        return parsed

    def _l2_tables(self, view: TdView) -> set[int]:
        """The S-EPT pages of L2 VMs; what their leaves map is the L1's."""
        found: set[int] = set()
        mask = sept.HPA_MASK & ~self.state.hkid_mask
        for root in view.tdcx[tdcs.PAGES_BASE :]:
            stack = [(root, view.levels - 1)]
            while stack:
                page, level = stack.pop()
                for entry in _WORDS.unpack(self._read(page, _PAGE, view.hkid)):
                    if entry and level and sept.l2_state_of(entry) in _L2_TABLES:
                        found.add(entry & mask)
                        stack.append((entry & mask, level - 1))
        return found

    # --- judging
    def check(self, ranges: Sequence[int], *, running: bool = False) -> dict[int, TdView]:
        """Everything that must hold. `ranges`: all the 2 MiB ranges that pages were given from. The TDs, by their TDR.

        `running`: a vCPU is inside, so that locks and epoch counters may be taken. Raises BrokenInvariantError.
        """
        g = self.state
        if not running:
            self._check_locks(g)
        if g.sys_state != SysState.READY and not g.blocks:
            return {}
        used = self.owned(ranges)
        tds = {pa: self.td(pa) for pa, (_, kind, _) in used.items() if kind == PageType.TDR}
        of_td = self._by_owner(used, tds)
        self._check_pamt_pages(ranges, used)
        for view in tds.values():
            self._check_pages(view, of_td[view.pa])
            if not running and any(view.refcounts) and not view.fatal:  # a fatal TD's TDCS is not touched any more
                raise BrokenInvariantError(f"no vCPU of the TD at {view.pa:#x} runs, its epochs count {view.refcounts}")
            self._check_history(view)
        self._check_keys(g, tds)
        self._known = {view.uuid: view for view in tds.values()}
        return tds

    def check_locks(self) -> None:
        """Nothing is locked between calls."""
        self._check_locks(self.state)

    def _check_locks(self, g: GlobalState) -> None:
        held = {key: value for key, value in g.locks.state.items() if value & ~HOST_PRIORITY}
        if held:
            raise BrokenInvariantError(f"{len(held)} locks are held between calls: {held}")

    def _check_pamt_pages(self, ranges: Iterable[int], used: dict[int, tuple[int, int, int]]) -> None:
        """Dynamic PAMT: the 2 MiB entry counts the pages in use below it."""
        for base in ranges:
            block = self.state.blocks.get(base >> 30)
            if block is None or not block.dynamic:
                continue
            large = self.platform.memory.read(block.e2m + ((base & _1G - 1) >> 17), ENTRY_SIZE, seam=True)
            if large[2] & 0x1F == PageType.PAMT:
                count = struct.unpack_from("<H", large, 8)[0] & 0x3FF
                pages = sum(base <= pa < base + _2M for pa in used)
                if count != pages:
                    raise BrokenInvariantError(f"the PAMT entry of {base:#x} counts {count} pages in use of {pages}")

    def _by_owner(
        self, used: dict[int, tuple[int, int, int]], tds: dict[int, TdView]
    ) -> dict[int, dict[int, tuple[int, int, int]]]:
        """The pages of each TD: every page that is in use has one."""
        of_td: dict[int, dict[int, tuple[int, int, int]]] = {pa: {} for pa in tds}
        for pa, entry in used.items():
            _, kind, owner = entry
            if kind not in _TD_OWNED:
                continue
            if owner not in of_td:
                raise BrokenInvariantError(f"{PageType(kind).name} page {pa:#x} belongs to {owner:#x}, which is no TDR")
            of_td[owner][pa] = entry
        return of_td

    def _check_pages(self, view: TdView, mine: dict[int, tuple[int, int, int]]) -> None:
        """CHLDCNT, and for a TD with a key: the pages that PAMT gives it are those that its S-EPT names, once each."""
        count = sum(512**level for level, _, _ in mine.values())
        if count != view.children:
            raise BrokenInvariantError(f"CHLDCNT of the TD at {view.pa:#x} is {view.children}, PAMT says {count}")
        if view.op_state is None:
            return
        named: dict[int, tuple[int, int]] = {}
        for (gpa, level), (state, hpa) in view.entries.items():
            if state in _NO_PAGE:
                continue
            if hpa in named:
                raise BrokenInvariantError(f"page {hpa:#x} is mapped twice, the second time at {gpa:#x}")
            named[hpa] = (0, int(PageType.EPT)) if state in _NON_LEAF else (level, int(PageType.REG))
        for page in view.tables:
            named[page] = 0, int(PageType.EPT)
        by_pamt = {pa: (level, kind) for pa, (level, kind, _) in mine.items() if kind not in _CONTROL}
        if named != by_pamt:
            pa = next(iter(set(named.items()) ^ set(by_pamt.items())))[0]
            raise BrokenInvariantError(f"page {pa:#x}: S-EPT says {named.get(pa)}, PAMT {by_pamt.get(pa)}")

    def _check_history(self, view: TdView) -> None:
        """What a TD is stays what it was: its life goes one way, and its identity is fixed at the latest when built."""
        before = self._known.get(view.uuid)
        if before is None:
            return
        if view.lifecycle < before.lifecycle:
            raise BrokenInvariantError(f"the TD at {view.pa:#x} went from {before.lifecycle!r} to {view.lifecycle!r}")
        if before.fatal and not view.fatal:
            raise BrokenInvariantError(f"the TD at {view.pa:#x} is no longer fatal")
        if before.op_state is None or view.op_state is None:
            return
        if view.op_state < before.op_state <= OpState.RUNNABLE or view.epoch < before.epoch:
            raise BrokenInvariantError(
                f"the TD at {view.pa:#x} went back from {before.op_state!r} to {view.op_state!r}"
            )
        if before.op_state is OpState.RUNNABLE and view.identity != before.identity:
            raise BrokenInvariantError(f"attributes or measurements of the TD at {view.pa:#x} changed")

    def _check_keys(self, g: GlobalState, tds: dict[int, TdView]) -> None:
        holders = [view.hkid for view in tds.values() if view.lifecycle is not LifecycleState.TEARDOWN]
        if len(set(holders)) != len(holders):
            raise BrokenInvariantError(f"a KeyID serves two TDs: {sorted(holders)}")
        in_use = {hkid for hkid, (state, _) in g.kot.items() if state in (HkidState.ASSIGNED, HkidState.FLUSHED)}
        if in_use - {g.hkid} != set(holders):
            raise BrokenInvariantError(f"TDs have KeyIDs {sorted(holders)}, the table of owners {sorted(in_use)}")

    def fingerprint(self, ranges: Sequence[int]) -> list[bytes]:
        """PAMT, TDRs, TDCSs and S-EPTs: what a refused call must not change.

        Left out is what a refused call may do: leave a host-priority mark in an S-EPT entry, bind a vCPU to the
        processor (which counts NUM_ASSOC_VCPUS), begin to fill a TDCS that TDH.MNG.INIT has not initialised yet.
        """
        g = self.state
        found = [
            raw for base in ranges if base >> 30 in g.blocks for _, _, raw in self._levels(g.blocks[base >> 30], base)
        ]
        for pa, (_, kind, _) in self.owned(ranges).items():
            if kind == PageType.TDR:
                found.append(self._read(pa, _PAGE, g.hkid))
                view = self.td(pa)
                if view.op_state is not None and view.op_state is not OpState.UNINITIALIZED:
                    found.append(self._read(view.tdcx[0] + tdcs.OP_STATE, _PAGE - tdcs.OP_STATE, view.hkid))
                    found += [self._read(page, _PAGE, view.hkid) for page in view.tdcx[1 : tdcs.SEPT_ROOT >> 12]]
                    found.append(repr(sorted(view.entries.items())).encode())
        return found
