"""Structures that host, guest, loader and module hand each other.

TDX Module ABI; SEAM Loader interface specification; SDM volume 2 for PCONFIG.
"""

from enum import IntEnum, IntFlag
from typing import Final

from softtdx.abi.wire import Wire, array, bits, part, raw, uint, uints

__all__ = [
    "Attributes",
    "CmrInfo",
    "ConfigFlags",
    "CpuidConfigEntry",
    "CpuidValues",
    "L2EnterGuestState",
    "MktmeKeyProgram",
    "PageType",
    "PamtEntry",
    "ReportMac",
    "ReportType",
    "ReservedArea",
    "SeamExtend",
    "SeamSigstruct",
    "SeamldrInfo",
    "SeamldrParams",
    "SysInfoTable",
    "TdInfo",
    "TdParams",
    "TdReport",
    "TdSysInfo",
    "TdmrInfo",
    "TeeTcbInfo",
    "VeInfo",
    "Xfam",
]

PAGE_SIZE: Final = 4096
MAX_CMRS: Final = 32
MAX_TDMRS: Final = 64
MAX_RESERVED_AREAS: Final = 16
MAX_VCPUS: Final = 65535
MAX_HKIDS: Final = 2048
MAX_PACKAGES: Final = 8
MAX_L2_VMS: Final = 3
NUM_RTMRS: Final = 4
NUM_CPUID_CONFIG: Final = 28
TDMR_INFO_ALIGNMENT: Final = 512
CMR_INFO_ALIGNMENT: Final = 512
TD_PARAMS_ALIGNMENT: Final = 1024
TDSYSINFO_ALIGNMENT: Final = 1024
TDREPORT_ALIGNMENT: Final = 1024
REPORTDATA_SIZE: Final = 64
MEASUREMENT_SIZE: Final = 48

# Pages of the control structures.
MIN_TDCS_PAGES: Final = 6
MAX_TDCS_PAGES: Final = 9
TDCS_PAGES_PER_L2_VM: Final = 1
TDCS_MSR_BITMAPS_PAGE: Final = 2
TDCS_SEPT_ROOT_PAGE: Final = 3
TDCS_ZERO_PAGE: Final = 4
TDCS_MIGSC_LINKS_PAGE: Final = 5
TDCS_L2_SEPT_ROOT_PAGE: Final = 6
MIN_TDVPS_PAGES: Final = 6
MAX_TDVPS_PAGES: Final = 15
TDVPS_PAGES_PER_L2_VM: Final = 3
TDVPS_VE_INFO_PAGE: Final = 0
TDVPS_VMCS_PAGE: Final = 1
TDVPS_VAPIC_PAGE: Final = 2
TDVPS_L2_VMCS_PAGE: Final = 6
TDVPS_L2_MSR_BITMAPS_PAGE: Final = 7
TDVPS_L2_SHADOW_MSR_BITMAPS_PAGE: Final = 8


class Attributes(IntFlag):
    """TD ATTRIBUTES. DEBUG, and any bit of 7:0, makes a TD untrusted or changes how it is attested."""

    DEBUG = 1 << 0
    HGS_PLUS_PROF = 1 << 4
    PERF_PROF = 1 << 5
    PMT_PROF = 1 << 6
    ICSSD = 1 << 16
    SERVTD_EXT = 1 << 17
    LASS = 1 << 27
    SEPT_VE_DISABLE = 1 << 28
    MIGRATABLE = 1 << 29
    PKS = 1 << 30
    KL = 1 << 31
    TPA = 1 << 62
    PERFMON = 1 << 63


class Xfam(IntFlag):
    """XFAM: extended state a TD may use, in the layout of XCR0 | IA32_XSS."""

    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2
    MPX = 3 << 3
    AVX512 = 7 << 5
    PT = 1 << 8
    PKU = 1 << 9
    PASID = 1 << 10
    CET = 3 << 11
    HDC = 1 << 13
    ULI = 1 << 14
    LBR = 1 << 15
    HWP = 1 << 16
    AMX = 3 << 17


