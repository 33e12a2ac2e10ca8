"""TD-preserving update: TDH.SYS.SHUTDOWN ends the old module, TDH.SYS.UPDATE hands its TDs to the new one."""

import pytest
from tdx_machine import BUFFER, PAGE, Leaf, Machine, Td, status

from softtdx.abi import cpuid
from softtdx.abi.status import Operand, Status
from softtdx.abi.structs import SysInfoTable
from softtdx.hw import Registers
from softtdx.module import TdxModule, tdcs
from softtdx.module.handoff import Handoff
from softtdx.module.state import HkidState, PackageState, Tdmr

VERSION = 1
AVOID_COMPAT_SENSITIVE = 1 << 16
UPDATE_COMPATIBILITY = 1 << 47


def install_again(machine: Machine) -> None:
    """What SEAMLDR.INSTALL does for an update: another module over the same SEAMRR."""
    platform = machine.platform
    table = SysInfoTable.parse(platform.memory.read(platform.seam.base, PAGE, seam=True))
    table.module_hv = table.min_update_hv = table.no_downgrade = 1
    table.num_handoff_pages = 15
    machine.module = TdxModule(platform.lps[0]._seam_cpu, bytes(table))
    platform.seam.module = machine.module


def initialize(machine: Machine, lps: int | None = None) -> None:
    machine.ok(Leaf.SYS_INIT)
    for lp in machine.platform.lps[:lps]:
        assert lp.seamcall(Registers(rax=Leaf.SYS_LP_INIT)).rax == 0


@pytest.fixture
def shut(machine):
    """A machine with a runnable TD of one page, whose module was shut down."""
    machine.td = td = Td.create(machine)
    td.add_path(0)
    td.add_page(0, b"kept through the update")
    td.finalize()
    machine.ok(Leaf.SYS_SHUTDOWN, rcx=VERSION)
    return machine


@pytest.mark.parametrize("rcx", [0, 2, 0xFF, 1 << 17 | VERSION, 1 << 63 | VERSION, (1 << 64) - 1])
def test_shutdown_knows_one_handoff_version_and_one_flag(machine, rcx):
    machine.fails(Leaf.SYS_SHUTDOWN, Status.OPERAND_INVALID, Operand.RCX, rcx=rcx)
    machine.ok(Leaf.PHYMEM_PAGE_RDMD, rcx=0x100_0000)


def test_a_module_that_was_shut_down_answers_nothing_but_lp_shutdown(shut):
    for leaf in Leaf:
        if leaf is not Leaf.SYS_LP_SHUTDOWN:
            shut.fails(leaf, Status.SYS_SHUTDOWN)
    shut.ok(Leaf.SYS_LP_SHUTDOWN)


def test_shutdown_is_refused_while_another_processor_is_in_seam_mode(machine):
    other = machine.lps[1]
    machine.ok(Leaf.SYS_LP_SHUTDOWN, lp=1)
    machine.module.call_of(other.index).busy = True
    machine.fails(Leaf.SYS_SHUTDOWN, Status.SYS_BUSY, rcx=VERSION)
    machine.module.call_of(other.index).busy = False
    machine.ok(Leaf.SYS_SHUTDOWN, rcx=VERSION)


def test_shutdown_may_be_told_to_spare_tds_under_construction(machine):
    rcx = VERSION | AVOID_COMPAT_SENSITIVE
    building = [Td.create(machine) for _ in range(3)]
    machine.fails(Leaf.SYS_SHUTDOWN, Status.UPDATE_COMPATIBILITY_SENSITIVE, 3 << 16, rcx=rcx)
    building[0].finalize()
    machine.fails(Leaf.SYS_SHUTDOWN, Status.UPDATE_COMPATIBILITY_SENSITIVE, 2 << 16, rcx=rcx)
    for td in building[1:]:
        machine.ok(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)
    machine.ok(Leaf.SYS_SHUTDOWN, rcx=rcx)


def test_without_that_flag_a_td_under_construction_goes_over_and_its_measurement_goes_on(machine):
    twins = [Td.create(machine), Td.create(machine)]
    for td in twins:
        td.add_path(0)
        td.add_page(0, b"first")
    twins[0].add_page(PAGE, b"second")
    twins[0].finalize()
    machine.ok(Leaf.SYS_SHUTDOWN, rcx=VERSION)
    install_again(machine)
    initialize(machine)
    machine.ok(Leaf.SYS_UPDATE)
    assert machine.module.g.td_build_count == 1
    twins[1].add_page(PAGE, b"second")
    twins[1].finalize()
    assert machine.module.g.td_build_count == 0
    mrtd = [[machine.ok(Leaf.MNG_RD, rcx=td.tdr, rdx=0x1310_0003_0000_0000 | n).r8 for n in range(6)] for td in twins]
    assert mrtd[0] == mrtd[1] != [0] * 6


