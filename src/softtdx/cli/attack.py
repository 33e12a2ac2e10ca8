"""`softtdx attack` and `softtdx dram`: the attack laboratory."""

import html
import json
from pathlib import Path
from textwrap import dedent

import click
from rich.console import Console
from rich.table import Table

from softtdx.attack import Attack, Report, all_attacks, find, run_attack
from softtdx.errors import SoftTdxError

__all__ = ["COMMANDS"]


@click.group()
def attack() -> None:
    """Try what real attackers try, on a TD and where the protection is missing."""


@attack.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_attacks(as_json: bool) -> None:
    """List the attacks."""
    attacks = all_attacks()
    if as_json:
        click.echo(json.dumps([_page(a) for a in attacks]))
        return
    table = Table("attack", "family", "what", "a TD")
    for a in attacks:
        table.add_row(a.name, a.family, a.title, a.expected.value)
    Console().print(table)


@attack.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(name: str, as_json: bool) -> None:
    """Show the page of an attack: what the attacker does and what TDX promises."""
    chosen = find(name)
    if as_json:
        click.echo(json.dumps(_page(chosen)))
        return
    click.echo(f"{chosen.title}\n")
    click.echo(f"{_text(chosen)}\n")
    click.echo(f"TDX:        {chosen.promise}")
    click.echo(f"a TD:       {chosen.expected.value}")
    click.echo(f"otherwise:  {chosen.unprotected}: the attacker wins")


@attack.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array of the reports.")
@click.option("--report", type=click.Path(dir_okay=False), metavar="FILE.html", help="Write a report.")
@click.option("--no-integrity", is_flag=True, help="Run only where the protection is missing.")
def run(name: str, as_json: bool, report: str | None, no_integrity: bool) -> int:
    """Run the attack NAME, or `all`. The exit status is 0 when every outcome is the one its page states."""
    chosen = all_attacks() if name == "all" else [find(name)]
    reports: list[Report] = []
    console = Console()
    for number, a in enumerate(chosen, 1):
        with Console(stderr=True).status(f"{number} of {len(chosen)}: {a.title}"):
            reports.append(run_attack(a, unprotected_only=no_integrity))
        if not as_json:
            _print(console, reports[-1])
    if as_json:
        click.echo(json.dumps([_as_json(r) for r in reports]))
    else:
        wrong = sum(not r.holds for r in reports)
        console.print(f"{len(reports)} attacks, {len(reports) - wrong} as stated, {wrong} not")
    if report is not None:
        try:
            Path(report).write_text(_html(reports))
        except OSError as error:
            raise SoftTdxError(f"cannot write the report {report!r}: {error.strerror}") from error
    return 0 if all(r.holds for r in reports) else 1


def _print(console: Console, report: Report) -> None:
    sign = "[green]✓[/green]" if report.holds else "[red]✗[/red]"
    console.print(f"{sign} [bold]{report.attack.name}[/bold]  {report.attack.title}", highlight=False)
    for side in report.sides:
        console.print(f"    {side.side.value:12}{side.outcome.value:10}{side.evidence}", highlight=False, markup=False)


def _text(chosen: Attack) -> str:
    first, _, rest = chosen.page.partition("\n")
    return f"{first}\n{dedent(rest)}".strip()


def _page(chosen: Attack) -> dict[str, str]:
    return {
        "name": chosen.name,
        "family": chosen.family,
        "title": chosen.title,
        "what": _text(chosen),
        "promise": chosen.promise,
        "protected": chosen.expected.value,
        "unprotected": chosen.unprotected,
    }


def _as_json(report: Report) -> dict[str, object]:
    sides = {
        side.side.value: {"outcome": side.outcome.value, "evidence": side.evidence, "seconds": side.seconds}
        for side in report.sides
    }
    return {"name": report.attack.name, "holds": report.holds, "expected": report.attack.expected.value, **sides}


def _html(reports: list[Report]) -> str:
    rows = []
    for r in reports:
        page = _page(r.attack)
        sides = "".join(
            f"<tr><td>{s.side.value}</td><td class={s.outcome.value}>{s.outcome.value}</td>"
            f"<td>{html.escape(s.evidence)}</td></tr>"
            for s in r.sides
        )
        rows.append(
            f"<section id={r.attack.name}><h2>{'✓' if r.holds else '✗'} {html.escape(page['title'])}</h2>"
            f"<p>{html.escape(page['what'])}</p><p><b>TDX:</b> {html.escape(page['promise'])}</p>"
            f"<p><b>Otherwise:</b> {html.escape(page['unprotected'])}</p><table>{sides}</table></section>"
        )
    style = (
        "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "td{padding:.2rem .8rem;border-top:1px solid #ccc;vertical-align:top}"
        ".leaked,.corrupted{color:#b00}.stopped,.detected,.denied{color:#070}"
    )
    good = sum(r.holds for r in reports)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>SoftTDX attack report</title>"
        f"<style>{style}</style><h1>{len(reports)} attacks, {good} as stated</h1>{''.join(rows)}</html>\n"
    )


COMMANDS = [attack]
