"""Page faults of a guest: from an EPT violation to memory.

Private and shared memory are two aliases of one memslot. A fault must agree with the frame's attribute, otherwise
user space is told to convert it (KVM_EXIT_MEMORY_FAULT). (Kernel: arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn.)
"""

import errno
from enum import Enum, auto

from softtdx.abi import sept
from softtdx.hw import LogicalProcessor
from softtdx.kvm.ept import Ept
from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE, PAGE_2M
from softtdx.kvm.memslots import Memslot
from softtdx.kvm.mirror import SecureEpt
from softtdx.kvm.page_moves import note_promotable
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm

__all__ = ["Fault", "map_private", "pre_fault_private", "private_fault", "shared_fault"]


_FAULT_AROUND = 32 * PAGE


class Fault(Enum):
    """What became of a fault."""

    FIXED = auto()  # the guest can go on
    NO_MEMORY = auto()  # no memslot: MMIO
    USER = auto()  # user space has to change the attribute; kvm_run is set


def shared_fault(vcpu: Vcpu, gpa: int) -> Fault:
    """An access to shared (or an ordinary VM's) memory at `gpa`, shared bit stripped."""
    vm = vcpu.vm
    page = gpa & ~(PAGE - 1)
    with vm.mmu_lock:
        slot = vm.memslots.find(page)
        if slot is None:
            return Fault.NO_MEMORY
        if vm.private.is_private(page):
            return _tell_user(vcpu, page, private=False)
        assert vm.ept is not None
        if vm.ept.lookup(page) is None:
            _map_around(vm, vm.ept, slot, page)
    return Fault.FIXED


def _map_around(vm: Vm, ept: Ept, slot: Memslot, page: int) -> None:
    """Map the shared page at `page` and those around it that are not mapped: one fault for many (fault-around)."""
    first = max(slot.gpa, page & ~(_FAULT_AROUND - 1))
    last = min(slot.end, (page | _FAULT_AROUND - 1) + 1)
    for at in range(first, last, PAGE):
        if at == page or (not vm.private.is_private(at) and ept.lookup(at) is None):
            ept.map(at, vm.mm.get_page(slot.hva(at)))
            vm.stats["shared pages mapped"] += 1


def private_fault(
    vcpu: Vcpu, lp: LogicalProcessor, secure: SecureEpt, gpa: int, level: int, *, accept: bool = False
) -> Fault:
    """An access to private memory; `level` is the size wanted. `accept`: the TD asked for exactly that (PAGE.ACCEPT).

    A TD that accepts a small page where a large one is pending gets the large one split: it cannot accept a part.
    """
    vm = vcpu.vm
    page = gpa & ~(PAGE - 1)
    with vm.mmu_lock:
        slot = vm.memslots.find(page)
        if slot is None or slot.guest_memfd is None:
            return Fault.NO_MEMORY
        if not vm.private.is_private(page):
            return _tell_user(vcpu, page, private=True)
        mapping = secure.lookup(page)
        if mapping is None:
            map_private(vm, lp, secure, slot, page, level)
        elif accept and level < mapping.level:
            secure.demote(lp, page & ~(PAGE_2M - 1))
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
                return secure.aug(lp, base, huge, 1)
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
    assert vm.ept is not None
    table = cr3 & sept.HPA_MASK
    for shift in (39, 30, 21, 12):
        hpa = vm.ept.lookup(table)
        entry = 0 if hpa is None else vm.host.memory.rd64(hpa + (address >> shift & 0x1FF) * 8)
        if not entry & 1:
            raise KvmError(errno.EFAULT, f"guest address {address:#x} is not mapped")
        if shift == 12 or (entry & sept.LEAF and shift < 39):
            mask = (1 << shift) - 1
            return entry & sept.HPA_MASK & ~mask | address & mask
        table = entry & sept.HPA_MASK
    raise KvmError(errno.EFAULT, f"guest address {address:#x} is not mapped")
