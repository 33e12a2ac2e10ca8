"""Debian's kernel and busybox, fetched through apt into a cache folder. No root is needed, nothing is installed."""

import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from softtdx.vmm.errors import PayloadError

__all__ = ["KERNEL_PATTERN", "Images", "cache_folder", "cached_images", "newest_kernel", "pull_images"]

KERNEL_PATTERN = re.compile(r"^linux-image-(6\.12\.(\d+)\+deb(\d+))-cloud-amd64$")
BUSYBOX = "busybox-static"
MODULES = ("configfs", "tsm", "tdx-guest", "virtio_blk", "failover", "net_failover", "virtio_net")
"""What a guest of ours loads, in an order that satisfies their dependencies."""

_MANIFEST = "images.json"
_TIMEOUT = 600
_LISTS_MISSING = "apt-get update"


@dataclass(frozen=True)
class Images:
    """What was unpacked: a kernel, its modules (plain .ko files, in loading order) and a static busybox."""

    package: str
    kernel: Path
    busybox: Path
    modules: tuple[Path, ...]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/softtdx/images, or the same below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "softtdx" / "images"


def cached_images(folder: Path | None = None) -> Images | None:
    """What an earlier `pull_images` left; None when there is nothing whole."""
    folder = folder or cache_folder()
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["wanted"] != list(MODULES):
            return None  # of an earlier version, which needed other modules
        images = Images(
            str(manifest["package"]),
            folder / manifest["kernel"],
            folder / manifest["busybox"],
            tuple(folder / name for name in manifest["modules"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return images if all(file.is_file() for file in (images.kernel, images.busybox, *images.modules)) else None


def newest_kernel(names: str) -> str | None:
    """The newest of the cloud kernels of 6.12 among package names, one a line (text behind a name is ignored)."""
    found: list[tuple[int, int, str]] = []
    for line in names.splitlines():
        match = KERNEL_PATTERN.match(line.split(" ", 1)[0])
        if match:
            found.append((int(match[2]), int(match[3]), match[0]))
    return max(found)[2] if found else None


def pull_images(folder: Path | None = None) -> Images:
    """Download and unpack the newest kernel and busybox, unless they are there. PayloadError says what is missing."""
    folder = folder or cache_folder()
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PayloadError(
                f"{tool} is not there, and images come from Debian through apt; on this system give softtdx boot "
                "a --kernel (a bzImage with TDX guest support) and an --initrd of your own"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PayloadError(f"cannot use the cache folder {str(folder)!r}: {error.strerror}") from error
    apt = _Apt(folder)
    package = apt.newest_kernel()
    there = cached_images(folder)
    if there is not None and there.package == package:
        return there
    with tempfile.TemporaryDirectory(dir=folder, prefix="unpack-") as name:
        work = Path(name)
        for wanted in (package, BUSYBOX):
            apt.unpack(wanted, work)
        return _keep(package, work, folder)


class _Apt:
    """apt with the system's package lists, or with lists of our own where those are empty."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._options: list[str] = []

    def newest_kernel(self) -> str:
        package = newest_kernel(self._search())
        if package is None:
            self._use_own_lists()
            package = newest_kernel(self._search())
        if package is None:
            raise PayloadError(
                "apt offers no linux-image-6.12*-cloud-amd64: Debian 12's security archive and Debian 13 have it; "
                "add that source, or give softtdx boot a --kernel of your own"
            )
        return package

    def unpack(self, package: str, work: Path) -> None:
        """Download a package and unpack it into `work`."""
        folder = work / f"{package}.download"
        folder.mkdir()
        # Lists may be older than the archive, which drops superseded versions: then a fresh list names the next one.
        self._run(["apt-get", *self._options, "download", f"{package}:amd64"], folder)
        files = list(folder.glob("*.deb"))
        if len(files) != 1:
            raise PayloadError(f"apt-get download {package} left {len(files)} packages instead of one; try again")
        self._run(["dpkg-deb", "-x", str(files[0]), str(work)], work)

    def _search(self) -> str:
        command = ["apt-cache", *self._options, "search", "--names-only", "^linux-image-6[.]12.*-cloud-amd64$"]
        return self._run(command, self._folder)

    def _use_own_lists(self) -> None:
        """apt-get update into the cache folder: needs no root."""
        apt = self._folder / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        self._options = [
            f"-oDir::State::Lists={apt / 'lists'}",
            f"-oDir::Cache={apt / 'cache'}",
            "-oDebug::NoLocking=true",
            "-oAPT::Architecture=amd64",
        ]
        self._run(["apt-get", *self._options, "update"], self._folder)

    def _run(self, command: list[str], folder: Path) -> str:
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                check=False,
                capture_output=True,
                timeout=_TIMEOUT,
                env=os.environ | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PayloadError(f"{command[0]} does not run here: {error}") from error
        if done.returncode:
            lines = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if line.startswith("E:")]
            why = lines[0][2:].strip() if lines else f"exit status {done.returncode}"
            raise PayloadError(
                f"{command[0]} failed: {why}; check the network, and that apt has a source for Debian packages "
                f"({_LISTS_MISSING} must work)"
            )
        return done.stdout.decode("utf-8", "replace")


def _keep(package: str, work: Path, folder: Path) -> Images:
    """Move what is needed of the unpacked packages into its place, the manifest last."""
    kernel = next(work.glob("boot/vmlinuz-*"), None)
    busybox = work / "bin/busybox" if (work / "bin/busybox").is_file() else work / "usr/bin/busybox"
    if kernel is None or not busybox.is_file():
        raise PayloadError(
            f"the packages {package} and {BUSYBOX} do not hold what they used to: no kernel or no busybox"
        )
    release = kernel.name.removeprefix("vmlinuz-")
    place = folder / release
    place.mkdir(exist_ok=True)
    modules = []
    for name in MODULES:
        file = next((f for f in work.glob(f"**/{name}.ko*") if f.is_file()), None)
        if file is None:
            continue
        data = file.read_bytes()
        (place / f"{name}.ko").write_bytes(lzma.decompress(data) if file.suffix == ".xz" else data)
        modules.append(f"{release}/{name}.ko")
    shutil.copyfile(kernel, place / "vmlinuz")
    shutil.copyfile(busybox, place / "busybox")
    manifest = {
        "package": package,
        "wanted": MODULES,
        "kernel": f"{release}/vmlinuz",
        "busybox": f"{release}/busybox",
        "modules": modules,
    }
    temporary = folder / f"{_MANIFEST}.new"
    temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    temporary.replace(folder / _MANIFEST)
    images = cached_images(folder)
    assert images is not None
    return images
