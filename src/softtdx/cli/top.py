"""`softtdx top`: what KVM and TDX do while programs run."""

import json
import sys
import threading
from contextlib import ExitStack, suppress
from dataclasses import asdict
from time import monotonic, sleep

import click
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from softtdx._silicon import PAYLOADS
from softtdx.cli.console import SIZE
from softtdx.errors import SoftTdxError
from softtdx.kvm import Host
from softtdx.kvm.memory import PAGE
from softtdx.kvm.stats import HostSample, VmSample, rate, sample
from softtdx.vmm import Machine, MachineConfig, MachineResult, Payload, load_payload, parse_payload
from softtdx.vmm.boot import boot_host, describe
from softtdx.vmm.quoting import QuotingService

__all__ = ["COMMANDS"]

_AS_VM = "vm:"
_LOOK = 0.02  # seconds between two looks whether everything has ended
_TOP_REASONS = 4
_MIB = 1 << 20
_WIDTH = 150  # off a terminal
_COLUMNS = ("guest", "kind", "state", "KeyID", "vCPUs", "private", "2M", "shared", "conv.", "exits/s", "reasons/s")


class _Run:
    """One program on its machine, in a thread of its own."""

    def __init__(self, host: Host, name: str, payload: Payload, config: MachineConfig) -> None:
        self.name = name
        self.result: MachineResult | None = None
        self.error: BaseException | None = None
        quoting = None if config.vm else QuotingService(host.platform)
        self.machine = Machine(host, config, quoting=quoting)
        self._payload = payload
        self._thread = threading.Thread(target=self._main, name=f"top {name}", daemon=True)

    def load(self) -> None:
        """Build it and let it go."""
        self.machine.load(self._payload)
        self._thread.start()

    def _main(self) -> None:
        try:
            self.result = self.machine.run()
        except BaseException as error:
            self.error = error

    @property
    def over(self) -> bool:
        return not self._thread.is_alive()

    @property
    def end(self) -> str:
        """How it stands, in a word."""
        if self.error is not None:
            return "failed"
        return self.result.end.value if self.result is not None else "running"

    @property
    def status(self) -> int | None:
        """What the guest ended with, if it did."""
        return self.result.status if self.result is not None else None

    def close(self) -> None:
        """Stop it and give everything back."""
        if self._thread.ident is not None:
            self.machine.stop()
            self._thread.join()
        self.machine.close()


@click.command()
@click.argument("payloads", nargs=-1, metavar="[[vm:]PAYLOAD]...")
@click.option("--memory", type=SIZE, default="16M", show_default=True, help="Memory of each guest, as 64M or 1G.")
@click.option("--vcpus", type=int, default=1, show_default=True, help="vCPUs of each guest.")
@click.option("--interval", type=click.FloatRange(0.05, 60), default=1.0, show_default=True, help="Seconds a sample.")
@click.option("--platform", type=click.Path(), metavar="FILE.toml", help="The machine to simulate.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, one each interval.")
@click.option("--once", is_flag=True, help="Take one sample, after one interval, and end.")
def top(
    payloads: tuple[str, ...],
    memory: int,
    vcpus: int,
    interval: float,
    platform: str | None,
    as_json: bool,
    once: bool,
) -> int:
    """Run PAYLOADs side by side on one host and show what KVM and the TDX module do, until all have ended.

    Each PAYLOAD is a program as for `softtdx run`; it runs as a TD, or as an ordinary VM if written vm:PAYLOAD. Without
    one, the demo program runs as both. Ctrl-C ends it; so does the end of whoever reads its output.
    """
    programs = [_program(text) for text in payloads] or [
        (name, parse_payload(PAYLOADS["demo"], "demo"), vm) for name, vm in (("demo", False), ("vm:demo", True))
    ]
    host = boot_host(describe(platform))
    with ExitStack() as stack:
        runs = []
        for name, payload, vm in programs:
            run = _Run(host, name, payload, MachineConfig(memory=memory, vcpus=vcpus, vm=vm))
            stack.callback(run.close)
            runs.append(run)
        before = sample(host)
        for run in runs:
            run.load()
        with suppress(KeyboardInterrupt):
            watch = _stream if as_json else _watch
            watch(host, runs, before, interval, once=once)
    for run in runs:
        if run.error is not None:
            raise run.error if isinstance(run.error, SoftTdxError) else SoftTdxError(f"{run.name}: {run.error}")
    return 0


