"""TDH.VP.CREATE, ADDCX, INIT, FLUSH and ENTER up to the entry: their refusals in the order of the checks."""

import pytest
from guest_script import Exit, interrupt, run, tdcall
from tdx_machine import BUFFER, HOST, Leaf, Td, status, td_params

from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.msrs import Msr
from softtdx.abi.opstate import VcpuState
from softtdx.abi.status import Operand, Status

MISC_ENABLE_LIMIT_CPUID = 1 << 22
HINT, RESUME_L1 = 1 << 52, 1 << 53


def half_built_vcpu(td, pages=5):
    """A vCPU with TDVPR and so many TDCX pages."""
    m = td.machine
    tdvpr = m.page()
    m.ok(Leaf.VP_CREATE, rcx=tdvpr, rdx=td.tdr)
    for _ in range(pages):
        m.ok(Leaf.VP_ADDCX, rcx=m.page(), rdx=tdvpr)
    return tdvpr


@pytest.fixture
def fresh(machine):
    """A TD that is initialised and has no vCPU."""
    return Td.create(machine)


# --- VP.CREATE
def test_vp_create_names_rdx_first_when_both_operands_are_wrong(machine):
    machine.fails(Leaf.VP_CREATE, Status.OPERAND_INVALID, Operand.RDX, rcx=1, rdx=1)


@pytest.mark.parametrize("rcx", [0x1001, 1 << 52, 1 << 63])
def test_vp_create_refuses_an_address_that_is_none(fresh, rcx):
    fresh.machine.fails(Leaf.VP_CREATE, Status.OPERAND_INVALID, Operand.RCX, rcx=rcx, rdx=fresh.tdr)


def test_vp_create_refuses_a_page_that_is_not_free(fresh):
    m = fresh.machine
    m.fails(Leaf.VP_CREATE, Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX, rcx=HOST, rdx=fresh.tdr)
    m.fails(Leaf.VP_CREATE, Status.PAGE_METADATA_INCORRECT, Operand.RCX, rcx=fresh.tdcx[0], rdx=fresh.tdr)
    # The TDR itself is locked as the second operand.
    m.fails(Leaf.VP_CREATE, Status.OPERAND_BUSY, Operand.RCX, rcx=fresh.tdr, rdx=fresh.tdr)


def test_vp_create_needs_a_tdr(fresh):
    page = fresh.machine.page()
    fresh.machine.fails(Leaf.VP_CREATE, Status.PAGE_METADATA_INCORRECT, Operand.RDX, rcx=page, rdx=page)


def test_vp_create_needs_an_initialised_td(machine):
    td = Td.create(machine, initialize=False)
    machine.fails(Leaf.VP_CREATE, Status.OP_STATE_INCORRECT, 0, rcx=machine.page(), rdx=td.tdr)


def test_vp_create_marks_the_page_as_the_tds(fresh):
    tdvpr = half_built_vcpu(fresh, 0)
    regs = fresh.machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=tdvpr)
    assert regs.rdx == fresh.tdr
    fresh.machine.fails(Leaf.VP_CREATE, Status.PAGE_METADATA_INCORRECT, Operand.RCX, rcx=tdvpr, rdx=fresh.tdr)


# --- VP.ADDCX
def test_vp_addcx_takes_pages_up_to_fifteen(fresh):
    m = fresh.machine
    tdvpr = half_built_vcpu(fresh, 14)
    page = m.page()
    m.fails(Leaf.VP_ADDCX, Status.TDCX_NUM_INCORRECT, rcx=page, rdx=tdvpr)


def test_vp_addcx_checks_the_tdvpr_before_the_page(fresh):
    fresh.machine.fails(Leaf.VP_ADDCX, Status.PAGE_METADATA_INCORRECT, Operand.RDX, rcx=fresh.tdr, rdx=fresh.tdr)
    tdvpr = half_built_vcpu(fresh, 0)
    fresh.machine.fails(Leaf.VP_ADDCX, Status.PAGE_METADATA_INCORRECT, Operand.RCX, rcx=fresh.tdcx[0], rdx=tdvpr)


