"""Completion status of TDX module and SEAM loader functions: what RAX says when a leaf returns.

Layout of RAX (TDX Module ABI, "Function Completion Status Code"):

    63     62               61     60                        59:48  47:40  39:32      31:0
    ERROR  NON_RECOVERABLE  FATAL  HOST_RECOVERABILITY_HINT  0      CLASS  DETAIL_L1  DETAIL_L2

A status is bits 63:32; what bits 31:0 mean depends on it (`detail_kind`): an operand, an exit reason, a state.
"""

from enum import Enum, IntEnum
from typing import NamedTuple

__all__ = [
    "DetailKind",
    "Operand",
    "SeamldrStatus",
    "Status",
    "StatusParts",
    "describe",
    "split",
    "status_of",
    "with_operand",
]

ERROR = 1 << 63
NON_RECOVERABLE = 1 << 62
FATAL = 1 << 61
HOST_RECOVERABILITY_HINT = 1 << 60
STATUS_MASK = 0xFFFF_FFFF_0000_0000


class Operand(IntEnum):
    """Which operand of a leaf a status complains about: RAX bits 31:0 of most errors."""

    RAX = 0
    RCX = 1
    RDX = 2
    RBX = 3
    RBP = 5
    RSI = 6
    RDI = 7
    R8 = 8
    R9 = 9
    R10 = 10
    R11 = 11
    R12 = 12
    R13 = 13
    R14 = 14
    R15 = 15
    ATTRIBUTES = 64
    XFAM = 65
    EXEC_CONTROLS = 66
    EPTP_CONTROLS = 67
    MAX_VCPUS = 68
    CPUID_CONFIG = 69
    TSC_FREQUENCY = 70
    NUM_L2_VMS = 71
    IA32_ARCH_CAPABILITIES_CONFIG = 72
    PAGE = 95
    TDMR_INFO_PA = 96
    GPA_LIST_ENTRY = 97
    MIG_BUFF_LIST_ENTRY = 98
    NEW_PAGE_LIST_ENTRY = 99
    TDR = 128
    TDCX = 129
    TDVPR = 130
    REG_PAGE = 132
    TDCS = 144
    TDVPS = 145
    SEPT_TREE = 146
    SEPT_ENTRY = 147
    RTMR = 168
    TD_EPOCH = 169
    L2_VAPIC_GPA = 170
    MIGSC = 171
    OP_STATE = 172
    MIG = 173
    SERVTD_BINDINGS = 174
    METADATA_FIELD = 176
    NUM_VCPUS = 177
    CPUID_FIXED0_BITMAP = 178
    SYS = 184
    TDMR = 185
    KOT = 186
    KET = 187
    WBCACHE = 188


class DetailKind(Enum):
    """What RAX bits 31:0 hold beside a status."""

    OPERAND = "operand"
    EXIT_REASON = "VMX exit reason"
    OP_STATE = "TD OP_STATE"
    VCPU_STATE = "VCPU_STATE"
    MSR_INDEX = "MSR"
    CPUID_LEAF = "CPUID leaf"
    TDMR_INFO = "TDMR index, PAMT page size or reserved-area index, second TDMR index"
    SMRR_INFO = "SMRR index, CMR index"
    L2_WALK = "L2 VM index and S-EPT level"
    LEVEL = "S-EPT level"
    LIST_POSITION = "metadata sequence and field index"
    FIELD_CODE = "metadata field code"
    INDEX = "index"
    NUMBER = "number"


class StatusParts(NamedTuple):
    """A RAX value taken apart."""

    error: bool
    non_recoverable: bool
    fatal: bool
    host_recoverability_hint: bool
    klass: int
    detail_l1: int
    detail_l2: int


