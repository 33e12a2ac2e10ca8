"""Secure EPTs of L2 VMs: their entries follow those of the L1 secure EPT.

Each L2 VM of a partitioned TD has a tree of its own, its root a page of TDCS. An L1 entry says in its alias flags
which L2 trees have an entry for the same range; L2 entries have no lock, the L1 entry's serves (TDX Module TD
Partitioning Spec, "L2 Secure EPT"). Bits of a leaf that blocking takes away are kept beside it in the same entry.
"""

import struct
from typing import Final

from softtdx.abi.sept import (
    HPA_MASK,
    IPAT,
    L2_PUBLIC_STATE,
    L2_PWA,
    L2_SSS,
    L2_STATE_MASK,
    L2_TDPWA,
    L2_TDRD,
    L2_TDWR,
    L2_TDXS,
    L2_TDXU,
    LEAF,
    MT_MASK,
    MT_WB,
    STATE_MASK,
    SVE,
    TDB,
    VGP,
    XU,
    A,
    D,
    R,
    W,
    X,
    l2_state_of,
)
from softtdx.abi.status import Operand, Status
from softtdx.hw.isa import SeamCpu
from softtdx.hw.registers import Registers

from . import sept, tdcs
from .context import Call
from .errors import LeafError
from .fatal import ModuleFatal
from .locks import EXCLUSIVE
from .pamt import PamtPage, lock_implicit
from .td import Td

ACCESS: Final = R | W | X | XU
MAX_VMS: Final = 4  # the L1 VM is number 0
FREE: Final = 0
_TDHP: Final = 1 << 52  # not a lock's mark in an L2 entry, but left out of comparisons as in an L1 entry
_LEAF_STATE: Final = IPAT | LEAF | TDB
_MAPPED: Final = IPAT | LEAF
_BLOCKED: Final = IPAT | LEAF | TDB
_NOT_COMPARED: Final = HPA_MASK | A | D | _TDHP

_SHOWN_LEAF: Final = MT_MASK | HPA_MASK | IPAT | LEAF | SVE
_SHOWN_DEBUG_LEAF: Final = _SHOWN_LEAF | ACCESS | VGP | L2_PWA | L2_SSS

# GPA attributes of one VM, 16 bits: 0 R, 1 W, 2 Xs, 3 Xu, 4 VGP, 5 PWA, 6 SSS, 7 SVE, 15 VALID
ATTR_PRESENT: Final = 0xF
ATTR_VALID: Final = 1 << 15
_ATTR_R, _ATTR_W, _ATTR_XS, _ATTR_XU, _ATTR_PWA, _ATTR_SVE = 1, 2, 4, 8, 32, 128
_ATTR_RESERVED: Final = 0x7F00
_ATTR_BITS: Final = (R, W, X, XU, VGP, L2_PWA, L2_SSS, SVE)  # attribute bit -> entry bit

_VMS_OF: Final = tuple(tuple(vm for vm in (1, 2, 3) if flags >> (vm - 1) & 1) for flags in range(8))
_ENTRIES: Final = struct.Struct("<512Q")


def aliases(l1_entry: int) -> tuple[int, ...]:
    """The L2 VMs that have an entry for the range of an L1 entry, which is not free."""
    return _VMS_OF[l1_entry >> 58 & 7]


def alias_flag(vm: int) -> int:
    """The L1 entry's flag of L2 VM `vm`."""
    return 1 << (57 + vm)


def walk(td: Td, vm: int, gpa: int, level: int, *, guest: bool = False) -> tuple[int, int, int]:
    """As `sept.walk`, in the tree of an L2 VM.

    `guest`: for a TDCALL leaf, which goes on through a blocked table: it was blocked after the L1 entry was looked at.
    """
    top = sept.top_level(td)
    root = td.pages[(tdcs.L2_SEPT_ROOT_1 >> 12) + vm - 1]
    cpu = td.call.cpu
    if not guest:
        return sept.walk(cpu, root, top, gpa, level)
    at = root + (gpa >> (12 + 9 * top) << 3 & 0xFF8)
    entry = cpu.rd64(at)
    while top > level and entry & L2_STATE_MASK and not entry & LEAF:
        top -= 1
        at = (entry & HPA_MASK) + (gpa >> (12 + 9 * top) << 3 & 0xFF8)
        entry = cpu.rd64(at)
    return at, entry, top


