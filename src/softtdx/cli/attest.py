"""`softtdx pki | pcs | qgs | quote | verify | inspect | events | measure`: attestation from the command line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from softtdx.abi.structs import REPORTDATA_SIZE
from softtdx.attest import (
    Collateral,
    Pki,
    PkiOptions,
    PlatformTcb,
    Policy,
    QuotingEnclave,
    TcbStatus,
    TcbVariation,
    Verdict,
    Verifier,
    verify_with_dcap_qvl,
)
from softtdx.attest.errors import CollateralError, MalformedError
from softtdx.attest.pki import EXPIRABLE, PLATFORM_FLAGS, REVOCABLE
from softtdx.attest.store import load_pki, save_pki
from softtdx.cli.attest_common import hex_bytes, json_option, read_file, show, write_file
from softtdx.cli.measurement import events, measure
from softtdx.errors import SoftTdxError
from softtdx.hw.description import PlatformDescription, preset, preset_names
from softtdx.hw.seamops import RandomSource, SeamOpsEngine, SeamOpsStatus
from softtdx.seamldr.release import SEAM_SVN

__all__ = [
    "COMMANDS",
    "load_description",
    "need_pki",
    "pki_option",
    "platform_option",
    "platform_pki",
    "platform_tcb",
    "report_engine",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_EXIT_REJECTED = 1
_NOT_OF_RUNNING = ("qgs_address", "version", "body_type")  # options for quotes that are made here


def platform_option(function: _F) -> _F:
    """`--platform`, for commands that act for a simulated platform."""
    return click.option(
        "--platform", "platform_name", default="spr", show_default=True, help="Preset or description (TOML)."
    )(function)


_PKI_ENV = "SOFTTDX_PKI"
pki_option = click.option(
    "--pki", "pki_dir", envvar=_PKI_ENV, type=click.Path(path_type=Path), help="PKI directory (or SOFTTDX_PKI)."
)


def load_description(name: str) -> PlatformDescription:
    """A preset, or a description in a TOML file."""
    return preset(name) if name in preset_names() else PlatformDescription.from_toml(name)


def platform_tcb(description: PlatformDescription) -> PlatformTcb:
    """The security versions that TDREPORTs of this platform carry under the module of this installation."""
    return PlatformTcb(cpu_svn=description.cpu_svn, tee_tcb_svn=bytes(SEAM_SVN).ljust(16, b"\0"))


def report_engine(description: PlatformDescription) -> SeamOpsEngine:
    """What makes and knows the MACs of that platform: its report key follows from its seed."""
    key = RandomSource(description.seed, "report key").bytes(32)
    return SeamOpsEngine(key, description.cpu_svn, RandomSource(description.seed, "attestation commands"))


def report_verifier(description: PlatformDescription) -> Callable[[bytes], bool]:
    """Whether a REPORTMACSTRUCT was made on that platform."""
    engine = report_engine(description)
    return lambda head: engine.verify(head) is SeamOpsStatus.SUCCESS


def _when(text: str | None) -> int:
    """Unix seconds from ISO 8601 or a number; the clock's if None."""
    if text is None:
        return int(time.time())
    try:
        if text.isdecimal():
            return int(text)
        when = datetime.fromisoformat(text)
        return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise MalformedError(f"{text!r} is no time; write 2026-01-31, 2026-01-31T12:00:00Z or Unix seconds") from None


@click.group()
def pki() -> None:
    """Make the certificates and collateral of a simulated platform."""


