"""Metadata: every field of every context for production and debug TDs, iteration, lists, writable bits."""

import struct

import pytest
from tdx_machine import ATTRIBUTES_DEBUG, BUFFER, NULL_PA, PAGE, Leaf, Machine, Td, status, td_params

from softtdx.abi.fields import MdContext, MdField, table
from softtdx.abi.status import Operand, Status

NULL = NULL_PA
NOT_READABLE = Status.METADATA_FIELD_NOT_READABLE
NOT_WRITABLE = Status.METADATA_FIELD_NOT_WRITABLE
ID_INCORRECT = Status.METADATA_FIELD_ID_INCORRECT
FIRST = Status.METADATA_FIRST_FIELD_ID_IN_CONTEXT
ATTRIBUTES = 0x1110_0003_0000_0000
CPUID_CLASS = 20
SAME = 0x7FF0_0000_00FF_FFFF  # bits of an id in which the element of a list and the single element agree


class Tds:
    """A production TD and a debug TD, both runnable, on one machine."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.production = Td.create(self.machine)
        self.debug = Td.create(self.machine, params=td_params(attributes=ATTRIBUTES_DEBUG))
        for td in (self.production, self.debug):
            td.finalize()


@pytest.fixture(scope="module")
def tds():
    return Tds()


@pytest.fixture(params=["production", "debug"])
def td(tds, request):
    return getattr(tds, request.param)


def is_debug(td: Td) -> bool:
    return bool(td.machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=ATTRIBUTES).r8 & ATTRIBUTES_DEBUG)


def read(td: Td, leaf: Leaf, page: int, field: int, version: int = 0):
    return td.machine.call(leaf, version=version, rcx=page, rdx=field)


PLACES = [(Leaf.MNG_RD, Leaf.MNG_WR, MdContext.TD), (Leaf.VP_RD, Leaf.VP_WR, MdContext.VP)]


def page_of(td: Td, context: MdContext) -> int:
    return td.tdr if context is MdContext.TD else td.vcpu_pages[0]


def rows(context: MdContext) -> list[MdField]:
    """Rows of a context that need no L2 VM and are no CPUID values."""
    found = list(table("td" if context is MdContext.TD else "vp").fields)
    return [row for row in found if "L2" not in row.name and row.class_code != CPUID_CLASS]


@pytest.mark.parametrize(("rd", "wr", "context"), PLACES, ids=["TD", "VP"])
def test_a_field_is_readable_where_its_table_says_so(td, rd, wr, context):
    del wr
    debug = is_debug(td)
    for row in rows(context):
        mask = row.dbg_rd if debug else row.prod_rd
        regs = read(td, rd, page_of(td, context), row.field_id)
        if not mask:
            assert (status(regs.rax), regs.r8) == ((NOT_READABLE, 0), 0), row.name
        else:
            assert regs.rax == 0, (row.name, status(regs.rax))
            assert not regs.r8 & ~mask, row.name


@pytest.mark.parametrize(("rd", "wr", "context"), PLACES, ids=["TD", "VP"])
def test_a_field_that_its_table_does_not_let_be_written_stays_as_it_is(td, rd, wr, context):
    debug = is_debug(td)
    page = page_of(td, context)
    for row in rows(context):
        readable, writable = (row.dbg_rd, row.dbg_wr) if debug else (row.prod_rd, row.prod_wr)
        if writable:
            continue
        before = read(td, rd, page, row.field_id).r8
        regs = td.machine.call(wr, rcx=page, rdx=row.field_id, r8=~before & NULL, r9=NULL)
        assert status(regs.rax) == (NOT_WRITABLE, 0), row.name
        if readable:
            assert read(td, rd, page, row.field_id).r8 == before, row.name


@pytest.mark.parametrize(("rd", "wr", "context"), PLACES, ids=["TD", "VP"])
def test_writing_back_what_was_read_changes_nothing(td, rd, wr, context):
    debug = is_debug(td)
    page = page_of(td, context)
    for row in rows(context):
        readable, writable = (row.dbg_rd, row.dbg_wr) if debug else (row.prod_rd, row.prod_wr)
        if not writable or readable & writable != writable:
            continue
        before = read(td, rd, page, row.field_id).r8
        regs = td.machine.call(wr, rcx=page, rdx=row.field_id, r8=before, r9=NULL)
        assert status(regs.rax)[0] in (Status.SUCCESS, Status.METADATA_FIELD_VALUE_NOT_VALID), row.name
        if regs.rax == 0:
            assert regs.r8 == before, row.name
        assert read(td, rd, page, row.field_id).r8 == before, row.name


@pytest.mark.parametrize(("rd", "context"), [(Leaf.MNG_RD, MdContext.TD), (Leaf.VP_RD, MdContext.VP)], ids=["TD", "VP"])
def test_iteration_visits_every_readable_element_once_and_ends(td, rd, context):
    page = page_of(td, context)
    regs = read(td, rd, page, NULL, version=1)
    assert status(regs.rax) == (FIRST, 0)
    seen: list[int] = []
    field = regs.rdx
    while field != NULL:
        seen.append(field)
        regs = read(td, rd, page, field, version=1)
        assert status(regs.rax)[0] in (Status.SUCCESS, NOT_READABLE), hex(field)
        assert regs.rdx != field
        field = regs.rdx
        assert len(seen) < 20_000
    assert len(set(seen)) == len(seen)
    debug = is_debug(td)
    wanted = {row.field_id for row in rows(context) if (row.dbg_rd if debug else row.prod_rd)}
    assert wanted <= set(seen)


def test_sys_fields_are_the_same_one_by_one_and_as_a_list(tds):
    machine = tds.machine
    regs = machine.fails(Leaf.SYS_RD, FIRST, rdx=NULL)
    single = {}
    while regs.rdx != NULL:
        field = regs.rdx
        regs = machine.ok(Leaf.SYS_RD, rdx=field)
        single[field & SAME] = regs.r8
    listed = {}
    following = NULL
    while True:
        regs = machine.call(Leaf.SYS_RDALL, rdx=BUFFER, r8=following)
        data = machine.lps[0].read(BUFFER, PAGE)
        listed |= parse_list(data)
        following = regs.r8
        if regs.rax == 0:
            break
        assert status(regs.rax)[0] is Status.METADATA_LIST_OVERFLOW
    assert following == NULL
    assert listed == single


def parse_list(data: bytes) -> dict[int, int]:
    """Field id (without sizes) to value."""
    size, sequences = struct.unpack_from("<HH", data)
    at = 8
    found = {}
    for _ in range(sequences):
        (header,) = struct.unpack_from("<Q", data, at)
        at += 8
        elements = (header >> 34 & 0xF) + 1
        fields = (header >> 38 & 0x1FF) + 1
        step = 2 if header >> 50 & 1 else 1
        for number in range(elements * fields):
            (found[(header & SAME) + number * step],) = struct.unpack_from("<Q", data, at)
            at += 8
    assert at == size
    return found


@pytest.mark.parametrize(
    "field",
    [
        ATTRIBUTES | 1 << 24,
        ATTRIBUTES | 1 << 31,
        ATTRIBUTES | 1 << 47,
        ATTRIBUTES | 1 << 55,
        ATTRIBUTES | 1 << 62,
        ATTRIBUTES | 1 << 34,
        ATTRIBUTES | 1 << 38,
        ATTRIBUTES | 0xFF_F000,
        0x3F10_0003_0000_0000,
    ],
)
def test_ids_that_name_no_single_element_are_incorrect(tds, field):
    td = tds.production
    td.machine.fails(Leaf.MNG_RD, ID_INCORRECT, rcx=td.tdr, rdx=field)
    regs = td.machine.fails(Leaf.MNG_RD, ID_INCORRECT, version=1, rcx=td.tdr, rdx=field)
    assert (regs.rdx, regs.r8) == (NULL, 0)
    td.machine.fails(Leaf.MNG_WR, ID_INCORRECT, rcx=td.tdr, rdx=field, r9=NULL)


@pytest.mark.parametrize("context", range(8))
def test_the_context_in_an_id_is_not_looked_at(tds, context):
    td = tds.production
    assert td.machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=ATTRIBUTES & ~(7 << 52) | context << 52).r8 != 0


# --- debug TDs
def test_only_a_debug_td_lets_the_host_write_its_registers(tds):
    gpr_rax = next(row for row in table("vp").fields if row.name in ("GPR_STATE", "RAX"))
    for td, want in ((tds.production, NOT_WRITABLE), (tds.debug, Status.SUCCESS)):
        regs = td.machine.call(Leaf.VP_WR, rcx=td.vcpu_pages[0], rdx=gpr_rax.field_id, r8=0x1234, r9=0xFFFF)
        assert status(regs.rax)[0] is want
    assert read(tds.debug, Leaf.VP_RD, tds.debug.vcpu_pages[0], gpr_rax.field_id).r8 & 0xFFFF == 0x1234


def test_a_write_changes_the_bits_in_the_mask_and_no_others(tds):
    td = tds.debug
    field = next(row for row in table("vp").fields if row.name in ("GPR_STATE", "RAX")).field_id
    page = td.vcpu_pages[0]
    td.machine.ok(Leaf.VP_WR, rcx=page, rdx=field, r8=0x1122_3344_5566_7788, r9=NULL)
    regs = td.machine.ok(Leaf.VP_WR, rcx=page, rdx=field, r8=0xFFFF_FFFF_FFFF_FF00, r9=0xFF)
    assert regs.r8 == 0x1122_3344_5566_7788
    assert read(td, Leaf.VP_RD, page, field).r8 == 0x1122_3344_5566_7700


# --- fields with rules of their own
def test_the_hosts_lock_timeout_has_bounds_and_is_written_as_a_whole(tds):
    td = tds.production
    row = next(row for row in table("td").fields if row.name == "HP_LOCK_TIMEOUT")
    good = {"rcx": td.tdr, "rdx": row.field_id}
    for value in (9_999, 100_000_001, 0):
        td.machine.fails(Leaf.MNG_WR, Status.METADATA_FIELD_VALUE_NOT_VALID, **good, r8=value, r9=NULL)
    td.machine.fails(Leaf.MNG_WR, Status.METADATA_WR_MASK_NOT_VALID, **good, r8=50_000, r9=0xFFFF)
    td.machine.ok(Leaf.MNG_WR, **good, r8=50_000, r9=NULL)
    assert td.machine.ok(Leaf.MNG_RD, **good).r8 == 50_000


@pytest.mark.parametrize(("rdx", "r8", "want", "operand"), [
    (BUFFER | 0x800, NULL, Status.OPERAND_INVALID, Operand.RDX),
    (0x6000_0000, NULL, Status.OPERAND_INVALID, Operand.RDX),
    (BUFFER, 0x3F00_0003_0000_0000, ID_INCORRECT, 0),
])  # fmt: skip
def test_operands_of_sys_rdall(tds, rdx, r8, want, operand):
    regs = tds.machine.call(Leaf.SYS_RDALL, rdx=rdx, r8=r8)
    assert status(regs.rax)[0] is want
    if operand:
        assert status(regs.rax)[1] == operand
    assert regs.r8 == NULL
