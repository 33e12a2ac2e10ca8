"""The module's global data: what lies in its data pages in SEAMRR, one instance for each loaded module."""

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from threading import Lock
from typing import TYPE_CHECKING, Final

from softtdx.hw.isa import PamtPath

from .locks import LockTable

if TYPE_CHECKING:
    from .platform import PlatformConfig

__all__ = [
    "GLOBAL_LOCK",
    "KOT_LOCK",
    "MAX_HKIDS",
    "MAX_PACKAGES",
    "GlobalState",
    "HandoffHeader",
    "HkidState",
    "PackageState",
    "PamtBlock",
    "SysInfo",
    "SysState",
    "Tdmr",
]

MAX_HKIDS: Final = 2048
MAX_PACKAGES: Final = 8
GIB_SHIFT: Final = 30

# Keys of global locks in the lock table.
GLOBAL_LOCK: Final = -1
KOT_LOCK: Final = -2
WBT_LOCK: Final = -16  # minus the package number
TDMR_LOCK: Final = -64  # minus the TDMR's index


class SysState(IntEnum):
    """How far the module's own life has come."""

    INIT_PENDING = 0
    INIT_DONE = 1
    CONFIG_DONE = 2
    READY = 3
    SHUTDOWN = 4


class HkidState(IntEnum):
    """State of a private HKID in the key ownership table."""

    FREE = 0
    ASSIGNED = 1
    FLUSHED = 2
    RESERVED = 3


@dataclass(frozen=True)
class SysInfo:
    """SYS_INFO_TABLE, as the loader left it for the module (facts: SEAM loader, 2.2)."""

    lps: int
    packages: int
    cpuid_fms: tuple[int, ...]
    smrr2_not_supported: bool
    without_integrity: bool
    cmrs: tuple[tuple[int, int], ...]
    module_hv: int
    min_update_hv: int
    no_downgrade: int
    num_handoff_pages: int

    @classmethod
    def parse(cls, table: bytes) -> "SysInfo":
        """Read the 4 KiB table. ValueError when it is shorter."""
        if len(table) < 4096:
            raise ValueError(f"SYS_INFO_TABLE has {len(table)} bytes, must have 4096")
        lps, packages = struct.unpack_from("<II", table, 8)
        module_hv, min_update_hv, no_downgrade, _, pages = struct.unpack_from("<HHBBH", table, 2048 + 104)
        return cls(
            lps=lps,
            packages=packages,
            cpuid_fms=struct.unpack_from("<8I", table, 16),
            smrr2_not_supported=bool(table[64]),
            without_integrity=bool(table[65]),
            cmrs=tuple(struct.iter_unpack("<QQ", table[128 : 128 + 512])),
            module_hv=module_hv,
            min_update_hv=min_update_hv,
            no_downgrade=no_downgrade,
            num_handoff_pages=pages,
        )


@dataclass
class Tdmr:
    """One TD memory region: where it is, where its PAMT is, and how far TDH.SYS.TDMR.INIT has come."""

    index: int
    base: int
    size: int
    pamt_1g: int
    pamt_2m: int
    pamt_4k: int
    reserved: tuple[tuple[int, int], ...]  # (offset, size), ascending
    initialized: int  # next address to initialise

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.base + self.size


class PamtBlock:
    """The PAMT of one initialised 1 GiB block: addresses, with the global KeyID, of its entries.

    `e1g`: its 1 GiB entry; `e2m`: the first of 512 entries; `e4k`: the first of 2^18 entries, or with dynamic PAMT
    the PAMT_PAGE_BITMAP of the whole TDMR. `node_type`: the type bits of a 2 MiB entry that has entries below it.
    `path`: the entries as `HeldLocks.take_page` needs them, None where 4 KiB entries are elsewhere.
    """

    __slots__ = ("base", "dynamic", "e1g", "e2m", "e4k", "key", "node_type", "path", "tdmr")

    def __init__(self, tdmr: Tdmr, base: int, e1g: int, e2m: int, e4k: int, *, key: int, dynamic: bool) -> None:
        """The block at address `base` of `tdmr`; `key`: the global KeyID in address position."""
        self.key = key
        self.dynamic = dynamic
        self.node_type = 15 << 16 if dynamic else 0
        self.tdmr = tdmr
        self.base = base
        self.e1g = e1g
        self.e2m = e2m
        self.e4k = e4k
        self.path = None if dynamic else PamtPath(e1g, e2m, e4k)


@dataclass
class PackageState:
    """What the module keeps for a package: its write-back table entry (TDH.PHYMEM.CACHE.WB)."""

    resume_point: int = 0
    hkids_flushed: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class HandoffHeader:
    """What an older module left in SEAMRR: whether there is anything, in which version, and how many bytes."""

    valid: bool = False
    version: int = 0
    size: int = 0


class GlobalState:
    """The module's global data. Written under `GLOBAL_LOCK` or the lock named at the attribute."""

    def __init__(self, sysinfo: bytes) -> None:
        """As right after the loader installed the module."""
        self.sysinfo = SysInfo.parse(sysinfo)
        self.locks = LockTable()
        self.sys_state = SysState.INIT_PENDING
        self.lps_initialized = 0
        self.packages_initialized = 0
        self.packages_keyed = 0  # bitmap: global key configured
        self.hkid = 0  # the global private HKID
        self.hkid_shift = 46
        self.hkid_mask = 0x3F << 46  # bits of a physical address
        self.private_hkid_min = 0
        self.private_hkid_max = 0
        self.global_key_bits = 0  # hkid << hkid_shift
        self.pa_mask = (1 << 46) - 1  # bits of a physical address that address memory
        self.not_a_page = (1 << 64) - (1 << 52) | self.hkid_mask  # bits that no private page operand may have
        self.seamrr = (0, 0)
        self.seamdb_index = 0
        self.seamdb_nonce = bytes(32)
        self.tdmrs: list[Tdmr] = []
        self.blocks: dict[int, PamtBlock] = {}  # by address >> 30; only what is usable
        self.dynamic_pamt = False
        self.kot: dict[int, tuple[HkidState, int]] = {}  # HKID -> (state, bitmap of packages to write back); KOT_LOCK
        self.packages: list[PackageState] = [PackageState() for _ in range(MAX_PACKAGES)]
        self.handoff = HandoffHeader()  # what an older module left for TDH.SYS.UPDATE
        self.td_build_count = 0  # TDs whose measurement is under way; mutex
        self.mig_interrupted_count = 0  # interrupted migration calls; mutex
        self.update_compatibility = False  # TDH.SYS.UPDATE: refuse state of another module's making
        self.mutex = Lock()  # for short read-modify-write of Python-side counters
        self.platform: PlatformConfig  # what SYS.INIT found; there is none before

    def keyed(self, pa: int, hkid: int) -> int:
        """The bus address of a page under `hkid`."""
        return pa | hkid << self.hkid_shift

    def hkid_of(self, pa: int) -> int:
        """The KeyID in a bus address."""
        return (pa & self.hkid_mask) >> self.hkid_shift