@pki.command("init")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--seed", type=int, help="The same seed gives the same PKI to the byte. [default: the platform's]")
@click.option("--random", "at_random", is_flag=True, help="Keys that nobody can make again.")
@platform_option
@click.option("--ca", type=click.Choice(["platform", "processor"]), default="platform", show_default=True)
@click.option("--tcb-status", default="UpToDate", show_default=True, help="What TCB info says of the platform.")
@click.option("--module-status", default="UpToDate", show_default=True, help="UpToDate, OutOfDate or Revoked.")
@click.option("--qe-status", default="UpToDate", show_default=True, help="What the QE identity says of the QE.")
@click.option("--advisory", "advisories", multiple=True, help="An advisory id of the platform's level.")
@click.option("--revoke", "revoked", multiple=True, type=click.Choice(REVOCABLE), help="Put on its issuer's CRL.")
@click.option("--expire", "expired", multiple=True, type=click.Choice(EXPIRABLE), help="Let it have run out.")
@click.option("--no-match", is_flag=True, help="Let every TCB level ask for more than the platform has.")
@click.option("--platform-flag", "flags", multiple=True, type=click.Choice(PLATFORM_FLAGS), help="Set in the PCK.")
@click.option("--pcs-url", default=PkiOptions.pcs_url, show_default=True, help="Where certificates say CRLs are.")
@click.option("--replace", is_flag=True, help="Replace a PKI that is there.")
def pki_init(
    directory: Path,
    seed: int | None,
    at_random: bool,
    platform_name: str,
    ca: str,
    pcs_url: str,
    replace: bool,
    **verdict: Any,
) -> None:
    """Make a PKI in DIRECTORY: root, PCK CAs, PCK certificate, CRLs, TCB info, QE identity, keys (mode 0600).

    Unless told otherwise it is the platform's own: the one that `softtdx run` and `softtdx demo` quote under.
    """
    description = load_description(platform_name)
    if seed is None and not at_random:
        seed = description.seed
    made = Pki.create(
        seed,
        tcb=platform_tcb(description),
        ca=ca,
        pcs_url=pcs_url,
        vary=_variation(verdict),
        revoked=frozenset(verdict["revoked"]),
        expired=frozenset(verdict["expired"]),
        platform_flags=frozenset(verdict["flags"]),
    )
    save_pki(made, directory, replace=replace)
    click.echo(f"{directory}: root.pem is what verifiers trust, collateral.json is what they need beside a quote")


def _variation(verdict: Mapping[str, Any]) -> TcbVariation:
    return TcbVariation(
        status=_status(verdict["tcb_status"]),
        module_status=_status(verdict["module_status"]),
        qe_status=_status(verdict["qe_status"]),
        advisory_ids=tuple(verdict["advisories"]),
        no_match=verdict["no_match"],
    )


def _status(text: str) -> TcbStatus:
    try:
        return TcbStatus(text)
    except ValueError:
        raise MalformedError(f"{text!r} is no TCB status; there are {', '.join(TcbStatus)}") from None


@pki.command("show")
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def pkishow(directory: Path, as_json: bool) -> None:
    """Show what the PKI in DIRECTORY says."""
    found = load_pki(directory)
    options = found.options
    show(
        {
            "root_sha256": found.root_fingerprint,
            "fmspc": options.tcb.fmspc.hex(),
            "cpu_svn": options.tcb.cpu_svn.hex(),
            "tee_tcb_svn": options.tcb.tee_tcb_svn.hex(),
            "pck_issuer": options.ca,
            "tcb_status": str(options.vary.status),
            "module_status": str(options.vary.module_status),
            "qe_status": str(options.vary.qe_status),
            "revoked": sorted(options.revoked),
            "expired": sorted(options.expired),
            "platform_flags": sorted(options.platform_flags),
        },
        as_json,
    )


def need_pki(directory: Path | None) -> Pki:
    """The PKI that `--pki` names."""
    if directory is None:
        raise CollateralError("which PKI? Give --pki DIR (make one with `softtdx pki init DIR`) or set SOFTTDX_PKI")
    return load_pki(directory)


@click.group()
def pcs() -> None:
    """Serve collateral over HTTP, as Intel's PCS and PCCS do (API v4)."""


@pcs.command("serve")
@pki_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8081, show_default=True, type=click.IntRange(0, 65535))
@click.option("--tls", is_flag=True, help="HTTPS, with a certificate of its own that is kept as tls.pem in the PKI.")
def pcs_serve(pki_dir: Path | None, host: str, port: int, tls: bool) -> None:
    """Serve the PKI's collateral until interrupted."""
    from softtdx.attest.pcs import PcsListener  # the web server is for this command only
    from softtdx.attest.tls import tls_files

    pki = need_pki(pki_dir)
    listener = PcsListener(pki, host, port, tls_files(pki_dir) if tls and pki_dir else None)
    click.echo(f"PCS at {listener.url}/sgx/certification/v4/ and /tdx/certification/v4/")
    listener.serve_forever()


@click.group()
def qgs() -> None:
    """Serve quotes, as the quote generation service of a TDX host does."""


