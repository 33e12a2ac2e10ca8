"""The life of secure-EPT entries and of the pages behind them, from the host's and from the TD's side."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from guest_thread import GuestThread
from tdx_machine import ATTRIBUTES_DEBUG, MIB2, NULL_PA, PAGE, SPARE_TDMR, Leaf, Machine, Td, status, td_params

from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.sept import HP, TDEL, SeptState
from softtdx.abi.sept import PUBLIC_STATE as PUBLIC
from softtdx.abi.status import Operand, Status
from softtdx.hw.isa import SeamCpu
from softtdx.module.td import LockId

FREE_ENTRY = 1 << 63
NL_ENTRY = 0x407
LEAF_RWX = 1 << 63 | 0x4F7
LEAF_NO_ACCESS = 1 << 63 | 0xF0
ACCEPT = TdcallLeaf.MEM_PAGE_ACCEPT
EPT_VIOLATION = 48


@pytest.fixture
def machine() -> Machine:
    return Machine()


@contextmanager
def entered(machine: Machine, vcpu: int) -> Iterator[GuestThread]:
    """The vCPU inside the TD, on the second processor."""
    machine.call(Leaf.VP_FLUSH, rcx=vcpu)
    guest = GuestThread(machine.lps[1], vcpu)
    try:
        assert guest.exit is None, status(guest.exit.rax)
        yield guest
    finally:
        guest.stop()


def keyed_read(td: Td, page: int, size: int) -> bytes:
    return td.machine.platform.memory.read(page | td.hkid << 46, size, seam=True)


def keyed_write(td: Td, page: int, data: bytes) -> None:
    td.machine.platform.memory.write(page | td.hkid << 46, data, seam=True)


def running(machine: Machine, *, attributes: int | None = None) -> tuple[Td, int]:
    """A TD with tables for GPA 0 and with one at 2 MiB's level for the GPAs above, finalised; and its vCPU."""
    td = Td.create(machine, params=td_params(attributes=attributes) if attributes is not None else None)
    td.add_path(0)
    td.add_page(0, b"first")
    return td, td.finalize()


# --- tables
def test_tables_grow_from_the_root_down(machine: Machine) -> None:
    td = Td.create(machine)
    for level in (3, 2, 1):
        assert td.entry(0, level) == (FREE_ENTRY, PUBLIC[SeptState.FREE], level)
        td.add_table(0, level)
        assert td.entry(0, level) == (NL_ENTRY, PUBLIC[SeptState.NL_MAPPED], level)
    assert td.entry(0) == (FREE_ENTRY, PUBLIC[SeptState.FREE], 0)


def test_a_walk_that_ends_early_shows_the_entry_that_ended_it(machine: Machine) -> None:
    td, _ = running(machine)
    page = td.aug(2 * MIB2, 1)
    regs = machine.fails(Leaf.MEM_SEPT_RD, Status.EPT_WALK_FAILED, Operand.RCX, rcx=2 * MIB2 + PAGE, rdx=td.tdr)
    assert (regs.rcx, regs.rdx) == (page | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING] << 8 | 1)
    td.block(0, 2)
    regs = machine.fails(
        Leaf.MEM_PAGE_AUG, Status.EPT_WALK_FAILED, Operand.RCX, rcx=PAGE, rdx=td.tdr, r8=machine.page()
    )
    assert (regs.rcx, regs.rdx) == (0, PUBLIC[SeptState.NL_BLOCKED] << 8 | 2)


def test_a_tree_of_five_levels_has_a_wider_gpa_space(machine: Machine) -> None:
    td = Td.create(machine, params=td_params(gpaw=1, levels=5))
    high = 1 << 50
    for gpa in (0, high):
        td.add_path(gpa, top=4)
        page = td.add_page(gpa, b"wide")
        assert td.entry(gpa) == (page | LEAF_RWX, PUBLIC[SeptState.MAPPED], 0)
    machine.fails(Leaf.MEM_SEPT_RD, Status.OPERAND_INVALID, Operand.RCX, rcx=1 << 51, rdx=td.tdr)


