"""A TD as a leaf sees it: its TDR read and checked, its TDCS within reach.

`open_td` is what nearly every leaf starts with; it does the checks in the specified order: TDR operand, PAMT lock and
type, FATAL, key state, TDCS allocated, OP_STATE lock and OP_STATE.
"""

import struct
from enum import IntEnum
from typing import Final

from softtdx.abi.opstate import HOST_MASKS, LifecycleState, OpState
from softtdx.abi.status import Operand, Status

from . import tdcs, tdr
from .atomics import add64
from .context import Call
from .control_pages import ControlPages
from .errors import LeafError
from .ids import OP_STATE, RCX
from .locks import EXCLUSIVE, SHARED
from .pamt import PageType, PamtPage, lock_implicit, lock_page

__all__ = ["EXCLUSIVE", "NO_LOCK", "SHARED", "LockId", "Td", "check_op_state", "open_td", "open_td_of", "open_tdr"]

NO_LOCK: Final = None

TDR_PAGE: Final = int(PageType.TDR)
KEYS_CONFIGURED: Final = int(LifecycleState.KEYS_CONFIGURED)
ANY_STATE: Final = (1 << len(OpState)) - 1

# FATAL, NUM_TDCX, CHLDCNT, LIFECYCLE_STATE, nine TDCX_PA, [TD_UUID and reserved], HKID, PKG_CONFIG_BITMAP
_HEAD: Final = struct.Struct("<B3xIQI4x9Q160xH6xQ")
assert _HEAD.size == tdr.HEAD_SIZE
_unpack_head: Final = _HEAD.unpack
HEAD_SIZE: Final = tdr.HEAD_SIZE
TDCX_PAGES: Final = slice(4, 13)  # of the fields of _HEAD
ROOT_PAGE: Final = 4 + (tdcs.SEPT_ROOT >> 12)


class LockId(IntEnum):
    """Locks inside a TDCS: the key in the lock table is the TDR's address | this."""

    OP_STATE = 8
    SEPT = 9
    EPOCH = 10
    RTMR = 11
    SERVTD_BINDINGS = 12
    MIGRATION = 13
    X2APIC = 14


_OP_STATE_LOCK: Final = int(LockId.OP_STATE)


class Td(ControlPages):
    """A TD whose TDR is locked: values of its TDR as read under the lock, and accessors of its TDCS.

    `tdr` is the TDR's bus address (global KeyID), `key_bits` the TD's KeyID in address position, `p0` the bus address
    of its first TDCS page. TDCS offsets are those of `module.tdcs`.
    """

    __slots__ = (
        "_head", "_pages", "fatal", "hkid", "key_bits", "lifecycle", "num_tdcx", "op_state", "p0", "pa", "pamt", "tdr",
    )  # fmt: skip

    def __init__(self, call: Call, pa: int, page: PamtPage) -> None:
        """Read the TDR at `pa`, whose PAMT entry `page` the leaf holds."""
        cpu = call.cpu
        g = call.g
        self.call = call
        self._cpu = cpu
        self.pa = pa
        self.pamt = page
        self.tdr = base = pa | g.global_key_bits
        head = _unpack_head(cpu.read(base, HEAD_SIZE))
        self.fatal, self.num_tdcx, _, self.lifecycle, p0 = head[:5]
        self.hkid: int = head[-2]
        key: int = self.hkid << g.hkid_shift
        self.key_bits = key
        self._head = head
        self._pages: list[int] | None = None
        self.p0 = p0 | key if self.num_tdcx else 0
        self.op_state = -1  # read by check_op_state

    @property
    def pages(self) -> list[int]:
        """The bus addresses of the TDCS pages that the TD has."""
        pages = self._pages
        if pages is None:
            key = self.key_bits
            pages = self._pages = [page | key for page in self._head[TDCX_PAGES][: self.num_tdcx]]
        return pages

    @property
    def packages_keyed(self) -> int:
        """PKG_CONFIG_BITMAP: the packages on which the TD's key is configured."""
        bitmap: int = self._head[-1]
        return bitmap

    @property
    def sept_root(self) -> int:
        """The bus address of the TDCS page that is the root of the secure EPT; for a TD that has its TDCS."""
        root: int = self._head[ROOT_PAGE]
        return root | self.key_bits

    # --- what leaves do to every TD
    def add_children(self, count: int) -> None:
        """CHLDCNT += count, atomically: leaves that hold the TDR shared run at the same time."""
        add64(self._cpu, self.tdr + tdr.CHLDCNT, count)

    def lock(self, which: LockId, exclusive: bool, operand: int, *, guest: bool = False) -> None:
        """Take one of the TDCS's locks for the rest of the leaf. LeafError OPERAND_BUSY."""
        self.call.lock(self.pa | which, exclusive, operand, guest=guest)

    def unlock(self, which: LockId, exclusive: bool) -> None:
        """Give it back before the leaf is over."""
        self.call.unlock(self.pa | which, exclusive)

    def set_op_state(self, state: OpState) -> None:
        """Move the TD to another OP_STATE."""
        self.op_state = int(state)
        self.wr32(tdcs.OP_STATE, int(state))

    def set_lifecycle(self, state: LifecycleState) -> None:
        """Move the TD's key to another life-cycle state."""
        self.lifecycle = int(state)
        self._cpu.wr32(self.tdr + tdr.LIFECYCLE_STATE, int(state))

    def keyed(self, pa: int) -> int:
        """The bus address of a page under this TD's KeyID."""
        return pa | self.key_bits


