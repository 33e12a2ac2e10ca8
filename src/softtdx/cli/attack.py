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

_MOST = 16 << 20  # bytes that one dump may have


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


@click.group()
def dram() -> None:
    """Look at DRAM as a probe on the memory bus does."""


@dram.command()
@click.option("--raw", is_flag=True, help="What lies on the DIMM. Without it: what the host's own loads give.")
@click.option("--range", "physical", metavar="START..END", help="DRAM addresses, as 0x1800000..0x1800100.")
@click.option("--guest", metavar="START..END", help="Guest-physical addresses instead; default: 256 bytes of its code.")
@click.option("--vm", is_flag=True, help="Run the demo as an ordinary VM instead of a TD.")
@click.option("--no-encryption", is_flag=True, help="A platform without memory encryption and integrity (with --vm).")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object, with MAC and TD-owner bit of each line.")
def dump(raw: bool, physical: str | None, guest: str | None, vm: bool, no_encryption: bool, as_json: bool) -> None:
    """Run the demo's guest, stop it before it is torn down, and dump DRAM.

    The same range with and without --raw, of a TD and of a --vm, shows what encryption and the TD-owner bit do.
    """
    if no_encryption and not vm:
        raise SoftTdxError("a TD needs memory encryption: --no-encryption goes with --vm")
    if physical and guest:
        raise SoftTdxError("give --range (DRAM addresses) or --guest (guest-physical addresses), not both")
    from softtdx.attack.probe import dump_demo

    picture = dump_demo(_range(physical), _range(guest), raw=raw, vm=vm, encryption=not no_encryption)
    if as_json:
        click.echo(json.dumps(picture.describe()))
    else:
        click.echo(picture.hexdump())


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, dots, end = text.partition("..")
    try:
        low, high = int(start, 0), int(end, 0)
    except ValueError:
        low = high = 0
    if not dots or not 0 <= low < high:
        raise SoftTdxError(f"{text!r} is no range of addresses; write 0x1000..0x1100")
    if high - low > _MOST:
        raise SoftTdxError(f"{text} is more than {_MOST >> 20} MiB")
    return low, high


COMMANDS = [attack, dram]
