"""TDCS, the control structure of a TD: field offsets over its six (nine with L2 VMs) pages.

All pages lie under the TD's private KeyID (TDX Module Base Spec, "TDCS"; offsets of the module's field table, and
behind the last line of each group what the module keeps for itself).
"""

from typing import Final

NUM_VCPUS: Final = 0x0  # u32
NUM_ASSOC_VCPUS: Final = 0x4  # u32
OP_STATE: Final = 0x8  # u32
NUM_L2_VMS: Final = 0x10  # u16
ATTRIBUTES: Final = 0x80  # u64
XFAM: Final = 0x88  # u64
MAX_VCPUS: Final = 0x90  # u32
GPAW: Final = 0x94  # u8
EPTP: Final = 0x98  # u64
TSC_OFFSET: Final = 0xA8  # u64
TSC_MULTIPLIER: Final = 0xB0  # u64
TSC_FREQUENCY: Final = 0xB8  # u16
XBUFF_SIZE: Final = 0xDC  # u32
NOTIFY_ENABLES: Final = 0xE0  # u64
HP_LOCK_TIMEOUT: Final = 0xE8  # u64
VM_CTLS: Final = 0xF0  # u64[4]
CONFIG_FLAGS: Final = 0x118  # u64
TD_CTLS: Final = 0x120  # u64
VIRT_MAXPA: Final = 0x128  # u8
TOPOLOGY_ENUM_CONFIGURED: Final = 0x12C  # u8
VE_REDUCTION_VALID: Final = 0x12D  # u8
CPUID_VALID: Final = 0x134  # u8[80]
XBUFF_OFFSETS: Final = 0x190  # u32[19]
TD_EPOCH: Final = 0x200  # u64
REFCOUNT: Final = 0x208  # u16[2]
MRTD: Final = 0x240  # u64[6]
MRCONFIGID: Final = 0x270  # u64[6]
MROWNER: Final = 0x2A0  # u64[6]
MROWNERCONFIG: Final = 0x2D0  # u64[6]
RTMR: Final = 0x300  # u64[4][6]
MIG_DEC_KEY_SET: Final = 0x580  # u8
EXPORT_COUNT: Final = 0x584  # u32
IMPORT_COUNT: Final = 0x588  # u32
MIG_EPOCH: Final = 0x58C  # u32
BW_EPOCH: Final = 0x590  # u64
TOTAL_MB_COUNT: Final = 0x598  # u64
MIG_DEC_KEY: Final = 0x5A0  # u64[4]
MIG_DEC_WORKING_KEY: Final = 0x5C0  # u64[4]
MIG_ENC_KEY: Final = 0x5E0  # u64[4]
MIG_ENC_WORKING_KEY: Final = 0x600  # u64[4]
MIG_VERSION: Final = 0x620  # u16
MIG_WORKING_VERSION: Final = 0x622  # u16
DIRTY_COUNT: Final = 0x628  # u64
MIG_COUNT: Final = 0x630  # u64
NUM_MIGS: Final = 0x638  # u16
NUM_MIGRATED_VCPUS: Final = 0x63C  # u32
PRE_IMPORT_UUID: Final = 0x640  # u64[4]
VIRTUAL_IA32_VMX_BASIC: Final = 0x700  # u64
VIRTUAL_IA32_VMX_MISC: Final = 0x708  # u64
VIRTUAL_IA32_VMX_CR0_FIXED0: Final = 0x710  # u64
VIRTUAL_IA32_VMX_CR0_FIXED1: Final = 0x718  # u64
VIRTUAL_IA32_VMX_CR4_FIXED0: Final = 0x720  # u64
VIRTUAL_IA32_VMX_CR4_FIXED1: Final = 0x728  # u64
VIRTUAL_IA32_VMX_PROCBASED_CTLS2: Final = 0x730  # u64
VIRTUAL_IA32_VMX_EPT_VPID_CAP: Final = 0x738  # u64
VIRTUAL_IA32_VMX_TRUE_PINBASED_CTLS: Final = 0x740  # u64
VIRTUAL_IA32_VMX_TRUE_PROCBASED_CTLS: Final = 0x748  # u64
VIRTUAL_IA32_VMX_TRUE_EXIT_CTLS: Final = 0x750  # u64
VIRTUAL_IA32_VMX_TRUE_ENTRY_CTLS: Final = 0x758  # u64
VIRTUAL_IA32_VMX_VMFUNC: Final = 0x760  # u64
VIRTUAL_IA32_VMX_PROCBASED_CTLS3: Final = 0x768  # u64
VIRTUAL_IA32_VMX_EXIT_CTLS2: Final = 0x770  # u64
VIRTUAL_IA32_ARCH_CAPABILITIES: Final = 0x778  # u64
CPUID_VALUES: Final = 0x800  # u64[80][2]
SERVTD_HASH: Final = 0xD00  # u64[6]
SERVTD_NUM: Final = 0xD30  # u16
SERVTD_BINDINGS_TABLE: Final = 0xD90  # u64[16]
CPUID_FIXED0_BITMAP: Final = 0xF08  # u64
CPUID4_NATIVE_VALUES: Final = 0xF10  # u32[4][4]
FEATURE_PARAVIRT_CTLS: Final = 0xF58  # u64
FILTERED_EVENTS_COUNT: Final = 0xF60  # u64[4]
FIELD_SUPPORT_AT_INIT: Final = 0xF84  # u32
X2APIC_IDS: Final = 0x1100  # u32[576]
MSR_BITMAPS: Final = 0x2000  # u64[512]
SEPT_ROOT: Final = 0x3000  # u64[512]
MIGSC_LINKS: Final = 0x5000  # u64[512]
L2_SEPT_ROOT_1: Final = 0x6000  # u64[512]
L2_SEPT_ROOT_2: Final = 0x7000  # u64[512]
L2_SEPT_ROOT_3: Final = 0x8000  # u64[512]

# --- what no field of the metadata interface names
CPUID_FLAGS: Final = 0xBA  # u8[32], see CpuidFlag
IA32_SPEC_CTRL_MASK: Final = 0x110  # u64
PERFMON_EXT_SUBLEAVES: Final = 0x130  # u32 bitmap of the supported sub-leaves of CPUID 0x23
LAST_TEEINFO_HASH: Final = 0x3C0  # 48 bytes
LAST_TEEINFO_HASH_VALID: Final = 0x3F2  # u8
MRTD_STATE: Final = 0x420  # 64-byte SHA-384 chaining value of MRTD under construction
MRTD_LENGTH: Final = 0x460  # u64, bytes hashed so far
MRTD_UNDER_WAY: Final = 0x468  # u64, 1 from TDH.MNG.INIT to TDH.MR.FINALIZE
CPUID_LAST_BASE_LEAF: Final = 0xF00  # u32
CPUID_LAST_EXT_LEAF: Final = 0xF04  # u32
CPUID4_NATIVE_VALID: Final = 0xF50  # u8[4]
EVENT_FILTERS_NUM: Final = 0xF80  # u16
BLOCKED_COUNT: Final = 0xF88  # u64
PENDING_BLOCKED_COUNT: Final = 0xF90  # u64
MEM_COUNT: Final = 0xF98  # u64
EVENT_FILTERS: Final = 0x1A00  # u16[512]
ZERO_PAGE: Final = 0x4000

PAGES_BASE: Final = 6
PAGES_PER_L2_VM: Final = 1
PAGES_MAX: Final = 9
MAX_VCPUS_PER_TD: Final = 576
