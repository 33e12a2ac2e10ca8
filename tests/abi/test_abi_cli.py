import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi import explain, reference, structs
from softtdx.abi.leaves import leaf_infos
from softtdx.cli.abi import COMMANDS
from softtdx.errors import SoftTdxError

(ABI,) = COMMANDS


def run(*arguments: str) -> str:
    result = CliRunner().invoke(ABI, list(arguments), catch_exceptions=True)
    if isinstance(result.exception, SoftTdxError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_leaves_lists_each_side_and_all_of_them():
    sides = {side: json.loads(run("leaves", "--side", side, "--json")) for side in ("host", "guest", "loader", "all")}
    assert len(sides["all"]) == sum(len(sides[side]) for side in ("host", "guest", "loader")) == len(leaf_infos())
    assert "TDH.MNG.CREATE" in run("leaves")


@pytest.mark.parametrize("name", [("TDH.MEM.PAGE.ADD",), ("seamcall", "2"), ("tdh", "0x2"), ("mem.page.add",)])
def test_a_leaf_is_explained_by_name_or_number(name):
    facts = json.loads(run("leaf", *name, "--json"))
    assert facts["name"] == "TDH.MEM.PAGE.ADD"
    assert facts["op_states"] == ["INITIALIZED"]
    assert facts["sept_states"] == ["FREE"]
    assert "R9" in run("leaf", *name)


def test_the_number_of_a_tdcall_is_not_that_of_a_seamcall():
    assert json.loads(run("leaf", "tdcall", "4", "--json"))["name"] == "TDG.MR.REPORT"
    assert json.loads(run("leaf", "seamcall", "0x8000000000000001", "--json"))["name"] == "SEAMLDR.INSTALL"


@pytest.mark.parametrize("text", ["0x8000020000000008", "9223374235878031368", "0x8000_0200_0000_0008"])
def test_a_status_is_decoded_however_the_number_is_written(text):
    facts = json.loads(run("status", text, "--json"))
    assert facts["status"] == "OPERAND_BUSY"
    assert facts["meaning"] == "OPERAND_BUSY (operand R8)"
    assert facts["detail_l2"] == 8


def test_a_status_is_found_by_name():
    assert "0x8000020000000000" in run("status", "TDX_OPERAND_BUSY")
    assert "0x8000000000020000" in run("status", "ebadsig")


def test_an_entry_and_a_field_and_an_msr_are_decoded():
    entry = json.loads(run("sept", "0x80000000030004f7", "--json"))
    assert (entry["state"], entry["hpa"], entry["leaf"]) == ("MAPPED", "0x3000000", True)
    field = json.loads(run("field", "TDR", "HKID", "--json"))
    assert field["field_id"] == "0x8110000100000001"
    assert json.loads(run("field", "0x8110000100000001", "--json")) == field
    assert json.loads(run("msr", "IA32_EFER", "--json"))["msr"] == "0xc0000080"
    assert json.loads(run("cpuid", "0x4", "1", "--json"))["subleaf"] == "0x1"
    assert "EPT_VIOLATION" in run("exit", "48")


@pytest.mark.parametrize(
    "arguments",
    [
        ("leaf", "TDH.NO.SUCH"),
        ("leaf", "seamcall", "99999"),
        ("leaf", "tdcall", "x"),
        ("status", "no-such-status"),
        ("status", "0x10000000000000000"),
        ("status", "1x!"),
        ("sept", "zz"),
        ("field", "NO_SUCH_FIELD"),
        ("field", "MSR_BITMAPS_9"),
        ("msr", "NO_SUCH_MSR"),
        ("cpuid", "one"),
        ("exit", "twelve-ish"),
        ("struct", "NoSuchStruct"),
        ("struct", "--decode", "x"),
        ("struct", "TdReport", "--decode", "/no/such/file"),
    ],
)
def test_bad_input_is_refused_in_one_line_that_names_it(arguments):
    with pytest.raises(SoftTdxError) as refusal:
        run(*arguments)
    assert "\n" not in str(refusal.value)
    offender = "--decode" if arguments == ("struct", "--decode", "x") else arguments[-1]
    assert offender in str(refusal.value)


def test_an_ambiguous_field_name_is_refused_with_the_choices():
    with pytest.raises(SoftTdxError, match=r"names 2 fields .*TDCS\.EXECUTION_CONTROLS\.EPTP.*VMCS\.EPTP"):
        run("field", "EPTP")
    assert json.loads(run("field", "TDCS", "EPTP", "--json"))["context"] == 1


@pytest.mark.parametrize("text", ["", " ", "0x", "0xg", "1.5", "--", "1 2", "\u0661x", "1" * 30, "0b2", "-1"])
def test_what_is_no_64_bit_number_is_refused(text):
    with pytest.raises(SoftTdxError, match=r"not a number|64 unsigned bits"):
        explain.parse_u64(text)


@given(st.text(max_size=30))
def test_no_text_breaks_the_decoders(text):
    for decode in (explain.explain_leaf, explain.explain_status, explain.explain_field, explain.explain_msr):
        try:
            facts = decode(text)
        except SoftTdxError:
            continue
        json.dumps(facts)


@given(st.integers(0, (1 << 64) - 1))
def test_every_number_is_decoded_to_json(value):
    text = hex(value)
    for facts in (
        explain.explain_status(text),
        explain.explain_sept(value),
        explain.explain_sept(value, l2=True),
        explain.explain_field(text),
        explain.explain_msr(text),
        explain.explain_cpuid(value, value),
        explain.explain_exit(value),
    ):
        assert json.loads(json.dumps(facts)) == facts


def test_a_structure_file_is_decoded(tmp_path):
    report = structs.TdReport()
    report.report_mac.report_type.type = structs.REPORT_TYPE_TDX
    report.td_info.mrtd = b"\xab" * 48
    path = tmp_path / "report.bin"
    path.write_bytes(bytes(report) + b"trailing bytes are not read")
    facts = json.loads(run("struct", "td_report", "--decode", str(path), "--json"))
    assert facts["td_info"]["mrtd"] == "ab" * 48
    assert facts["report_mac"]["report_type"]["type"] == 0x81
    assert facts["reserved_is_zero"] is True


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_file_too_short_for_its_structure_is_refused(tmp_path, size):
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(SoftTdxError, match=f"TdReport has 1024 bytes, not {size}"):
        run("struct", "TdReport", "--decode", str(path))


def test_the_reference_pages_in_the_tree_are_those_the_tables_give():
    pages = Path(__file__).parents[2] / "docs" / "reference"
    for name, text in reference.pages().items():
        assert (pages / name).read_text(encoding="utf-8") == text, f"run: softtdx abi docs docs/reference ({name})"


def test_docs_writes_pages_and_check_notices_a_stale_one(tmp_path):
    target = tmp_path / "a folder" / "reference"
    assert f"{len(reference.pages())} pages" in run("docs", str(target))
    run("docs", "--check", str(target))
    (target / "sept.md").write_text("old")
    (target / "msrs.md").unlink()
    with pytest.raises(SoftTdxError, match=r"sept\.md, msrs\.md"):
        run("docs", "--check", str(target))


def test_docs_cannot_be_written_over_a_file(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(SoftTdxError, match="cannot write"):
        run("docs", str(blocker / "reference"))


def test_every_page_is_a_table_without_ragged_rows():
    for name, text in reference.pages().items():
        width = 0
        for line in text.splitlines():
            cells = line.replace("\\|", "").count("|")
            if line.startswith("|"):
                assert width in (0, cells), f"{name}: {line}"
                width = cells
            else:
                width = 0


def test_numbers_alone_are_imported_without_reading_a_table():
    code = (
        "import sys, softtdx.abi.status, softtdx.abi.leaves, softtdx.abi.sept, softtdx.abi.fields, softtdx.abi.msrs,"
        "softtdx.abi.cpuid, softtdx.abi.structs, softtdx.abi.vmcs, softtdx.abi.exits;"
        "from softtdx.abi._data import load; assert load.cache_info().currsize == 0;"
        "allowed = {'softtdx', 'softtdx.errors'};"
        "others = {m for m in sys.modules if m.startswith('softtdx') and not m.startswith('softtdx.abi')};"
        "assert others <= allowed, others"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
