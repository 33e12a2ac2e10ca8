"""Measurements of the host's side: what a SEAMCALL costs, what a page costs, what building a TD costs.

Each function returns a dictionary with its figures; `softtdx bench` prints them.
"""

from time import perf_counter, process_time

from softtdx.abi.kvm import KVM_X86_TDX_VM, MEMORY_ATTRIBUTE_PRIVATE, MemorySlotFlag, TdxCommand
from softtdx.abi.leaves import SeamcallLeaf, rax_for
from softtdx.abi.structs import Attributes
from softtdx.hw import Registers
from softtdx.kvm.host import Host
from softtdx.kvm.kvm import Kvm
from softtdx.kvm.memory import PAGE
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.uapi import TdxInitMemRegion, TdxInitVm
from softtdx.kvm.vm import Vm

__all__ = ["bench_page_aug", "bench_seamcall", "bench_td_build", "small_td"]

_MIB = 1 << 20


def bench_seamcall(host: Host, count: int = 5000) -> dict[str, float]:
    """An empty leaf: TDH.MNG.KEY.RECLAIMID, which does nothing. Microseconds a call."""
    with host.cpus.run() as lp:
        rax = rax_for(SeamcallLeaf.MNG_KEY_RECLAIMID)
        start = perf_counter()
        for _ in range(count):
            lp.seamcall(Registers(rax=rax))
        seconds = perf_counter() - start
    return {"calls": count, "us_per_call": seconds / count * 1e6}


def bench_page_aug(host: Host, pages: int = 2048) -> dict[str, float]:
    """TDH.MEM.PAGE.AUG of 4 KiB pages into a TD, with the S-EPT pages that they need. Microseconds a page."""
    kvm, vm = small_td(host, pages * PAGE)
    try:
        ops = vm.ops
        assert isinstance(ops, TdxVm)
        before = host.platform.events.counts["seamcall"]
        targets = [host.memory.alloc() for _ in range(pages)]
        with host.cpus.run() as lp, vm.mmu_lock:
            start = perf_counter()
            for i, page in enumerate(targets):
                ops.secure.aug(lp, i * PAGE, page, 0)
            seconds = perf_counter() - start
        calls = host.platform.events.counts["seamcall"] - before
    finally:
        vm.close()
        kvm.mm.close()
    for page in targets:
        host.memory.free(page)
    return {"pages": pages, "us_per_page": seconds / pages * 1e6, "seamcalls_per_page": calls / pages}


def bench_td_build(host: Host, mib: int = 2) -> dict[str, float]:
    """A TD from nothing to FINALIZE with `mib` MiB of measured memory, and its teardown. Seconds."""
    start = perf_counter()
    kvm, vm = small_td(host, mib * _MIB)
    vcpu = vm.create_vcpu(0)
    vcpu.memory_encrypt_op(TdxCommand.INIT_VCPU, 0)
    source = kvm.mm.mmap(mib * _MIB)
    kvm.mm.write(source, bytes(range(256)) * (mib * _MIB // 256))
    added, busy = perf_counter(), process_time()
    vcpu.memory_encrypt_op(TdxCommand.INIT_MEM_REGION, TdxInitMemRegion(source, 0, mib * _MIB // PAGE))
    vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
    built, busy = perf_counter(), process_time() - busy
    vm.close()
    kvm.mm.close()
    ended = perf_counter()
    return {
        "mib": mib,
        "build_s": built - start,
        "build_s_per_mib": (built - added) / mib,
        "processor_s_per_mib": busy / mib,
        "mib_per_s": mib / (built - added),
        "teardown_s": ended - built,
    }


def small_td(host: Host, size: int) -> tuple[Kvm, Vm]:
    """A TD with one slot of private memory at GPA 0, initialised."""
    kvm = Kvm(host)
    vm = kvm.create_vm(KVM_X86_TDX_VM)
    vm.memory_encrypt_op(TdxCommand.INIT_VM, TdxInitVm(attributes=Attributes.SEPT_VE_DISABLE))
    file = vm.create_guest_memfd(size)
    vm.set_user_memory_region2(0, 0, size, kvm.mm.mmap(size), MemorySlotFlag.GUEST_MEMFD, file)
    vm.set_memory_attributes(0, size, MEMORY_ATTRIBUTE_PRIVATE)
    return kvm, vm
