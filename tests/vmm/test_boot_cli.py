"""`softtdx boot` and `softtdx images`: what a user who asks for the impossible is told."""

import json
import os
import pty
import subprocess
import sys
import time

import pytest
from linux_guest import debian_images
from test_boot_parts import bzimage


def softtdx(*arguments, env=None):
    command = [sys.executable, "-m", "softtdx", *map(str, arguments)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, **(env or {})}
    )


@pytest.fixture
def kernel(tmp_path):
    file = tmp_path / "vmlinuz"
    file.write_bytes(bzimage())
    return file


@pytest.fixture
def initrd(tmp_path):
    file = tmp_path / "initrd"
    file.write_bytes(b"x")
    return file


def complaint(done):
    assert done.returncode not in (0, -1)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 4
    return done.stderr


def test_a_kernel_that_is_none_is_refused_before_anything_starts(tmp_path, initrd):
    assert "cannot read" in complaint(softtdx("boot", "--kernel", tmp_path / "none", "--initrd", initrd))
    (tmp_path / "short").write_bytes(bzimage()[:1000])
    assert "only 1000 bytes" in complaint(softtdx("boot", "--kernel", tmp_path / "short", "--initrd", initrd))


def test_options_that_do_not_go_together_are_refused(kernel, initrd):
    both = ("boot", "--kernel", kernel, "--initrd", initrd)
    assert "--initrd" in complaint(softtdx(*both, "--exec", "true"))
    assert "--vm" in complaint(softtdx(*both, "--vm", "--debug-td"))
    assert "is not a size" in complaint(softtdx(*both, "--memory", "lots"))
    assert "vCPUs" in complaint(softtdx(*both, "--vcpus", "0"))


def test_too_little_memory_is_refused_with_the_way_out(kernel, initrd):
    assert "--memory" in complaint(softtdx("boot", "--vm", "--kernel", kernel, "--initrd", initrd, "--memory", "32M"))


def test_a_file_that_is_not_there_is_named(kernel, tmp_path):
    assert "'/none'" in complaint(softtdx("boot", "--kernel", kernel, "--initrd", "/none"))
    assert "drive" in complaint(
        softtdx("boot", "--vm", "--kernel", kernel, "--initrd", kernel, "--drive", tmp_path / "none")
    )


def test_a_kernel_that_does_nothing_useful_ends_with_a_hint(kernel, initrd):
    # Its 64-bit entry holds zeroes: ADD [RAX], AL, up to where there is no memory.
    done = softtdx("boot", "--kernel", kernel, "--initrd", initrd, "--memory", "128M")
    assert "CONFIG_INTEL_TDX_GUEST" in complaint(done)


def test_images_without_apt_are_explained(tmp_path):
    done = softtdx("images", "pull", env={"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)})
    assert "apt" in complaint(done)
    assert "nothing yet" in softtdx("images", "list", env={"XDG_CACHE_HOME": str(tmp_path)}).stdout


def test_two_vcpus_of_an_ordinary_vm_reach_userspace_and_the_commands_status_is_softtdxs():
    debian_images()
    command = "nproc; cat /root/test_boot_cli.py | wc -c; dmesg | grep 'smp: Brought up'; exit 5"
    done = softtdx("boot", "--vm", "--vcpus", "2", "--exec", command, "--add", __file__, "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["guest_status"] == 5
    assert report["userspace"]
    assert report["mrtd"] is None
    processors, size, brought_up = report["console"].split("\r\n")[:3]
    assert (processors, int(size)) == ("2", os.path.getsize(__file__))
    assert "1 node, 2 CPUs" in brought_up


@pytest.mark.nightly
def test_a_shell_answers_on_the_terminal_and_ctrl_bracket_leaves():
    debian_images()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-m", "softtdx", "boot", "--vm"])
    seen = b""
    while b"# \x1b[6n" not in seen:
        seen += os.read(terminal, 65536)
    os.write(terminal, b"echo $((6*7))\r")
    while b"\r\n42\r\n" not in seen:
        seen += os.read(terminal, 65536)
    os.write(terminal, b"\x1d")
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended == (pid, 0)
