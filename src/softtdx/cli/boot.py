"""`softtdx boot`: Linux in a TD, on the terminal."""

import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import click

from softtdx.cli.console import SIZE
from softtdx.cli.running import announced, name_option
from softtdx.cli.terminal import Terminal
from softtdx.errors import SoftTdxError
from softtdx.hw import PlatformDescription
from softtdx.vmm import End, MachineConfig, MachineResult
from softtdx.vmm.boot import boot_host, describe
from softtdx.vmm.files import read_file
from softtdx.vmm.linux.bzimage import BzImage, load_bzimage
from softtdx.vmm.linux.initramfs import build_initramfs
from softtdx.vmm.linux.machine import LinuxMachine, Stage
from softtdx.vmm.linux.report import boot_report
from softtdx.vmm.net import NetworkSpec
from softtdx.vmm.quoting import QuotingService
from softtdx.vmm.trace import write_trace

__all__ = ["COMMANDS"]

_MAX_INITRD = 256 << 20
_GIB, _HIGH_MEMORY = 1 << 30, 1 << 32
_HOST_MEMORY = 512 << 20  # PAMT, S-EPT, boot window and what else the host needs
_CONSOLE = "console=hvc0 panic=-1"


@click.command()
@click.option("--kernel", type=click.Path(), metavar="BZIMAGE", help="Kernel to boot; default: the one pulled.")
@click.option("--initrd", type=click.Path(), metavar="FILE", help="Its initrd; default: busybox and a shell.")
@click.option("--append", default="", metavar="ARGS", help="Added to the kernel command line.")
@click.option("--memory", type=SIZE, default="512M", show_default=True, help="Guest memory, as 512M or 1G.")
@click.option("--vcpus", type=int, default=1, show_default=True, help="Number of vCPUs.")
@click.option("--vm", is_flag=True, help="Boot an ordinary VM instead of a TD.")
@click.option("--debug-td", is_flag=True, help="Set ATTRIBUTES.DEBUG: the host may look into the TD.")
@click.option("--exec", "command", metavar="CMD", help="Run CMD in the guest instead of a shell; exit with its status.")
@click.option(
    "--add", multiple=True, type=click.Path(), metavar="FILE", help="Put FILE into the guest's /root (repeatable)."
)
@click.option("--drive", type=click.Path(), metavar="FILE", help="A disk for the guest (/dev/vda).")
@click.option(
    "--net", metavar="socket:PATH", help="A network card (eth0) on a Unix socket that other machines share, or passt."
)
@click.option("--platform", type=click.Path(), metavar="FILE.toml", help="The machine to simulate.")
@name_option
@click.option("--trace", type=click.Path(), metavar="FILE", help="Write every wall crossing as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the live console.")
def boot(
    kernel: str | None,
    initrd: str | None,
    append: str,
    memory: int,
    vcpus: int,
    vm: bool,
    debug_td: bool,
    command: str | None,
    add: tuple[str, ...],
    drive: str | None,
    net: str | None,
    platform: str | None,
    name: str | None,
    trace: str | None,
    as_json: bool,
) -> int:
    """Boot Linux in a trust domain, with its console on this terminal. Ctrl-] ends it, and so does poweroff.

    Without --kernel it is the newest Debian 6.12 cloud kernel, which `softtdx images pull` fetches through apt.
    """
    if initrd is not None and (command is not None or add):
        raise SoftTdxError("--exec and --add need the initramfs that softtdx makes: leave --initrd out")
    if vm and debug_td:
        raise SoftTdxError("an ordinary VM has no ATTRIBUTES: --vm goes without --debug-td")
    network = None if net is None else NetworkSpec.parse(net)
    agent = name is not None and not vm
    image, ramdisk = _images(kernel, initrd, command, add, agent=agent)
    description = describe(platform)
    if vcpus > 1:
        # Virtual TSCs count each processor's own instructions; a kernel wants those of all in step.
        description = replace(description, tsc_real=True)
    if platform is None:
        description = _with_room(description, memory)
    line = f"{_CONSOLE} {'quiet ' if command is not None else ''}{append}".strip()
    with ExitStack() as stack:
        host = boot_host(description, tdx=not vm)
        quoting = None if vm else QuotingService(host.platform)
        config = MachineConfig(memory=memory, vcpus=vcpus, vm=vm, debug_td=debug_td, agent=agent)
        terminal = stack.enter_context(Terminal(quiet=as_json, interactive=command is None and not as_json))
        stack.enter_context(write_trace(host.platform.events, trace))
        machine = stack.enter_context(LinuxMachine(host, config, console=terminal.output, quoting=quoting))
        stack.enter_context(announced(name, machine, Path(kernel).name if kernel is not None else "Linux"))
        machine.vm.idle_in_real_time = terminal.interactive
        if network is not None:
            stack.callback(machine.add_network(network.plug, network.mac).close)
        if drive is not None:
            machine.add_drive(stack.enter_context(_open_drive(drive)))
        machine.load_kernel(image, ramdisk, line)
        terminal.attach(machine)
        result = machine.run()
        report = boot_report(machine, result, host.platform.events, quoting)
    if as_json:
        click.echo(json.dumps(report))
    return _status(result, machine)


