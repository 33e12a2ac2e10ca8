"""`softtdx pki | pcs | qgs | quote | verify | inspect | events | measure`: attestation from the command line."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

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
from softtdx.attest.measure import LinuxBoot
from softtdx.attest.pki import EXPIRABLE, REVOCABLE
from softtdx.attest.store import load_pki, save_pki
from softtdx.cli.console import SIZE
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
    "platform_tcb",
    "report_engine",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_MAX_FILE = 64 << 20
_EXIT_REJECTED = 1
_NOT_SHOWN = 160
_WINDOW_FORM = "<13Q"  # magic, version, memory low and high, vCPUs, then (offset, size) of the four parts


def _json_option(function: _F) -> _F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def platform_option(function: _F) -> _F:
    """`--platform`, for commands that act for a simulated platform."""
    return click.option(
        "--platform", "platform_name", default="spr", show_default=True, help="Preset or description (TOML)."
    )(function)


_PKI_ENV = "SOFTTDX_PKI"
pki_option = click.option(
    "--pki", "pki_dir", envvar=_PKI_ENV, type=click.Path(path_type=Path), help="PKI directory (or SOFTTDX_PKI)."
)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise MalformedError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE:
        raise MalformedError(f"{path} is larger than {_MAX_FILE >> 20} MiB")
    return data


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise MalformedError(f"{path} cannot be written: {error.strerror}") from None


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


def _hex(text: str, what: str, size: int | None = None) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise MalformedError(f"{what} {text!r} is not hexadecimal") from None
    if size is not None and len(data) != size:
        raise MalformedError(f"{what} {text} is {len(data)} bytes, not {size}")
    return data


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


def _lines(value: Any, indent: int = 0) -> Iterable[str]:
    """Nested mappings and lists as indented lines."""
    pad = " " * indent
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        nested = isinstance(item, Mapping) or (isinstance(item, list) and any(isinstance(i, Mapping) for i in item))
        if nested and item:
            yield f"{pad}{key}:"
            yield from _lines(item, indent + 2)
        else:
            text = ", ".join(map(str, item)) if isinstance(item, list) else str(item)
            yield f"{pad}{key}: {text}"


def _show(value: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(value, indent=2))
    else:
        click.echo("\n".join(_lines(value)))


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
@_json_option
def pki_show(directory: Path, as_json: bool) -> None:
    """Show what the PKI in DIRECTORY says."""
    found = load_pki(directory)
    options = found.options
    _show(
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
def pcs_serve(pki_dir: Path | None, host: str, port: int) -> None:
    """Serve the PKI's collateral until interrupted."""
    from softtdx.attest.pcs import PcsListener  # the web server is for this command only

    listener = PcsListener(need_pki(pki_dir), host, port)
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
@click.option("--report", "report_path", type=click.Path(path_type=Path), required=True, help="A TDREPORT.")
@pki_option
@platform_option
@click.option("--qgs", "qgs_address", help="Ask this quote generation service instead of quoting here.")
@click.option("--version", type=click.Choice(["4", "5"]), help="[default: what such a report gets]")
@click.option("--body-type", type=click.Choice(["2", "3", "4"]), help="Of a version 5 quote: TDX 1.0, 1.5, 1.5 ex.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def quote(
    report_path: Path,
    pki_dir: Path | None,
    platform_name: str,
    qgs_address: str | None,
    version: str | None,
    body_type: str | None,
    output: Path,
) -> None:
    """Make a quote of a TDREPORT taken on the platform."""
    report = _read(report_path)
    if qgs_address is not None:
        from softtdx.attest.qgs import QgsClient, parse_address  # for this option only

        data = QgsClient(parse_address(qgs_address)).quote(report)
    else:
        enclave = QuotingEnclave(need_pki(pki_dir), report_verifier(load_description(platform_name)))
        data = enclave.quote(report, version=_int(version), body_type=_int(body_type))
    _write(output, data)
    click.echo(f"{output}: {len(data)} bytes")


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
@_json_option
def verify(quote_path: Path, as_json: bool, second_opinion: bool, **given: Any) -> int:
    """Verify QUOTE and explain the verdict step by step. Exit status 0 only when it is accepted."""
    data = _read(quote_path)
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
    return policy.expecting(_hex(given["report_data"], "report data"))


def _root(given: Mapping[str, Any]) -> bytes:
    if given["root_path"] is not None:
        return _read(given["root_path"])
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
@_json_option
def inspect(path: Path, as_json: bool) -> None:
    """Decode every field of FILE: a quote, TDREPORT, event log, CCEL table, certificate, CRL or collateral."""
    from softtdx.attest.inspection import inspect_bytes  # for this command only

    _show(inspect_bytes(_read(path)), as_json)


@click.group()
def events() -> None:
    """Work with measured-boot event logs (CCEL)."""


