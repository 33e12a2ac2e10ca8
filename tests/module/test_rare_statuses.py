"""Statuses that take an unusual machine, or an unusual moment, to see."""

from dataclasses import replace

import pytest
from guest_script import Exit, run, tdcall
from tdx_machine import Leaf, Machine, Td, status, td_params
from test_sys import NATIVE, Unborn, configure, tdmr

from softtdx.abi.exits import ExitReason
from softtdx.abi.fields import table
from softtdx.abi.leaves import TdcallLeaf
from softtdx.abi.msrs import Msr
from softtdx.abi.status import Operand, Status
from softtdx.hw.seamops import SeamIdentity
from softtdx.module import tdvps
from softtdx.module.td import LockId

TOPOLOGY, CACHE = 0x1F, 4


def topology(**levels: tuple[int, int, int, int]) -> dict:
    return {(TOPOLOGY, int(name[1:])): values for name, values in levels.items()}


@pytest.mark.parametrize(
    ("cpuid", "want", "detail"),
    [
        (topology(_0=(1, 2, 0x101, 0)), Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED, 0),
        (topology(_1=(4, 8, 0x101, 0)), Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED, 0),
        (topology(_0=(1, 2, 0x700, 0)), Status.CPUID_LEAF_1F_FORMAT_UNRECOGNIZED, 0),
        (topology(_0=(1, 2, 0, 0)), Status.CPUID_LEAF_NOT_SUPPORTED, Operand.RAX),
        ({(CACHE, 3): (0x4060, 0x3F, 0, 0)}, Status.INVALID_WBINVD_SCOPE, 0),
    ],
)
def test_a_topology_that_cannot_be_is_refused(cpuid, want, detail):
    Unborn(cpuid=cpuid).fails(Leaf.SYS_INIT, want, detail)


def test_too_many_hkids_are_refused():
    machine = Unborn()
    machine.platform._msrs[Msr.MKTME_KEYID_PARTITIONING] = 4000 << 32 | 31
    machine.fails(Leaf.SYS_INIT, Status.NUM_ACTIVATED_HKIDS_NOT_SUPPORTED, 2048)


def test_a_package_beyond_the_eighth_is_refused():
    machine = Unborn()
    machine.ok(Leaf.SYS_INIT)
    machine.lps[1]._seam_cpu.package = 8
    machine.fails(Leaf.SYS_LP_INIT, Status.INVALID_PKG_ID, 8, lp=1)


def test_seamops_without_reports_are_refused(monkeypatch):
    machine = Unborn()
    monkeypatch.setattr(machine.platform.seamops, "capabilities", lambda: 1)
    machine.fails(Leaf.SYS_INIT, Status.INCOMPATIBLE_SEAM_CAPABILITIES)


def test_keys_are_configured_once_on_each_package():
    machine = Unborn(description=replace(NATIVE, lps=4, packages=2))
    machine.initialize()
    assert configure(machine, [tdmr()])[0] is Status.SUCCESS
    machine.ok(Leaf.SYS_KEY_CONFIG)
    machine.fails(Leaf.SYS_KEY_CONFIG, Status.KEY_CONFIGURED)
    machine.fails(Leaf.MNG_CREATE, Status.SYS_NOT_READY)
    machine.ok(Leaf.SYS_KEY_CONFIG, lp=2)
    while not machine.ok(Leaf.SYS_TDMR_INIT, rcx=0).rdx:
        pass
    machine.ok(Leaf.MNG_CREATE, rcx=0x100_0000, rdx=33)
    machine.ok(Leaf.MNG_KEY_CONFIG, rcx=0x100_0000)
    machine.fails(Leaf.MNG_KEY_CONFIG, Status.KEY_CONFIGURED, rcx=0x100_0000)
    machine.fails(Leaf.MNG_ADDCX, Status.TD_KEYS_NOT_CONFIGURED, rcx=0x100_1000, rdx=0x100_0000)
    machine.ok(Leaf.MNG_KEY_CONFIG, lp=3, rcx=0x100_0000)
    machine.ok(Leaf.MNG_ADDCX, rcx=0x100_1000, rdx=0x100_0000)


# --- in a TD
def test_a_guest_gives_way_to_the_host_and_at_last_to_its_scheduler(machine):
    td = Td.create(machine)
    td.add_path(0)
    td.add_page(0x1000, b"digest")
    td.finalize()
    locks = machine.module.g.locks
    key = td.tdr | LockId.RTMR

    def wanted_by_the_host(core):
        del core
        if key not in locks.state:
            assert locks.acquire(key, True) == 0
            assert locks.acquire(key, True) == Status.OPERAND_BUSY
            locks.release(key, True)

    def much_later(core):
        core.advance_tsc(1 << 40)

    first = tdcall(TdcallLeaf.MR_RTMR_EXTEND, rcx=0x1000, rdx=0)
    first.act = wanted_by_the_host
    second = tdcall(TdcallLeaf.MR_RTMR_EXTEND, rcx=0x1000, rdx=0)
    second.act = much_later
    found = run(machine.lps[0], td.vcpu_pages[0], first, second)
    assert status(found.seen[0].regs.rax) == (Status.OPERAND_BUSY, Operand.RTMR)
    assert status(found.host.rax)[0] is Status.HOST_PRIORITY_BUSY_TIMEOUT


