"""Where the jobs of a campaign run: on processes of this machine, or on a Ray cluster.

An engine tries jobs once and says which of them were lost with a worker that died. What a loss means is the campaign's
business.
"""

import faulthandler
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Any, Protocol

from softtdx.attack.fuzz import Fuzzed
from softtdx.errors import SoftTdxError

__all__ = ["CampaignError", "Engine", "Job", "LocalEngine", "RayEngine", "Worker"]

Worker = Callable[[str, int, int], Fuzzed]
Finished = Callable[["Job", Fuzzed], None]

_LOOPBACK = "127.0.0.1"
_STARTS = 3  # of a cluster of our own: a busy machine may take longer than Ray waits
_STDERR = 2
_OBJECT_STORE = 80 << 20  # results are small; less than this Ray refuses


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


class Engine(Protocol):
    """Used in a with statement. `tries`: how often a job that takes its worker along is tried."""

    tries: int

    def __enter__(self) -> "Engine": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def round(self, jobs: Sequence[Job], worker: Worker, finished: Finished, *, alone: bool = False) -> list[Job]:
        """Try the jobs once, `alone` one after the other; those whose worker died. `finished` is told of the others."""


class LocalEngine:
    """Processes of this machine. When one dies, all jobs that were under way are lost: nobody knows the culprit."""

    tries = 2

    def __init__(self, workers: int = 1, *, patience: float | None = None) -> None:
        """On `workers` processes; one whose job takes more than `patience` seconds dies."""
        _at_least_one(workers)
        self._workers = workers
        self._patience = patience

    def __enter__(self) -> "LocalEngine":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left: a round ends its processes."""

    def round(self, jobs: Sequence[Job], worker: Worker, finished: Finished, *, alone: bool = False) -> list[Job]:
        """See Engine."""
        lost: list[Job] = []
        for part in [[job] for job in jobs] if alone else [list(jobs)]:
            lost += self._pool(part, worker, finished)
        return lost

    def _pool(self, jobs: list[Job], worker: Worker, finished: Finished) -> list[Job]:
        lost = []
        context = get_context("spawn")
        enough = context.Event()
        pool = ProcessPoolExecutor(
            min(self._workers, len(jobs) or 1), mp_context=context, initializer=_serve, initargs=(enough,)
        )
        try:
            running: dict[Future[Fuzzed], Job] = {}
            try:
                for job in jobs:
                    running[pool.submit(_work, worker, job, self._patience)] = job
            except BrokenProcessPool:
                lost = jobs[len(running) :]
            for future in as_completed(running):
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost.append(running[future])
                else:
                    finished(running[future], result)
        except BaseException:  # Ctrl-C, most likely: what the workers are at is of no use any more
            enough.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return lost


class RayEngine:
    """A Ray cluster: the one at `address`, or one of this machine that lives as long as the engine.

    Ray's own retries are off, its usage statistics and its dashboard too, and what is started here listens on the
    loopback interface only. A job may be lost because its node died, for which it cannot help: it gets one more try.
    """

    tries = 3

    def __init__(
        self, workers: int | None = None, *, address: str | None = None, patience: float | None = None
    ) -> None:
        """At most `workers` jobs at once, by default as many as the cluster has CPUs; `patience` as for LocalEngine.

        CampaignError without Ray.
        """
        if workers is not None:
            _at_least_one(workers)
        self._workers = workers
        self._address = address
        self._patience = patience
        self._ray = _import_ray(address)

    def __enter__(self) -> "RayEngine":
        """Join the cluster, or start one. CampaignError when there is none at the address."""
        options: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": "ERROR"}
        if self._address is None:
            options |= {"address": "local", "num_cpus": self._workers, "object_store_memory": _OBJECT_STORE}
            options |= {"include_dashboard": False, "_node_ip_address": _LOOPBACK}
        for attempt in range(_STARTS):
            try:
                self._ray.init(**options)
                break
            except Exception as error:  # Ray raises just that when its processes take more than 30 s to start
                self._ray.shutdown()
                if self._address is not None or attempt == _STARTS - 1:
                    raise self._no_cluster(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def _no_cluster(self, error: Exception) -> CampaignError:
        where = f"at {self._address!r}" if self._address else "on this machine"
        return CampaignError(
            f"no Ray cluster {where} can be used: {error}; start one with `ray start --head` (on loopback with "
            f"--node-ip-address {_LOOPBACK}), give its address with --ray-address, or use --engine local"
        )

    def _slots(self) -> int:
        """How many jobs may be under way: nodes come and go."""
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        return max(min(cpus, self._workers or cpus), 1)

    def round(self, jobs: Sequence[Job], worker: Worker, finished: Finished, *, alone: bool = False) -> list[Job]:
        """See Engine."""
        ray = self._ray
        task = ray.remote(num_cpus=1, max_retries=0)(_work)
        waiting, running, lost = deque(jobs), dict[Any, Job](), list[Job]()
        while waiting or running:
            while waiting and len(running) < (1 if alone else self._slots()):
                job = waiting.popleft()
                running[task.remote(worker, job, self._patience)] = job
            (ready,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(ready)
            try:
                result = ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # the worker lives: it cannot do its work at all
                raise CampaignError(f"a worker cannot run {job.key}: {error.cause or error}") from error
            except ray.exceptions.RayError:
                lost.append(job)
            else:
                finished(job, result)
        return lost


def _serve(enough: Event) -> None:
    """A process of the local engine starts: Ctrl-C is its parent's to answer, and it does not outlive that parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None  # spawned

    def orphaned() -> None:
        parent.join()
        os._exit(1)

    def dismissed() -> None:
        enough.wait()
        os._exit(1)

    for watch in (orphaned, dismissed):
        threading.Thread(target=watch, daemon=True).start()


def _work(worker: Worker, job: Job, patience: float | None) -> Fuzzed:
    """In the worker. One that hangs prints where, and dies: the campaign takes both for the same."""
    if patience is None:
        return worker(job.target, job.seed, job.steps)
    faulthandler.dump_traceback_later(patience, exit=True, file=_STDERR)
    try:
        return worker(job.target, job.seed, job.steps)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _at_least_one(workers: int) -> None:
    if workers < 1:
        raise CampaignError(f"{workers} workers; a campaign needs at least one")


def _import_ray(address: str | None) -> Any:
    """Ray, with everything that talks to others turned off before it can begin to."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None or address.partition(":")[0] in ("localhost", _LOOPBACK):
        # On Linux Ray takes 127.0.0.1 for the address by which others reach this machine, unless it is told that it
        # makes no clusters of machines, as it is on other systems.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ImportError as error:
        raise CampaignError("Ray is not installed: pip install 'softtdx[ray]', or use --engine local") from error
    return ray
