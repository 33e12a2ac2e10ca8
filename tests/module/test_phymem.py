"""TDH.PHYMEM.*: what the PAMT says of a page, reclaiming in teardown, cache write-back, dynamic PAMT."""

import pytest
from tdx_machine import GIB, HOST, MIB2, NULL_PA, PAGE, Leaf, Machine, Td

from softtdx.abi.status import Operand, Status
from softtdx.module.pamt import PageType

INVALID = Status.OPERAND_INVALID
RANGE = Status.OPERAND_ADDR_RANGE_ERROR
METADATA = Status.PAGE_METADATA_INCORRECT
KEYED = 33 << 46


def metadata(machine, page: int) -> tuple[PageType, int, int]:
    """(type, owner, size) by PHYMEM.PAGE.RDMD."""
    regs = machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page)
    return PageType(regs.rcx), regs.rdx, regs.r8


def teardown(td: Td) -> None:
    """Take away the TD's key. Its pages stay."""
    m = td.machine
    for tdvpr in td.vcpu_pages[::6]:
        m.call(Leaf.VP_FLUSH, rcx=tdvpr)
    m.ok(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
    m.ok(Leaf.PHYMEM_CACHE_WB)
    m.ok(Leaf.MNG_KEY_FREEID, rcx=td.tdr)


# --- PAGE.RDMD
def test_rdmd_tells_what_each_page_of_a_td_is(machine):
    td = Td.create(machine)
    td.add_path(0)
    page = td.add_page(0)
    tdvpr = td.add_vcpu()
    large = td.aug(2 * MIB2, 1)
    assert metadata(machine, td.tdr) == (PageType.TDR, 0, 0)
    assert metadata(machine, td.tdcx[5]) == (PageType.TDCX, td.tdr, 0)
    assert metadata(machine, tdvpr) == (PageType.TDVPR, td.tdr, 0)
    assert metadata(machine, td.vcpu_pages[1]) == (PageType.TDCX, td.tdr, 0)
    assert metadata(machine, td.tables[0, 1]) == (PageType.EPT, td.tdr, 0)
    assert metadata(machine, page) == (PageType.REG, td.tdr, 0)
    assert metadata(machine, large) == metadata(machine, large + 5 * PAGE) == (PageType.REG, td.tdr, 1)
    assert metadata(machine, 0) == (PageType.RSVD, 0, 0)
    assert metadata(machine, machine.page()) == (PageType.NDA, 0, 0)


@pytest.mark.parametrize(
    ("rcx", "want"),
    [
        (0x100_0800, INVALID),
        (0x100_0001, INVALID),
        (0x100_0000 | 1 << 52, INVALID),
        (NULL_PA, INVALID),
        (HOST, RANGE),
        (2 * GIB, RANGE),
    ],
)
def test_rdmd_refuses_what_is_no_page_of_a_td_memory_region(machine, rcx, want):
    regs = machine.fails(Leaf.PHYMEM_PAGE_RDMD, want, Operand.RCX, rcx=rcx, rdx=7, r8=7, r9=7, r10=7, r11=7)
    assert (regs.rcx, regs.rdx, regs.r8, regs.r9, regs.r10, regs.r11) == (0,) * 6


def test_rdmd_loses_address_bits_above_39_as_the_real_module_does(machine):
    assert metadata(machine, 0x100_0000 | 1 << 46) == metadata(machine, 0x100_0000)


def test_rdmd_keeps_the_last_owner_of_a_page_that_is_free_again(machine):
    td = Td.create(machine)
    teardown(td)
    machine.ok(Leaf.PHYMEM_PAGE_RECLAIM, rcx=td.tdcx[0])
    assert metadata(machine, td.tdcx[0]) == (PageType.NDA, td.tdr, 0)


def test_a_page_whose_entry_is_locked_is_busy(machine):
    page = machine.page()
    machine.module.g.locks.acquire(page, True)
    for leaf in (Leaf.PHYMEM_PAGE_RDMD, Leaf.PHYMEM_PAGE_RECLAIM, Leaf.PHYMEM_PAGE_WBINVD):
        machine.fails(leaf, Status.OPERAND_BUSY, Operand.RCX, rcx=page)


# --- PAGE.RECLAIM
def test_a_page_is_reclaimed_only_in_teardown_and_the_tdr_last(machine):
    td = Td.create(machine)
    td.add_path(0)
    page = td.add_page(0)
    machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, Status.LIFECYCLE_STATE_INCORRECT, rcx=page)
    machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, Status.LIFECYCLE_STATE_INCORRECT, rcx=td.tdr)
    teardown(td)
    pages = [page, *td.tables.values(), *td.tdcx]
    while pages:
        machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, Status.TD_ASSOCIATED_PAGES_EXIST, rcx=td.tdr)
        regs = machine.ok(Leaf.PHYMEM_PAGE_RECLAIM, rcx=pages.pop())
        assert (regs.rdx, regs.r8) == (td.tdr, 0)
    assert machine.ok(Leaf.PHYMEM_PAGE_RECLAIM, rcx=td.tdr).rcx == PageType.TDR
    assert metadata(machine, td.tdr)[0] is PageType.NDA


