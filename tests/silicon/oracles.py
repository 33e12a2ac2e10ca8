"""The two oracles: the processor this runs on, and Unicorn."""

import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from records import RECORD, Case

_SOURCE = Path(__file__).parent / "native_oracle.c"


class NativeOracle:
    """Runs records on the host's own processor, in a child process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = folder / "native_oracle"
        compiler = shutil.which("cc")
        assert compiler is not None
        subprocess.run([compiler, "-O1", "-o", self._program, _SOURCE], check=True)

    @staticmethod
    def available() -> bool:
        return (
            platform.machine() == "x86_64"
            and platform.system() == "Linux"
            and shutil.which("cc") is not None
        )

    def run(self, records: bytes) -> bytes:
        path = self._folder / "records"
        path.write_bytes(records)
        subprocess.run([self._program, path], check=True, timeout=600)
        return path.read_bytes()


def split(records: bytes) -> Iterable[bytes]:
    return (records[at : at + RECORD] for at in range(0, len(records), RECORD))


def join(cases: Iterable[Case]) -> bytes:
    return b"".join(case.record() for case in cases)
