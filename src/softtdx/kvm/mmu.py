"""Page faults of a guest: from an EPT violation to memory.

Private and shared memory are two aliases of one memslot. A fault must agree with the frame's attribute, otherwise
user space is told to convert it (KVM_EXIT_MEMORY_FAULT). (Kernel: arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn.)
"""

import errno
from enum import Enum, auto

from softtdx.abi import sept
from softtdx.hw import LogicalProcessor
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, PAGE_2M
from softtdx.kvm.memslots import Memslot
from softtdx.kvm.mirror import SecureEpt
from softtdx.kvm.mm import UserPage
from softtdx.kvm.page_moves import note_promotable
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm

__all__ = ["Fault", "map_private", "pre_fault_private", "private_fault", "shared_fault"]


_FAULT_AROUND = 32 * PAGE
_TABLES = 32  # pages to reclaim when there is none for a table


class Fault(Enum):
    """What became of a fault."""

    FIXED = auto()  # the guest can go on
    NO_MEMORY = auto()  # no memslot: MMIO
    USER = auto()  # user space has to change the attribute; kvm_run is set


def shared_fault(vcpu: Vcpu, gpa: int, *, write: bool = False) -> Fault:
    """An access to shared (or an ordinary VM's) memory at `gpa`, shared bit stripped.

    The page is found without the MMU lock, because finding it may take reclaim; if the user memory changed
    meanwhile nothing is mapped and the guest faults again (mmu_invalidate_retry).
    """
    vm = vcpu.vm
    page = gpa & ~(PAGE - 1)
    with vm.mmu_lock:
        slot = vm.memslots.find(page)
        if slot is None or (write and slot.read_only):
            return Fault.NO_MEMORY
        if vm.private.is_private(page):
            return _tell_user(vcpu, page, private=False)
        if _mapped_already(vm, slot, page, write=write):
            return Fault.FIXED
        sequence = vm.mmu_notifier.sequence
        around = [] if slot.dirty_bitmap is not None else _unmapped_around(vm, slot, page)
    user = _faultin(vcpu, slot.hva(page))
    hinted = vm.mm.hinted
    wanted = [at for at in around if slot.hva(at) not in hinted] if user.size == PAGE else []
    others = [(slot.gpa_of(hva), pa) for hva, pa in vm.mm.get_pages_nowait([slot.hva(at) for at in wanted])]
    first, last = min([user.hva, *map(slot.hva, around)]), max([user.hva + user.size, *map(slot.hva, around)])
    try:
        with vm.mmu_lock:
            stale = vm.memslots.find(page) is not slot or vm.private.is_private(page)
            if stale or vm.mmu_notifier.retry(sequence, first, last):
                return Fault.FIXED
            if _map_shared(vm, slot, page, user, write=write):
                vm.flush_tlbs()
            assert vm.ept is not None
            still = [(at, pa) for at, pa in others if not vm.private.is_private(at)]
            vm.stats["shared pages mapped"] += vm.ept.fill(still, writable=not slot.read_only)
    except KvmError as error:
        # There was no page for a table. The guest faults again, and finds what was mapped by then.
        if error.errno != errno.ENOMEM or not vm.host.memory.reclaim(_TABLES):
            raise
    return Fault.FIXED


def _mapped_already(vm: Vm, slot: Memslot, page: int, *, write: bool) -> bool:
    """A fault at a page that is mapped: watched, write-protected for the dirty log, or mapped by another vCPU since."""
    assert vm.ept is not None
    leaf = vm.ept.find(page)
    if leaf is None:
        return False
    if leaf.watched:
        vm.ept.restore(page)
    if write and not leaf.writable:
        if slot.read_only:
            return False
        vm.ept.make_writable(page, small=slot.dirty_bitmap is not None)
        vm.mark_page_dirty(page)
        vm.stats["write faults"] += 1
    return True


def _faultin(vcpu: Vcpu, hva: int) -> UserPage:
    """The host page behind a user address. A page that NUMA hinting unmapped may first move to where the vCPU is."""
    vm = vcpu.vm
    if vm.mm.hinted and vcpu.cpu is not None:
        vm.host.mm.numa.hinting_fault(vm.mm, hva, vcpu.cpu)
    return vm.mm.get_user_page(hva)


def _unmapped_around(vm: Vm, slot: Memslot, page: int) -> list[int]:
    """The shared pages around `page` that are not mapped: one fault is enough for them (fault-around)."""
    assert vm.ept is not None
    first = max(slot.gpa, page & ~(_FAULT_AROUND - 1))
    last = min(slot.end, (page | _FAULT_AROUND - 1) + 1)
    return [at for at in vm.ept.absent(first, last) if at != page and not vm.private.is_private(at)]


def _map_shared(vm: Vm, slot: Memslot, page: int, user: UserPage, *, write: bool) -> bool:
    """Map the page at the largest size that its backing, its slot and the frames' attributes allow.

    True when tables were replaced by a large page. (Kernel: host_pfn_mapping_level, kvm_mmu_hugepage_adjust.)
    """
    assert vm.ept is not None
    for level in (2, 1):
        size = sept.level_size(level)
        base = page & ~(size - 1)
        if user.size < size or slot.hva(base) % size or not (slot.gpa <= base and base + size <= slot.end):
            continue
        if slot.dirty_bitmap is not None or not vm.private.all_shared(base, base + size):
            continue
        vm.stats["shared huge pages mapped"] += 1
        return vm.ept.map(base, user.at(slot.hva(base)), level=level, writable=not slot.read_only)
    _map_small(vm, slot, page, user.at(slot.hva(page)), write=write)
    return False


