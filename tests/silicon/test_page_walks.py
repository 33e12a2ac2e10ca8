"""Page walks, guest and EPT, against a model in plain Python (SDM volume 3, chapters 5 and 29).

The guest's tables, the EPT and the access are random; the model says which page is reached or which fault or VM exit
is due, with its error code or qualification, and which accessed and dirty bits are set.
"""

import random
import struct
from dataclasses import dataclass

import pytest

from softtdx._silicon import Core, Memory

PRESENT, WRITE, USER, ACCESSED, DIRTY, LARGE, NX = 1, 2, 4, 32, 64, 128, 1 << 63
ADDRESS = 0x000F_FFFF_FFFF_F000

# Guest-physical and host-physical layout. The EPT maps GPA to HPA + SHIFT, so that neither can stand for the other.
SIZE = 0x100_0000
SHIFT = 0x80_0000
TABLES, CODE_TABLES, CODE, DATA = 0x10_000, 0x18_000, 0x20_000, 0x30_000
EPT = 0x4_0000
VMCS = 0x8_0000
LINEAR = 0x80_4060_7000
CODE_LINEAR = 0x10_0000

REASON_EXCEPTION, REASON_VMCALL, REASON_EPT, REASON_MISCONFIG = 0, 18, 48, 49


@dataclass(frozen=True)
class Access:
    """One access by guest software."""

    write: bool
    user: bool
    fetch: bool = False


@dataclass(frozen=True)
class Rules:
    """Control-register bits that change what a walk allows."""

    wp: bool
    smep: bool
    smap: bool
    nxe: bool
    ac: bool


@dataclass
class Fault:
    """#PF with this error code."""

    error: int


@dataclass
class EptExit:
    """A VM exit for this guest-physical address."""

    reason: int
    qualification: int
    gpa: int


@dataclass
class Reached:
    """The guest-physical address of the operand."""

    gpa: int


class Model:
    """The architecture's walk over guest-physical memory, given as 64-bit entries by address."""

    def __init__(self, entries: dict[int, int], ept: dict[int, int], rules: Rules) -> None:
        self.entries = dict(entries)
        self.ept = ept  # guest page -> EPT permissions (bits 2:0); all others allow everything
        self.rules = rules

    def _ept(self, gpa: int, need: int, *, final: bool) -> EptExit | None:
        allowed = self.ept.get(gpa & ~0xFFF, 7)
        if allowed & 3 == 2:
            return EptExit(REASON_MISCONFIG, 0, gpa)
        if allowed & need == need:
            return None
        # Bits 2:0 the access, 5:3 what is allowed, 7 the linear address is valid, 8 it is the final access.
        return EptExit(REASON_EPT, need | allowed << 3 | 1 << 7 | final << 8, gpa)

    def _set(self, at: int, bits: int) -> EptExit | None:
        if self.entries[at] & bits == bits:
            return None
        stop = self._ept(at, WRITE, final=False)
        if stop is None:
            self.entries[at] |= bits
        return stop

    def walk(self, linear: int, access: Access) -> Fault | EptExit | Reached:
        """Each entry used is marked accessed; the last one dirty if a write is allowed."""
        code = access.write << 1 | access.user << 2 | (access.fetch and (self.rules.nxe or self.rules.smep)) << 4
        table, user, write, executable = TABLES, True, True, True
        for shift in (39, 30, 21, 12):
            at = table + (linear >> shift & 511) * 8
            stop = self._ept(at, PRESENT, final=False)
            if stop:
                return stop
            entry = self.entries.get(at, 0)
            if not entry & PRESENT:
                return Fault(code)
            if self._reserved(entry, shift):
                return Fault(code | 9)
            stop = self._set(at, ACCESSED)
            if stop:
                return stop
            user &= bool(entry & USER)
            write &= bool(entry & WRITE)
            executable &= not entry & NX
            if shift == 12 or entry & LARGE:
                break
            table = entry & ADDRESS
        if not self._allowed(access, user=user, write=write, executable=executable):
            return Fault(code | 1)
        stop = self._set(at, DIRTY) if access.write else None
        if stop:
            return stop
        offset = (1 << shift) - 1
        gpa = entry & ADDRESS & ~offset | linear & offset
        need = 4 if access.fetch else 2 if access.write else 1
        return self._ept(gpa, need, final=True) or Reached(gpa)

    def _reserved(self, entry: int, shift: int) -> bool:
        if not self.rules.nxe and entry & NX:
            return True
        if not entry & LARGE or shift == 12:
            return False
        # Bit 12 of a large page's entry is PAT.
        return shift == 39 or bool(entry & ((1 << shift) - 1) & ~0x1FFF)

    def _allowed(self, access: Access, *, user: bool, write: bool, executable: bool) -> bool:
        rules = self.rules
        if access.fetch:
            return executable and (user if access.user else not (user and rules.smep))
        if access.user:
            return user and (write or not access.write)
        if user and rules.smap and not rules.ac:
            return False
        return write or not access.write or not rules.wp


