"""Secure EPT entries: bits, states and which leaf admits which state; and the bits of an ordinary EPT entry.

An L1 S-EPT entry (TDX Module Base Spec, "Secure EPT"; SDM 28.3 for the EPT bits):

    63   62:57        56   55   54    53    52  51:12  11    10  9  8  7     6     5:3  2:0
    SVE  see below    TDP  TDB  TDBW  TDEX  HP  HPA    TDEL  XU  D  A  leaf  IPAT  MT   XWR

    VGP 57, TDAL1 to TDAL3 60:58 (L2 VM 1, 2, 3 has an entry for the same range), 62:61 kept for the IOMMU. TDEL is
    the module's lock on the entry, HP its host-priority flag. While a page is being accepted bits 20:12 of a pending
    entry count the 4-KiB parts done.

The state is spread over D (bit 0 of the encoding), 56:53 (bits 4:1) and leaf, IPAT (bits 6:5).
Entries are plain ints here: they are read and written on every walk.
"""

from enum import IntEnum
from typing import Final

from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf

R: Final = 1 << 0
W: Final = 1 << 1
X: Final = 1 << 2
RWX: Final = R | W | X
MT_SHIFT: Final = 3
MT_MASK: Final = 7 << MT_SHIFT
MT_UC: Final = 0 << MT_SHIFT
MT_WB: Final = 6 << MT_SHIFT
IPAT: Final = 1 << 6
LEAF: Final = 1 << 7
A: Final = 1 << 8
D: Final = 1 << 9
XU: Final = 1 << 10
TDEL: Final = 1 << 11
HPA_MASK: Final = 0x000F_FFFF_FFFF_F000
HP: Final = 1 << 52
TDEX: Final = 1 << 53
TDBW: Final = 1 << 54
TDB: Final = 1 << 55
TDP: Final = 1 << 56
VGP: Final = 1 << 57  # L1 and L2; the others of this block are L1's
TDAL1: Final = 1 << 58
TDAL2: Final = 1 << 59
TDAL3: Final = 1 << 60
TDAL_MASK: Final = TDAL1 | TDAL2 | TDAL3
SVE: Final = 1 << 63  # suppress #VE

STATE_MASK: Final = D | IPAT | LEAF | TDEX | TDBW | TDB | TDP
ACCEPT_COUNTER_SHIFT: Final = 12
ACCEPT_COUNTER_MASK: Final = 0x1FF << ACCEPT_COUNTER_SHIFT

# L2 entries keep the attributes the L1 VMM chose in bits the CPU ignores while the entry is blocked.
L2_TDRD: Final = 1 << 3
L2_TDXS: Final = 1 << 4
L2_TDXU: Final = 1 << 5
L2_TDPWA: Final = 1 << 52
L2_PWA: Final = 1 << 58
L2_TDWR: Final = 1 << 59
L2_SSS: Final = 1 << 60
L2_STATE_MASK: Final = R | IPAT | LEAF | TDB

# What TDH.MEM.SEPT.RD and the leaves that fail on an entry show of it.
ARCH_LEAF_MASK: Final = RWX | XU | MT_MASK | HPA_MASK | IPAT | LEAF | SVE
ARCH_NON_LEAF_MASK: Final = RWX | XU | LEAF

ENTRY_SIZE: Final = 8
ENTRIES_PER_PAGE: Final = 512
GPA_SHARED_BIT_48: Final = 1 << 47  # GPAW = 0: the top GPA bit of a 48-bit TD
GPA_SHARED_BIT_52: Final = 1 << 51  # GPAW = 1


class PageLevel(IntEnum):
    """Level of an S-EPT entry: 0 maps 4 KiB; the root table of a 5-level tree holds level 4 entries."""

    PAGE_4K = 0
    PAGE_2M = 1
    PAGE_1G = 2
    PML4 = 3
    PML5 = 4


class SeptState(IntEnum):
    """State of an L1 S-EPT entry, by its encoding."""

    FREE = 0x0E
    REMOVED = 0x0C
    NL_MAPPED = 0x00
    NL_BLOCKED = 0x08
    MAPPED = 0x60
    BLOCKED = 0x68
    BLOCKEDW = 0x64
    EXPORTED_BLOCKEDW = 0x66
    EXPORTED_DIRTY = 0x63
    EXPORTED_DIRTY_BLOCKEDW = 0x67
    PENDING = 0x70
    PENDING_BLOCKED = 0x78
    PENDING_BLOCKEDW = 0x74
    PENDING_EXPORTED_BLOCKEDW = 0x76
    PENDING_EXPORTED_DIRTY = 0x73
    PENDING_EXPORTED_DIRTY_BLOCKEDW = 0x77


