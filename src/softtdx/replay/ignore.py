"""Values in recordings that another run cannot reproduce: random numbers, time stamps, report MACs.

Nor what tells one build of the module from another, and VMCS fields that follow from the machine: controls and host
state, which TDH.VP.RD shows of a debug TD.
"""

from typing import Any, Final

from softtdx.abi.fields import L2_VMCS_CLASSES, VMCS_CLASS

__all__ = ["comes_later", "exit_registers", "guest_registers", "host_registers", "memory"]

Step = dict[str, Any]

TDH_MNG: Final = frozenset({11, 13})  # RD, WR: both return the value that was there
TDH_VP: Final = frozenset({26, 43})
TDH_SYS_RD: Final = 34
TDG_VM_RD: Final = 7
TDG_VP_RD: Final = 9
TDG_SYS_RD: Final = 11

# Class and field code of what cannot agree.
_CODE: Final = 0x3F << 56 | 0xFF_FFFF
_TD_FIELDS: Final = frozenset(
    [*(0x00 << 56 | 0x20 + i for i in range(4))]  # TD_UUID
    + [0x11 << 56 | 0x0A, 0x11 << 56 | 0x0D]  # TSC_OFFSET, VIRTUAL_TSC
    + [0x18 << 56 | code for code in range(0x10, 0x20)]  # migration keys
    + [0x18 << 56 | 0x40 + i for i in range(4)]  # PRE_IMPORT_UUID
    + [0x02 << 56 | 0x01]  # SEAMDB_INDEX
)
_SYS_FIELDS: Final = frozenset([0x08 << 56 | 0x01, 0x08 << 56 | 0x02])  # BUILD_DATE, BUILD_NUM
_VP_FIELDS: Final = frozenset([0x20 << 56 | 0x0A, 0x20 << 56 | 0x30])  # LAST_EXIT_TSC, HP_LOCK_BUSY_START
_XBUFF: Final = 0x12 << 56  # recorded without extended state
_VMCS_CLASSES: Final = frozenset({VMCS_CLASS, *L2_VMCS_CLASSES})
_CONTROL_OR_HOST: Final = frozenset({0, 3})  # a VMCS field's type, bits 11:10 of its encoding


def _unlike_vp_field(field: int) -> bool:
    """Whether a field of TDVPS cannot agree, or depends on the machine that recorded it."""
    code = field & _CODE
    if code >> 56 in _VMCS_CLASSES:
        return code >> 10 & 3 in _CONTROL_OR_HOST
    return code in _VP_FIELDS or code & 0x3F << 56 == _XBUFF


# Families of leaves that this module does not have yet: service TDs, migration, L2 VMs.
_LATER_HOST: Final = frozenset({48, 49, *range(64, 97)})
_LATER_GUEST: Final = frozenset({18, 20, 25, 26, 27})


def comes_later(step: Step) -> bool:
    """Whether a step is of a leaf that this module does not have yet."""
    if step.get("who") == "host":
        return step["leaf"] in _LATER_HOST
    return step.get("leaf") in _LATER_GUEST


def host_registers(step: Step) -> frozenset[str]:
    """Output registers of a host step that are not compared."""
    field = int(step["in"].get("rdx", "0"), 0)
    if step["leaf"] in TDH_MNG and field & _CODE in _TD_FIELDS:
        return frozenset({"r8"})
    if step["leaf"] == TDH_SYS_RD and field & _CODE in _SYS_FIELDS:
        return frozenset({"r8"})
    if step["leaf"] in TDH_VP and _unlike_vp_field(field):
        return frozenset({"r8"})
    return frozenset()


def guest_registers(event: Step) -> frozenset[str]:
    """Output registers of a TDCALL that are not compared."""
    fields = {TDG_VM_RD: _TD_FIELDS, TDG_SYS_RD: _SYS_FIELDS}.get(event.get("leaf", -1), frozenset())
    if fields and int(event["in"].get("rdx", "0"), 0) & _CODE in fields:
        return frozenset({"r8"})
    return frozenset()


def exit_registers(event: Step) -> frozenset[str]:
    """Host registers at a TD exit that are not compared."""
    del event
    return frozenset()


def memory(step: Step, at: int) -> bool:
    """Whether the 16 bytes at an offset are not compared: of a TDREPORT what hardware writes."""
    if "ignore" not in step:
        return False
    return 0x10 <= at < 0x50 or 0xE0 <= at < 0x200
