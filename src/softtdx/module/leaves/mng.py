"""Life of a TD and of its key: TDH.MNG.CREATE, KEY.CONFIG, ADDCX, VPFLUSHDONE, KEY.FREEID, KEY.RECLAIMID, MR.FINALIZE.

TDH.MNG.INIT is in mng_init, MNG.RD and MNG.WR are in metadata.
"""

import struct
from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.opstate import HOST_MASKS, LifecycleState, OpState
from softtdx.abi.sept import FREE_ENTRY
from softtdx.abi.status import Operand, Status

from .. import limits, measure, tdcs, tdr
from ..context import Call
from ..errors import LeafError
from ..locks import EXCLUSIVE
from ..pamt import PageType, lock_page
from ..registry import seamcall
from ..state import KOT_LOCK, HkidState
from ..td import NO_LOCK, open_td, open_tdr

MSR_BITMAPS_PAGE: Final = 2
SEPT_ROOT_PAGE: Final = 3
ALL_ONES_PAGE: Final = b"\xff" * 4096
FREE_SEPT_PAGE: Final = struct.pack("<Q", FREE_ENTRY) * 512
ANY_INITIALIZED: Final = sum(1 << s for s in OpState if s not in (OpState.UNINITIALIZED, OpState.START_IMPORT))


@seamcall(SeamcallLeaf.MNG_CREATE)
def mng_create(call: Call) -> None:
    """TDH.MNG.CREATE: turn a free page into a TD's root (TDR) and give it a private HKID.

    In: RCX page, RDX HKID in 15:0. Statuses in order: OPERAND_INVALID (RDX), those of a free page (RCX),
    OPERAND_BUSY (KOT), HKID_NOT_FREE.
    """
    regs, g, cpu = call.regs, call.g, call.cpu
    pa, hkid = regs.rcx, regs.rdx
    if not g.private_hkid_min <= hkid <= g.private_hkid_max:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    page = lock_page(call, pa, PageType.NDA, EXCLUSIVE, Operand.RCX)
    call.lock(KOT_LOCK, EXCLUSIVE, Operand.KOT)
    if g.kot.get(hkid, (HkidState.FREE, 0))[0] is not HkidState.FREE:
        raise LeafError(Status.HKID_NOT_FREE)
    base = pa | g.global_key_bits
    cpu.zero_page(base)
    for at in range(0, 32, 8):
        cpu.wr64(base + tdr.TD_UUID + at, cpu.rdrand())
    g.kot[hkid] = (HkidState.ASSIGNED, 0)
    cpu.wr16(base + tdr.HKID, hkid)
    cpu.wr32(base + tdr.LIFECYCLE_STATE, LifecycleState.HKID_ASSIGNED)
    cpu.wr64(base + tdr.SEAMDB_INDEX, g.seamdb_index)
    cpu.write(base + tdr.SEAMDB_NONCE, g.seamdb_nonce)
    cpu.wr16(base + tdr.HANDOFF_VERSION, limits.MODULE_HV)
    page.set(PageType.TDR, 0)


@seamcall(SeamcallLeaf.MNG_KEY_CONFIG)
def mng_key_config(call: Call) -> None:
    """TDH.MNG.KEY.CONFIG: program a random key for the TD's HKID on this package.

    In: RCX TDR. The last package moves the TD to KEYS_CONFIGURED. Statuses in order: those of a TDR (RCX), TD_FATAL,
    LIFECYCLE_STATE_INCORRECT, KEY_CONFIGURED, OPERAND_BUSY (KET).
    """
    g, cpu = call.g, call.cpu
    td = open_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    if td.fatal:
        raise LeafError(Status.TD_FATAL)
    if td.lifecycle != LifecycleState.HKID_ASSIGNED:
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
    bit = 1 << cpu.package
    if td.packages_keyed & bit:
        raise LeafError(Status.KEY_CONFIGURED)
    if not cpu.pconfig(td.hkid):
        raise LeafError(Status.OPERAND_BUSY, Operand.KET)
    keyed = td.packages_keyed | bit
    cpu.wr64(td.tdr + tdr.PKG_CONFIG_BITMAP, keyed)
    if keyed == g.packages_keyed:
        td.set_lifecycle(LifecycleState.KEYS_CONFIGURED)


