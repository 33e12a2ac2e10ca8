"""VMCS: fields as plain ints, control bits, EPTP and segment access rights.

SDM volume 3, chapter 25; the TDX additions (Intel TDX Architecture Specification, "TD VMCS") are the HKID that tags a
guest's private accesses and the second EPT pointer. The encodings are at home in `VmcsField`; vmread and vmwrite are
too hot for enum members, so each has its plain int here.
"""

from enum import IntFlag
from typing import Final

from softtdx.abi.vmcs_field import VmcsField

# --- 16-bit control fields
VPID: Final[int] = VmcsField.VPID.value
POSTED_INTERRUPT_VECTOR: Final[int] = VmcsField.POSTED_INTERRUPT_VECTOR.value
EPTP_INDEX: Final[int] = VmcsField.EPTP_INDEX.value
HLAT_PREFIX_SIZE: Final[int] = VmcsField.HLAT_PREFIX_SIZE.value
LAST_PID_POINTER_INDEX: Final[int] = VmcsField.LAST_PID_POINTER_INDEX.value

# --- 16-bit guest fields
GUEST_ES_SELECTOR: Final[int] = VmcsField.GUEST_ES_SELECTOR.value
GUEST_CS_SELECTOR: Final[int] = VmcsField.GUEST_CS_SELECTOR.value
GUEST_SS_SELECTOR: Final[int] = VmcsField.GUEST_SS_SELECTOR.value
GUEST_DS_SELECTOR: Final[int] = VmcsField.GUEST_DS_SELECTOR.value
GUEST_FS_SELECTOR: Final[int] = VmcsField.GUEST_FS_SELECTOR.value
GUEST_GS_SELECTOR: Final[int] = VmcsField.GUEST_GS_SELECTOR.value
GUEST_LDTR_SELECTOR: Final[int] = VmcsField.GUEST_LDTR_SELECTOR.value
GUEST_TR_SELECTOR: Final[int] = VmcsField.GUEST_TR_SELECTOR.value
GUEST_INTERRUPT_STATUS: Final[int] = VmcsField.GUEST_INTERRUPT_STATUS.value
PML_INDEX: Final[int] = VmcsField.PML_INDEX.value
GUEST_UINV: Final[int] = VmcsField.GUEST_UINV.value

# --- 16-bit host fields
HOST_ES_SELECTOR: Final[int] = VmcsField.HOST_ES_SELECTOR.value
HOST_CS_SELECTOR: Final[int] = VmcsField.HOST_CS_SELECTOR.value
HOST_SS_SELECTOR: Final[int] = VmcsField.HOST_SS_SELECTOR.value
HOST_DS_SELECTOR: Final[int] = VmcsField.HOST_DS_SELECTOR.value
HOST_FS_SELECTOR: Final[int] = VmcsField.HOST_FS_SELECTOR.value
HOST_GS_SELECTOR: Final[int] = VmcsField.HOST_GS_SELECTOR.value
HOST_TR_SELECTOR: Final[int] = VmcsField.HOST_TR_SELECTOR.value

