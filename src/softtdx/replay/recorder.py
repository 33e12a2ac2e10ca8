"""Records what a TDX module is asked and answers while a host uses it, for `softtdx replay` of a later version.

The recorder stands between a processor and the module: it sees every SEAMCALL, every VM entry of a TD and every VM
exit. It writes a folder with the recording and the `platform.json` that describes the machine. Of memory it records
what the module reads: the structures and pages that a host's or a guest's call names.

While it records, the module serves one logical processor at a time (guests still run at once), so that the steps in
the file are in the order in which the module took them, and a replay can take them in that order.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, Any, Final, cast

from softtdx._silicon import BusFault, MachineCheck
from softtdx.abi.leaves import SeamcallLeaf, TdcallLeaf
from softtdx.abi.structs import TdmrInfo
from softtdx.errors import SoftTdxError
from softtdx.hw import Event, Platform, PlatformDescription, Registers
from softtdx.hw.isa import SeamCpu, SeamSoftware
from softtdx.hw.registers import GPR_NAMES
from softtdx.hw.seamops import SeamIdentity
from softtdx.module import TdxModule

from . import vmx
from .memory import GuestMemory
from .trace import PLATFORM_FILE

__all__ = ["RECORDING", "record"]

RECORDING: Final = "recording.jsonl.gz"
PAGE: Final = 4096
TD_PARAMS_SIZE: Final = 1024
TDCALL_EXIT: Final = 77
EVENT_FILTERS: Final = 1
MAX_TDMRS: Final = 64
# Guest-side leaves that read memory: which register names it, and how much.
GUEST_INPUTS: Final = {
    TdcallLeaf.MR_REPORT: ("rdx", 64),
    TdcallLeaf.MR_RTMR_EXTEND: ("rcx", 48),
    TdcallLeaf.MR_VERIFYREPORT: ("rcx", 256),
}
# A TD goes on after one of these only while the module, for a random time, hides from the host where it stands: NMI,
# external interrupt, INIT, SMI, monitor trap flag. A replay could not do the same.
HELD_BACK: Final = frozenset({0, 1, 3, 6, 37})
EVENT_NAMES: Final = {10: "cpuid", 31: "rdmsr", 32: "wrmsr", TDCALL_EXIT: "tdcall"}

Step = dict[str, Any]


@contextmanager
def record(platform: Platform, folder: str | Path) -> Iterator[None]:
    """Record into `folder` every call of the module that is installed in the block. SoftTdxError: cannot write."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = gzip.open(folder / RECORDING, "wt", encoding="utf-8")  # noqa: SIM115  closed below
    except OSError as error:
        raise SoftTdxError(f"cannot write a recording into {str(folder)!r}: {error.strerror}") from error
    recorder = _Recorder(platform, folder, file)
    end = platform.events.subscribe(recorder.watch_loader)
    try:
        yield
    finally:
        end()
        recorder.close()


class _Recorder:
    """The file, and the wrapping of the module as soon as the loader has installed one."""

    def __init__(self, platform: Platform, folder: Path, file: IO[str]) -> None:
        self.platform = platform
        self.folder = folder
        self.file = file
        self.lock = Lock()
        self.module_free = Lock()  # held by the logical processor that the module is serving
        self.count = 0
        self.closed = False
        self.emit({"op": "header", "base": None})

    def emit(self, *steps: Step) -> None:
        """Append steps."""
        with self.lock:
            for step in steps:
                if not self.closed:
                    self.file.write(json.dumps({"n": self.count} | step) + "\n")
                    self.count += 1

    def close(self) -> None:
        """The recording is over; calls still under way are not in it."""
        with self.lock:
            self.closed = True
            self.file.close()
        seam = self.platform.seam
        if isinstance(seam.module, _RecordedModule):
            seam.module = seam.module.inner

    def watch_loader(self, event: Event) -> None:
        """An installed module is wrapped before anybody can call it."""
        seam = self.platform.seam
        if event.kind != "seamldr" or seam.module is None or isinstance(seam.module, _RecordedModule):
            return
        identity = self.platform.seamops.identity
        sysinfo = self.platform.memory.read(seam.base, PAGE, seam=True)
        table = describe_machine(self.platform.description, sysinfo, identity)
        (self.folder / PLATFORM_FILE).write_text(json.dumps(table, indent=1) + "\n")
        seam.module = _RecordedModule(self, seam.module)


