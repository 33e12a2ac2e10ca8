"""What machine is simulated: one description, loadable from TOML; presets follow real Xeons."""

import tomllib
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from softtdx.errors import SoftTdxError

__all__ = ["CpuidValues", "DescriptionError", "PlatformDescription", "preset", "preset_names"]

CpuidValues = tuple[int, int, int, int]
"""EAX, EBX, ECX, EDX."""

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
SEAMRR_MIN = 32 * MIB


class DescriptionError(SoftTdxError):
    """A platform description that no machine could have."""


@dataclass(frozen=True)
class PlatformDescription:
    """A machine.

    Addresses and sizes are bytes. `cmrs` are the convertible memory ranges, which must lie in DRAM (`ram`) and
    outside SEAMRR. `keyid_bits` KeyID bits stand at the top of 52 physical-address bits; KeyIDs from
    `first_private_keyid` on are TDX private (IA32_MKTME_KEYID_PARTITIONING). `integrity`: "crypto", "logical" or
    "none". CPUID is keyed by (leaf, subleaf), subleaf None where the leaf has none. MSRs are what RDMSR gives.
    """

    name: str = "custom"
    packages: int = 1
    lps: int = 2
    ram: tuple[tuple[int, int], ...] = ((0, 2 * GIB),)
    cmrs: tuple[tuple[int, int], ...] = ((MIB, 1535 * MIB),)
    seamrr: tuple[int, int] = (0x6000_0000, 32 * MIB)
    keyid_bits: int = 6
    first_private_keyid: int = 32
    integrity: str = "crypto"
    tme: bool = True
    tsc_hz: int = 2_500_000_000
    tsc_real: bool = False
    seed: int = 0
    cpu_svn: bytes = bytes(range(1, 17))
    cpuid: dict[tuple[int, int | None], CpuidValues] = field(default_factory=dict)
    msrs: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be: DescriptionError names the field."""
        problem = _first_problem(self)
        if problem:
            raise DescriptionError(f"platform {self.name!r}: {problem}")

    @property
    def dram_bits(self) -> int:
        """Physical-address bits that address DRAM: what the KeyID leaves of 52."""
        return 52 - self.keyid_bits

    @property
    def private_keyids(self) -> range:
        """The KeyIDs that only SEAM mode may name."""
        return range(self.first_private_keyid, 1 << self.keyid_bits)

    @property
    def lps_per_package(self) -> int:
        """Logical processors of each package."""
        return self.lps // self.packages

    def keyed(self, pa: int, keyid: int) -> int:
        """The bus address of `pa` under `keyid`."""
        return pa | keyid << self.dram_bits

    @classmethod
    def from_toml(cls, path: str | Path) -> "PlatformDescription":
        """Read a description. `base` names the preset it starts from; the other keys are this class's fields.

        CPUID and MSR values are given as tables: `[cpuid] "0x7.0" = [eax, ebx, ecx, edx]`, `[msrs] "0x1a0" = 1`.
        Raises DescriptionError for a file that cannot be read, is not TOML or has a wrong value.
        """
        try:
            text = Path(path).read_bytes().decode()
            return cls.from_dict(tomllib.loads(text))
        except OSError as error:
            raise DescriptionError(f"cannot read the platform description {str(path)!r}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DescriptionError(f"the platform description {str(path)!r} is not TOML: {error}") from error

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "PlatformDescription":
        """The same from a parsed table. Raises DescriptionError."""
        table = dict(table)
        base = table.pop("base", None)
        values: dict[str, Any] = {}
        if base is not None:
            start = preset(base)
            values = {f.name: getattr(start, f.name) for f in fields(cls)}
        known = {f.name for f in fields(cls)}
        for key, value in table.items():
            if key not in known:
                raise DescriptionError(
                    f"unknown key {key!r} in a platform description; known: {', '.join(sorted(known))}"
                )
            try:
                values[key] = _convert(key, value, values.get(key))
            except (ValueError, TypeError, AttributeError) as error:
                raise DescriptionError(f"platform description, key {key!r}: {error}") from error
        try:
            return cls(**values)
        except TypeError as error:
            raise DescriptionError(f"platform description: a value has the wrong type ({error})") from error


def _convert(key: str, value: Any, before: Any) -> Any:
    if key in ("ram", "cmrs"):
        return tuple((int(base), int(size)) for base, size in value)
    if key == "seamrr":
        base, size = value
        return int(base), int(size)
    if key == "cpu_svn":
        return bytes.fromhex(value)
    if key == "cpuid":
        merged = dict(before or {})
        merged.update({_cpuid_key(k): _cpuid_values(v) for k, v in value.items()})
        return merged
    if key == "msrs":
        merged = dict(before or {})
        merged.update({int(k, 0): int(v) for k, v in value.items()})
        return merged
    expected = {"name": str, "integrity": str, "tme": bool, "tsc_real": bool}.get(key, int)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{value!r} is not {expected.__name__}")
    return value


def _cpuid_key(text: str) -> tuple[int, int | None]:
    leaf, _, subleaf = text.partition(".")
    return int(leaf, 0), int(subleaf, 0) if subleaf and subleaf != "-" else None


def _cpuid_values(values: Any) -> CpuidValues:
    eax, ebx, ecx, edx = (int(v) for v in values)
    if not all(0 <= v < 1 << 32 for v in (eax, ebx, ecx, edx)):
        raise ValueError(f"{values} are not four 32-bit values")
    return eax, ebx, ecx, edx


def _first_problem(d: PlatformDescription) -> str | None:
    if not 1 <= d.packages <= 8:
        return f"packages is {d.packages}, must be 1 to 8"
    if not 1 <= d.lps <= 512 or d.lps % d.packages:
        return f"lps is {d.lps}, must be 1 to 512 and a multiple of packages ({d.packages})"
    if not 1 <= d.keyid_bits <= 15:
        return f"keyid_bits is {d.keyid_bits}, must be 1 to 15"
    if not 1 <= d.first_private_keyid < 1 << d.keyid_bits:
        return f"first_private_keyid is {d.first_private_keyid}, must be 1 to {(1 << d.keyid_bits) - 1}"
    if d.integrity not in ("crypto", "logical", "none"):
        return f'integrity is {d.integrity!r}, must be "crypto", "logical" or "none"'
    if not 100_000_000 <= d.tsc_hz <= 10_000_000_000:
        return f"tsc_hz is {d.tsc_hz}, must be 0.1 to 10 GHz"
    if len(d.cpu_svn) != 16:
        return f"cpu_svn has {len(d.cpu_svn)} bytes, must have 16"
    for what, ranges in (("ram", d.ram), ("cmrs", d.cmrs)):
        end = 0
        if not ranges:
            return f"{what} is empty"
        for base, size in ranges:
            if base % PAGE or size % PAGE or size <= 0 or base < end:
                return f"{what}: the range {base:#x}+{size:#x} is not page aligned, is empty or not in ascending order"
            end = base + size
        if end > 1 << d.dram_bits:
            return f"{what} ends at {end:#x}, above the {d.dram_bits} address bits that the KeyID leaves"
    if len(d.cmrs) > 32:
        return f"{len(d.cmrs)} CMRs, at most 32"
    base, size = d.seamrr
    if size < SEAMRR_MIN or size & (size - 1) or base % size:
        return (
            f"seamrr {base:#x}+{size:#x}: the size must be a power of two of at least 32 MiB, the base a multiple of it"
        )
    for inner in (*d.cmrs, d.seamrr):
        if not any(b <= inner[0] and inner[0] + inner[1] <= b + s for b, s in d.ram):
            return f"the range {inner[0]:#x}+{inner[1]:#x} is not inside one range of ram"
    for b, s in d.cmrs:
        if b < base + size and base < b + s:
            return f"the CMR {b:#x}+{s:#x} overlaps SEAMRR"
    return None


def preset_names() -> list[str]:
    """The presets that ship with the product."""
    folder = resources.files(__package__) / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


@lru_cache(maxsize=8)
def preset(name: str) -> PlatformDescription:
    """The description that ships under `name`. DescriptionError names the known ones."""
    if name not in preset_names():
        raise DescriptionError(f"no platform preset is named {name!r}; there are: {', '.join(preset_names())}")
    text = (resources.files(__package__) / "presets" / f"{name}.toml").read_text()
    return PlatformDescription.from_dict(tomllib.loads(text))