@qgs.command("serve")
@pki_option
@platform_option
@click.option("--listen", default="127.0.0.1:4050", show_default=True, help="unix:PATH, or HOST:PORT.")
def qgs_serve(pki_dir: Path | None, platform_name: str, listen: str) -> None:
    """Turn TDREPORTs of the platform into quotes until interrupted."""
    from softtdx.attest.qgs import QgsListener, parse_address  # for this command only

    enclave = QuotingEnclave(need_pki(pki_dir), report_verifier(load_description(platform_name)))
    listener = QgsListener(enclave, parse_address(listen))
    click.echo(f"QGS at {listen if listen.startswith('unix:') else listener.address}")
    try:
        listener.serve_forever()
    finally:
        listener.close()


@click.command()
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="A TDREPORT of the platform.")
@click.option(
    "--td", "td_name", metavar="NAME", help="A TD that `softtdx run` or `softtdx boot` runs with --name NAME."
)
@click.option("--report-data", help="Of that TD, or else of one that is built for it (hex, up to 64 bytes).")
@pki_option
@platform_option
@click.option("--qgs", "qgs_address", help="Ask this quote generation service instead of quoting here.")
@click.option("--version", type=click.Choice(["4", "5"]), help="[default: what such a report gets]")
@click.option("--body-type", type=click.Choice(["2", "3", "4"]), help="Of a version 5 quote: TDX 1.0, 1.5, 1.5 ex.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def quote(td_name: str | None, report_path: Path | None, report_data: str | None, output: Path, **given: Any) -> None:
    """Make a quote: of a running TD, of a TDREPORT, or of a TD that is built, run and asked for its report.

    A running TD (--td NAME; `softtdx ps` lists them) is asked over its control socket: software in it takes the quote,
    with the quoting service of its own machine. Otherwise the quote is made here, and without --pki under the
    platform's own PKI (`softtdx pki init` writes it).
    """
    if td_name is not None:
        data = _quote_of_running_td(td_name, report_path, report_data or "", given)
        write_file(output, data)
        click.echo(f"{output}: {len(data)} bytes")
        return
    if (report_path is None) == (report_data is None):
        raise MalformedError(
            "give --td NAME to quote a running TD, --report FILE to quote a TDREPORT, or --report-data HEX to quote a "
            "new TD"
        )
    description = load_description(given["platform_name"])
    report = read_file(report_path) if report_path else _report_of_new_td(description, str(report_data))
    if given["qgs_address"] is not None:
        from softtdx.attest.qgs import QgsClient, parse_address  # for this option only

        data = QgsClient(parse_address(given["qgs_address"])).quote(report)
    else:
        pki = platform_pki(description) if given["pki_dir"] is None else load_pki(given["pki_dir"])
        enclave = QuotingEnclave(pki, report_verifier(description))
        data = enclave.quote(report, version=_int(given["version"]), body_type=_int(given["body_type"]))
    write_file(output, data)
    click.echo(f"{output}: {len(data)} bytes")


def _quote_of_running_td(name: str, report_path: Path | None, report_data: str, given: Mapping[str, Any]) -> bytes:
    from softtdx.vmm.registry import find  # for this option only

    source = click.get_current_context().get_parameter_source
    other_pki = source("pki_dir") is click.core.ParameterSource.COMMANDLINE  # SOFTTDX_PKI may be set for other commands
    if report_path is not None or other_pki or any(given[key] is not None for key in _NOT_OF_RUNNING):
        raise MalformedError(
            "the quote of a running TD is made by the quoting service of its machine: --td goes with --report-data only"
        )
    return find(name).quote(_padded(report_data))


def _report_of_new_td(description: PlatformDescription, report_data: str) -> bytes:
    from softtdx.vmm.attesting_td import AttestingTd  # building a TD is for this option only
    from softtdx.vmm.boot import boot_host

    with AttestingTd(boot_host(description)) as td:
        return td.report(_padded(report_data))


def _padded(report_data: str) -> bytes:
    data = hex_bytes(report_data, "report data")
    if len(data) > REPORTDATA_SIZE:
        raise MalformedError(f"report data is at most {REPORTDATA_SIZE} bytes, this is {len(data)}")
    return data.ljust(REPORTDATA_SIZE, b"\0")


def platform_pki(description: PlatformDescription) -> Pki:
    """The platform's own PKI: what `softtdx run` and `softtdx demo` quote under."""
    return Pki.create(description.seed, tcb=platform_tcb(description))


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)