@events.command("replay")
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@click.option("--quote", "quote_path", type=click.Path(path_type=Path), help="The quote whose RTMRs it must explain.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Likewise, a TDREPORT.")
@_json_option
def events_replay(log_path: Path, quote_path: Path | None, report_path: Path | None, as_json: bool) -> int:
    """Compute the RTMRs that follow from LOG, and compare. Exit status 1 when they differ."""
    from softtdx.attest import Quote, parse_tdreport  # for this command only
    from softtdx.attest.eventlog import EventLog

    log = EventLog.parse(_read(log_path))
    computed = log.rtmrs()
    if quote_path is not None:
        expected = Quote.parse(_read(quote_path)).body.rtmrs
    elif report_path is not None:
        info = parse_tdreport(_read(report_path)).td_info
        expected = (info.rtmr0, info.rtmr1, info.rtmr2, info.rtmr3)
    else:
        _show({f"rtmr{number}": value.hex() for number, value in enumerate(computed)}, as_json)
        return 0
    result = log.replay(expected)
    rows = [
        {"rtmr": number, "log": have.hex(), "reported": want.hex(), "match": have == want}
        for number, (have, want) in enumerate(zip(computed, expected, strict=True))
    ]
    if as_json:
        click.echo(json.dumps({"events": len(log.events), "ok": result.ok, "rtmrs": rows}, indent=2))
    else:
        for row in rows:
            click.echo(f"RTMR{row['rtmr']}  {'ok  ' if row['match'] else 'FAIL'}  {row['log']}")
            if not row["match"]:
                click.echo(f"       reported {row['reported']}")
    return 0 if result.ok else _EXIT_REJECTED


@events.command("show")
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@_json_option
def events_show(log_path: Path, as_json: bool) -> None:
    """List the events of LOG."""
    from softtdx.attest.eventlog import EventLog  # for this command only

    described = [event.describe() for event in EventLog.parse(_read(log_path)).events]
    if as_json:
        click.echo(json.dumps(described, indent=2))
        return
    for entry in described:
        digest = str(entry["digest"])[:16]
        click.echo(f"{entry['register']}  {digest}  {entry['type']:<34} {str(entry['text'])[:_NOT_SHOWN]}")


@click.group()
def measure() -> None:
    """Compute reference values ahead of time, to put into a policy."""


@measure.command("linux")
@click.option("--kernel", "kernel_path", type=click.Path(), required=True, help="The kernel (bzImage).")
@click.option("--append", "command_line", default="", help="The kernel command line, whole.")
@click.option("--initrd", type=click.Path(path_type=Path))
@click.option("--memory", type=SIZE, default="512M", show_default=True, help="Guest memory of the boot.")
@click.option("--vcpus", type=int, default=1, show_default=True)
@click.option("--log", "log_path", type=click.Path(path_type=Path), help="Write the event log that will be there.")
@_json_option
def measure_linux(
    kernel_path: str,
    command_line: str,
    initrd: Path | None,
    memory: int,
    vcpus: int,
    log_path: Path | None,
    as_json: bool,
) -> None:
    """MRTD and RTMRs of a TD that boots this Linux through the TD firmware."""
    from softtdx._silicon import PAYLOADS  # all of this is for this command only
    from softtdx.attest.measure import Region, linux_boot_log, mrtd_of
    from softtdx.vmm.linux.bzimage import load_bzimage
    from softtdx.vmm.linux.layout import FIRMWARE_BASE, MemoryMap
    from softtdx.vmm.linux.window import build_window

    kernel, ramdisk = load_bzimage(kernel_path), _read(initrd) if initrd else b""
    window = build_window(kernel, ramdisk, command_line, MemoryMap.of(memory), vcpus, td=True)
    log = linux_boot_log(boot_of_window(window))
    if log_path is not None:
        _write(log_path, log.to_bytes())
    values = {"mrtd": mrtd_of([Region(FIRMWARE_BASE, PAYLOADS["firmware"])])}
    values |= {f"rtmr{number}": value for number, value in enumerate(log.rtmrs())}
    _show({name: value.hex() for name, value in values.items()}, as_json)


def boot_of_window(window: bytes) -> LinuxBoot:
    """What the firmware will measure of a boot window (native/guests/firmware.h, struct boot_window)."""
    fields = struct.unpack_from(_WINDOW_FORM, window)
    parts = [window[at : at + size] for at, size in zip(fields[5::2], fields[6::2], strict=True)]
    kernel, initrd, command_line, acpi = parts
    header = window[: struct.calcsize(_WINDOW_FORM)]
    return LinuxBoot(kernel, command_line.decode("ascii"), initrd, header, acpi)


@measure.command("payload")
@click.argument("payload", type=click.Path())
@click.option("--memory", type=SIZE, default="64M", show_default=True, help="Guest memory, as for `softtdx run`.")
@click.option("--vcpus", type=int, default=1, show_default=True)
@_json_option
def measure_payload(payload: str, memory: int, vcpus: int, as_json: bool) -> None:
    """The MRTD of `softtdx run PAYLOAD` with the same --memory and --vcpus."""
    from softtdx.attest.measure import Region, mrtd_of  # for this command only
    from softtdx.vmm import load_payload
    from softtdx.vmm.launcher import FIRMWARE_BASE, firmware_image, lay_out

    layout = lay_out(load_payload(payload), memory, vcpus)
    regions = [Region(FIRMWARE_BASE, firmware_image(layout)), *(Region(*part) for part in layout.present)]
    _show({"mrtd": mrtd_of(regions).hex()}, as_json)


@measure.command("rtmr")
@click.argument("digests", nargs=-1)
@_json_option
def measure_rtmr(digests: tuple[str, ...], as_json: bool) -> None:
    """An RTMR extended with DIGESTS (SHA-384, hex) in this order, from zeroes."""
    from softtdx.attest.eventlog import rtmr_of  # for this command only

    _show({"rtmr": rtmr_of(_hex(item, "digest", 48) for item in digests).hex()}, as_json)


COMMANDS: list[click.Command] = [pki, pcs, qgs, quote, verify, inspect, events, measure]
