"""A VM: the ioctls on its file descriptor, and its end."""

import errno
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING

from softtdx.abi.kvm import (
    GUEST_MEMFD_FLAG_HUGETLB,
    GUESTMEM_HUGETLB_FLAG_1GB,
    GUESTMEM_HUGETLB_FLAG_2MB,
    HC_MAP_GPA_RANGE,
    MEMORY_ATTRIBUTE_PRIVATE,
    KvmCap,
    MemorySlotFlag,
    MsrExitReason,
)
from softtdx.abi.kvm_structs import IrqRoutingEntry
from softtdx.kvm import dirty_log
from softtdx.kvm.ept import Ept
from softtdx.kvm.errors import KvmError
from softtdx.kvm.eventfd import Eventfd, IoBus, Irqfds
from softtdx.kvm.guest_memfd import GuestMemfd
from softtdx.kvm.irq_routing import IrqRouting
from softtdx.kvm.lapic import deliver_msi
from softtdx.kvm.memory import PAGE, PAGE_1G, PAGE_2M
from softtdx.kvm.memslots import Memslot, Memslots, PrivateRanges
from softtdx.kvm.mmu_notifier import KvmMmuNotifier
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.x86_ops import choose

if TYPE_CHECKING:
    from softtdx.kvm.kvm import Kvm

__all__ = ["HYPERCALL_EXITS", "Vm"]

_MAX_GPA = 1 << 52
_GUEST_MEMFD_PAGES = {
    0: PAGE,
    GUEST_MEMFD_FLAG_HUGETLB | GUESTMEM_HUGETLB_FLAG_2MB: PAGE_2M,
    GUEST_MEMFD_FLAG_HUGETLB | GUESTMEM_HUGETLB_FLAG_1GB: PAGE_1G,
}
_IOAPIC_PINS = 24
_X2APIC_API_FLAGS = 3  # KVM_X2APIC_API_USE_32BIT_IDS, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
HYPERCALL_EXITS = 1 << HC_MAP_GPA_RANGE


