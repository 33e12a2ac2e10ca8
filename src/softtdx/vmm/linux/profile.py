"""Where the instructions of a boot go: samples of RIP, with the names of the guest's own /proc/kallsyms."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from softtdx.errors import SoftTdxError
from softtdx.kvm import Host
from softtdx.vmm.images import Images
from softtdx.vmm.linux.bzimage import load_bzimage
from softtdx.vmm.linux.initramfs import build_initramfs
from softtdx.vmm.linux.layout import FIRMWARE_BASE
from softtdx.vmm.linux.machine import LinuxMachine, Stage
from softtdx.vmm.machine import MachineConfig
from softtdx.vmm.quoting import QuotingService

__all__ = ["place_of_samples", "profile_boot"]

_PERIOD: Final = 4096
_TOP_OF_LOW: Final = 1 << 32
_KERNEL_HALF: Final = 1 << 63
_SYMBOLS_SIZE: Final = 32 << 20
_SYMBOLS_COMMAND: Final = "cat /proc/kallsyms > /dev/vda"


class _ProfiledMachine(LinuxMachine):
    """A machine whose processors are sampled until init runs."""

    samples: list[tuple[int, int]] | None = None

    def _status_channel(self, data: bytes) -> None:
        super()._status_channel(data)
        if self.stage is Stage.USERSPACE and self.samples is None:
            # The one vCPU waits for this exit, so its processor has time to answer.
            self.samples = [sample for lp in self.host.platform.lps for sample in lp.core.samples()]


def profile_boot(host: Host, images: Images, memory: int, command_line: str, *, vm: bool) -> dict[str, int]:
    """Boot to userspace and tell the instructions by place, the most first (see `place_of_samples`)."""
    cores = [lp.core for lp in host.platform.lps]
    quoting = None if vm else QuotingService(host.platform)
    for core in cores:
        core.configure(sample=_PERIOD)
    try:
        with TemporaryDirectory() as name, (Path(name) / "symbols").open("w+b") as drive:
            drive.truncate(_SYMBOLS_SIZE)
            with _ProfiledMachine(host, MachineConfig(memory=memory, vm=vm), quoting=quoting) as machine:
                machine.add_drive(drive)
                initramfs = build_initramfs(images, _SYMBOLS_COMMAND)
                machine.load_kernel(load_bzimage(images.kernel), initramfs, command_line)
                result = machine.run()
                if machine.samples is None or machine.exit_status != 0:
                    raise SoftTdxError(f"the boot to profile did not end well: {result.message or result.end.value}")
            drive.seek(0)
            symbols = drive.read().split(b"\0", 1)[0]
    finally:
        for core in cores:
            core.configure(sample=0)
    return place_of_samples(machine.samples, symbols)


def place_of_samples(samples: Iterable[tuple[int, int]], kallsyms: bytes) -> dict[str, int]:
    """Instructions by place: a function of the kernel, "firmware", or "decompressor" for other low addresses.

    `kallsyms`: the text of /proc/kallsyms. Lines that are none are passed over, addresses below the first function and
    those of a kernel that hides them (all zero) count as "kernel".
    """
    functions = sorted(
        (int(fields[0], 16), fields[2].decode("ascii", "replace"))
        for line in kallsyms.splitlines()
        if len(fields := line.split()) >= 3 and fields[1] in b"tTwW" and _is_address(fields[0])
    )
    starts = [start for start, _ in functions]
    places: Counter[str] = Counter()
    for rip, count in samples:
        if rip < _KERNEL_HALF:
            places["firmware" if FIRMWARE_BASE <= rip < _TOP_OF_LOW else "decompressor"] += count
            continue
        index = bisect_right(starts, rip) - 1
        places[functions[index][1] if index >= 0 and starts[index] else "kernel"] += count
    return dict(places.most_common())


def _is_address(field: bytes) -> bool:
    return 0 < len(field) <= 16 and all(digit in b"0123456789abcdefABCDEF" for digit in field)