@seamcall(SeamcallLeaf.MNG_ADDCX)
def mng_addcx(call: Call) -> None:
    """TDH.MNG.ADDCX: add a page to the TD's TDCS.

    In: RCX page, RDX TDR. Statuses in order: those of a TDR (RDX), TD_FATAL, TD_KEYS_NOT_CONFIGURED,
    TDCX_NUM_INCORRECT, those of a free page (RCX), OP_STATE_INCORRECT (from the seventh page on).
    """
    regs, cpu = call.regs, call.cpu
    td = open_tdr(call, regs.rdx, Operand.RDX, EXCLUSIVE)
    if td.fatal:
        raise LeafError(Status.TD_FATAL)
    if td.lifecycle != LifecycleState.KEYS_CONFIGURED:
        raise LeafError(Status.TD_KEYS_NOT_CONFIGURED)
    index = td.num_tdcx
    if index >= tdcs.PAGES_MAX:
        raise LeafError(Status.TDCX_NUM_INCORRECT)
    pa = regs.rcx
    page = lock_page(call, pa, PageType.NDA, EXCLUSIVE, Operand.RCX)
    target = td.keyed(pa)
    if index == MSR_BITMAPS_PAGE:
        cpu.write(target, ALL_ONES_PAGE)
    elif index == SEPT_ROOT_PAGE:
        cpu.write(target, FREE_SEPT_PAGE)
    else:
        cpu.zero_page(target)
    if index + 1 == tdcs.PAGES_BASE:
        for at in range(0, 32, 8):
            td.wr64(tdcs.MIG_ENC_KEY + at, cpu.rdrand())
    elif index >= tdcs.PAGES_BASE:
        state = td.rd32(tdcs.OP_STATE)
        if not HOST_MASKS[SeamcallLeaf.MNG_ADDCX] >> state & 1:
            raise LeafError(Status.OP_STATE_INCORRECT, state)
    cpu.wr64(td.tdr + tdr.TDCX_PA + 8 * index, target)
    cpu.wr32(td.tdr + tdr.NUM_TDCX, index + 1)
    td.add_children(1)
    page.set(PageType.TDCX, td.pa)


@seamcall(SeamcallLeaf.MNG_VPFLUSHDONE)
def mng_vpflushdone(call: Call) -> None:
    """TDH.MNG.VPFLUSHDONE: no processor holds state of the TD any more; its HKID can be written back and freed.

    In: RCX TDR. Statuses in order: those of a TDR (RCX), OPERAND_BUSY (KOT), LIFECYCLE_STATE_INCORRECT,
    FLUSHVP_NOT_DONE.
    """
    g = call.g
    td = open_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    call.lock(KOT_LOCK, EXCLUSIVE, Operand.KOT)
    if td.lifecycle not in (LifecycleState.KEYS_CONFIGURED, LifecycleState.HKID_ASSIGNED):
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
    if (
        td.num_tdcx >= tdcs.PAGES_BASE
        and ANY_INITIALIZED >> td.rd32(tdcs.OP_STATE) & 1
        and td.rd32(tdcs.NUM_ASSOC_VCPUS)
    ):
        raise LeafError(Status.FLUSHVP_NOT_DONE)
    if td.num_tdcx >= tdcs.PAGES_BASE:
        measure.abandon(td)
    g.kot[td.hkid] = (HkidState.FLUSHED, g.packages_keyed)
    td.set_lifecycle(LifecycleState.BLOCKED)


@seamcall(SeamcallLeaf.MNG_KEY_FREEID)
def mng_key_freeid(call: Call) -> None:
    """TDH.MNG.KEY.FREEID: the caches hold nothing of the TD any more; its HKID becomes free.

    In: RCX TDR. Statuses in order: those of a TDR (RCX), LIFECYCLE_STATE_INCORRECT, OPERAND_BUSY (KOT),
    WBCACHE_NOT_COMPLETE.
    """
    g = call.g
    td = open_tdr(call, call.regs.rcx, Operand.RCX, EXCLUSIVE)
    if td.lifecycle != LifecycleState.BLOCKED:
        raise LeafError(Status.LIFECYCLE_STATE_INCORRECT)
    call.lock(KOT_LOCK, EXCLUSIVE, Operand.KOT)
    if g.kot[td.hkid][1]:
        raise LeafError(Status.WBCACHE_NOT_COMPLETE)
    g.kot[td.hkid] = (HkidState.FREE, 0)
    td.set_lifecycle(LifecycleState.TEARDOWN)


@seamcall(SeamcallLeaf.MNG_KEY_RECLAIMID)
def mng_key_reclaimid(call: Call) -> None:
    """TDH.MNG.KEY.RECLAIMID: kept for older hosts; succeeds whatever RCX is, and does nothing."""
    del call


@seamcall(SeamcallLeaf.MR_FINALIZE)
def mr_finalize(call: Call) -> None:
    """TDH.MR.FINALIZE: close the measurement of the TD's initial contents; the TD may run.

    In: RCX TDR. Statuses in order: those of a TDR (RCX), TD_FATAL, TD_KEYS_NOT_CONFIGURED, TDCS_NOT_ALLOCATED,
    OP_STATE_INCORRECT, NO_VCPUS.
    """
    td = open_td(call, call.regs.rcx, SeamcallLeaf.MR_FINALIZE, Operand.RCX, EXCLUSIVE, NO_LOCK)
    if td.rd32(tdcs.NUM_VCPUS) == 0:
        raise LeafError(Status.NO_VCPUS)
    measure.finish(td)
    td.set_op_state(OpState.RUNNABLE)