def test_vp_addcx_is_refused_for_a_vcpu_that_is_initialised(fresh):
    tdvpr = fresh.add_vcpu()
    page = fresh.machine.page()
    fresh.machine.fails(Leaf.VP_ADDCX, Status.VCPU_STATE_INCORRECT, VcpuState.READY, rcx=page, rdx=tdvpr)


# --- VP.INIT
def test_vp_init_checks_the_version_before_the_vcpu(machine):
    for version in (2, 3, 255):
        machine.fails(Leaf.VP_INIT, Status.OPERAND_INVALID, Operand.RAX, version=version, rcx=1)


def test_vp_init_needs_six_pages(fresh):
    for pages in range(5):
        tdvpr = half_built_vcpu(fresh, pages)
        fresh.machine.fails(Leaf.VP_INIT, Status.TDCX_NUM_INCORRECT, rcx=tdvpr)


def test_vp_init_needs_more_pages_for_each_l2_vm(machine):
    td = Td.create(machine, initialize=False)
    for _ in range(3):  # one more page is enough: MNG.ADDCX refuses what is too many
        machine.call(Leaf.MNG_ADDCX, rcx=machine.page(), rdx=td.tdr)
    machine.host_write(BUFFER, td_params(l2_vms=1))
    machine.ok(Leaf.MNG_INIT, rcx=td.tdr, rdx=BUFFER)
    tdvpr = half_built_vcpu(td, 7)
    machine.fails(Leaf.VP_INIT, Status.TDCX_NUM_INCORRECT, rcx=tdvpr)
    machine.ok(Leaf.VP_ADDCX, rcx=machine.page(), rdx=tdvpr)
    machine.ok(Leaf.VP_INIT, rcx=tdvpr)


def test_vp_init_happens_once(fresh):
    tdvpr = fresh.add_vcpu()
    fresh.machine.fails(Leaf.VP_INIT, Status.VCPU_STATE_INCORRECT, VcpuState.READY, rcx=tdvpr)


def test_vp_init_counts_vcpus_and_a_refused_one_takes_no_index(fresh):
    m = fresh.machine
    known = [half_built_vcpu(fresh) for _ in range(5)]
    for apic_id, tdvpr in enumerate(known[:3]):
        m.ok(Leaf.VP_INIT, version=1, rcx=tdvpr, r8=apic_id)
    m.fails(Leaf.VP_INIT, Status.X2APIC_ID_NOT_UNIQUE, 2, version=1, rcx=known[3], r8=2)
    m.fails(Leaf.VP_INIT, Status.OPERAND_INVALID, Operand.R8, version=1, rcx=known[3], r8=1 << 32)
    m.ok(Leaf.VP_INIT, version=1, rcx=known[3], r8=0xFFFF_FFFF)
    m.fails(Leaf.VP_INIT, Status.MAX_VCPUS_EXCEEDED, version=1, rcx=known[4], r8=9)


def test_the_vcpus_first_state_is_32_bit_protected_mode_at_the_reset_vector(machine):
    td = Td.create(machine)
    first, tdvpr = half_built_vcpu(td), half_built_vcpu(td)
    machine.ok(Leaf.VP_INIT, rcx=first, rdx=0)
    machine.ok(Leaf.VP_INIT, rcx=tdvpr, rdx=0xABCD)
    machine.ok(Leaf.MR_FINALIZE, rcx=td.tdr)
    look = 0x6800, 0x6804, 0x2806, 0x6820, 0x6808, 0x4816, 0x4818, 0x681A
    entry = run(machine.lps[0], tdvpr, look=look).entry
    assert entry.rip == 0xFFFF_FFF0
    want = {"rbx": 48, "rcx": 0xABCD, "r8": 0xABCD, "rsi": 1, "rdx": machine.platform.description.cpuid[1, None][0]}
    assert {name: value for name, value in entry.regs.items() if value} == want
    cr0, cr4, efer, rflags, cs_base, cs, ss, dr7 = (entry.fields[at] for at in look)
    assert (cr0, efer, rflags, cs_base, dr7) == (0x21, 0x901, 2, 0, 0x400)  # protected mode, no paging
    assert cr4 & ~0x2000 == 0x40
    assert (cs, ss) == (0xC09B, 0xC093)  # 32-bit flat segments


