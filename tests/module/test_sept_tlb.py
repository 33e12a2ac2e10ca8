"""Translations of a running TD: they live in the processor until the epoch is over, as blocked ranges show."""

import struct
import threading
import time
from collections.abc import Callable

import pytest
from tdx_machine import PAGE, Leaf, Machine, Td, status

from softtdx.abi.status import Operand, Status
from softtdx.hw import Registers
from softtdx.hw.faults import MachineCheck, VmFail
from softtdx.module import tdcs, tdr
from softtdx.module.td import LockId

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


def at_the_epoch_of(running: Running, action: Callable[[], object]) -> int:
    """The first time that the second processor has looked at TD_EPOCH, `action` comes in between; where it lies."""
    m, td = running.machine, running.td
    first_page = m.platform.memory.read(td.tdr + tdr.TDCX_PA | m.module.g.global_key_bits, 8, seam=True)
    epoch_at = (int.from_bytes(first_page, "little") | td.hkid << 46) + tdcs.TD_EPOCH
    cpu = m.lps[1]._seam_cpu
    load = cpu.rd64
    seen: list[int] = []

    def rd64(pa: int) -> int:
        value = load(pa)
        if pa == epoch_at and not seen:
            seen.append(value)
            action()
        return value

    cpu.rd64 = rd64
    return epoch_at


def references(running: Running, epoch_at: int) -> tuple[int, int]:
    """How many vCPUs run that entered in even and in odd epochs."""
    at = epoch_at - tdcs.TD_EPOCH + tdcs.REFCOUNT
    return struct.unpack("<2H", running.machine.platform.memory.read(at, 4, seam=True))


def test_a_vcpu_that_enters_while_the_epoch_advances_is_in_the_new_one(running: Running) -> None:
    assert running.run().rax == EXTERNAL_INTERRUPT
    running.td.block(DATA)
    tracked: list[None] = []
    epoch_at = at_the_epoch_of(running, lambda: tracked.append(running.td.track()))
    before = running.count()
    left = running.run()
    assert tracked == [None]
    assert (left.rax, left.r8, running.count()) == (EPT_VIOLATION, DATA, before)
    assert references(running, epoch_at) == (0, 0)
    running.td.track()
    running.machine.ok(Leaf.MEM_PAGE_REMOVE, rcx=DATA, rdx=running.td.tdr)


def test_a_vcpu_that_enters_while_the_epoch_is_locked_is_turned_away_and_not_counted(running: Running) -> None:
    m, td = running.machine, running.td
    key = td.tdr | LockId.EPOCH
    epoch_at = at_the_epoch_of(running, lambda: m.module.g.locks.acquire(key, True))
    busy = m.call(Leaf.VP_ENTER, lp=1, rcx=running.vcpu)
    assert status(busy.rax) == (Status.OPERAND_BUSY, Operand.TD_EPOCH)
    assert references(running, epoch_at) == (0, 0)
    m.module.g.locks.release(key, True)
    td.track()
    assert running.run().rax == EXTERNAL_INTERRUPT
    assert references(running, epoch_at) == (0, 0)
