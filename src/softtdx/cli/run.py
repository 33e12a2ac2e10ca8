"""`softtdx run`: a freestanding program as a TD, or as an ordinary VM."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from softtdx.cli.console import SIZE, LiveConsole, result_json
from softtdx.cli.running import announced, name_option
from softtdx.errors import SoftTdxError
from softtdx.kvm import Host
from softtdx.vmm import End, Machine, MachineConfig, MachineResult, Payload, load_payload
from softtdx.vmm.boot import boot_host, describe
from softtdx.vmm.quoting import QuotingService
from softtdx.vmm.trace import write_trace

__all__ = ["COMMANDS"]


@click.command()
@click.argument("payload", type=click.Path())
@click.option("--memory", type=SIZE, default="64M", show_default=True, help="Guest memory, as 64M or 1G.")
@click.option("--vcpus", type=int, default=1, show_default=True, help="Number of vCPUs.")
@click.option("--vm", is_flag=True, help="Run it as an ordinary VM instead of a TD.")
@click.option("--debug-td", is_flag=True, help="Set ATTRIBUTES.DEBUG: the host may look into the TD.")
@click.option("--platform", type=click.Path(), metavar="FILE.toml", help="The machine to simulate.")
@name_option
@click.option("--quote-out", type=click.Path(), metavar="FILE", help="Write the quote that the guest asked for.")
@click.option("--trace", type=click.Path(), metavar="FILE", help="Write every wall crossing as JSON lines.")
@click.option(
    "--record", type=click.Path(), metavar="DIR", help="Record the TDX module's answers there, for `softtdx replay`."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of the live console.")
def run(
    payload: str,
    memory: int,
    vcpus: int,
    vm: bool,
    debug_td: bool,
    platform: str | None,
    name: str | None,
    quote_out: str | None,
    trace: str | None,
    record: str | None,
    as_json: bool,
) -> int:
    """Run PAYLOAD, a freestanding ELF64 or flat binary, as a trust domain.

    It starts in 64-bit mode with memory identity mapped, a stack, and RDI pointing at its boot info. COM1 (port 0x3F8)
    is its console; it ends by halting, or by writing a status byte to port 0x501, which becomes the exit status.
    """
    if vm and (debug_td or quote_out):
        raise SoftTdxError(
            "an ordinary VM has no ATTRIBUTES and no quote: --vm goes without --debug-td and --quote-out"
        )
    if vm and record:
        raise SoftTdxError("an ordinary VM does not use the TDX module: --vm goes without --record")
    program = load_payload(payload)
    config = MachineConfig(memory=memory, vcpus=vcpus, vm=vm, debug_td=debug_td, agent=name is not None and not vm)
    with _host(platform, tdx=not vm, record=record, trace=trace) as host:
        return _run(host, program, config, quote_out, name, as_json=as_json)


@contextmanager
def _host(platform: str | None, *, tdx: bool, record: str | None, trace: str | None) -> Iterator[Host]:
    """The machine that is described, with its host kernel up and, with `tdx`, the TDX module.

    `trace`: every event from the first SEAMCALL on goes there; `record`: all calls of the TDX module go there.
    """
    host = boot_host(describe(platform), tdx=False)
    with ExitStack() as stack:
        stack.enter_context(write_trace(host.platform.events, trace))
        if record is not None:
            from softtdx.replay import record as recording

            stack.enter_context(recording(host.platform, record))
        if tdx:
            from softtdx.seamldr import development_release

            host.enable_tdx(development_release())
        yield host


def _run(
    host: Host, program: Payload, config: MachineConfig, quote_out: str | None, name: str | None, *, as_json: bool
) -> int:
    vm = config.vm
    events = host.platform.events
    quoting = None if vm else QuotingService(host.platform)
    live = None if as_json else LiveConsole()
    with Machine(host, config, console=live, quoting=quoting) as machine, announced(name, machine, program.name):
        machine.load(program)
        result = machine.run()
    if live is not None:
        live.finish()
    if as_json:
        click.echo(json.dumps(result_json(result, events, quoting)))
    if quote_out is not None:
        _write_quote(quote_out, quoting)
    return _status(result, quiet=as_json)


def _write_quote(path: str, quoting: QuotingService | None) -> None:
    if quoting is None or quoting.last_quote is None:
        raise SoftTdxError(f"the guest asked for no quote, so {path!r} is not written")
    try:
        Path(path).write_bytes(quoting.last_quote)
    except OSError as error:
        raise SoftTdxError(f"cannot write the quote {path!r}: {error.strerror}") from error


def _status(result: MachineResult, *, quiet: bool) -> int:
    if result.undefined:
        click.echo(f"softtdx: instructions that the simulated processor lacks: {'; '.join(result.undefined)}", err=True)
    if result.end is End.EXIT:
        return result.status or 0
    if result.end is End.HALTED:
        return 0
    if not quiet:
        click.echo(f"softtdx: {result.message}", err=True)
    sys.stdout.flush()
    return 1


COMMANDS = [run]