class Guest:
    """A guest with one instruction, on a processor with an EPT."""

    def __init__(self) -> None:
        self.memory = Memory([(0, SIZE)], keyid_bits=0, first_private_keyid=1, integrity="none", tme=False)
        self.core = Core(self.memory, 0)
        self._map_ept()
        self.core.wr32(VMCS, 0x12)
        self.core.configure(vmcs_revision=0x12)
        self.core.vmclear(VMCS)
        self.core.vmptrld(VMCS)
        self.launched = False
        for field, value in {
            0x4000: 1, 0x4002: 1 << 31 | 1 << 7, 0x401E: 2 | 1 << 7, 0x4004: 0xFFFF_FFFF, 0x4012: 1 << 9 | 1 << 15,
            0x201A: EPT | 3 << 3 | 6, 0x2800: (1 << 64) - 1, 0x6802: TABLES,
            0x4820: 1 << 16, 0x4822: 0x8B, 0x480E: 0x67,
        }.items():  # fmt: skip
            self.core.vmwrite(field, value)

    def _map_ept(self) -> None:
        """Four levels: 4 KiB pages below 2 MiB, 2 MiB pages above."""
        core = self.core
        core.wr64(EPT, EPT + 0x1000 | 7)
        core.wr64(EPT + 0x1000, EPT + 0x2000 | 7)
        core.wr64(EPT + 0x2000, EPT + 0x3000 | 7)
        for n in range(512):
            core.wr64(EPT + 0x3000 + n * 8, n * 0x1000 + SHIFT | 7 | 6 << 3)
        for n in range(1, 4):
            core.wr64(EPT + 0x2000 + n * 8, n * 0x20_0000 + SHIFT | 7 | 6 << 3 | LARGE)

    def run(self, entries: dict[int, int], ept: dict[int, int], rules: Rules, access: Access, linear: int) -> int:
        """The exit reason."""
        core = self.core
        for page in (TABLES, TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000):
            core.zero_page(page + SHIFT)
        for at, entry in entries.items():
            core.wr64(at + SHIFT, entry)
        self._code(access)
        for page, rights in ept.items():
            core.wr64(EPT + 0x3000 + (page >> 12) * 8, page + SHIFT | rights | 6 << 3)
        core.invept(2, 0)
        core.vmwrite(0x6800, 0x8000_0021 | rules.wp << 16)
        core.vmwrite(0x6804, 0x20 | rules.smep << 20 | rules.smap << 21)
        core.vmwrite(0x2806, 0x500 | rules.nxe << 11)
        core.vmwrite(0x6820, 2 | rules.ac << 18)
        dpl = 3 << 5 if access.user else 0
        for n in range(6):
            core.vmwrite(0x4814 + 2 * n, (0xA09B if n == 1 else 0xC093) | dpl)
            core.vmwrite(0x4800 + 2 * n, 0xFFFF_FFFF)
        core.vmwrite(0x681E, CODE_LINEAR)
        core.set_gpr(3, linear)
        core.set_gpr(0, 0x1122_3344_5566_7788)
        reason = core.vmenter(not self.launched)
        self.launched = True
        for page in ept:
            core.wr64(EPT + 0x3000 + (page >> 12) * 8, page + SHIFT | 7 | 6 << 3)
        return reason

    def _code(self, access: Access) -> None:
        """MOV RAX, [RBX]; MOV [RBX], RAX; or JMP RBX. VMCALL behind it."""
        code = b"\xff\xe3" if access.fetch else b"\x48\x89\x03" if access.write else b"\x48\x8b\x03"
        self.core.write(CODE + SHIFT, code + b"\x0f\x01\xc1")
        link = PRESENT | WRITE | (USER if access.user else 0) | ACCESSED
        self.core.wr64(TABLES + SHIFT, CODE_TABLES | link)
        self.core.wr64(CODE_TABLES + SHIFT, CODE_TABLES + 0x1000 | link)
        self.core.wr64(CODE_TABLES + 0x1000 + SHIFT, CODE_TABLES + 0x2000 | link)
        self.core.wr64(CODE_TABLES + 0x2000 + (CODE_LINEAR >> 12 & 511) * 8 + SHIFT, CODE | link)


@dataclass
class Scene:
    """A random address space, and an access to it."""

    entries: dict[int, int]
    ept: dict[int, int]
    rules: Rules
    access: Access
    linear: int


