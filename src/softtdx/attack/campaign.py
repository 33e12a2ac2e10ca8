"""Many seeds on many processes or machines: `softtdx campaign`.

A campaign is a list of seeds and a state file that says which are done and what was found. It can be stopped and goes
on where it was. A worker that dies (the finding of all findings: a crash of the process) costs its seed further tries,
alone; if it dies each time, that is a finding.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from softtdx.attack.engines import CampaignError, Engine, Job, LocalEngine, Worker
from softtdx.attack.fuzz import TARGETS, Finding, Fuzzed, fuzz

__all__ = ["CampaignError", "CampaignState", "Job", "run_campaign"]

_VERSION = 1


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
    engine: Engine | None = None,
    state_file: Path | None = None,
    worker: Worker = fuzz,
    progress: Callable[[CampaignState], None] | None = None,
) -> CampaignState:
    """Do every job that the state file does not name as done, on `engine` (one process here); save after each."""
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

    if not left:
        return state
    with engine or LocalEngine() as where:
        lost = where.round(left, worker, finished)
        for _ in range(where.tries - 1):  # whose worker died, or that waited when another's did: alone now
            lost = where.round(lost, worker, finished, alone=True) if lost else []
        for job in lost:
            detail = f"the process died or hung {where.tries} times in seed {job.seed} of {job.target}"
            finished(job, Fuzzed(0, (Finding(job.target, job.seed, 0, f"{job.target}: the process died", detail),)))
    return state
