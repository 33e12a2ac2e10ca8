"""`softtdx campaign`: fuzzing on many processes."""

import json
from pathlib import Path

import click
from rich.console import Console

from softtdx.errors import SoftTdxError

__all__ = ["COMMANDS"]

_STEPS = {
    "seamcall": 10_000, "tdcall": 10_000, "guest": 5_000, "code": 2_000, "ioctl": 10_000, "files": 50_000,
    "loader": 5_000,
}  # fmt: skip
_ENGINES = ("local", "ray")


@click.command()
@click.option("--target", "targets", multiple=True, metavar="NAME", help=f"{', '.join(_STEPS)}; default: all.")
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Seeds of each target.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True, help="The first of them.")
@click.option("--steps", type=click.IntRange(1), help="Steps of a seed: calls, files, thousands of instructions.")
@click.option("--workers", type=click.IntRange(1), help="Processes; default: one, or with ray one for each CPU.")
@click.option("--engine", type=click.Choice(_ENGINES), default="local", show_default=True, help="Where they run.")
@click.option("--ray-address", metavar="HOST:PORT", help="A Ray cluster to join; default: one on this machine.")
@click.option("--patience", type=click.FloatRange(1), default=3600, show_default=True, help="Seconds for a seed.")
@click.option("--state", type=click.Path(dir_okay=False), metavar="FILE", help="Keep what is done; goes on from there.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def campaign(
    targets: tuple[str, ...],
    seeds: int,
    first_seed: int,
    steps: int | None,
    workers: int | None,
    engine: str,
    ray_address: str | None,
    patience: float,
    state: str | None,
    as_json: bool,
) -> int:
    """Fuzz SEAMCALL, TDCALL, the interpreter, KVM's ioctls, files and the loader. Exit status 0: nothing was found.

    The same seed finds the same things. Findings are told apart by their cause and come with the seed that shows them.
    """
    from softtdx.attack.campaign import CampaignState, Job, run_campaign
    from softtdx.attack.engines import LocalEngine, RayEngine

    if ray_address is not None and engine != "ray":
        raise click.UsageError("--ray-address is for --engine ray")
    unknown = [name for name in targets if name not in _STEPS]
    if unknown:
        raise SoftTdxError(f"there is no fuzzing target {unknown[0]!r}; there are {', '.join(_STEPS)}")
    jobs = [
        Job(target, seed, steps or _STEPS[target])
        for seed in range(first_seed, first_seed + seeds)
        for target in targets or _STEPS
    ]
    with Console(stderr=True).status(f"{len(jobs)} jobs") as status:

        def progress(now: CampaignState) -> None:
            status.update(f"{len(now.done)} of {len(jobs)} jobs, {now.steps:,} steps, {len(now.findings)} findings")

        where = (
            RayEngine(workers, address=ray_address, patience=patience)
            if engine == "ray"
            else LocalEngine(workers or 1, patience=patience)
        )
        file = Path(state) if state is not None else None
        result = run_campaign(jobs, engine=where, state_file=file, progress=progress)
    if as_json:
        click.echo(json.dumps(result.describe()))
    else:
        click.echo(f"{len(result.done)} jobs, {result.steps:,} steps, {len(result.findings)} findings")
        for found in result.findings.values():
            click.echo(f"  {found.target} seed {found.seed} step {found.step}: {found.detail}")
            click.echo(f"    {found.signature}, {result.times[found.signature]} times")
    return 1 if result.findings else 0


COMMANDS = [campaign]
