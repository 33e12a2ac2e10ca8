"""VM exits and what they become: exit reasons, #VE categories, extended exit qualification.

Exit reasons: SDM volume 3, appendix C, and the SEAM additions 76 and 77. #VE categories and extended exit
qualification: TDX Module ABI, "TDG.VP.VEINFO.GET" and "TDH.VP.ENTER".
"""

from enum import IntEnum
from typing import Final

__all__ = ["ExitReason", "ExtendedQualification", "VeCategory", "exception_name"]


class ExitReason(IntEnum):
    """Basic exit reason: bits 15:0 of the VMCS field, and of RAX when TDH.VP.ENTER returns."""

    EXCEPTION_OR_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT = 3
    SIPI = 4
    IO_SMI = 5
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    GETSEC = 11
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    RSM = 17
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMXOFF = 26
    VMXON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    RDMSR = 31
    WRMSR = 32
    ENTRY_FAILURE_GUEST_STATE = 33
    ENTRY_FAILURE_MSR_LOADING = 34
    MWAIT = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR = 39
    PAUSE = 40
    ENTRY_FAILURE_MACHINE_CHECK = 41
    C_STATE_SMI = 42
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    VIRTUALIZED_EOI = 45
    GDTR_IDTR_ACCESS = 46
    LDTR_TR_ACCESS = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIGURATION = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PML_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    PCONFIG = 65
    SPP = 66
    UMWAIT = 67
    TPAUSE = 68
    LOADIWKEY = 69
    ENCLV = 70
    ENQCMD_PASID = 72
    ENQCMDS_PASID = 73
    BUS_LOCK = 74
    NOTIFY_WINDOW = 75
    SEAMCALL = 76
    TDCALL = 77


class VeCategory(IntEnum):
    """Why the module gave the guest a #VE: RCX 63:32 of TDG.VP.VEINFO.GET version 1 and up."""

    ARCHITECTURAL = 0x00
    PENDING_PAGE = 0x01
    RESERVED_GPA_BITS = 0x02
    CONFIGURABLE_PARAVIRT = 0x10  # the TD can do without by TD_CTLS.REDUCE_VE and FEATURE_PARAVIRT_CTLS
    PARAVIRT = 0x11
    UNSUPPORTED_FEATURE = 0x80


class ExtendedQualification(IntEnum):
    """RDX 3:0 when TDH.VP.ENTER returns; bits 63:32 are details of the kind."""

    NONE = 0
    ACCEPT = 1
    GPA_DETAILS = 2
    MSR_LOAD_FAILURE = 3
    XSTATE_LOAD_FAILURE = 4
    ATTR_WR = 5
    PENDING_EPT_VIOLATION = 6
    VM_ENTRY_FAILURE = 7


NMI_VECTOR: Final = 2
UD_VECTOR: Final = 6
DF_VECTOR: Final = 8
GP_VECTOR: Final = 13
PF_VECTOR: Final = 14
MC_VECTOR: Final = 18
VE_VECTOR: Final = 20

_EXCEPTIONS: Final = (
    "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "#09", "#TS", "#NP", "#SS", "#GP", "#PF", "#15",
    "#MF", "#AC", "#MC", "#XM", "#VE", "#CP",
)  # fmt: skip


def exception_name(vector: int) -> str:
    """The mnemonic of an exception vector: 14 is "#PF"."""
    return _EXCEPTIONS[vector] if 0 <= vector < len(_EXCEPTIONS) else f"vector {vector}"
