"""What a boot is reported as: one JSON-able dictionary."""

from typing import Any

from softtdx.abi.exits import ExitReason
from softtdx.abi.leaves import TdcallLeaf
from softtdx.attest.tdreport import parse_tdreport
from softtdx.hw import EventStream
from softtdx.vmm.linux.machine import LinuxMachine, Stage
from softtdx.vmm.machine import MachineResult
from softtdx.vmm.quoting import QuotingService

__all__ = ["boot_report"]

_KERNEL_LINE = b"Run /init as init process"


def boot_report(
    machine: LinuxMachine, result: MachineResult, events: EventStream, quoting: QuotingService | None
) -> dict[str, Any]:
    """Numbers and measurements of a run that has ended."""
    userspace = machine.stage is Stage.USERSPACE or _KERNEL_LINE in result.console
    exits = {name.removeprefix("exits:"): n for name, n in result.stats.items() if name.startswith("exits:")}
    return {
        "end": result.end.value,
        "message": result.message,
        "stage": machine.stage.name.lower(),
        "userspace": userspace,
        "guest_status": result.status if machine.exit_status is None else machine.exit_status,
        "guest_instructions": result.instructions,
        "mips": round(result.instructions / result.wall_s / 1e6, 1) if result.wall_s else 0.0,
        "wall_s": round(result.wall_s, 3),
        "td_exits": dict(sorted(exits.items())),
        "tdvmcalls": {
            name.removeprefix("tdvmcall:"): n
            for name, n in sorted(result.stats.items())
            if name.startswith("tdvmcall:")
        },
        "tdcalls": _by_name(events, "tdcall", {int(leaf): leaf.name for leaf in TdcallLeaf}),
        "ve": _by_name(events, "ve", {int(reason): reason.name for reason in ExitReason}),
        "mrtd": result.mrtd.hex() if result.mrtd else None,
        "rtmrs": _rtmrs(quoting),
        "console": result.console.decode("utf-8", "replace"),
    }


def _by_name(events: EventStream, kind: str, names: dict[int, str]) -> dict[str, int]:
    return {
        names.get(number, str(number)): count
        for (found, number), count in sorted(events.by_number.items())
        if found == kind
    }


def _rtmrs(quoting: QuotingService | None) -> list[str] | None:
    """From the last TDREPORT that the guest had quoted: nobody but the TD may read its RTMRs."""
    if quoting is None or quoting.last_report is None:
        return None
    info = parse_tdreport(quoting.last_report).td_info
    return [value.hex() for value in (info.rtmr0, info.rtmr1, info.rtmr2, info.rtmr3)]
