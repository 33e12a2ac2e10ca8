"""Translations of a running TD: they live in the processor until the epoch is over, as blocked ranges show."""

import threading
import time

import pytest
from tdx_machine import PAGE, Leaf, Machine, Td, status

from softtdx.abi.status import Status
from softtdx.hw import Registers
from softtdx.hw.faults import MachineCheck, VmFail

RESET_PAGE = 0xFFFF_F000  # a TD starts at FFFFFFF0H, in 32-bit protected mode, flat segments, no paging
DATA, COUNTER = PAGE, 2 * PAGE
# loop: mov eax, [DATA]; inc dword [COUNTER]; jmp loop
LOOP = bytes.fromhex("a100100000 ff0500200000 ebf3")
EXTERNAL_INTERRUPT, EPT_VIOLATION = 1, 48


class Running:
    """A TD that reads DATA and counts, on the second processor."""

    def __init__(self) -> None:
        self.machine = m = Machine()
        self.td = td = Td.create(m)
        td.add_path(0)
        td.add_path(RESET_PAGE)
        self.data = td.add_page(DATA, b"data")
        self.counter = td.add_page(COUNTER)
        td.add_page(RESET_PAGE, bytes(0xFF0) + LOOP)
        self.vcpu = td.finalize()
        m.ok(Leaf.VP_FLUSH, rcx=self.vcpu)

    def count(self) -> int:
        pa = self.counter | self.td.hkid << 46
        return int.from_bytes(self.machine.platform.memory.read(pa, 4, seam=True), "little")

    def run(self) -> Registers:
        """Enter; once the guest has counted on, or has left by itself, interrupt it. Returns what the host sees."""
        lp = self.machine.lps[1]
        before = self.count()
        result: list[Registers] = []
        thread = threading.Thread(target=lambda: result.append(lp.seamcall(Registers(rax=0, rcx=self.vcpu))))
        thread.start()
        while thread.is_alive() and self.count() < before + 100:
            time.sleep(0.001)
        lp.interrupt()
        thread.join()
        lp.acknowledge_interrupt()
        return result[0]


@pytest.fixture
def running() -> Running:
    return Running()


def test_a_stale_translation_is_used_until_the_range_has_been_tracked(running: Running) -> None:
    m, td = running.machine, running.td
    assert running.run().rax == EXTERNAL_INTERRUPT
    td.block(DATA)
    before = running.count()
    assert running.run().rax == EXTERNAL_INTERRUPT, "the translation is still in the TLB"
    assert running.count() > before
    refused = m.call(Leaf.MEM_PAGE_REMOVE, rcx=DATA, rdx=td.tdr)
    assert status(refused.rax)[0] is Status.TLB_TRACKING_NOT_DONE
    td.track()
    before = running.count()
    left = running.run()
    assert (left.rax, left.r8) == (EPT_VIOLATION, DATA)
    assert running.count() == before
    m.ok(Leaf.MEM_PAGE_REMOVE, rcx=DATA, rdx=td.tdr)


def test_an_unblocked_range_is_back_without_another_word(running: Running) -> None:
    td = running.td
    td.block(DATA)
    td.track()
    assert running.run().rax == EPT_VIOLATION
    running.machine.ok(Leaf.MEM_RANGE_UNBLOCK, rcx=DATA, rdx=td.tdr)
    assert running.run().rax == EXTERNAL_INTERRUPT


def test_a_blocked_table_takes_everything_below_it_away(running: Running) -> None:
    td = running.td
    td.block(0, 2)
    td.track()
    assert (running.run().rax, running.run().r8) == (EPT_VIOLATION, DATA)


def test_a_relocated_page_is_found_at_its_new_place(running: Running) -> None:
    td = running.td
    assert running.run().rax == EXTERNAL_INTERRUPT
    td.block(COUNTER)
    td.track()
    old, running.counter = running.counter, running.machine.page()
    assert running.machine.ok(Leaf.MEM_PAGE_RELOCATE, rcx=COUNTER, rdx=td.tdr, r8=running.counter).rcx == old
    assert running.count() > 0
    assert running.run().rax == EXTERNAL_INTERRUPT


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_a_host_that_writes_into_the_secure_ept_loses_the_module_not_the_tds_secrets(level: int) -> None:
    running = Running()
    table = running.td.tables[0, level + 1] if level < 3 else running.td.tdcx[3]
    running.machine.host_write(table, b"\xff" * 64)
    with pytest.raises(MachineCheck):
        running.machine.call(Leaf.MEM_SEPT_RD, rcx=DATA, rdx=running.td.tdr)
    with pytest.raises(VmFail):
        running.machine.call(Leaf.MEM_TRACK, rcx=running.td.tdr)
    assert b"data" not in running.machine.lps[0].read(running.data, PAGE)