def test_a_machine_check_of_a_td_ends_it(td):
    smi = Exit(ExitReason.OTHER_SMI, fields={0x6400: 1})
    found = run(td.machine.lps[0], td.vcpu_pages[0], smi)
    assert status(found.host.rax)[0] is Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE
    td.machine.fails(Leaf.VP_ENTER, Status.TD_FATAL, rcx=td.vcpu_pages[0])


def test_a_tsc_that_went_back_is_noticed(td):
    machine, tdvpr = td.machine, td.vcpu_pages[0]
    # Time never runs backwards on the platform, so that the last exit is made later instead.
    at = (tdvpr | td.hkid << machine.module.g.hkid_shift) + tdvps.LAST_EXIT_TSC
    machine.platform.memory.write(at, (1 << 60).to_bytes(8, "little"), seam=True)
    machine.fails(Leaf.VP_ENTER, Status.TSC_ROLLBACK, rcx=tdvpr)


def test_a_td_gets_no_report_when_its_module_is_not_in_the_processors_database(machine):
    td = Td.create(machine)
    td.add_path(0)
    td.add_page(0x1000, b"")
    td.finalize()
    machine.platform.seamops.database_clear()
    report = tdcall(TdcallLeaf.MR_REPORT, rcx=0x1400, rdx=0x1000, r8=0)
    found = run(machine.lps[0], td.vcpu_pages[0], report)
    assert status(found.host.rax)[0] is Status.NON_RECOVERABLE_TD_CORRUPTED_MD


def test_posted_interrupts_need_a_vector_and_a_descriptor():
    machine = Machine()
    td = Td.create(machine, params=td_params(attributes=1))
    tdvpr = td.finalize()
    row = next(row for row in table("vmcs").fields if "PIN" in row.name.upper())
    controls = machine.ok(Leaf.VP_RD, rcx=tdvpr, rdx=row.field_id).r8
    machine.fails(
        Leaf.VP_WR,
        Status.TD_VMCS_FIELD_NOT_INITIALIZED,
        2,
        rcx=tdvpr,
        rdx=row.field_id,
        r8=controls | 1 << 7,
        r9=1 << 7,
    )


def test_single_step_defence_needs_the_local_apic(td, monkeypatch):
    lp = td.machine.lps[0]
    monkeypatch.setattr(type(lp), "retired_instructions", lambda lp: 0)
    lp.wrmsr(Msr.APIC_BASE, 0)
    found = run(lp, td.vcpu_pages[0])
    assert status(found.host.rax)[0] is Status.NON_RECOVERABLE_TD_WRONG_APIC_MODE


class Known(Machine):
    """A machine whose processor knows the module, as after SEAMLDR.INSTALL."""

    def _load(self) -> None:
        seamops = self.platform.seamops
        seamops.seamextend(SeamIdentity(bytes(16), bytes(48), bytes(48), 0))
        seamops.database_insert()
        super()._load()


@pytest.fixture
def reporting():
    """A TD with a page at 0x1000, and the page's bus address."""
    machine = Known()
    td = Td.create(machine)
    td.add_path(0)
    page = td.add_page(0x1000, b"")
    td.finalize()
    return td, page | td.hkid << machine.module.g.hkid_shift


@pytest.mark.parametrize(
    ("at", "want"),
    [
        (None, Status.SUCCESS),
        (0x00, Status.INVALID_REPORTMACSTRUCT),  # its type
        (0x10, Status.INVALID_CPUSVN),
        (0x80, Status.INVALID_REPORTMACSTRUCT),  # report data
        (0xFF, Status.INVALID_REPORTMACSTRUCT),  # the MAC itself
    ],
)
def test_a_report_is_verified_bit_by_bit(reporting, at, want):
    td, page = reporting
    memory = td.machine.platform.memory

    def change(core):
        del core
        if at is not None:
            byte = memory.read(page + 0x400 + at, 1, seam=True)[0]
            memory.write(page + 0x400 + at, bytes([byte ^ 1]), seam=True)

    report = tdcall(TdcallLeaf.MR_REPORT, rcx=0x1400, rdx=0x1000, r8=0)
    verify = tdcall(TdcallLeaf.MR_VERIFYREPORT, rcx=0x1400)
    verify.act = change
    found = run(td.machine.lps[0], td.vcpu_pages[0], report, verify)
    assert found.seen[0].regs.rax == 0
    assert status(found.seen[1].regs.rax)[0] is want
