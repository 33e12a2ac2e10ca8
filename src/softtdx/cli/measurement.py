"""`softtdx events` and `softtdx measure`: event logs, and reference values ahead of time."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import click

from softtdx.attest.measure import LinuxBoot
from softtdx.cli.attest_common import hex_bytes, json_option, read_file, show, write_file
from softtdx.cli.console import SIZE

__all__ = ["events", "measure"]

_EXIT_DIFFERENT = 1
_NOT_SHOWN = 160
_WINDOW_FORM = "<13Q"  # magic, version, memory low and high, vCPUs, then (offset, size) of the four parts


@click.group()
def events() -> None:
    """Work with measured-boot event logs (CCEL)."""


@events.command("replay")
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@click.option("--quote", "quote_path", type=click.Path(path_type=Path), help="The quote whose RTMRs it must explain.")
@click.option("--report", "report_path", type=click.Path(path_type=Path), help="Likewise, a TDREPORT.")
@json_option
def events_replay(log_path: Path, quote_path: Path | None, report_path: Path | None, as_json: bool) -> int:
    """Compute the RTMRs that follow from LOG, and compare. Exit status 1 when they differ."""
    from softtdx.attest import Quote, parse_tdreport  # for this command only
    from softtdx.attest.eventlog import EventLog

    log = EventLog.parse(read_file(log_path))
    computed = log.rtmrs()
    if quote_path is not None:
        expected = Quote.parse(read_file(quote_path)).body.rtmrs
    elif report_path is not None:
        info = parse_tdreport(read_file(report_path)).td_info
        expected = (info.rtmr0, info.rtmr1, info.rtmr2, info.rtmr3)
    else:
        show({f"rtmr{number}": value.hex() for number, value in enumerate(computed)}, as_json)
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
    return 0 if result.ok else _EXIT_DIFFERENT


@events.command("show")
@click.argument("log_path", metavar="LOG", type=click.Path(path_type=Path))
@json_option
def eventsshow(log_path: Path, as_json: bool) -> None:
    """List the events of LOG."""
    from softtdx.attest.eventlog import EventLog  # for this command only

    described = [event.describe() for event in EventLog.parse(read_file(log_path)).events]
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
@json_option
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

    kernel, ramdisk = load_bzimage(kernel_path), read_file(initrd) if initrd else b""
    window = build_window(kernel, ramdisk, command_line, MemoryMap.of(memory), vcpus, td=True)
    log = linux_boot_log(boot_of_window(window))
    if log_path is not None:
        write_file(log_path, log.to_bytes())
    values = {"mrtd": mrtd_of([Region(FIRMWARE_BASE, PAYLOADS["firmware"])])}
    values |= {f"rtmr{number}": value for number, value in enumerate(log.rtmrs())}
    show({name: value.hex() for name, value in values.items()}, as_json)


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
@click.option("--agent", is_flag=True, help="With the agent that --name of `softtdx run` loads.")
@json_option
def measure_payload(payload: str, memory: int, vcpus: int, agent: bool, as_json: bool) -> None:
    """The MRTD of `softtdx run PAYLOAD` with the same --memory and --vcpus, and --agent for one with --name."""
    from softtdx.attest.measure import Region, mrtd_of  # for this command only
    from softtdx.vmm import load_payload
    from softtdx.vmm.launcher import FIRMWARE_BASE, firmware_image, lay_out

    layout = lay_out(load_payload(payload), memory, vcpus, agent=agent)
    regions = [Region(FIRMWARE_BASE, firmware_image(layout)), *(Region(*part) for part in layout.present)]
    show({"mrtd": mrtd_of(regions).hex()}, as_json)


@measure.command("firmware")
@click.argument("image", type=click.Path(path_type=Path))
@json_option
def measure_firmware(image: Path, as_json: bool) -> None:
    """The MRTD of a TD built of IMAGE, an OVMF with TDX metadata, and its sections."""
    from softtdx.attest.tdvf import SectionAttribute, SectionType, mrtd_of_firmware, sections

    data = read_file(image)
    known = set(SectionType)
    rows = [
        {
            "type": SectionType(section.type).name if section.type in known else str(section.type),
            "gpa": hex(section.gpa),
            "size": hex(section.memory_size),
            "measured": bool(section.attributes & SectionAttribute.MR_EXTEND),
        }
        for section in sections(data)
    ]
    show({"mrtd": mrtd_of_firmware(data).hex(), "sections": rows}, as_json)


@measure.command("rtmr")
@click.argument("digests", nargs=-1)
@json_option
def measure_rtmr(digests: tuple[str, ...], as_json: bool) -> None:
    """An RTMR extended with DIGESTS (SHA-384, hex) in this order, from zeroes."""
    from softtdx.attest.eventlog import rtmr_of  # for this command only

    show({"rtmr": rtmr_of(hex_bytes(item, "digest", 48) for item in digests).hex()}, as_json)
