"""The benchmark of single leaves has a figure for each and leaves nothing behind; how large they are is not tested."""

from softtdx.kvm.bench_leaves import bench_leaves
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