class ConfigFlags(IntFlag):
    """TD_PARAMS.CONFIG_FLAGS."""

    GPAW_52 = 1 << 0
    FLEXIBLE_PENDING_VE = 1 << 1
    NO_RBP_MOD = 1 << 2
    MAXPA_VIRT = 1 << 3
    MAXGPA_VIRT = 1 << 4
    TDX_CONNECT = 1 << 5
    PAGE_RELEASE = 1 << 6


class TdCtls(IntFlag):
    """TDCS.TD_CTLS."""

    PENDING_VE_DISABLE = 1 << 0
    ENUM_TOPOLOGY = 1 << 1
    VIRT_CPUID2 = 1 << 2
    REDUCE_VE = 1 << 3
    LOCK = 1 << 63


class FeatureParavirtCtls(IntFlag):
    """TDCS.FEATURE_PARAVIRT_CTLS: features a TD with REDUCE_VE wants as #VE after all."""

    CORE_CAPABILITIES = 1 << 0
    DCA = 1 << 1
    EST = 1 << 2
    MCA = 1 << 3
    MTRR = 1 << 4
    PCONFIG = 1 << 5
    RDT_A = 1 << 6
    RDT_M = 1 << 7
    ACPI = 1 << 8
    TM2 = 1 << 9
    TME = 1 << 10
    TSC_DEADLINE = 1 << 11


class TdxFeatures0(IntFlag):
    """SYS.TDX_FEATURES0: what the module can do."""

    TD_MIGRATION = 1 << 0
    TD_PRESERVING = 1 << 1
    SERVICE_TD = 1 << 2
    TDG_VP_RDWR = 1 << 3
    RELAXED_MEM_MNG_CONCURRENCY = 1 << 4
    CPUID_VIRT_GUEST_CTRL = 1 << 5
    TDX_IO = 1 << 6
    TD_PARTITIONING = 1 << 7
    LOCAL_ATTESTATION = 1 << 8
    TD_ENTRY_ENHANCEMENTS = 1 << 9
    HOST_PRIORITY_LOCKS = 1 << 10
    CONFIG_IA32_ARCH_CAP = 1 << 11
    PENDING_EPT_VIOLATION_V2 = 1 << 16
    FMS_CONFIG = 1 << 17
    NO_RBP_MOD = 1 << 18
    L2_TLB_INVD_OPT = 1 << 19
    TOPOLOGY_ENUM = 1 << 20
    PARTITIONED_TD_MIGRATION = 1 << 21
    EVENT_FILTERING = 1 << 24
    ICSSD = 1 << 25
    FIXED_CTR12_PROF = 1 << 26
    MAXPA_VIRT = 1 << 27
    APX = 1 << 28
    CPUID2_VIRT = 1 << 29
    VE_REDUCTION = 1 << 30
    ENHANCED_EVENT_FILTERING = 1 << 31
    TDX_CONNECT_PARTITIONING = 1 << 32
    MAXGPA_VIRT = 1 << 33
    DYNAMIC_PAMT = 1 << 36
    FATAL_DIAGNOSTICS = 1 << 37
    PAGE_RELEASE = 1 << 38
    NRX = 1 << 39
    ENHANCED_INTR_STATE = 1 << 40
    NON_BLOCKING_EXPORT = 1 << 41
    PERF_MASK = 1 << 42
    SCAN_EXPORT_RESTORE = 1 << 43
    IMPORT_PAGE_STATUS = 1 << 44
    ENHANCED_INTR_VIRTUALIZATION = 1 << 45
    VE_INFO_INTR_STATE = 1 << 46
    UPDATE_COMPATIBILITY = 1 << 47


class PageType(IntEnum):
    """PAMT page type."""

    NDA = 0  # not directly assigned: free
    RSVD = 1
    REG = 3
    TDR = 4
    TDCX = 5
    TDVPR = 6
    EPT = 8
    PAMT = 15  # holds dynamic PAMT entries


class PageSize(IntEnum):
    """Size of the region a PAMT entry stands for."""

    SIZE_4K = 0
    SIZE_2M = 1
    SIZE_1G = 2


class CpuidValues(Wire, size=16):
    """What CPUID returns, or which of its bits a mask selects."""

    eax = uint(0, 4)
    ebx = uint(4, 4)
    ecx = uint(8, 4)
    edx = uint(12, 4)


