"""The initramfs of `softtdx boot`: busybox, the TDX guest modules and an init that runs a shell or one command.

/dev/hvc0 is the console. /dev/hvc1 goes to the VMM: `userspace` when init runs, then `status N` of the command. In a TD
init takes a quote at the end, so that the VMM can tell the RTMRs that the guest attests.
"""

import shlex
from pathlib import Path

from softtdx.vmm.errors import PayloadError
from softtdx.vmm.images import Images
from softtdx.vmm.linux.cpio import Archive

__all__ = ["STATUS_PREFIX", "USERSPACE", "build_initramfs"]

USERSPACE = b"userspace"
STATUS_PREFIX = b"status "

_INIT = """#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs dev /dev
$bb mount -t proc proc /proc
$bb mount -t sysfs sys /sys
[ -c /dev/hvc1 ] && $bb stty raw -echo < /dev/hvc1
tell() {{ [ -c /dev/hvc1 ] && echo "$1" > /dev/hvc1; }}
tell userspace
$bb --install -s /bin
export PATH=/bin HOME=/ TERM=vt100
for module in {modules}; do insmod /modules/$module.ko 2>/dev/null; done
[ -d /sys/kernel/config ] && mount -t configfs config /sys/kernel/config
{action}
{report}
grep -q ttyS /proc/cmdline && sleep 1
poweroff -f
sleep 60
"""
_SHELL = """echo
echo "A shell in the initramfs; exit or poweroff ends the machine."
setsid cttyhack sh
tell "status $?"
"""
_REPORT = """report=/sys/kernel/config/tsm/report/end
if mkdir $report 2>/dev/null; then
  head -c 64 /dev/zero > $report/inblob
  cat $report/outblob > /dev/null
fi"""
_COMMAND = """sh -c {command}
tell "status $?"
"""
_MAX_FILE = 256 << 20


def build_initramfs(images: Images, command: str | None = None, files: dict[str, Path] | None = None) -> bytes:
    """An archive that runs `command`, or a shell. `files` are added under their names in the guest, executable."""
    if command is not None and "\0" in command:
        raise PayloadError("the command for --exec has a NUL character")
    modules = [file.stem for file in images.modules]
    action = _SHELL if command is None else _COMMAND.format(command=shlex.quote(command))
    archive = Archive()
    for folder in ("bin", "dev", "etc", "modules", "proc", "root", "sys", "tmp"):
        archive.directory(folder)
    archive.char_device("dev/console", 5, 1)
    archive.char_device("dev/null", 1, 3, 0o666)
    archive.file("bin/busybox", _read(images.busybox), 0o755)
    for file in images.modules:
        archive.file(f"modules/{file.name}", _read(file))
    for name, source in (files or {}).items():
        archive.file(name.lstrip("/"), _read(source), 0o755)
    archive.file("init", _INIT.format(modules=" ".join(modules), action=action, report=_REPORT).encode(), 0o755)
    return archive.to_bytes()


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > _MAX_FILE:
            raise PayloadError(f"the file {str(file)!r} is too large for an initramfs")
        return file.read_bytes()
    except OSError as error:
        raise PayloadError(f"cannot read {str(file)!r}: {error.strerror}") from error
