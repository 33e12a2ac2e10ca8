"""An extended page table of the host's own, in host memory: what an ordinary VM, and a TD's shared half, run on.

Entry (SDM 28.3.2): R 0, W 1, X 2, memory type 5:3, ignore PAT 6, leaf 7, accessed 8, dirty 9, address 51:12,
suppress #VE 63. In a TD's table absent entries suppress #VE, so that an access exits to KVM, except where KVM knows
that there is no memory: there the TD gets #VE and turns the access into a hypercall (arch/x86/kvm/mmu,
kvm_mmu_set_mmio_spte_value).

Accesses are tracked by the processor's A bits in an ordinary VM's table. The module runs TDs without A and D bits
(EPTP bit 6 is reserved in TD_PARAMS), so in a TD's table an entry that is to be watched is made not present, with its
rights kept in bits that the processor ignores, and the next fault restores it (mark_spte_for_access_track).
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from softtdx.abi import sept
from softtdx.abi.vmcs import EPTP_ACCESSED_DIRTY, EPTP_MT_WB, EPTP_WALK_4, EPTP_WALK_5
from softtdx.kvm.memory import PAGE, HostMemory

__all__ = ["Ept", "EptLeaf"]

_ADDRESS = sept.HPA_MASK
_LEAF = sept.LEAF
_RWX = sept.RWX
_WB_IPAT = sept.MT_WB | sept.IPAT
_SAVED = 54  # where a watched entry keeps R, W and X (SHADOW_ACC_TRACK_SAVED_BITS_SHIFT)
_WATCHED = _RWX << _SAVED
_TABLE = struct.Struct("<512Q")
_PARTS = 512


class EptLeaf(NamedTuple):
    """A mapping: the page at `hpa`, of `level` 0 (4 KiB), 1 (2 MiB) or 2 (1 GiB)."""

    hpa: int
    level: int
    writable: bool
    watched: bool  # not present until the next fault, which says that it was accessed


class Ept:
    """Four or five levels of tables. GPAs are given without the shared bit. The caller holds the MMU lock.

    A table that a large page replaced is kept until `free_replaced`, since a processor may still walk it.
    """

    def __init__(self, memory: HostMemory, *, levels: int, shared_bit: int = 0) -> None:
        """An empty table; `shared_bit` for one that a TD uses: its walks are by the whole GPA (kvm_gfn_direct_bits)."""
        self._memory = memory
        self.levels = levels
        self._bits = shared_bit
        self._absent = sept.SVE if shared_bit else 0
        self._has_ad = not shared_bit
        self._tables: dict[int, None] = {}
        self._replaced: list[int] = []
        self.mapped = 0
        self.large = [0, 0, 0]  # leaves by level
        self.root = self._new_table()

    @property
    def eptp(self) -> int:
        """The EPT pointer of a VMCS: write-back, this walk length, accessed and dirty bits."""
        walk = EPTP_WALK_5 if self.levels == 5 else EPTP_WALK_4
        return self.root | EPTP_MT_WB | walk | (EPTP_ACCESSED_DIRTY if self._has_ad else 0)

    @property
    def table_pages(self) -> int:
        """Host pages the tables take."""
        return len(self._tables) + len(self._replaced)

    # --- mapping
    def map(self, gpa: int, hpa: int, *, level: int = 0, writable: bool = True) -> bool:
        """Map 4 KiB (level 0), 2 MiB (1) or 1 GiB (2). True when it replaced a table: flush, then `free_replaced`."""
        at = self._entry_address(gpa | self._bits, level)
        old = self._memory.rd64(at)
        replaced = False
        if self._is_leaf(old, level):
            self._count(level, -1)
        elif old & _RWX:
            self._drop_table(old & _ADDRESS, level - 1)
            replaced = True
        rights = _RWX if writable else sept.R | sept.X
        self._memory.wr64(at, hpa | rights | _WB_IPAT | self._absent | (_LEAF if level else 0))
        self._count(level, 1)
        return replaced

    def fill(self, pages: list[tuple[int, int]], *, writable: bool) -> int:
        """Map those of (GPA, physical) that are not mapped: 4 KiB pages of one 2 MiB part. Returns how many."""
        if not pages:
            return 0
        first = pages[0][0]
        start, count = self._entry_address(first | self._bits, 0), 0
        flags = (_RWX if writable else sept.R | sept.X) | _WB_IPAT | self._absent
        for gpa, hpa in pages:
            at = start + (gpa - first) // PAGE * 8
            if not self._memory.rd64(at) & (_RWX | _WATCHED):
                self._memory.wr64(at, hpa | flags)
                count += 1
        self._count(0, count)
        return count

    def mark_mmio(self, gpa: int) -> None:
        """Let accesses to this page give the TD a #VE."""
        self._memory.wr64(self._entry_address(gpa | self._bits, 0), 0)

    def find(self, gpa: int) -> EptLeaf | None:
        """The leaf that maps a GPA."""
        _, entry, level = self._walk(gpa | self._bits)
        if not self._is_leaf(entry, level):
            return None
        rights = entry >> _SAVED if entry & _WATCHED else entry
        return EptLeaf(entry & _ADDRESS, level, bool(rights & sept.W), bool(entry & _WATCHED))

    def lookup(self, gpa: int) -> int | None:
        """The host page that backs a GPA."""
        leaf = self.find(gpa)
        return None if leaf is None else leaf.hpa + (gpa & sept.level_size(leaf.level) - 1 & ~(PAGE - 1))

    def absent(self, start: int, end: int) -> list[int]:
        """The pages of [start, end), which lies in 2 MiB, that no leaf maps."""
        at, entry, level = self._walk(start | self._bits)
        if level:
            return [] if self._is_leaf(entry, level) else list(range(start, end, PAGE))
        entries = memoryview(self._memory.read(at, (end - start) // PAGE * 8)).cast("Q")
        return [start + i * PAGE for i, entry in enumerate(entries) if not entry & (_RWX | _WATCHED)]

    def unmap(self, start: int, end: int) -> bool:
        """Unmap [start, end); a large page that overlaps goes as a whole. True if anything was mapped."""
        found = False
        for at, level in list(self._leaves(start, end, forget_mmio=True)):
            self._memory.wr64(at, self._absent)
            self._count(level, -1)
            found = True
        return found

    # --- dirty tracking
    def write_protect(self, start: int, end: int) -> bool:
        """Take the right to write away in [start, end). True if any leaf had it: the TLBs must be flushed."""
        found = False
        for at, _ in list(self._leaves(start, end)):
            entry = self._memory.rd64(at)
            if entry & (sept.W | sept.W << _SAVED):
                self._change(at, ~(sept.W | sept.W << _SAVED), 0)
                found = True
        return found

    def make_writable(self, gpa: int, *, small: bool) -> None:
        """Give the leaf of a GPA the right to write; with `small` only its 4 KiB, a large leaf is split for it."""
        at, entry, level = self._walk(gpa | self._bits)
        if small and level and self._is_leaf(entry, level):
            at = self._entry_address(gpa | self._bits, 0)
        self._change(at, -1, sept.W)

    def split(self, start: int, end: int) -> int:
        """Split the large leaves of [start, end) into 4 KiB ones (eager page splitting); how many there were."""
        count = 0
        for at, level in list(self._leaves(start, end)):
            if level:
                count += 1
                self._split_down(at, self._memory.rd64(at), level)
        return count

    # --- access tracking
    def age(self, start: int, end: int, *, clear: bool) -> bool:
        """Whether anything in [start, end) was accessed since the last time that this was called with `clear`."""
        young = False
        for at, _ in list(self._leaves(start, end)):
            entry = self._memory.rd64(at)
            if self._has_ad:
                if entry & sept.A:
                    young = True
                    if clear:
                        self._change(at, ~sept.A, 0)
            elif not entry & _WATCHED:
                young = True
                if clear:
                    self._memory.wr64(at, entry & ~_RWX | (entry & _RWX) << _SAVED)
        return young

    def restore(self, gpa: int) -> None:
        """A watched leaf was accessed: it is present again."""
        at, entry, _ = self._walk(gpa | self._bits)
        self._memory.wr64(at, entry & ~_WATCHED | entry >> _SAVED & _RWX)

    # --- tables
    def free_replaced(self) -> None:
        """The TLBs were flushed: no processor walks replaced tables any more."""
        for table in self._replaced:
            self._memory.free(table)
        self._replaced.clear()

    def drop_empty_tables(self) -> int:
        """Unlink tables that map nothing; returns how many. Flush, then `free_replaced`."""
        return self._drop_empty(self.root, self.levels - 1)

    def free(self) -> None:
        """Give the tables back."""
        self.free_replaced()
        for table in self._tables:
            self._memory.free(table)
        self._tables.clear()

    def _count(self, level: int, leaves: int) -> None:
        self.mapped += leaves << 9 * level
        self.large[level] += leaves

    def _is_leaf(self, entry: int, level: int) -> bool:
        return bool(entry & (_RWX | _WATCHED)) and (level == 0 or bool(entry & _LEAF))

    def _change(self, at: int, keep: int, add: int) -> None:
        """Change an entry in which the processor may be setting A and D bits meanwhile."""
        entry = self._memory.rd64(at)
        while (found := self._memory.cas64(at, entry, entry & keep | add)) != entry:
            entry = found

    def _new_table(self, entries: bytes | None = None) -> int:
        table = self._memory.alloc()
        self._memory.write(table, entries or self._absent.to_bytes(8, "little") * _PARTS)
        self._tables[table] = None
        return table

    def _walk(self, gpa: int) -> tuple[int, int, int]:
        """Where a walk ends: the address of the last entry, the entry and its level."""
        table, level = self.root, self.levels - 1
        while True:
            at = table + 8 * sept.entry_index(gpa, level)
            entry = self._memory.rd64(at)
            if level == 0 or not entry & _RWX or entry & _LEAF:
                return at, entry, level
            table, level = entry & _ADDRESS, level - 1

    def _entry_address(self, gpa: int, level: int) -> int:
        table = self.root
        for upper in range(self.levels - 1, level, -1):
            at = table + 8 * sept.entry_index(gpa, upper)
            entry = self._memory.rd64(at)
            if self._is_leaf(entry, upper):
                entry = self._split(at, entry, upper)
            elif not entry & _RWX:
                entry = self._new_table() | _RWX
                self._memory.wr64(at, entry)
            table = entry & _ADDRESS
        return table + 8 * sept.entry_index(gpa, level)

    def _split(self, at: int, entry: int, level: int) -> int:
        """Replace a large leaf by a table of leaves that map the same. Returns the entry that points to it."""
        size, hpa = sept.level_size(level - 1), entry & _ADDRESS
        flags = entry & ~_ADDRESS & (-1 if level > 1 else ~_LEAF)
        table = self._new_table(_TABLE.pack(*(hpa + i * size | flags for i in range(_PARTS))))
        self._memory.wr64(at, table | _RWX)
        self._count(level, -1)
        self._count(level - 1, _PARTS)
        return table | _RWX

    def _split_down(self, at: int, entry: int, level: int) -> None:
        table = self._split(at, entry, level) & _ADDRESS
        if level > 1:
            for i in range(_PARTS):
                self._split_down(table + 8 * i, self._memory.rd64(table + 8 * i), level - 1)

    def _drop_table(self, table: int, level: int) -> None:
        """A table is no longer linked: forget what it maps."""
        for entry in _TABLE.unpack(self._memory.read(table, PAGE)):
            if self._is_leaf(entry, level):
                self._count(level, -1)
            elif entry & _RWX:
                self._drop_table(entry & _ADDRESS, level - 1)
        del self._tables[table]
        self._replaced.append(table)

    def _drop_empty(self, table: int, level: int) -> int:
        count = 0
        if level == 0:
            return 0
        for index, entry in enumerate(_TABLE.unpack(self._memory.read(table, PAGE))):
            if not entry & _RWX or entry & _LEAF:
                continue
            child = entry & _ADDRESS
            count += self._drop_empty(child, level - 1)
            if self._memory.read(child, PAGE) == self._absent.to_bytes(8, "little") * _PARTS:
                self._memory.wr64(table + 8 * index, self._absent)
                del self._tables[child]
                self._replaced.append(child)
                count += 1
        return count

    def _leaves(self, start: int, end: int, *, forget_mmio: bool = False) -> Iterator[tuple[int, int]]:
        start, end = start + self._bits, end + self._bits
        return self._leaves_of(self.root, self.levels - 1, 0, start, end, forget_mmio=forget_mmio)

    def _leaves_of(
        self, table: int, level: int, base: int, start: int, end: int, *, forget_mmio: bool
    ) -> Iterator[tuple[int, int]]:
        size = sept.level_size(level)
        first = max(0, (start - base) // size)
        last = min(_PARTS, -(-(end - base) // size))
        if first >= last:
            return
        entries = self._memory.read(table + 8 * first, 8 * (last - first))
        for index, entry in enumerate(memoryview(entries).cast("Q"), first):
            if entry == self._absent:
                continue
            at = table + 8 * index
            if self._is_leaf(entry, level):
                yield at, level
            elif entry & _RWX:
                below = base + index * size
                yield from self._leaves_of(entry & _ADDRESS, level - 1, below, start, end, forget_mmio=forget_mmio)
            elif forget_mmio:
                self._memory.wr64(at, self._absent)  # an MMIO mark ends with the range too