class CpuidConfigEntry(Wire, size=24):
    """CPUID_CONFIG in TDSYSINFO: the bits of a leaf and subleaf that the host may configure."""

    leaf = uint(0, 4)
    subleaf = uint(4, 4)
    values = part(8, CpuidValues)


class TdParams(Wire, size=1024):
    """TD_PARAMS: what the host wants a TD to be (TDH.MNG.INIT)."""

    attributes = uint(0, 8)
    xfam = uint(8, 8)
    max_vcpus = uint(16, 2)
    num_l2_vms = uint(18, 1)
    msr_config_ctls = uint(19, 1)
    eptp_controls = uint(24, 8)
    ept_memory_type = bits(eptp_controls, 0, 3)
    ept_walk_length_minus_1 = bits(eptp_controls, 3, 3)
    config_flags = uint(32, 8)
    tsc_frequency = uint(40, 2)  # in units of 25 MHz
    mrconfigid = raw(80, 48)
    mrowner = raw(128, 48)
    mrownerconfig = raw(176, 48)
    ia32_arch_capabilities_config = uint(224, 8)
    cpuid_config = array(256, CpuidValues, NUM_CPUID_CONFIG)


MSR_CONFIG_IA32_ARCH_CAP: Final = 1 << 0


class ReportType(Wire, size=4):
    """REPORTTYPE: 81H is a TD; version 1 when a service TD is bound."""

    type = uint(0, 1)
    subtype = uint(1, 1)
    version = uint(2, 1)


REPORT_TYPE_TDX: Final = 0x81


class ReportMac(Wire, size=256):
    """REPORTMACSTRUCT: the head of a TDREPORT, and the part its MAC protects.

    The MAC reaches TEE_TCB_INFO and TDINFO through the two hashes.
    """

    report_type = part(0, ReportType)
    cpu_svn = raw(16, 16)
    tee_tcb_info_hash = raw(32, 48)
    tee_info_hash = raw(80, 48)
    report_data = raw(128, 64)
    mac = raw(224, 32)


class TeeTcbInfo(Wire, size=239):
    """TEE_TCB_INFO: what SEAMREPORT says of the TDX module. `valid` says which fields hold something."""

    valid = uint(0, 8)
    tee_tcb_svn = raw(8, 16)
    mrseam = raw(24, 48)
    mrsignerseam = raw(72, 48)
    attributes = uint(120, 8)
    tee_tcb_svn2 = raw(128, 16)


TEE_TCB_INFO_VALID: Final = 0x301FF


class TdInfo(Wire, size=512):
    """TDINFO_STRUCT: what the module says of a TD."""

    attributes = uint(0, 8)
    xfam = uint(8, 8)
    mrtd = raw(16, 48)
    mrconfigid = raw(64, 48)
    mrowner = raw(112, 48)
    mrownerconfig = raw(160, 48)
    rtmr0 = raw(208, 48)
    rtmr1 = raw(256, 48)
    rtmr2 = raw(304, 48)
    rtmr3 = raw(352, 48)
    servtd_hash = raw(400, 48)


class TdReport(Wire, size=1024):
    """TDREPORT_STRUCT: what TDG.MR.REPORT writes."""

    report_mac = part(0, ReportMac)
    tee_tcb_info = part(256, TeeTcbInfo)
    td_info = part(512, TdInfo)


class CmrInfo(Wire, size=16):
    """CMR_INFO: one convertible memory range, memory that MCHECK found fit for TDX."""

    base = uint(0, 8)
    size = uint(8, 8)


class ReservedArea(Wire, size=16):
    """A part of a TDMR that no TD may use; offset from the TDMR's base."""

    offset = uint(0, 8)
    size = uint(8, 8)


class TdmrInfo(Wire, size=320):
    """TDMR_INFO: a trust-domain memory region and where its three PAMTs lie (TDH.SYS.CONFIG)."""

    base = uint(0, 8)
    size = uint(8, 8)
    pamt_1g_base = uint(16, 8)
    pamt_1g_size = uint(24, 8)
    pamt_2m_base = uint(32, 8)
    pamt_2m_size = uint(40, 8)
    pamt_4k_base = uint(48, 8)
    pamt_4k_size = uint(56, 8)
    reserved_areas = array(64, ReservedArea, MAX_RESERVED_AREAS)