class L2SeptState(IntEnum):
    """State of an L2 S-EPT entry, by its encoding: TDB, IPAT, leaf and R in bits 0 to 3."""

    FREE = 0x00
    NL_MAPPED = 0x08
    NL_BLOCKED = 0x01
    MAPPED = 0x06
    BLOCKED = 0x07


# The number SEPT.RD shows for a state (RDX bits 15:8).
PUBLIC_STATE: Final[dict[SeptState, int]] = {
    SeptState.FREE: 0,
    SeptState.REMOVED: 5,
    SeptState.NL_MAPPED: 132,
    SeptState.NL_BLOCKED: 129,
    SeptState.MAPPED: 4,
    SeptState.BLOCKED: 1,
    SeptState.BLOCKEDW: 8,
    SeptState.EXPORTED_BLOCKEDW: 9,
    SeptState.EXPORTED_DIRTY: 11,
    SeptState.EXPORTED_DIRTY_BLOCKEDW: 12,
    SeptState.PENDING: 2,
    SeptState.PENDING_BLOCKED: 3,
    SeptState.PENDING_BLOCKEDW: 16,
    SeptState.PENDING_EXPORTED_BLOCKEDW: 17,
    SeptState.PENDING_EXPORTED_DIRTY: 19,
    SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW: 20,
}
L2_PUBLIC_STATE: Final[dict[L2SeptState, int]] = {
    L2SeptState.FREE: 64,
    L2SeptState.NL_MAPPED: 196,
    L2SeptState.NL_BLOCKED: 193,
    L2SeptState.MAPPED: 68,
    L2SeptState.BLOCKED: 65,
}

