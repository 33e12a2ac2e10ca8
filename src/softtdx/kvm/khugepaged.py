"""khugepaged: a pass that makes small pages large ones, behind the guests' backs (mm/khugepaged.c).

User memory that madvise(MADV_HUGEPAGE) allows is copied into a huge page. Private memory of a TD is moved together by
RELOCATE where it must be, and merged by PROMOTE once the TD has accepted it.
"""

from typing import TYPE_CHECKING

from softtdx.abi import sept
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE_1G, PAGE_2M

if TYPE_CHECKING:
    from softtdx.kvm.host import Host
    from softtdx.kvm.mirror import SecureEpt
    from softtdx.kvm.vm import Vm

__all__ = ["Khugepaged"]

_MAX_NONE = 511  # small pages that may be missing from one that is collapsed (max_ptes_none)
_ATTEMPTS = 16  # to collapse, a pass (a bound as pages_to_scan is)
_LEVEL_1G = 2


class Khugepaged:
    """The pass. `max_none`: how many of 512 user pages may be missing, and are filled in."""

    def __init__(self, host: "Host") -> None:
        """Idle until `scan`."""
        self._host = host
        self.max_none = _MAX_NONE

    def scan(self, attempts: int = _ATTEMPTS) -> int:
        """One pass: try to collapse up to `attempts` ranges of each process and VM; returns how many were."""
        count = 0
        for mm in {id(vm.mm): vm.mm for vm in list(self._host.vms)}.values():
            count += sum(mm.collapse(base, self.max_none) for base in mm.collapsible()[:attempts])
        for vm in list(self._host.vms):
            count += self._private(vm, attempts)
        return count

    def _private(self, vm: "Vm", attempts: int) -> int:
        count = 0
        with vm.mmu():
            secure = vm.ops.secure_ept
            if secure is None or vm.dead:
                return 0
            bases = _full_ranges(secure, 0)
        for base in bases[:attempts]:
            try:
                count += vm.collapse(base)
            except KvmError:
                vm.stats["promotions refused"] += 1
        with vm.mmu(), self._host.cpus.run() as lp:
            for base in [] if vm.ops.secure_ept is None else _full_ranges(secure, 1):
                if not secure.may_promote(base, _LEVEL_1G):
                    continue
                try:
                    merged = secure.promote(lp, base, _LEVEL_1G)
                except KvmError:
                    vm.stats["promotions refused"] += 1
                    continue
                vm.stats["promotions"] += merged
                count += merged
        return count


def _full_ranges(secure: "SecureEpt", level: int) -> list[int]:
    """GPAs of ranges of the size above `level` that 512 leaves of `level` map."""
    size = PAGE_2M if level == 0 else PAGE_1G
    counts: dict[int, int] = {}
    for gpa, leaf in secure.mappings():
        if leaf.level == level:
            base = gpa & ~(size - 1)
            counts[base] = counts.get(base, 0) + 1
    return sorted(base for base, n in counts.items() if n == sept.ENTRIES_PER_PAGE)
