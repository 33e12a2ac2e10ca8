"""Plays a recording against a TDX module and compares every answer.

Host steps are SEAMCALLs; a TD runs no code: the player stands in for the processor in SEAM non-root mode and makes
the recorded VM exits happen. Every VM entry is a greenlet of its own, which waits while other logical processors'
steps are played, so that TDs may be entered and left in any order.

Steps of a `discard` group, and each recording behind its base, run in a forked copy of the process: the state they
leave is thrown away.
"""

import os
import pickle
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from greenlet import getcurrent, greenlet

from softtdx._silicon import Core
from softtdx.abi.status import Status, status_of
from softtdx.hw.faults import SiliconFault
from softtdx.hw.platform import Platform
from softtdx.hw.registers import GPR_NAMES, Registers
from softtdx.hw.seamops import SeamIdentity
from softtdx.module import TdxModule

from . import ignore, vmx
from .memory import GuestMemory
from .report import Mismatch, Report
from .trace import PLATFORM_FILE, RecordedPlatform, Trace, TraceError, load_platform, load_trace

__all__ = ["Player", "replay"]

Step = dict[str, Any]
Differences = list[tuple[str, str, str]]
_LATER: Final = "service TDs, migration and L2 VMs come later"
COMPARED: Final = tuple(name for name in GPR_NAMES if name != "rsp")


class _LeaveTdError(Exception):
    """Ours went into a TD, or stayed there, where the recording did not: get out of the VM entry."""