class TdSysInfo(Wire, size=1024):
    """TDSYSINFO_STRUCT: what TDH.SYS.INFO tells of the module; SYS.RD tells more."""

    attributes = uint(0, 4)
    vendor_id = uint(4, 4)
    build_date = uint(8, 4)
    build_num = uint(12, 2)
    minor_version = uint(14, 2)
    major_version = uint(16, 2)
    sys_rd = uint(18, 1)
    max_tdmrs = uint(32, 2)
    max_reserved_per_tdmr = uint(34, 2)
    pamt_entry_size = uint(36, 2)
    tdcs_base_size = uint(48, 2)
    tdvps_base_size = uint(52, 2)
    tdvps_xfam_dependent_size = uint(54, 1)
    attributes_fixed0 = uint(64, 8)
    attributes_fixed1 = uint(72, 8)
    xfam_fixed0 = uint(80, 8)
    xfam_fixed1 = uint(88, 8)
    num_cpuid_config = uint(128, 4)
    cpuid_config = array(132, CpuidConfigEntry, NUM_CPUID_CONFIG)


class PamtEntry(Wire, size=16):
    """A PAMT entry: who owns a physical page and what for. Owner is the TDR's page number."""

    lock = uint(0, 2)
    type = uint(2, 1)
    owner = uint(3, 5)
    bepoch = uint(8, 8)


class SeamSigstruct(Wire, size=2048):
    """SEAM_SIGSTRUCT: the signed description of a TDX module."""

    type = uint(0, 4)
    length = uint(4, 4)
    version = uint(8, 4)
    module_type = uint(12, 4)
    vendor = uint(16, 4)
    date = uint(20, 4)
    size = uint(24, 4)
    key_size = uint(28, 4)
    modulus_size = uint(32, 4)
    exponent_size = uint(36, 4)
    modulus = raw(128, 384)
    exponent = uint(512, 4)
    signature = raw(516, 384)
    seamhash = raw(900, 48)
    seamsvn = uint(948, 2)
    attributes = uint(950, 8)
    rip_offset = uint(958, 4)
    num_stack_pages = uint(962, 1)
    num_tls_pages = uint(963, 1)
    num_keyhole_pages = uint(964, 2)
    num_global_data_pages = uint(966, 2)
    max_tdmrs = uint(968, 2)
    max_rsvd_per_tdmr = uint(970, 2)
    pamt_entry_size_4k = uint(972, 2)
    pamt_entry_size_2m = uint(974, 2)
    pamt_entry_size_1g = uint(976, 2)
    module_hv = uint(984, 2)
    min_update_hv = uint(986, 2)
    no_downgrade = uint(988, 1)
    num_handoff_pages = uint(990, 2)
    gdt_idt_offset = uint(992, 4)
    fault_wrapper_offset = uint(996, 4)
    reserved_update = raw(1000, 24)
    cpuid_table_size = uint(1024, 4)
    cpuid_table = uints(1028, 4, 255)


SIGSTRUCT_TYPE: Final = 6
SIGSTRUCT_HEADER_LENGTH: Final = 0xE1
SIGSTRUCT_VERSION: Final = 0x10000
SIGSTRUCT_VENDOR_INTEL: Final = 0x8086
SIGSTRUCT_DEBUG_SIGNED: Final = 1 << 31
SIGSTRUCT_SIGNED_RANGES: Final = ((0, 128), (900, 2048))  # start and end


class SeamldrParams(Wire, size=4096):
    """SEAMLDR_PARAMS: where the module to install lies (SEAMLDR.INSTALL)."""

    version = uint(0, 4)
    scenario = uint(4, 4)
    sigstruct_pa = uint(8, 8)
    num_module_pages = uint(120, 8)
    module_pages = uints(128, 8, 496)


class SeamldrScenario(IntEnum):
    """SEAMLDR_PARAMS.scenario."""

    LOAD = 0
    UPDATE = 1