# --- association
def test_a_vcpu_belongs_to_the_processor_that_entered_it_last(td):
    m = td.machine
    tdvpr = td.vcpu_pages[0]
    m.fails(Leaf.VP_FLUSH, Status.VCPU_NOT_ASSOCIATED, lp=1, rcx=tdvpr)
    m.fails(Leaf.VP_ENTER, Status.VCPU_ASSOCIATED, lp=1, rcx=tdvpr)
    m.ok(Leaf.VP_FLUSH, rcx=tdvpr)
    m.fails(Leaf.VP_FLUSH, Status.VCPU_NOT_ASSOCIATED, rcx=tdvpr)
    result = run(m.lps[1], tdvpr)
    assert result.entry
    m.fails(Leaf.VP_ENTER, Status.VCPU_ASSOCIATED, lp=0, rcx=tdvpr)
    m.fails(Leaf.MNG_VPFLUSHDONE, Status.FLUSHVP_NOT_DONE, rcx=td.tdr)


def test_a_vcpu_keeps_its_state_when_it_moves_to_another_processor(td):
    m = td.machine
    tdvpr = td.vcpu_pages[0]
    mark = interrupt()
    mark.gprs = {"r15": 0x1234, "rbp": 0x5678}
    mark.fields[0x681E] = 0x40_0000
    run(m.lps[0], tdvpr, mark)
    m.ok(Leaf.VP_FLUSH, rcx=tdvpr)
    entry = run(m.lps[1], tdvpr).entry
    assert (entry.rip, entry.regs.r15, entry.regs.rbp) == (0x40_0000, 0x1234, 0x5678)


# --- VP.ENTER's checks
@pytest.mark.parametrize("bit", [0, 11, 54, 63])
def test_vp_enter_refuses_reserved_bits_of_rcx(td, bit):
    td.machine.fails(Leaf.VP_ENTER, Status.OPERAND_INVALID, Operand.RCX, rcx=td.vcpu_pages[0] | 1 << bit)


def test_vp_enter_checks_in_the_specified_order(machine):
    """Everything is wrong at first; as each cause is mended, the next is told."""
    td = Td.create(machine)
    tdvpr = half_built_vcpu(td, 4)
    lp = machine.lps[0]
    usual = lp.rdmsr(Msr.MISC_ENABLE)
    lp.wrmsr(Msr.MISC_ENABLE, usual | MISC_ENABLE_LIMIT_CPUID)
    machine.fails(Leaf.VP_ENTER, Status.LIMIT_CPUID_MAXVAL_SET, rcx=1)
    lp.wrmsr(Msr.MISC_ENABLE, usual)
    machine.fails(Leaf.VP_ENTER, Status.OPERAND_INVALID, Operand.RCX, rcx=1)
    machine.fails(Leaf.VP_ENTER, Status.OPERAND_ADDR_RANGE_ERROR, Operand.RCX, rcx=HOST)
    machine.fails(Leaf.VP_ENTER, Status.PAGE_METADATA_INCORRECT, Operand.RCX, rcx=td.tdr)
    machine.fails(Leaf.VP_ENTER, Status.OP_STATE_INCORRECT, 1, rcx=tdvpr)


def test_vp_enter_refuses_a_vcpu_that_is_not_initialised(machine):
    td = Td.create(machine)
    unfinished = half_built_vcpu(td, 4)
    complete = half_built_vcpu(td)
    td.finalize()
    machine.fails(Leaf.VP_ENTER, Status.TDCX_NUM_INCORRECT, rcx=unfinished)
    machine.fails(Leaf.VP_ENTER, Status.VCPU_STATE_INCORRECT, VcpuState.UNINITIALIZED, rcx=complete)


