"""What a Linux boot is made of: kernel images, ACPI tables, the boot window, archives, package names."""

import contextlib
import json
import shutil
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.attest.eventlog import parse_ccel
from softtdx.errors import SoftTdxError
from softtdx.vmm import MachineError, PayloadError
from softtdx.vmm.images import MODULES, cached_images, newest_kernel, pull_images
from softtdx.vmm.linux.acpi import build_tables
from softtdx.vmm.linux.bzimage import load_bzimage, parse_bzimage
from softtdx.vmm.linux.cpio import Archive
from softtdx.vmm.linux.initramfs import build_initramfs
from softtdx.vmm.linux.layout import ACPI_BASE, EVENT_LOG, MAILBOX, TAKE_BACK_VECTOR, MemoryMap
from softtdx.vmm.linux.window import build_window

MIB = 1 << 20


def bzimage(size=0x8000, **changes):
    """A file that has the header of a kernel and nothing else."""
    data = bytearray(size)
    fields = {
        "setup_sects": (0x1F1, "B", 4),
        "syssize": (0x1F4, "I", (size - 5 * 512) // 16),
        "boot_flag": (0x1FE, "H", 0xAA55),
        "magic": (0x202, "4s", b"HdrS"),
        "version": (0x206, "H", 0x20F),
        "initrd_max": (0x22C, "I", 0x7FFF_FFFF),
        "xloadflags": (0x236, "H", 3),
        "cmdline_size": (0x238, "I", 2047),
        "preferred": (0x258, "Q", 0x100_0000),
        "init_size": (0x260, "I", 32 * MIB),
    }
    for name, (offset, form, value) in fields.items():
        struct.pack_into(f"<{form}", data, offset, changes.get(name, value))
    return bytes(data)


def test_a_kernel_image_tells_what_it_needs():
    image = parse_bzimage(bzimage())
    assert (image.setup_size, image.preferred_address, image.init_size) == (5 * 512, 0x100_0000, 32 * MIB)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"\x7fELF" + bytes(4000), "vmlinux"),
        (b"\x1f\x8b" + bytes(4000), "gzip"),
        (b"!<arch>\n" + bytes(4000), "Debian package"),
        (b"070701" + bytes(4000), "cpio"),
        (bytes(100), "only 100 bytes"),
        (bytes(4096), "no bzImage"),
        (bzimage(version=0x20B), "too old"),
        (bzimage(xloadflags=0), "no 64-bit entry"),
        (bzimage()[:-4096], "cut off"),
        (bzimage(setup_sects=200), "cut off"),
        (bzimage(preferred=0x1000), "load address"),
        (bzimage(preferred=1 << 40), "load address"),
        (bzimage(preferred=0x100_0001), "load address"),
        (bzimage(init_size=0), "0 bytes of memory"),
        (bzimage(preferred=0xFFFF_F000), "bytes of memory"),
    ],
)
def test_what_is_no_bootable_kernel_is_refused_with_the_reason(data, words):
    with pytest.raises(PayloadError, match=words):
        parse_bzimage(data, "vmlinuz")


@given(st.binary(max_size=0x1000), st.integers(0, 0x7FFF))
def test_no_image_gets_more_than_a_refusal(noise, at):
    data = bytearray(bzimage())
    data[at : at + len(noise)] = noise
    with contextlib.suppress(PayloadError):
        parse_bzimage(bytes(data))


def test_a_missing_kernel_and_a_folder_are_refused(tmp_path):
    with pytest.raises(PayloadError, match="cannot read"):
        load_bzimage(tmp_path / "none")
    with pytest.raises(PayloadError, match="folder"):
        load_bzimage(tmp_path)


# --- memory and the window
def parts_of(window):
    fields = struct.unpack_from("<13Q", window)
    return fields[:5], [window[fields[i] : fields[i] + fields[i + 1]] for i in range(5, 13, 2)]


