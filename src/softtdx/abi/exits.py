"""VM exits and what they become: exit reasons, exception vectors and event information, #VE categories.

Exit reasons: SDM volume 3, appendix C, and the SEAM additions 76 and 77. #VE categories and extended exit
qualification: TDX Module ABI, "TDG.VP.VEINFO.GET" and "TDH.VP.ENTER".
"""

from enum import IntEnum, IntFlag
from typing import Final


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
    SGX_CONFLICT = 71
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


# --- EXIT_REASON, beside the basic reason
EXIT_BASIC_MASK: Final = 0xFFFF
EXIT_BUS_LOCK_PREEMPTED: Final = 1 << 26
EXIT_ENCLAVE: Final = 1 << 27
EXIT_PENDING_MTF: Final = 1 << 28
EXIT_PARALLEL: Final = 1 << 29
EXIT_ENTRY_FAILED: Final = 1 << 31

# --- interruption information, of VM exit, VM entry and IDT vectoring alike (SDM 25.9.2)
#     31     12                    11          10:8   7:0
#     VALID  NMI_UNBLOCKED_BY_IRET ERROR_CODE  TYPE   VECTOR
INFO_VECTOR_MASK: Final = 0xFF
INFO_TYPE_MASK: Final = 0x700
INFO_TYPE_NMI: Final = 2 << 8
INFO_TYPE_HARDWARE_EXCEPTION: Final = 3 << 8
INFO_ERROR_CODE: Final = 1 << 11
INFO_NMI_UNBLOCKING: Final = 1 << 12  # VM-exit information only
INFO_VALID: Final = 1 << 31
INFO_ENTRY_MASK: Final = INFO_VALID | INFO_ERROR_CODE | INFO_TYPE_MASK | INFO_VECTOR_MASK  # not reserved at entry

# --- guest interruptibility state
BLOCKING_BY_STI: Final = 1 << 0
BLOCKING_BY_MOV_SS: Final = 1 << 1
BLOCKING_BY_SMI: Final = 1 << 2
BLOCKING_BY_NMI: Final = 1 << 3
ENCLAVE_INTERRUPTION: Final = 1 << 4

# --- pending debug exceptions
PENDING_DEBUG_ENABLED: Final = 1 << 12
PENDING_DEBUG_BS: Final = 1 << 14
PENDING_DEBUG_RTM: Final = 1 << 16

# --- exit qualification of an EPT violation (SDM 28.2.1)
EPT_READ: Final = 1 << 0
EPT_WRITE: Final = 1 << 1
EPT_FETCH: Final = 1 << 2
EPT_READABLE: Final = 1 << 3
EPT_WRITABLE: Final = 1 << 4
EPT_EXECUTABLE: Final = 1 << 5
EPT_USER_EXECUTABLE: Final = 1 << 6
EPT_GLA_VALID: Final = 1 << 7
EPT_GLA_TRANSLATED: Final = 1 << 8  # clear: the access was to a paging-structure entry
EPT_USER_ADDRESS: Final = 1 << 9
EPT_WRITABLE_ADDRESS: Final = 1 << 10
EPT_EXECUTE_DISABLE_ADDRESS: Final = 1 << 11
EPT_NMI_UNBLOCKED: Final = 1 << 12
EPT_SHADOW_STACK: Final = 1 << 13
EPT_HOST_MASK: Final = 0x1F80  # 12:7, which the TDX module hides from the host


class Vector(IntEnum):
    """Exception vectors."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21


NMI_VECTOR: Final[int] = Vector.NMI.value
UD_VECTOR: Final[int] = Vector.UD.value
DF_VECTOR: Final[int] = Vector.DF.value
GP_VECTOR: Final[int] = Vector.GP.value
PF_VECTOR: Final[int] = Vector.PF.value
MC_VECTOR: Final[int] = Vector.MC.value
VE_VECTOR: Final[int] = Vector.VE.value

# Exceptions that push an error code.
WITH_ERROR_CODE: Final = frozenset(
    {Vector.DF, Vector.TS, Vector.NP, Vector.SS, Vector.GP, Vector.PF, Vector.AC, Vector.CP}
)


def exception_name(vector: int) -> str:
    """The mnemonic of an exception vector: 14 is "#PF"."""
    if vector == Vector.NMI:
        return "NMI"
    try:
        return f"#{Vector(vector).name}"
    except ValueError:
        return f"#{vector:02}" if vector in (9, 15) else f"vector {vector}"


class PageFault(IntFlag):
    """Error code of #PF."""

    PRESENT = 1 << 0
    WRITE = 1 << 1
    USER = 1 << 2
    RSVD = 1 << 3
    FETCH = 1 << 4
    PK = 1 << 5
    SHADOW_STACK = 1 << 6
    HLAT = 1 << 7
    SGX = 1 << 15


class EventType(IntEnum):
    """Bits 10:8 of VM-entry, VM-exit and IDT-vectoring information (INFO_* above are the other bits)."""

    EXTERNAL_INTERRUPT = 0
    NMI = 2
    HARDWARE_EXCEPTION = 3
    SOFTWARE_INTERRUPT = 4
    PRIVILEGED_SOFTWARE_EXCEPTION = 5
    SOFTWARE_EXCEPTION = 6
    OTHER = 7


