"""What migration and metadata lists put in memory: MBMD, GPA lists, page lists, metadata sequences.

TDX Module ABI, "Migration" data types. Entries of 8 bytes are structures over one integer, `raw`.
"""

from enum import IntEnum, IntFlag
from typing import Final

from softtdx.abi.wire import Wire, bits, raw, uint

__all__ = [
    "GpaEntryStatus",
    "GpaListEntry",
    "GpaListInfo",
    "GpaOperation",
    "MbType",
    "Mbmd",
    "MdListHeader",
    "MigType",
    "PageListEntry",
    "PageListInfo",
    "ServtdAttributes",
    "ServtdBindingState",
]

MAX_MIGRATION_STREAMS: Final = 512
MD_LIST_SIZE: Final = 4096
MAX_MBMD_SIZE: Final = 48
STREAM_RESUME: Final = 1 << 63  # in R10, beside the stream index; TRACK takes it as "start token"


class MbType(IntEnum):
    """MBMD.mb_type: what a migration bundle holds."""

    IMMUTABLE_TD_STATE = 0
    TD_STATE = 1
    VP_STATE = 2
    MEM = 16
    EPOCH_TOKEN = 32
    ABORT_TOKEN = 33


class Mbmd(Wire, size=48):
    """MBMD: the authenticated head of a migration bundle. Bytes 24 to 31 depend on `mb_type`."""

    size = uint(0, 2)
    mig_version = uint(2, 2)
    migs_index = uint(4, 2)
    mb_type = uint(6, 1)
    mb_counter = uint(8, 4)
    mig_epoch = uint(12, 4)
    iv_counter = uint(16, 8)
    specific = uint(24, 8)
    num_gpas = bits(specific, 0, 16)  # MEM
    vp_index = bits(specific, 0, 16)  # VP_STATE
    num_f_migs = bits(specific, 0, 16)  # IMMUTABLE_TD_STATE
    num_sys_md_pages = bits(specific, 32, 8)  # IMMUTABLE_TD_STATE
    mac = raw(32, 16)


class GpaOperation(IntEnum):
    """GPA_LIST entry, OPERATION."""

    NOP = 0
    MIGRATE = 1
    CANCEL = 2
    REMIGRATE = 3


class GpaEntryStatus(IntEnum):
    """GPA_LIST entry, STATUS: what became of it."""

    SUCCESS = 0
    SKIPPED = 1
    SEPT_WALK_FAILED = 2
    SEPT_ENTRY_BUSY_HOST_PRIORITY = 3
    SEPT_ENTRY_STATE_INCORRECT = 4
    TLB_TRACKING_NOT_DONE = 5
    OP_STATE_INCORRECT = 6
    MIGRATED_IN_CURRENT_EPOCH = 7
    MIG_BUFFER_NOT_AVAILABLE = 8
    NEW_PAGE_NOT_AVAILABLE = 9
    INVALID_PAGE_MAC = 10
    DISALLOWED_IMPORT_OVER_REMOVED = 11
    TD_PAGE_BUSY_HOST_PRIORITY = 12
    L2_SEPT_WALK_FAILED = 13
    ATTR_LIST_ENTRY_INVALID = 14
    GPA_LIST_ENTRY_INVALID = 15
    INVALID_MIGRATION_BUFFER_HPA = 16


class GpaListEntry(Wire, size=8):
    """One page in a GPA list."""

    raw = uint(0, 8)
    level = bits(raw, 0, 2)
    pending = bits(raw, 2)
    l2_map = bits(raw, 7, 3)
    mig_type = bits(raw, 10, 2)
    gpa_page = bits(raw, 12, 40)
    operation = bits(raw, 52, 2)
    status = bits(raw, 56, 5)


GPA_LIST_ENTRY_RESERVED: Final = 0xF << 3 | 3 << 54 | 7 << 61


class GpaListInfo(Wire, size=8):
    """GPA_LIST_INFO, an operand: where a GPA list lies and which entries count."""

    raw = uint(0, 8)
    format = bits(raw, 0, 3)
    first_entry = bits(raw, 3, 9)
    list_page = bits(raw, 12, 40)
    last_entry = bits(raw, 55, 9)


GPA_LIST_FORMAT_GPA_ONLY: Final = 0
GPA_LIST_FORMAT_GPA_AND_ATTR: Final = 1
GPA_LIST_INFO_RESERVED: Final = 7 << 52


class PageListEntry(Wire, size=8):
    """One page in a page list."""

    raw = uint(0, 8)
    page = bits(raw, 12, 40)
    removed = bits(raw, 61)
    pamt_removal_hint = bits(raw, 62)
    invalid = bits(raw, 63)


class PageListInfo(Wire, size=8):
    """PAGE_LIST_INFO, an operand: where a page list lies and its last entry."""

    raw = uint(0, 8)
    list_page = bits(raw, 12, 40)
    last_entry = bits(raw, 55, 9)


class MdListHeader(Wire, size=8):
    """Head of a metadata list: bytes in use, head included, and number of sequences."""

    list_buff_size = uint(0, 2)
    num_sequences = uint(2, 2)


class MigType(IntEnum):
    """How a field migrates (columns mig_export and mig_import of the field tables)."""

    NONE = 0
    ME = 1
    MEO = 2
    MEC = 3
    MB = 4
    MBO = 5
    MBCO = 6
    IE = 7
    IES = 8
    IEME = 9
    IEMEO = 10
    IESME = 11
    IESMEO = 12
    IB = 13
    IBS = 14
    CB = 15
    CBO = 16
    CE = 17
    CEO = 18


class ServtdBindingState(IntEnum):
    """State of a service-TD binding slot."""

    NOT_BOUND = 0
    PRE_BOUND = 1
    BOUND = 2


SERVTD_TYPE_MIGTD: Final = 0


class ServtdAttributes(IntFlag):
    """SERVTD_ATTR: how a binding survives, and which TDINFO fields SERVTD_INFO_HASH leaves out."""

    INSTANCE_BINDING = 1 << 0
    SOLICITED_BINDING = 1 << 1
    PLATFORM_BINDING = 1 << 2
    MIGRATABLE_BINDING = 1 << 3
    IGNORE_ATTRIBUTES = 1 << 32
    IGNORE_XFAM = 1 << 33
    IGNORE_MRTD = 1 << 34
    IGNORE_MRCONFIGID = 1 << 35
    IGNORE_MROWNER = 1 << 36
    IGNORE_MROWNERCONFIG = 1 << 37
    IGNORE_RTMR0 = 1 << 38
    IGNORE_RTMR1 = 1 << 39
    IGNORE_RTMR2 = 1 << 40
    IGNORE_RTMR3 = 1 << 41
    IGNORE_SERVTD_HASH = 1 << 42
