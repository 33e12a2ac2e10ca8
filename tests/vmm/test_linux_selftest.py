"""Linux's own test of /dev/tdx_guest, from the sources that Debian packages (150 MB), in a TD: for the night."""

import os
import re
import shutil
import subprocess

import pytest
from linux_guest import boot, debian_images

SOURCE = "linux-source-6.12"
SELFTESTS = "tools/testing/selftests"
WANTED = (
    f"{SELFTESTS}/tdx/tdx_guest_test.c",
    f"{SELFTESTS}/kselftest_harness.h",
    f"{SELFTESTS}/kselftest.h",
    "include/uapi/linux/tdx-guest.h",
)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """The test program, compiled static. Skips where apt or the compiler cannot make it, but not in CI."""
    folder = tmp_path_factory.mktemp("linux")

    def run(*command):
        done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            if os.environ.get("CI") == "true":
                raise AssertionError(done.stderr)
            pytest.skip(f"{command[0]} cannot do its part here: {done.stderr.strip()[-200:]}")

    for tool in ("apt-get", "dpkg-deb", "tar", "xz", "cc"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    run("apt-get", "download", SOURCE)
    (package,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", str(package), ".")
    package.unlink()
    run("tar", "-xJf", f"usr/src/{SOURCE}.tar.xz", *(f"{SOURCE}/{name}" for name in WANTED))
    shutil.rmtree(folder / "usr")
    program, tree = folder / "tdx_guest_test", folder / SOURCE
    # After the system's own headers, of which all but the newest are there.
    uapi = ("-idirafter", str(tree / "include/uapi"))
    run("cc", "-static", "-O2", *uapi, "-o", str(program), str(tree / WANTED[0]))
    return program


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_linuxs_own_selftest_passes_all_its_checks(selftest):
    debian_images()
    done = boot("/root/selftest; echo status=$?", files={"root/selftest": selftest})
    assert "status=0" in done.text
    passed, failed = re.search(r"# Totals: pass:(\d+) fail:(\d+)", done.text).groups()
    assert int(passed) >= 1
    assert int(failed) == 0
    assert "not ok" not in done.text
