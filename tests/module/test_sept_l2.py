"""Aliases of L2 VMs: whatever happens to an L1 entry, the L2 entries for the same range go with it."""

import random
from collections.abc import Iterator

import pytest
from guest_thread import GuestThread
from tdx_machine import ATTRIBUTES_DEBUG, MIB2, NULL_PA, PAGE, Leaf, Machine, Td, status, td_params

from softtdx.abi import sept as bits
from softtdx.abi.exits import ExtendedQualification
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.sept import SeptState
from softtdx.abi.status import Operand, Status

ACCEPT, READ, WRITE = TdcallLeaf.MEM_PAGE_ACCEPT, TdcallLeaf.MEM_PAGE_ATTR_RD, TdcallLeaf.MEM_PAGE_ATTR_WR
VALID = 1 << 15
R, W, XS, XU, PWA, SVE = 1, 2, 4, 8, 32, 128
HPA = bits.HPA_MASK & ~(0x3F << 46)
VMS = (1, 2)
VM_CTLS = 0x9110_0003_0000_0012
DO_INVEPT = 1 << 15
EPT_VIOLATION = 48


class Partitioned:
    """A debug TD with two L2 VMs, tables for GPA 0 and 2 MiB, and its vCPU inside whenever a test asks."""

    def __init__(self) -> None:
        self.machine = m = Machine()
        self.td = td = Td.create(m, params=td_params(attributes=ATTRIBUTES_DEBUG, l2_vms=2))
        for level in (3, 2, 1):
            self.add_tables(0, level)
        td.add_page(0, b"first")
        td.add_page(PAGE, b"second")
        self.vcpu = td.finalize()
        m.ok(Leaf.VP_FLUSH, rcx=self.vcpu)
        self.guest: GuestThread | None = None

    def add_tables(self, gpa: int, level: int) -> list[int]:
        """L1 and both L2 tables below an entry, in one call."""
        pages = [self.machine.page() for _ in range(3)]
        operands = dict(zip(("r8", "r9", "r10"), pages, strict=True))
        regs = self.machine.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=gpa | level, rdx=self.td.tdr, r11=NULL_PA, **operands)
        assert (regs.r8, regs.r9, regs.r10, regs.r11) == (NULL_PA,) * 4
        self.td.tables[gpa, level] = pages[0]
        return pages

    def tdcall(self, leaf: TdcallLeaf, **operands: int):
        if self.guest is None:
            self.guest = GuestThread(self.machine.lps[1], self.vcpu)
        regs = self.guest.tdcall(leaf, **operands)
        if regs is None:
            self.guest = None
        return regs

    def out(self) -> None:
        if self.guest:
            self.guest.interrupt()
            self.guest = None

    def alias(self, info: int, vm: int, rights: int) -> None:
        """ATTR.WR for one VM, all rights masked in."""
        regs = self.tdcall(WRITE, rcx=info, rdx=(rights | VALID) << 16 * vm, r8=0x7F << 16 * vm)
        assert regs.rax == 0, status(regs.rax)

    def rights(self, gpa: int, vm: int) -> int:
        """ATTR.RD: the attributes of one VM."""
        regs = self.tdcall(READ, rcx=gpa)
        assert regs.rax == 0, status(regs.rax)
        return regs.rdx >> 16 * vm & 0xFFFF

    # --- the trees in DRAM
    def tree(self, vm: int) -> dict[tuple[int, int], int]:
        """The entries of a VM's tree that are not free, by (GPA, level)."""
        memory, key = self.machine.platform.memory, self.td.hkid << 46
        found: dict[tuple[int, int], int] = {}
        tables = [(self.td.tdcx[3 if vm == 0 else 5 + vm], 0, 3)]
        while tables:
            page, base, level = tables.pop()
            content = memory.read(page | key, PAGE, seam=True)
            for index in range(512):
                entry = int.from_bytes(content[index * 8 : index * 8 + 8], "little")
                free = bits.state_of(entry) is SeptState.FREE if vm == 0 else not entry & bits.L2_STATE_MASK
                if free:
                    continue
                gpa = base + (index << 12 + 9 * level)
                found[gpa, level] = entry
                if not entry & bits.LEAF:
                    tables.append((entry & HPA, gpa, level - 1))
        return found

    def check(self) -> None:
        """Alias flags, addresses and blocking of L1 and L2 agree."""
        l1 = self.tree(0)
        for vm in VMS:
            l2 = self.tree(vm)
            assert l2.keys() == {at for at, entry in l1.items() if entry >> 57 + vm & 1}
            for at, entry in l2.items():
                above = l1[at]
                state = bits.state_of(above)
                assert bool(entry & bits.LEAF) == bool(above & bits.LEAF)
                if entry & bits.LEAF:
                    assert entry & HPA == above & HPA
                    hidden = state not in (SeptState.MAPPED,)
                    assert bool(entry & bits.TDB) == hidden, (hex(at[0]), state, hex(entry))
                    assert not (hidden and entry & 0x407), "a blocked entry allows nothing"
                else:
                    assert bool(entry & bits.TDB) == (state is SeptState.NL_BLOCKED)


