"""A host that steps a TD: interrupts right after each entry, page faults over and over. On the real interpreter."""

import pytest
from guest_script import Exit, run
from tdx_machine import Leaf, Machine, Td, status

from softtdx.abi.exits import ExitReason as R
from softtdx.abi.status import Operand, Status
from softtdx.hw import Registers
from softtdx.module import vmcs

CODE = 0xFFFF_F000
COUNT = bytes.fromhex("46ebfd")  # inc esi; jmp back
TOUCH = bytes.fromhex("8b050010feff46ebf7")  # mov eax, [0xFFFE1000]; inc esi; jmp back
DATA = 0xFFFE_1000
NMI_INFO = 0x8000_0202


def build(code: bytes) -> Td:
    """A TD whose vCPU starts with `code` at the reset vector."""
    td = Td.create(Machine())
    td.add_path(CODE)
    td.add_page(CODE, bytes(0xFF0) + code)
    td.add_page(DATA)
    td.finalize()
    return td


def enter(td: Td, **operands: int) -> tuple[Registers, int]:
    """TDH.VP.ENTER, and how many instructions the guest retired."""
    lp = td.machine.lps[0]
    before = lp.core.counters()["instructions"]
    regs = lp.seamcall(Registers(rax=Leaf.VP_ENTER, rcx=td.vcpu_pages[0], **operands))
    return regs, lp.core.counters()["instructions"] - before


# --- single step
def test_an_interrupt_at_each_entry_does_not_single_step_the_guest():
    td = build(COUNT)
    lp = td.machine.lps[0]
    steps = []
    for _ in range(60):
        lp.interrupt()
        regs, retired = enter(td)
        lp.acknowledge_interrupt()
        assert regs.rax == R.EXTERNAL_INTERRUPT
        steps.append(retired)
    assert min(steps) >= 1
    assert max(steps) <= 33
    assert len(set(steps)) > 8  # the host does not know how far the guest came


def test_an_nmi_at_each_entry_does_not_single_step_the_guest():
    td = build(COUNT)
    lp = td.machine.lps[0]
    steps = []
    for _ in range(40):
        lp.core.nmi()
        regs, retired = enter(td)
        assert (regs.rax, regs.r9) == (R.EXCEPTION_OR_NMI, NMI_INFO)
        steps.append(retired)
    assert len(set(steps)) > 8
    assert max(steps) <= 33


def test_the_guest_does_not_see_that_it_was_stepped():
    """Neither a blocked interrupt nor a pending debug trap stays behind."""
    td = build(COUNT)
    lp = td.machine.lps[0]
    for _ in range(10):
        lp.interrupt()
        enter(td)
        lp.acknowledge_interrupt()
    state = [vmcs.INTERRUPTIBILITY, vmcs.PENDING_DEBUG, vmcs.PRIMARY_CONTROLS]
    entry = run(lp, td.vcpu_pages[0], look=state).entry
    assert entry.fields[vmcs.INTERRUPTIBILITY] == 0
    assert entry.fields[vmcs.PENDING_DEBUG] == 0
    assert entry.fields[vmcs.PRIMARY_CONTROLS] & 1 << 27 == 0  # no monitor trap


# --- zero step
def faulting_td() -> Td:
    """A TD whose code touches a page that the host has blocked."""
    td = build(TOUCH)
    td.block(DATA)
    td.track()
    return td


def test_a_host_that_keeps_a_page_away_cannot_replay_the_access_for_ever():
    td = faulting_td()
    entered = 0
    for _ in range(20):
        exits = td.machine.lps[0].core.counters()["exits"]
        regs, retired = enter(td)
        assert (regs.rax, regs.r8) == (R.EPT_VIOLATION, DATA)
        assert retired == 0
        entered += td.machine.lps[0].core.counters()["exits"] - exits
    assert entered == 7  # six are normal life; the seventh is noted; then the vCPU is not entered any more


def test_the_vcpu_runs_again_when_the_page_is_back():
    td = faulting_td()
    for _ in range(10):
        enter(td)
    td.machine.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=DATA, rdx=td.tdr)
    lp = td.machine.lps[0]
    regs, retired = _interrupted(td)
    assert regs.rax == R.EXTERNAL_INTERRUPT
    assert retired
    # Progress was made: the count starts anew.
    td.block(DATA)
    td.track()
    exits = lp.core.counters()["exits"]
    for _ in range(6):
        assert enter(td)[0].rax == R.EPT_VIOLATION
    assert lp.core.counters()["exits"] - exits == 6


def _interrupted(td: Td) -> tuple[Registers, int]:
    lp = td.machine.lps[0]
    lp.interrupt()
    result = enter(td)
    lp.acknowledge_interrupt()
    return result


def test_while_pages_are_suspected_entry_needs_the_sept_lock(monkeypatch):
    td = faulting_td()
    for _ in range(8):
        enter(td)
    module = td.machine.module
    from softtdx.module.locks import EXCLUSIVE
    from softtdx.module.td import LockId

    key = td.tdr | LockId.SEPT
    assert module.g.locks.acquire(key, EXCLUSIVE) == 0
    td.machine.fails(Leaf.VP_ENTER, Status.OPERAND_BUSY, Operand.SEPT_TREE, rcx=td.vcpu_pages[0])
    module.g.locks.release(key, EXCLUSIVE)
    assert enter(td)[0].rax == R.EPT_VIOLATION
    td.machine.ok(Leaf.MEM_TRACK, rcx=td.tdr)  # the refused entries left no reader of an epoch behind
    td.machine.ok(Leaf.MEM_TRACK, rcx=td.tdr)


def test_shared_pages_are_never_suspected():
    """A host may leave its own memory unmapped as long as it likes."""
    td = build(COUNT)
    lp = td.machine.lps[0]
    for _ in range(20):
        gpa = 1 << 47 | 0x5000
        result = run(lp, td.vcpu_pages[0], Exit(R.EPT_VIOLATION, fields={vmcs.PHYSICAL_ADDRESS: gpa}))
        assert (result.host.rax, result.host.r8) == (R.EPT_VIOLATION, gpa)
        assert result.entry


@pytest.mark.parametrize("retired", [0, 1])
def test_a_busy_entry_tells_the_host_nothing_of_the_guest(retired):
    """RCX, RDX and R8 of a refused entry are those of a fault; the other registers are zero."""
    td = faulting_td()
    for _ in range(9 + retired):
        regs, _ = enter(td, rbx=1, rsi=2, r10=3, r15=4)
    left = {name: value for name, value in regs.items() if value}
    assert left.keys() <= {"rax", "rcx", "r8"}
    assert status(regs.rax)[1] == R.EPT_VIOLATION
