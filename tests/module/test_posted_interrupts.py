"""Interrupts for a TD: the host posts, the processor delivers through the virtual-APIC page, the module stays out."""

import pytest
from tdx_machine import HOST, Leaf, Machine, Td

from softtdx.abi import fields
from softtdx.abi.exits import ExitReason
from softtdx.abi.vmcs_field import VmcsField
from softtdx.hw import Registers

CODE, DATA = 0xFFFF_F000, 0xFFFE_1000
MARK = 0x1000_0000  # the handler touches this address, which nothing maps
DESCRIPTOR = HOST + 0x4000
NOTIFICATION = 0xF2
VECTOR = 0x40
OUTSTANDING = 1 << 0  # bit 256 of the descriptor
PIN_POSTED = 1 << 7
# 32-bit: lgdt; lidt; reload CS, SS, DS, ESP; sti; then inc esi for ever. Handler of vector 40h at 27h: x2APIC EOI,
# mov eax, [MARK], iret.
MAIN = bytes.fromhex(
    "0f011500f3ffff0f011d08f3ffffea15f0ffff0800b8100000008ed08ed8bc001ffefffb46ebfdb90b08000031c031d20f30a100000010cf"
)
TABLES = {
    0x300: bytes.fromhex("170010f3ffff0000070400f2ffff"),  # GDTR, IDTR
    0x310: bytes(8) + bytes.fromhex("ffff0000009bcf00ffff00000093cf00"),
    0x400: bytes.fromhex("27f00800008effff"),  # the gate of vector 40h
    0xFF0: bytes.fromhex("e90bf0ffff"),  # the reset vector: jmp CODE
}


def field(encoding: int) -> int:
    return next(row for row in fields.table("vmcs").fields if row.vmcs_encoding == encoding).field_id


@pytest.fixture
def td():
    """A TD that waits for interrupts, with a posted-interrupt descriptor in the host's memory."""
    machine = Machine()
    td = Td.create(machine)
    td.add_path(CODE)
    page = bytearray(4096)
    for at, data in {0: MAIN, **TABLES}.items():
        page[at : at + len(data)] = data
    td.add_page(CODE, bytes(page))
    td.add_page(DATA)
    td.finalize()
    machine.host_write(DESCRIPTOR, bytes(64))
    where = {"rcx": td.vcpu_pages[0]}
    machine.ok(Leaf.VP_WR, **where, rdx=field(VmcsField.POSTED_INTERRUPT_VECTOR), r8=NOTIFICATION, r9=0xFFFF)
    machine.ok(Leaf.VP_WR, **where, rdx=field(VmcsField.POSTED_INTERRUPT_DESCRIPTOR), r8=DESCRIPTOR, r9=(1 << 64) - 1)
    machine.ok(Leaf.VP_WR, **where, rdx=field(VmcsField.PIN_BASED_CONTROLS), r8=PIN_POSTED, r9=PIN_POSTED)
    return td


def post(td: Td, vector: int) -> None:
    """The host's half: the vector into the descriptor, and a notification."""
    machine = td.machine
    machine.host_write(DESCRIPTOR + vector // 8, bytes([1 << vector % 8]))
    machine.host_write(DESCRIPTOR + 32, bytes([OUTSTANDING]))
    machine.lps[0].core.posted_interrupt()


def enter(td: Td) -> Registers:
    return td.machine.lps[0].seamcall(Registers(rax=Leaf.VP_ENTER, rcx=td.vcpu_pages[0]))


def interrupted(td: Td) -> Registers:
    lp = td.machine.lps[0]
    lp.interrupt()
    regs = enter(td)
    lp.acknowledge_interrupt()
    return regs


def test_a_posted_interrupt_reaches_the_guests_handler(td):
    while td.machine.lps[0].core.retired < 40:  # until the guest has set up its tables
        assert interrupted(td).rax == ExitReason.EXTERNAL_INTERRUPT
    post(td, VECTOR)
    regs = enter(td)
    assert (regs.rax, regs.r8) == (ExitReason.EPT_VIOLATION, MARK)
    assert td.machine.lps[0].read(DESCRIPTOR, 33) == bytes(33)  # taken: no request, nothing outstanding


def test_an_interrupt_posted_before_the_guest_takes_interrupts_waits(td):
    post(td, VECTOR)
    regs = enter(td)
    assert (regs.rax, regs.r8) == (ExitReason.EPT_VIOLATION, MARK)


def test_without_a_notification_nothing_is_delivered(td):
    machine = td.machine
    machine.host_write(DESCRIPTOR + VECTOR // 8, bytes([1 << VECTOR % 8]))
    for _ in range(5):
        assert interrupted(td).rax == ExitReason.EXTERNAL_INTERRUPT
    assert machine.lps[0].read(DESCRIPTOR + VECTOR // 8, 1) != b"\0"


def test_the_processor_drops_what_is_posted_with_an_exceptions_vector(td):
    while td.machine.lps[0].core.retired < 40:
        interrupted(td)
    for vector in range(31):
        post(td, vector)
        assert interrupted(td).rax == ExitReason.EXTERNAL_INTERRUPT
        assert td.machine.lps[0].read(DESCRIPTOR, 33) == bytes(33)
    post(td, VECTOR)
    assert enter(td).r8 == MARK
