"""VMCS encodings and control bits as plain integers: every VM exit reads a few, and an enum member is slow to look up.

The numbers are those of `abi.vmcs` and `abi.exits`; this file only gives them short names.
"""

from typing import Final

from softtdx.abi.vmcs import EntryControls, ExitControls, PinBased, Primary, Secondary, Tertiary
from softtdx.abi.vmcs_field import VmcsField as Field

# --- what a VM exit leaves
EXIT_QUALIFICATION: Final = int(Field.EXIT_QUALIFICATION)
EXIT_INTERRUPTION_INFO: Final = int(Field.EXIT_INTERRUPTION_INFO)
EXIT_INTERRUPTION_ERROR_CODE: Final = int(Field.EXIT_INTERRUPTION_ERROR_CODE)
EXIT_REASON: Final = int(Field.EXIT_REASON)
IDT_VECTORING_INFO: Final = int(Field.IDT_VECTORING_INFO)
IDT_VECTORING_ERROR_CODE: Final = int(Field.IDT_VECTORING_ERROR_CODE)
INSTRUCTION_LENGTH: Final = int(Field.EXIT_INSTRUCTION_LENGTH)
INSTRUCTION_INFO: Final = int(Field.EXIT_INSTRUCTION_INFO)
PHYSICAL_ADDRESS: Final = int(Field.GUEST_PHYSICAL_ADDRESS)
LINEAR_ADDRESS: Final = int(Field.GUEST_LINEAR_ADDRESS)

# --- guest state
RIP: Final = int(Field.GUEST_RIP)
RSP: Final = int(Field.GUEST_RSP)
RFLAGS: Final = int(Field.GUEST_RFLAGS)
CR0: Final = int(Field.GUEST_CR0)
CR4: Final = int(Field.GUEST_CR4)
DR7: Final = int(Field.GUEST_DR7)
EFER: Final = int(Field.GUEST_IA32_EFER)
DEBUGCTL: Final = int(Field.GUEST_IA32_DEBUGCTL)
PENDING_DEBUG: Final = int(Field.GUEST_PENDING_DEBUG_EXCEPTIONS)
INTERRUPTIBILITY: Final = int(Field.GUEST_INTERRUPTIBILITY)
INTERRUPT_STATUS: Final = int(Field.GUEST_INTERRUPT_STATUS)
CS_ACCESS_RIGHTS: Final = int(Field.GUEST_CS_ACCESS_RIGHTS)
SS_ACCESS_RIGHTS: Final = int(Field.GUEST_SS_ACCESS_RIGHTS)
PERF_GLOBAL_CTRL: Final = int(Field.GUEST_IA32_PERF_GLOBAL_CTRL)

# --- controls
PRIMARY_CONTROLS: Final = int(Field.PROCESSOR_CONTROLS)
EXCEPTION_BITMAP: Final = int(Field.EXCEPTION_BITMAP)
PAGE_FAULT_MASK: Final = int(Field.PAGE_FAULT_ERROR_MASK)
PAGE_FAULT_MATCH: Final = int(Field.PAGE_FAULT_ERROR_MATCH)
CR4_READ_SHADOW: Final = int(Field.CR4_READ_SHADOW)
EPTP_INDEX: Final = int(Field.EPTP_INDEX)
SHARED_EPTP: Final = int(Field.SHARED_EPTP)
SPEC_CTRL_SHADOW: Final = int(Field.SPEC_CTRL_SHADOW)
ENTRY_INFO: Final = int(Field.ENTRY_INTERRUPTION_INFO)
ENTRY_ERROR_CODE: Final = int(Field.ENTRY_EXCEPTION_ERROR_CODE)
ENTRY_INSTRUCTION_LENGTH: Final = int(Field.ENTRY_INSTRUCTION_LENGTH)

# --- bits
PIN_POSTED_INTERRUPTS: Final = int(PinBased.POSTED_INTERRUPTS)
PRIMARY_MWAIT: Final = int(Primary.MWAIT_EXITING)
PRIMARY_RDPMC: Final = int(Primary.RDPMC_EXITING)
PRIMARY_MONITOR: Final = int(Primary.MONITOR_EXITING)
PRIMARY_NMI_WINDOW: Final = int(Primary.NMI_WINDOW_EXITING)
PRIMARY_MONITOR_TRAP: Final = int(Primary.MONITOR_TRAP_FLAG)
SECONDARY_USER_WAIT: Final = int(Secondary.USER_WAIT_PAUSE)
SECONDARY_PCONFIG: Final = int(Secondary.ENABLE_PCONFIG)
SECONDARY_ENCLV: Final = int(Secondary.ENCLV_EXITING)
TERTIARY_GPAW: Final = int(Tertiary.GPAW_52)
TERTIARY_SPEC_CTRL: Final = int(Tertiary.VIRTUALIZE_SPEC_CTRL)
EXIT_SAVE_PERF: Final = int(ExitControls.SAVE_PERF_GLOBAL_CTRL)
ENTRY_PKRS: Final = int(EntryControls.LOAD_PKRS)

RFLAGS_TF: Final = 1 << 8
RFLAGS_RF: Final = 1 << 16
DEBUGCTL_BTF: Final = 1 << 1
CR0_PE: Final = 1
AR_LONG: Final = 1 << 13
AR_DPL_SHIFT: Final = 5