# --- 64-bit control fields
IO_BITMAP_A: Final[int] = VmcsField.IO_BITMAP_A.value
IO_BITMAP_B: Final[int] = VmcsField.IO_BITMAP_B.value
MSR_BITMAPS: Final[int] = VmcsField.MSR_BITMAPS.value
EXIT_MSR_STORE_ADDRESS: Final[int] = VmcsField.EXIT_MSR_STORE_ADDRESS.value
EXIT_MSR_LOAD_ADDRESS: Final[int] = VmcsField.EXIT_MSR_LOAD_ADDRESS.value
ENTRY_MSR_LOAD_ADDRESS: Final[int] = VmcsField.ENTRY_MSR_LOAD_ADDRESS.value
EXECUTIVE_VMCS_POINTER: Final[int] = VmcsField.EXECUTIVE_VMCS_POINTER.value
PML_ADDRESS: Final[int] = VmcsField.PML_ADDRESS.value
TSC_OFFSET: Final[int] = VmcsField.TSC_OFFSET.value
VIRTUAL_APIC_ADDRESS: Final[int] = VmcsField.VIRTUAL_APIC_ADDRESS.value
APIC_ACCESS_ADDRESS: Final[int] = VmcsField.APIC_ACCESS_ADDRESS.value
POSTED_INTERRUPT_DESCRIPTOR: Final[int] = VmcsField.POSTED_INTERRUPT_DESCRIPTOR.value
VM_FUNCTION_CONTROLS: Final[int] = VmcsField.VM_FUNCTION_CONTROLS.value
EPTP: Final[int] = VmcsField.EPTP.value
EOI_EXIT_BITMAP0: Final[int] = VmcsField.EOI_EXIT_BITMAP0.value
EOI_EXIT_BITMAP1: Final[int] = VmcsField.EOI_EXIT_BITMAP1.value
EOI_EXIT_BITMAP2: Final[int] = VmcsField.EOI_EXIT_BITMAP2.value
EOI_EXIT_BITMAP3: Final[int] = VmcsField.EOI_EXIT_BITMAP3.value
EPTP_LIST_ADDRESS: Final[int] = VmcsField.EPTP_LIST_ADDRESS.value
VMREAD_BITMAP: Final[int] = VmcsField.VMREAD_BITMAP.value
VMWRITE_BITMAP: Final[int] = VmcsField.VMWRITE_BITMAP.value
VE_INFORMATION_ADDRESS: Final[int] = VmcsField.VE_INFORMATION_ADDRESS.value
XSS_EXITING_BITMAP: Final[int] = VmcsField.XSS_EXITING_BITMAP.value
ENCLS_EXITING_BITMAP: Final[int] = VmcsField.ENCLS_EXITING_BITMAP.value
SUB_PAGE_PERMISSION_TABLE: Final[int] = VmcsField.SUB_PAGE_PERMISSION_TABLE.value
TSC_MULTIPLIER: Final[int] = VmcsField.TSC_MULTIPLIER.value
TERTIARY_CONTROLS: Final[int] = VmcsField.TERTIARY_CONTROLS.value
ENCLV_EXITING_BITMAP: Final[int] = VmcsField.ENCLV_EXITING_BITMAP.value
LOW_PASID_DIRECTORY: Final[int] = VmcsField.LOW_PASID_DIRECTORY.value
HIGH_PASID_DIRECTORY: Final[int] = VmcsField.HIGH_PASID_DIRECTORY.value
SHARED_EPTP: Final[int] = VmcsField.SHARED_EPTP.value
PCONFIG_EXITING_BITMAP: Final[int] = VmcsField.PCONFIG_EXITING_BITMAP.value
HLATP: Final[int] = VmcsField.HLATP.value
PID_POINTER_TABLE: Final[int] = VmcsField.PID_POINTER_TABLE.value
SECONDARY_EXIT_CONTROLS: Final[int] = VmcsField.SECONDARY_EXIT_CONTROLS.value
SPEC_CTRL_MASK: Final[int] = VmcsField.SPEC_CTRL_MASK.value
SPEC_CTRL_SHADOW: Final[int] = VmcsField.SPEC_CTRL_SHADOW.value

# --- 64-bit read-only fields
GUEST_PHYSICAL_ADDRESS: Final[int] = VmcsField.GUEST_PHYSICAL_ADDRESS.value

# --- 64-bit guest fields
VMCS_LINK_POINTER: Final[int] = VmcsField.VMCS_LINK_POINTER.value
GUEST_IA32_DEBUGCTL: Final[int] = VmcsField.GUEST_IA32_DEBUGCTL.value
GUEST_IA32_PAT: Final[int] = VmcsField.GUEST_IA32_PAT.value
GUEST_IA32_EFER: Final[int] = VmcsField.GUEST_IA32_EFER.value
GUEST_IA32_PERF_GLOBAL_CTRL: Final[int] = VmcsField.GUEST_IA32_PERF_GLOBAL_CTRL.value
GUEST_PDPTE0: Final[int] = VmcsField.GUEST_PDPTE0.value
GUEST_PDPTE1: Final[int] = VmcsField.GUEST_PDPTE1.value
GUEST_PDPTE2: Final[int] = VmcsField.GUEST_PDPTE2.value
GUEST_PDPTE3: Final[int] = VmcsField.GUEST_PDPTE3.value
GUEST_IA32_BNDCFGS: Final[int] = VmcsField.GUEST_IA32_BNDCFGS.value
GUEST_IA32_RTIT_CTL: Final[int] = VmcsField.GUEST_IA32_RTIT_CTL.value
GUEST_IA32_LBR_CTL: Final[int] = VmcsField.GUEST_IA32_LBR_CTL.value
GUEST_IA32_PKRS: Final[int] = VmcsField.GUEST_IA32_PKRS.value

