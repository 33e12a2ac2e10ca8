"""Numbers of this module build that the interface shows: versions, limits and which configuration bits exist."""

from typing import Final

# --- TDX_MODULE_VERSION
VENDOR_INTEL: Final = 0x8086
MAJOR_VERSION: Final = 1
MINOR_VERSION: Final = 5
UPDATE_VERSION: Final = 25
INTERNAL_VERSION: Final = 0
BUILD_NUM: Final = 0
BUILD_DATE: Final = 0

# --- TD-preserving update
MODULE_HV: Final = 1
MIN_UPDATE_HV: Final = 0

# --- sizes and counts
MAX_CMRS: Final = 32
MAX_TDMRS: Final = 64
MAX_RESERVED_AREAS: Final = 16
MAX_VCPUS_PER_TD: Final = 576
MAX_L2_VMS: Final = 3
MIN_VIRT_MAXPA: Final = 45
MAX_EVENT_FILTERS: Final = 512

# --- ATTRIBUTES
ATTR_DEBUG: Final = 1 << 0
ATTR_ICSSD: Final = 1 << 16
ATTR_LASS: Final = 1 << 27
ATTR_SEPT_VE_DISABLE: Final = 1 << 28
ATTR_MIGRATABLE: Final = 1 << 29
ATTR_PKS: Final = 1 << 30
ATTR_PERFMON: Final = 1 << 63

# --- XFAM
XFAM_FIXED0: Final = 0x0006_DBE7
XFAM_FIXED1: Final = 3

# --- CONFIG_FLAGS
CONFIG_GPAW: Final = 1 << 0
CONFIG_FLEXIBLE_PENDING_VE: Final = 1 << 1
CONFIG_NO_RBP_MOD: Final = 1 << 2
CONFIG_MAXPA_VIRT: Final = 1 << 3
CONFIG_MAXGPA_VIRT: Final = 1 << 4
CONFIG_FLAGS_FIXED0: Final = 0x1F


def attributes_fixed0(*, lass: bool) -> int:
    """ATTRIBUTES bits that may be 1 on this machine."""
    bits = ATTR_DEBUG | ATTR_ICSSD | ATTR_SEPT_VE_DISABLE | ATTR_MIGRATABLE | ATTR_PKS | ATTR_PERFMON
    return bits | ATTR_LASS if lass else bits