class Status(IntEnum):
    """What a TDX module function reports in RAX, with bits 31:0 clear (TDX module 1.5.25)."""

    # class 0: generic
    SUCCESS = 0x0000_0000_0000_0000
    NON_RECOVERABLE_VCPU = 0x4000_0001_0000_0000
    NON_RECOVERABLE_TD = 0x6000_0002_0000_0000
    INTERRUPTED_RESUMABLE = 0x8000_0003_0000_0000
    INTERRUPTED_RESTARTABLE = 0x8000_0004_0000_0000
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005_0000_0000
    INVALID_RESUMPTION = 0xC000_0006_0000_0000
    NON_RECOVERABLE_TD_WRONG_APIC_MODE = 0xE000_0007_0000_0000
    CROSS_TD_FAULT = 0x8000_0008_0000_0000
    CROSS_TD_TRAP = 0x9000_0009_0000_0000
    NON_RECOVERABLE_TD_CORRUPTED_MD = 0x6000_000A_0000_0000
    # class 1: operands
    OPERAND_INVALID = 0xC000_0100_0000_0000
    OPERAND_ADDR_RANGE_ERROR = 0xC000_0101_0000_0000
    EVENT_FILTER_INVALID = 0xC000_0102_0000_0000
    EVENT_FILTER_ORDER_INVALID = 0xC000_0103_0000_0000
    # class 2: busy
    OPERAND_BUSY = 0x8000_0200_0000_0000
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201_0000_0000
    SYS_BUSY = 0x8000_0202_0000_0000
    RND_NO_ENTROPY = 0x8000_0203_0000_0000
    OPERAND_BUSY_HOST_PRIORITY = 0x8000_0204_0000_0000
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205_0000_0000
    INTERRUPTED_BUSY = 0x8000_0206_0000_0000
    # class 3: PAMT
    PAGE_METADATA_INCORRECT = 0xC000_0300_0000_0000
    PAGE_ALREADY_FREE = 0x0000_0301_0000_0000
    PAGE_NOT_OWNED_BY_TD = 0xC000_0302_0000_0000
    PAGE_NOT_FREE = 0xC000_0303_0000_0000
    HPA_RANGE_NOT_FREE = 0xC000_0304_0000_0000
    NO_PAMT_PAGE_PAIR = 0xC000_0305_0000_0000
    PAMT_PAGE_NOT_EMPTY = 0xC000_0306_0000_0000
    INTERRUPTED_PAMT = 0x8000_0307_0000_0000
    MISSING_PAMT_PAGE_PAIR = 0x8000_0308_0000_0000
    # class 4: TD pages
    TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400_0000_0000
    # class 5: module life cycle
    SYS_INIT_NOT_PENDING = 0xC000_0500_0000_0000
    SYS_LP_INIT_NOT_DONE = 0xC000_0502_0000_0000
    SYS_LP_INIT_DONE = 0xC000_0503_0000_0000
    SYS_NOT_READY = 0xC000_0505_0000_0000
    SYS_SHUTDOWN = 0xC000_0506_0000_0000
    SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507_0000_0000
    SYS_STATE_INCORRECT = 0xC000_0508_0000_0000
    SYS_INVALID_HANDOFF = 0xC000_0509_0000_0000
    SYS_INCOMPATIBLE_SIGSTRUCT = 0xC000_050A_0000_0000
    SYS_LP_INIT_NOT_PENDING = 0xC000_050B_0000_0000
    SYS_CONFIG_NOT_PENDING = 0xC000_050C_0000_0000
    INCOMPATIBLE_SEAM_CAPABILITIES = 0xC000_050D_0000_0000
    CRYPTO_SELF_TEST_FAILED = 0xC000_0511_0000_0000
    UPDATE_COMPATIBILITY_SENSITIVE = 0x8000_0512_0000_0000
    # class 6: TD state
    TD_FATAL = 0xE000_0604_0000_0000
    TD_NON_DEBUG = 0xC000_0605_0000_0000
    TDCS_NOT_ALLOCATED = 0xC000_0606_0000_0000
    LIFECYCLE_STATE_INCORRECT = 0xC000_0607_0000_0000
    OP_STATE_INCORRECT = 0xC000_0608_0000_0000
    NO_VCPUS = 0xC000_0609_0000_0000
    TDCX_NUM_INCORRECT = 0xC000_0610_0000_0000
    X2APIC_ID_NOT_UNIQUE = 0xC000_0621_0000_0000
    INCOMPATIBLE_MRTD_CONTEXT = 0xC000_0622_0000_0000
    # class 7: vCPU state
    VCPU_STATE_INCORRECT = 0xC000_0700_0000_0000
    VCPU_ASSOCIATED = 0x8000_0701_0000_0000
    VCPU_NOT_ASSOCIATED = 0x8000_0702_0000_0000
    NO_VALID_VE_INFO = 0xC000_0704_0000_0000
    MAX_VCPUS_EXCEEDED = 0xC000_0705_0000_0000
    TSC_ROLLBACK = 0xC000_0706_0000_0000
    INTERRUPTIBILITY_BLOCKED = 0xC000_0707_0000_0000
    TD_VMCS_FIELD_NOT_INITIALIZED = 0xC000_0730_0000_0000
    TD_VMCS_FIELD_ERROR = 0xC000_0731_0000_0000
    # class 8: keys
    KEY_GENERATION_FAILED = 0x8000_0800_0000_0000
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810_0000_0000
    KEY_STATE_INCORRECT = 0xC000_0811_0000_0000
    KEY_CONFIGURED = 0x0000_0815_0000_0000
    WBCACHE_NOT_COMPLETE = 0x8000_0817_0000_0000
    HKID_NOT_FREE = 0xC000_0820_0000_0000
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821_0000_0000
    WBCACHE_RESUME_ERROR = 0xC000_0823_0000_0000
    FLUSHVP_NOT_DONE = 0x8000_0824_0000_0000
    NUM_ACTIVATED_HKIDS_NOT_SUPPORTED = 0xC000_0825_0000_0000
    # class 9: platform checks
    INCORRECT_CPUID_VALUE = 0xC000_0900_0000_0000
    LIMIT_CPUID_MAXVAL_SET = 0xC000_0901_0000_0000
    INCONSISTENT_CPUID_FIELD = 0xC000_0902_0000_0000
    CPUID_MAX_SUBLEAVES_UNRECOGNIZED = 0xC000_0903_0000_0000
    CPUID_LEAF_1F_FORMAT_UNRECOGNIZED = 0xC000_0904_0000_0000
    INVALID_WBINVD_SCOPE = 0xC000_0905_0000_0000
    INVALID_PKG_ID = 0xC000_0906_0000_0000
    ENABLE_MONITOR_FSM_NOT_SET = 0xC000_0907_0000_0000
    CPUID_LEAF_NOT_SUPPORTED = 0xC000_0908_0000_0000
    SMRR_NOT_LOCKED = 0xC000_0910_0000_0000
    INVALID_SMRR_CONFIGURATION = 0xC000_0911_0000_0000
    SMRR_OVERLAPS_CMR = 0xC000_0912_0000_0000
    SMRR_LOCK_NOT_SUPPORTED = 0xC000_0913_0000_0000
    SMRR_NOT_SUPPORTED = 0xC000_0914_0000_0000
    INCONSISTENT_MSR = 0xC000_0920_0000_0000
    INCORRECT_MSR_VALUE = 0xC000_0921_0000_0000
    SEAMREPORT_NOT_AVAILABLE = 0xC000_0930_0000_0000
    SEAMDB_GETREF_NOT_AVAILABLE = 0xC000_0931_0000_0000
    SEAMDB_REPORT_NOT_AVAILABLE = 0xC000_0932_0000_0000
    SEAMVERIFYREPORT_NOT_AVAILABLE = 0xC000_0933_0000_0000
    # class 10: TDMR and PAMT configuration
    INVALID_TDMR = 0xC000_0A00_0000_0000
    NON_ORDERED_TDMR = 0xC000_0A01_0000_0000
    TDMR_OUTSIDE_CMRS = 0xC000_0A02_0000_0000
    TDMR_ALREADY_INITIALIZED = 0x0000_0A03_0000_0000
    INVALID_PAMT = 0xC000_0A10_0000_0000
    PAMT_OUTSIDE_CMRS = 0xC000_0A11_0000_0000
    PAMT_OVERLAP = 0xC000_0A12_0000_0000
    INVALID_RESERVED_IN_TDMR = 0xC000_0A20_0000_0000
    NON_ORDERED_RESERVED_IN_TDMR = 0xC000_0A21_0000_0000
    CMR_LIST_INVALID = 0xC000_0A22_0000_0000
    # class 11: S-EPT
    EPT_WALK_FAILED = 0xC000_0B00_0000_0000
    EPT_ENTRY_FREE = 0xC000_0B01_0000_0000
    EPT_ENTRY_NOT_FREE = 0xC000_0B02_0000_0000
    EPT_ENTRY_NOT_PRESENT = 0xC000_0B03_0000_0000
    EPT_ENTRY_NOT_LEAF = 0xC000_0B04_0000_0000
    EPT_ENTRY_LEAF = 0xC000_0B05_0000_0000
    GPA_RANGE_NOT_BLOCKED = 0xC000_0B06_0000_0000
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07_0000_0000
    TLB_TRACKING_NOT_DONE = 0xC000_0B08_0000_0000
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09_0000_0000
    PAGE_ALREADY_ACCEPTED = 0x0000_0B0A_0000_0000
    PAGE_SIZE_MISMATCH = 0xC000_0B0B_0000_0000
    GPA_RANGE_BLOCKED = 0xC000_0B0C_0000_0000
    EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D_0000_0000
    EPT_PAGE_NOT_FREE = 0xC000_0B0E_0000_0000
    L2_SEPT_WALK_FAILED = 0xC000_0B0F_0000_0000
    L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10_0000_0000
    PAGE_ATTR_INVALID = 0xC000_0B11_0000_0000
    L2_SEPT_PAGE_NOT_PROVIDED = 0xC000_0B12_0000_0000
    # class 12: metadata
    METADATA_FIELD_ID_INCORRECT = 0xC000_0C00_0000_0000
    METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01_0000_0000
    METADATA_FIELD_NOT_READABLE = 0xC000_0C02_0000_0000
    METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03_0000_0000
    METADATA_LIST_OVERFLOW = 0xC000_0C04_0000_0000
    INVALID_METADATA_LIST_HEADER = 0xC000_0C05_0000_0000
    REQUIRED_METADATA_FIELD_MISSING = 0xC000_0C06_0000_0000
    METADATA_ELEMENT_SIZE_INCORRECT = 0xC000_0C07_0000_0000
    METADATA_LAST_ELEMENT_INCORRECT = 0xC000_0C08_0000_0000
    METADATA_FIELD_CURRENTLY_NOT_WRITABLE = 0xC000_0C09_0000_0000
    METADATA_WR_MASK_NOT_VALID = 0xC000_0C0A_0000_0000
    METADATA_FIRST_FIELD_ID_IN_CONTEXT = 0x0000_0C0B_0000_0000
    METADATA_FIELD_SKIP = 0x0000_0C0C_0000_0000
    VIRTUAL_MSR_VALUE_NOT_VALID = 0xC000_0C0D_0000_0000
    METADATA_FIELD_NOT_ALLOCATED = 0xC000_0C0E_0000_0000
    # class 13: service TDs
    SERVTD_ALREADY_BOUND_FOR_TYPE = 0xC000_0D00_0000_0000
    SERVTD_TYPE_MISMATCH = 0xC000_0D01_0000_0000
    SERVTD_ATTR_MISMATCH = 0xC000_0D02_0000_0000
    SERVTD_INFO_HASH_MISMATCH = 0xC000_0D03_0000_0000
    SERVTD_UUID_MISMATCH = 0xC000_0D04_0000_0000
    SERVTD_NOT_BOUND = 0xC000_0D05_0000_0000
    SERVTD_BOUND = 0xC000_0D06_0000_0000
    TARGET_UUID_MISMATCH = 0xC000_0D07_0000_0000
    TARGET_UUID_UPDATED = 0xC000_0D08_0000_0000
    # class 14: migration
    INVALID_MBMD = 0xC000_0E00_0000_0000
    INCORRECT_MBMD_MAC = 0xC000_0E01_0000_0000
    NOT_WRITE_BLOCKED = 0xC000_0E02_0000_0000
    ALREADY_WRITE_BLOCKED = 0x0000_0E03_0000_0000
    NOT_EXPORTED = 0xC000_0E04_0000_0000
    MIGRATION_STREAM_STATE_INCORRECT = 0xC000_0E05_0000_0000
    MAX_MIGS_NUM_EXCEEDED = 0xC000_0E06_0000_0000
    EXPORTED_DIRTY_PAGES_REMAIN = 0xC000_0E07_0000_0000
    MIGRATION_DECRYPTION_KEY_NOT_SET = 0xC000_0E08_0000_0000
    TD_NOT_MIGRATABLE = 0xC000_0E09_0000_0000
    PREVIOUS_EXPORT_CLEANUP_INCOMPLETE = 0xC000_0E0A_0000_0000
    NUM_MIGS_HIGHER_THAN_CREATED = 0xC000_0E0B_0000_0000
    IMPORT_MISMATCH = 0xC000_0E0C_0000_0000
    MIGRATION_EPOCH_OVERFLOW = 0xC000_0E0D_0000_0000
    MAX_EXPORTS_EXCEEDED = 0xC000_0E0E_0000_0000
    INVALID_PAGE_MAC = 0xC000_0E0F_0000_0000
    MIGRATED_IN_CURRENT_EPOCH = 0xC000_0E10_0000_0000
    DISALLOWED_IMPORT_OVER_REMOVED = 0xC000_0E11_0000_0000
    SOME_VCPUS_NOT_MIGRATED = 0xC000_0E12_0000_0000
    ALL_VCPUS_IMPORTED = 0xC000_0E13_0000_0000
    MIN_MIGS_NOT_CREATED = 0xC000_0E14_0000_0000
    VCPU_ALREADY_EXPORTED = 0xC000_0E15_0000_0000
    INVALID_MIGRATION_DECRYPTION_KEY = 0xC000_0E16_0000_0000
    INCOMPATIBLE_MBMD_MAC_CONTEXT = 0xC000_0E22_0000_0000
    # class 16: report checks
    INVALID_CPUSVN = 0xC000_1000_0000_0000
    INVALID_REPORTMACSTRUCT = 0xC000_1001_0000_0000
    # class 17: TD partitioning
    L2_EXIT_HOST_ROUTED_ASYNC = 0x0000_1100_0000_0000
    L2_EXIT_HOST_ROUTED_TDVMCALL = 0x0000_1101_0000_0000
    L2_EXIT_PENDING_INTERRUPT = 0x0000_1102_0000_0000
    L2_VM_ENTRY_FAILED = 0x8000_1103_0000_0000
    PENDING_INTERRUPT = 0x0000_1120_0000_0000
    TD_EXIT_BEFORE_L2_ENTRY = 0x0000_1140_0000_0000
    TD_EXIT_ON_L2_VM_EXIT = 0x0000_1141_0000_0000
    TD_EXIT_ON_L2_TO_L1 = 0x0000_1142_0000_0000
    GLA_NOT_CANONICAL = 0xC000_1160_0000_0000
    UNINITIALIZE_ERROR = 0xFFFF_FFFF_FFFF_FFFF

    @property
    def is_error(self) -> bool:
        """Whether bit 63 is set: the function failed."""
        return bool(self._value_ & ERROR)

    @property
    def non_recoverable(self) -> bool:
        """Whether bit 62 is set: repeating the call as it is cannot succeed."""
        return bool(self._value_ & NON_RECOVERABLE)

    @property
    def fatal(self) -> bool:
        """Whether bit 61 is set: the TD can only be torn down."""
        return bool(self._value_ & FATAL)

    @property
    def host_recoverability_hint(self) -> bool:
        """Whether bit 60 is set: the host, not the guest, is expected to resolve it."""
        return bool(self._value_ & HOST_RECOVERABILITY_HINT)

    @property
    def klass(self) -> int:
        """CLASS, bits 47:40: which part of the architecture the status is about."""
        return (self._value_ >> 40) & 0xFF

    @property
    def detail_l1(self) -> int:
        """DETAIL_L1, bits 39:32: the number of the status in its class."""
        return (self._value_ >> 32) & 0xFF

    @property
    def detail_kind(self) -> DetailKind:
        """What bits 31:0 hold beside this status."""
        return _DETAIL_KINDS.get(self, DetailKind.OPERAND)

    @classmethod
    def _missing_(cls, value: object) -> "Status | None":
        """Keep a code of a newer module as it came, so that traces still print."""
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            return None
        unknown = int.__new__(cls, value)
        unknown._name_, unknown._value_ = f"UNKNOWN_{value:#018x}", value
        return unknown


