"""The secure EPT: the tree behind a TD's private GPA space, its entries and the locks on them.

The tree lies in pages that the host donated (the root is a page of TDCS), under the TD's private KeyID, and the
processor walks the same entries (TDX Module Base Spec, "Secure EPT"). An entry is a plain int; what its bits mean is
in `abi.sept`. Addresses here (`table`, `at`) carry the KeyID, as loads and stores need it.

An entry is locked by its TDEL bit, with LOCK CMPXCHG: nobody waits. A host that finds the lock held sets the entry's
HP bit, and until the host has had the lock a guest gets OPERAND_BUSY_HOST_PRIORITY.
"""

import struct
from collections.abc import Iterable
from typing import Final

from softtdx.abi import opstate
from softtdx.abi import sept as abi
from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf
from softtdx.abi.sept import (
    ACCEPT_COUNTER_MASK,
    ARCH_LEAF_MASK,
    ARCH_NON_LEAF_MASK,
    FREE_ENTRY,
    HP,
    HPA_MASK,
    IPAT,
    LEAF,
    MT_MASK,
    MT_SHIFT,
    MT_WB,
    RWX,
    STATE_MASK,
    SVE,
    TDEL,
    XU,
    R,
    SeptState,
    W,
    state_bits,
)
from softtdx.abi.status import Operand, Status
from softtdx.hw.isa import SeamCpu
from softtdx.hw.registers import Registers

from . import epoch, tdcs
from .context import Call
from .errors import LeafError
from .fatal import ModuleFatal
from .ids import SEPT_TREE
from .pamt import PamtPage
from .td import LockId, Td

ACCESS: Final = RWX | XU
"""Permissions of a present L1 entry: read, write, execute in both modes."""

BUSY: Final = -1
BUSY_HOST_PRIORITY: Final = -2


# --- states, as their bits stand in an entry: `entry & STATE_MASK` is compared with these
def _bits(states: Iterable[int]) -> frozenset[int]:
    return frozenset(state_bits(state) for state in states)


FREE: Final = state_bits(SeptState.FREE)
REMOVED: Final = state_bits(SeptState.REMOVED)
NL_MAPPED: Final = state_bits(SeptState.NL_MAPPED)
NL_BLOCKED: Final = state_bits(SeptState.NL_BLOCKED)
MAPPED: Final = state_bits(SeptState.MAPPED)
BLOCKED: Final = state_bits(SeptState.BLOCKED)
BLOCKEDW: Final = state_bits(SeptState.BLOCKEDW)
PENDING: Final = state_bits(SeptState.PENDING)
PENDING_BLOCKED: Final = state_bits(SeptState.PENDING_BLOCKED)
PENDING_BLOCKEDW: Final = state_bits(SeptState.PENDING_BLOCKEDW)
PENDING_EXPORTED_DIRTY: Final = state_bits(SeptState.PENDING_EXPORTED_DIRTY)
EXPORTED_DIRTY: Final = state_bits(SeptState.EXPORTED_DIRTY)

ANY_BLOCKED: Final = _bits(abi.ANY_BLOCKED)
ANY_BLOCKEDW: Final = _bits(abi.ANY_BLOCKEDW)
ANY_PENDING: Final = _bits(abi.ANY_PENDING)
ACCEPTABLE: Final = _bits(abi.ANY_PENDING_AND_GUEST_ACCEPTABLE)
GUEST_ACCESSIBLE: Final = _bits(abi.GUEST_ACCESSIBLE_LEAF)
MAPPED_OR_PENDING: Final = _bits(abi.MAPPED_OR_PENDING)
TRACKING_REQUIRED: Final = _bits(abi.TLB_TRACKING_REQUIRED)
_PUBLIC_STATE: Final = {state_bits(state): number for state, number in abi.PUBLIC_STATE.items()}