# Sets of states the module's checks are written in.
WRITE_BLOCKING_LIVE_EXPORT_ALLOWED: Final = frozenset(
    {
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
PAUSED_EXPORT_ALLOWED: Final = frozenset(
    {
        SeptState.MAPPED,
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
FIRST_TIME_EXPORT_ALLOWED: Final = frozenset(
    {
        SeptState.MAPPED,
        SeptState.BLOCKEDW,
        SeptState.PENDING,
        SeptState.PENDING_BLOCKEDW,
    }
)
EXPORT_CANCEL_ALLOWED: Final = frozenset(
    {
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
FIRST_TIME_IMPORT_ALLOWED: Final = frozenset({SeptState.FREE, SeptState.REMOVED})
RE_IMPORT_ALLOWED: Final = frozenset({SeptState.MAPPED, SeptState.PENDING})
IMPORT_CANCEL_ALLOWED: Final = frozenset({SeptState.MAPPED, SeptState.PENDING})
MAPPED_OR_PENDING: Final = frozenset({SeptState.MAPPED, SeptState.PENDING})
ANY_EXPORTED: Final = frozenset(
    {
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
ANY_EXPORTED_AND_DIRTY: Final = frozenset(
    {
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
ANY_EXPORTED_AND_NON_DIRTY: Final = frozenset(
    {
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
    }
)
ANY_PENDING: Final = frozenset(
    {
        SeptState.PENDING,
        SeptState.PENDING_BLOCKED,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
ANY_PENDING_AND_GUEST_ACCEPTABLE: Final = frozenset({SeptState.PENDING, SeptState.PENDING_EXPORTED_DIRTY})
ANY_BLOCKED: Final = frozenset({SeptState.NL_BLOCKED, SeptState.BLOCKED, SeptState.PENDING_BLOCKED})
ANY_BLOCKEDW: Final = frozenset(
    {
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
GUEST_FULLY_ACCESSIBLE_LEAF: Final = frozenset({SeptState.MAPPED, SeptState.EXPORTED_DIRTY})
TLB_TRACKING_REQUIRED: Final = frozenset(
    {
        SeptState.NL_MAPPED,
        SeptState.NL_BLOCKED,
        SeptState.MAPPED,
        SeptState.BLOCKED,
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING,
        SeptState.PENDING_BLOCKED,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
GUEST_ACCESSIBLE_LEAF: Final = frozenset(
    {
        SeptState.MAPPED,
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
    }
)
ANY_LEAF: Final = frozenset(
    {
        SeptState.MAPPED,
        SeptState.BLOCKED,
        SeptState.BLOCKEDW,
        SeptState.EXPORTED_BLOCKEDW,
        SeptState.EXPORTED_DIRTY,
        SeptState.EXPORTED_DIRTY_BLOCKEDW,
        SeptState.PENDING,
        SeptState.PENDING_BLOCKED,
        SeptState.PENDING_BLOCKEDW,
        SeptState.PENDING_EXPORTED_BLOCKEDW,
        SeptState.PENDING_EXPORTED_DIRTY,
        SeptState.PENDING_EXPORTED_DIRTY_BLOCKEDW,
    }
)
FREE_OR_REMOVED: Final = frozenset({SeptState.FREE, SeptState.REMOVED})

# One row a leaf, one column a state in the order of SeptState; x: the leaf may act on the entry.
_HOST_ROWS: dict[SeamcallLeaf, str] = {
    SeamcallLeaf.MEM_PAGE_ADD: "x...............",
    SeamcallLeaf.MEM_SEPT_ADD: "x.x.............",
    SeamcallLeaf.MEM_PAGE_RELOCATE: "....xxxxxxxxxxxx",
    SeamcallLeaf.MEM_PAGE_AUG: "xx..............",
    SeamcallLeaf.MEM_RANGE_BLOCK: "..x.x.x...x.x...",
    SeamcallLeaf.MEM_RD: "....x.xxxx......",
    SeamcallLeaf.MEM_WR: "....x...x.......",
    SeamcallLeaf.MEM_PAGE_DEMOTE: "....xx....xx....",
    SeamcallLeaf.MR_EXTEND: "....x...........",
    SeamcallLeaf.MEM_PAGE_PROMOTE: "..xx............",
    SeamcallLeaf.MEM_SEPT_RD: "xxxxxxxxxxxxxxxx",
    SeamcallLeaf.MEM_PAGE_REMOVE: "....xxx...xxx...",
    SeamcallLeaf.MEM_SEPT_REMOVE: "..xx............",
    SeamcallLeaf.MEM_RANGE_UNBLOCK: "...x.x.....x....",
    SeamcallLeaf.EXPORT_BLOCKW: "....x...x.x...x.",
    SeamcallLeaf.EXPORT_RESTORE: ".......xxx...xxx",
    SeamcallLeaf.EXPORT_MEM: "....x.xxxxx.xxxx",
    SeamcallLeaf.EXPORT_UNBLOCKW: "......xx.x..xx.x",
    SeamcallLeaf.IMPORT_MEM: "xx..x.....x.....",
}
_GUEST_ROWS: dict[TdcallLeaf, str] = {
    TdcallLeaf.MEM_PAGE_ACCEPT: "..........x...x.",
    TdcallLeaf.MEM_PAGE_ATTR_RD: "....x.xxxxx.xxxx",
    TdcallLeaf.MEM_PAGE_ATTR_WR: "....x...x.x...x.",
}


def _allowed(rows: dict[SeamcallLeaf, str] | dict[TdcallLeaf, str]) -> dict[int, frozenset[int]]:
    states = list(SeptState)
    return {
        int(leaf): frozenset(int(state) for state, mark in zip(states, row, strict=True) if mark == "x")
        for leaf, row in rows.items()
    }


HOST_ALLOWED: Final = _allowed(_HOST_ROWS)
GUEST_ALLOWED: Final = _allowed(_GUEST_ROWS)


def state_encoding(entry: int) -> int:
    """The 7-bit state encoding in an L1 entry."""
    return entry >> 9 & 1 | (entry >> 53 & 0xF) << 1 | (entry >> 6 & 3) << 5


def state_bits(state: int) -> int:
    """The bits of an L1 entry that say `state`."""
    return (state & 1) << 9 | (state >> 1 & 0xF) << 53 | (state >> 5 & 3) << 6


def state_of(entry: int) -> SeptState | None:
    """The state of an L1 entry; None when the module never writes such an encoding."""
    return _STATES.get(state_encoding(entry))


def with_state(entry: int, state: int) -> int:
    """The same entry in another state."""
    return entry & ~STATE_MASK | state_bits(state)


def l2_state_of(entry: int) -> L2SeptState | None:
    """The state of an L2 entry; a leaf's R bit is a permission and says nothing of its state."""
    encoding = entry >> 55 & 1 | (entry >> 6 & 3) << 1
    if not entry & LEAF:
        encoding |= (entry & 1) << 3
    return _L2_STATES.get(encoding)


def l2_state_bits(state: int) -> int:
    """The bits of an L2 entry that say `state`, permissions aside."""
    return (state & 1) << 55 | (state >> 1 & 3) << 6


def make_leaf(hpa: int, state: int, *, permissions: int = RWX | XU, suppress_ve: bool = True) -> int:
    """An L1 leaf entry: write-back, PAT ignored. The module stores addresses with the TD's private HKID in them."""
    return permissions | MT_WB | hpa & HPA_MASK | state_bits(state) | (SVE if suppress_ve else 0)


def make_non_leaf(hpa: int, state: int = SeptState.NL_MAPPED) -> int:
    """An L1 entry that points to the next S-EPT page."""
    return RWX | XU | hpa & HPA_MASK | state_bits(state) | SVE


def hpa_of(entry: int) -> int:
    """The page an entry points to."""
    return entry & HPA_MASK


def is_leaf(entry: int) -> bool:
    """Whether the leaf bit says that the entry maps memory; the module sets it at level 0 too."""
    return bool(entry & LEAF)


def accept_counter(entry: int) -> int:
    """How many 4-KiB parts of a pending page have been accepted."""
    return (entry & ACCEPT_COUNTER_MASK) >> ACCEPT_COUNTER_SHIFT


def level_shift(level: int) -> int:
    """log2 of what one entry of this level covers."""
    return 12 + 9 * level


def level_size(level: int) -> int:
    """Bytes that one entry of this level covers."""
    return 1 << (12 + 9 * level)


def entry_index(gpa: int, level: int) -> int:
    """Which of the 512 entries of its page maps this GPA at this level."""
    return gpa >> level_shift(level) & 0x1FF


def host_leaf_allowed(leaf: int, entry: int) -> bool:
    """Whether a SEAMCALL leaf may act on an entry in this state."""
    return state_encoding(entry) in HOST_ALLOWED.get(leaf, _NONE)


def guest_leaf_allowed(leaf: int, entry: int) -> bool:
    """Whether a TDCALL leaf may act on an entry in this state."""
    return state_encoding(entry) in GUEST_ALLOWED.get(leaf, _NONE)


def arch_info(entry: int, level: int) -> int:
    """RDX of SEPT.RD and of a failed walk: level 2:0, public state 15:8, VM index 17:16 (0, L1)."""
    state = state_of(entry)
    return level & 7 | (PUBLIC_STATE[state] if state is not None else 0) << 8


def l2_arch_info(entry: int, level: int, vm: int) -> int:
    """The same for an L2 entry of VM 1 to 3."""
    state = l2_state_of(entry)
    return level & 7 | (L2_PUBLIC_STATE[state] if state is not None else 0) << 8 | (vm & 3) << 16


def describe(entry: int) -> str:
    """One line for any 64-bit value read as an L1 entry."""
    state = state_of(entry)
    rights = "".join(letter if entry & bit else "-" for letter, bit in (("r", R), ("w", W), ("x", X)))
    flags = [name for name, bit in _FLAG_NAMES if entry & bit]
    name = state.name if state is not None else f"no state ({state_encoding(entry):#04x})"
    return f"{name} {rights} hpa={hpa_of(entry):#x} mt={(entry & MT_MASK) >> MT_SHIFT} [{' '.join(flags)}]"


_FLAG_NAMES: Final = (
    ("IPAT", IPAT),
    ("LEAF", LEAF),
    ("A", A),
    ("D", D),
    ("TDEL", TDEL),
    ("HP", HP),
    ("TDEX", TDEX),
    ("TDBW", TDBW),
    ("TDB", TDB),
    ("TDP", TDP),
    ("VGP", VGP),
    ("TDAL1", TDAL1),
    ("TDAL2", TDAL2),
    ("TDAL3", TDAL3),
    ("SVE", SVE),
)
_NONE: Final[frozenset[int]] = frozenset()
_STATES: Final = {int(state): state for state in SeptState}
_L2_STATES: Final = {int(state): state for state in L2SeptState}

# What the module writes into every entry of a fresh S-EPT page.
FREE_ENTRY: Final = state_bits(SeptState.FREE) | SVE
L2_FREE_ENTRY: Final = 0
