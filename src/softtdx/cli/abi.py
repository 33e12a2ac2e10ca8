"""`softtdx abi`: look up and decode leaves, statuses, S-EPT entries, metadata fields and the rest of the ABI."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from softtdx.abi import explain, leaves
from softtdx.errors import SoftTdxError

__all__ = ["COMMANDS"]

_F = TypeVar("_F", bound=Callable[..., Any])


def _json_option(function: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def _show(facts: Mapping[str, Any], as_json: bool) -> None:
    """Print facts as JSON, or one a line."""
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts, 0):
        click.echo(line)


def _lines(facts: Mapping[str, Any], indent: int) -> Iterable[str]:
    pad = " " * indent
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            yield f"{pad}{key}:"
            yield from _lines(value, indent + 2)
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{pad}{key}:"
            yield from (f"{pad}  " + "  ".join(f"{k}={_plain(v)}" for k, v in row.items()) for row in value)
        else:
            yield f"{pad}{key:<{width}}  {_plain(value)}"


def _plain(value: object) -> str:
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)


@click.group("abi")
def abi() -> None:
    """Look up leaves, statuses, S-EPT entries and metadata fields.

    Numbers are hexadecimal with 0x, or decimal.
    """


_SIDES = {"host": "TDH.", "guest": "TDG.", "loader": "SEAMLDR.", "all": ""}


@abi.command("leaves")
@click.option("--side", type=click.Choice(list(_SIDES)), default="all", show_default=True, help="Whose leaves.")
@_json_option
def list_leaves(side: str, as_json: bool) -> None:
    """List the leaf functions."""
    infos = [info for name, info in leaves.leaf_infos().items() if name.startswith(_SIDES[side])]
    if as_json:
        rows = [{"name": i.mnemonic, "number": i.number, "versions": i.versions, "summary": i.summary} for i in infos]
        click.echo(json.dumps(rows, indent=2))
        return
    for info in infos:
        number = f"{info.number:#x}" if info.number >> 63 else str(info.number)
        click.echo(f"{number:>5}  {info.mnemonic:<27} {info.summary}")


@abi.command("leaf")
@click.argument("name", nargs=-1, required=True)
@_json_option
def show_leaf(name: tuple[str, ...], as_json: bool) -> None:
    """Explain a leaf: NAME like TDH.MEM.PAGE.ADD, or `seamcall 2`, `tdcall 4`."""
    _show(explain.explain_leaf(" ".join(name)), as_json)


@abi.command("status")
@click.argument("rax")
@_json_option
def show_status(rax: str, as_json: bool) -> None:
    """Decode RAX of a leaf, or look a status up by name."""
    _show(explain.explain_status(rax), as_json)


@abi.command("sept")
@click.argument("entry")
@click.option("--l2", is_flag=True, help="The entry is of an L2 VM's S-EPT.")
@_json_option
def show_sept(entry: str, l2: bool, as_json: bool) -> None:
    """Decode a secure-EPT entry."""
    _show(explain.explain_sept(explain.parse_u64(entry), l2=l2), as_json)


@abi.command("field")
@click.argument("field", nargs=-1, required=True)
@_json_option
def show_field(field: tuple[str, ...], as_json: bool) -> None:
    """Decode an MD_FIELD_ID, or look a metadata field up by name."""
    _show(explain.explain_field(" ".join(field)), as_json)


@abi.command("msr")
@click.argument("msr")
@_json_option
def show_msr(msr: str, as_json: bool) -> None:
    """Say what RDMSR and WRMSR of a TD become."""
    _show(explain.explain_msr(msr), as_json)


@abi.command("cpuid")
@click.argument("leaf")
@click.argument("subleaf", default="0")
@_json_option
def show_cpuid(leaf: str, subleaf: str, as_json: bool) -> None:
    """Say how a CPUID leaf is virtualised."""
    _show(explain.explain_cpuid(explain.parse_u64(leaf), explain.parse_u64(subleaf)), as_json)


@abi.command("exit")
@click.argument("reason")
@_json_option
def show_exit(reason: str, as_json: bool) -> None:
    """Name a VM-exit reason."""
    _show(explain.explain_exit(explain.parse_u64(reason)), as_json)


@abi.command("struct")
@click.argument("name", required=False)
@click.option("--decode", type=click.Path(path_type=Path), help="A file whose first bytes are the structure.")
@_json_option
def show_struct(name: str | None, decode: Path | None, as_json: bool) -> None:
    """Show a structure's layout, or decode a file with it; without NAME list the structures."""
    if name is None:
        if decode is not None:
            raise SoftTdxError("--decode needs the NAME of a structure (list: softtdx abi struct)")
        listing = {key: kind.SIZE for key, kind in sorted(explain.structures().items())}
        _show(listing, as_json)
        return
    facts = explain.explain_struct(name)
    if decode is None:
        _show(facts, as_json)
        return
    kind = explain.structures()[facts["name"]]
    try:
        with decode.open("rb") as file:
            data = file.read(kind.SIZE)
    except OSError as error:
        raise SoftTdxError(f"cannot read {decode}: {error.strerror}") from None
    wire = kind.parse(data, strict=False)
    _show(wire.as_dict() | {"reserved_is_zero": wire.reserved_is_zero()}, as_json)


@abi.command("docs")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; fail when a page there differs.")
def write_docs(directory: Path, check: bool) -> None:
    """Write the reference pages to DIRECTORY."""
    from softtdx.abi.reference import pages

    rendered = pages()
    if check:
        stale = [name for name, text in rendered.items() if _text_of(directory / name) != text]
        if stale:
            raise SoftTdxError(
                f"{directory}: {', '.join(stale)} differ from the tables; run softtdx abi docs {directory}"
            )
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in rendered.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SoftTdxError(f"cannot write {error.filename or directory}: {error.strerror}") from None
    click.echo(f"{len(rendered)} pages written to {directory}")


def _text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


COMMANDS: list[click.Command] = [abi]