@pytest.fixture
def p() -> Iterator[Partitioned]:
    partitioned = Partitioned()
    yield partitioned
    partitioned.out()


def test_an_alias_appears_with_the_rights_that_the_td_gives_and_disappears_without(p: Partitioned) -> None:
    p.alias(0, 1, R | W)
    assert p.rights(0, 1) == VALID | R | W
    assert p.rights(0, 2) == 0
    p.check()
    p.alias(0, 1, R | XS | XU | PWA)
    assert p.rights(0, 1) == VALID | R | XS | XU | PWA
    p.alias(0, 1, 0)
    assert p.rights(0, 1) == 0
    p.check()


def test_a_mask_leaves_the_other_rights_alone(p: Partitioned) -> None:
    p.alias(0, 2, R | W | XS)
    regs = p.tdcall(WRITE, rcx=0, rdx=VALID << 32, r8=W << 32)
    assert regs.rdx == (VALID | R | XS) << 32
    assert p.rights(0, 2) == VALID | R | XS


@pytest.mark.parametrize("rights", [W, PWA | XS, R | SVE, R | 1 << 8, R | 1 << 14])
def test_rights_that_make_no_sense_are_refused_and_the_present_ones_told(p: Partitioned, rights: int) -> None:
    p.alias(0, 1, R)
    for vm, present in ((1, R | VALID), (2, 0)):
        regs = p.tdcall(WRITE, rcx=0, rdx=(rights | VALID) << 16 * vm, r8=0x7FFF << 16 * vm)
        assert (status(regs.rax), regs.rcx, regs.rdx) == ((Status.PAGE_ATTR_INVALID, 0), 0, present << 16 * vm)
    assert p.rights(0, 1) == R | VALID
    p.check()


def test_attributes_of_vms_that_do_not_exist_are_refused(p: Partitioned) -> None:
    for rdx, r8, operand in (
        (VALID << 48, 0, Operand.RDX),
        (0, 1 << 48, Operand.R8),
        (R << 16, 0, Operand.RDX),
        (1, 0, Operand.RDX),
        (0, 1, Operand.R8),
    ):
        regs = p.tdcall(WRITE, rcx=0, rdx=rdx, r8=r8)
        assert status(regs.rax) == (Status.OPERAND_INVALID, operand)


def test_blocking_hides_an_alias_and_unblocking_brings_its_rights_back(p: Partitioned) -> None:
    p.alias(0, 1, R | W | XU)
    p.out()
    p.td.block(0)
    p.check()
    p.td.track()
    regs = p.machine.ok(Leaf.MEM_SEPT_RD, rcx=0, rdx=p.td.tdr | 1)
    assert regs.r8 == (R | W | XU | VALID) << 16, "the saved rights"
    p.machine.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=0, rdx=p.td.tdr)
    p.check()
    assert p.rights(0, 1) == R | W | XU | VALID


def test_an_alias_of_a_pending_page_wakes_when_the_page_is_accepted(p: Partitioned) -> None:
    page = p.td.aug(2 * PAGE)
    p.alias(2 * PAGE, 1, R | W)
    p.check()
    assert p.tree(1)[2 * PAGE, 0] & 0x407 == 0
    assert p.tdcall(ACCEPT, rcx=2 * PAGE).rax == 0
    p.check()
    assert p.tree(1)[2 * PAGE, 0] & 7 == 3
    assert p.tree(1)[2 * PAGE, 0] & HPA == page