def open_tdr(call: Call, pa: int, operand: int = RCX, exclusive: bool = SHARED, *, guest: bool = False) -> Td:
    """Check and lock a TDR operand and read it; nothing is checked of the TD's state."""
    return Td(call, pa, lock_page(call, pa, TDR_PAGE, exclusive, operand, guest=guest))


def check_op_state(call: Call, td: Td, leaf: int | None, op_lock: bool | None, *, guest: bool = False) -> None:
    """FATAL, keys, TDCS, then the OP_STATE lock (`op_lock`: SHARED, EXCLUSIVE or NO_LOCK) and OP_STATE by leaf."""
    if td.fatal:
        raise LeafError(Status.TD_FATAL)
    if td.lifecycle != KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
    if td.num_tdcx < tdcs.PAGES_BASE:
        raise LeafError(Status.TDCS_NOT_ALLOCATED)
    if op_lock is not None:
        call.lock(td.pa | _OP_STATE_LOCK, op_lock, OP_STATE, guest=guest)
    td.op_state = state = call.cpu.rd32(td.p0 + tdcs.OP_STATE)
    if leaf is not None and not HOST_MASKS.get(leaf, ANY_STATE) >> state & 1:
        raise LeafError(Status.OP_STATE_INCORRECT, state)


def open_td(
    call: Call,
    pa: int,
    leaf: int,
    operand: int = RCX,
    exclusive: bool = SHARED,
    op_lock: bool | None = SHARED,
) -> Td:
    """The beginning of most leaves: lock the TDR operand and check the TD's state for `leaf`.

    LeafError: those of `pamt.lock_page` with `operand`, TD_FATAL, TD_KEYS_NOT_CONFIGURED, TDCS_NOT_ALLOCATED,
    OPERAND_BUSY (OP_STATE), OP_STATE_INCORRECT with the state in bits 31:0.
    """
    td = Td(call, pa, lock_page(call, pa, TDR_PAGE, exclusive, operand))
    check_op_state(call, td, leaf, op_lock)
    return td


def open_td_of(call: Call, page: PamtPage, exclusive: bool = SHARED, operand: int = Operand.TDR) -> Td:
    """The TD that owns `page` (a TDVPR, a TDCX): its TDR locked implicitly and read; its state is not checked."""
    owner = page.owner
    return Td(call, owner, lock_implicit(call, owner, exclusive, operand))
