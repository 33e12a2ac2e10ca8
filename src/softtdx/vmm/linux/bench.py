"""How long Debian's kernel takes to userspace and power-off: in a TD, in a VM, and for comparison under QEMU's TCG."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

from softtdx.errors import SoftTdxError
from softtdx.vmm.boot import boot_host
from softtdx.vmm.images import Images, cached_images, pull_images
from softtdx.vmm.linux.bzimage import load_bzimage
from softtdx.vmm.linux.initramfs import USERSPACE, build_initramfs
from softtdx.vmm.linux.machine import LinuxMachine, Stage
from softtdx.vmm.linux.profile import profile_boot
from softtdx.vmm.machine import MachineConfig
from softtdx.vmm.quoting import QuotingService

__all__ = ["bench_boot", "bench_profile", "bench_qemu"]

_MEMORY = 512 << 20
_COMMAND_LINE = "console=hvc0 panic=-1 quiet"
_QEMU = "qemu-system-x86_64"
_TIMEOUT = 300


def _images() -> Images:
    return cached_images() or pull_images()


def bench_boot(*, vm: bool) -> dict[str, float]:
    """Boot, run `true` and power off. Seconds from the first instruction to the last, without building the machine."""
    images = _images()
    host = boot_host(tdx=not vm)
    quoting = None if vm else QuotingService(host.platform)
    with LinuxMachine(host, MachineConfig(memory=_MEMORY, vm=vm), quoting=quoting) as machine:
        machine.load_kernel(load_bzimage(images.kernel), build_initramfs(images, "true"), _COMMAND_LINE)
        result = machine.run()
        if machine.stage is not Stage.USERSPACE:
            raise SoftTdxError(f"the boot ended before userspace: {result.message or result.end.value}")
    return {"s": result.wall_s, "mips": result.instructions / result.wall_s / 1e6, "giga": result.instructions / 1e9}


def bench_profile() -> dict[str, int]:
    """Instructions of a TD's boot to userspace by place: firmware, decompressor, functions of the kernel."""
    return profile_boot(boot_host(), _images(), _MEMORY, _COMMAND_LINE, vm=False)


def bench_qemu() -> dict[str, float]:
    """The same kernel, initramfs and command line as a plain VM of QEMU with -accel tcg, on the same virtio consoles.

    SoftTdxError when QEMU is not there.
    """
    if shutil.which(_QEMU) is None:
        raise SoftTdxError(f"{_QEMU} is not there to compare with; install it (Debian: qemu-system-x86)")
    images = _images()
    with tempfile.TemporaryDirectory() as name:
        initrd, status = Path(name) / "initrd", Path(name) / "status"
        initrd.write_bytes(build_initramfs(images, "true"))
        command = [_QEMU, "-accel", "tcg", "-m", str(_MEMORY >> 20), "-display", "none", "-no-reboot", "-nodefaults"]
        command += ["-kernel", str(images.kernel), "-initrd", str(initrd), "-append", _COMMAND_LINE]
        command += ["-device", "virtio-serial-pci", "-chardev", "stdio,id=hvc0", "-device", "virtconsole,chardev=hvc0"]
        command += ["-chardev", f"file,id=hvc1,path={status}", "-device", "virtconsole,chardev=hvc1"]
        start = perf_counter()
        try:
            done = subprocess.run(command, check=False, capture_output=True, timeout=_TIMEOUT, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise SoftTdxError(f"{_QEMU} did not finish in {_TIMEOUT} s") from error
        seconds = perf_counter() - start
        if not status.exists() or USERSPACE not in status.read_bytes():
            problem = done.stderr.decode("utf-8", "replace").strip()[:200]
            raise SoftTdxError(f"{_QEMU} did not boot the kernel to userspace: {problem}")
    return {"s": seconds}