def test_removing_and_relocating_take_the_aliases_along(p: Partitioned) -> None:
    p.alias(0, 1, R)
    p.alias(0, 2, R | W)
    p.alias(PAGE, 2, R)
    p.out()
    p.td.block(0)
    p.td.block(PAGE)
    p.td.track()
    new = p.machine.page()
    p.machine.ok(Leaf.MEM_PAGE_RELOCATE, rcx=0, rdx=p.td.tdr, r8=new)
    p.check()
    assert {p.tree(vm)[0, 0] & HPA for vm in VMS} == {new}
    p.machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=PAGE, rdx=p.td.tdr)
    p.check()
    assert (PAGE, 0) not in p.tree(2)


def test_splitting_needs_a_page_for_each_alias_and_merging_gives_them_back(p: Partitioned) -> None:
    m, td = p.machine, p.td
    td.aug(MIB2, 1)
    assert p.tdcall(ACCEPT, rcx=MIB2 | 1).rax == 0
    p.alias(MIB2 | 1, 1, R | W)
    p.out()
    td.block(MIB2, 1)
    td.track()
    table, l2_table, spare = m.page(), m.page(), m.page()
    split = {"rcx": MIB2 | 1, "r8": table, "r11": NULL_PA}
    m.fails(
        Leaf.MEM_PAGE_DEMOTE, Status.L2_SEPT_PAGE_NOT_PROVIDED, Operand.R9, rdx=td.tdr, r9=NULL_PA, r10=NULL_PA, **split
    )
    regs = m.ok(Leaf.MEM_PAGE_DEMOTE, rdx=td.tdr | 1, r9=l2_table, r10=spare, **split)
    assert (regs.r9, regs.r10) == (l2_table, spare | 1 << 63), "nothing aliases it in VM 2"
    p.check()
    assert p.rights(MIB2 + 5 * PAGE, 1) == R | W | VALID
    p.out()
    td.block(MIB2, 1)
    p.check()
    td.track()
    regs = m.ok(Leaf.MEM_PAGE_PROMOTE, version=1, rcx=MIB2 | 1, rdx=td.tdr)
    assert (regs.rcx, regs.r9, regs.r10, regs.r11) == (table, l2_table, NULL_PA, NULL_PA)
    p.check()
    assert p.rights(MIB2, 1) == R | W | VALID


def test_aliases_that_differ_keep_pages_from_merging(p: Partitioned) -> None:
    m, td = p.machine, p.td
    td.aug(MIB2, 1)
    assert p.tdcall(ACCEPT, rcx=MIB2 | 1).rax == 0
    p.alias(MIB2 | 1, 1, R)
    p.out()
    td.block(MIB2, 1)
    td.track()
    m.ok(Leaf.MEM_PAGE_DEMOTE, rcx=MIB2 | 1, rdx=td.tdr, r8=m.page(), r9=m.page(), r10=NULL_PA, r11=NULL_PA)
    p.alias(MIB2 + 9 * PAGE, 1, R | W)
    p.out()
    td.block(MIB2, 1)
    td.track()
    want = Status.EPT_INVALID_PROMOTE_CONDITIONS
    m.fails(Leaf.MEM_PAGE_PROMOTE, want, Operand.RCX, rcx=MIB2 | 1, rdx=td.tdr)
    p.check()


def test_a_missing_l2_table_is_told_to_the_td(p: Partitioned) -> None:
    p.td.add_table(MIB2, 1)
    p.td.aug(MIB2)
    regs = p.tdcall(WRITE, rcx=MIB2, rdx=(R | VALID) << 16, r8=0x7F << 16)
    assert status(regs.rax) == (Status.L2_SEPT_WALK_FAILED, 1 << 16 | 1)


def test_a_host_may_choose_to_be_told_of_a_missing_l2_table(p: Partitioned) -> None:
    p.td.add_table(MIB2, 1)
    p.td.aug(MIB2)
    p.machine.ok(Leaf.MNG_WR, rcx=p.td.tdr, rdx=VM_CTLS + 2, r8=1, r9=1)
    masks = 0x7F << 16 | 0x7F << 32
    regs = p.tdcall(WRITE, rcx=MIB2, rdx=(R | VALID) << 16, r8=masks)
    assert status(regs.rax) == (Status.L2_SEPT_WALK_FAILED, 1 << 16 | 1), "the host chose VM 2 only"
    guest = p.guest
    assert p.tdcall(WRITE, rcx=MIB2, rdx=(R | VALID) << 32, r8=masks) is None
    out = guest.exit
    assert (out.rax & 0xFFFF_FFFF, out.r8) == (EPT_VIOLATION, MIB2)
    assert out.rcx & 0x3F == W, "a write, and the entry met allows nothing"
    assert out.rdx & 0xF == ExtendedQualification.GPA_DETAILS
    assert out.rdx >> 32 == 1 << 3 | 2 << 20, "level 1 of VM 2's tree"