def test_the_window_names_its_parts():
    kernel = parse_bzimage(bzimage())
    window = build_window(kernel, b"initrd", "quiet", MemoryMap.of(256 * MIB), 3, td=True)
    head, parts = parts_of(window)
    assert head[1:] == (1, 256 * MIB, 0, 3)
    assert parts == [kernel.data, b"initrd", b"quiet", build_tables(3, td=True)]


def test_memory_above_the_window_goes_above_4_gib():
    assert MemoryMap.of(4096 * MIB).ranges() == [(0, 3072 * MIB), (1 << 32, 1024 * MIB)]


@pytest.mark.parametrize("memory", [0, 2 * MIB, 3 * MIB + 4096, 1 << 50])
def test_memory_that_no_machine_can_have_is_refused(memory):
    with pytest.raises(MachineError):
        MemoryMap.of(memory)


@pytest.mark.parametrize(
    ("initrd", "line", "memory", "words"),
    [
        (b"", "x" * 3000, 256, "3000 bytes"),
        (b"", "é", 256, "not ASCII"),
        (b"", "a\0b", 256, "NUL"),
        (b"", "", 32, "give --memory more"),
        (bytes(220 * MIB), "", 256, "give --memory more"),
    ],
)
def test_parts_that_do_not_fit_are_refused(initrd, line, memory, words):
    with pytest.raises(PayloadError, match=words):
        build_window(parse_bzimage(bzimage()), initrd, line, MemoryMap.of(memory * MIB), 1, td=False)


# --- ACPI
def tables(blob):
    """Signature -> table, found as an operating system does; every checksum is looked at."""
    rsdp = blob[:36]
    assert rsdp.startswith(b"RSD PTR ")
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    (xsdt_at,) = struct.unpack_from("<Q", rsdp, 24)

    def table(address):
        at = address - ACPI_BASE
        (size,) = struct.unpack_from("<I", blob, at + 4)
        data = blob[at : at + size]
        assert len(data) == size
        assert sum(data) & 0xFF == 0
        return data

    xsdt = table(xsdt_at)
    found = {t[:4]: t for t in map(table, struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:]))}
    found[b"DSDT"] = table(struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


@given(st.integers(1, 300), st.booleans())
def test_acpi_tables_hang_together(vcpus, td):
    found = tables(build_tables(vcpus, td=td))
    assert set(found) == {b"FACP", b"APIC", b"DSDT"} | ({b"CCEL"} if td else set())
    madt, ids, at = found[b"APIC"], [], 44
    while at < len(madt):
        kind, size = madt[at], madt[at + 1]
        if kind == 0:
            ids.append(madt[at + 3])
        elif kind == 9:
            ids.append(struct.unpack_from("<I", madt, at + 4)[0])
        else:
            assert (kind, size) == (16, 24)
            assert struct.unpack_from("<QQ", madt, at + 8) == (MAILBOX, TAKE_BACK_VECTOR)
        at += size
    assert ids == list(range(vcpus))
    if td:
        assert parse_ccel(found[b"CCEL"]).log_area_address == EVENT_LOG


def test_too_many_processors_for_the_tables_are_refused():
    with pytest.raises(MachineError, match="ACPI"):
        build_tables(8000, td=True)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="no ACPI disassembler here")
def test_a_disassembler_reads_the_dsdt(tmp_path):
    (tmp_path / "dsdt.aml").write_bytes(tables(build_tables(1, td=True))[b"DSDT"])
    done = subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=False, capture_output=True)
    text = (tmp_path / "dsdt.dsl").read_text()
    assert done.returncode == 0
    assert "PNP0A03" in text
    assert "_S5" in text


# --- initramfs
def members(archive):
    """(name, mode, data) of a newc archive."""
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        at += -(-(110 + fields[11]) // 4) * 4
        data = archive[at : at + fields[6]]
        at += -(-fields[6] // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(archive)
            return
        yield name, fields[1], data


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=20), st.binary(max_size=100), max_size=6))
def test_an_archive_holds_what_was_put_in(files):
    archive = Archive()
    for name, data in files.items():
        archive.file(name, data, 0o600)
    assert {name: data for name, _, data in members(archive.to_bytes())} == files