def find(td: Td, vm: int, gpa: int, level: int, *, guest: bool = False) -> tuple[int, int]:
    """The entry that an alias flag promises: (its address, the entry)."""
    at, entry, reached = walk(td, vm, gpa, level, guest=guest)
    if reached != level:
        raise ModuleFatal(f"L2 VM {vm} has no entry at level {level} for GPA {gpa:#x}, the L1 entry says it has")
    return at, entry


def set_details(regs: Registers, td: Td, entry: int, level: int, vm: int) -> None:
    """RCX and RDX of a leaf that stumbles on an L2 entry; the rights are shown of debug TDs only."""
    if entry & L2_STATE_MASK == FREE:
        shown = SVE
    elif not entry & LEAF:
        shown = entry & (ACCESS | LEAF)
    elif td.rd64(tdcs.ATTRIBUTES) & 1:
        shown = entry & _SHOWN_DEBUG_LEAF
    else:
        shown = entry & _SHOWN_LEAF | (ACCESS if entry & _LEAF_STATE == _MAPPED else 0)
    state = l2_state_of(entry)
    regs.rcx = shown & ~td.call.g.hkid_mask
    regs.rdx = level | (L2_PUBLIC_STATE[state] if state is not None else 0) << 8 | vm << 16


def refuse(call: Call, td: Td, status: Status, entry: int, level: int, vm: int) -> LeafError:
    """An error about an L2 entry: the entry in RCX and RDX, VM and level in RAX bits 31:0."""
    set_details(call.regs, td, entry, level, vm)
    return LeafError(status, vm << 16 | level)


# --- entries to be
def make_non_leaf(page: int) -> int:
    """An entry that points to the L2 S-EPT page `page` (KeyID included)."""
    return ACCESS | page


def make_leaf(page: int, attributes: int, *, blocked: bool) -> int:
    """A leaf entry with the attributes that the L1 VMM chose; blocked while the L1 page is pending."""
    entry = page | LEAF | IPAT | MT_WB
    entry |= sum(bit for number, bit in enumerate(_ATTR_BITS) if attributes >> number & 1)
    return block(entry, blockedw=False) if blocked else entry


def block(entry: int, *, blockedw: bool) -> int:
    """The entry when its L1 entry is blocked; `blockedw`: the L1 entry was blocked for writing, W and PWA are saved."""
    if not entry & LEAF:
        return entry & ~(L2_STATE_MASK | ACCESS | L2_PWA) | TDB
    kept = ((entry & R) and L2_TDRD) | ((entry & X) and L2_TDXS) | ((entry & XU) and L2_TDXU)
    cleared = MT_MASK
    if not blockedw:
        kept |= ((entry & W) and L2_TDWR) | ((entry & L2_PWA) and L2_TDPWA)
        cleared |= L2_TDWR | L2_TDPWA
    return entry & ~(cleared | ACCESS | L2_PWA | _LEAF_STATE) | kept | _BLOCKED


def unblock(entry: int) -> int:
    """The entry as it was before it was blocked; another one stays as it is."""
    if entry & L2_STATE_MASK == TDB:
        return entry & ~(L2_STATE_MASK | MT_MASK | L2_TDWR) | ACCESS
    if entry & _LEAF_STATE != _BLOCKED:
        return entry
    back = ((entry & L2_TDRD) and R) | ((entry & L2_TDWR) and W) | ((entry & L2_TDXS) and X)
    back |= ((entry & L2_TDXU) and XU) | ((entry & L2_TDPWA) and L2_PWA)
    return entry & ~(_LEAF_STATE | MT_MASK | L2_TDWR | L2_TDPWA) | back | _MAPPED | MT_WB