REMOVED_ENTRY: Final = REMOVED | SVE
_MIG_EPOCH_VALID: Final = 1 << 44
_MIG_EPOCH_SHIFT: Final = 12

_U64: Final = (1 << 64) - 1
_INVALID: Final = int(Status.OPERAND_INVALID)
_SEPT_LOCK: Final = int(LockId.SEPT)

_IMPORT_STATES: Final = frozenset(int(state) for state in opstate.IMPORT_IN_PROGRESS)

TREE: Final = -1
"""For `open_entry`: up to the level of the root's entries."""


def host_states(leaf: SeamcallLeaf) -> frozenset[int]:
    """The states of an entry on which a SEAMCALL leaf may act."""
    return _bits(abi.HOST_ALLOWED[leaf])


def guest_states(leaf: TdcallLeaf) -> frozenset[int]:
    """The states of an entry on which a TDCALL leaf may act."""
    return _bits(abi.GUEST_ALLOWED[leaf])


# --- operands
# Page information, the GPA operand of most memory leaves:  63:52 0 | 51:12 GPA | 11:3 0 | 2:0 level
_MISALIGNED: Final = tuple((1 << (12 + 9 * level)) - 1 & ~7 for level in range(8))


def page_info_valid(info: int, lowest: int, highest: int) -> bool:
    """Whether page information has no reserved bit set, a level in range and a GPA aligned to that level."""
    level = info & 7
    return lowest <= level <= highest and not info & _MISALIGNED[level] and info < 1 << 52


def _private_mask(width: int, virt_maxpa: int) -> int:
    return (-1 << min(width, virt_maxpa or 52) | 1 << (width - 1)) & _U64


# By GPAW (0: 48 bits, 1: 52 bits) and the virtual MAXPHYADDR of the TD (0: not virtualised): the bits that a private
# GPA must not have, which are the shared bit and all above the GPA width.
_PRIVATE_MASKS: Final = tuple(tuple(_private_mask(width, maxpa) for maxpa in range(256)) for width in (48, 52))


def forbidden_private(td: Td) -> int:
    """The bits that no private GPA of this TD has."""
    cpu = td.call.cpu
    return _PRIVATE_MASKS[cpu.rd8(td.p0 + tdcs.GPAW) & 1][cpu.rd8(td.p0 + tdcs.VIRT_MAXPA)]


def shared_bit(gpaw: int) -> int:
    """The GPA bit that makes an address shared."""
    return 1 << (51 if gpaw else 47)


# --- the walk
_RESERVED_MEMORY_TYPES: Final = frozenset((2 << MT_SHIFT, 3 << MT_SHIFT, 7 << MT_SHIFT))
_RESERVED_NON_LEAF: Final = MT_MASK | IPAT | LEAF
_LARGEST_PAGE: Final = 2
_RESERVED_LEAF: Final = (0, 0x1F_F000, 0x3FFF_F000)


def misconfigured(entry: int, level: int, leaf: bool) -> bool:
    """Whether no walk goes through an EPT entry: SDM 29.3.3.1, for a processor with execute-only translations."""
    if entry & (R | W) == W:
        return True
    if not entry & RWX:
        return False
    if leaf and level <= _LARGEST_PAGE:
        return bool(entry & _RESERVED_LEAF[level]) or entry & MT_MASK in _RESERVED_MEMORY_TYPES
    return bool(entry & _RESERVED_NON_LEAF)


def walk(cpu: SeamCpu, table: int, top: int, gpa: int, level: int) -> tuple[int, int, int]:
    """Go from the root page `table`, whose entries have level `top`, down to the entry of `gpa` at `level`.

    Returns (address of the entry, the entry, its level). The walk ends early at an entry that maps a page or that is
    not present; the level tells. ModuleFatal when it ends at one that the processor would not use, which without
    integrity protection the host can make of any.
    """
    at, entry, reached = cpu.walk_ept(table, top, gpa, level)
    if reached != level and misconfigured(entry, reached, bool(entry & LEAF)):
        raise ModuleFatal(f"the secure EPT is misconfigured at GPA {gpa:#x}, level {reached}: {entry:#x}")
    return at, entry, reached


