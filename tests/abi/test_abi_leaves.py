import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi import opstate
from softtdx.abi.leaves import (
    SEAMLDR_CALL,
    SeamcallLeaf,
    SeamldrLeaf,
    TdcallLeaf,
    find_leaf,
    leaf_infos,
    rax_for,
    split_rax,
)
from softtdx.abi.opstate import OpState
from softtdx.abi.status import SeamldrStatus, Status


@pytest.mark.parametrize(("side", "enum"), [("seamcall", SeamcallLeaf), ("tdcall", TdcallLeaf)])
def test_leaf_numbers_are_those_of_the_facts(facts, side, enum):
    expected = {name: row["number"] for name, row in facts("leaves")[side].items()}
    assert {leaf.mnemonic: int(leaf) for leaf in enum} == expected


def test_documented_inputs_cover_the_registers_the_module_reads(facts):
    for side in ("seamcall", "tdcall"):
        for name, row in facts("leaves")[side].items():
            documented = " ".join(register.name for register in leaf_infos()[name].inputs)
            for register in row["input_regs"] or ():
                assert register in documented or _in_range(register, documented), (name, register)


def _in_range(register, documented):
    return register in ("R10", "R11", "R12") and ("R9-R11" in documented or "R10-R13" in documented)


def test_every_leaf_is_documented_and_every_documented_leaf_exists():
    leaves = [*SeamcallLeaf, *TdcallLeaf, *SeamldrLeaf]
    assert {leaf.mnemonic: int(leaf) for leaf in leaves} == {name: info.number for name, info in leaf_infos().items()}
    for info in leaf_infos().values():
        assert info.summary
        assert all(register.name and register.meaning for register in (*info.inputs, *info.outputs))
        assert all(name in Status.__members__ or name in SeamldrStatus.__members__ for name in info.statuses)


@pytest.mark.parametrize("text", ["TDH.MNG.CREATE", "tdh_mng_create", " mng.create ", "MNG_CREATE"])
def test_a_leaf_is_found_by_the_names_people_type(text):
    info = find_leaf(text)
    assert info is not None
    assert info.mnemonic == "TDH.MNG.CREATE"


@pytest.mark.parametrize("text", ["", "VP.ENTER", "TDH", "TDH.MNG", "ENTER", "\0", "TDH..MNG"])
def test_no_leaf_is_found_by_a_name_that_is_wrong_or_ambiguous(text):
    assert find_leaf(text) is None


@given(st.integers(0, 0xFFFF), st.integers(0, 255))
def test_rax_of_a_call_comes_apart_again(leaf, version):
    assert split_rax(rax_for(leaf, version)) == (leaf, version, 0)


@given(st.integers(0, (1 << 64) - 1))
def test_every_bit_of_rax_is_leaf_version_or_reserved(rax):
    leaf, version, reserved = split_rax(rax)
    assert leaf | version << 16 | reserved == rax


def test_loader_calls_have_bit_63_and_module_calls_do_not():
    assert all(leaf & SEAMLDR_CALL for leaf in SeamldrLeaf)
    assert not any(leaf & SEAMLDR_CALL for leaf in SeamcallLeaf)


def test_op_states_and_the_leaves_they_admit_are_those_of_the_facts(facts):
    table = facts("op_state")
    assert {state.name: int(state) for state in OpState} == table["op_states"]
    for number, row in table["seamcall_allowed"].items():
        assert SeamcallLeaf(int(number)).name == row["leaf"].removeprefix("TDH_")
        for state in OpState:
            assert opstate.leaf_allowed(int(number), state) == bool(row["row"][state])
    for number, row in table["tdcall_allowed"].items():
        assert [state for state in OpState if opstate.guest_leaf_allowed(int(number), state)] == [
            OpState[name] for name in row["allowed"]
        ]
    assert {int(n) for n in table["seamcall_allowed"]} == set(opstate.HOST_MASKS)
    assert {state.name for state in opstate.SERVTD_BIND_OTHER_TD} == set(table["servtd_bind_othertd"])


def test_sets_of_op_states_are_those_of_the_facts(facts):
    flags = facts("op_state")["state_flags"]
    for flag in next(iter(flags.values())):
        assert {state.name for state in getattr(opstate, flag.upper())} == {n for n, row in flags.items() if row[flag]}


def test_a_leaf_without_a_row_runs_in_every_state():
    assert not opstate.leaf_checks_op_state(SeamcallLeaf.MNG_CREATE)
    assert all(opstate.leaf_allowed(SeamcallLeaf.MNG_CREATE, state) for state in OpState)


def test_every_row_names_every_state():
    for rows in (opstate._HOST_ROWS, opstate._GUEST_ROWS):
        assert {len(row) for row in rows.values()} == {len(OpState)}
