"""The project's own guests under a host that lies in every reply: they end, or go on; nothing else may happen."""

import threading
from dataclasses import replace

import pytest
from lying_host import U64, Liar

from softtdx._silicon import PAYLOADS
from softtdx.abi.ghci import VmcallLeaf, VmcallStatus
from softtdx.hw import preset
from softtdx.vmm import MachineConfig, parse_payload
from softtdx.vmm.boot import boot_host
from softtdx.vmm.images import cached_images
from softtdx.vmm.linux.bzimage import load_bzimage
from softtdx.vmm.linux.initramfs import build_initramfs
from softtdx.vmm.linux.machine import LinuxMachine
from softtdx.vmm.machine import End, Machine
from softtdx.vmm.quoting import QuotingService


@pytest.fixture(scope="module")
def host():
    return boot_host(replace(preset("spr"), lps=1))


def run_demo(host, make_liar):
    with Machine(host, MachineConfig(memory=4 << 20), quoting=QuotingService(host.platform)) as machine:
        machine.load(parse_payload(PAYLOADS["demo"], "demo"))
        liar = make_liar(machine)
        return machine.run(), liar


@pytest.mark.parametrize("seed", range(6))
def test_the_demo_under_a_lying_host_ends_and_leaves_the_machine_whole(host, seed):
    free = host.memory.free_pages
    result, liar = run_demo(host, lambda machine: Liar(machine, seed))
    assert liar.lies
    assert result.ok or result.message
    assert host.platform.seam.module is not None
    assert host.memory.free_pages == free


def test_after_all_lies_an_honest_host_runs_it_as_ever(host):
    result, _ = run_demo(host, lambda machine: None)
    assert result.ok, result.message


class Misleading(Liar):
    """Every MapGPA is answered so: do the rest from here."""

    def __init__(self, machine, elsewhere):
        super().__init__(machine, 0, rate=1, leaves=(VmcallLeaf.MAP_GPA,))
        self.elsewhere = elsewhere

    def lie(self, regs):
        regs.r10, regs.r11 = VmcallStatus.RETRY, self.elsewhere


@pytest.mark.parametrize("elsewhere", [0, 1 << 47, U64, (1 << 47) | 0x123])
def test_the_demo_does_not_follow_a_mapgpa_that_leads_elsewhere(host, elsewhere):
    result, liar = run_demo(host, lambda machine: Misleading(machine, elsewhere))
    assert liar.lies == 1
    assert result.end is End.EXIT
    assert result.status != 0
    assert b"MapGPA" in result.console


# --- Linux
LEAVES = {
    "cpuid": (VmcallLeaf.CPUID,),
    "msr": (VmcallLeaf.RDMSR, VmcallLeaf.WRMSR),
    "port": (VmcallLeaf.IO,),
    "mmio": (VmcallLeaf.REQUEST_MMIO,),
    "services": (VmcallLeaf.MAP_GPA, VmcallLeaf.GET_QUOTE, VmcallLeaf.GET_TDVMCALL_INFO),
    "all": (),
}
BOOT = 400_000  # entries: an honest boot takes a fraction of that
PATIENCE = 60.0  # seconds until a kernel that waits for good is stopped


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("rate", [1.0, 0.01])
def test_linux_under_a_lying_host_ends_and_leaves_the_machine_whole(kind, rate):
    """Debian's kernel may panic, wait for good or go on: what it asks of the host, the host may answer as it likes."""
    images = cached_images()
    if images is None:
        pytest.skip("no kernel to boot: `softtdx images pull` has not been run here")
    host = boot_host(preset("spr"))
    free = host.memory.free_pages
    kernel = load_bzimage(images.kernel)
    initrd = build_initramfs(images, "echo here", None)
    with LinuxMachine(host, MachineConfig(memory=512 << 20), quoting=QuotingService(host.platform)) as machine:
        machine.load_kernel(kernel, initrd, "console=hvc0 panic=-1 quiet")
        measured = machine.mrtd()
        liar = Liar(machine, f"{kind} {rate}", rate=rate, leaves=LEAVES[kind], entries=BOOT)
        patience = threading.Timer(PATIENCE, machine.stop)
        patience.start()
        result = machine.run()
        patience.cancel()
        assert machine.mrtd() == measured
    assert result.ok or result.message
    assert liar.lies or kind == "services" or rate < 1
    assert host.platform.seam.module is not None
    assert host.memory.free_pages == free
