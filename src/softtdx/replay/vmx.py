"""The processor's side of a recorded VM exit: VMCS exit fields and registers as hardware would have left them."""

from dataclasses import dataclass
from typing import Any, Final

from softtdx._silicon import Core
from softtdx.hw.registers import GPR_NAMES

__all__ = [
    "EntryState",
    "ExitState",
    "entered",
    "entry_state",
    "exit_fields",
    "is_native",
    "make_exit",
    "read_state",
    "set_state",
]

Step = dict[str, Any]

# VMCS fields (SDM volume 3, appendix B).
MSR_BITMAP: Final = 0x2004
GUEST_PHYSICAL_ADDRESS: Final = 0x2400
GUEST_EFER: Final = 0x2806
ENTRY_INTERRUPTION_INFO: Final = 0x4016
ENTRY_ERROR_CODE: Final = 0x4018
EXIT_REASON: Final = 0x4402
EXIT_INTERRUPTION_INFO: Final = 0x4404
EXIT_ERROR_CODE: Final = 0x4406
IDT_VECTORING_INFO: Final = 0x4408
IDT_VECTORING_ERROR: Final = 0x440A
EXIT_INSTRUCTION_LENGTH: Final = 0x440C
EXIT_INSTRUCTION_INFO: Final = 0x440E
GUEST_CS_AR: Final = 0x4816
GUEST_SS_AR: Final = 0x4818
EXIT_QUALIFICATION: Final = 0x6400
GUEST_LINEAR_ADDRESS: Final = 0x640A
GUEST_CR0: Final = 0x6800
GUEST_RIP: Final = 0x681E

_EXIT_FIELDS: Final = {
    "qual": EXIT_QUALIFICATION,
    "gpa": GUEST_PHYSICAL_ADDRESS,
    "gla": GUEST_LINEAR_ADDRESS,
    "intr": EXIT_INTERRUPTION_INFO,
    "intr_err": EXIT_ERROR_CODE,
    "iinfo": EXIT_INSTRUCTION_INFO,
    "idtvec": IDT_VECTORING_INFO,
    "idtvec_err": IDT_VECTORING_ERROR,
}
_STATE_FIELDS: Final = {
    "EFER": GUEST_EFER,
    "CS.AR": GUEST_CS_AR,
    "SS.AR": GUEST_SS_AR,
    "INTERRUPTIBILITY": 0x4824,
    "ACTIVITY": 0x4826,
    "CR0": GUEST_CR0,
    "CR3": 0x6802,
    "CR4": 0x6804,
    "RIP": GUEST_RIP,
    "RFLAGS": 0x6820,
}
_VALID: Final = 1 << 31
_ERROR_VALID: Final = 1 << 11
_PAGE_FAULT: Final = 14
_CR0_PG: Final = 1 << 31
_WRMSR_OFFSET: Final = 2048
_HIGH_MSRS: Final = 0xC000_0000
_MSR_RANGE: Final = 0x2000


@dataclass(frozen=True)
class ExitState:
    """The guest's registers at a VM exit."""

    gprs: dict[str, int]
    rip: int


@dataclass(frozen=True)
class EntryState:
    """What a VM entry loads: registers, RIP, and the event it delivers."""

    gprs: dict[str, int]
    rip: int
    event: int
    error: int
    cr2: int

    def differences(self, wanted: dict[str, int]) -> list[tuple[str, str, str]]:
        """Registers that are not as wanted; RSP is not compared."""
        return [
            (name, hex(value), hex(self.gprs[name]))
            for name, value in wanted.items()
            if name != "rsp" and self.gprs[name] != value
        ]

    def injection_differences(self, wanted: dict[str, int] | None) -> list[tuple[str, str, str]]:
        """The event as recorded: {vec, type, err}; None: no event."""
        found = self.describe_event()
        expected = "none" if wanted is None else _describe(wanted)
        return [] if found == expected else [("injected event", expected, found)]

    def event_values(self) -> dict[str, int]:
        """The event as recordings have it: vec, type, err, cr2; empty for none."""
        if not self.event & _VALID:
            return {}
        event: dict[str, int] = {"vec": self.event & 0xFF, "type": self.event >> 8 & 7}
        if self.event & _ERROR_VALID:
            event["err"] = self.error
        if event["vec"] == _PAGE_FAULT and event["type"] == 3:
            event["cr2"] = self.cr2
        return event

    def describe_event(self) -> str:
        """The event for people."""
        event = self.event_values()
        return _describe(event) if event else "none"


