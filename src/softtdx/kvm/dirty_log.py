"""The dirty log of a memory slot: which of its pages the guest wrote (virt/kvm/dirty_ring.c's older sibling).

KVM_MEM_LOG_DIRTY_PAGES write-protects the slot; the first write to a page faults, sets its bit and makes it writable.
KVM_GET_DIRTY_LOG takes the bits and protects again; with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it only looks, and
KVM_CLEAR_DIRTY_LOG protects what user space is about to send. A slot with a guest_memfd has no dirty log, as in the
kernel: what a TD writes to private memory is tracked by TDH.EXPORT.BLOCKW, which belongs to live migration.
(Kernel: virt/kvm/kvm_main.c, kvm_get_dirty_log_protect; the slot bitmap is struct kvm_memory_slot.dirty_bitmap.)
"""

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE

if TYPE_CHECKING:
    from softtdx.kvm.memslots import Memslot
    from softtdx.kvm.vm import Vm

__all__ = ["DIRTY_LOG_INITIALLY_SET", "DIRTY_LOG_MANUAL_PROTECT", "DirtyBitmap", "clear_dirty_log", "get_dirty_log"]

DIRTY_LOG_MANUAL_PROTECT = 1 << 0  # args[0] of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
DIRTY_LOG_INITIALLY_SET = 1 << 1
_WORD = 64


class DirtyBitmap:
    """One bit a page, in words of 64. The caller holds the MMU lock."""

    def __init__(self, pages: int, *, initially_set: bool = False) -> None:
        """All clean, or all dirty: then the slot need not be protected before the first clear."""
        self.pages = pages
        self._bits = (1 << pages) - 1 if initially_set else 0

    def mark(self, page: int) -> None:
        """The guest wrote page number `page` of the slot."""
        self._bits |= 1 << page

    def __len__(self) -> int:
        """How many pages are dirty."""
        return self._bits.bit_count()

    def take(self, bits: int = -1) -> list[int]:
        """Clear the bits that are set in `bits`; the numbers of the pages that were dirty."""
        taken = self._bits & bits
        self._bits &= ~taken
        return list(_numbers(taken))

    def __bytes__(self) -> bytes:
        """As user space gets it: whole words, little-endian."""
        return self._bits.to_bytes(-(-self.pages // _WORD) * 8, "little")


def _numbers(bits: int) -> Iterator[int]:
    for at, byte in enumerate(bits.to_bytes(-(-bits.bit_length() // 8), "little")):
        if byte:
            yield from (8 * at + bit for bit in range(8) if byte >> bit & 1)


def get_dirty_log(vm: "Vm", slot: int) -> bytes:
    """KVM_GET_DIRTY_LOG: the bitmap. ENOENT for a slot that does not exist or is not logged."""
    with vm.mmu():
        memslot, bitmap = _logged(vm, slot)
        data = bytes(bitmap)
        if not vm.dirty_log_manual:
            _protect(vm, memslot, bitmap.take())
        return data


def clear_dirty_log(vm: "Vm", slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
    """KVM_CLEAR_DIRTY_LOG: pages of `bitmap`, whose bit 0 is `first_page`, are clean and protected again.

    EINVAL unless `first_page` is a multiple of 64 inside the slot, and `num_pages` too or up to the slot's end.
    """
    with vm.mmu():
        memslot, log = _logged(vm, slot)
        last = first_page + num_pages
        if first_page % _WORD or first_page < 0 or num_pages <= 0 or last > log.pages:
            raise KvmError(errno.EINVAL, f"KVM_CLEAR_DIRTY_LOG of {num_pages} pages from {first_page}")
        if num_pages % _WORD and last != log.pages:
            raise KvmError(errno.EINVAL, f"KVM_CLEAR_DIRTY_LOG of {num_pages} pages, not a multiple of 64")
        if len(bitmap) < -(-num_pages // 8):
            raise KvmError(errno.EFAULT, f"a bitmap of {len(bitmap)} bytes for {num_pages} pages")
        wanted = int.from_bytes(bitmap, "little") & (1 << num_pages) - 1
        _protect(vm, memslot, log.take(wanted << first_page))


def _logged(vm: "Vm", slot: int) -> "tuple[Memslot, DirtyBitmap]":
    memslot = vm.memslots.get(slot)
    if memslot is None or memslot.dirty_bitmap is None:
        raise KvmError(errno.ENOENT, f"memory slot {slot} does not exist or is not logged")
    return memslot, memslot.dirty_bitmap


def _protect(vm: "Vm", slot: "Memslot", pages: list[int]) -> None:
    """Write-protect pages of a slot, and flush the TLBs once for all."""
    if vm.ept is None:
        return  # a TD before KVM_TDX_INIT_VM
    flush = False
    for page in pages:
        gpa = slot.gpa + page * PAGE
        flush |= vm.ept.write_protect(gpa, gpa + PAGE)
    if flush:
        vm.flush_tlbs()