class SeamExtend(Wire, size=136):
    """SEAMEXTEND: the CPU's record of the SEAM module, the source of TEE_TCB_INFO."""

    valid = uint(0, 8)
    tee_tcb_svn = raw(8, 16)
    mrseam = raw(24, 48)
    mrsigner = raw(72, 48)
    attributes = uint(120, 8)
    seam_ready = uint(128, 1)
    system_under_debug = uint(129, 1)
    p_seamldr_ready = uint(130, 1)


class SeamldrInfo(Wire, size=256):
    """SEAMLDR_INFO: what SEAMLDR.INFO writes."""

    version = uint(0, 4)
    attributes = uint(4, 4)
    vendor_id = uint(8, 4)
    build_date = uint(12, 4)
    build_num = uint(16, 2)
    minor_version = uint(18, 2)
    major_version = uint(20, 2)
    update_version = uint(22, 2)
    acm_x2apic_id = uint(24, 4)
    num_remaining_updates = uint(28, 4)
    seam_extend = part(32, SeamExtend)


class SysInfoTable(Wire, size=4096):
    """SYS_INFO_TABLE: what MCHECK and the loader tell the module of the platform and of its own ranges."""

    version = uint(0, 8)
    tot_num_lps = uint(8, 4)
    tot_num_sockets = uint(12, 4)
    socket_cpuid_table = uints(16, 4, MAX_PACKAGES)
    smrr2_not_supported = uint(64, 1)
    tdx_without_integrity = uint(65, 1)
    cmr_data = array(128, CmrInfo, MAX_CMRS)
    seam_status = uint(2048, 8)
    code_rgn_base = uint(2056, 8)
    code_rgn_size = uint(2064, 8)
    data_rgn_base = uint(2072, 8)
    data_rgn_size = uint(2080, 8)
    stack_rgn_base = uint(2088, 8)
    stack_rgn_size = uint(2096, 8)
    keyhole_rgn_base = uint(2104, 8)
    keyhole_rgn_size = uint(2112, 8)
    keyhole_edit_rgn_base = uint(2120, 8)
    keyhole_edit_rgn_size = uint(2128, 8)
    num_stack_pages = uint(2136, 8)
    num_tls_pages = uint(2144, 8)
    module_hv = uint(2152, 2)
    min_update_hv = uint(2154, 2)
    no_downgrade = uint(2156, 1)
    num_handoff_pages = uint(2158, 2)


class VeInfo(Wire, size=128):
    """The #VE information area: the CPU writes the head, the module the rest. `valid` is all ones while in use."""

    exit_reason = uint(0, 4)
    valid = uint(4, 4)
    exit_qualification = uint(8, 8)
    gla = uint(16, 8)
    gpa = uint(24, 8)
    eptp_index = uint(32, 2)
    instruction_length = uint(36, 4)
    instruction_information = uint(40, 4)
    ve_category = uint(44, 1)
    extended_instruction_information = uint(48, 8)
    interruptibility_state = uint(56, 4)
    apic_data = uint(64, 8)


VE_INFO_VALID: Final = 0xFFFF_FFFF


class L2EnterGuestState(Wire, size=154):
    """L2_ENTER_GUEST_STATE: registers of an L2 VM, in guest memory (TDG.VP.ENTER)."""

    gprs = uints(0, 8, 16)
    rflags = uint(128, 8)
    rip = uint(136, 8)
    ssp = uint(144, 8)
    interrupt_status = uint(152, 2)


class MktmeKeyProgram(Wire, size=256):
    """MKTME_KEY_PROGRAM_STRUCT: the operand of PCONFIG (SDM volume 2)."""

    keyid = uint(0, 2)
    keyid_ctrl = uint(2, 4)
    command = bits(keyid_ctrl, 0, 8)
    encryption_algorithm = bits(keyid_ctrl, 8, 16)
    key_field_1 = raw(64, 64)
    key_field_2 = raw(128, 64)


class KeyCommand(IntEnum):
    """MktmeKeyProgram.command."""

    SET_KEY_DIRECT = 0
    SET_KEY_RANDOM = 1
    CLEAR_KEY = 2
    NO_ENCRYPT = 3