class Player:
    """One platform and module, and the recording being played on it."""

    def __init__(self, recorded: RecordedPlatform, report: Report) -> None:
        """Power on the recorded machine and install the module."""
        self.recorded = recorded
        self.report = report
        self.platform = Platform(recorded.description)
        self.platform.seamops.seamextend(_identity(recorded.tee_tcb_info))
        self.platform.seamops.database_insert()
        cpu = self.platform.lps[0]._seam_cpu
        self.module = TdxModule(cpu, recorded.sysinfo)
        self.platform.seam.module = self.module
        self.memory = GuestMemory(self.platform, self.module)
        for lp in self.platform.lps:
            lp.guest_engine = partial(self._guest, lp.index)
        self.trace: Trace
        self.at = 0
        self.end = 0
        self.inside: dict[int, _Visit] = {}  # the VM entries we are in, by logical processor
        self.child_pipe: int | None = None

    # --- the steps
    def play(self, trace: Trace) -> None:
        """Play a whole recording. The platform must be in the state that its base leaves."""
        self.trace, self.at, self.end = trace, 0, len(trace.steps)
        while self.at < self.end:
            self._next()
        for visit in list(self.inside.values()):
            self._abandon(visit)

    def _next(self) -> None:
        """Play the step at `at`, or the group of throw-away steps that starts there."""
        step = self.trace.steps[self.at]
        if "discard" in step and self.child_pipe is None:
            self._discard_group(step["discard"])
            return
        self.at += 1
        if step.get("who") == "td":
            self._td_step(step)
        elif step.get("who") == "host":
            self._host_step(step)
        else:
            try:
                self._operation(step)
            except (LookupError, SiliconFault) as error:
                self._count(step, str(step.get("op")), "", [("error", "none", f"{type(error).__name__}: {error}")])

    def _operation(self, step: Step) -> None:
        lp, op = self.platform.lps[0], step.get("op")
        if op == "mem":
            lp.write(int(step["pa"], 0), _bytes(step))
        elif op == "read":
            self._compare_memory(step, lp.read(int(step["pa"], 0), step["len"]))
        elif op == "gmem":
            self.memory.write(int(step["tdr"], 0), int(step["gpa"], 0), _bytes(step))
        elif op == "gread":
            self._compare_memory(step, self.memory.read(int(step["tdr"], 0), int(step["gpa"], 0), step["len"]))
        elif op not in ("note", "result", "header"):
            self.report.skip(f"operation {op}")

    def _compare_memory(self, step: Step, found: bytes) -> None:
        wanted = _bytes(step)
        differences: Differences = [
            (f"offset {at:#x}", wanted[at : at + 16].hex(), found[at : at + 16].hex())
            for at in range(0, len(wanted), 16)
            if not ignore.memory(step, at) and wanted[at : at + 16] != found[at : at + 16]
        ]
        self._count(step, f"{step['op']} {step.get('what', '')}".strip(), "", differences)

    # --- host steps
    def _host_step(self, step: Step) -> None:
        index = step["lp"]
        if index in self.inside:
            self.report.skip("the logical processor is still inside a TD")
            return
        if ignore.comes_later(step):
            self.report.skip(_LATER)
            return
        regs = Registers(**self.recorded.host_sentinels)
        regs.rax = int(step["rax"], 0) if "rax" in step else step["leaf"] | step.get("v", 0) << 16
        for name, value in step["in"].items():
            setattr(regs, name, int(value, 0))
        before = dict(regs.items())
        if step["leaf"] == 0 and step.get("v", 0) == 0 and "rax" not in step:
            self._enter(step, regs, before)
            return
        problem = self._seamcall(index, regs)
        if problem:
            self._count(step, step["name"], step["st"], [("error", "none", problem)])
            return
        self._count(step, step["name"], step["st"], self._host_differences(step, regs, before))

    def _host_differences(self, step: Step, regs: Registers, before: dict[str, int]) -> Differences:
        differences: Differences = []
        wanted = int(step["st"], 0) if step["st"] != "entered" else None
        if wanted is None:
            return [("st", "entered", _status(regs.rax))]
        if wanted != regs.rax:
            differences.append(("st", _status(wanted), _status(regs.rax)))
        skip = ignore.host_registers(step)
        for name in COMPARED[1:]:
            expected = int(step["out"][name], 0) if name in step["out"] else before[name]
            if name not in skip and getattr(regs, name) != expected:
                differences.append((name, hex(expected), hex(getattr(regs, name))))
        return differences

    def _seamcall(self, index: int, regs: Registers) -> str:
        """The call; a Python exception out of the module is an answer too, and a wrong one."""
        try:
            self.platform.lps[index].seamcall(regs)
        except _LeaveTdError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return ""

    # --- TD entry, VM exits, TD exit
    def _enter(self, step: Step, regs: Registers, before: dict[str, int]) -> None:
        visit = self.inside[step["lp"]] = _Visit(step["lp"], step, greenlet(self._visit))
        self._go_on(visit, visit, regs, before)

    def _go_on(self, visit: "_Visit", *values: object) -> None:
        """Let a VM entry go on until it needs its next recorded VM exit, or is over."""
        visit.flow.switch(*values)
        if visit.flow.dead:
            del self.inside[visit.lp]

    def _abandon(self, visit: "_Visit") -> None:
        """The recording has no more of a VM entry."""
        visit.flow.throw(_LeaveTdError)
        del self.inside[visit.lp]

    def _visit(self, visit: "_Visit", regs: Registers, before: dict[str, int]) -> None:
        """TDH.VP.ENTER from the call to the TD exit: the body of a visit's greenlet."""
        step = visit.step
        try:
            problem = self._seamcall(visit.lp, regs)
        except _LeaveTdError:
            return
        if visit.pending is None:  # it never went in
            differences = [("error", "none", problem)] if problem else self._host_differences(step, regs, before)
            self._count(step, step["name"], step["st"], differences)
            return
        event = visit.pending
        differences = [("error", "none", problem)] if problem else self._exit_differences(event, regs)
        self._count(event, _event_kind(event), _event_status(event), differences)

    def _exit_differences(self, event: Step, regs: Registers) -> Differences:
        if event["res"] != "tdexit":
            return [("result", event["res"], f"TD exit {_status(regs.rax)}")]
        wanted = dict.fromkeys(COMPARED, 0) | self.recorded.host_sentinels
        wanted |= {name: int(value, 0) for name, value in event["host"].items()}
        return [
            (f"host {name}", hex(wanted[name]), hex(getattr(regs, name)))
            for name in COMPARED
            if getattr(regs, name) != wanted[name] and name not in ignore.exit_registers(event)
        ]

    def _guest(self, lp: int, core: Core, launch: bool) -> int:
        """The processor in SEAM non-root mode: check how the TD was entered, then wait for its next VM exit."""
        del launch
        visit = self.inside[lp]
        state = vmx.entry_state(core)
        if visit.pending is None:
            self._count(
                visit.step, str(visit.step["name"]), str(visit.step["st"]), self._entry_differences(visit.step, state)
            )
            if visit.step["st"] != "entered":
                raise _LeaveTdError
        else:
            event = visit.pending
            self._count(event, _event_kind(event), _event_status(event), self._resume_differences(visit, state))
            if event["res"] == "tdexit":
                raise _LeaveTdError
        visit.pending = None
        vmx.entered(core)
        parent = getcurrent().parent
        assert parent is not None  # a visit never is the outermost greenlet
        event = visit.pending = parent.switch()
        visit.before = vmx.make_exit(core, event, self.recorded.td_sentinels)
        return int(event["reason"])

    def _entry_differences(self, step: Step, state: vmx.EntryState) -> Differences:
        if step["st"] != "entered":
            return [("st", _status(int(step["st"], 0)), "entered")]
        wanted = dict.fromkeys(COMPARED, 0) | {name: int(value, 0) for name, value in step["guest"].items()}
        differences = state.differences(wanted)
        if state.rip != int(step["rip"], 0):
            differences.append(("rip", step["rip"], hex(state.rip)))
        return differences + state.injection_differences(step.get("inject"))

    def _resume_differences(self, visit: "_Visit", state: vmx.EntryState) -> Differences:
        event = visit.pending or {}
        if event["res"] == "tdexit":
            return [("result", "TD exit", "the TD was resumed")]
        wanted = dict(visit.before.gprs)
        wanted |= {name: int(value, 0) for name, value in event.get("out", {}).items()}
        if "st" in event:
            wanted["rax"] = int(event["st"], 0)
        skip = ignore.guest_registers(event)
        differences = [d for d in state.differences(wanted) if d[0] not in skip]
        advance = state.rip - visit.before.rip
        if advance != event.get("rip_adv", 0):
            differences.append(("rip advance", str(event.get("rip_adv", 0)), str(advance)))
        return differences + state.injection_differences(event.get("inject"))

    def _td_step(self, step: Step) -> None:
        visit = self.inside.get(step["lp"])
        if visit is None:
            self.report.skip("the TD is not entered here")
            return
        core = self.platform.lps[visit.lp].core
        if step["ev"] == "set_state":
            vmx.set_state(core, step["set"])
            return
        native = vmx.is_native(core, step)
        if step.get("res") == "native":
            self._count(
                step, step["ev"], "native", [] if native else [("result", "no VM exit", "the MSR is intercepted")]
            )
        elif native:
            self._count(
                step, step["ev"], step["res"], [("result", step["res"], "no VM exit: the MSR is not intercepted")]
            )
        else:
            self._go_on(visit, step)

    # --- throw-away copies
    def _discard_group(self, group: int) -> None:
        start = self.at
        steps = self.trace.steps
        while self.at < self.end and steps[self.at].get("discard") == group:
            self.at += 1
        after = self.at
        with _forked(self.report) as pipe:
            if pipe is None:
                return
            self.child_pipe = pipe
            self.report = Report()
            self.at, self.end = start, after
            while self.at < self.end:
                self._next()
            _send(pipe, self.report)

    def _count(self, step: Step, kind: str, status: str, differences: Differences) -> None:
        if ignore.comes_later(step):
            self.report.skip(_LATER)
            return
        label = _status(int(status, 0)) if status.startswith("0x") else status
        mismatch = Mismatch(self.trace.name, step["n"], kind, step, tuple(differences)) if differences else None
        self.report.count(self.trace.name, kind, label, mismatch)


