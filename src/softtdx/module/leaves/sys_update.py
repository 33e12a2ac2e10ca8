"""Replacing the module while TDs live: TDH.SYS.SHUTDOWN ends the old module, TDH.SYS.UPDATE makes the new one ready."""

from typing import Final

from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

from .. import handoff, limits
from ..context import Call
from ..errors import LeafError
from ..metadata.sys_fields import features0
from ..registry import ALL_VERSIONS, seamcall
from ..state import SysState
from .sys import lock_global
from .sys_config import complete_cpuid

AVOID_COMPAT_SENSITIVE: Final = 1 << 16
HANDOFF_MASK: Final = 0x1_FFFF
UPDATE_COMPATIBILITY: Final = 1 << 47
TD_BUILD: Final = 0  # what stands in the way, in bits 15:0 of the status
MIGRATION_INTERRUPTED: Final = 1
COUNT_SHIFT: Final = 16


@seamcall(SeamcallLeaf.SYS_SHUTDOWN)
def sys_shutdown(call: Call) -> None:
    """TDH.SYS.SHUTDOWN: leave everything that outlives this module for the next one, and serve no further call.

    In: RCX handoff version in 15:0, bit 16: not while an update would disturb TDs.
    Statuses in order: OPERAND_INVALID (RCX), SYS_BUSY (the module's lock, then another processor in SEAM mode),
    UPDATE_COMPATIBILITY_SENSITIVE (31:16 how many, 15:0 0 TDs under construction, 1 interrupted migrations).
    """
    g, module = call.g, call.module
    operand = call.regs.rcx
    if operand & ~HANDOFF_MASK or operand & 0xFFFF != limits.MODULE_HV:  # no downgrade: only our own version
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    lock_global(call, exclusive=True)
    # First close the door, then look who is inside: who enters now is refused and gone at once.
    module.enter_state(SysState.SHUTDOWN)
    if not call.alone():
        module.enter_state(SysState.READY)
        raise LeafError(Status.SYS_BUSY)
    if operand & AVOID_COMPAT_SENSITIVE and (g.td_build_count or g.mig_interrupted_count):
        module.enter_state(SysState.READY)
        if g.td_build_count:
            raise LeafError(Status.UPDATE_COMPATIBILITY_SENSITIVE, g.td_build_count << COUNT_SHIFT | TD_BUILD)
        raise LeafError(
            Status.UPDATE_COMPATIBILITY_SENSITIVE, g.mig_interrupted_count << COUNT_SHIFT | MIGRATION_INTERRUPTED
        )
    handoff.save(call.cpu, g)


@seamcall(SeamcallLeaf.SYS_UPDATE, versions=ALL_VERSIONS, before_ready=True)
def sys_update(call: Call) -> None:
    """TDH.SYS.UPDATE: take over from the module before this one; its TDs go on.

    In: version 1: R9 features to enable (of TDX_FEATURES0; only "update compatibility" does anything), R10 reserved.
    Statuses in order: SYS_BUSY, SYS_STATE_INCORRECT, SYS_INVALID_HANDOFF, OPERAND_INVALID (RAX: version, R9, R10).
    """
    g, regs = call.g, call.regs
    lock_global(call, exclusive=True)
    if g.sys_state is not SysState.INIT_DONE or g.lps_initialized < g.sysinfo.lps:
        raise LeafError(Status.SYS_STATE_INCORRECT)
    if not g.handoff.valid or not limits.MIN_UPDATE_HV <= g.handoff.version <= limits.MODULE_HV:
        raise LeafError(Status.SYS_INVALID_HANDOFF)
    if call.version:
        if call.version > 1:
            raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
        if regs.r9 & ~features0(g):
            raise LeafError(Status.OPERAND_INVALID, Operand.R9)
        if regs.r10:
            raise LeafError(Status.OPERAND_INVALID, Operand.R10)
        g.update_compatibility = bool(regs.r9 & UPDATE_COMPATIBILITY)
    handoff.restore(call.cpu, g)
    complete_cpuid(g.platform)
    handoff.withdraw(call.cpu, g)
    call.module.enter_state(SysState.READY)
