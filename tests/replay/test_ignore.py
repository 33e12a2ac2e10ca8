"""Which registers of a recorded step are not compared."""

import pytest

from softtdx.abi.fields import table
from softtdx.replay import ignore

VP_RD, VP_WR, MNG_RD, MNG_WR, SYS_RD = 26, 43, 11, 13, 34
TDG_VM_RD, TDG_SYS_RD = 7, 11
R8, ALL = frozenset({"r8"}), frozenset()


def step(leaf: int, field: int) -> dict[str, object]:
    return {"who": "host", "leaf": leaf, "in": {"rcx": "0x1000000", "rdx": hex(field)}}


@pytest.mark.parametrize("leaf", [VP_RD, VP_WR])
@pytest.mark.parametrize(
    ("field", "skipped"),
    [
        (0x0020_0002_0000_4002, R8),  # a control of the TD VMCS
        (0x0020_0003_0000_2010, R8),  # TSC offset
        (0x0020_0003_0000_6C00, R8),  # host CR0
        (0x0020_0003_0000_681E, ALL),  # guest RIP
        (0x0020_0002_0000_4402, ALL),  # exit reason
        (0x2420_0002_0000_4002, R8),  # a control of an L2 VM's VMCS
        (0x2420_0003_0000_681E, ALL),
        (0x1020_0003_0000_0000, ALL),  # guest RAX
    ],
)
def test_of_a_vmcs_the_guest_state_and_the_exit_information_are_compared(leaf, field, skipped):
    assert ignore.host_registers(step(leaf, field)) == skipped


@pytest.mark.parametrize(
    ("leaf", "structure", "name", "skipped"),
    [
        (VP_RD, "vp", "LAST_EXIT_TSC", R8),
        (VP_RD, "vp", "HP_LOCK_BUSY_START", R8),
        (VP_RD, "vp", "HP_LOCK_BUSY", ALL),
        (VP_RD, "vp", "XBUFF", R8),
        (VP_RD, "vp", "LAST_SEAMDB_INDEX", ALL),
        (MNG_RD, "td", "TD_UUID", R8),
        (MNG_WR, "td", "TSC_OFFSET", R8),
        (MNG_RD, "td", "TSC_FREQUENCY", ALL),
        (MNG_RD, "vp", "LAST_EXIT_TSC", ALL),
        (SYS_RD, "sys", "BUILD_DATE", R8),
        (SYS_RD, "sys", "BUILD_NUM", R8),
        (SYS_RD, "sys", "UPDATE_VERSION", ALL),
    ],
)
def test_fields_that_follow_from_chance_or_from_the_clock_are_not(leaf, structure, name, skipped):
    assert ignore.host_registers(step(leaf, table(structure)[name].field_id)) == skipped


@pytest.mark.parametrize(
    ("leaf", "structure", "name", "skipped"),
    [
        (TDG_VM_RD, "td", "TD_UUID", R8),
        (TDG_VM_RD, "td", "NUM_VCPUS", ALL),
        (TDG_SYS_RD, "sys", "BUILD_DATE", R8),
        (TDG_SYS_RD, "sys", "MAJOR_VERSION", ALL),
        (None, "sys", "BUILD_DATE", ALL),
    ],
)
def test_a_td_reads_the_same_values(leaf, structure, name, skipped):
    event = {"who": "td", "in": {"rdx": hex(table(structure)[name].field_id)}}
    if leaf is not None:
        event["leaf"] = leaf
    assert ignore.guest_registers(event) == skipped