# --- attributes
def attributes_of(entry: int, *, blockedw: bool, pending: bool) -> int:
    """GPA attributes in an L2 entry; `blockedw` and `pending` are what the L1 entry says."""
    if entry & L2_STATE_MASK == FREE:
        return _ATTR_SVE if entry & SVE else 0
    if not entry & LEAF:
        return ATTR_PRESENT | ATTR_VALID
    attributes = sum(1 << number for number, bit in enumerate(_ATTR_BITS) if entry & bit)
    if entry & _LEAF_STATE == _BLOCKED:
        attributes &= ~(_ATTR_W | _ATTR_PWA)
        attributes |= (_ATTR_W if entry & L2_TDWR else 0) | (_ATTR_PWA if entry & L2_TDPWA else 0)
        if not blockedw or pending:
            attributes &= ~(_ATTR_R | _ATTR_XS | _ATTR_XU)
            attributes |= (_ATTR_R if entry & L2_TDRD else 0) | (_ATTR_XS if entry & L2_TDXS else 0)
            attributes |= _ATTR_XU if entry & L2_TDXU else 0
    return attributes | ATTR_VALID


def attributes_legal(attributes: int) -> bool:
    """Whether a VM may have these rights: no write and no paging-write without read, nothing reserved."""
    if attributes & (_ATTR_RESERVED | _ATTR_SVE) or (attributes and not attributes & ATTR_VALID):
        return False
    return bool(attributes & _ATTR_R) or not attributes & (_ATTR_W | _ATTR_PWA)


def with_attributes(entry: int, attributes: int) -> int:
    """A leaf entry with other attributes, blocked if it was."""
    rights = sum(bit for number, bit in enumerate(_ATTR_BITS) if attributes >> number & 1)
    changed = entry & ~sum(_ATTR_BITS) & ~L2_TDRD | rights
    return block(changed, blockedw=False) if entry & _LEAF_STATE == _BLOCKED else changed


# --- what happens to L2 entries when something happens to the L1 entry
def free_all(td: Td, l1_entry: int, gpa: int, level: int) -> None:
    """The L1 page is removed."""
    for vm in aliases(l1_entry):
        td.call.cpu.wr64(find(td, vm, gpa, level)[0], FREE)


def block_all(td: Td, l1_entry: int, gpa: int, level: int) -> None:
    """The L1 entry, `l1_entry` before that, was blocked."""
    blockedw = l1_entry & STATE_MASK in sept.ANY_BLOCKEDW
    for vm in aliases(l1_entry):
        at, entry = find(td, vm, gpa, level)
        td.call.cpu.wr64(at, block(entry, blockedw=blockedw))


def unblock_all(td: Td, l1_entry: int, gpa: int, level: int, *, guest: bool = False) -> None:
    """The L1 entry is about to be unblocked, or its page accepted."""
    for vm in aliases(l1_entry):
        at, entry = find(td, vm, gpa, level, guest=guest)
        td.call.cpu.wr64(at, unblock(entry))


def move_all(td: Td, l1_entry: int, gpa: int, page: int) -> None:
    """The L1 page is relocated to `page` (KeyID included), and unblocked unless it is pending."""
    pending = l1_entry & STATE_MASK in sept.ANY_PENDING
    for vm in aliases(l1_entry):
        at, entry = find(td, vm, gpa, 0)
        entry = entry & ~HPA_MASK | page
        td.call.cpu.wr64(at, entry if pending else unblock(entry))


def lock_tables(call: Call, td: Td, l1_entry: int, gpa: int, level: int) -> list[tuple[int, int, PamtPage]]:
    """The L2 S-EPT pages below the aliases of an L1 entry that is no leaf: (VM, address of the entry, locked page)."""
    tables = []
    for vm in aliases(l1_entry):
        at, entry = find(td, vm, gpa, level)
        pa = entry & HPA_MASK & call.g.pa_mask
        tables.append((vm, at, lock_implicit(call, pa, EXCLUSIVE, Operand.RCX)))
    return tables


def can_merge(cpu: SeamCpu, page: int, level: int, keyid_mask: int) -> tuple[int, ...] | None:
    """The 512 entries of an L2 S-EPT page, if they are free alike or map alike; None otherwise."""
    entries: tuple[int, ...] = _ENTRIES.unpack(cpu.read(page, 4096))
    first = entries[0] & ~keyid_mask
    if first & L2_STATE_MASK != FREE:
        size = 1 << (12 + 9 * level)
        if not first & LEAF or sept.leaf_hpa(first, 0, level - 1) & (size - 1):
            return None
    if any((entry ^ first) & ~_NOT_COMPARED for entry in entries):
        return None
    return entries
