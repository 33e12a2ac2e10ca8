"""KVM's mirror of a TD's secure EPT: what it believes the S-EPT holds, so that reading it needs no SEAMCALL.

The S-EPT itself is in pages of the module, written only by TDH.MEM.* leaves; `SecureEpt` issues those and keeps the
mirror in step. The caller holds the VM's MMU lock. (Kernel: arch/x86/kvm/mmu/tdp_mmu.c with mirror page tables,
arch/x86/kvm/vmx/tdx.c, tdx_sept_*.)
"""

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from softtdx.abi import sept
from softtdx.abi.leaves import SeamcallLeaf as Leaf
from softtdx.abi.status import Status, status_of
from softtdx.hw import LogicalProcessor, Registers
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.errors import KvmError, SeamcallError
from softtdx.kvm.memory import PAGE, HostMemory

__all__ = ["Mapping", "SecureEpt"]


@dataclass
class Mapping:
    """A private leaf: `level` 0 is 4 KiB, 1 is 2 MiB."""

    hpa: int
    level: int

    @property
    def size(self) -> int:
        """Bytes mapped."""
        return sept.level_size(self.level)


class SecureEpt:
    """The S-EPT of one TD and its mirror."""

    def __init__(self, memory: HostMemory, tdr: int, levels: int, kick: Callable[[], None]) -> None:
        """`kick` makes every vCPU of the TD leave it once, which ends the TLB epoch before the last TRACK."""
        self._memory = memory
        self._tdr = tdr
        self._levels = levels
        self._kick = kick
        self._leaves: tuple[dict[int, Mapping], dict[int, Mapping]] = ({}, {})
        self._tables: dict[tuple[int, int], int] = {}  # (level of the entry that points to it, its GPA) -> page
        self.leaked_pages: list[int] = []

    # --- reading the mirror
    def lookup(self, gpa: int) -> Mapping | None:
        """The leaf that maps a GPA."""
        large = self._leaves[1].get(gpa & ~(sept.level_size(1) - 1))
        return large or self._leaves[0].get(gpa & ~(PAGE - 1))

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
        return len(self._leaves[0]) + 512 * len(self._leaves[1])

    @property
    def huge_pages(self) -> int:
        """2 MiB mappings."""
        return len(self._leaves[1])

    @property
    def table_pages(self) -> int:
        """S-EPT pages given to the TD."""
        return len(self._tables)

    def mappings(self) -> Iterable[tuple[int, Mapping]]:
        """All leaves by GPA."""
        return [*self._leaves[0].items(), *self._leaves[1].items()]

    # --- inserting
    def add(self, lp: LogicalProcessor, gpa: int, hpa: int, source: int) -> None:
        """TDH.MEM.PAGE.ADD with the tables above it: initial memory. EEXIST when something is there."""
        if not self.may_map(gpa, 0):
            raise KvmError(errno.EEXIST, f"private memory is already mapped at GPA {gpa:#x}")
        while not self._add_tables(lp, gpa, 0):
            pass
        self._retry(partial(sc.mem_page_add, lp, self._tdr, gpa, hpa, source), Leaf.MEM_PAGE_ADD)
        self._mapped(gpa, hpa, 0)

    def aug(self, lp: LogicalProcessor, gpa: int, hpa: int, level: int) -> bool:
        """TDH.MEM.PAGE.AUG with the tables above it. False when another processor holds the entry: try again."""
        base = gpa & ~(sept.level_size(level) - 1)
        if not self._add_tables(lp, base, level):
            return False
        regs = sc.mem_page_aug(lp, self._tdr, base, level, hpa)
        if regs.rax and status_of(regs.rax) in sc.BUSY:
            return False
        sc.expect(regs, Leaf.MEM_PAGE_AUG)
        self._mapped(base, hpa, level)
        return True

    def _mapped(self, gpa: int, hpa: int, level: int) -> None:
        self._leaves[level][gpa] = Mapping(hpa, level)
        self._memory.give_to_tdx(hpa, "TD memory", 1 << 9 * level)

    def _add_tables(self, lp: LogicalProcessor, gpa: int, level: int) -> bool:
        for upper in range(self._levels - 1, level, -1):
            base = gpa & ~(sept.level_size(upper) - 1)
            if (upper, base) in self._tables:
                continue
            page = self._memory.alloc()
            regs = sc.mem_sept_add(lp, self._tdr, base, upper, page)
            if regs.rax:
                self._memory.free(page)
                if status_of(regs.rax) in sc.BUSY:
                    return False
                raise SeamcallError(errno.EIO, Leaf.MEM_SEPT_ADD, regs.rax, {"RCX": regs.rcx, "RDX": regs.rdx})
            self._tables[upper, base] = page
            self._memory.give_to_tdx(page, "S-EPT")
        return True

    # --- removing
    def zap(self, lp: LogicalProcessor, start: int, end: int, *, split: bool = True) -> None:
        """Remove all leaves in [start, end): block all, one TRACK and kick for all, remove all.

        A 2 MiB leaf that reaches out of the range is split first.
        """
        if split:
            for base in {start & ~(sept.level_size(1) - 1), (end - 1) & ~(sept.level_size(1) - 1)}:
                if base in self._leaves[1] and not (start <= base and base + sept.level_size(1) <= end):
                    self._demote(lp, base)
        doomed = list(self._in_range(start, end))
        if not doomed:
            return
        tdr = self._tdr
        for gpa, mapping in doomed:
            self._retry(partial(sc.mem_range_block, lp, tdr, gpa, mapping.level), Leaf.MEM_RANGE_BLOCK)
        self.track(lp)
        for gpa, mapping in doomed:
            self._retry(partial(sc.mem_page_remove, lp, tdr, gpa, mapping.level), Leaf.MEM_PAGE_REMOVE)
            del self._leaves[mapping.level][gpa]
            self._memory.take_from_tdx(mapping.hpa, 1 << 9 * mapping.level)
            lp.zero_page(mapping.hpa, 1 << 9 * mapping.level)

    def track(self, lp: LogicalProcessor) -> None:
        """A new TLB epoch, and every vCPU out of the old one."""
        regs = sc.mem_track(lp, self._tdr)
        while regs.rax and status_of(regs.rax) in sc.BUSY | {Status.PREVIOUS_TLB_EPOCH_BUSY}:
            self._kick()
            regs = sc.mem_track(lp, self._tdr)
        sc.expect(regs, Leaf.MEM_TRACK)
        self._kick()

    def _in_range(self, start: int, end: int) -> Iterable[tuple[int, Mapping]]:
        for level in (1, 0):
            size, leaves = sept.level_size(level), self._leaves[level]
            first = start & ~(size - 1)
            if (end - first) // size < len(leaves):
                yield from ((gpa, leaves[gpa]) for gpa in range(first, end, size) if gpa in leaves)
            else:
                yield from ((gpa, leaves[gpa]) for gpa in sorted(leaves) if first <= gpa < end)

    def _demote(self, lp: LogicalProcessor, base: int) -> None:
        mapping = self._leaves[1][base]
        self._retry(lambda: sc.mem_range_block(lp, self._tdr, base, 1), Leaf.MEM_RANGE_BLOCK)
        self.track(lp)
        page = self._memory.alloc()
        try:
            again = frozenset({Status.INTERRUPTED_RESTARTABLE})
            self._retry(lambda: sc.mem_page_demote(lp, self._tdr, base, 1, page), Leaf.MEM_PAGE_DEMOTE, again)
        except KvmError:
            self._memory.free(page)
            raise
        self._tables[1, base] = page
        self._memory.give_to_tdx(page, "S-EPT")
        del self._leaves[1][base]
        for i in range(512):
            self._leaves[0][base + i * PAGE] = Mapping(mapping.hpa + i * PAGE, 0)

    def _retry(self, call: Callable[[], Registers], leaf: Leaf, also: frozenset[Status] = frozenset()) -> None:
        for _ in range(10_000):
            regs = call()
            if regs.rax == 0 or status_of(regs.rax) not in sc.BUSY | also:
                break
            self._kick()
        sc.expect(regs, leaf, Status.GPA_RANGE_ALREADY_BLOCKED)

    # --- the end of the TD
    def reclaim(self, lp: LogicalProcessor) -> None:
        """After the HKID is gone: reclaim every page. One that the module keeps is leaked, and listed as such."""
        for leaves in self._leaves:
            for mapping in leaves.values():
                self._reclaim(lp, mapping.hpa, 1 << 9 * mapping.level)
            leaves.clear()
        for page in self._tables.values():
            if self._reclaim(lp, page):
                self._memory.free(page)
        self._tables.clear()

    def _reclaim(self, lp: LogicalProcessor, page: int, pages: int = 1) -> bool:
        regs = sc.phymem_page_reclaim(lp, page)
        if regs.rax:
            self.leaked_pages.append(page)
            return False
        self._memory.take_from_tdx(page, pages)
        lp.zero_page(page, pages)  # MOVDIR64B: clears poison too
        return True