def test_the_initramfs_runs_the_command_it_was_given(tmp_path):
    images = images_in(tmp_path)
    archive = {name: data for name, _, data in members(build_initramfs(images, "echo 'a b'; exit 3"))}
    assert b"sh -c 'echo '\"'\"'a b'\"'\"'; exit 3'" in archive["init"]
    assert archive["bin/busybox"] == b"busybox"
    assert archive["modules/tsm.ko"] == b"tsm"
    with pytest.raises(PayloadError, match="NUL"):
        build_initramfs(images, "a\0b")
    with pytest.raises(PayloadError, match="cannot read"):
        build_initramfs(images, "true", {"root/x": tmp_path / "missing"})


def test_only_an_initramfs_with_an_agent_listens_to_the_host(tmp_path):
    images = images_in(tmp_path)
    found = [init_of(build_initramfs(images, "true", agent=agent)) for agent in (False, True)]
    assert b"hvc2" not in found[0]
    assert b"serve <> /dev/hvc2" in found[1]
    assert b"sed 's/../\\\\x&/g'" in found[1]  # what the shell's printf makes bytes of


def init_of(archive):
    return {name: data for name, _, data in members(archive)}["init"]


def test_a_cache_that_lacks_what_is_needed_today_does_not_count(tmp_path):
    assert images_in(tmp_path, wanted=["tsm"]) is None
    (tmp_path / "images.json").write_text('{"package": "p", "kernel": "k", "busybox": "b", "modules": []}')
    assert cached_images(tmp_path) is None


# --- packages
def images_in(folder, **changes):
    (folder / "r").mkdir()
    for name in ("vmlinuz", "busybox", "tsm.ko"):
        (folder / "r" / name).write_bytes(name.partition(".")[0].encode())
    manifest = {"package": "p", "wanted": list(MODULES), "kernel": "r/vmlinuz", "busybox": "r/busybox"}
    (folder / "images.json").write_text(json.dumps(manifest | {"modules": ["r/tsm.ko"]} | changes))
    return cached_images(folder)


def test_a_cache_that_lost_a_file_counts_as_empty(tmp_path):
    assert cached_images(tmp_path) is None
    assert images_in(tmp_path).package == "p"
    (tmp_path / "r" / "tsm.ko").unlink()
    assert cached_images(tmp_path) is None
    (tmp_path / "images.json").write_text("[]")
    assert cached_images(tmp_path) is None


def test_the_newest_kernel_is_chosen_by_number():
    names = [
        "linux-image-6.12-cloud-amd64 - meta",
        "linux-image-6.12.9+deb12-cloud-amd64 - x",
        "linux-image-6.12.117+deb12-cloud-amd64 - y",
        "linux-image-6.12.118+deb12-amd64 - no cloud kernel",
        "linux-image-6.12.119+deb12-cloud-amd64-unsigned - z",
        "linux-image-6.13.1+deb13-cloud-amd64 - too new",
    ]
    assert newest_kernel("\n".join(names)) == "linux-image-6.12.117+deb12-cloud-amd64"
    assert newest_kernel("") is None


def test_a_system_without_apt_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SoftTdxError, match="--kernel"):
        pull_images(tmp_path / "cache")


def tool(folder, name, script):
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_apt_that_fails_or_offers_nothing_is_reported(tmp_path, monkeypatch):
    for name in ("apt-get", "dpkg-deb"):
        tool(tmp_path, name, "echo 'E: Unable to fetch some archives' >&2; exit 100")
    tool(tmp_path, "apt-cache", "echo 'linux-image-6.12.1+deb12-cloud-amd64 - x'")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SoftTdxError, match=r"Unable to fetch some archives.*network"):
        pull_images(tmp_path / "cache")
    tool(tmp_path, "apt-cache", "true")
    tool(tmp_path, "apt-get", "exit 0")
    with pytest.raises(SoftTdxError, match="apt offers no"):
        pull_images(tmp_path / "cache")