_DETAIL_KINDS: dict[Status, DetailKind] = {
    status: kind
    for kind, statuses in {
        DetailKind.EXIT_REASON: (
            Status.SUCCESS,
            Status.NON_RECOVERABLE_VCPU,
            Status.NON_RECOVERABLE_TD,
            Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE,
            Status.NON_RECOVERABLE_TD_WRONG_APIC_MODE,
            Status.NON_RECOVERABLE_TD_CORRUPTED_MD,
            Status.CROSS_TD_FAULT,
            Status.CROSS_TD_TRAP,
            Status.HOST_PRIORITY_BUSY_TIMEOUT,
            Status.L2_EXIT_HOST_ROUTED_ASYNC,
            Status.L2_EXIT_HOST_ROUTED_TDVMCALL,
            Status.L2_EXIT_PENDING_INTERRUPT,
            Status.L2_VM_ENTRY_FAILED,
            Status.TD_EXIT_ON_L2_VM_EXIT,
            Status.TD_EXIT_ON_L2_TO_L1,
        ),
        DetailKind.OP_STATE: (Status.OP_STATE_INCORRECT,),
        DetailKind.VCPU_STATE: (Status.VCPU_STATE_INCORRECT,),
        DetailKind.MSR_INDEX: (
            Status.INCONSISTENT_MSR,
            Status.INCORRECT_MSR_VALUE,
        ),
        DetailKind.CPUID_LEAF: (Status.CPUID_LEAF_NOT_SUPPORTED,),
        DetailKind.TDMR_INFO: (
            Status.INVALID_TDMR,
            Status.NON_ORDERED_TDMR,
            Status.TDMR_OUTSIDE_CMRS,
            Status.INVALID_PAMT,
            Status.PAMT_OUTSIDE_CMRS,
            Status.PAMT_OVERLAP,
            Status.INVALID_RESERVED_IN_TDMR,
            Status.NON_ORDERED_RESERVED_IN_TDMR,
        ),
        DetailKind.SMRR_INFO: (
            Status.SMRR_NOT_LOCKED,
            Status.INVALID_SMRR_CONFIGURATION,
            Status.SMRR_OVERLAPS_CMR,
        ),
        DetailKind.L2_WALK: (
            Status.L2_SEPT_WALK_FAILED,
            Status.L2_SEPT_ENTRY_NOT_FREE,
        ),
        DetailKind.LEVEL: (
            Status.PAGE_ALREADY_ACCEPTED,
            Status.PAGE_SIZE_MISMATCH,
        ),
        DetailKind.LIST_POSITION: (
            Status.METADATA_LIST_OVERFLOW,
            Status.INVALID_METADATA_LIST_HEADER,
        ),
        DetailKind.FIELD_CODE: (
            Status.TD_VMCS_FIELD_NOT_INITIALIZED,
            Status.VIRTUAL_MSR_VALUE_NOT_VALID,
        ),
        DetailKind.INDEX: (
            Status.EVENT_FILTER_INVALID,
            Status.EVENT_FILTER_ORDER_INVALID,
            Status.PAMT_PAGE_NOT_EMPTY,
        ),
        DetailKind.NUMBER: (
            Status.INVALID_PKG_ID,
            Status.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED,
            Status.X2APIC_ID_NOT_UNIQUE,
        ),
    }.items()
    for status in statuses
}

