"""The command line: `softtdx COMMAND`.

Every module of this package named in `_MODULES` brings its commands in a list `COMMANDS`; a module is imported only
when one of its commands is asked for, so that `softtdx --help` stays quick.
"""

import importlib
import importlib.util
import os
import signal
import sys

import click

from softtdx import __version__
from softtdx.errors import SoftTdxError

__all__ = ["main"]

_MODULES: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Build a TD from nothing, run it, take its quote and verify it."),
    "run": ("run", "Run a freestanding ELF64 or flat program as a TD (or, with --vm, as an ordinary VM)."),
    "boot": ("boot", "Boot an unmodified Linux kernel in a TD (or, with --vm, in an ordinary VM)."),
    "top": ("top", "Run programs as TDs and VMs and watch KVM and TDX work."),
    "ps": ("running", "List the machines that run under a name."),
    "images": ("images", "Fetch Debian's kernel and busybox for softtdx boot."),
    "bench": ("bench", "Measure the interpreter, SEAMCALLs, TD builds and attestation on this machine."),
    "abi": ("abi", "Look up leaves, statuses, S-EPT entries and metadata fields."),
    "attack": ("attack", "Try what real attackers try."),
    "dram": ("attack", "Look at DRAM as a probe on the memory bus does."),
    "campaign": ("campaign", "Fuzz the walls, the interpreter and the parsers on many processes."),
    "replay": ("replay", "Replay recorded behaviour of a TDX module and compare."),
    "pki": ("attest", "Make the certificates of a simulated platform."),
    "pcs": ("attest", "Serve collateral over HTTP, as Intel's PCCS does."),
    "qgs": ("attest", "Serve quotes, as the quote generation service does."),
    "guest-api": ("guest_api", "Offer a TD's tsm and tdx_guest interfaces to programs outside a TD."),
    "quote": ("attest", "Take a quote of a running TD, a new one, or a TDREPORT."),
    "verify": ("attest", "Verify a quote and explain the verdict."),
    "inspect": ("attest", "Decode a quote, TDREPORT or event log."),
    "events": ("attest", "Work with CCEL event logs."),
    "measure": ("attest", "Compute reference values ahead of time."),
}
"""Command -> (module of this package, short help). A command whose module is not there yet is not shown."""

_EXIT_INTERRUPTED = 128 + signal.SIGINT


class _LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click gives it
        return [name for name, (module, _) in _MODULES.items() if _has_module(module)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"softtdx.cli.{_MODULES[cmd_name][0]}")
        commands: list[click.Command] = module.COMMANDS
        return next((command for command in commands if command.name == cmd_name), None)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _MODULES[name][1]) for name in self.list_commands(ctx)])


def _has_module(name: str) -> bool:
    return importlib.util.find_spec(f"softtdx.cli.{name}") is not None


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="softtdx")
def cli() -> None:
    """Intel TDX in software: run, attest and attack trust domains on any machine.

    Start with `softtdx demo`.
    """


def main() -> None:
    """Run the command line; a user sees one line for an error, never a traceback (SOFTTDX_TRACEBACK=1 shows it)."""
    try:
        status = cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("softtdx: interrupted", err=True)
        sys.exit(_EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SoftTdxError as error:
        if os.environ.get("SOFTTDX_TRACEBACK"):
            raise
        click.echo(f"softtdx: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo("softtdx: interrupted", err=True)
        sys.exit(_EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (| head); point stdout elsewhere so that the exit flush is silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
