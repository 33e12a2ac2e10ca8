"""Processors and memory that come and go while the host runs (kernel/cpu.c, mm/memory_hotplug.c), and what TDX says.

Processors: the module must be initialised on every processor of the machine before TDH.SYS.CONFIG (TDH.SYS.LP.INIT),
and takes no further one later. So one that was there then may be taken offline and brought back; one that was offline
when TDX was enabled cannot exist, since enabling fails. While a TD has a KeyID every package keeps a processor online,
because ending the TD needs one of each (arch/x86/kvm/vmx/tdx.c, tdx_offline_cpu).

Memory: any block may go offline if what is in it can be moved, private pages by RELOCATE. TDMRs are fixed once the
module is configured, so memory that is in none may not come online (arch/x86/virt/vmx/tdx, tdx_memory_notifier).
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from softtdx.kvm.errors import KvmError
from softtdx.kvm.memory import PAGE

if TYPE_CHECKING:
    from softtdx.kvm.host import Host
    from softtdx.kvm.vm import Vm

__all__ = ["MEMORY_BLOCK", "Hotplug"]

MEMORY_BLOCK = 128 << 20  # /sys/devices/system/memory/block_size_bytes
_PASSES = 5  # over a block: what moves may have gone where it has to move again


class Hotplug:
    """What /sys/devices/system/cpu and /sys/devices/system/memory offer."""

    def __init__(self, host: "Host") -> None:
        """Everything that the platform has is online."""
        self._host = host
        self._offline: set[int] = set()
        self._lock = Lock()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One change at a time (lock_device_hotplug). EBUSY on a processor: the change may have to wait for it."""
        here = self._host.cpus.here
        if here is not None:
            raise KvmError(errno.EBUSY, f"the caller runs on processor {here}")
        with self._lock:
            yield

    # --- processors
    def cpu_down(self, index: int) -> None:
        """Take a processor offline: its threads move, vCPUs that it knows are flushed from it.

        EINVAL for one that does not exist or is offline; EBUSY for the last one of the machine, the last one of a
        package while a TD has a KeyID, or a caller that runs on a processor.
        """
        with self._changing():
            host = self._host
            cpus = host.cpus
            if not 0 <= index < len(cpus.lps) or not cpus.is_online(index):
                raise KvmError(errno.EINVAL, f"processor {index} is not online")
            others = [lp for lp in cpus.lps if lp.index != index and cpus.is_online(lp.index)]
            tdx = host.tdx
            if not others:
                raise KvmError(errno.EBUSY, f"processor {index} is the last one online")
            if tdx is not None and tdx.keyids_in_use and all(lp.package != cpus.lps[index].package for lp in others):
                raise KvmError(errno.EBUSY, f"processor {index} is the last of its package, and TDs need one there")
            cpus.drain(index)
            try:
                for vm in [*host.vms, *host.zombies]:
                    for vcpu in list(vm.vcpus.values()):
                        with vcpu.association:
                            if vcpu.ops.loaded_on == index:
                                vcpu.ops.flush()
            except KvmError:
                cpus.set_online(index)
                raise
            cpus.set_offline(index)

    def cpu_up(self, index: int) -> None:
        """Bring a processor online, and make it able to make SEAMCALLs (tdx_cpu_enable).

        EINVAL for one that does not exist or is online; EIO when the module does not take it: it stays offline.
        """
        with self._changing():
            cpus = self._host.cpus
            if not 0 <= index < len(cpus.lps) or cpus.is_online(index):
                raise KvmError(errno.EINVAL, f"processor {index} is not offline")
            cpus.set_online(index)
            if self._host.tdx is not None:
                try:
                    self._host.tdx.cpu_enable(index)
                except KvmError:
                    cpus.set_offline(index)
                    raise

    # --- memory
    def offline_memory(self, start: int) -> None:
        """Take the block at `start` offline. EINVAL unless it is a whole block of memory; EBUSY when a page stays.

        User memory and private memory move away; what the host's kernel or the module has there (page tables, PAMTs,
        TDRs and other control pages) cannot, nor can hugetlb pages for which there is no other.
        """
        with self._changing():
            memory, end = self._host.memory, start + MEMORY_BLOCK
            inside = any(first <= start and end <= last for first, last in memory.ranges)
            if start % MEMORY_BLOCK or not inside or start in self._offline:
                raise KvmError(errno.EINVAL, f"{start:#x} is not a memory block that is online")
            memory.isolate(start, end)
            for _ in range(_PASSES):
                if not memory.in_use(start, end):
                    break
                self._empty(start, end)
            stay = memory.in_use(start, end)
            if stay:
                memory.unisolate(start, end)
                raise KvmError(errno.EBUSY, f"{len(stay)} pages of memory block {start:#x} cannot be moved")
            memory.total_pages -= MEMORY_BLOCK // PAGE
            self._offline.add(start)

    def online_memory(self, start: int) -> None:
        """Bring a block back. EINVAL unless it is offline."""
        with self._changing():
            if start not in self._offline:
                raise KvmError(errno.EINVAL, f"memory block {start:#x} is not offline")
            self._offline.remove(start)
            self._host.memory.unisolate(start, start + MEMORY_BLOCK)
            self._host.memory.total_pages += MEMORY_BLOCK // PAGE

    def add_memory(self, start: int, size: int) -> None:
        """New memory goes online. EINVAL unless it is whole blocks of the platform's DRAM that are not used yet.

        EPERM once TDX is enabled: it would be memory that no TD can have, and any page may go to a TD.
        """
        with self._changing():
            memory, end = self._host.memory, start + size
            dram = any(base <= start and end <= base + length for base, length in self._host.platform.description.ram)
            used = any(first < end and start < last for first, last in memory.ranges)
            if start % MEMORY_BLOCK or size % MEMORY_BLOCK or size <= 0 or not dram or used:
                raise KvmError(errno.EINVAL, f"memory {start:#x}+{size:#x} is not free DRAM in whole blocks")
            if self._host.tdx is not None:
                raise KvmError(errno.EPERM, f"memory {start:#x}+{size:#x} is in no TDMR, and TDX is enabled")
            memory.add_range(start, end)

    def _empty(self, start: int, end: int) -> None:
        for mm in {id(vm.mm): vm.mm for vm in list(self._host.vms)}.values():
            mm.migrate_physical(start, end)
        for vm in list(self._host.vms):
            try:
                self._empty_of_private(vm, start, end)
            except KvmError:
                continue  # what stays is found by the caller

    def _empty_of_private(self, vm: "Vm", start: int, end: int) -> None:
        with vm.mmu():
            secure = vm.ops.secure_ept
            if secure is not None and not vm.dead:
                found = [(gpa, leaf) for gpa, leaf in secure.mappings() if start <= leaf.hpa < end]
                for gpa, leaf in found:
                    vm.migrate_pages(gpa, leaf.size)
            for file in vm.files:
                for index in file.unmapped_in(start, end):
                    file.drop_page(index)
