"""Metadata for the guest: TDG.VM.RD, VM.WR, VP.RD, VP.WR, SYS.RD, SYS.RDALL (field ids: `module.metadata`)."""

from typing import Final

from softtdx.abi.fields import NULL_FIELD_ID, MdContext
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.status import Operand, Status

from ..errors import LeafError
from ..metadata import engine, sys_fields, td_fields, vp_fields
from ..registry import tdcall
from ..transitions.guest import Guest
from .memory import guest_pa

VIEW: Final = engine.GUEST
LIST_SIZE: Final = 4096
FIRST_FIELD: Final = Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT


@tdcall(TdcallLeaf.VM_RD)
def vm_rd(guest: Guest) -> None:
    """TDG.VM.RD: a field of this TD.

    In: RCX VM (0), RDX field id (version 1: all ones for the first id). Out: R8 value; version 1: RDX next id.
    Statuses in order: OPERAND_INVALID (RAX: version, RCX), METADATA_FIRST_FIELD_ID_IN_CONTEXT (version 1),
    METADATA_FIELD_ID_INCORRECT, METADATA_FIELD_NOT_READABLE.
    """
    regs, td, version = guest.regs, guest.td, guest.version
    raw = regs.rdx
    if version:
        regs.rdx = NULL_FIELD_ID
    regs.r8 = 0
    if version > 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    if regs.rcx:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    context = td_fields.context_of(td)
    raw = engine.with_context(raw, MdContext.TD)
    if version and engine.is_null(raw):
        regs.rdx = engine.next_element(context, raw, VIEW)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    value = td_fields.read_element(td, engine.find(context, raw), VIEW)
    if version:
        regs.rdx = engine.next_element(context, raw, VIEW)
    regs.r8 = value


@tdcall(TdcallLeaf.VM_WR)
def vm_wr(guest: Guest) -> None:
    """TDG.VM.WR: write bits of a field of this TD.

    In: RCX VM (0), RDX field id, R8 value, R9 mask. Out: R8 old value. Statuses in order: OPERAND_INVALID (RCX),
    METADATA_FIELD_ID_INCORRECT, then those of `td_fields.write_element`.
    """
    regs, td = guest.regs, guest.td
    value = regs.r8
    regs.r8 = 0
    if regs.rcx:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    raw = engine.with_context(regs.rdx, MdContext.TD)
    engine.check_single(raw)
    regs.r8 = td_fields.write_element(td, engine.find(td_fields.context_of(td), raw), VIEW, value, regs.r9)


@tdcall(TdcallLeaf.VP_RD)
def vp_rd(guest: Guest) -> None:
    """TDG.VP.RD: a field of this vCPU, and the id of the next one.

    In: RCX 0, RDX field id, all ones for the first id. Out: RDX next id, R8 value. Statuses in order:
    OPERAND_INVALID (RCX), METADATA_FIRST_FIELD_ID_IN_CONTEXT, METADATA_FIELD_ID_INCORRECT,
    METADATA_FIELD_NOT_READABLE.
    """
    regs, vcpu = guest.regs, guest.vcpu
    raw = regs.rdx
    regs.rdx, regs.r8 = NULL_FIELD_ID, 0
    if regs.rcx:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    context = vp_fields.context_of(vcpu)
    raw = engine.with_context(raw, MdContext.VP)
    if engine.is_null(raw):
        regs.rdx = engine.next_element(context, raw, VIEW)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    try:
        value = vp_fields.read_element(vcpu, engine.find(context, raw), VIEW)
    finally:
        guest.cpu.vmptrld(vcpu.vmcs)
    regs.rdx = engine.next_element(context, raw, VIEW)
    regs.r8 = value


@tdcall(TdcallLeaf.VP_WR)
def vp_wr(guest: Guest) -> None:
    """TDG.VP.WR: write bits of a field of this vCPU.

    In: RCX 0, RDX field id, R8 value, R9 mask. Out: R8 old value. Statuses in order: OPERAND_INVALID (RCX),
    METADATA_FIELD_ID_INCORRECT, then those of `vp_fields.write_element`.
    """
    regs, vcpu = guest.regs, guest.vcpu
    value = regs.r8
    regs.r8 = 0
    if regs.rcx:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    raw = engine.with_context(regs.rdx, MdContext.VP)
    engine.check_single(raw)
    location = engine.find(vp_fields.context_of(vcpu), raw)
    try:
        regs.r8 = vp_fields.write_element(vcpu, location, VIEW, value, regs.r9)
    finally:
        guest.cpu.vmptrld(vcpu.vmcs)


@tdcall(TdcallLeaf.SYS_RD)
def sys_rd(guest: Guest) -> None:
    """TDG.SYS.RD: a global field that TDs may read, and the id of the next one.

    In: RDX field id, all ones for the first id. Out: RDX next id, R8 value. Statuses in order:
    METADATA_FIRST_FIELD_ID_IN_CONTEXT, METADATA_FIELD_ID_INCORRECT, METADATA_FIELD_NOT_READABLE.
    """
    regs = guest.regs
    raw = engine.with_context(regs.rdx, MdContext.SYS)
    regs.rdx, regs.r8 = NULL_FIELD_ID, 0
    if engine.is_null(raw):
        regs.rdx = engine.next_element(sys_fields.SYS, raw, VIEW)
        raise LeafError(FIRST_FIELD)
    engine.check_single(raw)
    regs.r8 = sys_fields.read_element(guest.g, engine.find(sys_fields.SYS, raw), VIEW)
    regs.rdx = engine.next_element(sys_fields.SYS, raw, VIEW)


@tdcall(TdcallLeaf.SYS_RDALL)
def sys_rdall(guest: Guest) -> int:
    """TDG.SYS.RDALL: a private page with a metadata list of the global fields that TDs may read.

    In: RDX page, R8 first field id. Out: R8 next id or all ones. Statuses in order: OPERAND_INVALID (RDX),
    METADATA_FIELD_ID_INCORRECT, METADATA_LIST_OVERFLOW. A page that does not translate is an EPT violation.
    """
    regs = guest.regs
    gpa, raw = regs.rdx, engine.with_context(regs.r8, MdContext.SYS)
    regs.r8 = NULL_FIELD_ID
    if gpa & (LIST_SIZE - 1):
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    page = guest_pa(guest, gpa, Operand.RDX, write=True)
    data, regs.r8, status = engine.dump_list(
        sys_fields.SYS, raw, VIEW, lambda location: sys_fields.read_field(guest.g, location, VIEW), LIST_SIZE
    )
    guest.cpu.write(page, data)
    return status