def test_vp_enter_needs_the_tds_key(td):
    m = td.machine
    m.ok(Leaf.VP_FLUSH, rcx=td.vcpu_pages[0])
    m.ok(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
    m.fails(Leaf.VP_ENTER, Status.TD_KEYS_NOT_CONFIGURED, rcx=td.vcpu_pages[0])


def test_vp_enter_refuses_a_hint_after_an_interrupt_and_l1_resumption_without_l2(td):
    m = td.machine
    tdvpr = td.vcpu_pages[0]
    run(m.lps[0], tdvpr)
    m.fails(Leaf.VP_ENTER, Status.OPERAND_INVALID, Operand.RCX, rcx=tdvpr | HINT)
    m.fails(Leaf.VP_ENTER, Status.OPERAND_INVALID, Operand.RCX, rcx=tdvpr | RESUME_L1)
    assert run(m.lps[0], tdvpr).entry


def test_vp_enter_refuses_a_changed_tsc_adjust(td):
    lp = td.machine.lps[0]
    lp.wrmsr(Msr.TSC_ADJUST, 5)
    td.machine.fails(Leaf.VP_ENTER, Status.INCONSISTENT_MSR, Msr.TSC_ADJUST, rcx=td.vcpu_pages[0])


def test_a_disabled_vcpu_cannot_be_entered_again(td):
    m = td.machine
    result = run(m.lps[0], td.vcpu_pages[0], Exit(2))
    assert status(result.host.rax) == (Status.NON_RECOVERABLE_VCPU, 2)
    m.fails(Leaf.VP_ENTER, Status.VCPU_STATE_INCORRECT, VcpuState.DISABLED, rcx=td.vcpu_pages[0])
    m.ok(Leaf.VP_FLUSH, rcx=td.vcpu_pages[0])


def test_a_td_that_lost_its_metadata_cannot_be_entered_again(td):
    m = td.machine
    result = run(m.lps[0], td.vcpu_pages[0], Exit(9, fields={0x6400: 0x1234}))  # a task switch: plain TD exit
    assert (result.host.rax, result.host.rcx) == (9, 0x1234)
    result = run(m.lps[0], td.vcpu_pages[0], Exit(32767))
    assert status(result.host.rax) == (Status.NON_RECOVERABLE_TD, 32767)
    assert m.call(Leaf.VP_ENTER, rcx=td.vcpu_pages[0]).rax != 0


def test_every_lock_is_given_back_after_every_failure(td):
    """After each refusal above, the same TD and vCPU still answer another processor."""
    m = td.machine
    tdvpr = td.vcpu_pages[0]
    for leaf, operands in (
        (Leaf.VP_ENTER, {"rcx": tdvpr | HINT}),
        (Leaf.VP_INIT, {"rcx": tdvpr}),
        (Leaf.VP_ADDCX, {"rcx": m.page(), "rdx": tdvpr}),
        (Leaf.VP_CREATE, {"rcx": tdvpr, "rdx": td.tdr}),
    ):
        assert m.call(leaf, **operands).rax
        m.ok(Leaf.VP_FLUSH, rcx=tdvpr)
        assert run(m.lps[1], tdvpr).entry
        m.ok(Leaf.VP_FLUSH, lp=1, rcx=tdvpr)
        assert run(m.lps[0], tdvpr).entry


def test_vcpu_index_and_count_are_what_tdg_vp_info_says(machine):
    td = Td.create(machine)
    vcpus = [half_built_vcpu(td) for _ in range(3)]
    for tdvpr in vcpus:
        machine.ok(Leaf.VP_INIT, rcx=tdvpr)
    machine.ok(Leaf.MR_FINALIZE, rcx=td.tdr)
    for index, tdvpr in enumerate(vcpus):
        regs = run(machine.lps[0], tdvpr, tdcall(TdcallLeaf.VP_INFO)).seen[0].regs
        assert (regs.rax, regs.rcx, regs.r8, regs.r9, regs.r10, regs.r11) == (0, 48, 3 | 4 << 32, index, 1, 0)
