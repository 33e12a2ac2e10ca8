"""Every way in which a memory leaf refuses a call, and which refusal comes first when two things are wrong."""

from collections.abc import Callable

import pytest
from refusals import Refusals, check_each, check_order
from scenario import (
    BLOCKED,
    EMPTY_TABLE,
    FREE,
    FRESHLY_BLOCKED,
    LARGE_BLOCKED,
    LARGE_FREE,
    LARGE_PENDING,
    MAPPED,
    NO_TABLE,
    PENDING,
    PENDING_BLOCKED,
    SHARED_BIT,
    SMALL_RUN,
    UNTRACKED_TABLE,
    Row,
    Scenario,
    free_page_rows,
    page_info_rows,
    state_rows,
    tdr_rows,
    walk_rows,
)
from tdx_machine import NULL_PA, PAGE, SOURCE, Leaf, status

from softtdx.abi.status import Operand, Status

RCX, RDX, R8, R9 = Operand.RCX, Operand.RDX, Operand.R8, Operand.R9
STATE = Status.EPT_ENTRY_STATE_INCORRECT
INVALID = Status.OPERAND_INVALID


def page_add(s: Scenario) -> Refusals:
    td = s.building
    good = {"rcx": FREE, "rdx": td.tdr, "r8": s.free_page, "r9": SOURCE}
    return Refusals(
        Leaf.MEM_PAGE_ADD,
        good,
        [
            *tdr_rows(s, exclusive=True),
            *state_rows(s, op_state_lock=False, wrong=(s.td, 2)),
            *page_info_rows(FREE, range(1)),
            Row("no table", Status.EPT_WALK_FAILED, RCX, {"rcx": NO_TABLE}),
            Row("mapped already", STATE, RCX, {"rcx": MAPPED}),
            Row("pending", STATE, RCX, {"rcx": PENDING}),
            Row("source misaligned", INVALID, R9, {"r9": SOURCE | 8}),
            Row("source with a private KeyID", INVALID, R9, {"r9": SOURCE | 40 << 46}),
            Row("source above MAXPA", INVALID, R9, {"r9": SOURCE | 1 << 52}),
            Row("source in SEAMRR", INVALID, R9, {"r9": 0x6000_0000}),
            *free_page_rows(s, "r8"),
        ],
    )


def page_aug(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_AUG,
        {"rcx": FREE + 0x10_0000, "rdx": s.td.tdr, "r8": s.free_page},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(FREE, range(2)),
            *walk_rows(FREE),
            Row("mapped", STATE, RCX, {"rcx": MAPPED}),
            Row("pending", STATE, RCX, {"rcx": PENDING}),
            Row("blocked", STATE, RCX, {"rcx": BLOCKED}),
            *free_page_rows(s, "r8"),
        ],
    )


def page_aug_2m(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_AUG,
        {"rcx": LARGE_FREE | 1, "rdx": s.td.tdr, "r8": s.free_large},
        [
            *page_info_rows(LARGE_FREE | 1, range(2)),
            *walk_rows(LARGE_FREE | 1),
            Row("a table there", STATE, RCX, {"rcx": 1}),
            Row("page not 2 MiB aligned", INVALID, R8, {"r8": s.free_large + PAGE}),
            Row("range lock held", Status.OPERAND_BUSY, R8, held="range:r8"),
            Row("range in use by 4 KiB pages", Status.PAGE_METADATA_INCORRECT, R8, {"r8": s.small_run_page}),
        ],
    )


def sept_add(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_SEPT_ADD,
        {"rcx": LARGE_FREE | 1, "rdx": s.td.tdr, "r8": s.free_page},
        [
            *tdr_rows(s, flag=True),
            *state_rows(s),
            *page_info_rows(LARGE_FREE | 1, range(1, 4)),
            *walk_rows(LARGE_FREE | 1),
            Row("a page there", STATE, RCX, {"rcx": LARGE_PENDING | 1}),
            Row("a blocked table there", STATE, RCX, {"rcx": EMPTY_TABLE | 1}),
            Row("no page given", INVALID, R8, {"r8": NULL_PA}),
            Row("a table there", STATE, RCX, {"rcx": 1}),
            *free_page_rows(s, "r8"),
        ],
    )


