# ruff: noqa: ARG005  a value need not depend on the machine or on its place in an array
"""SYS context: what the module tells of itself and of the machine (TDH.SYS.RD, RDALL, TDG.SYS.RD, RDALL)."""

from collections.abc import Callable
from typing import Final

from softtdx.abi import cpuid as abi_cpuid
from softtdx.abi.fields import MdContext
from softtdx.abi.status import Status

from .. import cpuid_config, limits, tdcs, tdvps
from ..errors import LeafError
from ..pamt import ENTRY_SIZE
from ..platform import leaf_subleaf
from ..state import GlobalState
from .engine import Context, Location, View

__all__ = ["SYS", "features0", "read_element", "read_field"]

SYS: Final = Context(MdContext.SYS, 0)
PAGE: Final = 4096
U64: Final = (1 << 64) - 1
SEAMVERIFYREPORT: Final = 1 << 6
MAX_DYNAMIC_PAMT_HKID_SHIFT: Final = 48

# TDX_FEATURES0: what this module can do.
FEATURE_BITS: Final = (
    0,  # TD migration
    1,  # TD preserving
    2,  # service TDs
    3,  # TDG.VP.RD/WR
    4,  # relaxed memory management concurrency
    5,  # CPUID virtualisation guest control
    7,  # TD partitioning
    9,  # TD entry enhancements
    10,  # host-priority locks
    11,  # IA32_ARCH_CAPABILITIES configuration
    16,  # pending EPT violation v2
    17,  # family/model/stepping configuration
    18,  # NO_RBP_MOD
    19,  # L2 TLB invalidation optimisation
    20,  # topology enumeration
    21,  # partitioned TD migration
    24,  # event filtering
    25,  # ICSSD
    26,  # fixed counters 1 and 2 for profiling
    27,  # MAXPA virtualisation
    29,  # CPUID(2) virtualisation
    30,  # #VE reduction
    33,  # MAXGPA virtualisation
    36,  # dynamic PAMT
    37,  # fatal-error diagnostics
    40,  # enhanced interrupt state
    44,  # import page status
    46,  # interrupt state in #VE information
    47,  # update compatibility
)
FEATURES0: Final = sum(1 << bit for bit in FEATURE_BITS)
LOCAL_ATTESTATION: Final = 1 << 8

Value = Callable[[GlobalState, int], int]


def _constant(value: int) -> Value:
    return lambda g, index: value


def features0(g: GlobalState) -> int:
    """TDX_FEATURES0 on this machine."""
    return FEATURES0 | (LOCAL_ATTESTATION if g.platform.seam_capabilities & SEAMVERIFYREPORT else 0)


def _configurable(g: GlobalState, index: int) -> tuple[int, int]:
    rows = abi_cpuid.configurable()
    if index >= len(rows):
        return 0, 0
    row = rows[index]
    native = g.platform.cpuid[row.index]
    eax, ebx, ecx, edx = (
        direct | allow & have for direct, allow, have in zip(row.config_direct, row.allow_direct, native, strict=True)
    )
    return eax | ebx << 32, ecx | edx << 32


def _leaf(g: GlobalState, index: int) -> int:
    del g
    rows = abi_cpuid.configurable()
    return leaf_subleaf(rows[index]) if index < len(rows) else U64


def _allowed_fms(g: GlobalState, index: int) -> int:
    if index == 0:
        return g.platform.cpuid_fms
    allowed = cpuid_config.allowed_fms(g.platform.cpuid_fms)
    return allowed[index] if index < len(allowed) else 0


