"""`softtdx bench`: what this machine makes of SoftTDX."""

import json
import os
import platform as host_platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median

import click
from rich.console import Console
from rich.table import Table

from softtdx.vmm.boot import boot_host

__all__ = ["COMMANDS"]


@dataclass(frozen=True)
class Figure:
    """One measured figure: the median of `runs`, with the extremes."""

    suite: str
    name: str
    value: float
    unit: str
    low: float
    high: float
    runs: int


def _figures(
    suite: str, runs: int, unit: str, measure: Callable[[], dict[str, float]], names: dict[str, str]
) -> Iterator[Figure]:
    """Run `measure` and make a figure of each key in `names` (key -> what it is)."""
    results = [measure() for _ in range(runs)]
    for key, name in names.items():
        values = [result[key] for result in results]
        yield Figure(suite, name, median(values), unit, min(values), max(values), runs)


def _cpu(runs: int) -> Iterator[Figure]:
    from softtdx.vmm.bench import LOOPS, bench_loop

    host = boot_host()
    for kind, vm in (("TD", False), ("VM", True)):
        for loop in LOOPS:
            measure = partial(bench_loop, host, loop, vm=vm)
            yield from _figures("cpu", runs, "MIPS", measure, {"mips": f"{loop.name} loop, {kind}"})


def _seamcall(runs: int) -> Iterator[Figure]:
    from softtdx.kvm.bench import bench_page_aug, bench_seamcall
    from softtdx.kvm.bench_leaves import bench_leaves

    host = boot_host()
    yield from _figures("seamcall", runs, "us", partial(bench_seamcall, host), {"us_per_call": "empty leaf"})
    yield from _figures("seamcall", runs, "us", partial(bench_page_aug, host), {"us_per_page": "MEM.PAGE.AUG 4K"})
    results = [bench_leaves(host) for _ in range(runs)]
    for leaf in results[0]:
        values = [result[leaf] for result in results]
        yield Figure("seamcall", leaf, median(values), "us", min(values), max(values), runs)


def _build(runs: int) -> Iterator[Figure]:
    from softtdx.kvm.bench import bench_td_build
    from softtdx.vmm.bench import bench_side_by_side

    host = boot_host()
    names = {
        "build_s_per_mib": "measured memory, per MiB",
        "processor_s_per_mib": "the same, processor time",
        "build_s": "a TD of 2 MiB, whole build",
        "teardown_s": "its teardown",
    }
    yield from _figures("build", runs, "s", partial(bench_td_build, host), names)
    names = {"mib_per_s": "measured memory, a TD of 16 MiB"}
    yield from _figures("build", runs, "MiB/s", partial(bench_td_build, host, 16), names)
    names = {
        "measured": "two TDs at once, measured memory",
        "hashing": "two TDs at once that run and hash",
    }
    yield from _figures("build", runs, "x in turn", partial(bench_side_by_side, host), names)


def _kvm(runs: int) -> Iterator[Figure]:
    from softtdx.kvm.bench_memory import bench_conversion, bench_faults, bench_memory
    from softtdx.vmm.bench import bench_exits, bench_vm_boot

    host, plain = boot_host(), boot_host(tdx=False)
    names = {"with_mirror": "faulted 4K page, with the mirror", "without_mirror": "the same without it"}
    yield from _figures("kvm", runs, "SEAMCALLs", partial(bench_faults, host), names)
    for size, mib, huge in (("4K", 64, False), ("2M", 1024, True)):
        units = {
            "map_s_per_gib": ("s", f"mapping 1 GiB at {size}"),
            "teardown_s_per_gib": ("s", f"teardown of 1 GiB at {size}"),
            "seamcalls_per_page": ("SEAMCALLs", f"bulk mapping, per {size} page"),
            "overhead_mib_per_gib": ("MiB", f"host memory beside 1 GiB at {size}"),
        }
        results = [bench_memory(host, mib << 20, huge=huge) for _ in range(runs)]
        for key, (unit, name) in units.items():
            values = [result[key] for result in results]
            yield Figure("kvm", name, median(values), unit, min(values), max(values), runs)
    results = [bench_conversion(host) for _ in range(runs)]
    for key, unit, name in (
        ("round_trip_ms", "ms", "2M private-shared-private"),
        ("conversions_per_s", "/s", "conversions of 2M"),
    ):
        values = [result[key] for result in results]
        yield Figure("kvm", name, median(values), unit, min(values), max(values), runs)
    for kind, vm in (("TD", False), ("VM", True)):
        yield from _figures("kvm", runs, "/s", partial(bench_exits, host, vm=vm), {"exits_per_s": f"exits, {kind}"})
    for name, where in (("TDX side absent", plain), ("TDX side present", host)):
        yield from _figures("kvm", runs, "ms", partial(bench_vm_boot, where), {"ms": f"an ordinary VM, {name}"})


def _mktme(runs: int) -> Iterator[Figure]:
    from softtdx.vmm.bench_mktme import bench_forced, bench_hot_path

    for name, vm in (
        ("load-store loop in a TD, integrity on / off", False),
        ("in a VM, TME and integrity on / off", True),
    ):
        yield from _figures("mktme", runs, "x", partial(bench_hot_path, vm=vm), {"ratio": name})
    names = {
        "dump": "raw dump: encryption",
        "force": "raw write: encryption and MAC",
        "verify": "read after it: MAC and decryption",
    }
    yield from _figures("mktme", runs, "MB/s", bench_forced, names)


