"""Machines with names: what `--name` of softtdx run and boot announces, and `softtdx ps`."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import click
from rich.box import SIMPLE
from rich.table import Table

from softtdx.cli.console import rich_console
from softtdx.errors import SoftTdxError
from softtdx.vmm import Machine
from softtdx.vmm.registry import announce, check_name, running

__all__ = ["COMMANDS", "announced", "name_option"]

_F = TypeVar("_F", bound=Callable[..., Any])
_MIB = 1 << 20


def name_option(function: _F) -> _F:
    """`--name`."""
    return click.option(
        "--name",
        metavar="NAME",
        callback=lambda _context, _option, name: name if name is None else check_name(name),
        help="Let other processes find it as NAME: softtdx ps, and softtdx quote --td NAME, which an agent that is "
        "loaded into the TD answers.",
    )(function)


def announced(name: str | None, machine: Machine, program: str) -> AbstractContextManager[None]:
    """While the block runs, the machine answers for itself under `name`, if that is not None."""
    config, agent = machine.config, machine.agent

    def info() -> dict[str, Any]:
        mrtd = machine.mrtd()
        return {
            "kind": "VM" if config.vm else "TD",
            "program": program,
            "vcpus": config.vcpus,
            "memory": config.memory,
            "mrtd": mrtd.hex() if mrtd is not None else None,
            "agent": agent is not None and agent.ready,
        }

    return announce(name, info, None if agent is None else agent.quote)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def ps(as_json: bool) -> None:
    """List the machines that run under a name."""
    found = []
    for machine in running():
        try:
            found.append(machine.info())
        except SoftTdxError:
            continue  # it has just ended
    if as_json:
        click.echo(json.dumps(found))
        return
    table = Table("name", "pid", "kind", "program", "vCPUs", "memory", "runs for", "agent", box=SIMPLE, pad_edge=False)
    for row in found:
        seconds = time.time() - row["started"]
        memory = f"{row['memory'] / _MIB:.0f} MiB"
        agent = "answers" if row["agent"] else "-"
        cells = (row["name"], row["pid"], row["kind"], row["program"], row["vcpus"], memory, f"{seconds:.0f} s", agent)
        table.add_row(*map(str, cells))
    rich_console().print(table)


COMMANDS = [ps]