_VALUES: Final[dict[str, Value]] = {
    "NUM_PKGS": lambda g, i: g.sysinfo.packages,
    "PKG_FMS": lambda g, i: g.sysinfo.cpuid_fms[i],
    "VENDOR_ID": _constant(limits.VENDOR_INTEL),
    "BUILD_DATE": _constant(limits.BUILD_DATE),
    "BUILD_NUM": _constant(limits.BUILD_NUM),
    "MINOR_VERSION": _constant(limits.MINOR_VERSION),
    "MAJOR_VERSION": _constant(limits.MAJOR_VERSION),
    "UPDATE_VERSION": _constant(limits.UPDATE_VERSION),
    "INTERNAL_VERSION": _constant(limits.INTERNAL_VERSION),
    "MODULE_HV": _constant(limits.MODULE_HV),
    "MIN_UPDATE_HV": _constant(limits.MIN_UPDATE_HV),
    "NO_DOWNGRADE": _constant(1),
    "NUM_HANDOFF_PAGES": lambda g, i: g.sysinfo.num_handoff_pages,
    "HANDOFF_DATA_VALID": lambda g, i: int(g.handoff.valid),
    "HANDOFF_DATA_HV": lambda g, i: g.handoff.version,
    "HANDOFF_DATA_SIZE": lambda g, i: g.handoff.size,
    "SYS_ATTRIBUTES": _constant(0),
    "NUM_TDX_FEATURES": _constant(1),
    "TDX_FEATURES0": lambda g, i: features0(g),
    "NUM_CMRS": _constant(limits.MAX_CMRS),
    "CMR_BASE": lambda g, i: g.sysinfo.cmrs[i][0],
    "CMR_SIZE": lambda g, i: g.sysinfo.cmrs[i][1],
    "MAX_TDMRS": _constant(limits.MAX_TDMRS),
    "MAX_RESERVED_PER_TDMR": _constant(limits.MAX_RESERVED_AREAS),
    "PAMT_4K_ENTRY_SIZE": _constant(ENTRY_SIZE),
    "PAMT_2M_ENTRY_SIZE": _constant(ENTRY_SIZE),
    "PAMT_1G_ENTRY_SIZE": _constant(ENTRY_SIZE),
    "PAMT_PAGE_BITMAP_ENTRY_BITS": _constant(1),
    "MIN_DYNAMIC_PAMT_NUM_HKID_BITS": lambda g, i: max(0, g.platform.max_pa - MAX_DYNAMIC_PAMT_HKID_SHIFT),
    "TDR_BASE_SIZE": _constant(PAGE),
    "TDCS_BASE_SIZE": _constant(tdcs.PAGES_BASE * PAGE),
    "TDCS_SIZE_PER_L2_VM": _constant(tdcs.PAGES_PER_L2_VM * PAGE),
    "TDVPS_BASE_SIZE": _constant(tdvps.PAGES_BASE * PAGE),
    "TDVPS_SIZE_PER_L2_VM": _constant(tdvps.PAGES_PER_L2_VM * PAGE),
    "ATTRIBUTES_FIXED0": lambda g, i: g.platform.attributes_fixed0,
    "ATTRIBUTES_FIXED1": lambda g, i: g.platform.attributes_fixed1,
    "XFAM_FIXED0": lambda g, i: limits.XFAM_FIXED0 & (g.platform.xcr0_supported | g.platform.xss_supported),
    "XFAM_FIXED1": _constant(limits.XFAM_FIXED1),
    "NUM_CPUID_CONFIG": lambda g, i: len(abi_cpuid.configurable()),
    "CONFIG_FLAGS_FIXED0": _constant(limits.CONFIG_FLAGS_FIXED0),
    "CONFIG_FLAGS_FIXED1": _constant(0),
    "MAX_VCPUS_PER_TD": _constant(limits.MAX_VCPUS_PER_TD),
    "MIN_VIRT_MAXPA": _constant(limits.MIN_VIRT_MAXPA),
    "MAX_EVENT_FILTERS": _constant(limits.MAX_EVENT_FILTERS),
    "CPUID_CONFIG_LEAVES": _leaf,
    "CPUID_CONFIG_VALUES": lambda g, i: _configurable(g, i // 2)[i % 2],
    "IA32_ARCH_CAPABILITIES_CONFIG_MASK": _constant(1 << 4 | 1 << 19 | 1 << 20 | 1 << 24),
    "NUM_ALLOWED_FMS": lambda g, i: len(cpuid_config.allowed_fms(g.platform.cpuid_fms)),
    "NUM_DISALLOWED_FMS": _constant(0),
    "ALLOWED_FMS": _allowed_fms,
    "DISALLOWED_FMS": _constant(0),
    "MIG_ATTRIBUTES": _constant(0),
    "MIN_EXPORT_VERSION": _constant(0),
    "MAX_EXPORT_VERSION": _constant(0),
    "MIN_IMPORT_VERSION": _constant(0),
    "MAX_IMPORT_VERSION": _constant(0),
    "MAX_MIGS": _constant(512),
    "NUM_IMMUTABLE_STATE_PAGES": _constant(4),
    "NUM_TD_STATE_PAGES": _constant(2),
    "NUM_VP_STATE_PAGES": _constant(9),
    "MAX_SERV_TDS": _constant(1),
    "SERVTD_ATTR_FIXED0": _constant(0x7FF_0000_0001),
    "SERVTD_ATTR_FIXED1": _constant(0),
    "GUEST_L2_GPA_ATTR_MASK": _constant(0x807F),
    "VM_CTLS_FIXED0": _constant(1),
    "VM_CTLS_FIXED1": _constant(0),
    "VPCU_L2_CTLS_FIXED0": _constant(3),
    "VCPU_L2_CTLS_FIXED1": _constant(0),
    "VPCU_L2_DEBUG_CTLS_FIXED0": _constant(7),
    "VCPU_L2_DEBUG_CTLS_FIXED1": _constant(0),
}
"""Name -> value of the element with a number in the field's array."""


def read_element(g: GlobalState, location: Location, view: View) -> int:
    """The value of one element as `view` sees it. LeafError METADATA_FIELD_NOT_READABLE."""
    mask = view.masks(location.row)[0]
    if not mask:
        raise LeafError(Status.METADATA_FIELD_NOT_READABLE)
    value = _VALUES.get(location.row.name)
    if value is None:
        raise LeafError(Status.METADATA_FIELD_ID_INCORRECT)
    return value(g, location.number) & mask


def read_field(g: GlobalState, location: Location, view: View) -> list[int]:
    """All elements of the field at a location."""
    row = location.row
    first = location.number - location.element
    return [
        read_element(g, Location(row, location.class_code, location.field_code, first + index), view)
        for index in range(row.num_elements)
    ]