def _describe(event: dict[str, Any]) -> str:
    values = {name: value if isinstance(value, int) else int(value, 0) for name, value in event.items()}
    return " ".join(f"{name}={values[name]:#x}" for name in ("vec", "type", "err", "cr2") if name in values)


def entry_state(core: Core) -> EntryState:
    """What the module prepared for VM entry."""
    return EntryState(
        dict(zip(GPR_NAMES, core.gprs(), strict=True)),
        core.vmread(GUEST_RIP),
        core.vmread(ENTRY_INTERRUPTION_INFO),
        core.vmread(ENTRY_ERROR_CODE),
        core.cr2,
    )


def entered(core: Core) -> None:
    """VM entry took place: the event is delivered, its valid bit is clear."""
    core.vmwrite(ENTRY_INTERRUPTION_INFO, core.vmread(ENTRY_INTERRUPTION_INFO) & ~_VALID)


def make_exit(core: Core, event: Step, sentinels: dict[str, int]) -> ExitState:
    """Let the recorded VM exit happen: registers of the guest and the exit information fields."""
    gprs = dict.fromkeys(GPR_NAMES, 0) | sentinels
    gprs |= {name: int(value, 0) for name, value in event["in"].items()}
    core.set_gprs(tuple(gprs[name] for name in GPR_NAMES))
    for field in _EXIT_FIELDS.values():
        core.vmwrite(field, 0)
    for name, value in event.get("exit", {}).items():
        core.vmwrite(_EXIT_FIELDS[name], int(value, 0))
    core.vmwrite(EXIT_INSTRUCTION_LENGTH, event.get("ilen", 0))
    core.vmwrite(EXIT_REASON, event["reason"])
    return ExitState(gprs, core.vmread(GUEST_RIP))


def exit_fields(core: Core) -> tuple[dict[str, str], int]:
    """What a VM exit says: the fields that are not 0, and the instruction length."""
    values = {name: core.vmread(field) for name, field in _EXIT_FIELDS.items()}
    return {name: hex(value) for name, value in values.items() if value}, core.vmread(EXIT_INSTRUCTION_LENGTH)


def read_state(core: Core) -> dict[str, int]:
    """State of the guest that its own code changes and the module looks at, by the names of `set_state`."""
    return {name: core.vmread(field) for name, field in _STATE_FIELDS.items()}


def set_state(core: Core, state: dict[str, Any]) -> None:
    """The guest changed its mode, or ran on: EFER, CS and SS access rights, CR0.PG, control registers, RIP."""
    for name, field in _STATE_FIELDS.items():
        if name in state:
            core.vmwrite(field, int(state[name], 0))
    if "CR0.PG" in state:
        cr0 = core.vmread(GUEST_CR0)
        core.vmwrite(GUEST_CR0, cr0 | _CR0_PG if state["CR0.PG"] else cr0 & ~_CR0_PG)


def is_native(core: Core, step: Step) -> bool:
    """Whether RDMSR or WRMSR causes no VM exit, by the MSR bitmaps of the current VMCS."""
    if step["ev"] not in ("rdmsr", "wrmsr"):
        return False
    msr = int(step["in"]["rcx"], 0) & 0xFFFF_FFFF
    if msr < _MSR_RANGE:
        offset = 0
    elif _HIGH_MSRS <= msr < _HIGH_MSRS + _MSR_RANGE:
        offset = 1024
    else:
        return False
    offset += _WRMSR_OFFSET if step["ev"] == "wrmsr" else 0
    bit = msr & (_MSR_RANGE - 1)
    return not core.rd8(core.vmread(MSR_BITMAP) + offset + bit // 8) >> (bit & 7) & 1