def sept_add_1(s: Scenario) -> Refusals:
    good = {"rcx": LARGE_FREE | 1, "rdx": s.td.tdr, "r8": s.free_page, "r9": NULL_PA, "r10": NULL_PA, "r11": NULL_PA}
    return Refusals(
        Leaf.MEM_SEPT_ADD,
        good,
        [
            Row("TDR with a reserved bit", INVALID, RDX, {"rdx": s.td.tdr | 2}),
            *walk_rows(LARGE_FREE | 1),
            Row("a table there", STATE, RCX, {"rcx": 1, "r8": s.free_page}),
            Row("no page given, none there", STATE, RCX, {"r8": NULL_PA}),
            Row("no L2 VM 1", INVALID, R9, {"r9": s.free_page}),
            Row("no L2 VM 2", INVALID, Operand.R10, {"r10": 0}),
            Row("no L2 VM 3", INVALID, Operand.R11, {"r11": s.free_page}),
        ],
        version=1,
    )


def sept_rd(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_SEPT_RD,
        {"rcx": FREE, "rdx": s.td.tdr},
        [
            *tdr_rows(s, flag=True),
            *state_rows(s),
            Row("L2 attributes of a production TD", INVALID, RDX, {"rdx": s.td.tdr | 1}),
            *page_info_rows(FREE, range(4)),
            *walk_rows(FREE),
        ],
    )


def sept_remove(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_SEPT_REMOVE,
        {"rcx": EMPTY_TABLE | 1, "rdx": s.td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(EMPTY_TABLE | 1, range(1, 4)),
            Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept-shared"),
            Row("no table above", Status.EPT_WALK_FAILED, RCX, {"rcx": NO_TABLE | 1}),
            Row("entry locked", Status.OPERAND_BUSY, RCX, held="entry"),
            Row("nothing there", STATE, RCX, {"rcx": LARGE_FREE | 1}),
            Row("a page there", STATE, RCX, {"rcx": LARGE_PENDING | 1}),
            Row(
                "the table's PAMT lock",
                Status.OPERAND_BUSY,
                RCX,
                {"rcx": EMPTY_TABLE | 1},
                f"pa:{s.td.tables[EMPTY_TABLE, 1]:#x}",
            ),
            Row("not blocked", Status.GPA_RANGE_NOT_BLOCKED, RCX, {"rcx": 1}),
            Row("not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": UNTRACKED_TABLE | 1}),
            Row("not empty", Status.EPT_PAGE_NOT_FREE, RCX, {"rcx": SMALL_RUN | 1}),
        ],
    )


def page_remove(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_REMOVE,
        {"rcx": BLOCKED, "rdx": s.td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(BLOCKED, range(3)),
            *walk_rows(BLOCKED),
            Row("nothing there", STATE, RCX, {"rcx": FREE}),
            Row("a table there", STATE, RCX, {"rcx": 1}),
            Row("page lock held", Status.OPERAND_BUSY, RCX, {"rcx": MAPPED}, held=f"pa:{s.mapped_page:#x}"),
            Row("not blocked", Status.GPA_RANGE_NOT_BLOCKED, RCX, {"rcx": MAPPED}),
            Row("not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": FRESHLY_BLOCKED}),
        ],
    )


def page_relocate(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_RELOCATE,
        {"rcx": BLOCKED, "rdx": s.td.tdr, "r8": s.free_page},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(BLOCKED, range(1)),
            *walk_rows(BLOCKED),
            Row("nothing there", STATE, RCX, {"rcx": FREE}),
            Row("the page itself", INVALID, R8, {"rcx": MAPPED, "r8": s.mapped_page}),
            Row("page lock held", Status.OPERAND_BUSY, RCX, {"rcx": MAPPED}, held=f"pa:{s.mapped_page:#x}"),
            Row("not blocked", Status.GPA_RANGE_NOT_BLOCKED, RCX, {"rcx": MAPPED}),
            Row("not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": FRESHLY_BLOCKED}),
            *[row for row in free_page_rows(s, "r8") if row.operands.get("r8") != s.mapped_page],
        ],
    )