class _RecordedModule:
    """The module as SEAMCALL finds it."""

    def __init__(self, recorder: _Recorder, inner: SeamSoftware) -> None:
        self.recorder = recorder
        self.inner = inner
        self.cpus: dict[int, _RecordingCpu] = {}
        self.td_of: dict[int, int] = {}  # TDVPR -> TDR

    def __getattr__(self, name: str) -> Any:
        """Whatever else the module offers."""
        return getattr(self.inner, name)

    def seam_entry(self, cpu: SeamCpu, regs: Registers) -> None:
        """SEAMCALL, when the module is free."""
        with self.recorder.module_free:
            self._serve(cpu, regs)

    def _serve(self, cpu: SeamCpu, regs: Registers) -> None:
        recording = self.cpus.get(cpu.index)
        if recording is None:
            recording = self.cpus.setdefault(cpu.index, _RecordingCpu(cpu, self))
        emit = self.recorder.emit
        before = dict(regs.items())
        leaf = regs.rax & 0xFFFF
        step = _host_step(cpu.index, before)
        emit(*_host_inputs(cpu, leaf, before))
        visit = recording.visit = _Visit(step, self.td_of.get(regs.rcx & ~0xFFF, 0))
        self.inner.seam_entry(recording, regs)
        if leaf == SeamcallLeaf.VP_CREATE and regs.rax == 0:
            self.td_of[before["rcx"]] = before["rdx"]
        after = dict(regs.items())
        if visit.event is not None:
            emit(visit.event | {"res": "tdexit", "host": _nonzero(after)})
        else:
            out = _changed(before, after)
            out.pop("rax", None)
            emit(step | {"st": hex(regs.rax), "out": out})


class _Visit:
    """A SEAMCALL that may enter a TD: the VM exit that the module is handling, and the guest's state at VM entry."""

    def __init__(self, step: Step, tdr: int) -> None:
        self.step = step
        self.tdr = tdr
        self.entered = False
        self.event: Step | None = None
        self.before: dict[str, int] = {}
        self.rip = 0


class _RecordingCpu(SeamCpu):
    """The processor as the module gets it: VM entries pass through here."""

    __slots__ = ("module", "visit")

    def __init__(self, cpu: SeamCpu, module: _RecordedModule) -> None:
        super().__init__(cpu._lp)
        self.module = module
        self.visit: _Visit

    def vmenter(self, launch: bool) -> int:
        """What the module prepared is the answer to the VM exit before; then the guest runs until its next one."""
        emit, visit, core = self.module.recorder.emit, self.visit, self.core
        state = vmx.entry_state(core)
        inject = state.event_values()
        if visit.event is None:
            step = visit.step | {"st": "entered", "guest": _nonzero(state.gprs), "rip": hex(state.rip)}
        else:
            step = visit.event | {"res": "resume", "out": _changed(visit.before, state.gprs)}
            if step["ev"] == "tdcall":
                step["out"].pop("rax", None)
                step["st"] = hex(state.gprs["rax"])
            if state.rip != visit.rip:
                step["rip_adv"] = state.rip - visit.rip
        if inject:
            step["inject"] = inject
        if step.get("reason") not in HELD_BACK or inject or step["out"]:
            emit(step)
        guest = vmx.read_state(core)
        module_free = self.module.recorder.module_free
        module_free.release()
        try:
            reason = super().vmenter(launch)
        finally:
            module_free.acquire()
        visit.before = dict(zip(GPR_NAMES, core.gprs(), strict=True))
        visit.event = self._exit(reason, visit.before)
        now = vmx.read_state(core)
        visit.rip = now["RIP"]
        changed = {name: hex(value) for name, value in now.items() if value != guest[name]}
        if changed:
            emit({"who": "td", "lp": self.index, "ev": "set_state", "set": changed})
        return reason

    def _exit(self, reason: int, gprs: dict[str, int]) -> Step:
        event: Step = {
            "who": "td",
            "lp": self.index,
            "ev": EVENT_NAMES.get(reason & 0xFFFF, f"exit{reason & 0xFFFF}"),
            "reason": reason,
            "in": _nonzero(gprs),
        }
        fields, length = vmx.exit_fields(self.core)
        if fields:
            event["exit"] = fields
        if length:
            event["ilen"] = length
        if reason == TDCALL_EXIT:
            leaf = gprs["rax"] & 0xFFFF
            event |= {"leaf": leaf, "v": gprs["rax"] >> 16 & 0xFF}
            if leaf in set(TdcallLeaf):
                event["name"] = TdcallLeaf(leaf).mnemonic
            self._guest_input(leaf, gprs)
        return event

    def _guest_input(self, leaf: int, gprs: dict[str, int]) -> None:
        """Memory of the guest that the leaf reads."""
        if leaf not in GUEST_INPUTS or not self.visit.tdr:
            return
        register, size = GUEST_INPUTS[TdcallLeaf(leaf)]
        memory = GuestMemory(self._lp.platform, cast(TdxModule, self.module.inner))
        try:
            data = memory.read(self.visit.tdr, gprs[register], size)
        except (LookupError, BusFault, MachineCheck):
            return  # the call will find the same
        self.module.recorder.emit({"op": "gmem", "tdr": hex(self.visit.tdr), "gpa": hex(gprs[register]), **_data(data)})


