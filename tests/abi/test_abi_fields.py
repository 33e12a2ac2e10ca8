import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi import cpuid, fields, msrs
from softtdx.abi.fields import CpuidFieldCode, MdContext

SOURCES = {
    "sys": "global_sys_fields",
    "td": "tdr_tdcs",
    "vp": "tdvps",
    "vmcs": "td_vmcs",
    "l2_vmcs": "td_l2_vmcs",
}
every_field = [entry for table in fields.tables().values() for entry in table.fields]


def _mask(row, *names):
    return next((int(row[f"{name}_mask"], 16) for name in names if f"{name}_mask" in row), 0)


@pytest.mark.parametrize("name", list(SOURCES))
def test_tables_say_what_the_facts_say(facts, name):
    rows = facts(SOURCES[name])["fields"]
    table = fields.table(name)
    assert len(table) == len(rows)
    for entry, row in zip(table.fields, rows, strict=True):
        assert entry.field_id == int(row["field_id"], 16)
        assert (entry.num_fields, entry.num_elements) == (row["num_of_fields"], row["num_of_elem"])
        assert entry.offset == row.get("offset")
        assert (entry.special_rd, entry.special_wr) == (row["special_rd_handling"], row["special_wr_handling"])
        assert (f"MIG_{entry.mig_export}", f"MIG_{entry.mig_import}") == (row["mig_export"], row["mig_import"])
        assert int(entry.attributes) == (row.get("attributes_raw") or 0)
        assert entry.element_size == row["id"]["element_bytes"]
        assert (entry.prod_rd, entry.prod_wr) == (_mask(row, "prod_rd", "vmm_rd"), _mask(row, "prod_wr", "vmm_wr"))
        assert (entry.dbg_rd, entry.dbg_wr) == (_mask(row, "dbg_rd", "vmm_rd"), _mask(row, "dbg_wr", "vmm_wr"))
        assert entry.guest_rd == _mask(row, "guest_rd", "l1_vmm_rd")
        assert entry.guest_wr == _mask(row, "guest_wr", "l1_vmm_wr")
        assert (entry.migtd_rd, entry.migtd_wr) == (_mask(row, "migtd_rd"), _mask(row, "migtd_wr"))
        assert (entry.export, entry.import_) == (_mask(row, "export"), _mask(row, "import"))
        if "vmcs_encoding" in row:
            assert entry.vmcs_encoding == int(row["vmcs_encoding"], 16)


@pytest.mark.parametrize("entry", every_field, ids=lambda entry: f"{entry.table}-{entry.name}")
def test_a_field_is_found_by_its_own_id_and_its_last_element_is_the_last(entry):
    table = fields.table(entry.table)
    class_code = 36 if entry.table == "l2_vmcs" else entry.class_code
    first = table.find(class_code, entry.field_code)
    assert first == (entry, 0, 0)
    if entry.name == "CPUID_VALUES" and entry.table == "td":
        return
    last = table.find(class_code, entry.field_code + entry.span - 1)
    assert last is not None
    assert last.entry is entry
    assert (last.field, last.element) == (entry.num_fields - 1, entry.num_elements - 1)


@pytest.mark.parametrize("entry", every_field, ids=lambda entry: f"{entry.table}-{entry.name}")
def test_an_access_mask_stays_within_the_element(entry):
    limit = (1 << 8 * entry.element_size) - 1
    reads = (entry.prod_rd, entry.dbg_rd, entry.guest_rd, entry.migtd_rd, entry.export)
    writes = (entry.prod_wr, entry.dbg_wr, entry.guest_wr, entry.migtd_wr, entry.import_)
    masks = (*reads, *writes)
    assert all(mask & ~limit == 0 for mask in masks)


@pytest.mark.parametrize("name", ["sys", "td", "vp", "vmcs"])
def test_field_codes_of_two_fields_of_a_class_never_overlap(name):
    taken: dict[tuple[int, int], str] = {}
    for entry in fields.table(name).fields:
        if entry.name == "CPUID_VALUES":
            continue
        for code in range(entry.field_code, entry.field_code + entry.span):
            assert taken.setdefault((entry.class_code, code), entry.name) == entry.name


