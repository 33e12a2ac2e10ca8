"""The figures of memory encryption are made of runs that really happened; how fast they were is not judged."""

import pytest

from softtdx._silicon import Memory
from softtdx.vmm import bench_mktme
from softtdx.vmm.bench_mktme import bench_forced, bench_hot_path
from softtdx.vmm.errors import MachineError


@pytest.mark.parametrize("vm", [True, False])
def test_the_hot_path_is_run_with_and_without_protection(vm, monkeypatch):
    machines = []
    boot = bench_mktme.boot_host

    def noted(description, *, tdx):
        machines.append((description.tme, description.integrity, tdx))
        return boot(description, tdx=tdx)

    monkeypatch.setattr(bench_mktme, "boot_host", noted)
    figures = bench_hot_path(vm=vm, count=1000, rounds=1)
    assert machines == [(True, "crypto", not vm), (not vm, "none", not vm)]
    assert figures["ratio"] > 0


def test_forced_encryption_has_three_figures():
    figures = bench_forced(mib=1)
    assert list(figures) == ["dump", "force", "verify"]
    assert all(value > 0 for value in figures.values())


class Transparent:
    """Memory without encryption: a probe sees what was written."""

    def __init__(self, ranges, **options):
        self.memory = Memory(ranges, **options)
        self.set_key, self.write, self.read = self.memory.set_key, self.memory.write, self.memory.read

    def raw_read(self, pa, size):
        return self.memory.read(33 << 46 | pa, size, seam=True)

    def raw_write(self, pa, data):
        self.memory.write(33 << 46 | pa, data, seam=True)


def test_memory_that_is_not_encrypted_gives_no_figure(monkeypatch):
    monkeypatch.setattr(bench_mktme, "Memory", Transparent)
    with pytest.raises(MachineError, match="reads differently"):
        bench_forced(mib=1)
