"""Recordings: their files, the machine they were made on, and which values in them are not to be compared."""

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from softtdx.errors import SoftTdxError
from softtdx.hw.description import MIB, PlatformDescription

__all__ = ["RecordedPlatform", "Trace", "TraceError", "load_platform", "load_trace", "trace_paths"]

Step = dict[str, Any]
PLATFORM_FILE: Final = "platform.json"
ENDINGS: Final = (".jsonl.gz", ".jsonl")
_SYSINFO_SIZE: Final = 4096


class TraceError(SoftTdxError):
    """A recording, or the description of its machine, that cannot be used."""


@dataclass(frozen=True)
class Trace:
    """One recording: its name, the recording it starts behind (None: a machine just powered on), its steps."""

    name: str
    path: Path
    base: str | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class RecordedPlatform:
    """The machine of a recording. Sentinels: values of registers that a step does not name."""

    description: PlatformDescription
    sysinfo: bytes
    tee_tcb_info: bytes
    host_sentinels: dict[str, int] = field(default_factory=dict)
    td_sentinels: dict[str, int] = field(default_factory=dict)


def trace_paths(folder: Path, names: tuple[str, ...] = ()) -> list[Path]:
    """The recordings of a folder, or those of the given names (with or without their ending). TraceError."""
    if not folder.is_dir():
        raise TraceError(f"{str(folder)!r} is not a folder with recordings")
    found = sorted(p for p in folder.iterdir() if p.name.endswith(ENDINGS))
    if not names:
        if not found:
            raise TraceError(
                f"the folder {str(folder)!r} holds no recordings ({' or '.join('*' + e for e in ENDINGS)})"
            )
        return found
    by_name = {alias: path for path in found for alias in (path.name, _stem(path))}
    missing = [name for name in names if Path(name).name not in by_name]
    if missing:
        raise TraceError(f"no recording {missing[0]!r} in {str(folder)!r}; there are: {', '.join(map(_stem, found))}")
    return [by_name[Path(name).name] for name in names]


def _stem(path: Path) -> str:
    name = path.name
    for ending in ENDINGS:
        name = name.removesuffix(ending)
    return name


def load_trace(path: Path) -> Trace:
    """Read a recording. TraceError names the line that is no JSON."""
    steps: list[Step] = []
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode()
    except (OSError, EOFError, ValueError, gzip.BadGzipFile) as error:
        raise TraceError(f"cannot read the recording {str(path)!r}: {error}") from error
    for number, line in enumerate(text.splitlines()):
        try:
            step = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{path.name}, line {number}: not JSON ({error})") from error
        if not isinstance(step, dict):
            raise TraceError(f"{path.name}, line {number}: not a step")
        step.setdefault("n", number)
        steps.append(step)
    if not steps or steps[0].get("op") != "header":
        raise TraceError(f"{path.name}: the first line is not the header of a recording")
    return Trace(_stem(path), path, steps[0].get("base"), tuple(steps[1:]))


def load_platform(path: Path) -> RecordedPlatform:
    """Read `platform.json`. TraceError when it is missing or incomplete."""
    try:
        table = json.loads(path.read_text())
        return _platform(table)
    except OSError as error:
        raise TraceError(
            f"cannot read {str(path)!r}, which describes the recorded machine: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TraceError(f"{str(path)!r} does not describe a recorded machine: {error!r}") from error


def _numbers(table: dict[str, str]) -> dict[str, int]:
    return {name: int(value, 0) for name, value in table.items()}


def _platform(table: dict[str, Any]) -> RecordedPlatform:
    seamrr = (int(table["seamrr"][0], 0), int(table["seamrr"][1], 0))
    size = int(table["ram_size"], 0)
    ram: tuple[tuple[int, int], ...] = ((0, (size + MIB - 1) // MIB * MIB),)
    if "ram" in table:
        ram = tuple((int(base, 0), int(length, 0)) for base, length in table["ram"])
    cpuid = {
        (int(leaf, 0), None if subleaf == "-" else int(subleaf, 0)): tuple(int(v, 0) for v in values)
        for (leaf, _, subleaf), values in (
            (key.partition("."), values) for key, values in table["cpuid_native"].items()
        )
    }
    description = PlatformDescription(
        name="recorded",
        packages=table["packages"],
        lps=table["lps"],
        ram=ram,
        cmrs=tuple((int(base, 0), int(size, 0)) for base, size in table["cmrs"]),
        seamrr=seamrr,
        keyid_bits=table["keyid_bits"],
        first_private_keyid=table["private_hkid_range"][0],
        integrity="logical",
        tsc_hz=table["native_tsc_hz"],
        cpu_svn=bytes.fromhex(table["cpusvn"]),
        cpuid=cpuid,  # type: ignore[arg-type]
        msrs={int(msr, 0): int(value, 0) for msr, value in table["msrs"].items()},
    )
    sysinfo = bytearray(_SYSINFO_SIZE)
    for offset, text in table["sysinfo_table"]:
        data = bytes.fromhex(text)
        sysinfo[offset : offset + len(data)] = data
    return RecordedPlatform(
        description,
        bytes(sysinfo),
        bytes.fromhex(table["tee_tcb_info"]),
        _numbers(table["host_sentinel_registers"]),
        _numbers(table["td_sentinel_registers"]),
    )