@given(st.integers(0, (1 << 64) - 1))
def test_any_field_id_comes_apart_and_together_but_for_reserved_bits(raw):
    assert fields.encode_field_id(*fields.field_id(raw)) == raw & ~fields.FIELD_ID_RESERVED
    assert fields.describe(raw)


@given(st.integers(0, 0x7F), st.booleans(), st.one_of(st.none(), st.integers(0, 0x7F)), st.integers(0, 1))
def test_a_cpuid_field_code_comes_apart_and_together(leaf, extended, subleaf, element):
    code = CpuidFieldCode(leaf | (extended << 31), subleaf, element)
    assert CpuidFieldCode.decode(code.encode()) == code
    assert code.encode() >> 17 == 0


@given(st.integers(0, 7), st.integers(0, 63), st.integers(0, (1 << 24) - 1))
def test_looking_up_any_class_and_code_never_fails(context, class_code, field_code):
    table = fields.table_for(context, class_code)
    assert (table is None) == (context > MdContext.VP)
    if table is not None:
        found = table.find(class_code, field_code)
        assert found is None or 0 <= found.field < found.entry.num_fields


def test_a_position_knows_its_offset():
    rtmr = fields.table("td")["RTMR"]
    second = fields.table("td").find(rtmr.class_code, rtmr.field_code + 7)
    assert second is not None
    assert (second.field, second.element) == (1, 1)
    assert second.offset == (rtmr.offset or 0) + 56
    assert rtmr.size == 4 * 48


def test_a_debug_td_shows_the_host_more():
    rax = fields.table("vp")["RAX"]
    assert rax.host_masks(debug=False)[0] == 0
    assert rax.host_masks(debug=True)[0] == (1 << 64) - 1


@pytest.mark.parametrize(("leaf", "contexts"), [("TDH.MNG.RD", (MdContext.TD,)), ("TDH.VP.RD", (MdContext.VP,))])
def test_a_real_module_read_exactly_the_fields_a_production_td_shows(recording, leaf, contexts):
    checked = 0
    for step in recording("12_metadata_prod"):
        if step.get("name") != leaf or step["v"] != 0:
            continue
        parts = fields.field_id(int(step["in"]["rdx"], 16))
        if parts.context not in contexts or parts.class_code in fields.L2_VMCS_CLASSES:
            continue
        table = fields.table_for(parts.context, parts.class_code)
        assert table is not None
        found = table.find(parts.class_code, parts.field_code)
        if step["sn"] == "TDX_SUCCESS":
            assert found is not None
            assert int(step["out"].get("r8", "0x0"), 16) & ~found.entry.prod_rd == 0
            assert found.entry.prod_rd
        elif step["sn"] == "TDX_METADATA_FIELD_NOT_READABLE":
            assert found is not None
            assert found.entry.prod_rd == 0
        checked += 1
    assert checked > 100


def test_a_real_module_began_its_iterations_with_our_first_readable_fields(recording):
    firsts = {
        step["name"]: int(step["out"]["rdx"], 16)
        for step in recording("12_metadata_prod")
        if step.get("sn") == "TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT"
    }
    td = next(entry for entry in fields.table("td").fields if entry.prod_rd)
    vp = next(entry for entry in fields.table("vmcs").fields if entry.prod_rd)
    assert firsts == {"TDH.MNG.RD": td.field_id, "TDH.VP.RD": vp.field_id}


# --- MSRs


def test_msr_rows_say_what_the_facts_say(facts):
    for row, fact in zip(msrs.policies(), facts("msr_config")["msrs"], strict=True):
        assert (row.name, row.first, row.last) == (fact["name"], int(fact["start"], 16), int(fact["end"], 16))
        assert f"MSR_BITMAP_{row.rd_bitmap}" == fact["rd_bit_meaning"]
        assert f"MSR_ACTION_{row.rd_action}" == fact["rd_action"]
        assert f"MSR_BITMAP_{row.wr_bitmap}" == fact["wr_bit_meaning"]
        assert f"MSR_ACTION_{row.wr_action}" == fact["wr_action"]


def test_msr_rows_do_not_overlap_and_answer_for_every_msr_they_cover():
    end = -1
    for row in sorted(msrs.policies(), key=lambda row: row.first):
        assert end < row.first <= row.last
        end = row.last
        assert msrs.policy(row.first) is row
        assert msrs.policy(row.last) is row


