"""TD-wide states: OP_STATE with the leaves each one admits, the key life cycle, and the states of a vCPU.

OP_STATE steps a TD through build, run and migration (TDX Module Base Spec, "TD Operation State Machine").
"""

from enum import IntEnum
from typing import Final

from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf

__all__ = ["LifecycleState", "OpState", "VcpuState", "guest_leaf_allowed", "leaf_allowed", "leaf_checks_op_state"]


class OpState(IntEnum):
    """TDCS.OP_STATE: how far a TD's build, run or migration has come."""

    UNINITIALIZED = 0
    INITIALIZED = 1
    RUNNABLE = 2
    LIVE_EXPORT = 3
    PAUSED_EXPORT = 4
    POST_EXPORT = 5
    MEMORY_IMPORT = 6
    STATE_IMPORT = 7
    POST_IMPORT = 8
    LIVE_IMPORT = 9
    FAILED_IMPORT = 10
    START_IMPORT = 11


class LifecycleState(IntEnum):
    """TDR.LIFECYCLE_STATE: what the TD's private key ID and key are good for."""

    HKID_ASSIGNED = 0
    KEYS_CONFIGURED = 1
    BLOCKED = 2
    TEARDOWN = 3


class VcpuState(IntEnum):
    """TDVPS.STATE: whether a vCPU can be entered."""

    UNINITIALIZED = 0
    READY = 2
    ACTIVE = 4
    DISABLED = 8


# Sets of states the module's checks are written in.
TLB_TRACKING_REQUIRED: Final = frozenset({OpState.RUNNABLE, OpState.LIVE_EXPORT, OpState.LIVE_IMPORT})
ANY_INITIALIZED: Final = frozenset(
    {
        OpState.INITIALIZED,
        OpState.RUNNABLE,
        OpState.LIVE_EXPORT,
        OpState.PAUSED_EXPORT,
        OpState.POST_EXPORT,
        OpState.MEMORY_IMPORT,
        OpState.STATE_IMPORT,
        OpState.POST_IMPORT,
        OpState.LIVE_IMPORT,
        OpState.FAILED_IMPORT,
    }
)
ANY_FINALIZED: Final = frozenset(
    {
        OpState.RUNNABLE,
        OpState.LIVE_EXPORT,
        OpState.PAUSED_EXPORT,
        OpState.POST_EXPORT,
        OpState.MEMORY_IMPORT,
        OpState.STATE_IMPORT,
        OpState.POST_IMPORT,
        OpState.LIVE_IMPORT,
    }
)
EXPORT_IN_ORDER: Final = frozenset({OpState.LIVE_EXPORT, OpState.PAUSED_EXPORT})
IMPORT_IN_ORDER: Final = frozenset({OpState.MEMORY_IMPORT, OpState.STATE_IMPORT})
IMPORT_OUT_OF_ORDER: Final = frozenset({OpState.POST_IMPORT, OpState.LIVE_IMPORT})
IMPORT_IN_PROGRESS: Final = frozenset(
    {OpState.MEMORY_IMPORT, OpState.STATE_IMPORT, OpState.POST_IMPORT, OpState.LIVE_IMPORT}
)
SERVTD_BIND_OTHER_TD: Final = frozenset(
    {
        OpState.RUNNABLE,
        OpState.LIVE_EXPORT,
        OpState.PAUSED_EXPORT,
        OpState.POST_EXPORT,
        OpState.POST_IMPORT,
        OpState.LIVE_IMPORT,
    }
)