def test_version_1_of_sept_add_says_which_pages_it_used(machine: Machine) -> None:
    td = Td.create(machine)
    page = machine.page()
    none = {"r9": NULL_PA, "r10": NULL_PA, "r11": NULL_PA}
    assert machine.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=3, rdx=td.tdr, r8=page, **none).r8 == NULL_PA
    spare = machine.page()
    regs = machine.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=3, rdx=td.tdr | 1, r8=spare, **none)
    assert (regs.r8, regs.r9) == (spare | 1 << 63, NULL_PA)
    assert machine.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=3, rdx=td.tdr, r8=NULL_PA, **none).r8 == NULL_PA
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=spare).rcx == 0


def test_an_empty_table_can_be_taken_out_and_used_for_something_else(machine: Machine) -> None:
    td, _ = running(machine)
    table = td.add_table(2 * MIB2, 1)
    td.block(2 * MIB2, 1)
    td.track()
    assert machine.ok(Leaf.MEM_SEPT_REMOVE, rcx=2 * MIB2 | 1, rdx=td.tdr).rcx == table
    assert td.entry(2 * MIB2, 1) == (FREE_ENTRY, 0, 1)
    machine.ok(Leaf.MEM_PAGE_AUG, rcx=PAGE, rdx=td.tdr, r8=table)


# --- pages
def test_each_state_leads_where_the_table_of_states_says(machine: Machine) -> None:
    td, vcpu = running(machine)
    state = {value: name for name, value in PUBLIC.items()}
    page = td.aug(PAGE)
    assert state[td.entry(PAGE)[1]] is SeptState.PENDING
    td.block(PAGE)
    assert td.entry(PAGE) == (page | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING_BLOCKED], 0)
    td.track()
    machine.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=PAGE, rdx=td.tdr)
    assert state[td.entry(PAGE)[1]] is SeptState.PENDING
    with entered(machine, vcpu) as guest:
        regs = guest.tdcall(ACCEPT, rcx=PAGE)
        assert regs is not None
        assert regs.rax == 0
    assert td.entry(PAGE) == (page | LEAF_RWX, PUBLIC[SeptState.MAPPED], 0)
    td.block(PAGE)
    assert td.entry(PAGE) == (page | LEAF_NO_ACCESS, PUBLIC[SeptState.BLOCKED], 0)
    td.track()
    machine.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=PAGE, rdx=td.tdr)
    assert td.entry(PAGE) == (page | LEAF_RWX, PUBLIC[SeptState.MAPPED], 0)
    td.block(PAGE)
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=td.tdr).rcx == page
    assert td.entry(PAGE) == (FREE_ENTRY, PUBLIC[SeptState.FREE], 0)


def test_before_the_td_can_run_nothing_needs_to_be_blocked(machine: Machine) -> None:
    td = Td.create(machine)
    td.add_path(0)
    page = td.add_page(0, b"not wanted after all")
    assert machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=0, rdx=td.tdr).rcx == page
    assert machine.ok(Leaf.MEM_SEPT_REMOVE, rcx=1, rdx=td.tdr).rcx == td.tables[0, 1]


def test_a_relocated_page_keeps_what_the_td_wrote(machine: Machine) -> None:
    td, _ = running(machine)
    page = td.aug(PAGE)
    td.block(0)
    td.block(PAGE)
    td.track()
    old = machine.call(Leaf.MEM_SEPT_RD, rcx=0, rdx=td.tdr).rcx & 0x000F_FFFF_FFFF_F000
    keyed_write(td, old, b"precious")
    new, new_pending = machine.page(), machine.page()
    assert machine.ok(Leaf.MEM_PAGE_RELOCATE, rcx=0, rdx=td.tdr, r8=new).rcx == old
    assert keyed_read(td, new, 8) == b"precious"
    assert td.entry(0) == (new | LEAF_RWX, PUBLIC[SeptState.MAPPED], 0)
    assert machine.ok(Leaf.MEM_PAGE_RELOCATE, rcx=PAGE, rdx=td.tdr, r8=new_pending).rcx == page
    assert td.entry(PAGE) == (new_pending | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING], 0)


