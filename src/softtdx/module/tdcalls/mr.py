"""TDG.MR.*: the TD's runtime measurements and its report (TDX Module Base Spec, "Measurement and Attestation")."""

import hashlib
from typing import Final

from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.status import Operand, Status
from softtdx.hw.seamops import REPORT_MAC_SIZE, SeamOpsLeaf, SeamOpsStatus

from .. import tdcs, tdr
from ..errors import LeafError
from ..locks import EXCLUSIVE, SHARED
from ..registry import tdcall
from ..td import LockId, Td
from ..transitions.guest import NO_REASON, Guest, Resume, TdExit
from .memory import guest_pa

__all__ = ["tdinfo"]

HASH_SIZE: Final = 48
RTMR_COUNT: Final = 4
RTMR_ALIGNMENT: Final = 64
REPORT_SIZE: Final = 1024
REPORT_DATA_SIZE: Final = 64
REPORT_TYPE: Final = 0x81
REPORT_SUBTYPE: Final = 0
TDINFO_SIZE: Final = 512
TEE_TCB_INFO_SIZE: Final = 239
TDINFO_AT: Final = 512


def tdinfo(td: Td) -> bytes:
    """TDINFO_STRUCT of the TD as it is now. The caller holds the RTMR lock."""
    head = td.read(tdcs.ATTRIBUTES, 16)  # ATTRIBUTES, XFAM
    measured = [td.read(at, HASH_SIZE) for at in (tdcs.MRTD, tdcs.MRCONFIGID, tdcs.MROWNER, tdcs.MROWNERCONFIG)]
    rtmrs = td.read(tdcs.RTMR, RTMR_COUNT * HASH_SIZE)
    info = head + b"".join(measured) + rtmrs + td.read(tdcs.SERVTD_HASH, HASH_SIZE)
    return info.ljust(TDINFO_SIZE, b"\0")


def _tdinfo_and_hash(guest: Guest) -> tuple[bytes, bytes, bool]:
    """(TDINFO_STRUCT, its SHA-384, whether the hash had to be computed). LeafError OPERAND_BUSY (RTMR)."""
    td = guest.td
    td.lock(LockId.RTMR, SHARED, Operand.RTMR, guest=True)
    info = tdinfo(td)
    if td.rd8(tdcs.LAST_TEEINFO_HASH_VALID):
        result = info, td.read(tdcs.LAST_TEEINFO_HASH, HASH_SIZE), False
    else:
        digest = hashlib.sha384(info).digest()
        td.write(tdcs.LAST_TEEINFO_HASH, digest)
        td.wr8(tdcs.LAST_TEEINFO_HASH_VALID, 1)
        result = info, digest, True
    td.unlock(LockId.RTMR, SHARED)
    return result


@tdcall(TdcallLeaf.MR_REPORT)
def mr_report(guest: Guest) -> None:
    """TDG.MR.REPORT: a TDREPORT_STRUCT of this TD, with a MAC that only this platform can make and check.

    In: RCX GPA of the report (1024-byte aligned), RDX GPA of 64 bytes of REPORTDATA (64-byte aligned), both private or
    shared; R8 subtype, 0. May be interrupted, and then starts again.
    OPERAND_INVALID RCX, RDX (alignment, then range), R8; OPERAND_BUSY RTMR; TD exit when an address does not translate,
    or NON_RECOVERABLE_TD_CORRUPTED_MD when the TDR names no module of this platform.
    """
    regs = guest.regs
    cpu = guest.cpu
    if regs.rcx % REPORT_SIZE:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    if regs.rdx % REPORT_DATA_SIZE:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    data_pa = guest_pa(guest, regs.rdx, Operand.RDX, private=False)
    if regs.r8 != REPORT_SUBTYPE:
        raise LeafError(Status.OPERAND_INVALID, Operand.R8)
    version = 1 if guest.td.rd16(tdcs.SERVTD_NUM) else 0
    info, digest, computed = _tdinfo_and_hash(guest)
    if computed and cpu.interrupt_pending():
        raise Resume
    root = guest.td.tdr
    reference = cpu.rd64(root + tdr.SEAMDB_INDEX), cpu.read(root + tdr.SEAMDB_NONCE, 32)
    report_type = bytes((REPORT_TYPE, REPORT_SUBTYPE, version, 0))
    status, made = cpu.seamops_report(report_type, cpu.read(data_pa, REPORT_DATA_SIZE), digest, reference)
    if status is not SeamOpsStatus.SUCCESS:
        raise TdExit(Status.NON_RECOVERABLE_TD_CORRUPTED_MD, NO_REASON)
    report_pa = guest_pa(guest, regs.rcx, Operand.RCX, write=True, private=False)
    cpu.write(report_pa, made.ljust(TDINFO_AT, b"\0") + info)


@tdcall(TdcallLeaf.MR_RTMR_EXTEND)
def mr_rtmr_extend(guest: Guest) -> None:
    """TDG.MR.RTMR.EXTEND: RTMR[RDX] = SHA-384(RTMR[RDX] || 48 bytes at RCX).

    In: RCX GPA, private, 64-byte aligned; RDX index 0 to 3.
    OPERAND_INVALID RCX (alignment, range), RDX; OPERAND_BUSY RTMR; TD exit when RCX does not translate.
    """
    regs = guest.regs
    cpu = guest.cpu
    if regs.rcx % RTMR_ALIGNMENT:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    extension = cpu.read(guest_pa(guest, regs.rcx, Operand.RCX), HASH_SIZE)
    if regs.rdx >= RTMR_COUNT:
        raise LeafError(Status.OPERAND_INVALID, Operand.RDX)
    td = guest.td
    td.lock(LockId.RTMR, EXCLUSIVE, Operand.RTMR, guest=True)
    at = tdcs.RTMR + HASH_SIZE * regs.rdx
    td.write(at, hashlib.sha384(td.read(at, HASH_SIZE) + extension).digest())
    td.wr8(tdcs.LAST_TEEINFO_HASH_VALID, 0)


@tdcall(TdcallLeaf.MR_VERIFYREPORT)
def mr_verifyreport(guest: Guest) -> None:
    """TDG.MR.VERIFYREPORT: was this REPORTMACSTRUCT made on this platform, by the processors as they are now?

    In: RCX GPA of 256 bytes, private, 256-byte aligned.
    OPERAND_INVALID RAX: the processor has no SEAMVERIFYREPORT; OPERAND_INVALID RCX (alignment, range);
    INVALID_CPUSVN, INVALID_REPORTMACSTRUCT; TD exit when RCX does not translate.
    """
    cpu = guest.cpu
    if not cpu.seamops_capabilities() >> SeamOpsLeaf.SEAMVERIFYREPORT & 1:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    gpa = guest.regs.rcx
    if gpa % REPORT_MAC_SIZE:
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    verdict = cpu.seamops_verify_report(cpu.read(guest_pa(guest, gpa, Operand.RCX), REPORT_MAC_SIZE))
    if verdict is SeamOpsStatus.CPUSVN_ERROR:
        raise LeafError(Status.INVALID_CPUSVN)
    if verdict is not SeamOpsStatus.SUCCESS:
        raise LeafError(Status.INVALID_REPORTMACSTRUCT)
