"""What a TD's memory costs its host: mapping, converting, tearing down; in SEAMCALLs, seconds and pages."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from softtdx.abi import sept
from softtdx.abi.kvm import MEMORY_ATTRIBUTE_PRIVATE, TdxCommand
from softtdx.kvm import seamcalls as sc
from softtdx.kvm.bench import small_td
from softtdx.kvm.host import Host
from softtdx.kvm.memory import PAGE, PAGE_2M
from softtdx.kvm.mmu import map_private
from softtdx.kvm.tdx import TdxVm
from softtdx.kvm.vcpu import Vcpu
from softtdx.kvm.vm import Vm

__all__ = ["bench_conversion", "bench_faults", "bench_memory"]

_MIB = 1 << 20
_GIB = 1 << 30


@contextmanager
def _td(host: Host, size: int) -> Iterator[tuple[Vm, Vcpu, TdxVm]]:
    """A TD that could run, with `size` bytes of private memory none of which is mapped."""
    kvm, vm = small_td(host, size)
    try:
        vcpu = vm.create_vcpu(0)
        vcpu.memory_encrypt_op(TdxCommand.INIT_VCPU, 0)
        vm.memory_encrypt_op(TdxCommand.FINALIZE_VM)
        assert isinstance(vm.ops, TdxVm)
        yield vm, vcpu, vm.ops
    finally:
        vm.close()
        kvm.mm.close()


def bench_faults(host: Host, pages: int = 2048) -> dict[str, float]:
    """SEAMCALLs for each 4 KiB page that is faulted in: with the mirror, and when the S-EPT is read by SEAMCALL.

    Without a mirror the host has to find, level by level from the root, what the S-EPT has for the GPA.
    """
    figures = {}
    counts = host.platform.events.counts
    for name, mirror in (("with_mirror", True), ("without_mirror", False)):
        with _td(host, pages * PAGE) as (vm, _, td), vm.mmu():
            slot = vm.memslots.find(0)
            assert slot is not None
            tdr, before = td.require_tdr(), counts["seamcall"]
            with host.cpus.run() as lp:
                for gpa in range(0, pages * PAGE, PAGE):
                    if not mirror:
                        for level in range(td.levels - 1, -1, -1):
                            if sc.mem_sept_rd(lp, tdr, gpa & -sept.level_size(level), level).rax:
                                break  # the walk ends at an entry that has no table yet
                    map_private(vm, lp, td.secure, slot, gpa, 0)
            figures[name] = (counts["seamcall"] - before) / pages
    return figures


def bench_memory(host: Host, size: int, *, huge: bool) -> dict[str, float]:
    """Map `size` bytes of a TD with small or `huge` pages, and tear it down: seconds per GiB, SEAMCALLs per page.

    `overhead_mib_per_gib` is what TDX takes of host memory besides: the PAMT's share, S-EPT, TDR, TDCS, TDVPS.
    """
    counts = host.platform.events.counts
    used = host.memory.tdx_pages()
    before = counts["seamcall"]
    gib = size / _GIB
    with _td(host, size) as (vm, vcpu, td):
        control = counts["seamcall"]
        start = perf_counter()
        if huge:
            vcpu.pre_fault_memory(0, size)
        else:
            slot = vm.memslots.find(0)
            assert slot is not None
            with vm.mmu(), host.cpus.run() as lp:
                for gpa in range(0, size, PAGE):
                    map_private(vm, lp, td.secure, slot, gpa, 0)
        mapped, calls = perf_counter(), counts["seamcall"] - control
        pages = td.secure.huge_pages or td.secure.mapped_pages
        control_pages = host.memory.tdx_pages() - used
        own = sum(n for use, n in control_pages.items() if use != "TD memory")
        ending = perf_counter()
    ended = perf_counter()
    pamt = used["PAMT"] / host.memory.total_pages * size / PAGE
    return {
        "map_s_per_gib": (mapped - start) / gib,
        "teardown_s_per_gib": (ended - ending) / gib,
        "seamcalls_per_page": calls / pages,
        "seamcalls": counts["seamcall"] - before,
        "overhead_mib_per_gib": (own + pamt) * PAGE / _MIB / gib,
    }


def bench_conversion(host: Host, rounds: int = 50) -> dict[str, float]:
    """Private to shared to private of one 2 MiB range: what the range was mapped to goes, and is mapped again."""
    with _td(host, 2 * PAGE_2M) as (vm, vcpu, _):
        file = vm.files[0]
        vcpu.pre_fault_memory(0, PAGE_2M)
        start = perf_counter()
        for _ in range(rounds):
            vm.set_memory_attributes(0, PAGE_2M, 0)
            file.punch_hole(0, PAGE_2M)
            vm.set_memory_attributes(0, PAGE_2M, MEMORY_ATTRIBUTE_PRIVATE)
            vcpu.pre_fault_memory(0, PAGE_2M)
        seconds = perf_counter() - start
    return {"round_trip_ms": seconds / rounds * 1e3, "conversions_per_s": 2 * rounds / seconds}