def top_level(td: Td) -> int:
    """The level of the entries in the TD's root page: 3 for a 4-level tree, 4 for 5 levels."""
    return td.call.cpu.rd64(td.p0 + tdcs.EPTP) >> 3 & 7


def open_entry(call: Call, td: Td, info: int, lowest: int, highest: int, exclusive: bool) -> tuple[int, int]:
    """What most memory leaves do next after `open_td`: find and lock the entry that page information RCX names.

    `lowest`, `highest`: the levels the leaf takes; TREE stands for the level of the root's entries. `exclusive`: how
    the leaf locks the tree. Returns (address of the entry, the entry as locked); the caller unlocks it, the tree lock
    lives until the leaf ends.

    LeafError, in this order: OPERAND_INVALID RCX (page information, GPA), OPERAND_BUSY SEPT_TREE, EPT_WALK_FAILED RCX
    and OPERAND_BUSY RCX, these two with the entry met in RCX and RDX.
    """
    cpu = call.cpu
    p0 = td.p0
    top = cpu.rd64(p0 + tdcs.EPTP) >> 3 & 7
    level = info & 7
    if not lowest <= level <= (top if highest < 0 else highest) or info & _MISALIGNED[level] or info >> 52:
        raise LeafError(_INVALID, Operand.RCX)
    if (info & ~7) & _PRIVATE_MASKS[cpu.rd8(p0 + tdcs.GPAW) & 1][cpu.rd8(p0 + tdcs.VIRT_MAXPA)]:
        raise LeafError(_INVALID, Operand.RCX)
    call.lock(td.pa | _SEPT_LOCK, exclusive, SEPT_TREE)
    at, entry, reached = walk(cpu, td.sept_root, top, info, level)
    if reached != level:
        set_details(call.regs, entry, reached, call.g.hkid_mask)
        raise LeafError(Status.EPT_WALK_FAILED, Operand.RCX)
    locked = lock_host(cpu, at, entry)
    if locked < 0:
        set_details(call.regs, entry, level, call.g.hkid_mask)
        raise LeafError(Status.OPERAND_BUSY, Operand.RCX)
    return at, locked


def walk_to_leaf(td: Td, gpa: int) -> tuple[int, int, int]:
    """The entry that maps a private GPA, at whatever level: (its address, the entry, its level).

    LeafError OPERAND_INVALID RCX (the GPA), EPT_ENTRY_NOT_PRESENT RCX with the entry met in RCX and RDX.
    """
    call = td.call
    cpu = call.cpu
    p0 = td.p0
    if gpa & _PRIVATE_MASKS[cpu.rd8(p0 + tdcs.GPAW) & 1][cpu.rd8(p0 + tdcs.VIRT_MAXPA)]:
        raise LeafError(_INVALID, Operand.RCX)
    at, entry, level = walk(cpu, td.sept_root, cpu.rd64(p0 + tdcs.EPTP) >> 3 & 7, gpa, 0)
    if not entry & LEAF or not entry & 7:
        set_details(call.regs, entry, level, call.g.hkid_mask)
        raise LeafError(Status.EPT_ENTRY_NOT_PRESENT, Operand.RCX)
    return at, entry, level


def require_tracked(td: Td, entry: int, level: int, page: PamtPage) -> None:
    """What a leaf asks before it takes from the TD what `entry` points to: that no processor can still reach it.

    LeafError GPA_RANGE_NOT_BLOCKED RCX (with the entry in RCX and RDX) or TLB_TRACKING_NOT_DONE RCX; never while the
    TD cannot run, nor in a state that needs no tracking. `page`: the PAMT entry of what `entry` points to.
    """
    state = entry & STATE_MASK
    if state not in TRACKING_REQUIRED or not epoch.may_run(td):
        return
    if state not in ANY_BLOCKED:
        set_details(td.call.regs, without_accept_count(entry, level), level, td.call.g.hkid_mask)
        raise LeafError(Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)
    if not epoch.is_tracked(td, page.bepoch):
        raise LeafError(Status.TLB_TRACKING_NOT_DONE, Operand.RCX)


