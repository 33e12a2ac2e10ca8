"""The initramfs of `softtdx boot`: busybox, the TDX guest modules and an init that runs a shell or one command.

/dev/hvc0 is the console. /dev/hvc1 goes to the VMM: `userspace` when init runs, then `status N` of the command. In a TD
init takes a quote at the end, so that the VMM can tell the RTMRs that the guest attests. With `agent`, a loop on
/dev/hvc2 takes quotes with the report data that comes from there (softtdx.vmm.agent).
"""

import shlex
from pathlib import Path

from softtdx.vmm.errors import PayloadError
from softtdx.vmm.files import read_file
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
{agent}
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
# The channel leads to the host, which the TD does not trust: nothing but hexadecimal digits is used.
_AGENT = """serve() {
  stty raw -echo
  echo ready
  while read -r number data; do
    case "$number$data" in *[!0-9a-f]*) continue ;; esac
    box=/sys/kernel/config/tsm/report/agent$number
    quote=
    if mkdir $box 2>/dev/null; then
      printf "$(echo $data | sed 's/../\\\\x&/g')" > $box/inblob && quote=$(base64 $box/outblob | tr -d '\\n')
      rmdir $box
    fi
    echo "$number $quote"
  done
}
[ -c /dev/hvc2 ] && serve <> /dev/hvc2 >&0 2>/dev/null &
"""
_COMMAND = """sh -c {command}
tell "status $?"
"""
_MAX_FILE = 256 << 20


def build_initramfs(
    images: Images, command: str | None = None, files: dict[str, Path] | None = None, *, agent: bool = False
) -> bytes:
    """An archive that runs `command`, or a shell. `files` are added under their names in the guest, executable.

    `agent`: it takes quotes for who asks on /dev/hvc2.
    """
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
    agent_loop = _AGENT if agent else ""
    init = _INIT.format(modules=" ".join(modules), agent=agent_loop, action=action, report=_REPORT)
    archive.file("init", init.encode(), 0o755)
    return archive.to_bytes()


def _read(file: Path) -> bytes:
    return read_file(file, "the file", _MAX_FILE)