# One row a leaf, one column a state in numeric order; x: the leaf may run. A leaf without a row does not check
# OP_STATE by table.
_HOST_ROWS: dict[SeamcallLeaf, str] = {
    SeamcallLeaf.VP_ENTER: "..xx.....x..",
    SeamcallLeaf.MNG_ADDCX: "x...........",
    SeamcallLeaf.MEM_PAGE_ADD: ".x..........",
    SeamcallLeaf.MEM_SEPT_ADD: ".xxx..xxxx..",
    SeamcallLeaf.VP_ADDCX: ".x.....x....",
    SeamcallLeaf.MEM_PAGE_RELOCATE: ".xxxxx..xx..",
    SeamcallLeaf.MEM_PAGE_AUG: ".xxx.....x..",
    SeamcallLeaf.MEM_RANGE_BLOCK: ".xxxxx..xx..",
    SeamcallLeaf.VP_CREATE: ".x.....x....",
    SeamcallLeaf.MNG_RD: ".xxxxxxxxxx.",
    SeamcallLeaf.MEM_RD: ".xxxxxxxxxx.",
    SeamcallLeaf.MNG_WR: ".xxx..xxxxx.",
    SeamcallLeaf.MEM_WR: ".xxx..xxxxx.",
    SeamcallLeaf.MEM_PAGE_DEMOTE: ".xxxxx..xx..",
    SeamcallLeaf.MR_EXTEND: ".x..........",
    SeamcallLeaf.MR_FINALIZE: ".x..........",
    SeamcallLeaf.VP_FLUSH: "xxxxxxxxxxxx",
    SeamcallLeaf.MNG_INIT: "x...........",
    SeamcallLeaf.VP_INIT: ".x..........",
    SeamcallLeaf.MEM_PAGE_PROMOTE: ".xxxxx..xx..",
    SeamcallLeaf.MEM_SEPT_RD: ".xxxxxxxxxx.",
    SeamcallLeaf.VP_RD: ".xxxxxxxxxx.",
    SeamcallLeaf.MEM_PAGE_REMOVE: ".xxxxx..xxx.",
    SeamcallLeaf.MEM_SEPT_REMOVE: ".xxxxxxxxxx.",
    SeamcallLeaf.MEM_TRACK: ".xxxxxxxxx..",
    SeamcallLeaf.MEM_RANGE_UNBLOCK: ".xxxxx..xx..",
    SeamcallLeaf.VP_WR: ".xxx..xxxxx.",
    SeamcallLeaf.SERVTD_BIND: "xxxx....xx..",
    SeamcallLeaf.SERVTD_PREBIND: "xx..........",
    SeamcallLeaf.EXPORT_ABORT: "...xxx......",
    SeamcallLeaf.EXPORT_BLOCKW: "...x........",
    SeamcallLeaf.EXPORT_RESTORE: "..x.........",
    SeamcallLeaf.EXPORT_MEM: "...xxx......",
    SeamcallLeaf.EXPORT_PAUSE: "...x........",
    SeamcallLeaf.EXPORT_TRACK: "...xx.......",
    SeamcallLeaf.EXPORT_STATE_IMMUTABLE: "..x......x..",
    SeamcallLeaf.EXPORT_STATE_TD: "....x.......",
    SeamcallLeaf.EXPORT_STATE_VP: "....x.......",
    SeamcallLeaf.EXPORT_UNBLOCKW: "..xxxx......",
    SeamcallLeaf.IMPORT_ABORT: "......xxx.x.",
    SeamcallLeaf.IMPORT_END: "........xx..",
    SeamcallLeaf.IMPORT_COMMIT: "........x...",
    SeamcallLeaf.IMPORT_MEM: "......xxxx..",
    SeamcallLeaf.IMPORT_TRACK: "......xx....",
    SeamcallLeaf.IMPORT_STATE_IMMUTABLE: "x..........x",
    SeamcallLeaf.IMPORT_STATE_TD: "......x.....",
    SeamcallLeaf.IMPORT_STATE_VP: ".......x....",
    SeamcallLeaf.MIG_STREAM_CREATE: "xxx.........",
}
_GUEST_ROWS: dict[TdcallLeaf, str] = {
    TdcallLeaf.SERVTD_RD: "xxxxxxxxxxxx",
    TdcallLeaf.SERVTD_WR: "xxxx..xxxxxx",
}


def _masks(rows: dict[SeamcallLeaf, str] | dict[TdcallLeaf, str]) -> dict[int, int]:
    return {int(leaf): sum(1 << state for state, mark in enumerate(row) if mark == "x") for leaf, row in rows.items()}


# Bit n of a mask: OP_STATE n admits the leaf.
HOST_MASKS: Final = _masks(_HOST_ROWS)
GUEST_MASKS: Final = _masks(_GUEST_ROWS)
ANY_STATE: Final = (1 << len(OpState)) - 1


def leaf_checks_op_state(leaf: int) -> bool:
    """Whether a SEAMCALL leaf checks OP_STATE against the table at all."""
    return leaf in HOST_MASKS


def leaf_allowed(leaf: int, op_state: int) -> bool:
    """Whether a SEAMCALL leaf may run on a TD in this OP_STATE; a leaf without a row always may."""
    return bool(HOST_MASKS.get(leaf, ANY_STATE) >> op_state & 1)


def guest_leaf_allowed(leaf: int, op_state: int) -> bool:
    """Whether a TDCALL leaf of a service TD may touch a target TD in this OP_STATE."""
    return bool(GUEST_MASKS.get(leaf, ANY_STATE) >> op_state & 1)