# --- 64-bit host fields
HOST_IA32_PAT: Final[int] = VmcsField.HOST_IA32_PAT.value
HOST_IA32_EFER: Final[int] = VmcsField.HOST_IA32_EFER.value
HOST_IA32_PERF_GLOBAL_CTRL: Final[int] = VmcsField.HOST_IA32_PERF_GLOBAL_CTRL.value
HOST_IA32_PKRS: Final[int] = VmcsField.HOST_IA32_PKRS.value

# --- 32-bit control fields
PIN_BASED_CONTROLS: Final[int] = VmcsField.PIN_BASED_CONTROLS.value
PROCESSOR_CONTROLS: Final[int] = VmcsField.PROCESSOR_CONTROLS.value
EXCEPTION_BITMAP: Final[int] = VmcsField.EXCEPTION_BITMAP.value
PAGE_FAULT_ERROR_MASK: Final[int] = VmcsField.PAGE_FAULT_ERROR_MASK.value
PAGE_FAULT_ERROR_MATCH: Final[int] = VmcsField.PAGE_FAULT_ERROR_MATCH.value
CR3_TARGET_COUNT: Final[int] = VmcsField.CR3_TARGET_COUNT.value
EXIT_CONTROLS: Final[int] = VmcsField.EXIT_CONTROLS.value
EXIT_MSR_STORE_COUNT: Final[int] = VmcsField.EXIT_MSR_STORE_COUNT.value
EXIT_MSR_LOAD_COUNT: Final[int] = VmcsField.EXIT_MSR_LOAD_COUNT.value
ENTRY_CONTROLS: Final[int] = VmcsField.ENTRY_CONTROLS.value
ENTRY_MSR_LOAD_COUNT: Final[int] = VmcsField.ENTRY_MSR_LOAD_COUNT.value
ENTRY_INTERRUPTION_INFO: Final[int] = VmcsField.ENTRY_INTERRUPTION_INFO.value
ENTRY_EXCEPTION_ERROR_CODE: Final[int] = VmcsField.ENTRY_EXCEPTION_ERROR_CODE.value
ENTRY_INSTRUCTION_LENGTH: Final[int] = VmcsField.ENTRY_INSTRUCTION_LENGTH.value
TPR_THRESHOLD: Final[int] = VmcsField.TPR_THRESHOLD.value
SECONDARY_CONTROLS: Final[int] = VmcsField.SECONDARY_CONTROLS.value
PLE_GAP: Final[int] = VmcsField.PLE_GAP.value
PLE_WINDOW: Final[int] = VmcsField.PLE_WINDOW.value
INSTRUCTION_TIMEOUT: Final[int] = VmcsField.INSTRUCTION_TIMEOUT.value
TD_HKID: Final[int] = VmcsField.TD_HKID.value

# --- 32-bit read-only fields
VM_INSTRUCTION_ERROR: Final[int] = VmcsField.VM_INSTRUCTION_ERROR.value
EXIT_REASON: Final[int] = VmcsField.EXIT_REASON.value
EXIT_INTERRUPTION_INFO: Final[int] = VmcsField.EXIT_INTERRUPTION_INFO.value
EXIT_INTERRUPTION_ERROR_CODE: Final[int] = VmcsField.EXIT_INTERRUPTION_ERROR_CODE.value
IDT_VECTORING_INFO: Final[int] = VmcsField.IDT_VECTORING_INFO.value
IDT_VECTORING_ERROR_CODE: Final[int] = VmcsField.IDT_VECTORING_ERROR_CODE.value
EXIT_INSTRUCTION_LENGTH: Final[int] = VmcsField.EXIT_INSTRUCTION_LENGTH.value
EXIT_INSTRUCTION_INFO: Final[int] = VmcsField.EXIT_INSTRUCTION_INFO.value