def test_attributes_of_addresses_that_no_page_has_are_refused(p: Partitioned) -> None:
    for info in (1 << 51, 1 << 47, 3, 8, MIB2 + PAGE | 1):
        regs = p.tdcall(WRITE, rcx=info, rdx=0, r8=0)
        assert status(regs.rax) == (Status.OPERAND_INVALID, Operand.RCX), hex(info)


def test_taking_rights_back_may_flush_what_processors_remember_of_the_vm(p: Partitioned) -> None:
    p.alias(0, 1, R | W)
    regs = p.tdcall(WRITE, rcx=0, rdx=(R | VALID) << 16, r8=(0x7F | DO_INVEPT) << 16)
    assert (regs.rax, regs.rdx) == (0, (R | VALID) << 16)
    p.check()


def test_splitting_uses_pages_for_vms_without_an_alias_too_unless_told_not_to(p: Partitioned) -> None:
    m, td = p.machine, p.td
    td.aug(MIB2, 1)
    assert p.tdcall(ACCEPT, rcx=MIB2 | 1).rax == 0
    p.alias(MIB2 | 1, 1, R)
    p.out()
    td.block(MIB2, 1)
    td.track()
    table, first, second = m.page(), m.page(), m.page()
    regs = m.ok(Leaf.MEM_PAGE_DEMOTE, rcx=MIB2 | 1, rdx=td.tdr, r8=table, r9=first, r10=second, r11=NULL_PA)
    assert (regs.r9, regs.r10, regs.r11) == (first, second, NULL_PA)
    p.check()
    assert len([at for at in p.tree(2) if MIB2 <= at[0] < 2 * MIB2]) == 1, "an empty table"
    p.alias(MIB2 + 7 * PAGE, 2, R | W)
    p.check()


def test_splitting_stops_where_a_vm_has_no_table_for_the_new_page(p: Partitioned) -> None:
    m, td = p.machine, p.td
    td.add_table(1 << 30, 2)
    td.aug(1 << 30, 1)
    assert p.tdcall(ACCEPT, rcx=1 << 30 | 1).rax == 0
    p.out()
    td.block(1 << 30, 1)
    td.track()
    table, first = m.page(), m.page()
    operands = {"rcx": 1 << 30 | 1, "rdx": td.tdr, "r8": table, "r9": first, "r10": NULL_PA, "r11": NULL_PA}
    regs = m.call(Leaf.MEM_PAGE_DEMOTE, **operands)
    assert status(regs.rax) == (Status.L2_SEPT_WALK_FAILED, 1 << 16 | 2)
    assert regs.rdx == 1 << 16 | 64 << 8 | 2
    assert [m.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page).rcx for page in (table, first)] == [0, 0]
    m.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=1 << 30 | 1, rdx=td.tdr)
    p.check()


def test_the_host_reads_the_rights_of_every_vm_in_one_call(p: Partitioned) -> None:
    p.alias(0, 2, R | W)
    p.out()
    read = {"rdx": p.td.tdr | 1}
    assert p.machine.ok(Leaf.MEM_SEPT_RD, rcx=0, **read).r8 == (R | W | VALID) << 32
    assert p.machine.ok(Leaf.MEM_SEPT_RD, rcx=2 * PAGE, **read).r8 == 0, "a free entry"
    present = p.machine.ok(Leaf.MEM_SEPT_RD, rcx=1, **read).r8
    assert present >> 16 & 0xFFFF == present >> 32 & 0xFFFF != 0, "tables of both"