@click.command()
@click.argument("quote_path", metavar="QUOTE", type=click.Path(path_type=Path))
@pki_option
@click.option("--collateral", "collateral_path", type=click.Path(path_type=Path), help="Collateral (JSON).")
@click.option("--pcs", "pcs_url", help="Fetch the collateral from this PCS or PCCS.")
@click.option("--root", "root_path", type=click.Path(path_type=Path), help="Trusted root certificate (PEM or DER).")
@click.option("--policy", "policy_path", type=click.Path(path_type=Path), help="What else must hold (TOML).")
@click.option("--report-data", help="The report data that must be there (hex; a beginning is enough).")
@click.option("--at", "when", help="Judge as of this time (ISO 8601 or Unix seconds).")
@click.option("--signatures-only", is_flag=True, help="Look only at the quote's own signatures; needs no collateral.")
@click.option("--second-opinion", is_flag=True, help="Let dcap-qvl judge as well, and demand that both agree.")
@json_option
def verify(quote_path: Path, as_json: bool, second_opinion: bool, **given: Any) -> int:
    """Verify QUOTE and explain the verdict step by step. Exit status 0 only when it is accepted."""
    data = read_file(quote_path)
    if given["signatures_only"]:
        verdict, other = Verifier(_root(given)).verify_signatures(data), None
    else:
        collateral, root, now = _collateral(given, data), _root(given), _when(given["when"])
        verdict = Verifier(root).verify(data, collateral, now=now, policy=_policy(given))
        other = _second_opinion(data, collateral, root, now) if second_opinion else None
    if as_json:
        click.echo(json.dumps(verdict.describe() | ({"dcap_qvl": other} if other else {}), indent=2))
    else:
        _explain(verdict, other)
    agreed = other is None or other == verdict.status
    return 0 if verdict.accepted and agreed else _EXIT_REJECTED


def _policy(given: Mapping[str, Any]) -> Policy:
    policy = Policy() if given["policy_path"] is None else Policy.load(given["policy_path"])
    if given["report_data"] is None:
        return policy
    return policy.expecting(hex_bytes(given["report_data"], "report data"))


def _root(given: Mapping[str, Any]) -> bytes:
    if given["root_path"] is not None:
        return read_file(given["root_path"])
    if given["pki_dir"] is not None:
        return load_pki(given["pki_dir"]).root_der
    raise CollateralError("which root certificate is trusted? Give --root FILE or --pki DIR")


def _collateral(given: Mapping[str, Any], quote_data: bytes) -> Collateral:
    if given["collateral_path"] is not None:
        return Collateral.load(given["collateral_path"])
    if given["pcs_url"] is not None:
        from softtdx.attest.pcs_client import fetch_collateral  # for this option only

        return fetch_collateral(quote_data, given["pcs_url"])
    if given["pki_dir"] is not None:
        return load_pki(given["pki_dir"]).collateral()
    raise CollateralError("which collateral? Give --collateral FILE, --pcs URL or --pki DIR, or --signatures-only")


def _second_opinion(data: bytes, collateral: Collateral, root: bytes, now: int) -> str:
    try:
        return verify_with_dcap_qvl(data, (collateral, Verifier(root).root.cert.der), now).status
    except SoftTdxError as error:
        return str(error)


def _explain(verdict: Verdict, other: str | None) -> None:
    for step in verdict.steps:
        click.echo(f"{'ok  ' if step.ok else 'FAIL'}  {step.name:<16} {step.detail}")
    if verdict.quote is not None:
        body = verdict.quote.body
        click.echo(f"MRTD         {body.mr_td.hex()}")
        for number, value in enumerate(body.rtmrs):
            click.echo(f"RTMR{number}        {value.hex()}")
        click.echo(f"report data  {body.report_data.hex()}")
    if other is not None:
        click.echo(f"dcap-qvl     {other}")
    advisories = f" ({', '.join(verdict.advisory_ids)})" if verdict.advisory_ids else ""
    if verdict.accepted:
        click.echo(f"accepted: {verdict.status or 'the signatures hold'}{advisories}")
    else:
        click.echo(f"rejected: {verdict.reason}{advisories}")


@click.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Decode every field of FILE: a quote, TDREPORT, event log, CCEL table, certificate, CRL or collateral."""
    from softtdx.attest.inspection import inspect_bytes  # for this command only

    show(inspect_bytes(read_file(path)), as_json)


COMMANDS: list[click.Command] = [pki, pcs, qgs, quote, verify, inspect, events, measure]