# --- 32-bit guest fields
GUEST_ES_LIMIT: Final[int] = VmcsField.GUEST_ES_LIMIT.value
GUEST_CS_LIMIT: Final[int] = VmcsField.GUEST_CS_LIMIT.value
GUEST_SS_LIMIT: Final[int] = VmcsField.GUEST_SS_LIMIT.value
GUEST_DS_LIMIT: Final[int] = VmcsField.GUEST_DS_LIMIT.value
GUEST_FS_LIMIT: Final[int] = VmcsField.GUEST_FS_LIMIT.value
GUEST_GS_LIMIT: Final[int] = VmcsField.GUEST_GS_LIMIT.value
GUEST_LDTR_LIMIT: Final[int] = VmcsField.GUEST_LDTR_LIMIT.value
GUEST_TR_LIMIT: Final[int] = VmcsField.GUEST_TR_LIMIT.value
GUEST_GDTR_LIMIT: Final[int] = VmcsField.GUEST_GDTR_LIMIT.value
GUEST_IDTR_LIMIT: Final[int] = VmcsField.GUEST_IDTR_LIMIT.value
GUEST_ES_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_ES_ACCESS_RIGHTS.value
GUEST_CS_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_CS_ACCESS_RIGHTS.value
GUEST_SS_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_SS_ACCESS_RIGHTS.value
GUEST_DS_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_DS_ACCESS_RIGHTS.value
GUEST_FS_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_FS_ACCESS_RIGHTS.value
GUEST_GS_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_GS_ACCESS_RIGHTS.value
GUEST_LDTR_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_LDTR_ACCESS_RIGHTS.value
GUEST_TR_ACCESS_RIGHTS: Final[int] = VmcsField.GUEST_TR_ACCESS_RIGHTS.value
GUEST_INTERRUPTIBILITY: Final[int] = VmcsField.GUEST_INTERRUPTIBILITY.value
GUEST_ACTIVITY_STATE: Final[int] = VmcsField.GUEST_ACTIVITY_STATE.value
GUEST_SMBASE: Final[int] = VmcsField.GUEST_SMBASE.value
GUEST_SYSENTER_CS: Final[int] = VmcsField.GUEST_SYSENTER_CS.value
PREEMPTION_TIMER: Final[int] = VmcsField.PREEMPTION_TIMER.value

# --- 32-bit host fields
HOST_SYSENTER_CS: Final[int] = VmcsField.HOST_SYSENTER_CS.value

# --- natural-width control fields
CR0_MASK: Final[int] = VmcsField.CR0_MASK.value
CR4_MASK: Final[int] = VmcsField.CR4_MASK.value
CR0_READ_SHADOW: Final[int] = VmcsField.CR0_READ_SHADOW.value
CR4_READ_SHADOW: Final[int] = VmcsField.CR4_READ_SHADOW.value
CR3_TARGET_0: Final[int] = VmcsField.CR3_TARGET_0.value
CR3_TARGET_1: Final[int] = VmcsField.CR3_TARGET_1.value
CR3_TARGET_2: Final[int] = VmcsField.CR3_TARGET_2.value
CR3_TARGET_3: Final[int] = VmcsField.CR3_TARGET_3.value

# --- natural-width read-only fields
EXIT_QUALIFICATION: Final[int] = VmcsField.EXIT_QUALIFICATION.value
IO_RCX: Final[int] = VmcsField.IO_RCX.value
IO_RSI: Final[int] = VmcsField.IO_RSI.value
IO_RDI: Final[int] = VmcsField.IO_RDI.value
IO_RIP: Final[int] = VmcsField.IO_RIP.value
GUEST_LINEAR_ADDRESS: Final[int] = VmcsField.GUEST_LINEAR_ADDRESS.value

