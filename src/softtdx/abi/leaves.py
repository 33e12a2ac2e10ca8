"""Leaf functions: the numbers in RAX of SEAMCALL and TDCALL, and what each leaf takes and returns.

RAX of a call: leaf 15:0, version 23:16, the rest 0; bit 63 turns a SEAMCALL to P-SEAMLDR (TDX Module ABI,
"Interface Functions"; SEAM Loader interface specification).
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Final, NamedTuple

from softtdx.abi._data import load

__all__ = [
    "COMMON_STATUSES",
    "SEAMLDR_CALL",
    "LeafInfo",
    "Register",
    "SeamcallLeaf",
    "SeamldrLeaf",
    "TdcallLeaf",
    "find_leaf",
    "leaf_infos",
    "rax_for",
    "split_rax",
]

SEAMLDR_CALL: Final = 1 << 63
LEAF_MASK: Final = 0xFFFF
VERSION_SHIFT: Final = 16
# Bits of RAX that must be 0 when a leaf of the TDX module is called.
RAX_RESERVED: Final = ~0xFF_FFFF & (1 << 64) - 1


class SeamcallLeaf(IntEnum):
    """Host-side leaf functions, TDH.*."""

    VP_ENTER = 0
    MNG_ADDCX = 1
    MEM_PAGE_ADD = 2
    MEM_SEPT_ADD = 3
    VP_ADDCX = 4
    MEM_PAGE_RELOCATE = 5
    MEM_PAGE_AUG = 6
    MEM_RANGE_BLOCK = 7
    MNG_KEY_CONFIG = 8
    MNG_CREATE = 9
    VP_CREATE = 10
    MNG_RD = 11
    MEM_RD = 12
    MNG_WR = 13
    MEM_WR = 14
    MEM_PAGE_DEMOTE = 15
    MR_EXTEND = 16
    MR_FINALIZE = 17
    VP_FLUSH = 18
    MNG_VPFLUSHDONE = 19
    MNG_KEY_FREEID = 20
    MNG_INIT = 21
    VP_INIT = 22
    MEM_PAGE_PROMOTE = 23
    PHYMEM_PAGE_RDMD = 24
    MEM_SEPT_RD = 25
    VP_RD = 26
    MNG_KEY_RECLAIMID = 27
    PHYMEM_PAGE_RECLAIM = 28
    MEM_PAGE_REMOVE = 29
    MEM_SEPT_REMOVE = 30
    SYS_KEY_CONFIG = 31
    SYS_INFO = 32
    SYS_INIT = 33
    SYS_RD = 34
    SYS_LP_INIT = 35
    SYS_TDMR_INIT = 36
    SYS_RDALL = 37
    MEM_TRACK = 38
    MEM_RANGE_UNBLOCK = 39
    PHYMEM_CACHE_WB = 40
    PHYMEM_PAGE_WBINVD = 41
    MEM_SEPT_WR = 42
    VP_WR = 43
    SYS_LP_SHUTDOWN = 44
    SYS_CONFIG = 45
    SERVTD_BIND = 48
    SERVTD_PREBIND = 49
    SYS_SHUTDOWN = 52
    SYS_UPDATE = 53
    PHYMEM_PAMT_ADD = 58
    PHYMEM_PAMT_REMOVE = 59
    EXPORT_ABORT = 64
    EXPORT_BLOCKW = 65
    EXPORT_RESTORE = 66
    EXPORT_MEM = 68
    EXPORT_PAUSE = 70
    EXPORT_TRACK = 71
    EXPORT_STATE_IMMUTABLE = 72
    EXPORT_STATE_TD = 73
    EXPORT_STATE_VP = 74
    EXPORT_UNBLOCKW = 75
    IMPORT_ABORT = 80
    IMPORT_END = 81
    IMPORT_COMMIT = 82
    IMPORT_MEM = 83
    IMPORT_TRACK = 84
    IMPORT_STATE_IMMUTABLE = 85
    IMPORT_STATE_TD = 86
    IMPORT_STATE_VP = 87
    MIG_STREAM_CREATE = 96

    @property
    def mnemonic(self) -> str:
        """The name in documents: TDH.MNG.CREATE."""
        return "TDH." + _dotted(self._name_)


class TdcallLeaf(IntEnum):
    """Guest-side leaf functions, TDG.*."""

    VP_VMCALL = 0
    VP_INFO = 1
    MR_RTMR_EXTEND = 2
    VP_VEINFO_GET = 3
    MR_REPORT = 4
    VP_CPUIDVE_SET = 5
    MEM_PAGE_ACCEPT = 6
    VM_RD = 7
    VM_WR = 8
    VP_RD = 9
    VP_WR = 10
    SYS_RD = 11
    SYS_RDALL = 12
    SERVTD_RD = 18
    SERVTD_WR = 20
    MR_VERIFYREPORT = 22
    MEM_PAGE_ATTR_RD = 23
    MEM_PAGE_ATTR_WR = 24
    VP_ENTER = 25
    VP_INVEPT = 26
    VP_INVVPID = 27

    @property
    def mnemonic(self) -> str:
        """The name in documents: TDG.VP.INFO."""
        return "TDG." + _dotted(self._name_)


class SeamldrLeaf(IntEnum):
    """P-SEAMLDR functions, called by SEAMCALL with RAX bit 63 set."""

    INFO = SEAMLDR_CALL | 0
    INSTALL = SEAMLDR_CALL | 1
    SHUTDOWN = SEAMLDR_CALL | 2
    SEAMINFO = SEAMLDR_CALL | 3
    CLEANUP = SEAMLDR_CALL | 4

    @property
    def mnemonic(self) -> str:
        """The name in documents: SEAMLDR.INSTALL."""
        return "SEAMLDR." + self._name_


def _dotted(name: str) -> str:
    return name.replace("_", ".")


# What nearly every leaf may return; `LeafInfo.statuses` lists the others.
COMMON_STATUSES: Final = (
    "OPERAND_INVALID",
    "OPERAND_ADDR_RANGE_ERROR",
    "OPERAND_BUSY",
    "OPERAND_BUSY_HOST_PRIORITY",
    "PAGE_METADATA_INCORRECT",
    "TD_FATAL",
    "TD_KEYS_NOT_CONFIGURED",
    "TDCS_NOT_ALLOCATED",
    "OP_STATE_INCORRECT",
    "SYS_NOT_READY",
    "SYS_SHUTDOWN",
)


class Register(NamedTuple):
    """One operand: the register and what it holds."""

    name: str
    meaning: str


@dataclass(frozen=True)
class LeafInfo:
    """What a leaf does, takes and returns, for people; the dispatchers do not read it."""

    mnemonic: str
    number: int
    versions: str
    since: str
    summary: str
    inputs: tuple[Register, ...]
    outputs: tuple[Register, ...]
    statuses: tuple[str, ...]


def rax_for(leaf: int, version: int = 0) -> int:
    """RAX of a call."""
    return int(leaf) | version << VERSION_SHIFT


def split_rax(rax: int) -> tuple[int, int, int]:
    """(leaf, version, reserved bits that are set) of a module call's RAX."""
    return rax & LEAF_MASK, rax >> VERSION_SHIFT & 0xFF, rax & RAX_RESERVED


@cache
def leaf_infos() -> dict[str, LeafInfo]:
    """Every leaf by its mnemonic: host side, guest side, SEAM loader."""
    return {
        row["mnemonic"]: LeafInfo(
            row["mnemonic"],
            row["number"],
            row["versions"],
            row["since"],
            row["summary"],
            tuple(Register(*pair) for pair in row["in"]),
            tuple(Register(*pair) for pair in row["out"]),
            tuple(row["statuses"]),
        )
        for row in load("leaves")["leaves"]
    }


def find_leaf(text: str) -> LeafInfo | None:
    """A leaf by the name people type: TDH.MNG.CREATE, tdh_mng_create, or MNG.CREATE when no other leaf ends so."""
    wanted = text.strip().upper().replace("_", ".")
    infos = leaf_infos()
    if wanted in infos:
        return infos[wanted]
    endings = [info for name, info in infos.items() if name.split(".", 1)[1] == wanted]
    return endings[0] if len(endings) == 1 else None
