"""A vCPU whose VM exits a test lists: one TDH.VP.ENTER, the exits in turn, and what the guest finds after each."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from softtdx.abi.exits import INFO_ERROR_CODE, INFO_TYPE_MASK, INFO_VALID, ExitReason
from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf
from softtdx.hw import Registers
from softtdx.hw.lp import LogicalProcessor
from softtdx.hw.registers import GPR_NAMES
from softtdx.module import vmcs

RIP = 0x1000
EFER_64BIT, CS_64BIT = 0x500, 0xA09B
INTERRUPT_VECTOR = 0x20
UD, DF, GP, PF, VE = 6, 8, 13, 14, 20


@dataclass
class Exit:
    """A VM exit: its reason, the guest's registers then, and VMCS fields that differ from a plain exit at RIP."""

    reason: int
    gprs: dict[str, int] = field(default_factory=dict)
    fields: dict[int, int] = field(default_factory=dict)
    act: Callable[[Any], None] | None = None  # anything else, on the Core

    def apply(self, core: Any) -> int:
        """Make it happen on the Core; returns the exit reason."""
        state = {
            vmcs.EFER: EFER_64BIT,
            vmcs.CS_ACCESS_RIGHTS: CS_64BIT,
            vmcs.SS_ACCESS_RIGHTS: 0xC093,
            vmcs.RIP: RIP,
            vmcs.RFLAGS: 2,
            vmcs.INTERRUPTIBILITY: 0,
            vmcs.EXIT_REASON: self.reason,
            vmcs.EXIT_QUALIFICATION: 0,
            vmcs.INSTRUCTION_LENGTH: 2,
            vmcs.EXIT_INTERRUPTION_INFO: 0,
            vmcs.IDT_VECTORING_INFO: 0,
        }
        for at, value in (state | self.fields).items():
            core.vmwrite(at, value)
        core.set_gprs(tuple(self.gprs.get(name, 0) for name in GPR_NAMES))
        if self.act:
            self.act(core)
        return self.reason


def tdcall(leaf: TdcallLeaf, version: int = 0, **gprs: int) -> Exit:
    """A TDCALL in 64-bit mode."""
    return Exit(ExitReason.TDCALL, {"rax": leaf | version << 16, **gprs}, {vmcs.INSTRUCTION_LENGTH: 4})


def interrupt() -> Exit:
    """An external interrupt."""
    return Exit(
        ExitReason.EXTERNAL_INTERRUPT,
        fields={vmcs.INSTRUCTION_LENGTH: 0, vmcs.EXIT_INTERRUPTION_INFO: INFO_VALID | INTERRUPT_VECTOR},
    )


@dataclass
class Seen:
    """What the guest finds when it goes on: registers, RIP relative to the exit, and the event that is injected."""

    regs: Registers
    rip: int
    event: int  # VM-entry interruption information, 0 for none
    error: int
    fields: dict[int, int]
    xcr0: int

    @property
    def vector(self) -> int | None:
        """The vector of the injected event."""
        return self.event & 0xFF if self.event else None

    @property
    def outcome(self) -> str:
        """'next' (behind the instruction), 'again' (at it, no event), or the injected vector as '#n'."""
        if self.event:
            return f"#{self.vector}"
        return "again" if self.rip == RIP else "next"


@dataclass
class Run:
    """One visit to the TD: `host` are the host's registers afterwards; `seen[n]` is what followed exit n."""

    host: Registers
    entry: Seen | None
    seen: list[Seen]

    @property
    def left_at(self) -> int:
        """The index of the exit with which the vCPU left."""
        return len(self.seen)


class Engine:
    """In place of the interpreter: makes the listed exits, then an external interrupt."""

    def __init__(self, exits: Iterable[Exit], look: Iterable[int] = ()) -> None:
        """`look`: VMCS fields to note at each entry."""
        self.exits = iter(exits)
        self.look = tuple(look)
        self.seen: list[Seen] = []

    def __call__(self, core: Any, launch: bool) -> int:
        """A VM entry, and the next VM exit."""
        event = core.vmread(vmcs.ENTRY_INFO)
        self.seen.append(
            Seen(
                Registers(**dict(zip(GPR_NAMES, core.gprs(), strict=True))),
                core.vmread(vmcs.RIP),
                event if event & INFO_VALID else 0,
                core.vmread(vmcs.ENTRY_ERROR_CODE) if event & INFO_ERROR_CODE else 0,
                {at: core.vmread(at) for at in self.look},
                core.xcr0,
            )
        )
        core.vmwrite(vmcs.ENTRY_INFO, event & ~INFO_VALID)
        return next(self.exits, interrupt()).apply(core)


def run(lp: LogicalProcessor, tdvpr: int, *exits: Exit, look: Iterable[int] = (), **host: int) -> Run:
    """TDH.VP.ENTER with these host registers (RCX: the TDVPR); the TD leaves at the latest by an interrupt."""
    engine = Engine(exits, look)
    lp.guest_engine = engine
    try:
        regs = lp.seamcall(Registers(**{"rax": SeamcallLeaf.VP_ENTER, "rcx": tdvpr} | host))
    finally:
        lp.guest_engine = None
    return Run(regs, engine.seen[0] if engine.seen else None, engine.seen[1:])


def one(lp: LogicalProcessor, tdvpr: int, exit_: Exit, look: Iterable[int] = ()) -> Seen:
    """One exit that does not leave to the host, and what the guest finds then."""
    result = run(lp, tdvpr, exit_, look=look)
    assert result.seen, f"the vCPU left with RAX={result.host.rax:#x}"
    return result.seen[0]


def event_type(event: int) -> int:
    """Bits 10:8 of interruption information: 2 NMI, 3 hardware exception."""
    return (event & INFO_TYPE_MASK) >> 8
