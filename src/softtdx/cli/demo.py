"""`softtdx demo`: from an empty machine to a verified quote."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from softtdx._silicon import PAYLOADS
from softtdx.attest.dcap import verify_with_dcap_qvl
from softtdx.cli.console import LiveConsole, result_json, rich_console
from softtdx.errors import SoftTdxError
from softtdx.hw import Platform, preset
from softtdx.kvm import Host
from softtdx.vmm import Machine, MachineConfig, MachineResult, parse_payload
from softtdx.vmm.quoting import QuotingService

__all__ = ["COMMANDS"]

_MEMORY = 16 << 20
_ACCEPTABLE = "UpToDate"


class _Report:
    """The steps as they happen: printed, or kept for the JSON."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self.steps: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, str]]:
        """Time the block; what it puts into the dictionary as `note` is printed beside the step."""
        start, notes = perf_counter(), {"note": ""}
        yield notes
        self.done(name, perf_counter() - start, notes["note"])

    def done(self, name: str, seconds: float, note: str = "") -> None:
        """A step that took `seconds`."""
        self.steps.append({"step": name, "seconds": round(seconds, 4)})
        if self.console is not None:
            tail = f"  [dim]{note}[/dim]" if note else ""
            self.console.print(f"[green]✓[/green] {name:<34}[cyan]{seconds * 1000:8.1f} ms[/cyan]{tail}")

    def say(self, text: str) -> None:
        """A line between steps."""
        if self.console is not None:
            self.console.print(text)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the report.")
def demo(as_json: bool) -> int:
    """Build a TD from nothing, run it, take the quote it asks for, and verify that with dcap-qvl."""
    start = perf_counter()
    console = None if as_json else rich_console()
    report = _Report(console)
    host = _bring_up(report)
    events = host.platform.events
    with report.step("quoting enclave and its PKI made") as notes:
        quoting = QuotingService(host.platform)
        notes["note"] = "ECDSA P-256, simulated root"
    result = _run(report, host, quoting, live=not as_json)
    if not result.ok:
        raise SoftTdxError(f"the demo's guest did not finish: {result.message or result.end.value}")
    quote = quoting.last_quote
    if quote is None:
        raise SoftTdxError("the demo's guest finished without a quote")
    with report.step("quote verified by dcap-qvl") as notes:
        verdict = verify_with_dcap_qvl(quote, quoting.pki)
        notes["note"] = verdict.status
    facts = result_json(result, events, quoting) | {
        "quote_status": verdict.status,
        "verifier": "dcap-qvl",
        "quote_bytes": len(quote),
        "steps": report.steps,
        "wall_s": round(perf_counter() - start, 4),
    }
    if as_json:
        click.echo(json.dumps(facts))
    elif console is not None:
        _summary(console, facts)
    if verdict.status != _ACCEPTABLE:
        raise SoftTdxError(f"the quote is genuine, but its TCB status is {verdict.status}")
    return 0


def _bring_up(report: _Report) -> Host:
    with report.step("platform powered on") as notes:
        description = preset("spr")
        host = Host(Platform(description))
        notes["note"] = (
            f"{description.lps} LPs, {sum(s for _, s in description.ram) >> 20} MiB, "
            f"{len(description.private_keyids)} private KeyIDs"
        )
    with report.step("TDX module image signed") as notes:
        from softtdx.seamldr import development_release

        release = development_release()
        notes["note"] = f"{len(release.image) >> 10} KiB"
    tdx = host.enable_tdx(release)
    for name, seconds in tdx.report.steps:
        report.done(name, seconds)
    return host


def _run(report: _Report, host: Host, quoting: QuotingService, *, live: bool) -> MachineResult:
    output = LiveConsole("  │ ") if live else None
    with report.step("TD built and measured") as notes:
        machine = Machine(host, MachineConfig(memory=_MEMORY), console=output, quoting=quoting)
        try:
            machine.load(parse_payload(PAYLOADS["demo"], "demo"))
        except BaseException:
            machine.close()
            raise
        notes["note"] = f"{_MEMORY >> 20} MiB, MRTD {(machine.mrtd() or b'').hex()[:16]}…"
    try:
        report.say("  the TD's console:")
        result = machine.run()
        if output is not None:
            output.finish()
        report.done("TD ran", result.wall_s, f"{result.instructions:,} instructions")
    finally:
        with report.step("TD torn down") as notes:
            machine.close()
            left = sum(n for use, n in host.memory.tdx_pages().items() if use != "PAMT")
            notes["note"] = f"{left} pages left behind" if left else "every page and KeyID is back"
    sys.stdout.flush()
    return result


def _summary(console: Console, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("MRTD", facts["mrtd"])
    for i, value in enumerate(facts["rtmrs"] or []):
        table.add_row(f"RTMR{i}", "0" if not value.strip("0") else value)
    table.add_row("quote", f"{facts['quote_bytes']} bytes; {facts['verifier']}: [green]{facts['quote_status']}[/green]")
    table.add_row(
        "counts",
        f"{facts['seamcalls']:,} SEAMCALLs, {facts['td_exits']:,} TD exits, "
        f"{facts['guest_instructions']:,} guest instructions",
    )
    table.add_row("time", f"{facts['wall_s']:.2f} s")
    console.print()
    console.print(table)


COMMANDS = [demo]
