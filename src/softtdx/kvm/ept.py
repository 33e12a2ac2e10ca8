"""An extended page table of the host's own, in host memory: what an ordinary VM, and a TD's shared half, run on.

Entry (SDM 28.3.2): R 0, W 1, X 2, memory type 5:3, ignore PAT 6, leaf 7, address 51:12, suppress #VE 63. In a TD's
table absent entries suppress #VE, so that an access exits to KVM, except where KVM knows that there is no memory:
there the TD gets #VE and turns the access into a hypercall (arch/x86/kvm/mmu, kvm_mmu_set_mmio_spte_value).
"""

from collections.abc import Iterator

from softtdx.abi import sept
from softtdx.abi.vmcs import EPTP_MT_WB, EPTP_WALK_4, EPTP_WALK_5
from softtdx.kvm.memory import PAGE, HostMemory

__all__ = ["Ept"]

_ADDRESS = sept.HPA_MASK
_LEAF = sept.LEAF
_RWX = sept.RWX
_WB_IPAT = sept.MT_WB | sept.IPAT


class Ept:
    """Four or five levels of tables. GPAs are given without the shared bit. The caller holds the MMU lock."""

    def __init__(self, memory: HostMemory, *, levels: int, shared_bit: int = 0) -> None:
        """An empty table; `shared_bit` for one that a TD uses: its walks are by the whole GPA (kvm_gfn_direct_bits)."""
        self._memory = memory
        self.levels = levels
        self._bits = shared_bit
        self._absent = sept.SVE if shared_bit else 0
        self._tables: list[int] = []
        self.root = self._new_table()
        self.mapped = 0

    @property
    def eptp(self) -> int:
        """The EPT pointer of a VMCS: write-back, this walk length."""
        return self.root | EPTP_MT_WB | (EPTP_WALK_5 if self.levels == 5 else EPTP_WALK_4)

    @property
    def table_pages(self) -> int:
        """Host pages the tables take."""
        return len(self._tables)

    def map(self, gpa: int, hpa: int, *, level: int = 0, writable: bool = True) -> None:
        """Map 4 KiB (level 0) or 2 MiB (level 1)."""
        at = self._entry_address(gpa | self._bits, level)
        rights = _RWX if writable else sept.R | sept.X
        if not self._memory.rd64(at) & _RWX:
            self.mapped += 1 << 9 * level
        self._memory.wr64(at, hpa | rights | _WB_IPAT | self._absent | (_LEAF if level else 0))

    def mark_mmio(self, gpa: int) -> None:
        """Let accesses to this page give the TD a #VE."""
        self._memory.wr64(self._entry_address(gpa | self._bits, 0), 0)

    def lookup(self, gpa: int) -> int | None:
        """The host page that backs a GPA."""
        table, gpa = self.root, gpa | self._bits
        for level in range(self.levels - 1, -1, -1):
            entry = self._memory.rd64(table + 8 * sept.entry_index(gpa, level))
            if not entry & _RWX:
                return None
            if level == 0 or entry & _LEAF:
                return (entry & _ADDRESS) + (gpa & sept.level_size(level) - 1 & ~(PAGE - 1))
            table = entry & _ADDRESS
        return None

    def unmap(self, start: int, end: int) -> bool:
        """Unmap [start, end); a large page that overlaps goes as a whole. True if anything was mapped."""
        found = False
        for at, level in list(self._leaves(self.root, self.levels - 1, 0, start + self._bits, end + self._bits)):
            self._memory.wr64(at, self._absent)
            self.mapped -= 1 << 9 * level
            found = True
        return found

    def free(self) -> None:
        """Give the tables back."""
        for table in self._tables:
            self._memory.free(table)
        self._tables.clear()

    def _new_table(self) -> int:
        table = self._memory.alloc(zero=not self._absent)
        if self._absent:
            self._memory.write(table, self._absent.to_bytes(8, "little") * 512)
        self._tables.append(table)
        return table

    def _entry_address(self, gpa: int, level: int) -> int:
        table = self.root
        for upper in range(self.levels - 1, level, -1):
            at = table + 8 * sept.entry_index(gpa, upper)
            entry = self._memory.rd64(at)
            if not entry & _RWX or entry & _LEAF:
                if entry & _LEAF:
                    self.mapped -= 1 << 9 * upper
                entry = self._new_table() | _RWX
                self._memory.wr64(at, entry)
            table = entry & _ADDRESS
        return table + 8 * sept.entry_index(gpa, level)

    def _leaves(self, table: int, level: int, base: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        size = sept.level_size(level)
        first = max(0, (start - base) // size)
        last = min(512, -(-(end - base) // size))
        for index in range(first, last):
            at = table + 8 * index
            entry = self._memory.rd64(at)
            if entry & _RWX and (level == 0 or entry & _LEAF):
                yield at, level
            elif entry & _RWX:
                yield from self._leaves(entry & _ADDRESS, level - 1, base + index * size, start, end)
            elif entry != self._absent:
                self._memory.wr64(at, self._absent)  # an MMIO mark ends with the range too