# --- natural-width guest fields
GUEST_CR0: Final[int] = VmcsField.GUEST_CR0.value
GUEST_CR3: Final[int] = VmcsField.GUEST_CR3.value
GUEST_CR4: Final[int] = VmcsField.GUEST_CR4.value
GUEST_ES_BASE: Final[int] = VmcsField.GUEST_ES_BASE.value
GUEST_CS_BASE: Final[int] = VmcsField.GUEST_CS_BASE.value
GUEST_SS_BASE: Final[int] = VmcsField.GUEST_SS_BASE.value
GUEST_DS_BASE: Final[int] = VmcsField.GUEST_DS_BASE.value
GUEST_FS_BASE: Final[int] = VmcsField.GUEST_FS_BASE.value
GUEST_GS_BASE: Final[int] = VmcsField.GUEST_GS_BASE.value
GUEST_LDTR_BASE: Final[int] = VmcsField.GUEST_LDTR_BASE.value
GUEST_TR_BASE: Final[int] = VmcsField.GUEST_TR_BASE.value
GUEST_GDTR_BASE: Final[int] = VmcsField.GUEST_GDTR_BASE.value
GUEST_IDTR_BASE: Final[int] = VmcsField.GUEST_IDTR_BASE.value
GUEST_DR7: Final[int] = VmcsField.GUEST_DR7.value
GUEST_RSP: Final[int] = VmcsField.GUEST_RSP.value
GUEST_RIP: Final[int] = VmcsField.GUEST_RIP.value
GUEST_RFLAGS: Final[int] = VmcsField.GUEST_RFLAGS.value
GUEST_PENDING_DEBUG_EXCEPTIONS: Final[int] = VmcsField.GUEST_PENDING_DEBUG_EXCEPTIONS.value
GUEST_SYSENTER_ESP: Final[int] = VmcsField.GUEST_SYSENTER_ESP.value
GUEST_SYSENTER_EIP: Final[int] = VmcsField.GUEST_SYSENTER_EIP.value
GUEST_S_CET: Final[int] = VmcsField.GUEST_S_CET.value
GUEST_SSP: Final[int] = VmcsField.GUEST_SSP.value
GUEST_INTERRUPT_SSP_TABLE: Final[int] = VmcsField.GUEST_INTERRUPT_SSP_TABLE.value

# --- natural-width host fields
HOST_CR0: Final[int] = VmcsField.HOST_CR0.value
HOST_CR3: Final[int] = VmcsField.HOST_CR3.value
HOST_CR4: Final[int] = VmcsField.HOST_CR4.value
HOST_FS_BASE: Final[int] = VmcsField.HOST_FS_BASE.value
HOST_GS_BASE: Final[int] = VmcsField.HOST_GS_BASE.value
HOST_TR_BASE: Final[int] = VmcsField.HOST_TR_BASE.value
HOST_GDTR_BASE: Final[int] = VmcsField.HOST_GDTR_BASE.value
HOST_IDTR_BASE: Final[int] = VmcsField.HOST_IDTR_BASE.value
HOST_SYSENTER_ESP: Final[int] = VmcsField.HOST_SYSENTER_ESP.value
HOST_SYSENTER_EIP: Final[int] = VmcsField.HOST_SYSENTER_EIP.value
HOST_RSP: Final[int] = VmcsField.HOST_RSP.value
HOST_RIP: Final[int] = VmcsField.HOST_RIP.value
HOST_S_CET: Final[int] = VmcsField.HOST_S_CET.value
HOST_SSP: Final[int] = VmcsField.HOST_SSP.value
HOST_INTERRUPT_SSP_TABLE: Final[int] = VmcsField.HOST_INTERRUPT_SSP_TABLE.value

REVISION_MASK: Final = 0x7FFF_FFFF  # the first 4 bytes of a VMCS region: revision identifier, IA32_VMX_BASIC 30:0