def test_a_large_page_is_reclaimed_as_a_whole(machine):
    td = Td.create(machine)
    td.add_path(0)
    large = td.aug(2 * MIB2, 1)
    teardown(td)
    machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, INVALID, Operand.RCX, rcx=large + PAGE)
    assert machine.ok(Leaf.PHYMEM_PAGE_RECLAIM, rcx=large).r8 == 1
    assert metadata(machine, large)[0] is PageType.NDA


@pytest.mark.parametrize(
    ("rcx", "want"),
    [
        (0x100_0800, INVALID),
        (0x100_0000 | KEYED, INVALID),
        (0x100_0000 | 1 << 52, INVALID),
        (HOST, RANGE),
        (0x1000, METADATA),
        (0x3000_0000, METADATA),
    ],
)
def test_reclaim_refuses_what_belongs_to_no_td(machine, rcx, want):
    machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, want, Operand.RCX, rcx=rcx)


def test_reclaim_needs_the_tdr(machine):
    td = Td.create(machine)
    teardown(td)
    machine.module.g.locks.acquire(td.tdr, True)
    machine.fails(Leaf.PHYMEM_PAGE_RECLAIM, Status.OPERAND_BUSY, Operand.TDR, rcx=td.tdcx[0])


# --- PAGE.WBINVD
def test_only_free_pages_are_written_back_one_by_one_and_under_any_keyid(machine):
    td = Td.create(machine)
    for keyid in (0, 31, 33, 63):
        machine.ok(Leaf.PHYMEM_PAGE_WBINVD, rcx=machine.page() | keyid << 46)
    machine.fails(Leaf.PHYMEM_PAGE_WBINVD, METADATA, Operand.RCX, rcx=td.tdr)
    machine.fails(Leaf.PHYMEM_PAGE_WBINVD, METADATA, Operand.RCX, rcx=0x1000)
    machine.fails(Leaf.PHYMEM_PAGE_WBINVD, RANGE, Operand.RCX, rcx=HOST)
    machine.fails(Leaf.PHYMEM_PAGE_WBINVD, INVALID, Operand.RCX, rcx=0x100_0001)


# --- CACHE.WB
@pytest.mark.parametrize("rcx", [2, 3, 1 << 63, NULL_PA])
def test_cache_wb_starts_or_resumes(machine, rcx):
    machine.fails(Leaf.PHYMEM_CACHE_WB, INVALID, Operand.RCX, rcx=rcx)


def test_cache_wb_has_nothing_to_do_before_a_td_is_flushed(machine):
    Td.create(machine)
    machine.fails(Leaf.PHYMEM_CACHE_WB, Status.NO_HKID_READY_TO_WBCACHE)
    machine.fails(Leaf.PHYMEM_CACHE_WB, Status.WBCACHE_RESUME_ERROR, rcx=1)


def test_cache_wb_stops_for_an_interrupt_and_is_resumed(machine):
    td = Td.create(machine)
    machine.ok(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
    lp = machine.lps[0]
    stops = 0
    lp.interrupt_pending = True
    regs = machine.call(Leaf.PHYMEM_CACHE_WB)
    while regs.rax:
        assert Status(regs.rax) is Status.INTERRUPTED_RESUMABLE
        machine.fails(Leaf.MNG_KEY_FREEID, Status.WBCACHE_NOT_COMPLETE, rcx=td.tdr)
        stops += 1
        regs = machine.call(Leaf.PHYMEM_CACHE_WB, rcx=1)
    lp.interrupt_pending = False
    assert stops == lp.rdmsr(0x98) - 1
    machine.ok(Leaf.MNG_KEY_FREEID, rcx=td.tdr)
    machine.fails(Leaf.PHYMEM_CACHE_WB, Status.WBCACHE_RESUME_ERROR, rcx=1)


@pytest.mark.parametrize(("key", "operand"), [(-16, Operand.WBCACHE), (-2, Operand.KOT)])
def test_cache_wb_needs_its_tables(machine, key, operand):
    machine.module.g.locks.acquire(key, True)
    machine.fails(Leaf.PHYMEM_CACHE_WB, Status.OPERAND_BUSY, operand)


# --- dynamic PAMT
@pytest.fixture(scope="module")
def dynamic():
    return Machine(dynamic_pamt=True)


def test_without_dynamic_pamt_its_leaves_do_not_exist(machine):
    for leaf in (Leaf.PHYMEM_PAMT_ADD, Leaf.PHYMEM_PAMT_REMOVE):
        machine.fails(leaf, INVALID, 0, rcx=0x1000_0001, rdx=0x100_0000, r8=0x100_1000)


def test_a_range_gets_its_pamt_pages_and_gives_them_back(dynamic):
    area, pages = 0x1000_0000, (0x1040_0000, 0x1040_1000)
    dynamic.ok(Leaf.PHYMEM_PAMT_ADD, rcx=area | 1, rdx=pages[0], r8=pages[1])
    regs = dynamic.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=area | 1)
    assert (regs.rcx & 0xFF, regs.r10, regs.r11) == (PageType.PAMT, *pages)
    for page in pages:
        assert dynamic.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page).rcx == PageType.PAMT
    dynamic.fails(Leaf.PHYMEM_PAMT_ADD, Status.HPA_RANGE_NOT_FREE, Operand.RCX, rcx=area | 1, rdx=pages[0], r8=pages[1])
    regs = dynamic.ok(Leaf.PHYMEM_PAMT_REMOVE, rcx=area | 1)
    assert (regs.rdx, regs.r8) == pages
    dynamic.fails(Leaf.PHYMEM_PAMT_REMOVE, Status.NO_PAMT_PAGE_PAIR, Operand.RCX, rcx=area | 1)
    assert dynamic.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=pages[0]).rcx == PageType.NDA