def _attest(runs: int) -> Iterator[Figure]:
    from softtdx.attest.bench import bench_pcs, bench_quote, bench_verify

    verify = {
        "ours_ms": "verification, collateral known",
        "ours_anew_ms": "verification, all anew",
        "dcap_qvl_ms": "verification by dcap-qvl",
    }
    yield from _figures("attest", runs, "/s", bench_quote, {"quotes_per_s": "quotes, one core"})
    yield from _figures("attest", runs, "ms", bench_verify, verify)
    yield from _figures("attest", runs, "/s", bench_pcs, {"requests_per_s": "PCS requests"})


def _boot(runs: int) -> Iterator[Figure]:
    from softtdx.vmm.linux.bench import bench_boot

    names = {"s": "Debian's kernel to power-off", "mips": "speed of that boot", "giga": "its instructions"}
    for kind, vm in (("TD", False), ("VM", True)):
        results = [bench_boot(vm=vm) for _ in range(runs)]
        for key, unit in (("s", "s"), ("mips", "MIPS"), ("giga", "G")):
            values = [result[key] for result in results]
            yield Figure("boot", f"{names[key]}, {kind}", median(values), unit, min(values), max(values), runs)


def _qemu(runs: int, boots: list[Figure]) -> Iterator[Figure]:
    """The same boot under QEMU, and how much longer ours took."""
    from softtdx.vmm.linux.bench import bench_qemu

    seconds = [bench_qemu()["s"] for _ in range(runs)]
    qemu = median(seconds)
    yield Figure("boot", "the same under QEMU TCG (VM)", qemu, "s", min(seconds), max(seconds), runs)
    for figure in boots:
        if figure.unit == "s":
            name = f"ratio to QEMU, {figure.name[-2:]}"
            yield Figure("boot", name, figure.value / qemu, "x", figure.low / qemu, figure.high / qemu, runs)


def _profile() -> dict[str, int]:
    from softtdx.vmm.linux.bench import bench_profile

    return bench_profile()


_PROFILE_ROWS = 25
_ON_REQUEST = ("boot",)  # takes minutes, and packages from apt
_SUITES: dict[str, Callable[[int], Iterator[Figure]]] = {
    "cpu": _cpu,
    "seamcall": _seamcall,
    "build": _build,
    "kvm": _kvm,
    "mktme": _mktme,
    "attest": _attest,
    "boot": _boot,
}


@click.command()
@click.argument("suites", nargs=-1, metavar="[SUITE]...")
@click.option("--runs", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs of each; medians count.")
@click.option("--vs", type=click.Choice(["qemu"]), help="Boot the same under QEMU's TCG too, and print the ratio.")
@click.option("--profile", is_flag=True, help="Tell where the instructions of the boot go.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(suites: tuple[str, ...], runs: int, vs: str | None, profile: bool, as_json: bool) -> None:
    """Measure this machine.

    Suites: cpu (interpreter speed), seamcall (cost of leaves), build (TD build and teardown), kvm (memory,
    conversions, exits), mktme (encryption and integrity: the hot path, and when somebody looks), attest,
    and only when named boot (Debian's kernel in a TD and in a VM; with --vs qemu also under QEMU).
    """
    if profile and "boot" not in suites:
        raise click.UsageError("--profile looks at boots: softtdx bench boot --profile")
    if vs is not None and "boot" not in suites:
        raise click.UsageError("--vs compares boots: softtdx bench boot --vs qemu")
    for suite in suites:
        if suite not in _SUITES:
            raise click.UsageError(f"no suite is named {suite!r}; there are: {', '.join(_SUITES)}")
    figures: list[Figure] = []
    places: dict[str, int] = {}
    console = Console(stderr=True)
    for suite in suites or [name for name in _SUITES if name not in _ON_REQUEST]:
        with console.status(f"measuring {suite} ..."):
            figures.extend(_SUITES[suite](runs))
            if suite == "boot" and vs is not None:
                figures.extend(_qemu(runs, [f for f in figures if f.suite == suite]))
            if suite == "boot" and profile:
                places = _profile()
    if as_json:
        extra = {"profile": places} if profile else {}
        machine = {"machine": host_platform.machine(), "python": host_platform.python_version(), "cpus": os.cpu_count()}
        click.echo(json.dumps({**machine, "figures": [asdict(figure) for figure in figures], **extra}))
        return
    table = Table("suite", "what", "median", "min", "max", "unit", title=f"medians of {runs}")
    for f in figures:
        digits = ".3f" if f.unit == "x" else ".3g"
        table.add_row(f.suite, f.name, f"{f.value:{digits}}", f"{f.low:{digits}}", f"{f.high:{digits}}", f.unit)
    Console().print(table)
    if profile:
        Console().print(_profile_table(places))


def _profile_table(places: dict[str, int]) -> Table:
    total = sum(places.values())
    table = Table("where", "instructions", "share", title="a TD's boot to userspace, by sampling")
    for name, count in list(places.items())[:_PROFILE_ROWS]:
        table.add_row(name, f"{count / 1e6:.1f} M", f"{count / total:.1%}")
    rest = list(places.values())[_PROFILE_ROWS:]
    table.add_row(f"{len(rest)} other places", f"{sum(rest) / 1e6:.1f} M", f"{sum(rest) / total:.1%}")
    return table


COMMANDS = [bench]
