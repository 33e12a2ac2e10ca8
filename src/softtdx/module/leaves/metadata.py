"""Metadata for the host: TDH.SYS.RD, SYS.RDALL, MNG.RD, MNG.WR, VP.RD, VP.WR (field ids: `module.metadata`)."""

from typing import Final

from softtdx.abi.fields import NULL_FIELD_ID, MdContext
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.status import Operand, Status

from .. import limits, tdcs
from ..context import Call
from ..errors import LeafError
from ..locks import SHARED
from ..metadata import engine, sys_fields, td_fields, vp_fields
from ..registry import ALL_VERSIONS, seamcall
from ..shared import check_shared
from ..td import Td, check_op_state, open_td, open_td_of
from ..transitions.vcpu import Vcpu, lock_tdvpr

LIST_SIZE: Final = 4096
FIRST_FIELD: Final = Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT


@seamcall(SeamcallLeaf.SYS_RD, before_ready=True)
def sys_rd(call: Call) -> None:
    """TDH.SYS.RD: a global field, and the id of the next one.

    In: RDX field id, all ones for the first id. Out: RDX next id or all ones, R8 value.
    Statuses in order: SYS_LP_INIT_NOT_DONE, METADATA_FIRST_FIELD_ID_IN_CONTEXT, METADATA_FIELD_ID_INCORRECT,
    METADATA_FIELD_NOT_READABLE.
    """
    regs = call.regs
    raw = regs.rdx
    regs.rdx, regs.r8 = NULL_FIELD_ID, 0
    if not call.lp_initialized:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)
    raw = engine.with_context(raw, MdContext.SYS)
    view = engine.HOST_PRODUCTION
    if engine.is_null(raw):
        regs.rdx = engine.next_element(sys_fields.SYS, raw, view)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    regs.r8 = sys_fields.read_element(call.g, engine.find(sys_fields.SYS, raw), view)
    regs.rdx = engine.next_element(sys_fields.SYS, raw, view)


@seamcall(SeamcallLeaf.SYS_RDALL, before_ready=True)
def sys_rdall(call: Call) -> int:
    """TDH.SYS.RDALL: a page with a metadata list of all global fields from one on.

    In: RDX page, R8 first field id (all ones: from the start). Out: R8 next id or all ones.
    Statuses in order: SYS_LP_INIT_NOT_DONE, OPERAND_INVALID (RDX), METADATA_FIELD_ID_INCORRECT,
    METADATA_LIST_OVERFLOW (fields remain).
    """
    regs = call.regs
    page, raw = regs.rdx, regs.r8
    regs.r8 = NULL_FIELD_ID
    if not call.lp_initialized:
        raise LeafError(Status.SYS_LP_INIT_NOT_DONE)
    check_shared(call.g, page, LIST_SIZE, Operand.RDX)
    raw = engine.with_context(raw, MdContext.SYS)
    view = engine.HOST_PRODUCTION
    data, regs.r8, status = engine.dump_list(
        sys_fields.SYS, raw, view, lambda location: sys_fields.read_field(call.g, location, view), LIST_SIZE
    )
    call.cpu.write(page, data)
    return status


def _host_view(td: Td) -> engine.View:
    debug = td.rd64(tdcs.ATTRIBUTES) & limits.ATTR_DEBUG
    return engine.HOST_DEBUG if debug else engine.HOST_PRODUCTION


@seamcall(SeamcallLeaf.MNG_RD, versions=ALL_VERSIONS)
def mng_rd(call: Call) -> None:
    """TDH.MNG.RD: a field of a TD's TDR or TDCS.

    In: RCX TDR, RDX field id (version 1: all ones for the first id). Out: R8 value; version 1: RDX next id.
    Statuses in order: OPERAND_INVALID (RAX: version), those of `open_td` (RCX),
    METADATA_FIRST_FIELD_ID_IN_CONTEXT (version 1),
    METADATA_FIELD_ID_INCORRECT, METADATA_FIELD_NOT_READABLE.
    """
    regs = call.regs
    raw = regs.rdx
    regs.r8 = 0
    if call.version:
        regs.rdx = NULL_FIELD_ID
        if call.version > 1:
            raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    td = open_td(call, regs.rcx, SeamcallLeaf.MNG_RD)
    view, context = _host_view(td), td_fields.context_of(td)
    raw = engine.with_context(raw, MdContext.TD)
    if call.version and engine.is_null(raw):
        regs.rdx = engine.next_element(context, raw, view)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    value = td_fields.read_element(td, engine.find(context, raw), view)
    if call.version:
        regs.rdx = engine.next_element(context, raw, view)
    regs.r8 = value