class _Visit:
    """A VM entry: from TDH.VP.ENTER to the TD exit."""

    def __init__(self, lp: int, step: Step, flow: greenlet) -> None:
        self.lp = lp
        self.step = step
        self.flow = flow
        self.pending: Step | None = None  # the VM exit whose handling is to be checked
        self.before: vmx.ExitState = vmx.ExitState({}, 0)


def replay(folder: str | Path, names: Sequence[str] = (), *, keep: int = 1000) -> Report:
    """Replay the recordings of a folder, or those named, on the machine that its platform.json describes.

    Every recording starts in the state that its base leaves. Raises TraceError for files that cannot be used.
    """
    from .trace import trace_paths

    folder = Path(folder)
    recorded = load_platform(folder / PLATFORM_FILE)
    traces = [load_trace(path) for path in trace_paths(folder, tuple(names))]
    bases: dict[str, Player] = {}
    report = Report(keep=keep)
    for trace in traces:
        player = bases.get(trace.base or "")
        if player is None:
            player = Player(recorded, Report())
            if trace.base is not None:
                player.play(_load_base(folder, trace.base))
            bases[trace.base or ""] = player
        with _forked(report) as pipe:
            if pipe is not None:
                player.report = Report(keep=keep)
                _play_and_send(player, trace, pipe)
    return report