def test_a_page_that_wanders_from_td_to_td_carries_nothing_along(machine: Machine) -> None:
    first, _ = running(machine)
    page = machine.page()
    machine.host_write(page, b"host's own " * 300)
    machine.ok(Leaf.MEM_PAGE_AUG, rcx=PAGE, rdx=first.tdr, r8=page)
    second, vcpu = running(machine)
    machine.fails(Leaf.MEM_PAGE_AUG, Status.PAGE_METADATA_INCORRECT, Operand.R8, rcx=PAGE, rdx=second.tdr, r8=page)
    machine.platform.memory.write(page | first.hkid << 46, b"first's secret".ljust(PAGE), seam=True)
    first.block(PAGE)
    first.track()
    machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=first.tdr)
    assert b"secret" not in machine.lps[0].read(page, PAGE)
    machine.ok(Leaf.MEM_PAGE_AUG, rcx=PAGE, rdx=second.tdr, r8=page)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=PAGE).rax == 0
    assert keyed_read(second, page, PAGE) == bytes(PAGE)


def test_a_large_page_splits_and_merges_without_losing_a_byte(machine: Machine) -> None:
    td, vcpu = running(machine)
    page = td.aug(2 * MIB2, 1)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1).rax == 0
    assert keyed_read(td, page, MIB2) == bytes(MIB2)
    for part in (0, 77, 511):
        keyed_write(td, page + part * PAGE, b"part %d" % part)
    td.block(2 * MIB2, 1)
    td.track()
    table = machine.page()
    machine.ok(Leaf.MEM_PAGE_DEMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=table)
    for part in (0, 77, 511):
        assert td.entry(2 * MIB2 + part * PAGE) == (page + part * PAGE | LEAF_RWX, PUBLIC[SeptState.MAPPED], 0)
        assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page + part * PAGE).r8 == 0
    td.block(2 * MIB2, 1)
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_PROMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr).rcx == table
    assert td.entry(2 * MIB2, 1) == (page | LEAF_RWX, PUBLIC[SeptState.MAPPED], 1)
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page + 77 * PAGE).r8 == 1
    assert [keyed_read(td, page + part * PAGE, 6) for part in (0, 77, 511)] == [b"part 0", b"part 7", b"part 5"]


@pytest.mark.parametrize("odd", [0, 1, 300, 511])
def test_only_512_like_and_adjacent_pages_merge(machine: Machine, odd: int) -> None:
    td, _ = running(machine)
    td.add_table(2 * MIB2, 1)
    base, elsewhere = machine.large(), machine.large()
    for part in range(512):
        page = (elsewhere if part == odd else base) + part * PAGE
        machine.ok(Leaf.MEM_PAGE_AUG, rcx=2 * MIB2 + part * PAGE, rdx=td.tdr, r8=page)
    td.block(2 * MIB2, 1)
    td.track()
    want = Status.EPT_INVALID_PROMOTE_CONDITIONS
    regs = machine.fails(Leaf.MEM_PAGE_PROMOTE, want, Operand.RCX, rcx=2 * MIB2 | 1, rdx=td.tdr)
    assert (regs.rcx, regs.rdx) == (0, PUBLIC[SeptState.NL_BLOCKED] << 8 | 1)


def test_five_hundred_and_twelve_large_pages_merge_into_a_gib_and_split_again() -> None:
    machine = Machine(spare_gib=True)
    td, _ = running(machine)
    gpa = 1 << 30
    td.add_table(gpa, 2)
    for part in range(512):
        page = SPARE_TDMR + part * MIB2
        machine.ok(Leaf.MEM_PAGE_AUG, rcx=gpa + part * MIB2 | 1, rdx=td.tdr, r8=page)
    td.block(gpa, 2)
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_PROMOTE, rcx=gpa | 2, rdx=td.tdr).rcx == td.tables[gpa, 2]
    assert td.entry(gpa, 2) == (SPARE_TDMR | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING], 2)
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=SPARE_TDMR + 5 * MIB2 + PAGE).r8 == 2
    td.block(gpa, 2)
    td.track()
    table = machine.page()
    machine.ok(Leaf.MEM_PAGE_DEMOTE, rcx=gpa | 2, rdx=td.tdr, r8=table)
    want = SPARE_TDMR + 77 * MIB2
    assert td.entry(gpa + 77 * MIB2, 1) == (want | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING], 1)
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=want).r8 == 1
    td.block(gpa, 2)
    td.track()
    machine.ok(Leaf.MEM_PAGE_PROMOTE, rcx=gpa | 2, rdx=td.tdr)
    td.block(gpa, 2)
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=gpa | 2, rdx=td.tdr).rcx == SPARE_TDMR
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=SPARE_TDMR).rcx == 0


