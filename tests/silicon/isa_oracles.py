"""The two oracles: the processor this runs on, and Unicorn."""

import platform
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from isa_records import CODE, DATA, READ_ONLY, RECORD, WINDOW, Case
from unicorn import UC_ARCH_X86, UC_MODE_64, UC_PROT_READ, Uc, UcError
from unicorn.x86_const import (
    UC_X86_REG_EFLAGS,
    UC_X86_REG_R8,
    UC_X86_REG_R9,
    UC_X86_REG_R10,
    UC_X86_REG_R11,
    UC_X86_REG_R12,
    UC_X86_REG_R13,
    UC_X86_REG_R14,
    UC_X86_REG_R15,
    UC_X86_REG_RAX,
    UC_X86_REG_RBP,
    UC_X86_REG_RBX,
    UC_X86_REG_RCX,
    UC_X86_REG_RDI,
    UC_X86_REG_RDX,
    UC_X86_REG_RIP,
    UC_X86_REG_RSI,
    UC_X86_REG_RSP,
    UC_X86_REG_XMM0,
)

_GPRS = [
    UC_X86_REG_RAX, UC_X86_REG_RCX, UC_X86_REG_RDX, UC_X86_REG_RBX, UC_X86_REG_RSP, UC_X86_REG_RBP, UC_X86_REG_RSI,
    UC_X86_REG_RDI, UC_X86_REG_R8, UC_X86_REG_R9, UC_X86_REG_R10, UC_X86_REG_R11, UC_X86_REG_R12, UC_X86_REG_R13,
    UC_X86_REG_R14, UC_X86_REG_R15,
]  # fmt: skip
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
        return platform.machine() == "x86_64" and platform.system() == "Linux" and shutil.which("cc") is not None

    def run(self, records: bytes) -> bytes:
        path = self._folder / "records"
        path.write_bytes(records)
        subprocess.run([self._program, path], check=True, timeout=600)
        return path.read_bytes()


def split(records: bytes) -> Iterable[bytes]:
    return (records[at : at + RECORD] for at in range(0, len(records), RECORD))


def join(cases: Iterable[Case]) -> bytes:
    return b"".join(case.record() for case in cases)


class UnicornOracle:
    """Runs records on Unicorn, which is on every host.

    It knows no exceptions of SSE arithmetic, delivers no error codes and stops at faults: a result is a record only of
    a case that runs to its end, and `None` of one that faults.
    """

    def __init__(self) -> None:
        self._uc = Uc(UC_ARCH_X86, UC_MODE_64)
        self._uc.mem_map(CODE, 0x400_0000)
        self._at = CODE
        self._uc.mem_map(DATA, 0x2000)
        self._uc.mem_map(READ_ONLY, 0x1000, UC_PROT_READ)

    def run(self, records: bytes) -> list[bytes | None]:
        return [self._one(bytearray(record)) for record in split(records)]

    def _one(self, record: bytearray) -> bytes | None:
        uc = self._uc
        length = int.from_bytes(record[136:144], "little")
        # Translations are cached, with the address at which to stop: every case has code of its own.
        start = self._at
        self._at += 256
        uc.mem_write(start, bytes(record[160 : 160 + length]).ljust(256, b"\xcc"))
        uc.mem_write(DATA, bytes(0x2000))
        uc.mem_write(WINDOW, bytes(record[768:1024]))
        for n, register in enumerate(_GPRS):
            uc.reg_write(register, int.from_bytes(record[8 * n : 8 * n + 8], "little"))
            uc.reg_write(UC_X86_REG_XMM0 + n, int.from_bytes(record[416 + 16 * n : 432 + 16 * n], "little"))
        uc.reg_write(UC_X86_REG_EFLAGS, int.from_bytes(record[128:136], "little"))
        try:
            uc.emu_start(start, start + length)
        except UcError:
            return None
        for n, register in enumerate(_GPRS):
            record[8 * n : 8 * n + 8] = uc.reg_read(register).to_bytes(8, "little")
            record[416 + 16 * n : 432 + 16 * n] = uc.reg_read(UC_X86_REG_XMM0 + n).to_bytes(16, "little")
        record[128:136] = uc.reg_read(UC_X86_REG_EFLAGS).to_bytes(8, "little")
        # It stops before the INT3 that ends a case.
        record[136:144] = (uc.reg_read(UC_X86_REG_RIP) - start + CODE + 1).to_bytes(8, "little")
        record[144:152] = (3).to_bytes(8, "little")
        record[768:1024] = uc.mem_read(WINDOW, 256)
        return bytes(record)