@given(st.integers(0, (1 << 32) - 1))
def test_any_msr_has_at_most_one_row_and_one_bitmap_bit(msr):
    row = msrs.policy(msr)
    assert row is None or row.first <= msr <= row.last
    bits = {msrs.bitmap_bit(msr, write=write) for write in (False, True)}
    assert bits == {None} or len(bits) == 2
    assert (bits != {None}) == msrs.in_bitmap(msr)


def test_the_bitmap_has_a_bit_of_its_own_for_every_msr_and_direction():
    numbers = [*range(0x2000), *range(0xC000_0000, 0xC000_2000)]
    bits = [msrs.bitmap_bit(msr, write=write) for msr in numbers for write in (False, True)]
    assert sorted(bit for bit in bits if bit is not None) == list(range(4096 * 8))


def test_a_real_module_injected_what_the_msr_table_says(recording):
    vectors = {"VE": 20, "GP": 13}
    checked = 0
    for step in recording("24_msr_default"):
        if step.get("reason") not in (31, 32) or step.get("res") != "inject":
            continue
        row = msrs.policy(int(step["in"].get("rcx", "0x0"), 16))
        if row is None:
            continue
        bitmap, action = (row.rd_bitmap, row.rd_action) if step["reason"] == 31 else (row.wr_bitmap, row.wr_action)
        if bitmap == "FIXED_1" and action in vectors:
            assert step["inject"]["vec"] == vectors[action]
            checked += 1
    assert checked > 50


# --- CPUID


def test_cpuid_rows_say_what_the_facts_say(facts):
    table = facts("cpuid_config")
    by_index = {row["index"]: row for row in table["cpuid_lookup"]}
    assert len(cpuid.rows()) == len(by_index)
    for row in cpuid.rows():
        fact = by_index[row.index]
        assert row.leaf == int(fact["leaf"], 16)
        assert (cpuid.SUBLEAF_NA if row.subleaf is None else row.subleaf) == int(fact["subleaf"], 16)
        assert row.config_index == fact["config_index"]
        for mask in ("verify_mask", "verify_value", "verify_same", "fixed1", "fixed0_or_dynamic"):
            assert _regs(getattr(row, mask)) == {reg: int(v, 16) for reg, v in fact.get(mask, {}).items() if int(v, 16)}


def test_configurable_cpuid_is_in_the_order_of_td_params(facts):
    by_index = {row["index"]: row for row in facts("cpuid_config")["cpuid_configurable"]}
    assert [row.config_index for row in cpuid.configurable()] == sorted(by_index)
    for row in cpuid.configurable():
        fact = by_index[row.config_index]
        assert (row.leaf, row.index) == (int(fact["leaf"], 16), fact["lookup_index"])
        for mask in ("config_direct", "allow_direct"):
            assert _regs(getattr(row, mask)) == {reg: int(v, 16) for reg, v in fact.get(mask, {}).items()}


def test_xfam_masks_are_those_of_the_facts(facts):
    for name, by_bit in facts("cpuid_config")["xfam_masks"].items():
        leaf, subleaf = (int(part, 16) for part in name.removeprefix("xfam_mask_").split("_"))
        ours = cpuid.xfam_masks()[leaf, None if subleaf == cpuid.SUBLEAF_NA else subleaf]
        assert {bit: _regs(regs) for bit, regs in ours.items()} == {
            int(bit): {reg: int(v, 16) for reg, v in regs.items()} for bit, regs in by_bit.items()
        }


def _regs(regs):
    return {reg: value for reg, value in regs._asdict().items() if value}


@given(st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 32) - 1))
def test_any_cpuid_request_finds_one_row_or_none(leaf, subleaf):
    row = cpuid.find(leaf, subleaf)
    assert row is None or (row.leaf == leaf and row.subleaf in (None, subleaf))


def test_no_cpuid_bit_is_both_fixed_to_one_and_fixed_to_zero():
    for row in cpuid.rows():
        assert not any(one & zero for one, zero in zip(row.fixed1, row.fixed0_or_dynamic, strict=True))