def range_block(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_RANGE_BLOCK,
        {"rcx": MAPPED, "rdx": s.td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(MAPPED, range(4)),
            Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept-shared"),
            Row("no table", Status.EPT_WALK_FAILED, RCX, {"rcx": NO_TABLE}),
            Row("entry locked", Status.OPERAND_BUSY, RCX, held="entry"),
            Row("nothing there", STATE, RCX, {"rcx": FREE}),
            Row("blocked already", Status.GPA_RANGE_ALREADY_BLOCKED, RCX, {"rcx": BLOCKED}),
            Row("pending and blocked already", Status.GPA_RANGE_ALREADY_BLOCKED, RCX, {"rcx": PENDING_BLOCKED}),
            Row("a blocked table", Status.GPA_RANGE_ALREADY_BLOCKED, RCX, {"rcx": EMPTY_TABLE | 1}),
        ],
    )


def range_unblock(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_RANGE_UNBLOCK,
        {"rcx": BLOCKED, "rdx": s.td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(BLOCKED, range(4)),
            Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept-shared"),
            Row("no table", Status.EPT_WALK_FAILED, RCX, {"rcx": NO_TABLE}),
            Row("entry locked", Status.OPERAND_BUSY, RCX, held="entry"),
            Row("nothing there", STATE, RCX, {"rcx": FREE}),
            Row("not blocked", STATE, RCX, {"rcx": MAPPED}),
            Row("not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": FRESHLY_BLOCKED}),
            Row("a table not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": UNTRACKED_TABLE | 1}),
        ],
    )


def track(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_TRACK,
        {"rcx": s.td.tdr},
        [
            *tdr_rows(s, "rcx"),
            *state_rows(s, "rcx"),
            Row("epoch lock held", Status.OPERAND_BUSY, Operand.TD_EPOCH, held="epoch"),
        ],
    )


def promote(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_PROMOTE,
        {"rcx": SMALL_RUN | 1, "rdx": s.td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            *page_info_rows(SMALL_RUN | 1, range(1, 3)),
            Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept-shared"),
            Row("no table above", Status.EPT_WALK_FAILED, RCX, {"rcx": NO_TABLE | 1}),
            Row("entry locked", Status.OPERAND_BUSY, RCX, held="entry"),
            Row("nothing there", STATE, RCX, {"rcx": LARGE_FREE | 1}),
            Row("large already", STATE, RCX, {"rcx": LARGE_PENDING | 1}),
            Row(
                "the table's PAMT lock",
                Status.OPERAND_BUSY,
                RCX,
                {"rcx": SMALL_RUN | 1},
                f"pa:{s.td.tables[SMALL_RUN, 1]:#x}",
            ),
            Row("not blocked", Status.GPA_RANGE_NOT_BLOCKED, RCX, {"rcx": 1}),
            Row("not tracked", Status.TLB_TRACKING_NOT_DONE, RCX, {"rcx": UNTRACKED_TABLE | 1}),
            Row("no pages", Status.EPT_INVALID_PROMOTE_CONDITIONS, RCX, {"rcx": EMPTY_TABLE | 1}),
            Row("PAMT entry of the range held", Status.OPERAND_BUSY, RCX, held=f"pa:{s.small_run_page | 1:#x}"),
        ],
    )


