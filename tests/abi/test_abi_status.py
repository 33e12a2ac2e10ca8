import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi.status import (
    DetailKind,
    Operand,
    SeamldrStatus,
    Status,
    describe,
    split,
    status_of,
    with_operand,
)

u64 = st.integers(0, (1 << 64) - 1)


def test_every_code_of_the_facts_is_a_status_with_its_flags(facts):
    codes = facts("error_codes")["codes"]
    assert len(codes) == len(Status) == 183
    for code in codes:
        status = Status[code["name"].removeprefix("TDX_")]
        assert int(status) == int(code["value"], 16)
        assert (status.is_error, status.non_recoverable) == (bool(code["error"]), bool(code["non_recoverable"]))
        assert (status.fatal, status.host_recoverability_hint) == (
            bool(code["fatal"]),
            bool(code["host_recoverability_hint"]),
        )
        assert (status.klass, status.detail_l1) == (code["klass"], code["detail_l1"])


def test_every_operand_id_of_the_facts_is_an_operand(facts):
    ids = {row["name"].removeprefix("OPERAND_ID_"): row["value"] for row in facts("error_codes")["operand_ids"]}
    assert {operand.name: int(operand) for operand in Operand} == ids


def test_no_two_statuses_share_their_upper_half():
    halves = [int(status) >> 32 for status in Status]
    assert len(set(halves)) == len(halves)


def test_all_statuses_but_the_unset_one_leave_room_for_a_detail():
    assert {status.name for status in Status if int(status) & 0xFFFF_FFFF} == {"UNINITIALIZE_ERROR"}


@pytest.mark.parametrize("status", [s for s in Status if s is not Status.UNINITIALIZE_ERROR])
def test_a_status_survives_its_detail(status):
    for detail in (0, 1, 0x91, 0xFFFF_FFFF):
        assert status_of(with_operand(status, detail)) is status
        assert describe(with_operand(status, detail)).startswith(status.name)


@pytest.mark.parametrize(
    ("rax", "text"),
    [
        (0, "SUCCESS"),
        (0xC000_0100_0000_0000, "OPERAND_INVALID (operand RAX)"),
        (0xC000_0100_0000_0001, "OPERAND_INVALID (operand RCX)"),
        (0x8000_0200_0000_0092, "OPERAND_BUSY (operand SEPT_TREE)"),
        (0xC000_0100_0000_0777, "OPERAND_INVALID (detail 0x777)"),
        (0xC000_0600_0000_0000, "unknown status 0xc000060000000000 [error, non-recoverable]"),
        (0xC000_0608_0000_0002, "OP_STATE_INCORRECT (TD OP_STATE 2)"),
        (0xC000_0700_0000_0004, "VCPU_STATE_INCORRECT (VCPU_STATE 4)"),
        (0xC000_0921_0000_010A, "INCORRECT_MSR_VALUE (MSR 0x10a)"),
        (0xC000_0B0F_0002_0001, "L2_SEPT_WALK_FAILED (L2 VM 2, level 1)"),
        (0x4D, "SUCCESS (VMX exit reason 0x4d)"),
        (0xE000_0100_0000_00B1, "OPERAND_INVALID [error, non-recoverable, fatal] (operand NUM_VCPUS)"),
        ((1 << 64) - 1, "UNINITIALIZE_ERROR"),
    ],
)
def test_rax_is_described_with_what_its_low_half_means(rax, text):
    assert describe(rax) == text


@given(u64)
def test_any_rax_can_be_described_and_its_parts_rebuild_it(rax):
    assert describe(rax)
    parts = split(rax)
    flags = sum(bool(flag) << (63 - index) for index, flag in enumerate(parts[:4]))
    rebuilt = flags | parts.klass << 40 | parts.detail_l1 << 32 | parts.detail_l2
    assert rebuilt == rax & ~(0xFFF << 48)


@given(u64)
def test_an_unknown_status_keeps_its_number(rax):
    assert int(status_of(rax)) in (rax & ~0xFFFF_FFFF, (1 << 64) - 1)


@given(st.one_of(st.integers(max_value=-1), st.integers(min_value=1 << 64)))
def test_what_is_no_64_bit_value_is_said_to_be_none(value):
    assert "not a 64-bit value" in describe(value)
    with pytest.raises(ValueError, match="not a valid Status"):
        Status(value)


def test_every_detail_kind_is_said_of_some_status():
    assert {status.detail_kind for status in Status} == set(DetailKind)


def test_a_loader_error_has_bit_63():
    assert [s.name for s in SeamldrStatus if not s.is_error] == ["SUCCESS"]


@pytest.mark.parametrize(
    "name", ["base_sys", "02_td_build", "04_sept_life", "06_wrong_state", "08_bad_args_initialized", "20_tdcall"]
)
def test_statuses_a_real_module_returned_have_the_names_recorded_with_them(recording, name):
    checked = 0
    for step in recording(name):
        if step.get("who") != "host" or not str(step.get("sn", "")).startswith("TDX_"):
            continue
        label, _, detail = step["sn"].removeprefix("TDX_").partition("|")
        text = describe(int(step["st"], 16))
        assert text.split(" ")[0] == label
        if detail.isidentifier():
            assert f"operand {detail})" in text
        checked += 1
    assert checked
