"""KVM's side of the MMU notifiers: user memory that changes is unmapped from the guest first (virt/kvm/kvm_main.c).

It is about shared memory and ordinary VMs only. Private memory is in a guest_memfd, which no user address leads to.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softtdx.kvm.vm import Vm

__all__ = ["KvmMmuNotifier"]


class KvmMmuNotifier:
    """One VM's notifier. `sequence` counts invalidations: a fault that finds it changed starts over."""

    def __init__(self, vm: "Vm") -> None:
        """Nothing is being invalidated."""
        self._vm = vm
        self.sequence = 0
        self._running: list[tuple[int, int]] = []

    def retry(self, sequence: int, start: int, end: int) -> bool:
        """Whether a translation of [start, end) that was read at `sequence` may be stale (mmu_invalidate_retry)."""
        return sequence != self.sequence or any(s < end and start < e for s, e in self._running)

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Unmap the range from the guest and flush what processors cached of it."""
        with self._vm.mmu():
            self._running.append((start, end))
            ept = self._vm.ept
            if ept is None:
                return
            unmapped = [ept.unmap(*frames) for frames in self._frames(start, end)]
            if any(unmapped):
                self._vm.flush_tlbs()
                self._vm.stats["mmu notifier unmaps"] += 1

    def invalidate_range_end(self, start: int, end: int) -> None:
        """The range may be mapped again."""
        with self._vm.mmu_lock:
            self._running.remove((start, end))
            self.sequence += 1

    def clear_flush_young(self, start: int, end: int) -> bool:
        """The A bits of the range, or the faults of watched entries, since the last time."""
        with self._vm.mmu():
            young = self._age(start, end, clear=True)
            if young:
                self._vm.flush_tlbs()
            return young

    def test_young(self, start: int, end: int) -> bool:
        """The same without starting anew."""
        with self._vm.mmu_lock:
            return self._age(start, end, clear=False)

    def _age(self, start: int, end: int, *, clear: bool) -> bool:
        ept = self._vm.ept
        if ept is None:
            return False
        young = [ept.age(*frames, clear=clear) for frames in self._frames(start, end)]
        return any(young)

    def _frames(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of the guest's memory that user addresses [start, end) back."""
        for slot in list(self._vm.memslots):
            first = max(start, slot.userspace_addr)
            last = min(end, slot.userspace_addr + slot.size)
            if first < last:
                yield slot.gpa + first - slot.userspace_addr, slot.gpa + last - slot.userspace_addr