def _play_and_send(player: Player, trace: Trace, pipe: int) -> None:
    """In the copy: it must end here, whatever happens."""
    try:
        player.play(trace)
    except BaseException as error:
        where = "".join(traceback.format_exception(error)[-3:])
        step = trace.steps[min(player.at, len(trace.steps)) - 1]
        stop = Mismatch(trace.name, step["n"], "replay", step, (("error", "none", where),))
        player.report.count(trace.name, "replay", "", stop)
    _send(player.child_pipe or pipe, player.report)


def _load_base(folder: Path, name: str) -> Trace:
    for ending in (".jsonl.gz", ".jsonl"):
        path = folder / f"{name}{ending}"
        if path.exists():
            return load_trace(path)
    raise TraceError(f"the recording {name!r}, which others start from, is not in {str(folder)!r}")


@contextmanager
def _forked(report: Report) -> Iterator[int | None]:
    """Run the body in a copy of this process (with a pipe), whose report is added; then go on here (with None)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        yield writer
        return
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    if data:
        report.add(pickle.loads(data))
    yield None


def _send(pipe: int, report: Report) -> None:
    with os.fdopen(pipe, "wb") as out:
        pickle.dump(report, out)
    os._exit(0)


def _identity(tee_tcb_info: bytes) -> SeamIdentity:
    """The module's identity as the recorded TEE_TCB_INFO has it."""
    return SeamIdentity(
        tee_tcb_svn=tee_tcb_info[8:24],
        mrseam=tee_tcb_info[24:72],
        mrsigner=tee_tcb_info[72:120],
        attributes=int.from_bytes(tee_tcb_info[120:128], "little"),
    )


def _bytes(step: Step) -> bytes:
    data = bytearray([step.get("fill", 0)]) * step["len"]
    for offset, text in step.get("data", ()):
        part = bytes.fromhex(text)
        data[offset : offset + len(part)] = part
    return bytes(data)


def _event_kind(event: Step) -> str:
    return str(event.get("name") or f"exit {event['ev']}")


def _event_status(event: Step) -> str:
    return str(event.get("st", event["res"]))


def _status(rax: int) -> str:
    status = status_of(rax)
    name = status.name if isinstance(status, Status) else str(status)
    return f"{rax:#x} {name}"
