"""Many seeds on many processes: `softtdx campaign`.

A campaign is a list of seeds and a state file that says which are done and what was found. It can be stopped and goes
on where it was. A worker that dies (the finding of all findings: a crash of the process) costs its seed one more try,
alone; if it dies again, that is a finding.
"""

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

from softtdx.attack.fuzz import TARGETS, Finding, Fuzzed, fuzz
from softtdx.errors import SoftTdxError

__all__ = ["CampaignError", "CampaignState", "Job", "run_campaign"]

_VERSION = 1
Worker = Callable[[str, int, int], Fuzzed]


class CampaignError(SoftTdxError):
    """A campaign that cannot be run or resumed."""


@dataclass(frozen=True)
class Job:
    """One seed of one target, and how many steps it takes."""

    target: str
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """Its name in the state file."""
        return f"{self.target}:{self.seed}:{self.steps}"


@dataclass
class CampaignState:
    """What is done and what was found: the first finding of each signature, and how often it was met."""

    done: dict[str, int] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """All steps that were done."""
        return sum(self.done.values())

    def add(self, job: Job, result: Fuzzed) -> None:
        """Take the result of a job in."""
        self.done[job.key] = result.steps
        for found in result.findings:
            self.findings.setdefault(found.signature, found)
            self.times[found.signature] = self.times.get(found.signature, 0) + 1

    def save(self, path: Path) -> None:
        """Write it aside and put it into place, so that it is whole whenever the machine stops."""
        record = {
            "version": _VERSION,
            "done": self.done,
            "findings": [asdict(found) for found in self.findings.values()],
            "times": self.times,
        }
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps(record))
            aside.replace(path)
        except OSError as error:
            raise CampaignError(f"the campaign's state {str(path)!r} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> "CampaignState":
        """Read it; empty when there is none. CampaignError for a file that is no state."""
        try:
            record = json.loads(path.read_text())
            if record["version"] != _VERSION:
                raise CampaignError(f"{str(path)!r} is of version {record['version']!r}, not {_VERSION}")
            findings = [Finding(**found) for found in record["findings"]]
            done = {str(key): int(steps) for key, steps in record["done"].items()}
            times = {str(key): int(count) for key, count in record["times"].items()}
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CampaignError(
                f"{str(path)!r} is no state of a campaign ({error}); remove it to start anew"
            ) from error
        return cls(done, {found.signature: found for found in findings}, times)

    def describe(self) -> dict[str, object]:
        """For JSON."""
        found = [asdict(f) | {"times": self.times.get(s, 1)} for s, f in self.findings.items()]
        return {"jobs": len(self.done), "steps": self.steps, "findings": found}


def run_campaign(
    jobs: Iterable[Job],
    *,
    workers: int = 1,
    state_file: Path | None = None,
    worker: Worker = fuzz,
    progress: Callable[[CampaignState], None] | None = None,
) -> CampaignState:
    """Do every job that the state file does not name as done, on `workers` processes; save after each."""
    if workers < 1:
        raise CampaignError(f"{workers} workers; a campaign needs at least one")
    state = CampaignState.load(state_file) if state_file is not None else CampaignState()
    left = [job for job in dict.fromkeys(jobs) if job.key not in state.done]
    for job in left:
        if job.target not in TARGETS:
            raise CampaignError(f"there is no fuzzing target {job.target!r}; there are {', '.join(TARGETS)}")

    def finished(job: Job, result: Fuzzed) -> None:
        state.add(job, result)
        if state_file is not None:
            state.save(state_file)
        if progress is not None:
            progress(state)

    lost = _round(left, workers, worker, finished)
    for job in lost:  # whose worker died, or that waited when another's did: each alone, to find the culprit
        if _round([job], 1, worker, finished):
            detail = f"the process died twice in seed {job.seed} of {job.target}"
            found = Finding(job.target, job.seed, 0, f"{job.target}: the process died", detail)
            finished(job, Fuzzed(0, (found,)))
    return state


def _round(jobs: list[Job], workers: int, worker: Worker, finished: Callable[[Job, Fuzzed], None]) -> list[Job]:
    """Try the jobs once; those that a dying worker took along."""
    lost = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running: dict[Future[Fuzzed], Job] = {}
        try:
            for job in jobs:
                running[pool.submit(worker, job.target, job.seed, job.steps)] = job
        except BrokenProcessPool:
            lost = jobs[len(running) :]
        for future in as_completed(running):
            try:
                result = future.result()
            except BrokenProcessPool:
                lost.append(running[future])
            else:
                finished(running[future], result)
    return lost