# --- debug TDs
def test_the_host_reads_and_writes_the_memory_of_a_debug_td(machine: Machine) -> None:
    td, vcpu = running(machine, attributes=ATTRIBUTES_DEBUG)
    large = td.aug(2 * MIB2, 1)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1).rax == 0
    assert machine.ok(Leaf.MEM_WR, rcx=2 * MIB2 + 0x12_3450, rdx=td.tdr, r8=0x0102_0304_0506_0708).r8 == 0
    assert machine.ok(Leaf.MEM_RD, rcx=2 * MIB2 + 0x12_3450, rdx=td.tdr).r8 == 0x0102_0304_0506_0708
    assert keyed_read(td, large + 0x12_3450, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    assert machine.ok(Leaf.MEM_RD, rcx=0, rdx=td.tdr).r8.to_bytes(8, "little")[:5] == b"first"
    regs = machine.ok(Leaf.MEM_SEPT_RD, rcx=0, rdx=td.tdr | 1, r8=5)
    assert regs.r8 == 0


# --- what the TD sees
def test_accept_answers_or_leaves_to_the_host_by_what_it_meets(machine: Machine) -> None:
    td, vcpu = running(machine)
    td.aug(PAGE)
    td.aug(2 * MIB2, 1)
    with entered(machine, vcpu) as guest:
        for info, want, detail in (
            (0, Status.PAGE_ALREADY_ACCEPTED, 0),
            (1, Status.PAGE_SIZE_MISMATCH, 1),
            (2, Status.OPERAND_INVALID, Operand.RCX),
            (PAGE | 1, Status.OPERAND_INVALID, Operand.RCX),
            (PAGE | 8, Status.OPERAND_INVALID, Operand.RCX),
            (1 << 47, Status.OPERAND_INVALID, Operand.RCX),
            (1 << 52, Status.OPERAND_INVALID, Operand.RCX),
            (PAGE, Status.SUCCESS, 0),
            (PAGE, Status.PAGE_ALREADY_ACCEPTED, 0),
            (2 * MIB2 | 1, Status.SUCCESS, 0),
            (2 * MIB2 + PAGE, Status.PAGE_ALREADY_ACCEPTED, 1),
        ):
            assert status(guest.tdcall(ACCEPT, rcx=info).rax) == (want, detail), hex(info)


@pytest.mark.parametrize(
    ("gpa", "level", "met"),
    [
        (3 * PAGE, 0, 0),  # free
        (4 * PAGE, 0, PUBLIC[SeptState.PENDING_BLOCKED] << 6 | 1 << 14),
        (2 * MIB2 + PAGE, 0, 1 << 3 | PUBLIC[SeptState.PENDING] << 6 | 1 << 14),  # pending, but of 2 MiB
        (4 * MIB2, 0, 1 << 3),  # no table
        (4 * MIB2, 1, 1 | 1 << 3),  # free at that level
        (1 << 39, 1, 1 | 3 << 3),
    ],
)
def test_accept_of_a_page_that_is_not_there_is_an_ept_violation(
    machine: Machine, gpa: int, level: int, met: int
) -> None:
    td, vcpu = running(machine)
    td.aug(4 * PAGE)
    td.block(4 * PAGE)
    td.aug(2 * MIB2, 1)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=gpa | level) is None
        assert guest.exit is not None
        assert (guest.exit.rax, guest.exit.rcx, guest.exit.rdx, guest.exit.r8) == (EPT_VIOLATION, 2, met << 32 | 1, gpa)


def test_an_interrupt_stops_the_zeroing_of_a_large_page_and_it_goes_on_later(machine: Machine) -> None:
    td, vcpu = running(machine)
    page = td.aug(2 * MIB2, 1)
    lp = machine.lps[1]
    with entered(machine, vcpu) as guest:
        lp.interrupt_pending = True
        regs = guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1)
        assert regs is not None
        assert regs.rax == ACCEPT, "the instruction has not completed"
        assert td.entry(2 * MIB2, 1) == (page + PAGE | LEAF_NO_ACCESS, PUBLIC[SeptState.PENDING], 1)
        regs = guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1)
        assert td.entry(2 * MIB2, 1)[0] == page + 2 * PAGE | LEAF_NO_ACCESS
        lp.interrupt_pending = False
        assert guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1).rax == 0
    assert td.entry(2 * MIB2, 1) == (page | LEAF_RWX, PUBLIC[SeptState.MAPPED], 1)
    assert keyed_read(td, page, MIB2) == bytes(MIB2)