@seamcall(SeamcallLeaf.MNG_WR)
def mng_wr(call: Call) -> None:
    """TDH.MNG.WR: write bits of a field of a TD's TDCS.

    In: RCX TDR, RDX field id, R8 value, R9 mask. Out: R8 old value. Statuses in order: those of `open_td` (RCX),
    METADATA_FIELD_ID_INCORRECT, then those of `td_fields.write_element`.
    """
    regs = call.regs
    value = regs.r8
    regs.r8 = 0
    td = open_td(call, regs.rcx, SeamcallLeaf.MNG_WR)
    raw = engine.with_context(regs.rdx, MdContext.TD)
    engine.check_single(raw)
    location = engine.find(td_fields.context_of(td), raw)
    regs.r8 = td_fields.write_element(td, location, _host_view(td), value, regs.r9)


def _open_vcpu(call: Call, leaf: SeamcallLeaf, *, allow_disabled: bool) -> Vcpu:
    page = lock_tdvpr(call, call.regs.rcx, SHARED)
    td = open_td_of(call, page)
    check_op_state(call, td, leaf, SHARED)
    vcpu = Vcpu(call, td, page.pa)
    vcpu.associate(allow_disabled=allow_disabled)
    return vcpu


@seamcall(SeamcallLeaf.VP_RD, versions=ALL_VERSIONS)
def vp_rd(call: Call) -> None:
    """TDH.VP.RD: a field of a vCPU's TDVPS or TD VMCS; binds the vCPU to this processor.

    In: RCX TDVPR, RDX field id (version 1: all ones for the first id). Out: R8 value; version 1: RDX next id.
    Statuses in order: OPERAND_INVALID (RAX: version), those of a TDVPR (RCX), OPERAND_BUSY (TDR), those of the TD's
    state, TDCX_NUM_INCORRECT, VCPU_STATE_INCORRECT, VCPU_ASSOCIATED, METADATA_FIRST_FIELD_ID_IN_CONTEXT (version 1),
    METADATA_FIELD_ID_INCORRECT, METADATA_FIELD_NOT_READABLE.
    """
    regs = call.regs
    raw = regs.rdx
    regs.r8 = 0
    if call.version:
        regs.rdx = NULL_FIELD_ID
        if call.version > 1:
            raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    vcpu = _open_vcpu(call, SeamcallLeaf.VP_RD, allow_disabled=True)
    view, context = _host_view(vcpu.td), vp_fields.context_of(vcpu)
    raw = engine.with_context(raw, MdContext.VP)
    if call.version and engine.is_null(raw):
        regs.rdx = engine.next_element(context, raw, view)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    value = vp_fields.read_element(vcpu, engine.find(context, raw), view)
    if call.version:
        regs.rdx = engine.next_element(context, raw, view)
    regs.r8 = value


@seamcall(SeamcallLeaf.VP_WR)
def vp_wr(call: Call) -> None:
    """TDH.VP.WR: write bits of a field of a vCPU's TDVPS or TD VMCS; binds the vCPU to this processor.

    In: RCX TDVPR, RDX field id, R8 value, R9 mask. Out: R8 old value. Statuses in order: as TDH.VP.RD up to
    VCPU_ASSOCIATED, METADATA_FIELD_ID_INCORRECT, then those of `vp_fields.write_element`.
    """
    regs = call.regs
    value = regs.r8
    regs.r8 = 0
    vcpu = _open_vcpu(call, SeamcallLeaf.VP_WR, allow_disabled=False)
    raw = engine.with_context(regs.rdx, MdContext.VP)
    engine.check_single(raw)
    location = engine.find(vp_fields.context_of(vcpu), raw)
    regs.r8 = vp_fields.write_element(vcpu, location, _host_view(vcpu.td), value, regs.r9)
