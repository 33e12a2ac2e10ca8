import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softtdx.abi import explain, ghci, migration, structs
from softtdx.abi.wire import LayoutError

EVERY = explain.structures()
IN_FACTS = {
    structs.TdReport: "td_report_t",
    structs.ReportMac: "report_mac_struct_t",
    structs.ReportType: "td_report_type_t",
    structs.TeeTcbInfo: "tee_tcb_info_t",
    structs.TdInfo: "td_info_t",
    structs.TdParams: "td_params_t",
    structs.CmrInfo: "cmr_info_entry_t",
    structs.TdmrInfo: "tdmr_info_entry_t",
    structs.TdSysInfo: "td_sys_info_t",
    structs.CpuidValues: "cpuid_config_return_values_t",
    structs.CpuidConfigEntry: "cpuid_config_t",
    structs.SysInfoTable: "sysinfo_table_t",
    structs.VeInfo: "tdvps_ve_info_t",
    structs.L2EnterGuestState: "l2_enter_guest_state_t",
    structs.MktmeKeyProgram: "mktme_key_program_t",
    migration.MdListHeader: "md_list_header_t",
    migration.Mbmd: "mbmd_t",
}
# Where one field of the facts is several of ours, or the other way round.
SPLIT = {
    "td_info_t": {(208, 192): [(208 + 48 * i, 48) for i in range(4)]},
    "cpuid_config_t": {(0, 8): [(0, 4), (4, 4)]},
    "mktme_key_program_t": {(64, 16): [(64, 64)], (128, 16): [(128, 64)]},
    "mbmd_t": {(0, 24): [(0, 2), (2, 2), (4, 2), (6, 1), (8, 4), (12, 4), (16, 8)]},
}


def _is_reserved(name):
    return name.startswith(("reserved", "rsvd")) and name != "rsvd_areas"


def _ranges(kind, base=0):
    """(offset, size) of every field that is not reserved; of a union's alternatives the first."""
    for field in kind["fields"][:1] if kind["kind"] == "union" else kind["fields"]:
        at = base + field.get("offset", 0)
        if field["name"] in (None, "mcheck_fields"):
            yield from _ranges(field, at)
        elif not _is_reserved(field["name"]):
            yield at, field["size"]


@pytest.mark.parametrize("kind", list(IN_FACTS), ids=lambda kind: kind.__name__)
def test_a_structure_has_the_size_and_fields_of_the_facts(facts, kind):
    name = IN_FACTS[kind]
    layout = facts("structs")["types"][name]
    assert layout["size"] == kind.SIZE
    expected = {(0, 24), (24, 8), (32, 16)} if name == "mbmd_t" else set(_ranges(layout))
    for whole, parts in SPLIT.get(name, {}).items():
        expected.discard(whole)
        expected |= set(parts)
    assert {(field.at, field.size) for field in kind.fields} == expected


def _flag_values(layout):
    return {
        bit["name"]: bit["bit_offset"]
        for alternative in layout["fields"]
        for bit in alternative.get("fields", ())
        if bit.get("bits") == 1 and not bit["name"].startswith("reserved")
    }


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (structs.ConfigFlags, "config_flags_t"),
        (structs.TdCtls, "td_ctls_t"),
        (structs.FeatureParavirtCtls, "feature_paravirt_ctls_t"),
        (structs.TdxFeatures0, "tdx_features_enum0_t"),
        (structs.Attributes, "td_param_attributes_t"),
    ],
)
def test_flags_are_the_bits_of_the_facts(facts, flags, name):
    bits = _flag_values(facts("structs")["types"][name])
    ours = {flag.name.lower().removesuffix("_52"): flag.bit_length() - 1 for flag in flags}
    shared = set(bits) & set(ours)
    assert set(bits) - set(ours) <= {"pmt_prof", "reserved"}
    assert all(bits[bit] == ours[bit] for bit in shared)


@pytest.mark.parametrize(
    ("enum", "name", "prefix"),
    [
        (structs.PageType, "page_type_t", "PT_"),
        (structs.PageSize, "page_size_t", None),
        (migration.MbType, "mb_type_t", None),
        (migration.GpaOperation, "gpa_list_entry_operation_t", None),
        (migration.GpaEntryStatus, "gpa_list_entry_status_t", "GPA_ENTRY_STATUS_"),
        (migration.MigType, "mig_type_t", "MIG_"),
        (migration.ServtdBindingState, "servtd_binding_state_t", None),
    ],
)
def test_enumerations_are_those_of_the_facts(facts, enum, name, prefix):
    values = facts("structs")["types"][name]["values"]
    if prefix is not None:
        assert {member.name: int(member) for member in enum} == {k.removeprefix(prefix): v for k, v in values.items()}
    assert {int(member) for member in enum} <= set(values.values())


@pytest.mark.parametrize("name", sorted(EVERY))
@settings(max_examples=20)
@given(data=st.data())
def test_any_bytes_of_its_size_are_read_and_written_back_unchanged(name, data):
    kind = EVERY[name]
    seed = data.draw(st.binary(min_size=1, max_size=64))
    content = (seed * (kind.SIZE // len(seed) + 1))[: kind.SIZE]
    wire = kind.parse(content, strict=False)
    assert bytes(wire) == content
    assert set(wire.as_dict()) == {field.name for field in kind.fields}
    assert repr(wire)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_structure_of_zeros_is_clean_and_every_reserved_byte_counts(name):
    kind = EVERY[name]
    kind.parse(bytes(kind.SIZE))
    for at, size in kind.reserved():
        for offset in (at, at + size - 1):
            dirty = bytearray(kind.SIZE)
            dirty[offset] = 1
            with pytest.raises(LayoutError):
                kind.parse(dirty)


@pytest.mark.parametrize("name", sorted(EVERY))
def test_no_structure_takes_too_few_or_too_many_bytes(name):
    kind = EVERY[name]
    for size in {0, kind.SIZE - 1, kind.SIZE + 1, 2 * kind.SIZE}:
        with pytest.raises(LayoutError, match=str(kind.SIZE)):
            kind.parse(bytes(size))


def test_the_signed_ranges_of_a_sigstruct_leave_out_key_and_signature():
    covered = {offset for start, end in structs.SIGSTRUCT_SIGNED_RANGES for offset in range(start, end)}
    unsigned = {
        name
        for name in (field.name for field in structs.SeamSigstruct.fields)
        if vars(structs.SeamSigstruct)[name].at not in covered
    }
    assert unsigned == {"modulus", "exponent", "signature"}


def test_a_pamt_entry_packs_lock_type_owner_and_epoch():
    entry = structs.PamtEntry()
    entry.lock, entry.type, entry.owner, entry.bepoch = 0x8001, structs.PageType.TDR, (1 << 40) - 1, 7
    assert bytes(entry) == b"\x01\x80\x04\xff\xff\xff\xff\xff\x07" + bytes(7)


def test_the_vmcall_mask_is_what_register_numbers_say():
    assert ghci.register_mask("r10", "r11", "r12", "r13", "r14", "r15") == ghci.STANDARD_MASK
    allowed = [name for name, number in ghci.GPR_NUMBERS.items() if ghci.VMCALL_MASK >> number & 1]
    assert set(ghci.GPR_NUMBERS) - set(allowed) == {"rax", "rcx", "rsp"}