def test_blocking_forgets_how_far_an_interrupted_accept_came(machine: Machine) -> None:
    td, vcpu = running(machine)
    page = td.aug(2 * MIB2, 1)
    with entered(machine, vcpu) as guest:
        machine.lps[1].interrupt_pending = True
        guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1)
        machine.lps[1].interrupt_pending = False
    for leaf in (Leaf.MEM_PAGE_REMOVE, Leaf.MEM_PAGE_DEMOTE):
        refused = machine.call(leaf, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=machine.page())
        assert status(refused.rax) == (Status.GPA_RANGE_NOT_BLOCKED, Operand.RCX)
        assert refused.rcx == page | LEAF_NO_ACCESS, "these two do not show how far it came"
    assert td.entry(2 * MIB2, 1)[0] == page + PAGE | LEAF_NO_ACCESS
    td.block(2 * MIB2, 1)
    assert td.entry(2 * MIB2, 1)[0] == page | LEAF_NO_ACCESS
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=2 * MIB2 | 1, rdx=td.tdr).rcx == page


def test_a_td_reads_how_its_pages_are_mapped(machine: Machine) -> None:
    td, vcpu = running(machine)
    td.aug(PAGE)
    td.aug(2 * MIB2, 1)
    read, write = TdcallLeaf.MEM_PAGE_ATTR_RD, TdcallLeaf.MEM_PAGE_ATTR_WR
    with entered(machine, vcpu) as guest:
        for gpa, page_info in ((0x123, 0), (PAGE + 8, PAGE | 1 << 62), (2 * MIB2 + 0x5432, 2 * MIB2 | 1 | 1 << 62)):
            regs = guest.tdcall(read, rcx=gpa, rdx=99)
            assert (regs.rax, regs.rcx, regs.rdx) == (0, page_info, 0)
        regs = guest.tdcall(write, rcx=PAGE)
        assert (regs.rax, regs.rcx, regs.rdx) == (0, PAGE | 1 << 62, 0)
        regs = guest.tdcall(read, rcx=1 << 47, rdx=5)
        assert (status(regs.rax), regs.rcx, regs.rdx) == ((Status.OPERAND_INVALID, Operand.RCX), 0, 0)
        for rcx, rdx, r8, operand in ((0, 1, 0, Operand.RDX), (0, 0, 1, Operand.R8), (0, 1 << 63, 1, Operand.R8)):
            regs = guest.tdcall(write, rcx=rcx, rdx=rdx, r8=r8)
            assert (status(regs.rax), regs.rcx, regs.rdx) == ((Status.OPERAND_INVALID, operand), 0, 0)
        regs = guest.tdcall(write, rcx=1)
        assert status(regs.rax) == (Status.PAGE_SIZE_MISMATCH, 1)
        assert guest.tdcall(read, rcx=8 * PAGE, rdx=7) is None
        assert guest.exit is not None
        assert (guest.exit.rax, guest.exit.rcx, guest.exit.rdx, guest.exit.r8) == (EPT_VIOLATION, 0, 0, 8 * PAGE)


def test_what_was_blocked_stays_out_of_reach_until_the_vcpu_has_left(machine: Machine) -> None:
    td, vcpu = running(machine)
    td.aug(PAGE)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=PAGE).rax == 0
        td.block(PAGE)
        not_yet = Status.TLB_TRACKING_NOT_DONE, Operand.RCX
        assert status(machine.call(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=td.tdr).rax) == not_yet
        td.track()
        assert status(machine.call(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=td.tdr).rax) == not_yet
        machine.fails(Leaf.MEM_TRACK, Status.PREVIOUS_TLB_EPOCH_BUSY, rcx=td.tdr)
    machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=td.tdr)
    td.track()


