"""Instructions that a TD cannot execute: given to its #VE handler, or refused as they are where VMX and SGX are off.

TDX Module Base Spec, "Guest TD Instructions"; the reasons come from controls that VP.INIT sets once and for all.
"""

from typing import Final

from softtdx.abi.exits import ExitReason as R
from softtdx.abi.exits import VeCategory
from softtdx.abi.status import Status

from .. import vmcs
from ..fatal import ModuleFatal
from ..features import XCR0_USER_MASK, xcr0_valid
from ..transitions.guest import Guest, TdExit

__all__ = ["PARAVIRT", "UNDEFINED", "give_configurable_ve", "give_gp", "give_ud", "give_ve", "rdpmc", "xsetbv"]

PARAVIRT: Final = (R.IO_INSTRUCTION, R.HLT, R.INVD, R.VMCALL, R.WBINVD, R.APIC_WRITE)
UNDEFINED: Final = (
    R.GETSEC, R.RSM, R.VMCLEAR, R.VMLAUNCH, R.VMPTRLD, R.VMPTRST, R.VMREAD, R.VMRESUME, R.VMWRITE, R.VMXOFF, R.VMXON,
    R.INVEPT, R.INVVPID, R.VMFUNC, R.ENCLS, R.ENCLV, R.ENQCMDS_PASID, R.SEAMCALL, R.MWAIT, R.MONITOR,
)  # fmt: skip

RAX, RCX, RDX = 0, 1, 2
U32: Final = 0xFFFF_FFFF


def give_ve(guest: Guest) -> None:
    """#VE: the guest's handler asks the host for the service."""
    guest.inject_ve(guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION), VeCategory.PARAVIRT)


def give_configurable_ve(guest: Guest) -> None:
    """#VE for an instruction that exits only because the TD was configured to see it (PCONFIG)."""
    guest.inject_ve(guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION), VeCategory.CONFIGURABLE_PARAVIRT)


def give_ud(guest: Guest) -> None:
    """#UD: for the TD the feature does not exist."""
    guest.inject_ud()


def give_gp(guest: Guest) -> None:
    """#GP(0)."""
    guest.inject_gp()


def rdpmc(guest: Guest) -> None:
    """RDPMC exits only in a TD without PERFMON, for which it is #GP(0), or for a debugger."""
    if not guest.perfmon:
        guest.inject_gp()
        return
    if guest.debug:
        raise TdExit(Status.SUCCESS, guest.reason, guest.cpu.vmread(vmcs.EXIT_QUALIFICATION))
    raise ModuleFatal("RDPMC exited in a TD that has PERFMON")


def xsetbv(guest: Guest) -> None:
    """XSETBV of XCR0, within what the processor has and XFAM allows; anything else is #GP(0)."""
    cpu = guest.cpu
    value = cpu.gpr(RDX) << 32 & (U32 << 32) | cpu.gpr(RAX) & U32
    if cpu.gpr(RCX) & U32 or not xcr0_valid(guest.xfam & XCR0_USER_MASK, value):
        guest.inject_gp()
        return
    cpu.core.xcr0 = value
