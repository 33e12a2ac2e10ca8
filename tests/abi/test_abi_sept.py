import pytest
from hypothesis import given
from hypothesis import strategies as st

from softtdx.abi import sept
from softtdx.abi.leaves import SeamcallLeaf
from softtdx.abi.sept import L2SeptState, PageLevel, SeptState

u64 = st.integers(0, (1 << 64) - 1)
pages = st.integers(0, (1 << 40) - 1).map(lambda page: page << 12)


def test_states_encodings_and_public_numbers_are_those_of_the_facts(facts):
    table = facts("sept_state")
    assert [state.name for state in SeptState] == table["column_order"]
    for state in SeptState:
        row = table["l1_states"][state.name]
        assert (int(state), sept.PUBLIC_STATE[state]) == (int(row["encoding"], 16), row["public_state"])
    for l2_state in L2SeptState:
        row = table["l2_states"][l2_state.name]
        assert (int(l2_state), sept.L2_PUBLIC_STATE[l2_state]) == (int(row["encoding"], 16), row["public_state"])


def test_sets_of_states_are_those_of_the_facts(facts):
    rows = facts("sept_state")["l1_states"]
    for flag in set(rows["FREE"]) - {"encoding", "public_state", "index"}:
        assert {state.name for state in getattr(sept, flag.upper())} == {n for n, row in rows.items() if row[flag]}


def test_leaves_admit_the_states_of_the_facts(facts):
    table = facts("sept_state")
    for key, allowed in (("seamcall_allowed", sept.HOST_ALLOWED), ("tdcall_allowed", sept.GUEST_ALLOWED)):
        assert {int(number) for number in table[key]} == set(allowed)
        for number, row in table[key].items():
            assert {SeptState(state).name for state in allowed[int(number)]} == set(row["allowed"])


def test_state_bits_are_those_of_the_facts(facts):
    masks = facts("structs")["types"]["sept_state_mask_t"]["values"]
    short = {"EXPORTED": "EXP", "PENDING": "PEND"}
    for state in SeptState:
        name = state.name
        for word, abbreviation in short.items():
            name = name.replace(word, abbreviation)
        assert sept.state_bits(state) == masks[f"SEPT_STATE_{name}_MASK"]
    for l2_state in L2SeptState:
        assert sept.l2_state_bits(l2_state) == masks[f"SEPT_STATE_L2_{l2_state.name}_MASK"]


@given(u64, st.sampled_from(SeptState))
def test_a_state_put_into_an_entry_is_found_there_and_nothing_else_changes(entry, state):
    changed = sept.with_state(entry, state)
    assert sept.state_of(changed) is state
    assert changed & ~sept.STATE_MASK == entry & ~sept.STATE_MASK
    assert sept.state_bits(state) & ~sept.STATE_MASK == 0


@given(u64)
def test_the_state_bits_and_the_encoding_say_the_same(entry):
    assert sept.state_bits(sept.state_encoding(entry)) == entry & sept.STATE_MASK


@given(pages, st.sampled_from(sorted(sept.ANY_LEAF)))
def test_a_leaf_entry_gives_back_its_page_and_state(hpa, state):
    entry = sept.make_leaf(hpa, state)
    assert (sept.hpa_of(entry), sept.state_of(entry), sept.is_leaf(entry)) == (hpa, state, True)
    assert entry & sept.MT_MASK == sept.MT_WB
    assert entry & sept.SVE


@given(pages)
def test_a_non_leaf_entry_gives_back_its_page(hpa):
    entry = sept.make_non_leaf(hpa)
    assert (sept.hpa_of(entry), sept.state_of(entry)) == (hpa, SeptState.NL_MAPPED)
    assert not sept.is_leaf(entry)


def test_a_free_entry_lets_nothing_through_and_suppresses_ve():
    assert sept.state_of(sept.FREE_ENTRY) is SeptState.FREE
    assert sept.FREE_ENTRY & sept.RWX == 0
    assert sept.FREE_ENTRY & sept.SVE
    assert sept.l2_state_of(sept.L2_FREE_ENTRY) is L2SeptState.FREE


@pytest.mark.parametrize("state", list(L2SeptState))
@given(permissions=st.integers(0, 7))
def test_permissions_of_an_l2_leaf_do_not_change_its_state(state, permissions):
    entry = sept.l2_state_bits(state)
    if state in (L2SeptState.MAPPED, L2SeptState.BLOCKED):
        entry |= permissions
    elif state is L2SeptState.NL_MAPPED:
        entry |= sept.R
    assert sept.l2_state_of(entry) is state


@given(u64)
def test_any_value_can_be_described(entry):
    assert sept.describe(entry)
    sept.l2_state_of(entry)
    assert sept.arch_info(entry, 0) >> 18 == 0
    assert sept.l2_arch_info(entry, 1, 3) >> 16 == 3


@given(st.integers(0, (1 << 52) - 1), st.sampled_from(PageLevel))
def test_indices_of_all_levels_rebuild_a_gpa(gpa, level):
    rebuilt = sum(sept.entry_index(gpa, lvl) << sept.level_shift(lvl) for lvl in PageLevel)
    assert rebuilt == gpa & ((1 << 57) - 1) & ~0xFFF
    assert sept.level_size(level) == 4096 * 512**level


def test_an_unknown_leaf_admits_no_state():
    assert not sept.host_leaf_allowed(0xFFFF, sept.FREE_ENTRY)
    assert not sept.guest_leaf_allowed(0xFFFF, sept.FREE_ENTRY)
    assert sept.host_leaf_allowed(SeamcallLeaf.MEM_PAGE_ADD, sept.FREE_ENTRY)


def test_entries_a_real_module_showed_have_a_public_state_of_ours(recording):
    checked = 0
    public = set(sept.PUBLIC_STATE.values()) | set(sept.L2_PUBLIC_STATE.values())
    by_public = {number: state for state, number in sept.PUBLIC_STATE.items()}
    for step in recording("04_sept_life"):
        if step.get("name") != "TDH.MEM.SEPT.RD" or step["st"] != "0x0" or "rdx" not in step["out"]:
            continue
        info = int(step["out"]["rdx"], 16)
        assert info >> 8 & 0xFF in public
        state = by_public[info >> 8 & 0xFF]
        entry = int(step["out"].get("rcx", "0x0"), 16)
        assert sept.is_leaf(entry) == (state in sept.ANY_LEAF)
        checked += 1
    assert checked