def test_l2_tables_come_with_or_after_the_l1_table_and_go_with_it(p: Partitioned) -> None:
    m, td = p.machine, p.td
    table = td.add_table(MIB2, 1)
    first, second = m.page(), m.page()
    none = {"r8": NULL_PA, "r11": NULL_PA}
    m.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=MIB2 | 1, rdx=td.tdr, r9=first, r10=second, **none)
    p.check()
    spare = m.page()
    regs = m.call(Leaf.MEM_SEPT_ADD, version=1, rcx=MIB2 | 1, rdx=td.tdr, r9=spare, r10=NULL_PA, **none)
    assert status(regs.rax) == (Status.L2_SEPT_ENTRY_NOT_FREE, 1 << 16 | 1)
    assert regs.rdx >> 16 == 1
    regs = m.ok(Leaf.MEM_SEPT_ADD, version=1, rcx=MIB2 | 1, rdx=td.tdr | 1, r9=spare, r10=NULL_PA, **none)
    assert regs.r9 == spare | 1 << 63
    td.block(MIB2, 1)
    p.check()
    td.track()
    regs = m.ok(Leaf.MEM_SEPT_REMOVE, version=1, rcx=MIB2 | 1, rdx=td.tdr)
    assert (regs.rcx, regs.r9, regs.r10, regs.r11) == (table, first, second, NULL_PA)
    p.check()
    assert [m.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=page).rcx for page in (table, first, second)] == [0, 0, 0]


def test_a_missing_level_of_an_l2_tree_is_told_to_the_host(p: Partitioned) -> None:
    m, td = p.machine, p.td
    td.add_table(1 << 30, 2)
    operands = {"rcx": 1 << 30 | 1, "rdx": td.tdr, "r8": m.page(), "r9": m.page(), "r10": NULL_PA, "r11": NULL_PA}
    regs = m.call(Leaf.MEM_SEPT_ADD, version=1, **operands)
    assert status(regs.rax) == (Status.L2_SEPT_WALK_FAILED, 1 << 16 | 2)
    assert (regs.rcx, regs.rdx) == (1 << 63, 1 << 16 | 64 << 8 | 2)
    assert m.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=operands["r8"]).rcx == 0


def test_adding_several_tables_can_be_interrupted_and_resumed(p: Partitioned) -> None:
    m, td = p.machine, p.td
    pages = [m.page() for _ in range(3)]
    operands = {"rcx": MIB2 | 1, "rdx": td.tdr, "r8": pages[0], "r9": pages[1], "r10": pages[2], "r11": NULL_PA}
    lp = m.lps[0]
    lp.interrupt_pending = True
    for done in (1, 2):
        regs = m.call(Leaf.MEM_SEPT_ADD, version=1, **operands)
        assert (status(regs.rax)[0], regs.rcx, regs.rdx) == (Status.INTERRUPTED_RESUMABLE, MIB2 | 1, td.tdr)
        assert [regs.r8, regs.r9, regs.r10] == [NULL_PA] * done + pages[done:]
        operands |= {"r8": regs.r8, "r9": regs.r9, "r10": regs.r10}
        p.check()
    assert m.ok(Leaf.MEM_SEPT_ADD, version=1, **operands).r10 == NULL_PA
    lp.interrupt_pending = False
    p.check()


@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_calls_keeps_the_trees_in_step(seed: int) -> None:
    p = Partitioned()
    m, td, rng = p.machine, p.td, random.Random(seed)
    gpas = [0, PAGE, 2 * PAGE, 3 * PAGE]
    for _ in range(150):
        gpa = rng.choice(gpas)
        step = rng.randrange(8)
        if step < 2:
            rights = rng.choice([0, R, R | W, R | XS, W, R | W | XS | XU | PWA])
            vm = rng.choice(VMS)
            p.tdcall(WRITE, rcx=gpa, rdx=(rights | VALID) << 16 * vm, r8=0x7F << 16 * vm)
        elif step == 2:
            p.tdcall(ACCEPT, rcx=gpa)
        elif step == 3:
            m.call(Leaf.MEM_PAGE_AUG, rcx=gpa, rdx=td.tdr, r8=m.page())
        elif step == 4:
            m.call(Leaf.MEM_RANGE_BLOCK, rcx=rng.choice([gpa, gpa, gpa, 1]), rdx=td.tdr)
        elif step == 5:
            p.out()
            m.call(Leaf.MEM_TRACK, rcx=td.tdr)
            m.call(Leaf.MEM_RANGE_UNBLOCK, rcx=1, rdx=td.tdr)
        elif step == 6:
            m.call(Leaf.MEM_RANGE_UNBLOCK, rcx=gpa, rdx=td.tdr)
        else:
            leaf = rng.choice([Leaf.MEM_PAGE_REMOVE, Leaf.MEM_PAGE_RELOCATE])
            m.call(leaf, rcx=gpa, rdx=td.tdr, r8=m.page())
        p.check()
    p.out()