class Vm:
    """One VM. Its memory is described by memslots; `mmu_lock` guards everything that maps it.

    A thread takes a processor first and `mmu_lock` second (`mmu` does both): one that waited for a processor with the
    lock held could wait for the very threads that wait for the lock on all of them.
    """

    def __init__(self, kvm: "Kvm", vm_type: int) -> None:
        """KVM_CREATE_VM."""
        self.kvm = kvm
        self.host = kvm.host
        self.mm = kvm.mm
        self.vm_type = vm_type
        self.mmu_lock = RLock()
        self.memslots = Memslots(_MAX_GPA)
        self.private = PrivateRanges()
        self.vcpus: dict[int, Vcpu] = {}
        self.files: list[GuestMemfd] = []
        self.stats: Counter[str] = Counter()
        self.dead = False
        self.closed = False
        self.irqchip = False
        self.idle_in_real_time = False
        self.dirty_log_manual = 0
        self.wide_apic_ids = False
        self.boot_cpu = 0
        self.hypercall_exits = 0  # KVM_CAP_EXIT_HYPERCALL: which hypercalls user space answers
        self.user_space_msrs = 0  # KVM_CAP_X86_USER_SPACE_MSR: which unknown MSRs it answers
        self.tsc_khz = kvm.host.platform.description.tsc_hz // 1000
        self.io_bus = IoBus()
        self.routing = IrqRouting()
        self.irqfds = Irqfds(lambda gsi: self.set_irq(gsi, 1))
        self.ept: Ept | None = None
        self.ops = choose(self)
        self.mmu_notifier = KvmMmuNotifier(self)
        self.mm.register_notifier(self.mmu_notifier)

    @contextmanager
    def mmu(self) -> Iterator[None]:
        """Hold `mmu_lock`, on a processor."""
        with self.host.cpus.run(), self.mmu_lock:
            yield

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION on a VM: what depends on its type."""
        if cap == KvmCap.MEMORY_ATTRIBUTES:
            return MEMORY_ATTRIBUTE_PRIVATE if self.ops.has_private_memory else 0
        if cap == KvmCap.GUEST_MEMFD:
            return int(self.ops.has_private_memory)
        if cap in (KvmCap.MAX_VCPUS, KvmCap.MAX_VCPU_ID):
            return self.ops.max_vcpus
        return self.kvm.check_extension(cap)

    # --- memory
    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD, with GUEST_MEMFD_FLAG_HUGETLB and a size on hugetlb pages.

        EINVAL for other flags or for a VM without private memory.
        """
        self._alive()
        page_size = _GUEST_MEMFD_PAGES.get(flags)
        if page_size is None or not self.ops.has_private_memory:
            raise KvmError(errno.EINVAL, f"KVM_CREATE_GUEST_MEMFD with flags {flags:#x} for this type of VM")
        file = GuestMemfd(self.host.memory, size, page_size)
        self.files.append(file)
        return file

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: GuestMemfd | None = None,
        guest_memfd_offset: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2: create a slot, move it, change its flags, or with size 0 delete it.

        EINVAL for what is misaligned, above the GPA width (a GPA with the shared bit is), or changed while private;
        EEXIST for an overlap; EFAULT for user memory that is not mapped.
        """
        self._alive()
        with self.mmu():
            old = self.memslots.get(slot)
            if memory_size == 0:
                if old is None:
                    raise KvmError(errno.EINVAL, f"there is no memory slot {slot} to delete")
                self._delete_slot(old)
                return
            if bool(guest_memfd) != bool(flags & MemorySlotFlag.GUEST_MEMFD) or (
                guest_memfd and (not self.ops.has_private_memory or guest_memfd not in self.files)
            ):
                raise KvmError(errno.EINVAL, f"memory slot {slot}: guest_memfd and KVM_MEM_GUEST_MEMFD do not agree")
            if flags & ~self._slot_flags(flags):
                raise KvmError(errno.EINVAL, f"memory slot {slot} with flags {flags:#x} for this type of VM")
            new = Memslot(
                slot,
                MemorySlotFlag(flags),
                guest_phys_addr,
                memory_size,
                userspace_addr,
                guest_memfd,
                guest_memfd_offset,
                self._dirty_bitmap(old, flags, memory_size // PAGE),
            )
            self.memslots.check(new)
            if not self.mm.is_mapped(userspace_addr, memory_size):
                raise KvmError(errno.EFAULT, f"memory slot {slot}: user memory {userspace_addr:#x} is not mapped")
            if old is not None:
                self._change_slot(old, new)
                return
            if guest_memfd is not None:
                guest_memfd.bind(guest_memfd_offset, memory_size, lambda o, n: self._invalidate(new, o, n))
            self.memslots.put(new)
            if self.ept is not None:
                self.ept.unmap(new.gpa, new.end)  # MMIO marks: from now on there is memory

    def _slot_flags(self, flags: int) -> int:
        """The flags that a slot may have (check_memory_region_flags): with private memory no dirty log and no ROM."""
        if flags & MemorySlotFlag.GUEST_MEMFD:
            return int(MemorySlotFlag.GUEST_MEMFD)
        read_only = 0 if self.ops.has_private_memory else int(MemorySlotFlag.READONLY)
        return int(MemorySlotFlag.LOG_DIRTY_PAGES) | read_only

    def _dirty_bitmap(self, old: Memslot | None, flags: int, pages: int) -> dirty_log.DirtyBitmap | None:
        if not flags & MemorySlotFlag.LOG_DIRTY_PAGES:
            return None
        if old is not None and old.dirty_bitmap is not None:
            return old.dirty_bitmap
        initially_set = bool(self.dirty_log_manual & dirty_log.DIRTY_LOG_INITIALLY_SET)
        return dirty_log.DirtyBitmap(pages, initially_set=initially_set)

    def _change_slot(self, old: Memslot, new: Memslot) -> None:
        """KVM_MR_MOVE or KVM_MR_FLAGS_ONLY; EINVAL for any other change, and for any of a slot with private memory."""
        same = (old.size, old.userspace_addr, old.read_only) == (new.size, new.userspace_addr, new.read_only)
        if old.guest_memfd is not None or new.guest_memfd is not None or not same:
            raise KvmError(errno.EINVAL, f"memory slot {old.slot} exists; delete it before it is changed")
        if old.gpa != new.gpa:
            self._zap_shared(old.gpa, old.end)
        self.memslots.put(new)
        if self.ept is None:
            return
        if new.dirty_bitmap is not None and old.dirty_bitmap is None and not len(new.dirty_bitmap):
            if self.ept.write_protect(new.gpa, new.end):
                self.flush_tlbs()
        elif old.dirty_bitmap is not None and new.dirty_bitmap is None:
            self._zap_shared(new.gpa, new.end)  # so that large pages come back (kvm_mmu_recover_huge_pages)

    def enable_manual_dirty_log(self, flags: int) -> None:
        """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2. EINVAL for a flag that does not exist, or one without the first."""
        manual, initially = dirty_log.DIRTY_LOG_MANUAL_PROTECT, dirty_log.DIRTY_LOG_INITIALLY_SET
        if flags & ~(manual | initially) or flags == initially:
            raise KvmError(errno.EINVAL, f"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with {flags:#x}")
        self.dirty_log_manual = flags

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: one bit a page of the slot, in words of 64. ENOENT for a slot without a log."""
        self._alive()
        return dirty_log.get_dirty_log(self, slot)

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """KVM_CLEAR_DIRTY_LOG: the pages of `bitmap` are clean, and watched again."""
        self._alive()
        dirty_log.clear_dirty_log(self, slot, first_page, num_pages, bitmap)

    def mark_page_dirty(self, gpa: int) -> None:
        """A page was written, by the guest or for it (mark_page_dirty)."""
        with self.mmu_lock:
            slot = self.memslots.find(gpa)
            if slot is not None and slot.dirty_bitmap is not None:
                slot.dirty_bitmap.mark((gpa - slot.gpa) // PAGE)

    def read_guest(self, gpa: int, length: int) -> bytes:
        """kvm_read_guest, of shared memory inside one slot. EFAULT where there is none."""
        return self.mm.read(self._hva(gpa), length)

    def write_guest(self, gpa: int, data: bytes) -> None:
        """kvm_write_guest: for the guest, so the page is dirty."""
        self.mm.write(self._hva(gpa), data)
        self.mark_page_dirty(gpa)

    def _hva(self, gpa: int) -> int:
        slot = self.memslots.find(gpa)
        if slot is None:
            raise KvmError(errno.EFAULT, f"there is no guest memory at {gpa:#x}")
        return slot.hva(gpa)

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES: make a range private or shared; what was mapped as the other goes."""
        self._alive()
        if not self.ops.has_private_memory or attributes & ~MEMORY_ATTRIBUTE_PRIVATE:
            raise KvmError(errno.EINVAL, f"memory attributes {attributes:#x} are not supported for this VM")
        if address % PAGE or size % PAGE or size <= 0 or address < 0 or address + size > self.memslots.max_gpa:
            raise KvmError(errno.EINVAL, f"memory attributes of {address:#x}+{size:#x}")
        with self.mmu():
            for start, end in self.private.set(address, address + size, attributes):
                if attributes & MEMORY_ATTRIBUTE_PRIVATE:
                    self._zap_shared(start, end)
                else:
                    self.ops.zap_private(start, end)
            self.stats["conversions"] += 1

    def migrate_pages(self, address: int, size: int, within: tuple[int, int] | None = None) -> int:
        """What the kernel does to a VM unasked (NUMA balancing, compaction): move its private pages of a range.

        `within` is the physical range [start, end) of the node they go to. Returns how many pages moved. EINVAL for a
        misaligned range or a VM without private memory, ENOMEM when the node is full.
        """
        self._alive()
        if address % PAGE or size % PAGE or size <= 0 or address < 0 or address + size > self.memslots.max_gpa:
            raise KvmError(errno.EINVAL, f"page migration of {address:#x}+{size:#x}")
        with self.mmu():
            return self.ops.migrate_private(address, address + size, within)

    def collapse(self, address: int) -> bool:
        """madvise(MADV_COLLAPSE) of the 2 MiB of private memory at `address`. EINVAL unless it is aligned.

        False when it cannot be one page: something is missing, not accepted, or there is no free 2 MiB.
        """
        self._alive()
        if address % PAGE_2M or not 0 <= address < self.memslots.max_gpa:
            raise KvmError(errno.EINVAL, f"collapse of 2 MiB at {address:#x}")
        with self.mmu():
            return self.ops.collapse_private(address)

    # --- what is chosen once
    def enable_cap(self, cap: int, *args: int) -> None:
        """KVM_ENABLE_CAP of the VM. EINVAL for a capability that cannot be enabled, or for arguments it does not take.

        KVM_CAP_SPLIT_IRQCHIP, X2APIC_API, EXIT_HYPERCALL, X86_USER_SPACE_MSR, MANUAL_DIRTY_LOG_PROTECT2.
        """
        self._alive()
        first = args[0] if args else 0
        if cap == KvmCap.SPLIT_IRQCHIP and first <= _IOAPIC_PINS:
            self.create_irqchip()
        elif cap == KvmCap.X2APIC_API and not first & ~_X2APIC_API_FLAGS:
            self.wide_apic_ids = self.wide_apic_ids or bool(first & 1)
        elif cap == KvmCap.EXIT_HYPERCALL and not first & ~HYPERCALL_EXITS:
            self.hypercall_exits = first
        elif cap == KvmCap.X86_USER_SPACE_MSR and not first & ~sum(MsrExitReason):
            self.user_space_msrs = first
        elif cap == KvmCap.MANUAL_DIRTY_LOG_PROTECT2:
            self.enable_manual_dirty_log(first)
        else:
            raise KvmError(errno.EINVAL, f"KVM_ENABLE_CAP of capability {cap} with {first:#x}")

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ: what a TD's TSC will count. EINVAL after the first vCPU, or where it cannot be scaled."""
        self._alive()
        now = self.host.platform.description.tsc_hz // 1000
        if self.vcpus or khz < 0 or (not self.ops.has_private_memory and khz not in (0, now)):
            raise KvmError(errno.EINVAL, f"a TSC of {khz} kHz for this VM")
        self.tsc_khz = khz or now

    def set_boot_cpu(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU's IA32_APIC_BASE has the BSP bit. EBUSY after the first vCPU."""
        self._alive()
        if self.vcpus:
            raise KvmError(errno.EBUSY, "KVM_SET_BOOT_CPU_ID after the first vCPU")
        if not 0 <= vcpu_id < self.ops.max_vcpus:
            raise KvmError(errno.EINVAL, f"vCPU id {vcpu_id}")
        self.boot_cpu = vcpu_id

    # --- interrupts
    def create_irqchip(self) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: vCPUs get local APICs, and HLT waits in the kernel. EEXIST once vCPUs exist."""
        self._alive()
        if self.vcpus or self.irqchip:
            raise KvmError(errno.EEXIST, "KVM_CAP_SPLIT_IRQCHIP twice, or after the first vCPU")
        self.irqchip = True

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI; False when no local APIC took it. EINVAL without local APICs."""
        if not self.irqchip:
            raise KvmError(errno.EINVAL, "KVM_SIGNAL_MSI without local APICs")
        return deliver_msi([vcpu.apic for vcpu in list(self.vcpus.values()) if vcpu.apic is not None], address, data)

    def set_gsi_routing(self, entries: Sequence[IrqRoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING. EINVAL without local APICs."""
        if not self.irqchip:
            raise KvmError(errno.EINVAL, "KVM_SET_GSI_ROUTING without local APICs")
        self.routing.set(entries, wide_apic_ids=self.wide_apic_ids)

    def set_irq(self, gsi: int, level: int) -> int:
        """KVM_IRQ_LINE: how many local APICs took what the GSI stands for; -1 if none. ENXIO without local APICs."""
        if not self.irqchip:
            raise KvmError(errno.ENXIO, "an interrupt line without local APICs")
        routes = self.routing.of(gsi)
        taken = [self.signal_msi(address, data) for address, data in routes] if level else []
        return sum(taken) if any(taken) else -1 if routes else 0

    def irqfd(self, eventfd: Eventfd, gsi: int, flags: int = 0) -> None:
        """KVM_IRQFD: raise a GSI whenever the eventfd is signalled. EAGAIN without local APICs."""
        if not self.irqchip:
            raise KvmError(errno.EAGAIN, "KVM_IRQFD without local APICs")
        self.irqfds.change(eventfd, gsi, flags)

    # --- vCPUs
    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU. EEXIST for an id in use, EINVAL for one out of range."""
        self._alive()
        if not 0 <= vcpu_id < self.ops.max_vcpus:
            raise KvmError(errno.EINVAL, f"vCPU id {vcpu_id}, must be 0 to {self.ops.max_vcpus - 1}")
        if vcpu_id in self.vcpus:
            raise KvmError(errno.EEXIST, f"vCPU {vcpu_id} exists")
        vcpu = Vcpu(self, vcpu_id)
        self.vcpus[vcpu_id] = vcpu
        return vcpu

    def memory_encrypt_op(self, command: int, argument: object = None) -> object:
        """KVM_MEMORY_ENCRYPT_OP: a KVM_TDX_* command of the VM."""
        self._alive()
        return self.ops.memory_encrypt_op(command, argument)

    def kick_all(self) -> None:
        """Make every vCPU that is in the guest leave it once (KVM_REQ_OUTSIDE_GUEST_MODE)."""
        for vcpu in list(self.vcpus.values()):
            vcpu.leave_guest()

    def mark_dead(self) -> None:
        """kvm_vm_dead: something is wrong beyond repair; every ioctl but the last close fails with EIO."""
        self.dead = True
        for vcpu in list(self.vcpus.values()):
            vcpu.kick()

    # --- the end
    def stop(self) -> None:
        """The machine goes down: no vCPU runs any more when this returns. The VM is dead."""
        self.mark_dead()
        for vcpu in list(self.vcpus.values()):
            vcpu.wait_until_out()

    def close(self) -> None:
        """The last reference is gone: vCPUs, memory, keys, in the order that the module demands. No thread runs it.

        KvmError when the module would not let it end: then the host keeps it, and ends it later (`Host.reap`).
        """
        with self.mmu_lock:  # a pass over all VMs is through with this one, or finds it closed
            if self.closed:
                return
            self.closed = True
        self.mm.unregister_notifier(self.mmu_notifier)
        self.irqfds.close()
        self.kvm.vms.remove(self)
        self.host.vms.remove(self)
        with self.mmu():
            for slot in list(self.memslots):
                if slot.guest_memfd is not None:
                    slot.guest_memfd.unbind(slot.guest_memfd_offset)
                self.memslots.remove(slot.slot)
        try:
            self.end()
        except KvmError:
            self.host.zombies.append(self)
            raise
        self.host.reap()

    def end(self) -> None:
        """What `close` does to the VM's pages and its KeyID; after a KvmError it can be called again."""
        for vcpu in self.vcpus.values():
            vcpu.leave_guest()
            vcpu.ops.flush()
        self.ops.release()
        for vcpu in self.vcpus.values():
            vcpu.ops.free()
            if vcpu.apic is not None:
                vcpu.apic.free()
        self.vcpus.clear()
        self.ops.destroy()
        with self.mmu():
            if self.ept is not None:
                self.ept.free()
                self.ept = None
        for file in self.files:
            file.close()
        self.files.clear()

    def _alive(self) -> None:
        if self.dead or self.closed:
            raise KvmError(errno.EIO, "the VM is dead")

    def _delete_slot(self, slot: Memslot) -> None:
        self._zap_shared(slot.gpa, slot.end)
        if slot.guest_memfd is not None:
            self.ops.zap_private(slot.gpa, slot.end)
            slot.guest_memfd.unbind(slot.guest_memfd_offset)
        self.memslots.remove(slot.slot)

    def _invalidate(self, slot: Memslot, offset: int, size: int) -> None:
        """A hole is punched in the file behind a slot."""
        gpa = slot.gpa + offset - slot.guest_memfd_offset
        with self.mmu():
            self.ops.zap_private(gpa, gpa + size)

    def drop_empty_tables(self) -> int:
        """The shrinker's part: give back page tables, the TD's S-EPT pages among them, that map nothing."""
        with self.mmu():
            freed = 0
            if self.ept is not None and self.ept.drop_empty_tables():
                before = self.host.memory.free_pages
                self.flush_tlbs()
                freed = self.host.memory.free_pages - before
            secure = self.ops.secure_ept
            if secure is not None:
                with self.host.cpus.run() as lp:
                    try:
                        freed += secure.drop_empty_tables(lp)
                    except KvmError:
                        self.stats["tables kept"] += 1  # the module refused: they serve on
            return freed

    def _zap_shared(self, start: int, end: int) -> None:
        if self.ept is not None and self.ept.unmap(start, end):
            self.flush_tlbs()

    def flush_tlbs(self) -> None:
        """INVEPT of the host's own EPT on every processor (kvm_flush_remote_tlbs)."""
        ept = self.ept
        if ept is None:
            return
        for vcpu in list(self.vcpus.values()):
            vcpu.tlb_flush_wanted = True
        self.kick_all()
        ept.free_replaced()