# --- host priority
def test_a_guest_waits_its_turn_while_the_host_wants_an_entry(machine: Machine) -> None:
    td, vcpu = running(machine)
    td.aug(PAGE)
    at = (td.tables[0, 1] | td.hkid << 46) + 8
    memory = machine.platform.memory

    def change(set_bits: int, clear: int) -> int:
        entry = int.from_bytes(memory.read(at, 8, seam=True), "little") & ~clear | set_bits
        memory.write(at, entry.to_bytes(8, "little"), seam=True)
        return entry

    with entered(machine, vcpu) as guest:
        change(TDEL, 0)  # another vCPU is at work on the entry
        assert status(guest.tdcall(ACCEPT, rcx=PAGE).rax) == (Status.OPERAND_BUSY, Operand.RCX)
        machine.fails(Leaf.MEM_RANGE_BLOCK, Status.OPERAND_BUSY, Operand.RCX, rcx=PAGE, rdx=td.tdr)
        assert change(0, TDEL) & HP, "the host left its mark"
        assert status(guest.tdcall(ACCEPT, rcx=PAGE).rax) == (Status.OPERAND_BUSY, Operand.RCX)
        assert td.entry(PAGE)[1] == PUBLIC[SeptState.PENDING]
        assert not change(0, 0) & HP, "the host had its turn"
        assert guest.tdcall(ACCEPT, rcx=PAGE).rax == 0


def test_long_leaves_let_a_pending_interrupt_through_and_start_over(machine: Machine) -> None:
    td, _ = running(machine)
    page = td.aug(2 * MIB2, 1)
    td.block(2 * MIB2, 1)
    td.track()
    table = machine.page()
    lp = machine.lps[0]
    lp.interrupt_pending = True
    regs = machine.call(Leaf.MEM_PAGE_DEMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=table)
    assert (status(regs.rax)[0], regs.rcx, regs.rdx) == (Status.INTERRUPTED_RESTARTABLE, 2 * MIB2 | 1, td.tdr)
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=table).rcx == 0
    lp.interrupt_pending = False
    machine.ok(Leaf.MEM_PAGE_DEMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=table)
    td.block(2 * MIB2, 1)
    td.track()
    lp.interrupt_pending = True
    regs = machine.call(Leaf.MEM_PAGE_PROMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr)
    assert (status(regs.rax)[0], regs.rcx, regs.rdx) == (Status.INTERRUPTED_RESTARTABLE, 2 * MIB2 | 1, td.tdr)
    lp.interrupt_pending = False
    assert machine.ok(Leaf.MEM_PAGE_PROMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr).rcx == table
    assert td.entry(2 * MIB2, 1)[0] == page | LEAF_NO_ACCESS