class PinBased(IntFlag):
    """Pin-based VM-execution controls."""

    EXTERNAL_INTERRUPT_EXITING = 1 << 0
    NMI_EXITING = 1 << 3
    VIRTUAL_NMIS = 1 << 5
    PREEMPTION_TIMER = 1 << 6
    POSTED_INTERRUPTS = 1 << 7


class Primary(IntFlag):
    """Primary processor-based VM-execution controls."""

    INTERRUPT_WINDOW_EXITING = 1 << 2
    TSC_OFFSETTING = 1 << 3
    HLT_EXITING = 1 << 7
    INVLPG_EXITING = 1 << 9
    MWAIT_EXITING = 1 << 10
    RDPMC_EXITING = 1 << 11
    RDTSC_EXITING = 1 << 12
    CR3_LOAD_EXITING = 1 << 15
    CR3_STORE_EXITING = 1 << 16
    TERTIARY_CONTROLS = 1 << 17
    CR8_LOAD_EXITING = 1 << 19
    CR8_STORE_EXITING = 1 << 20
    TPR_SHADOW = 1 << 21
    NMI_WINDOW_EXITING = 1 << 22
    MOV_DR_EXITING = 1 << 23
    UNCONDITIONAL_IO_EXITING = 1 << 24
    IO_BITMAPS = 1 << 25
    MONITOR_TRAP_FLAG = 1 << 27
    MSR_BITMAPS = 1 << 28
    MONITOR_EXITING = 1 << 29
    PAUSE_EXITING = 1 << 30
    SECONDARY_CONTROLS = 1 << 31


class Secondary(IntFlag):
    """Secondary processor-based VM-execution controls."""

    VIRTUALIZE_APIC_ACCESSES = 1 << 0
    ENABLE_EPT = 1 << 1
    DESCRIPTOR_TABLE_EXITING = 1 << 2
    ENABLE_RDTSCP = 1 << 3
    VIRTUALIZE_X2APIC = 1 << 4
    ENABLE_VPID = 1 << 5
    WBINVD_EXITING = 1 << 6
    UNRESTRICTED_GUEST = 1 << 7
    APIC_REGISTER_VIRTUALIZATION = 1 << 8
    VIRTUAL_INTERRUPT_DELIVERY = 1 << 9
    PAUSE_LOOP_EXITING = 1 << 10
    RDRAND_EXITING = 1 << 11
    ENABLE_INVPCID = 1 << 12
    ENABLE_VM_FUNCTIONS = 1 << 13
    VMCS_SHADOWING = 1 << 14
    ENCLS_EXITING = 1 << 15
    RDSEED_EXITING = 1 << 16
    ENABLE_PML = 1 << 17
    EPT_VIOLATION_VE = 1 << 18
    CONCEAL_VMX_FROM_PT = 1 << 19
    ENABLE_XSAVES = 1 << 20
    PASID_TRANSLATION = 1 << 21
    MODE_BASED_EXECUTE = 1 << 22
    SUB_PAGE_WRITE_PERMISSIONS = 1 << 23
    PT_GUEST_PHYSICAL = 1 << 24
    TSC_SCALING = 1 << 25
    USER_WAIT_PAUSE = 1 << 26
    ENABLE_PCONFIG = 1 << 27
    ENCLV_EXITING = 1 << 28
    BUS_LOCK_DETECTION = 1 << 30
    INSTRUCTION_TIMEOUT = 1 << 31


class Tertiary(IntFlag):
    """Tertiary processor-based VM-execution controls."""

    LOADIWKEY_EXITING = 1 << 0
    ENABLE_HLAT = 1 << 1
    EPT_PAGING_WRITE = 1 << 2
    GUEST_PAGING_VERIFICATION = 1 << 3
    IPI_VIRTUALIZATION = 1 << 4
    GPAW_52 = 1 << 5  # SEAM only: shared bit is GPA bit 51, not 47
    VIRTUALIZE_SPEC_CTRL = 1 << 7


