"""Automatic NUMA balancing: pages go to the node of the processors that use them (kernel/sched/fair.c, mm/mempolicy.c).

A pass takes translations away from guests. The next access faults, and the fault tells which processor made it. A
page that is asked for twice in a row from another node than its own moves there. User memory is unmapped by its MMU
notifiers. Private memory of a TD is blocked (TDH.MEM.RANGE.BLOCK, one TRACK for all), and moves by RELOCATE: nobody
else can copy it.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

from softtdx.kvm.errors import KvmError
from softtdx.kvm.page_moves import migrate

if TYPE_CHECKING:
    from softtdx.hw import LogicalProcessor
    from softtdx.kvm.host import Host
    from softtdx.kvm.mirror import Mapping, SecureEpt
    from softtdx.kvm.mm import AddressSpace
    from softtdx.kvm.vm import Vm

__all__ = ["NumaBalancing", "nodes_of"]

_SCAN_PAGES = 256  # of each VM and address space, a pass


def nodes_of(host: "Host") -> list[tuple[int, int]]:
    """The physical range of each node: a package's share of the memory, in order of address."""
    packages = host.platform.description.packages
    first, last = host.memory.ranges[0][0], host.memory.ranges[-1][1]
    share = (last - first) // packages & ~((2 << 20) - 1)
    starts = [first & ~((2 << 20) - 1), *(first + i * share & ~((2 << 20) - 1) for i in range(1, packages)), last]
    return list(pairwise(starts))


class NumaBalancing:
    """The scanner, and what its faults lead to."""

    def __init__(self, host: "Host") -> None:
        """Idle until `scan`."""
        self._host = host
        self.nodes = nodes_of(host)
        self._positions: dict[object, int] = {}

    def node_of_page(self, pa: int) -> int:
        """The node whose memory a physical address is."""
        return next((i for i, (start, end) in enumerate(self.nodes) if start <= pa < end), 0)

    def node_of_cpu(self, index: int) -> int:
        """The node that a processor is near to."""
        return self._host.cpus.lps[index].package

    # --- the scanner
    def scan(self, pages: int = _SCAN_PAGES) -> int:
        """One pass: take the translations of the next `pages` pages of every process and VM; how many were taken."""
        if len(self.nodes) < 2:
            return 0
        count = 0
        for vm in list(self._host.vms):
            self._positions[vm.mm], taken = vm.mm.hint(self._positions.get(vm.mm, 0), pages)
            count += taken
            try:
                count += self._hint_private(vm, pages)
            except KvmError:
                vm.stats["hints refused"] += 1  # the memory stays where it is, and usable
        alive = {space for vm in self._host.vms for space in (vm, vm.mm)}
        self._positions = {key: at for key, at in self._positions.items() if key in alive}
        return count

    def _hint_private(self, vm: "Vm", pages: int) -> int:
        with vm.mmu():
            secure = vm.ops.secure_ept
            if secure is None or vm.dead:
                return 0  # the lock is held: it does not go away now
            after = self._positions.get(vm, -1)
            window = sorted((gpa, leaf.level) for gpa, leaf in secure.mappings() if gpa > after)[:pages]
            self._positions[vm] = window[-1][0] if len(window) == pages else -1
            before = len(secure.hinted)
            with self._host.cpus.run() as lp:
                secure.hint(lp, window)
            return len(secure.hinted) - before

    # --- the faults
    def hinting_fault(self, mm: "AddressSpace", hva: int, cpu: int) -> None:
        """User memory that the scanner unmapped is asked for on processor `cpu`."""
        page = mm.get_user_page(hva)
        last = mm.hinted.pop(page.hva, None)
        if last is None:
            return
        node = self.node_of_cpu(cpu)
        if node == self.node_of_page(page.pa):
            return
        if last != node:
            mm.hinted[page.hva] = node  # wait for a second opinion: the next pass finds it here
            return
        mm.stats["numa pages migrated"] += mm.migrate(page.hva, page.hva + page.size, self.nodes[node])

    def private_hinting_fault(
        self, vm: "Vm", lp: "LogicalProcessor", secure: "SecureEpt", base: int, mapping: "Mapping"
    ) -> None:
        """Private memory that the scanner blocked is asked for on `lp`. The MMU lock is held."""
        last, node = secure.hinted[base, mapping.level], self.node_of_cpu(lp.index)
        secure.unhint(lp, base, mapping.level)
        if node == self.node_of_page(mapping.hpa):
            secure.last_node.pop(base, None)
            return
        if secure.last_node.get(base, last) != node:
            secure.last_node[base] = node
            return
        secure.last_node.pop(base, None)
        try:
            moved = migrate(vm, lp, secure, base, base + mapping.size, self.nodes[node])
        except KvmError:
            vm.stats["numa moves refused"] += 1
            if vm.dead:
                raise
            return
        vm.stats["numa pages migrated"] += moved