def test_a_range_with_a_page_in_use_keeps_its_pamt_pages(dynamic):
    area, pages = 0x1080_0000, (0x10C0_0000, 0x10C0_1000)
    dynamic.ok(Leaf.PHYMEM_PAMT_ADD, rcx=area | 1, rdx=pages[0], r8=pages[1])
    for number, page in enumerate((area + 5 * PAGE, area + 300 * PAGE)):
        dynamic.ok(Leaf.MNG_CREATE, rcx=page, rdx=40 + number)
        dynamic.fails(Leaf.PHYMEM_PAMT_REMOVE, Status.PAMT_PAGE_NOT_EMPTY, 0, rcx=area | 1)


def test_a_page_cannot_serve_two_ranges(dynamic):
    page, other, third = 0x1140_0000, 0x1140_1000, 0x1140_2000
    dynamic.ok(Leaf.PHYMEM_PAMT_ADD, rcx=0x1100_0000 | 1, rdx=page, r8=other)
    for pages, operand in (((page, third), Operand.RDX), ((third, other), Operand.R8), ((third, third), Operand.R8)):
        dynamic.fails(
            Leaf.PHYMEM_PAMT_ADD, Status.PAGE_NOT_FREE, operand, rcx=0x1120_0000 | 1, rdx=pages[0], r8=pages[1]
        )
    dynamic.ok(Leaf.PHYMEM_PAMT_ADD, rcx=0x1120_0000 | 1, rdx=third, r8=third + PAGE)


@pytest.mark.parametrize(
    ("operands", "want", "operand"),
    [
        ({"rcx": 0x1200_0000}, INVALID, Operand.RCX),
        ({"rcx": 0x1200_0002}, INVALID, Operand.RCX),
        ({"rcx": 0x1200_1001}, INVALID, Operand.RCX),
        ({"rcx": 0x1200_0001 | KEYED}, INVALID, Operand.RCX),
        ({"rdx": 0x1240_0800}, INVALID, Operand.RDX),
        ({"rdx": 0x1240_0000 | KEYED}, INVALID, Operand.RDX),
        ({"rdx": HOST}, RANGE, Operand.RDX),
        ({"r8": 0x1240_0800}, INVALID, Operand.R8),
        ({"r8": HOST}, RANGE, Operand.R8),
        ({"rcx": HOST & -MIB2 | 1}, RANGE, Operand.RCX),
        ({"rcx": HOST & -MIB2 | 1, "rdx": HOST}, RANGE, Operand.RDX),
        ({"rcx": 0x1200_0000, "rdx": HOST}, INVALID, Operand.RCX),
        ({"rdx": HOST, "r8": 0x1240_0800}, RANGE, Operand.RDX),
    ],
)
def test_operands_of_pamt_add(dynamic, operands, want, operand):
    good = {"rcx": 0x1200_0001, "rdx": 0x1240_0000, "r8": 0x1240_1000}
    dynamic.fails(Leaf.PHYMEM_PAMT_ADD, want, operand, **good | operands)


def test_without_pamt_pages_a_range_is_usable_only_as_a_whole(dynamic):
    dynamic.fails(Leaf.MNG_CREATE, Status.MISSING_PAMT_PAGE_PAIR, Operand.RCX, rcx=0x1300_0000, rdx=50)
    assert dynamic.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=0x1300_0000 | 1).rcx == PageType.NDA