def _map_small(vm: Vm, slot: Memslot, page: int, pa: int, *, write: bool = False) -> None:
    """Map 4 KiB. Where writes are logged it is writable only if this is one."""
    assert vm.ept is not None
    logged = slot.dirty_bitmap is not None
    vm.ept.map(page, pa, writable=not slot.read_only and (write or not logged))
    vm.stats["shared pages mapped"] += 1
    if logged and write:
        vm.mark_page_dirty(page)


def private_fault(
    vcpu: Vcpu, lp: LogicalProcessor, secure: SecureEpt, gpa: int, level: int, *, accept: bool = False
) -> Fault:
    """An access to private memory; `level` is the size wanted. `accept`: the TD asked for exactly that (PAGE.ACCEPT).

    A TD that accepts a small page where a large one is pending gets the large one split: it cannot accept a part.
    """
    vm = vcpu.vm
    page = gpa & ~(PAGE - 1)
    try:
        with vm.mmu_lock:
            return _private_fault(vcpu, lp, secure, page, level, accept=accept)
    except KvmError as error:
        # Reclaim takes pages of other VMs, so not with this one's lock held. Then the guest faults again.
        if error.errno != errno.ENOMEM or not vm.host.memory.reclaim(_TABLES):
            raise
    return Fault.FIXED


def _private_fault(
    vcpu: Vcpu, lp: LogicalProcessor, secure: SecureEpt, page: int, level: int, *, accept: bool
) -> Fault:
    vm = vcpu.vm
    slot = vm.memslots.find(page)
    if slot is None or slot.guest_memfd is None:
        return Fault.NO_MEMORY
    if not vm.private.is_private(page):
        return _tell_user(vcpu, page, private=True)
    mapping = secure.lookup(page)
    if mapping is None:
        map_private(vm, lp, secure, slot, page, level)
        return Fault.FIXED
    base = page & ~(mapping.size - 1)
    if (base, mapping.level) in secure.hinted:
        vm.host.mm.numa.private_hinting_fault(vm, lp, secure, base, mapping)
    elif accept and level < mapping.level:
        secure.demote(lp, base, mapping.level)
        vm.stats["demotions"] += 1
    return Fault.FIXED


def pre_fault_private(vcpu: Vcpu, lp: LogicalProcessor, secure: SecureEpt, gpa: int, end: int) -> int:
    """Map private memory from `gpa` on before the TD asks, by large pages where possible; returns where to go on."""
    while (fault := private_fault(vcpu, lp, secure, gpa, 1)) is Fault.FIXED:
        mapping = secure.lookup(gpa)
        if mapping is not None:
            return min(end, (gpa & ~(mapping.size - 1)) + mapping.size)
    raise KvmError(errno.ENOENT, f"GPA {gpa:#x} is not private memory of the TD ({fault.name})")


def map_private(vm: Vm, lp: LogicalProcessor, secure: SecureEpt, slot: Memslot, gpa: int, level: int) -> bool:
    """Give the TD a page for `gpa`, 2 MiB if that was asked for and the backing allows it. False: busy, fault again."""
    assert slot.guest_memfd is not None
    if level >= 1:
        base = gpa & ~(PAGE_2M - 1)
        fits = slot.gpa <= base and base + PAGE_2M <= slot.end and not slot.file_offset(base) % PAGE_2M
        if fits and secure.may_map(base, 1) and vm.private.all_private(base, base + PAGE_2M):
            huge = slot.guest_memfd.get_huge_page(slot.file_offset(base) // PAGE)
            if huge is not None:
                vm.stats["huge pages mapped"] += 1
                done = secure.aug(lp, base, huge, 1)
                if slot.guest_memfd.page_size > PAGE_2M:
                    note_promotable(secure, base, 2)
                return done
    page = slot.guest_memfd.get_page(slot.file_offset(gpa) // PAGE)
    vm.stats["private pages mapped"] += 1
    done = secure.aug(lp, gpa, page, 0)
    note_promotable(secure, gpa)
    return done


def _tell_user(vcpu: Vcpu, gpa: int, *, private: bool) -> Fault:
    vcpu.exit_for_memory(gpa, PAGE, private=private)
    return Fault.USER


def walk_guest(vm: Vm, cr3: int, address: int) -> int:
    """The GPA behind a linear address of an ordinary VM in long mode. EFAULT when it does not translate."""
    table = cr3 & sept.HPA_MASK
    for shift in (39, 30, 21, 12):
        entry = int.from_bytes(vm.read_guest(table + (address >> shift & 0x1FF) * 8, 8), "little")
        if not entry & 1:
            raise KvmError(errno.EFAULT, f"guest address {address:#x} is not mapped")
        if shift == 12 or (entry & sept.LEAF and shift < 39):
            mask = (1 << shift) - 1
            return entry & sept.HPA_MASK & ~mask | address & mask
        table = entry & sept.HPA_MASK
    raise KvmError(errno.EFAULT, f"guest address {address:#x} is not mapped")
