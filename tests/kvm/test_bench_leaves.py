"""The benchmark of single leaves has a figure for each and leaves nothing behind; how large they are is not tested."""

from softtdx.kvm.bench_leaves import bench_leaves
from softtdx.kvm.bench_memory import bench_conversion, bench_faults, bench_memory
from softtdx.vmm.boot import boot_host

HOT = {
    "TDH.MEM.SEPT.ADD", "TDH.MEM.PAGE.ADD", "TDH.MR.EXTEND", "TDH.MEM.PAGE.AUG", "TDH.MEM.PAGE.AUG of 2 MiB",
    "TDG.MEM.PAGE.ACCEPT", "TDH.MEM.RANGE.BLOCK", "TDH.MEM.RANGE.UNBLOCK", "TDH.MEM.TRACK", "TDH.MEM.PAGE.REMOVE",
    "TDH.MEM.SEPT.REMOVE", "TDH.MEM.SEPT.RD",
}  # fmt: skip


def test_every_hot_leaf_is_measured_and_all_memory_comes_back() -> None:
    host = boot_host()
    free = host.memory.free_pages
    figures = bench_leaves(host, pages=4)
    assert figures.keys() >= HOT
    assert all(microseconds > 0 for microseconds in figures.values())
    assert host.memory.free_pages == free
    assert set(host.memory.tdx_pages()) == {"PAMT"}


def test_the_mirror_saves_the_seamcalls_that_reading_the_sept_would_take() -> None:
    host = boot_host()
    free = host.memory.free_pages
    faults = bench_faults(host, pages=512)
    assert faults["with_mirror"] <= 1.05  # PAGE.AUG, and a few SEPT.ADD
    assert faults["without_mirror"] >= faults["with_mirror"] + 3
    small, large = bench_memory(host, 4 << 20, huge=False), bench_memory(host, 64 << 20, huge=True)
    assert small["seamcalls_per_page"] <= 1.05
    assert large["seamcalls_per_page"] <= 1.2  # of 32 pages; three tables above them
    assert bench_conversion(host, rounds=2)["round_trip_ms"] > 0
    assert host.memory.free_pages == free
