"""KVM's mirror of a TD's secure EPT: what it believes the S-EPT holds, so that reading it needs no SEAMCALL.

The S-EPT itself is in pages of the module, written only by TDH.MEM.* leaves; `SecureEpt` issues those and keeps the
mirror in step. The caller holds the VM's MMU lock. (Kernel: arch/x86/kvm/mmu/tdp_mmu.c with mirror page tables,
arch/x86/kvm/vmx/tdx.c, tdx_sept_*.)
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from softtdx.abi import sept
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.hw import LogicalProcessor, Registers
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.errors import KvmError, SeamcallError
from softtdx.kvm.memory import HostMemory

__all__ = ["Mapping", "SecureEpt"]

_PARTS = 512  # mappings that one of the next size replaces
_MASK_4K, _MASK_2M, _MASK_1G = (~(sept.level_size(level) - 1) for level in range(3))
_LARGEST_LEAF = 2  # level: a page of 1 GiB
_RETRIES = 10_000
_SUCCESS = Status.SUCCESS


@dataclass(slots=True)
class Mapping:
    """A private leaf: `level` 0 is 4 KiB, 1 is 2 MiB, 2 is 1 GiB."""

    hpa: int
    level: int

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return sept.level_size(self.level)


class SecureEpt:
    """The S-EPT of one TD and its mirror."""

    def __init__(
        self, memory: HostMemory, tdr: int, levels: int, kick: Callable[[], None], broken: Callable[[], None]
    ) -> None:
        """`kick` makes every vCPU of the TD leave it once, which ends the TLB epoch before the last TRACK.

        `broken` is called when the S-EPT is left in a state that the TD cannot go on with.
        """
        self._memory = memory
        self._tdr = tdr
        self._levels = levels
        self._kick = kick
        self._broken = broken
        self.promotable: dict[tuple[int, int], int] = {}  # (GPA, level) that may be merged once accepted -> attempts
        self.hinted: dict[tuple[int, int], int] = {}  # (GPA, level) that is blocked to see who asks -> last node
        self.last_node: dict[int, int] = {}  # GPA -> node that asked for it last, where that was not its own
        self._leaves: tuple[dict[int, Mapping], dict[int, Mapping], dict[int, Mapping]] = ({}, {}, {})
        self._tables: dict[tuple[int, int], int] = {}  # (level of the entry that points to it, its GPA) -> page

    # --- reading the mirror
    def lookup(self, gpa: int) -> Mapping | None:
        """The leaf that maps a GPA."""
        small, large, gigantic = self._leaves
        found = large.get(gpa & _MASK_2M) or small.get(gpa & _MASK_4K)
        return found or (gigantic.get(gpa & _MASK_1G) if gigantic else None)

    def table_page(self, gpa: int, level: int) -> int | None:
        """The S-EPT page that the entry of `gpa` at `level` (1 to 4) leads to."""
        return self._tables.get((level, gpa & ~(sept.level_size(level) - 1)))

    def may_map(self, gpa: int, level: int) -> bool:
        """Whether the entry of `gpa` at `level` is still empty in the mirror."""
        base = gpa & ~(sept.level_size(level) - 1)
        return self.lookup(base) is None and (level == 0 or (level, base) not in self._tables)

    @property
    def mapped_pages(self) -> int:
        """4 KiB pages mapped, counting large ones by their size."""
        return sum(len(leaves) << 9 * level for level, leaves in enumerate(self._leaves))

    @property
    def huge_pages(self) -> int:
        """2 MiB mappings."""
        return len(self._leaves[1])

    @property
    def gigantic_pages(self) -> int:
        """1 GiB mappings."""
        return len(self._leaves[2])

    @property
    def table_pages(self) -> int:
        """S-EPT pages given to the TD."""
        return len(self._tables)

    def mappings(self) -> Iterable[tuple[int, Mapping]]:
        """All leaves by GPA."""
        return [item for leaves in self._leaves for item in leaves.items()]

    # --- inserting
    def add(self, lp: LogicalProcessor, gpa: int, hpa: int, source: int) -> None:
        """TDH.MEM.PAGE.ADD with the tables above it: initial memory. EEXIST when something is there."""
        if not self.may_map(gpa, 0):
            raise KvmError(errno.EEXIST, f"private memory is already mapped at GPA {gpa:#x}")
        while not self._add_tables(lp, gpa, 0):
            pass
        self._retry(lp, partial(sc.mem_page_add, lp, self._tdr, gpa, hpa, source), sc.MEM_PAGE_ADD)
        self._mapped(gpa, hpa, 0)

    def aug(self, lp: LogicalProcessor, gpa: int, hpa: int, level: int) -> bool:
        """TDH.MEM.PAGE.AUG with the tables above it. False when another processor holds the entry: try again."""
        base = gpa & ~(sept.level_size(level) - 1)
        if not self._add_tables(lp, base, level):
            return False
        regs = sc.mem_page_aug(lp, self._tdr, base, level, hpa)
        if regs.rax and status_of(regs.rax) in sc.TRANSIENT:
            return False
        sc.expect(regs, sc.MEM_PAGE_AUG)
        self._mapped(base, hpa, level)
        return True

    def _mapped(self, gpa: int, hpa: int, level: int) -> None:
        self._leaves[level][gpa] = Mapping(hpa, level)
        self._memory.give_to_tdx(hpa, "TD memory", 1 << 9 * level)

    def _add_tables(self, lp: LogicalProcessor, gpa: int, level: int) -> bool:
        if (level + 1, gpa & -sept.level_size(level + 1)) in self._tables:
            return True
        if (level + 1, gpa & ~(sept.level_size(level + 1) - 1)) in self._tables:
            return True  # and so are all above it
        for upper in range(self._levels - 1, level, -1):
            base = gpa & ~(sept.level_size(upper) - 1)
            if (upper, base) in self._tables:
                continue
            page = self._memory.alloc()
            regs = sc.mem_sept_add(lp, self._tdr, base, upper, page)
            if regs.rax:
                self._memory.free(page)
                if status_of(regs.rax) in sc.TRANSIENT:
                    return False
                raise SeamcallError(errno.EIO, Leaf.MEM_SEPT_ADD, regs.rax, {"RCX": regs.rcx, "RDX": regs.rdx})
            self._tables[upper, base] = page
            self._memory.give_to_tdx(page, "S-EPT")
        return True

    # --- removing
    def zap(self, lp: LogicalProcessor, start: int, end: int, *, split: bool = True) -> None:
        """Remove all leaves in [start, end): block all, one TRACK and kick for all, remove all.

        With `split` a large leaf that reaches out of the range is split first. After a KvmError what was removed is
        removed, and the rest is as it was.
        """
        if split:
            for level in (2, 1):
                size = sept.level_size(level)
                for base in {start & ~(size - 1), (end - 1) & ~(size - 1)}:
                    if base in self._leaves[level] and not (start <= base and base + size <= end):
                        self.demote(lp, base, level)
        doomed = list(self._in_range(start, end))
        if not doomed:
            return
        tdr = self._tdr
        with self._blocked(lp, [(gpa, mapping.level) for gpa, mapping in doomed]) as blocked:
            for gpa, mapping in doomed:
                call = partial(sc.mem_page_remove, lp, tdr, gpa, mapping.level)
                self._retry(lp, call, sc.MEM_PAGE_REMOVE)
                blocked.remove((gpa, mapping.level))
                del self._leaves[mapping.level][gpa]
                self._not_promotable(gpa)
                self._memory.take_from_tdx(mapping.hpa, 1 << 9 * mapping.level)
                lp.zero_page(mapping.hpa, 1 << 9 * mapping.level)

    def _not_promotable(self, gpa: int) -> None:
        if self.promotable:
            for level in (1, 2):
                self.promotable.pop((gpa & ~(sept.level_size(level) - 1), level), None)

    def track(self, lp: LogicalProcessor) -> None:
        """A new TLB epoch, and every vCPU out of the old one."""
        regs = sc.mem_track(lp, self._tdr)
        while regs.rax and status_of(regs.rax) in sc.TRANSIENT | {Status.PREVIOUS_TLB_EPOCH_BUSY}:
            self._kick()
            regs = sc.mem_track(lp, self._tdr)
        sc.expect(regs, Leaf.MEM_TRACK)
        self._kick()

    def _in_range(self, start: int, end: int) -> Iterable[tuple[int, Mapping]]:
        for level in (2, 1, 0):
            size, leaves = sept.level_size(level), self._leaves[level]
            first = start & ~(size - 1)
            if not leaves:
                continue
            if (end - first) // size < len(leaves):
                yield from ((gpa, leaves[gpa]) for gpa in range(first, end, size) if gpa in leaves)
            else:
                yield from ((gpa, leaves[gpa]) for gpa in sorted(leaves) if first <= gpa < end)

    # --- changing the size
    def demote(self, lp: LogicalProcessor, base: int, level: int = 1) -> None:
        """Split the 2 MiB (level 1) or 1 GiB (2) leaf at `base` into 512. When that fails it is as it was."""
        mapping = self._leaves[level][base]
        page = self._memory.alloc()
        try:
            with self._blocked(lp, [(base, level)]) as blocked:
                call = partial(sc.mem_page_demote, lp, self._tdr, base, level, page)
                self._retry(lp, call, Leaf.MEM_PAGE_DEMOTE)
                blocked.clear()
        except KvmError:
            self._memory.free(page)
            raise
        self._tables[level, base] = page
        self._memory.give_to_tdx(page, "S-EPT")
        del self._leaves[level][base]
        self._not_promotable(base)
        size = sept.level_size(level - 1)
        for i in range(_PARTS):
            self._leaves[level - 1][base + i * size] = Mapping(mapping.hpa + i * size, level - 1)

    def may_promote(self, base: int, level: int = 1) -> bool:
        """Whether 512 leaves map aligned, neighbouring pages from `base` on, as far as the mirror knows."""
        leaves, size = self._leaves[level - 1], sept.level_size(level - 1)
        first = leaves.get(base)
        if first is None or first.hpa % sept.level_size(level):
            return False
        return all(
            (leaf := leaves.get(base + i * size)) is not None and leaf.hpa == first.hpa + i * size
            for i in range(_PARTS - 1, 0, -1)
        )

    def promote(self, lp: LogicalProcessor, base: int, level: int = 1, *, pending: bool = False) -> bool:
        """Merge the 512 leaves from `base` on into one of `level`. False when not all of them are accepted yet.

        A range that is pending as a whole is merged only if `pending`: a TD that accepts it in small pages would have
        it split again.
        """
        if not self.may_promote(base, level) or (not pending and self._is_pending(lp, base, level - 1)):
            return False
        for gpa, below in [h for h in self.hinted if base <= h[0] < base + sept.level_size(level)]:
            self.unhint(lp, gpa, below)
        with self._blocked(lp, [(base, level)]) as blocked:
            call = partial(sc.mem_page_promote, lp, self._tdr, base, level)
            status = self._retry(lp, call, Leaf.MEM_PAGE_PROMOTE, Status.EPT_INVALID_PROMOTE_CONDITIONS)
            if status is not Status.SUCCESS:
                return False
            blocked.clear()
        self._take_table(lp, base, level)
        leaves, size = self._leaves[level - 1], sept.level_size(level - 1)
        hpa = leaves[base].hpa
        for i in range(_PARTS):
            del leaves[base + i * size]
        self._leaves[level][base] = Mapping(hpa, level)
        return True

    def _take_table(self, lp: LogicalProcessor, base: int, level: int) -> None:
        """An S-EPT page came back from the module."""
        table = self._tables.pop((level, base))
        self._memory.take_from_tdx(table)
        lp.zero_page(table, 1)
        self._memory.free(table)

    def _is_pending(self, lp: LogicalProcessor, gpa: int, level: int) -> bool:
        """Whether the TD still has to accept a page: the one thing that the mirror cannot know."""
        regs = Registers()

        def read() -> Registers:
            nonlocal regs
            regs = sc.mem_sept_rd(lp, self._tdr, gpa, level)
            return regs

        self._retry(lp, read, sc.MEM_SEPT_RD)
        return regs.rdx >> 8 & 0xFF == sept.PUBLIC_STATE[sept.SeptState.PENDING]

    # --- watching, giving tables back
    def hint(self, lp: LogicalProcessor, entries: Sequence[tuple[int, int]]) -> None:
        """Block leaves, (GPA, level), so that the TD's next access exits and tells which processor it came from."""
        new = [entry for entry in entries if entry not in self.hinted]
        if not new:
            return
        with self._blocked(lp, new) as blocked:
            blocked.clear()
        self.hinted.update(dict.fromkeys(new, -1))

    def unhint(self, lp: LogicalProcessor, gpa: int, level: int) -> None:
        """Unblock such a leaf: the TD goes on."""
        self._unblock(lp, {(gpa, level)}, tracked=True)
        self.hinted.pop((gpa, level), None)

    def drop_empty_tables(self, lp: LogicalProcessor) -> int:
        """SEPT.REMOVE of the S-EPT pages that map nothing, lowest level first; returns how many came back."""
        count = 0
        for level in range(1, self._levels):
            size = sept.level_size(level)
            below = {gpa & ~(size - 1) for gpa in self._leaves[level - 1]} if level <= _LARGEST_LEAF else set()
            below |= {gpa & ~(size - 1) for lower, gpa in self._tables if lower == level - 1}
            empty = [(gpa, at) for at, gpa in self._tables if at == level and gpa not in below]
            if not empty:
                continue
            with self._blocked(lp, empty) as blocked:
                for gpa, _ in empty:
                    call = partial(sc.mem_sept_remove, lp, self._tdr, gpa, level)
                    self._retry(lp, call, Leaf.MEM_SEPT_REMOVE)
                    blocked.remove((gpa, level))
                    self._take_table(lp, gpa, level)
                    count += 1
        return count

    # --- moving
    def relocate(
        self, lp: LogicalProcessor, moves: Sequence[tuple[int, int]], moved: Callable[[int, int], None]
    ) -> None:
        """Move 4 KiB leaves, given as (GPA, new page): block all, one TRACK, RELOCATE each; content comes along.

        `moved(gpa, old page)` is told of each once the old page is the host's again. After a KvmError those that were
        not moved are where they were, and usable.
        """
        with self._blocked(lp, [(gpa, 0) for gpa, _ in moves]) as blocked:
            for gpa, page in moves:
                call = partial(sc.mem_page_relocate, lp, self._tdr, gpa, page)
                self._retry(lp, call, sc.MEM_PAGE_RELOCATE)
                blocked.remove((gpa, 0))
                old = self._leaves[0][gpa].hpa
                self._leaves[0][gpa] = Mapping(page, 0)
                self._memory.give_to_tdx(page, "TD memory")
                self._memory.take_from_tdx(old)
                lp.zero_page(old, 1)
                moved(gpa, old)

    @contextmanager
    def _blocked(self, lp: LogicalProcessor, entries: Sequence[tuple[int, int]]) -> Iterator[set[tuple[int, int]]]:
        """Block entries, (GPA, level), and end the TLB epoch. What is still in the set at the end is unblocked."""
        blocked: set[tuple[int, int]] = set()
        tracked = False
        try:
            for gpa, level in entries:
                self._block(lp, gpa, level)
                blocked.add((gpa, level))
            self.track(lp)
            tracked = True
            yield blocked
        finally:
            if blocked:
                self._unblock(lp, blocked, tracked=tracked)

    def _block(self, lp: LogicalProcessor, gpa: int, level: int) -> None:
        self.hinted.pop((gpa, level), None)
        call = partial(sc.mem_range_block, lp, self._tdr, gpa, level)
        self._retry(lp, call, sc.MEM_RANGE_BLOCK, Status.GPA_RANGE_ALREADY_BLOCKED)

    def _unblock(self, lp: LogicalProcessor, blocked: set[tuple[int, int]], *, tracked: bool) -> None:
        """Undo. When even that fails the TD could never reach this memory again: the VM is broken."""
        try:
            if not tracked:
                self.track(lp)
            for gpa, level in sorted(blocked):
                call = partial(sc.mem_range_unblock, lp, self._tdr, gpa, level)
                self._retry(lp, call, sc.MEM_RANGE_UNBLOCK)
        except KvmError:
            self._broken()
            raise

    def _retry(self, lp: LogicalProcessor, call: Callable[[], Registers], leaf: Leaf, *accepted: Status) -> Status:
        """A SEAMCALL that gives way to others and to interrupts; its status, SUCCESS or one of `accepted`."""
        for _ in range(_RETRIES):
            regs = call()
            status = _SUCCESS if regs.rax == 0 else status_of(regs.rax)
            if status in sc.INTERRUPTED:
                lp.acknowledge_interrupt()
            elif status in sc.BUSY:
                self._kick()
            else:
                break
        return sc.expect(regs, leaf, *accepted)

    # --- the end of the TD
    def reclaim(self, lp: LogicalProcessor, reclaim_page: Callable[[LogicalProcessor, int, int], bool]) -> None:
        """After the HKID is gone: reclaim every page. `reclaim_page` keeps account of one that the module keeps."""
        for leaves in self._leaves:
            for mapping in leaves.values():
                reclaim_page(lp, mapping.hpa, 1 << 9 * mapping.level)
            leaves.clear()
        for page in self._tables.values():
            if reclaim_page(lp, page, 1):
                self._memory.free(page)
        self._tables.clear()