def event_info(vector: int, kind: int, *, error_code: bool = False) -> int:
    """A valid VM-entry, VM-exit or IDT-vectoring information field."""
    return INFO_VALID | vector & INFO_VECTOR_MASK | kind << 8 | (INFO_ERROR_CODE if error_code else 0)


def exception_info(vector: int) -> int:
    """Event information of a hardware exception (NMI included), with the error-code bit where the vector has one."""
    if vector == Vector.NMI:
        return event_info(vector, EventType.NMI)
    return event_info(vector, EventType.HARDWARE_EXCEPTION, error_code=vector in WITH_ERROR_CODE)


class CrAccess(IntEnum):
    """Bits 5:4 of the exit qualification of reason 28."""

    MOV_TO = 0
    MOV_FROM = 1
    CLTS = 2
    LMSW = 3


class IoAccess(IntFlag):
    """Flags in the exit qualification of reason 30; bits 2:0 hold the size minus 1, bits 31:16 the port."""

    IN = 1 << 3
    STRING = 1 << 4
    REP = 1 << 5
    IMMEDIATE = 1 << 6


def io_qualification(port: int, size: int, *, direction_in: bool, flags: int = 0) -> int:
    """Exit qualification of an I/O instruction."""
    return (size - 1) & 7 | (IoAccess.IN if direction_in else 0) | flags | port << 16


def io_parts(qualification: int) -> tuple[int, int, bool, bool, bool]:
    """(port, size, IN, string, REP) of an I/O exit qualification."""
    return (
        qualification >> 16 & 0xFFFF,
        (qualification & 7) + 1,
        bool(qualification & IoAccess.IN),
        bool(qualification & IoAccess.STRING),
        bool(qualification & IoAccess.REP),
    )


class ActivityState(IntEnum):
    """Guest activity state."""

    ACTIVE = 0
    HLT = 1
    SHUTDOWN = 2
    WAIT_FOR_SIPI = 3


def accept_info(requested_level: int, *, level: int, state: int, leaf: bool, vm: int = 0) -> int:
    """Info of ACCEPT and ATTR_WR: requested level 2:0, entry level 5:3, public state 13:6, leaf 14, VM 21:20."""
    return requested_level & 7 | (level & 7) << 3 | (state & 0xFF) << 6 | int(leaf) << 14 | (vm & 3) << 20


def extended_qualification(kind: int, info: int = 0) -> int:
    """The extended exit qualification of a kind with its 32 bits of info."""
    return kind & 0xF | (info & 0xFFFF_FFFF) << 32


class VmInstructionError(IntEnum):
    """VM-instruction error numbers (SDM 31.4)."""

    VMCALL_IN_ROOT = 1
    VMCLEAR_INVALID_ADDRESS = 2
    VMCLEAR_VMXON_POINTER = 3
    VMLAUNCH_NOT_CLEAR = 4
    VMRESUME_NOT_LAUNCHED = 5
    VMRESUME_AFTER_VMXOFF = 6
    ENTRY_INVALID_CONTROLS = 7
    ENTRY_INVALID_HOST_STATE = 8
    VMPTRLD_INVALID_ADDRESS = 9
    VMPTRLD_VMXON_POINTER = 10
    VMPTRLD_WRONG_REVISION = 11
    UNSUPPORTED_COMPONENT = 12
    WRITE_READ_ONLY_COMPONENT = 13
    VMXON_IN_ROOT = 15
    ENTRY_INVALID_EXECUTIVE_VMCS = 16
    ENTRY_EXECUTIVE_NOT_LAUNCHED = 17
    ENTRY_EXECUTIVE_NOT_VMXON = 18
    VMCALL_VMCS_NOT_CLEAR = 19
    VMCALL_INVALID_EXIT_CONTROLS = 20
    VMCALL_WRONG_MSEG_REVISION = 22
    VMXOFF_DUAL_MONITOR = 23
    VMCALL_INVALID_SMM_MONITOR = 24
    ENTRY_INVALID_EXECUTION_CONTROLS_IN_EXECUTIVE = 25
    ENTRY_MOV_SS_BLOCKING = 26
    INVALID_OPERAND_TO_INVEPT = 28


def describe_reason(reason: int) -> str:
    """The name of an exit reason, with the flags in its upper bits."""
    basic = reason & EXIT_BASIC_MASK
    try:
        name = ExitReason(basic).name
    except ValueError:
        name = f"exit reason {basic}"
    flags = [text for bit, text in _REASON_FLAGS if reason & bit]
    return f"{name} [{', '.join(flags)}]" if flags else name


_REASON_FLAGS: Final = (
    (EXIT_BUS_LOCK_PREEMPTED, "bus lock"),
    (EXIT_ENCLAVE, "enclave"),
    (EXIT_PENDING_MTF, "pending MTF"),
    (EXIT_PARALLEL, "parallel"),
    (EXIT_ENTRY_FAILED, "VM-entry failure"),
)