_BY_VALUE: dict[int, Status] = {int(status): status for status in Status}

# The FATAL and HINT bits may be raised on a status that does not carry them by definition.
_BY_IDENTITY: dict[int, Status] = {(int(status) >> 32) & 0xFFFF: status for status in Status}


class SeamldrStatus(IntEnum):
    """What P-SEAMLDR reports in RAX; NP-SEAMLDR, an authenticated code module, uses codes 1, 2, 10000H and 10001H."""

    SUCCESS = 0
    EBADPARAM = 0x8000_0000_0000_0000
    EMODBUSY = 0x8000_0000_0000_0001
    ELDRINPROG = 0x8000_0000_0000_0002
    EBADCALL = 0x8000_0000_0000_0003
    EBADHANDOFF = 0x8000_0000_0000_0004
    EBADRANGE = 0x8000_0000_0001_0000
    EBADPLATF = 0x8000_0000_0001_0001
    ENOMEM = 0x8000_0000_0001_0002
    EUNSPECERR = 0x8000_0000_0001_0003
    EUNSUPCPU = 0x8000_0000_0001_0004
    EBADSIG = 0x8000_0000_0002_0000
    EBADHASH = 0x8000_0000_0002_0001
    EINTERRUPT = 0x8000_0000_0003_0000
    ENOENTROPY = 0x8000_0000_0003_0001

    @property
    def is_error(self) -> bool:
        """Whether bit 63 is set: the function failed."""
        return bool(self._value_ & ERROR)


