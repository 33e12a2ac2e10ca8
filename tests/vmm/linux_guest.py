"""Boots of Debian's kernel for tests: fetched once, skipped where apt cannot fetch it."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest

from softtdx.errors import SoftTdxError
from softtdx.hw import preset
from softtdx.vmm import MachineConfig, MachineResult
from softtdx.vmm.boot import boot_host
from softtdx.vmm.images import cached_images, pull_images
from softtdx.vmm.linux.bzimage import load_bzimage
from softtdx.vmm.linux.initramfs import build_initramfs
from softtdx.vmm.linux.machine import LinuxMachine
from softtdx.vmm.linux.report import boot_report
from softtdx.vmm.quoting import QuotingService

MAC = bytes.fromhex("525400000001")


def debian_images():
    """The cached images, or those that apt gives. Without network: skip, but fail in CI."""
    images = cached_images()
    if images is not None:
        return images
    try:
        return pull_images()
    except SoftTdxError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"no kernel to boot: {error}")


@dataclass
class Boot:
    """A boot that has ended."""

    machine: LinuxMachine
    result: MachineResult
    report: dict
    quoting: QuotingService | None
    initrd: bytes
    command_line: str
    kernel: bytes
    outside: bytes = b""
    frames: list[bytes] | None = None

    @property
    def text(self):
        return self.report["console"].replace("\r\n", "\n")


def boot(
    command, *, vm=False, vcpus=1, files=None, append="quiet", memory=512 << 20, meanwhile=None, network=None, mac=MAC
):
    """Boot Debian's kernel, run `command`, tear the machine down and check that nothing is left.

    `meanwhile(machine)` runs beside it, outside; the TD then has an agent. `network` is what its eth0 is plugged into.
    """
    images = debian_images()
    description = preset("spr")
    if vcpus > 1:
        description = replace(description, tsc_real=True)
    host = boot_host(description, tdx=not vm)
    free = host.memory.free_pages
    quoting = None if vm else QuotingService(host.platform)
    kernel = load_bzimage(images.kernel)
    agent = meanwhile is not None
    initrd = build_initramfs(images, command, files, agent=agent)
    line = f"console=hvc0 panic=-1 {append}".strip()
    config = MachineConfig(memory=memory, vm=vm, vcpus=vcpus, agent=agent)
    with LinuxMachine(host, config, quoting=quoting) as machine, ThreadPoolExecutor(1) as pool:
        if network is not None:
            machine.add_network(network.plug, mac)
        machine.load_kernel(kernel, initrd, line)
        beside = pool.submit(meanwhile, machine) if agent else None
        result = machine.run()
        if beside is not None:
            beside.result(60)
        report = boot_report(machine, result, host.platform.events, quoting)
    assert host.memory.free_pages == free
    return Boot(machine, result, report, quoting, initrd, line, kernel.data)
