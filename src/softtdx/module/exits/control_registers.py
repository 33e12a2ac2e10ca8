"""MOV to CR0 and CR4, and LMSW, where the TD VMCS's masks make them exit (TDX Module Base Spec, "CR Handling").

Bits that a TD owns never exit. What exits sets or clears a bit that belongs to the module: an impossible value is
#GP(0) as on the processor, a possible one that TDX does not offer is #VE.
"""

from typing import Final

from softtdx.abi.exits import ExitReason, VeCategory
from softtdx.abi.msrs import Msr
from softtdx.abi.status import Status

from .. import vmcs
from ..features import ATTR_LASS, ATTR_PKS, CTL_REDUCE_VE, XFAM_CET, XFAM_PKU, XFAM_ULI, CpuidFlag
from ..transitions.guest import Guest, TdExit

__all__ = ["cr_access"]

# Exit qualification: CR number 3:0, access type 5:4, LMSW operand type 6, GPR 11:8, LMSW source 31:16
MOV_TO_CR, MOV_FROM_CR, CLTS, LMSW = range(4)
RSP: Final = 4

CR0_PE: Final = 1 << 0
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR0_IGNORED: Final = 0x1FFA_FFC0  # reserved bits 28:19, 17, 15:6: a write leaves them
CR0_LMSW: Final = 0xE  # MP, EM, TS
CR0_UPPER: Final = 0xFFFF_FFFF_0000_0000

CR4_MCE: Final = 1 << 6
CR4_VMXE: Final = 1 << 13
CR4_KL: Final = 1 << 19
CR4_PKE: Final = 1 << 22
CR4_CET: Final = 1 << 23
CR4_PKS: Final = 1 << 24
CR4_UINTR: Final = 1 << 25
CR4_LASS: Final = 1 << 27


def cr_access(guest: Guest) -> None:
    """An access to a control register. Kinds that no control of a TD VMCS makes exit end the TD, or tell a debugger."""
    cpu = guest.cpu
    qualification = cpu.vmread(vmcs.EXIT_QUALIFICATION)
    access, register = qualification >> 4 & 3, qualification & 0xF
    if access == MOV_TO_CR and register in (0, 4):
        number = qualification >> 8 & 0xF
        value = cpu.vmread(vmcs.RSP) if number == RSP else cpu.gpr(number)
        category = _write_cr0(guest, value) if register == 0 else _write_cr4(guest, value)
        if category is not None:
            guest.inject_ve(ExitReason.CR_ACCESS, qualification, category)
    elif access == LMSW:
        source = qualification >> 16 & 0xFFFF
        cpu.vmwrite(vmcs.CR0, source & CR0_LMSW | cpu.vmread(vmcs.CR0) & ~CR0_LMSW)
    else:
        raise TdExit(Status.SUCCESS if guest.debug else Status.NON_RECOVERABLE_TD, guest.reason, qualification)


def _write_cr0(guest: Guest, value: int) -> int | None:
    """MOV to CR0: done or #GP injected (None), or the category of a #VE."""
    cpu = guest.cpu
    msrs = guest.platform.msrs
    must = msrs[Msr.VMX_CR0_FIXED0] & ~(CR0_PE | CR0_PG)
    impossible = (
        must & ~value
        or value & ~msrs[Msr.VMX_CR0_FIXED1]
        or value & (CR0_PE | CR0_PG) == CR0_PG
        or (not value & CR0_WP and cpu.vmread(vmcs.CR4) & CR4_CET)
    )
    if impossible:
        guest.inject_gp()
        return None
    if not value & CR0_PE or not value & CR0_NE or value & (CR0_NW | CR0_CD | CR0_UPPER):
        return VeCategory.UNSUPPORTED_FEATURE
    cpu.vmwrite(vmcs.CR0, value & ~CR0_IGNORED | cpu.vmread(vmcs.CR0) & CR0_IGNORED)
    return None


def _write_cr4(guest: Guest, value: int) -> int | None:
    """MOV to CR4: #GP injected or, with REDUCE_VE, done (None), or the category of a #VE."""
    cpu = guest.cpu
    msrs = guest.platform.msrs
    impossible = (
        msrs[Msr.VMX_CR4_FIXED0] & ~CR4_VMXE & ~value
        or value & ~msrs[Msr.VMX_CR4_FIXED1]
        or value & _not_configured(guest)
        or (value & CR4_CET and not cpu.vmread(vmcs.CR0) & CR0_WP)
    )
    if impossible:
        guest.inject_gp()
        return None
    if guest.controls() & CTL_REDUCE_VE:
        shadow = cpu.vmread(vmcs.CR4_READ_SHADOW)
        if guest.flag(CpuidFlag.NOT_MCE) and value & CR4_MCE and not shadow & CR4_MCE:
            guest.inject_gp()
            return None
        cpu.vmwrite(vmcs.CR4_READ_SHADOW, shadow & ~CR4_MCE | value & CR4_MCE)
        return None
    return VeCategory.UNSUPPORTED_FEATURE if value & CR4_MCE else VeCategory.CONFIGURABLE_PARAVIRT


def _not_configured(guest: Guest) -> int:
    """CR4 bits of features that XFAM or ATTRIBUTES do not give the TD."""
    xfam, attributes = guest.xfam, guest.attributes
    bits = CR4_KL
    if not xfam & XFAM_PKU:
        bits |= CR4_PKE
    if xfam & XFAM_CET != XFAM_CET:
        bits |= CR4_CET
    if not xfam & XFAM_ULI:
        bits |= CR4_UINTR
    if not attributes & ATTR_PKS:
        bits |= CR4_PKS
    if not attributes & ATTR_LASS:
        bits |= CR4_LASS
    return bits