def _program(text: str) -> tuple[str, Payload, bool]:
    return text, load_payload(text.removeprefix(_AS_VM)), text.startswith(_AS_VM)


def _wait(runs: list[_Run], seconds: float) -> bool:
    """Until the time is over or all have ended; whether all have."""
    deadline = monotonic() + seconds
    while monotonic() < deadline:
        if all(run.over for run in runs):
            return True
        sleep(_LOOK)
    return all(run.over for run in runs)


def _stream(host: Host, runs: list[_Run], before: HostSample, interval: float, *, once: bool) -> None:
    """A sample a line, with rates over the time since the one before; the last shows how the guests ended."""
    over = False
    while not over:
        over = _wait(runs, interval) or once
        now = sample(host)
        click.echo(json.dumps(_as_json(before, now, runs)))  # which flushes
        before = now


def _watch(host: Host, runs: list[_Run], before: HostSample, interval: float, *, once: bool) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    with Live(_frame(before, before, runs), console=console, auto_refresh=False) as live:
        over = False
        while not over:
            try:
                over = _wait(runs, interval) or once
            except KeyboardInterrupt:
                over = True
            now = sample(host)
            live.update(_frame(before, now, runs), refresh=True)
            before = now


def _frame(before: HostSample, now: HostSample, runs: list[_Run]) -> Group:
    seconds = now.time - before.time
    head = Table.grid(padding=(0, 3))
    used = now.keyids - now.keyids_free
    head.add_row(
        f"SEAMCALLs/s {rate(before.seamcalls, now.seamcalls, seconds):,.0f}",
        f"KeyIDs {used} of {now.keyids}",
        f"PAMT {now.pamt_bytes / _MIB:.0f} MiB ({now.pamt_share:.2%})",
        f"free {now.free_bytes / _MIB:,.0f} MiB",
        "  ".join(f"{use} {pages}" for use, pages in sorted(now.tdx_pages.items()) if use != "PAMT"),
    )
    table = Table(box=SIMPLE, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True)
    for run, old, vm in zip(runs, before.vms, now.vms, strict=False):
        rates = _exit_rates(old, vm, seconds)
        busiest = sorted(rates.items(), key=lambda item: -item[1])[:_TOP_REASONS]
        table.add_row(
            run.name,
            vm.kind,
            vm.state if run.end == "running" else run.end,
            "-" if vm.keyid is None else str(vm.keyid),
            f"{vm.in_guest}/{vm.vcpus}",
            _size(vm.private_pages),
            str(vm.huge_pages),
            _size(vm.shared_pages),
            str(vm.conversions),
            f"{sum(rates.values()):,.0f}",
            "  ".join(f"{reason} {per_second:,.0f}" for reason, per_second in busiest if per_second),
        )
    return Group(head, table)


def _size(pages: int) -> str:
    return f"{pages * PAGE / _MIB:.1f} MiB"


def _exit_rates(before: VmSample, now: VmSample, seconds: float) -> dict[str, float]:
    return {reason: rate(before.exits.get(reason, 0), count, seconds) for reason, count in now.exits.items()}


def _as_json(before: HostSample, now: HostSample, runs: list[_Run]) -> dict[str, object]:
    """The sample, with rates over the interval before it."""
    seconds = now.time - before.time
    vms = [
        {
            "name": run.name,
            "end": run.end,
            "guest_status": run.status,
            **asdict(vm),
            "exits_per_s": _exit_rates(old, vm, seconds),
        }
        for run, old, vm in zip(runs, before.vms, now.vms, strict=True)
    ]
    per_second = rate(before.seamcalls, now.seamcalls, seconds)
    return asdict(now) | {"seconds": seconds, "seamcalls_per_s": per_second, "vms": vms}


COMMANDS = [top]
