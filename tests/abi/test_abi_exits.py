import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi import exits, vmcs
from softtdx.abi.exits import EventType, ExitReason, Vector
from softtdx.abi.vmcs_field import FieldType, VmcsField, field_type, field_width


def test_exit_reasons_are_those_of_the_facts(facts):
    values = facts("structs")["types"]["vm_exit_basic_reason_e"]["values"]
    assert {int(reason) for reason in ExitReason} == set(values.values()) - {35}


def test_ve_categories_and_extended_qualifications_are_those_of_the_facts(facts):
    types = facts("structs")["types"]
    assert {int(c) for c in exits.VeCategory} == set(types["ve_category_e"]["values"].values())
    assert {int(kind) for kind in exits.ExtendedQualification} == set(types["vmx_eeq_type_t"]["values"].values())


@given(st.integers(0, (1 << 32) - 1))
def test_any_exit_reason_has_a_name(reason):
    assert exits.describe_reason(reason)


def test_a_failed_entry_says_so():
    assert exits.describe_reason(0x8000_0021) == "ENTRY_FAILURE_GUEST_STATE [VM-entry failure]"


@pytest.mark.parametrize(
    ("vector", "info"),
    [
        (Vector.PF, 0x8000_0B0E),
        (Vector.GP, 0x8000_0B0D),
        (Vector.UD, 0x8000_0306),
        (Vector.VE, 0x8000_0314),
        (Vector.NMI, 0x8000_0202),
    ],
)
def test_event_information_of_an_exception_is_what_the_cpu_writes(vector, info):
    assert exits.exception_info(vector) == info


@given(st.integers(0, 255), st.sampled_from(EventType), st.booleans())
def test_event_information_holds_vector_type_and_error_code_flag(vector, kind, error_code):
    info = exits.event_info(vector, kind, error_code=error_code)
    assert info & exits.INFO_VECTOR_MASK == vector
    assert (info & exits.INFO_TYPE_MASK) >> 8 == kind
    assert bool(info & exits.INFO_ERROR_CODE) == error_code
    assert info & exits.INFO_VALID


@given(st.integers(0, 0xFFFF), st.sampled_from([1, 2, 4]), st.booleans())
def test_an_io_qualification_comes_apart_again(port, size, direction_in):
    qualification = exits.io_qualification(port, size, direction_in=direction_in)
    assert exits.io_parts(qualification) == (port, size, direction_in, False, False)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 255), st.booleans(), st.integers(0, 3))
def test_accept_information_is_packed_as_the_facts_say(facts, requested, level, state, leaf, vm):
    info = exits.accept_info(requested, level=level, state=state, leaf=leaf, vm=vm)
    bits = {
        bit["name"]: info >> bit["bit_offset"] & (1 << bit["bits"]) - 1
        for bit in facts("structs")["types"]["tdaccept_vmx_eeq_info_t"]["fields"][0]["fields"]
    }
    assert bits["req_sept_level"] == requested
    assert (bits["err_sept_level"], bits["err_sept_state"]) == (level, state)
    assert (bits["err_sept_is_leaf"], bits["vm_index"]) == (leaf, vm)
    assert bits["rsvd_0"] == bits["rsvd_1"] == 0


def test_every_field_of_a_td_vmcs_has_a_vmcs_encoding_of_ours(facts):
    known = {int(field) for field in VmcsField}
    for row in facts("td_vmcs")["fields"]:
        encoding = int(row["vmcs_encoding"], 16)
        stride = 2
        for number in range(row["num_of_fields"]):
            assert encoding + stride * number in known
        width = row["id"]["element_bytes"]
        assert field_width(encoding) == width


def test_each_encoding_has_one_name_and_a_plain_int_of_that_name():
    assert len({int(field) for field in VmcsField}) == len(VmcsField.__members__)
    for field in VmcsField:
        plain = getattr(vmcs, field.name)
        assert type(plain) is int
        assert plain == field.value


@pytest.mark.parametrize("field", list(VmcsField), ids=lambda field: field.name)
def test_an_encoding_says_what_its_name_says(field):
    assert not field.value & 1
    kind = field_type(field.value)
    if field.name.startswith("HOST_"):
        assert kind is FieldType.HOST
    elif field.name.startswith("GUEST_") and field.name not in {"GUEST_PHYSICAL_ADDRESS", "GUEST_LINEAR_ADDRESS"}:
        assert kind is FieldType.GUEST
    elif "CONTROLS" in field.name:
        assert kind is FieldType.CONTROL


def test_the_upper_half_of_a_64_bit_field_has_4_bytes():
    assert field_width(vmcs.EPTP) == 8
    assert field_width(vmcs.EPTP | 1) == 4
    assert field_width(vmcs.GUEST_CS_SELECTOR) == 2
    assert field_width(vmcs.GUEST_RIP) == 8