def somebody_waits(call: Call, td: Td) -> bool:
    """Whether a long leaf should make way: for another processor that wants the tree (INTERRUPTED_BUSY)."""
    return call.locks.host_waits(td.pa | _SEPT_LOCK)


# --- what an entry says
def leaf_hpa(entry: int, gpa: int, level: int) -> int:
    """The address, KeyID included, of `gpa` in the page that a leaf entry maps."""
    offset = (1 << (12 + 9 * level)) - 1
    return entry & HPA_MASK & ~offset | gpa & offset


def set_details(regs: Registers, entry: int, level: int, keyid_mask: int) -> None:
    """RCX and RDX of a leaf that reads or stumbles on an entry: its architectural view, its level and state."""
    state = entry & STATE_MASK
    if state == FREE:
        regs.rcx = SVE
    else:
        regs.rcx = entry & (ARCH_LEAF_MASK if entry & LEAF else ARCH_NON_LEAF_MASK) & ~keyid_mask
    regs.rdx = level | _PUBLIC_STATE.get(state, 0) << 8


def public_state(entry: int) -> int:
    """The number under which software knows an entry's state."""
    return _PUBLIC_STATE.get(entry & STATE_MASK, 0)


def aliased(entry: int, vm: int) -> int:
    """Whether L2 VM `vm` (1 to 3) has an entry for the same range; meaningful unless the entry is free."""
    return entry >> (57 + vm) & 1


# --- entries to be
def make_leaf(page: int, state: int, permissions: int = ACCESS) -> int:
    """A leaf entry for `page` (KeyID included); `state` as bits. Memory type write-back, PAT ignored, no #VE."""
    return permissions | MT_WB | page | state | SVE


def make_non_leaf(page: int) -> int:
    """An NL_MAPPED entry that points to the S-EPT page `page` (KeyID included)."""
    return ACCESS | page | NL_MAPPED | SVE


def with_state(entry: int, state: int) -> int:
    """The same entry in another state (bits), with the memory type that goes with it."""
    return entry & ~(STATE_MASK | MT_MASK) | state | (MT_WB if state & IPAT else 0) | SVE


def without_accept_count(entry: int, level: int) -> int:
    """A pending 2 MiB entry without the progress of an interrupted TDG.MEM.PAGE.ACCEPT."""
    if level == 1 and entry & STATE_MASK in ACCEPTABLE:
        return entry & ~ACCEPT_COUNTER_MASK
    return entry


_BLOCKED_OF: Final = {
    NL_MAPPED: NL_BLOCKED,
    MAPPED: BLOCKED,
    BLOCKEDW: BLOCKED,
    PENDING: PENDING_BLOCKED,
    PENDING_BLOCKEDW: PENDING_BLOCKED,
}


def blocked(entry: int, level: int) -> int:
    """An entry that TDH.MEM.RANGE.BLOCK admits, blocked: no new translation goes through it."""
    entry = without_accept_count(entry, level)
    state = entry & STATE_MASK
    if state not in _PENDING_BLOCKABLE:
        entry &= ~ACCESS
    return with_state(entry, _BLOCKED_OF[state])


_PENDING_BLOCKABLE: Final = frozenset((PENDING, PENDING_BLOCKEDW))


def unblocked(entry: int) -> int:
    """The entry as it was before it was blocked; one that is not blocked stays as it is."""
    state = entry & STATE_MASK
    if state == NL_BLOCKED:
        return with_state(entry, NL_MAPPED) | ACCESS
    if state == BLOCKED:
        return with_state(entry, MAPPED) | ACCESS
    if state == PENDING_BLOCKED:
        return with_state(entry, PENDING)
    return entry