def split(rax: int) -> StatusParts:
    """Take a RAX value apart by the layout above, whatever it holds."""
    return StatusParts(
        bool(rax & ERROR),
        bool(rax & NON_RECOVERABLE),
        bool(rax & FATAL),
        bool(rax & HOST_RECOVERABILITY_HINT),
        (rax >> 40) & 0xFF,
        (rax >> 32) & 0xFF,
        rax & 0xFFFF_FFFF,
    )


def status_of(rax: int) -> Status:
    """The status in a RAX value; one that this module version does not define keeps its number."""
    value = rax & STATUS_MASK
    known = _BY_VALUE.get(value)
    if known is not None:
        return known
    if value == STATUS_MASK:
        return Status.UNINITIALIZE_ERROR
    return Status(value)


def with_operand(status: int, operand: int) -> int:
    """RAX for a status with an operand id (or another detail) in bits 31:0."""
    return int(status) | (operand & 0xFFFF_FFFF)


def describe(rax: int) -> str:
    """One line for any RAX of a TDX module function: name, detail, and the bits that say what can be done.

    >>> describe(0xC000_0100_0000_0001)
    'OPERAND_INVALID (operand RCX)'
    """
    if rax >> 64 or rax < 0:
        return f"{rax:#x}: not a 64-bit value"
    status = status_of(rax)
    if status is Status.UNINITIALIZE_ERROR:
        return status.name
    name = _describe_unknown(rax) if status.name.startswith("UNKNOWN_") else status.name
    detail = rax & 0xFFFF_FFFF
    if detail == 0 and not _names_operand_zero(status):
        return name
    return f"{name} ({_describe_detail(status.detail_kind, detail)})"