def scene(rng: random.Random) -> Scene:
    linear = LINEAR | rng.randrange(0xFF8)
    large = rng.choice([None, None, None, 21, 30, 39])
    entries: dict[int, int] = {}
    table = TABLES
    for depth, shift in enumerate((39, 30, 21, 12)):
        bits = PRESENT | WRITE | USER | rng.choice([0, ACCESSED]) | rng.choice([0, DIRTY])
        for bit, chance in [(PRESENT, 0.03), (WRITE, 0.15), (USER, 0.15)]:
            bits &= ~bit if rng.random() < chance else -1
        bits |= NX if rng.random() < 0.1 else 0
        at = table + (linear >> shift & 511) * 8
        if shift in {large, 12}:
            base = {12: DATA, 21: rng.choice([0x20_0000, 0x40_0000]), 30: 0, 39: 0}[shift]
            bits |= LARGE if shift == large else 0
            bits |= 1 << 13 if shift == large and rng.random() < 0.1 else 0
            entries[at] = base | bits
            break
        table = TABLES + 0x1000 * (depth + 1)
        entries[at] = table | bits
    ept = {}
    if rng.random() < 0.4:
        page = rng.choice([TABLES + 0x1000, TABLES + 0x2000, TABLES + 0x3000, DATA])
        ept[page] = rng.choice([0, 1, 2, 3, 4, 5, 6])
    rules = Rules(*(rng.random() < 0.5 for _ in range(5)))
    kind = rng.randrange(3)
    return Scene(entries, ept, rules, Access(kind == 1, rng.random() < 0.5, kind == 2), linear)


def check(guest: Guest, case: Scene) -> str:
    """Runs the scene on both and says which way it went."""
    model = Model(case.entries, case.ept, case.rules)
    expected = model.walk(case.linear, case.access)
    content = struct.unpack("<Q", b"\x0f\x01\xc1\x90" + struct.pack("<I", case.linear & 0xFFFF_FFFF))[0]
    if isinstance(expected, Reached):
        guest.core.write(expected.gpa + SHIFT, content.to_bytes(8, "little"))
    reason = guest.run(case.entries, case.ept, case.rules, case.access, case.linear)
    core = guest.core
    if isinstance(expected, Fault):
        assert reason == REASON_EXCEPTION, (case, expected, reason)
        assert core.vmread(0x4404) & 0xFF == 14
        assert core.vmread(0x4406) == expected.error, (case, expected)
        assert core.vmread(0x6400) == case.linear
    elif isinstance(expected, EptExit):
        assert reason == expected.reason, (case, expected, reason)
        assert core.vmread(0x2400) == expected.gpa, (case, expected)
        if reason == REASON_EPT:
            # Whether the update of an accessed or dirty bit counts as a read too is left open.
            mask = 0x1BF & ~(1 if expected.qualification & 0x102 == 2 else 0)
            assert core.vmread(0x6400) & mask == expected.qualification & mask, (case, expected)
            assert core.vmread(0x640A) == case.linear
    else:
        assert reason == REASON_VMCALL, (case, expected, reason)
        if case.access.fetch:
            assert core.vmread(0x681E) == case.linear
        elif case.access.write:
            assert core.rd64(expected.gpa + SHIFT) == 0x1122_3344_5566_7788
        else:
            assert core.gpr(0) == content
    found = {at: core.rd64(at + SHIFT) for at in case.entries}
    assert found == model.entries, (case, expected)
    return type(expected).__name__


def test_walks_reach_fault_and_exit_as_the_model_says() -> None:
    rng, guest = random.Random(11), Guest()
    ways = [check(guest, scene(rng)) for _ in range(4000)]
    assert {way: ways.count(way) > 200 for way in ("Reached", "Fault", "EptExit")} == dict.fromkeys(
        ("Reached", "Fault", "EptExit"), True
    )


@pytest.mark.nightly
def test_a_hundred_thousand_walks_go_as_the_model_says() -> None:
    rng, guest = random.Random(12), Guest()
    for _ in range(100_000):
        check(guest, scene(rng))


@pytest.mark.parametrize("access", [Access(w, u, f) for w, f in ((0, 0), (1, 0), (0, 1)) for u in (False, True)])
def test_an_open_page_is_reached_by_every_access(access: Access) -> None:
    access = Access(bool(access.write), access.user, bool(access.fetch))
    bits = PRESENT | WRITE | (USER if access.user else 0)
    entries = {
        TABLES + (LINEAR >> 39 & 511) * 8: TABLES + 0x1000 | bits,
        TABLES + 0x1000 + (LINEAR >> 30 & 511) * 8: TABLES + 0x2000 | bits,
        TABLES + 0x2000 + (LINEAR >> 21 & 511) * 8: TABLES + 0x3000 | bits,
        TABLES + 0x3000 + (LINEAR >> 12 & 511) * 8: DATA | bits,
    }
    rules = Rules(wp=True, smep=True, smap=True, nxe=True, ac=False)
    assert check(Guest(), Scene(entries, {}, rules, access, LINEAR)) == "Reached"