class ExitControls(IntFlag):
    """Primary VM-exit controls."""

    SAVE_DEBUG_CONTROLS = 1 << 2
    HOST_ADDRESS_SPACE_SIZE = 1 << 9
    LOAD_PERF_GLOBAL_CTRL = 1 << 12
    ACK_INTERRUPT = 1 << 15
    SAVE_PAT = 1 << 18
    LOAD_PAT = 1 << 19
    SAVE_EFER = 1 << 20
    LOAD_EFER = 1 << 21
    SAVE_PREEMPTION_TIMER = 1 << 22
    CLEAR_BNDCFGS = 1 << 23
    CONCEAL_VMX_FROM_PT = 1 << 24
    CLEAR_RTIT_CTL = 1 << 25
    CLEAR_LBR_CTL = 1 << 26
    CLEAR_UINV = 1 << 27
    LOAD_CET = 1 << 28
    LOAD_PKRS = 1 << 29
    SAVE_PERF_GLOBAL_CTRL = 1 << 30
    SECONDARY_CONTROLS = 1 << 31


class EntryControls(IntFlag):
    """VM-entry controls."""

    LOAD_DEBUG_CONTROLS = 1 << 2
    IA32E_MODE_GUEST = 1 << 9
    ENTRY_TO_SMM = 1 << 10
    DEACTIVATE_DUAL_MONITOR = 1 << 11
    LOAD_PERF_GLOBAL_CTRL = 1 << 13
    LOAD_PAT = 1 << 14
    LOAD_EFER = 1 << 15
    LOAD_BNDCFGS = 1 << 16
    CONCEAL_VMX_FROM_PT = 1 << 17
    LOAD_RTIT_CTL = 1 << 18
    LOAD_UINV = 1 << 19
    LOAD_CET = 1 << 20
    LOAD_LBR_CTL = 1 << 21
    LOAD_PKRS = 1 << 22


# EPTP: memory type 2:0, walk length minus 1 in 5:3, A/D 6, supervisor shadow stack 7, table address 51:12.
EPTP_MT_WB: Final = 6
EPTP_WALK_4: Final = 3 << 3
EPTP_WALK_5: Final = 4 << 3
EPTP_ACCESSED_DIRTY: Final = 1 << 6
EPTP_SHADOW_STACK: Final = 1 << 7
EPTP_ADDRESS: Final = 0x000F_FFFF_FFFF_F000

# Segment access rights (SDM 25.4.1).
ACCESS_RIGHTS_LONG: Final = 1 << 13
ACCESS_RIGHTS_DPL_SHIFT: Final = 5
AR_UNUSABLE: Final = 1 << 16
AR_CODE64: Final = 0xA09B
AR_CODE32: Final = 0xC09B
AR_DATA32: Final = 0xC093
AR_TSS_BUSY: Final = 0x008B
AR_LDT: Final = 0x0082


# The control bits that the module changes at run time, as plain ints.
PIN_POSTED_INTERRUPTS: Final[int] = PinBased.POSTED_INTERRUPTS.value
PROC_MWAIT_EXITING: Final[int] = Primary.MWAIT_EXITING.value
PROC_RDPMC_EXITING: Final[int] = Primary.RDPMC_EXITING.value
PROC_NMI_WINDOW_EXITING: Final[int] = Primary.NMI_WINDOW_EXITING.value
PROC_MONITOR_TRAP_FLAG: Final[int] = Primary.MONITOR_TRAP_FLAG.value
PROC_MONITOR_EXITING: Final[int] = Primary.MONITOR_EXITING.value
PROC2_USER_WAIT_PAUSE: Final[int] = Secondary.USER_WAIT_PAUSE.value
PROC2_ENABLE_PCONFIG: Final[int] = Secondary.ENABLE_PCONFIG.value
PROC2_ENCLV_EXITING: Final[int] = Secondary.ENCLV_EXITING.value
PROC3_GPAW: Final[int] = Tertiary.GPAW_52.value
PROC3_VIRTUALIZE_SPEC_CTRL: Final[int] = Tertiary.VIRTUALIZE_SPEC_CTRL.value
EXIT_SAVE_PERF_GLOBAL_CTRL: Final[int] = ExitControls.SAVE_PERF_GLOBAL_CTRL.value
ENTRY_LOAD_PKRS: Final[int] = EntryControls.LOAD_PKRS.value
