"""`softtdx replay`: recorded behaviour of a TDX module against this one."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from softtdx.replay import Report

__all__ = ["COMMANDS"]


@click.command("replay")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("names", metavar="[FILE]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--show", default=20, show_default=True, help="How many mismatches to show in full.")
def replay_command(folder: Path, names: tuple[str, ...], as_json: bool, show: int) -> None:
    """Replay the recordings in DIR (or those named FILE) and compare every register, status and memory read.

    DIR holds *.jsonl or *.jsonl.gz and a platform.json that describes the recorded machine. The exit status is 0
    when every compared step agrees.
    """
    from softtdx.replay import replay

    report = replay(folder, names, keep=max(show, 1000))
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        _print(report, show)
    sys.exit(0 if not report.mismatched else 1)


def _print(report: "Report", show: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=120, highlight=False)
    for title, rows in (("recording", report.files), ("leaf or exit", report.kinds), ("status", report.statuses)):
        table = Table(title, "compared", "matched", "mismatched", box=None)
        for key, (compared, matched) in sorted(rows.items()):
            bad = compared - matched
            if title == "recording" or bad:
                table.add_row(key, str(compared), str(matched), f"[red]{bad}[/red]" if bad else "0")
        if table.row_count:
            console.print(table)
    for mismatch in report.mismatches[:show]:
        click.echo(str(mismatch))
        click.echo(f"    step: {json.dumps(mismatch.step)[:600]}")
    for why, count in report.skipped.items():
        click.echo(f"not compared: {count} steps ({why})")
    click.echo(f"{report.compared} steps compared, {report.matched} matched, {report.mismatched} mismatched")


COMMANDS = [replay_command]