def demote(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MEM_PAGE_DEMOTE,
        {"rcx": LARGE_BLOCKED | 1, "rdx": s.td.tdr, "r8": s.free_page},
        [
            *tdr_rows(s, flag=True),
            *state_rows(s),
            *page_info_rows(LARGE_BLOCKED | 1, range(1, 3)),
            *walk_rows(LARGE_BLOCKED | 1),
            Row("nothing there", STATE, RCX, {"rcx": LARGE_FREE | 1}),
            Row("a table there", STATE, RCX, {"rcx": 1}),
            Row("not blocked", Status.GPA_RANGE_NOT_BLOCKED, RCX, {"rcx": LARGE_PENDING | 1}),
            *free_page_rows(s, "r8"),
            Row("PAMT entry of the page held", Status.OPERAND_BUSY, RCX, held=f"pa:{s.large_blocked_page | 1:#x}"),
        ],
    )


def mem_rd(s: Scenario) -> Refusals:
    td = s.debug
    return Refusals(
        Leaf.MEM_RD,
        {"rcx": MAPPED + 8, "rdx": td.tdr},
        [
            *tdr_rows(s),
            *state_rows(s),
            Row("a production TD", Status.TD_NON_DEBUG, 0, {"rdx": s.td.tdr}),
            Row("GPA misaligned", INVALID, RCX, {"rcx": MAPPED + 4}),
            Row("tree lock held", Status.OPERAND_BUSY, Operand.SEPT_TREE, held="sept"),
            Row("shared GPA", INVALID, RCX, {"rcx": SHARED_BIT}),
            Row("GPA above the width", INVALID, RCX, {"rcx": 1 << 48}),
            Row("nothing there", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": FREE}),
            Row("pending", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": PENDING}),
            Row("no table", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": NO_TABLE}),
        ],
    )


def mem_wr(s: Scenario) -> Refusals:
    refusals = mem_rd(s)
    return refusals._replace(leaf=Leaf.MEM_WR, good=refusals.good | {"r8": 0x1122_3344})


def mr_extend(s: Scenario) -> Refusals:
    return Refusals(
        Leaf.MR_EXTEND,
        {"rcx": MAPPED, "rdx": s.building.tdr},
        [
            *tdr_rows(s, exclusive=True),
            *state_rows(s, op_state_lock=False, wrong=(s.td, 2)),
            Row("GPA misaligned", INVALID, RCX, {"rcx": MAPPED + 0x80}),
            Row("shared GPA", INVALID, RCX, {"rcx": SHARED_BIT}),
            Row("nothing there", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": FREE}),
            Row("pending", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": PENDING}),
            Row("no table", Status.EPT_ENTRY_NOT_PRESENT, RCX, {"rcx": NO_TABLE}),
        ],
    )


LEAVES: list[Callable[[Scenario], Refusals]] = [
    page_add, page_aug, page_aug_2m, sept_add, sept_add_1, sept_rd, sept_remove, page_remove, page_relocate,
    range_block, range_unblock, track, promote, demote, mem_rd, mem_wr, mr_extend,
]  # fmt: skip


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario()


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_each_refusal_has_its_status_and_leaves_no_trace(
    scenario: Scenario, leaf: Callable[[Scenario], Refusals]
) -> None:
    check_each(scenario, leaf(scenario))


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.__name__)
def test_of_two_faults_the_first_in_order_is_reported(scenario: Scenario, leaf: Callable[[Scenario], Refusals]) -> None:
    check_order(scenario, leaf(scenario))


@pytest.mark.parametrize("leaf", [Leaf.MEM_SEPT_ADD, Leaf.MEM_SEPT_REMOVE, Leaf.MEM_PAGE_PROMOTE])
@pytest.mark.parametrize("version", [2, 17, 255])
def test_versions_above_1_are_refused_by_the_leaf_itself(scenario: Scenario, leaf: Leaf, version: int) -> None:
    regs = scenario.machine.call(leaf, version=version, rcx=1, rdx=2, r8=3, r9=4)
    assert (status(regs.rax), regs.rcx, regs.rdx) == ((INVALID, Operand.RAX), 0, 0)
    assert regs.r9 == (4 if leaf is Leaf.MEM_SEPT_ADD else NULL_PA)