def removed_in_import(mig_epoch: int) -> int:
    """What a removed page leaves behind while an import is in progress: it may not be imported again this epoch."""
    return REMOVED_ENTRY | _MIG_EPOCH_VALID | mig_epoch << _MIG_EPOCH_SHIFT


def vacated(td: Td) -> int:
    """What a page that was removed leaves behind: a free entry, or in an import one that remembers the epoch."""
    if td.op_state in _IMPORT_STATES:
        return removed_in_import(td.rd32(tdcs.MIG_EPOCH))
    return FREE_ENTRY


# --- the lock on an entry
def lock_host(cpu: SeamCpu, at: int, entry: int) -> int:
    """Lock an entry for a SEAMCALL leaf: the locked entry, its HP mark taken away; BUSY when it is locked.

    `entry`: as it was when last looked at.
    """
    while True:
        if entry & TDEL:
            _set_host_priority(cpu, at, entry)
            return BUSY
        locked = (entry | TDEL) & ~HP
        found = cpu.cas64(at, entry, locked)
        if found == entry:
            return locked
        entry = found


def _set_host_priority(cpu: SeamCpu, at: int, entry: int) -> None:
    while (found := cpu.cas64(at, entry, entry | HP)) != entry:
        entry = found


def lock_guest(cpu: SeamCpu, at: int, entry: int) -> int:
    """Lock an entry for a TDCALL leaf: the locked entry, BUSY, or BUSY_HOST_PRIORITY when a host waits for it."""
    while True:
        if entry & TDEL:
            return BUSY
        if entry & HP:
            return BUSY_HOST_PRIORITY
        locked = entry | TDEL
        found = cpu.cas64(at, entry, locked)
        if found == entry:
            return locked
        entry = found


def store(cpu: SeamCpu, at: int, old: int, new: int) -> None:
    """Replace an entry that the caller has locked; `new` says whether it stays locked.

    The one bit that others may set meanwhile, HP, is kept.
    """
    while (found := cpu.cas64(at, old, new & ~HP | old & HP)) != old:
        if (found ^ old) & ~HP:
            raise ModuleFatal(f"the locked secure-EPT entry at {at:#x} changed from {old:#x} to {found:#x}")
        old = found


def unlock(cpu: SeamCpu, at: int, locked: int) -> None:
    """Release an entry that still holds `locked`."""
    store(cpu, at, locked, locked & ~TDEL)


_ENTRIES: Final = struct.Struct("<512Q")
_FREE_PAGE: Final = _ENTRIES.pack(*(FREE_ENTRY,) * 512)


def write_free_page(cpu: SeamCpu, page: int) -> None:
    """Make a page of DRAM (KeyID included) an S-EPT page in which every entry is free."""
    cpu.zero_page(page)
    cpu.write(page, _FREE_PAGE)


def read_page(cpu: SeamCpu, page: int) -> tuple[int, ...]:
    """The 512 entries of an S-EPT page."""
    return _ENTRIES.unpack(cpu.read(page, 4096))


def write_split(cpu: SeamCpu, page: int, whole: int, level: int) -> None:
    """Fill a page of DRAM with the 512 entries that together map what `whole`, an entry of `level`, maps."""
    size = 1 << (12 + 9 * (level - 1))
    cpu.zero_page(page)
    cpu.write(page, _ENTRIES.pack(*range(whole, whole + 512 * size, size)))


def page_is_free(cpu: SeamCpu, page: int) -> bool:
    """Whether every entry of an S-EPT page is free."""
    content = cpu.read(page, 4096)
    if content == _FREE_PAGE:
        return True
    return all(entry & STATE_MASK == FREE for entry in _ENTRIES.unpack(content))
