"""`softtdx guest-api`: a TD's attestation interfaces for programs that are developed outside one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path

import click

from softtdx.abi.structs import Attributes, TdInfo, TdReport
from softtdx.attest import MalformedError, QuotingEnclave
from softtdx.attest.store import load_pki
from softtdx.cli.attest import (
    load_description,
    pki_option,
    platform_option,
    platform_pki,
    platform_tcb,
    report_engine,
    report_verifier,
)
from softtdx.hw.description import PlatformDescription
from softtdx.hw.seamops import SeamIdentity, SeamOpsStatus

__all__ = ["COMMANDS", "stand_in_td"]

MEASUREMENTS = ("mrtd", "mrconfigid", "mrowner", "mrownerconfig", "rtmr0", "rtmr1", "rtmr2", "rtmr3")
MEASUREMENT_SIZE = 48


def stand_in_td(description: PlatformDescription, measurements: dict[str, bytes]) -> Callable[[bytes], bytes]:
    """A TD of which nothing exists but its TDINFO: makes genuine TDREPORTs of it with the platform's SEAMREPORT."""
    engine, tcb = report_engine(description), platform_tcb(description)
    mrseam = hashlib.sha384(b"the TDX module of a stand-in TD").digest()
    engine.seamextend(SeamIdentity(tcb.tee_tcb_svn, mrseam, tcb.mr_signer_seam, 0))
    info = TdInfo()
    info.attributes, info.xfam = Attributes.SEPT_VE_DISABLE, 0xE7
    for name, value in measurements.items():
        setattr(info, name, value)
    info_hash = hashlib.sha384(info.view).digest()

    def report(report_data: bytes) -> bytes:
        status, head = engine.report(b"\x81\0\0\0", report_data, info_hash)
        if status is not SeamOpsStatus.SUCCESS:
            raise MalformedError(f"SEAMREPORT refuses report data of {len(report_data)} bytes")
        return head.ljust(TdReport.SIZE - TdInfo.SIZE, b"\0") + bytes(info)

    return report


def _measurement(text: str) -> tuple[str, bytes]:
    name, _, value = text.partition("=")
    try:
        data = bytes.fromhex(value)
    except ValueError:
        data = b""
    if name not in MEASUREMENTS or len(data) != MEASUREMENT_SIZE:
        raise MalformedError(
            f"{text!r} is not NAME=HEX with a NAME of {', '.join(MEASUREMENTS)} and {MEASUREMENT_SIZE} bytes"
        )
    return name, data


@click.group("guest-api")
def guest_api() -> None:
    """Offer what configfs tsm and /dev/tdx_guest give in a TD to programs that run outside one."""


@guest_api.command("serve")
@pki_option
@platform_option
@click.option("--set", "measured", multiple=True, metavar="NAME=HEX", help="A measurement of a stand-in for a TD.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8082, show_default=True, type=click.IntRange(0, 65535))
def guest_api_serve(pki_dir: Path | None, platform_name: str, measured: tuple[str, ...], host: str, port: int) -> None:
    """Serve until interrupted for a TD that is built and run here.

    With --set it is a stand-in, which has nothing but the measurements given; its reports and quotes are genuine too.
    Without --pki the platform's own PKI is used.
    """
    from softtdx.attest.guest_api import GuestApiListener, TsmReports  # the web server is for this command only

    description = load_description(platform_name)
    enclave = QuotingEnclave(load_pki(pki_dir) if pki_dir else platform_pki(description), report_verifier(description))
    with contextlib.ExitStack() as stack:
        if measured:
            report = stand_in_td(description, dict(_measurement(item) for item in measured))
        else:
            from softtdx.vmm.attesting_td import AttestingTd
            from softtdx.vmm.boot import boot_host

            report = stack.enter_context(AttestingTd(boot_host(description))).report
        listener = GuestApiListener(TsmReports(report, enclave.quote), host, port)
        click.echo(f"guest API at {listener.url} (set SOFTTDX_GUEST_API to it for softtdx.attest.guest_client)")
        listener.serve_forever()


COMMANDS: list[click.Command] = [guest_api]