# --- steps
def _nonzero(gprs: dict[str, int]) -> dict[str, str]:
    return {name: hex(value) for name, value in gprs.items() if value}


def _changed(before: dict[str, int], after: dict[str, int]) -> dict[str, str]:
    return {name: hex(value) for name, value in after.items() if value != before[name]}


def _data(data: bytes) -> Step:
    kept = data.rstrip(b"\0")
    return {"len": len(data), "data": [[0, kept.hex()]] if kept else []}


def _host_step(lp: int, before: dict[str, int]) -> Step:
    rax = before["rax"]
    leaf, version = rax & 0xFFFF, rax >> 16 & 0xFF
    step: Step = {"who": "host", "lp": lp, "leaf": leaf, "name": "?", "v": version}
    if leaf in set(SeamcallLeaf):
        step["name"] = SeamcallLeaf(leaf).mnemonic
    if rax >> 24:
        step["rax"] = hex(rax)
    step["in"] = {name: value for name, value in _nonzero(before).items() if name not in ("rax", "rsp")}
    return step


def _host_inputs(cpu: SeamCpu, leaf: int, regs: dict[str, int]) -> list[Step]:
    """Memory of the host that the leaf reads."""
    wanted: list[tuple[int, int]] = []
    if leaf == SeamcallLeaf.MEM_PAGE_ADD:
        wanted.append((regs["r9"], PAGE))
    elif leaf == SeamcallLeaf.MNG_INIT:
        wanted.append((regs["rdx"], TD_PARAMS_SIZE))
        if regs["rcx"] & EVENT_FILTERS:
            wanted.append((regs["r8"] & ~0xFFF, PAGE))
    elif leaf == SeamcallLeaf.SYS_CONFIG:
        count = min(regs["rdx"], MAX_TDMRS)
        wanted.append((regs["rcx"], 8 * count))
        pointers = _read(cpu, regs["rcx"], 8 * count) or b""
        wanted += [
            (int.from_bytes(pointers[at : at + 8], "little"), TdmrInfo.SIZE) for at in range(0, len(pointers), 8)
        ]
    found = ((pa, _read(cpu, pa, size)) for pa, size in wanted)
    return [{"op": "mem", "pa": hex(pa), **_data(data)} for pa, data in found if data is not None]


def _read(cpu: SeamCpu, pa: int, size: int) -> bytes | None:
    try:
        return cpu.read(pa, size) if size else b""
    except (BusFault, MachineCheck):
        return None  # the leaf will find the same


# --- the machine
def describe_machine(d: PlatformDescription, sysinfo: bytes, identity: SeamIdentity | None) -> Step:
    """The content of platform.json."""
    number: Callable[[int], str] = hex
    tcb = bytes(8)
    if identity is not None:
        tcb += identity.tee_tcb_svn + identity.mrseam + identity.mrsigner + identity.attributes.to_bytes(8, "little")
    return {
        "packages": d.packages,
        "lps": d.lps,
        "ram": [[number(base), number(size)] for base, size in d.ram],
        "ram_size": number(max(base + size for base, size in d.ram)),
        "cmrs": [[number(base), number(size)] for base, size in d.cmrs],
        "seamrr": [number(value) for value in d.seamrr],
        "keyid_bits": d.keyid_bits,
        "private_hkid_range": [d.private_keyids[0], d.private_keyids[-1]],
        "native_tsc_hz": d.tsc_hz,
        "cpusvn": d.cpu_svn.hex(),
        "cpuid_native": {
            f"{leaf:#x}.{'-' if subleaf is None else hex(subleaf)}": [number(value) for value in values]
            for (leaf, subleaf), values in d.cpuid.items()
        },
        "msrs": {number(msr): number(value) for msr, value in d.msrs.items()},
        "sysinfo_table": [[at, sysinfo[at : at + 64].hex()] for at in range(0, PAGE, 64) if any(sysinfo[at : at + 64])],
        "tee_tcb_info": tcb.ljust(128, b"\0").hex(),
        "host_sentinel_registers": {},
        "td_sentinel_registers": {},
    }
