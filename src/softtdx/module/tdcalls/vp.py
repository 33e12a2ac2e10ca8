"""TDG.VP.*: the TD asks about its virtual processor, and calls its host (TDX Module ABI, "Guest-Side Interface")."""

from typing import Final

from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.status import Operand, Status

from .. import tdcs, tdvps
from ..errors import LeafError
from ..features import CTL_LOCK
from ..registry import tdcall
from ..transitions.guest import Guest, Vmcall

__all__ = ["vmcall_allowed"]

VEINFO_MAX_VERSION: Final = 2
SYS_RD_AVAILABLE: Final = 1
CPUIDVE_SUPERVISOR: Final = 1
CPUIDVE_USER: Final = 2
GPR_RBP: Final = 1 << 5
# RAX and RCX carry the call itself, RSP belongs to the guest.
NEVER_PASSED: Final = 1 << 0 | 1 << 1 | 1 << 4


@tdcall(TdcallLeaf.VP_VMCALL)
def vp_vmcall(guest: Guest) -> int | None:
    """TDG.VP.VMCALL: leave to the host with the registers that RCX selects (GHCI).

    In: RCX bits 15:0 select GPRs (not RAX, RCX, RSP; not RBP under CONFIG_FLAGS.NO_RBP_MOD), 31:16 XMM registers.
    Out, when the host enters the vCPU again: RAX success, the same registers from the host.
    OPERAND_INVALID RCX: another bit is set.
    """
    if vmcall_allowed(guest, guest.regs.rcx):
        raise Vmcall
    raise LeafError(Status.OPERAND_INVALID, Operand.RCX)


def vmcall_allowed(guest: Guest, control: int) -> bool:
    """Whether RCX selects only registers that a VMCALL may pass."""
    forbidden = NEVER_PASSED | GPR_RBP if guest.keeps_rbp else NEVER_PASSED
    return not (control & forbidden or control >> 32)


@tdcall(TdcallLeaf.VP_INFO)
def vp_info(guest: Guest) -> None:
    """TDG.VP.INFO: the TD execution environment.

    Out: RCX GPA width, RDX ATTRIBUTES, R8 NUM_VCPUS 31:0 and MAX_VCPUS 63:32, R9 this vCPU's index, R10 bit 0
    TDG.SYS.RD is there, R11 0.
    """
    regs = guest.regs
    td = guest.td
    regs.rcx = 52 if guest.gpaw else 48
    regs.rdx = guest.attributes
    regs.r8 = td.rd32(tdcs.NUM_VCPUS) | td.rd32(tdcs.MAX_VCPUS) << 32
    regs.r9 = guest.vcpu.rd32(tdvps.VCPU_INDEX)
    regs.r10 = SYS_RD_AVAILABLE
    regs.r11 = 0


@tdcall(TdcallLeaf.VP_VEINFO_GET)
def vp_veinfo_get(guest: Guest) -> None:
    """TDG.VP.VEINFO.GET: what the last #VE was about; the next #VE may come from now on.

    Out: RCX exit reason 31:0 (and, from version 1, category 63:32), RDX exit qualification, R8 guest-linear address,
    R9 guest-physical address, R10 instruction length 31:0 and information 63:32; version 2: R11 0, R12
    interruptibility state. On an error RCX, RDX, R8, R9, R10 are 0.
    OPERAND_INVALID RAX: version above 2. NO_VALID_VE_INFO: no #VE is waiting.
    """
    regs = guest.regs
    version = guest.version
    regs.rcx = regs.rdx = regs.r8 = regs.r9 = regs.r10 = 0
    if version > VEINFO_MAX_VERSION:
        raise LeafError(Status.OPERAND_INVALID, Operand.RAX)
    vcpu = guest.vcpu
    if not vcpu.rd32(tdvps.VE_VALID):
        raise LeafError(Status.NO_VALID_VE_INFO)
    regs.rcx = vcpu.rd32(tdvps.VE_EXIT_REASON)
    if version:
        regs.rcx |= vcpu.rd8(tdvps.VE_CATEGORY) << 32
    regs.rdx = vcpu.rd64(tdvps.VE_EXIT_QUALIFICATION)
    regs.r8 = vcpu.rd64(tdvps.VE_GLA)
    regs.r9 = vcpu.rd64(tdvps.VE_GPA)
    regs.r10 = vcpu.rd32(tdvps.VE_INSTRUCTION_LENGTH) | vcpu.rd32(tdvps.VE_INSTRUCTION_INFORMATION) << 32
    if version == VEINFO_MAX_VERSION:
        regs.r11 = 0
        regs.r12 = vcpu.rd32(tdvps.VE_INTERRUPTIBILITY_STATE)
    vcpu.wr32(tdvps.VE_VALID, 0)


@tdcall(TdcallLeaf.VP_CPUIDVE_SET)
def vp_cpuidve_set(guest: Guest) -> None:
    """TDG.VP.CPUIDVE.SET: #VE on every CPUID of this vCPU.

    In: RCX bit 0 in supervisor mode (CPL 0), bit 1 in user mode.
    OPERAND_INVALID RCX: another bit is set, or the setting would change while TD_CTLS is locked.
    """
    control = guest.regs.rcx
    if control & ~(CPUIDVE_SUPERVISOR | CPUIDVE_USER):
        raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    supervisor, user = control & 1, control >> 1
    vcpu = guest.vcpu
    if guest.controls() & CTL_LOCK:
        before = vcpu.rd8(tdvps.CPUID_SUPERVISOR_VE), vcpu.rd8(tdvps.CPUID_USER_VE)
        if before != (supervisor, user):
            raise LeafError(Status.OPERAND_INVALID, Operand.RCX)
    vcpu.wr8(tdvps.CPUID_SUPERVISOR_VE, supervisor)
    vcpu.wr8(tdvps.CPUID_USER_VE, user)
