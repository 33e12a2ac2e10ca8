"""The host overwrites what belongs to a TD: the TD, and nobody else, ends when its processor consumes the poison."""

import pytest
from guest_script import run
from tdx_machine import BUFFER, Leaf, Machine, Td, status
from test_stepping import CODE, COUNT, DATA, TOUCH, build, enter

from softtdx.abi.exits import ExitReason
from softtdx.abi.fields import NULL_FIELD_ID
from softtdx.abi.status import Status
from softtdx.hw.faults import MachineCheck

MACHINE_CHECK = 0x8000_0312
ADDRESS = 0x3FFF_FFFF_F000


def page_of(td: Td, what: str) -> int:
    """The physical address, without KeyID, of the line to overwrite."""
    if what == "S-EPT":
        return next(page for (_, level), page in td.tables.items() if level == 1) + (DATA >> 12 & 511) * 8 & ~63
    gpa = {"data": DATA, "code": CODE}[what]
    return (td.entry(gpa)[0] & ADDRESS) + (0xFC0 if what == "code" else 0)


@pytest.mark.parametrize("what", ["data", "code", "S-EPT"])
def test_poison_that_a_td_consumes_ends_it(what):
    td = build(TOUCH)
    machine = td.machine
    neighbour = Td.create(machine)
    neighbour.finalize()
    machine.host_write(page_of(td, what), b"\xcc" * 64)
    regs, _ = enter(td)
    assert status(regs.rax) == (Status.NON_RECOVERABLE_TD_NON_ACCESSIBLE, ExitReason.EXCEPTION_OR_NMI)
    assert regs.r9 == MACHINE_CHECK
    machine.fails(Leaf.VP_ENTER, Status.TD_FATAL, rcx=td.vcpu_pages[0])
    # The module lives, and so do other TDs.
    assert run(machine.lps[0], neighbour.vcpu_pages[0]).entry
    # What is left of the TD can be torn down.
    machine.ok(Leaf.VP_FLUSH, rcx=td.vcpu_pages[0])
    machine.ok(Leaf.MNG_VPFLUSHDONE, rcx=td.tdr)


def test_poison_that_nobody_touches_harms_nobody():
    td = build(COUNT)
    td.machine.host_write(page_of(td, "data"), b"\xcc" * 64)
    lp = td.machine.lps[0]
    lp.interrupt()
    assert enter(td)[0].rax == ExitReason.EXTERNAL_INTERRUPT
    lp.acknowledge_interrupt()


@pytest.mark.parametrize(
    ("leaf", "operands"),
    [
        (Leaf.SYS_INFO, {"rdx": 1024, "r8": BUFFER, "r9": 32}),
        (Leaf.SYS_INFO, {"rcx": BUFFER, "rdx": 1024, "r9": 32}),
        (Leaf.SYS_RDALL, {"r8": NULL_FIELD_ID}),
    ],
    ids=["SYS.INFO rcx", "SYS.INFO r8", "SYS.RDALL rdx"],
)
def test_a_leaf_that_writes_for_the_host_may_be_aimed_at_a_td_as_the_hosts_own_stores_may(leaf, operands):
    """An output operand is checked to be the host's by its KeyID alone: the PAMT is not asked."""
    machine = Machine()
    td = Td.create(machine)
    target = {"rcx", "r8"} - operands.keys() if leaf is Leaf.SYS_INFO else {"rdx"}
    machine.ok(leaf, **operands, **dict.fromkeys(target, td.tdr))
    with pytest.raises(MachineCheck):
        machine.call(Leaf.MEM_SEPT_RD, rcx=3, rdx=td.tdr)
    assert machine.platform.seam.module is None, "a machine check in SEAM root mode ends the module"