def _with_room(description: PlatformDescription, memory: int) -> PlatformDescription:
    """The machine with as much memory above 4 GiB as a guest of this size needs beside the host."""
    have = sum(size for _, size in description.cmrs)
    missing = memory + _HOST_MEMORY - have
    if missing <= 0:
        return description
    more = (_HIGH_MEMORY, -(-missing // _GIB) * _GIB)
    return replace(description, ram=(*description.ram, more), cmrs=(*description.cmrs, more))


def _images(
    kernel: str | None, initrd: str | None, command: str | None, add: tuple[str, ...], *, agent: bool
) -> tuple[BzImage, bytes]:
    from softtdx.vmm.images import cached_images, pull_images

    image = load_bzimage(kernel) if kernel is not None else None
    if image is not None and initrd is not None:
        return image, _read_initrd(initrd)
    images = cached_images() or pull_images()
    if image is None:
        image = load_bzimage(images.kernel)
    elif initrd is None:
        # Modules of another kernel would not load.
        images = replace(images, modules=())
    ramdisk = (
        _read_initrd(initrd)
        if initrd is not None
        else build_initramfs(images, command, {f"root/{Path(file).name}": Path(file) for file in add}, agent=agent)
    )
    return image, ramdisk


def _read_initrd(path: str) -> bytes:
    return read_file(path, "the initrd", _MAX_INITRD)


def _open_drive(path: str) -> BinaryIO:
    try:
        return Path(path).open("r+b")
    except OSError as error:
        raise SoftTdxError(f"cannot open the drive {path!r}: {error.strerror}") from error


def _status(result: MachineResult, machine: LinuxMachine) -> int:
    if result.end is End.EXIT:
        return result.status or 0
    if result.end is End.STOPPED:
        return machine.exit_status or 0
    sys.stdout.flush()
    click.echo(f"softtdx: {result.message or result.end.value}{_hint(result, machine)}", err=True)
    return 1


def _hint(result: MachineResult, machine: LinuxMachine) -> str:
    """The next step after a boot that failed."""
    if machine.stage is Stage.KERNEL and not machine.config.vm and b"Guest detected" not in result.console:
        return (
            "; the kernel ended before it found that it runs in a TD: it may have been built without "
            "CONFIG_INTEL_TDX_GUEST (Debian's 6.12 has it, 6.1 has not); --vm boots it as an ordinary VM, "
            "--append 'earlyprintk=ttyS0' shows its first messages"
        )
    if machine.stage < Stage.USERSPACE and "memory" in result.message.lower():
        return f"; the guest has {machine.config.memory >> 20} MiB, give --memory more"
    return ""


COMMANDS = [boot]