def _names_operand_zero(status: Status) -> bool:
    """Operand id 0 is RAX: real for the statuses of class 1, plain absence of an operand elsewhere."""
    return status in (Status.OPERAND_INVALID, Status.OPERAND_ADDR_RANGE_ERROR)


def _describe_unknown(rax: int) -> str:
    parts = split(rax)
    flags = [flag for flag, on in zip(("error", "non-recoverable", "fatal", "host hint"), parts[:4], strict=True) if on]
    base = _BY_IDENTITY.get((rax >> 32) & 0xFFFF)
    plain = rax & (0xFFF << 48) == 0
    name = base.name if base is not None and plain else f"unknown status {rax & STATUS_MASK:#018x}"
    return f"{name} [{', '.join(flags) or 'no error'}]"


def _describe_detail(kind: DetailKind, detail: int) -> str:
    low, high = detail & 0xFFFF, detail >> 16
    if kind is DetailKind.OPERAND:
        try:
            return f"operand {Operand(detail).name}"
        except ValueError:
            return f"detail {detail:#x}"
    if kind is DetailKind.L2_WALK:
        return f"L2 VM {high}, level {low}"
    if kind is DetailKind.LIST_POSITION:
        return f"sequence {low if high == 0xFFFF else high}" + ("" if high == 0xFFFF else f", field {low}")
    if kind in (DetailKind.TDMR_INFO, DetailKind.SMRR_INFO):
        return f"{kind.value}: " + ", ".join(str(byte) for byte in detail.to_bytes(4, "little"))
    if kind in (DetailKind.MSR_INDEX, DetailKind.CPUID_LEAF, DetailKind.FIELD_CODE, DetailKind.EXIT_REASON):
        return f"{kind.value} {detail:#x}"
    return f"{kind.value} {detail}"