def test_a_long_leaf_makes_way_for_a_processor_that_waits_for_the_tree(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    td, _ = running(machine)
    td.aug(2 * MIB2, 1)
    td.block(2 * MIB2, 1)
    td.track()
    table = machine.page()
    locks = machine.module.g.locks

    def another_processor_comes_along(_: SeamCpu) -> bool:
        assert locks.acquire(td.tdr | LockId.SEPT, True) == Status.OPERAND_BUSY
        return False

    monkeypatch.setattr(SeamCpu, "interrupt_pending", another_processor_comes_along)
    regs = machine.call(Leaf.MEM_PAGE_DEMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=table)
    assert (status(regs.rax)[0], regs.rcx, regs.rdx) == (Status.INTERRUPTED_BUSY, 2 * MIB2 | 1, td.tdr)
    monkeypatch.undo()
    machine.ok(Leaf.MEM_PAGE_DEMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=table)


def test_two_processors_on_one_td_get_busy_at_worst(machine: Machine) -> None:
    td, _ = running(machine)
    pages = [machine.page() for _ in range(64)]
    odd: list[Status] = []

    def hammer(lp: int) -> None:
        for turn in range(150):
            number = (turn * 7 + lp * 13) % 32
            gpa, page = (number + 1) * PAGE, pages[number + 32 * lp]
            for leaf, operands in (
                (Leaf.MEM_PAGE_AUG, {"rcx": gpa, "r8": page}),
                (Leaf.MEM_RANGE_BLOCK, {"rcx": gpa}),
                (Leaf.MEM_TRACK, {}),
                (Leaf.MEM_PAGE_REMOVE, {"rcx": gpa}),
            ):
                where = {"rdx": td.tdr} if leaf is not Leaf.MEM_TRACK else {"rcx": td.tdr}
                got = status(machine.call(leaf, lp, **operands, **where).rax)[0]
                if got not in EXPECTED:
                    odd.append(got)

    threads = [threading.Thread(target=hammer, args=(lp,)) for lp in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not odd
    assert all(value & ~2 == 0 for value in machine.module.g.locks.state.values())
    owned = {page for page in pages if machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page).rcx}
    mapped = [td.entry((number + 1) * PAGE) for number in range(32)]
    assert {entry & 0x000F_FFFF_FFFF_F000 for entry, public, _ in mapped if public} == owned


EXPECTED = {
    Status.SUCCESS,
    Status.OPERAND_BUSY,
    Status.EPT_ENTRY_STATE_INCORRECT,
    Status.GPA_RANGE_ALREADY_BLOCKED,
    Status.GPA_RANGE_NOT_BLOCKED,
    Status.TLB_TRACKING_NOT_DONE,
    Status.PAGE_METADATA_INCORRECT,
}


# --- dynamic PAMT
def test_with_dynamic_pamt_small_pages_need_pamt_pages_first() -> None:
    machine = Machine(dynamic_pamt=True)
    pool = 0x0800_0000
    for base in (0x100_0000, pool):
        machine.ok(Leaf.PHYMEM_PAMT_ADD, rcx=base | 1, rdx=base + 0x20_0000, r8=base + 0x20_1000)
    td, vcpu = running(machine)
    bare = machine.large()
    missing = Status.MISSING_PAMT_PAGE_PAIR, Operand.R8
    assert status(machine.call(Leaf.MEM_PAGE_AUG, rcx=PAGE, rdx=td.tdr, r8=bare).rax) == missing
    machine.ok(Leaf.MEM_PAGE_AUG, rcx=PAGE, rdx=td.tdr, r8=pool)
    td.block(PAGE)
    td.track()
    assert machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=td.tdr).rcx == pool | 1 << 62, "the last page of the range"
    machine.ok(Leaf.MEM_PAGE_AUG, rcx=2 * MIB2 | 1, rdx=td.tdr, r8=bare)
    td.block(2 * MIB2, 1)
    td.track()
    pair = {"r12": 0x30_0000, "r13": 0x30_1000}
    demote = {"rcx": 2 * MIB2 | 1, "rdx": td.tdr, "r8": machine.page()}
    for change, want, operand in (
        ({"r12": 0x30_0800}, Status.OPERAND_INVALID, Operand.R12),
        ({"r13": 0x30_1001}, Status.OPERAND_INVALID, Operand.R13),
        ({"r12": 0x30_0800, "r13": 1}, Status.OPERAND_INVALID, Operand.R12),
        ({"r12": 0x4200_0000}, Status.OPERAND_ADDR_RANGE_ERROR, Operand.R12),
        ({"r13": 0x4200_0000}, Status.OPERAND_ADDR_RANGE_ERROR, Operand.R13),
        ({"r12": td.tdcx[0]}, Status.PAGE_NOT_FREE, Operand.R12),
        ({"r13": td.tdcx[0]}, Status.PAGE_NOT_FREE, Operand.R13),
        ({"r13": 0x30_0000}, Status.PAGE_NOT_FREE, Operand.R13),
        ({"r12": 0x100_0000 + 0x20_0000}, Status.PAGE_NOT_FREE, Operand.R12),
    ):
        assert status(machine.call(Leaf.MEM_PAGE_DEMOTE, **demote | pair | change).rax) == (want, operand), change
    machine.ok(Leaf.MEM_PAGE_DEMOTE, **demote, **pair)
    assert machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=bare + 5 * PAGE).rcx == 3
    td.block(2 * MIB2, 1)
    td.track()
    regs = machine.ok(Leaf.MEM_PAGE_PROMOTE, rcx=2 * MIB2 | 1, rdx=td.tdr)
    assert (regs.rcx & ~(1 << 62), regs.r12, regs.r13) == (demote["r8"], 0x30_0000, 0x30_1000)
    machine.ok(Leaf.PHYMEM_PAMT_ADD, rcx=0x2000_0000 | 1, rdx=regs.r12, r8=regs.r13)
    with entered(machine, vcpu) as guest:
        assert guest.tdcall(ACCEPT, rcx=2 * MIB2 | 1).rax == 0