def test_the_new_module_takes_the_tds_over(shut):
    td = shut.td
    install_again(shut)
    shut.fails(Leaf.SYS_UPDATE, Status.SYS_STATE_INCORRECT)
    initialize(shut)
    shut.ok(Leaf.SYS_UPDATE)
    assert td.entry(0)[1:] == (4, 0)
    td.block(0)
    td.track()
    page = shut.ok(Leaf.MEM_PAGE_REMOVE, rcx=0, rdx=td.tdr)
    assert page.rax == 0
    shut.fails(Leaf.MNG_CREATE, Status.HKID_NOT_FREE, rcx=shut.page(), rdx=td.hkid)
    Td.create(shut).finalize()


def test_the_handoff_data_are_there_once(shut):
    install_again(shut)
    initialize(shut)
    shut.ok(Leaf.SYS_UPDATE)
    shut.fails(Leaf.SYS_UPDATE, Status.SYS_STATE_INCORRECT)
    install_again(shut)
    initialize(shut)
    shut.fails(Leaf.SYS_UPDATE, Status.SYS_INVALID_HANDOFF)


def test_update_needs_every_processor(shut):
    install_again(shut)
    initialize(shut, lps=1)
    shut.fails(Leaf.SYS_UPDATE, Status.SYS_STATE_INCORRECT)


@pytest.mark.parametrize(
    ("version", "operands", "detail"),
    [
        (2, {}, Operand.RAX),
        (255, {}, Operand.RAX),
        (1, {"r9": 1 << 63}, Operand.R9),
        (1, {"r9": UPDATE_COMPATIBILITY | 1 << 6}, Operand.R9),
        (1, {"r9": UPDATE_COMPATIBILITY, "r10": 1}, Operand.R10),
        (1, {"r9": 1 << 63, "r10": 1}, Operand.R9),
    ],
)
def test_update_version_1_checks_what_it_is_to_enable(shut, version, operands, detail):
    install_again(shut)
    initialize(shut)
    shut.fails(Leaf.SYS_UPDATE, Status.OPERAND_INVALID, detail, version=version, **operands)
    shut.ok(Leaf.SYS_UPDATE, version=1, r9=UPDATE_COMPATIBILITY)
    assert shut.module.g.update_compatibility


def test_a_loaded_module_without_a_predecessor_has_nothing_to_take_over(machine):
    install_again(machine)
    initialize(machine)
    machine.fails(Leaf.SYS_UPDATE, Status.SYS_INVALID_HANDOFF)


def test_the_new_module_may_be_configured_afresh_instead(shut):
    install_again(shut)
    initialize(shut)
    regs = shut.call(Leaf.SYS_CONFIG, rcx=BUFFER, rdx=0, r8=33)
    assert status(regs.rax) == (Status.OPERAND_INVALID, Operand.RDX)


def test_the_new_module_computes_the_same_cpuid_for_a_td(machine):
    def table(td: Td) -> list[bytes]:
        shift = machine.module.g.hkid_shift
        pages = [machine.platform.memory.read(page | td.hkid << shift, PAGE, seam=True) for page in td.tdcx]
        whole = b"".join(pages)
        return [whole[tdcs.CPUID_VALUES :][: 16 * len(cpuid.rows())], whole[tdcs.CPUID_FLAGS :][:32]]

    before = Td.create(machine)
    machine.ok(Leaf.SYS_SHUTDOWN, rcx=VERSION)
    install_again(machine)
    initialize(machine)
    machine.ok(Leaf.SYS_UPDATE)
    assert table(Td.create(machine)) == table(before)


def test_handoff_data_survive_the_way_through_memory():
    data = Handoff(
        hkid=33,
        packages_keyed=3,
        dynamic_pamt=True,
        td_build_count=5,
        mig_interrupted_count=1,
        kot={33: (HkidState.RESERVED, 0), 40: (HkidState.FLUSHED, 3)},
        packages=[PackageState(0, set()), PackageState(7, {40, 41})],
        tdmrs=[
            Tdmr(0, 0, 1 << 30, 1, 2, 3, ((0, 4096), (8192, 4096)), 1 << 29),
            Tdmr(1, 1 << 40, 1 << 30, 4, 5, 6, (), 0),
        ],
    )
    assert Handoff.decode(data.encode()) == data
