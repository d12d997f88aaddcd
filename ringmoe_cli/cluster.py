"""Who does the work: threads here, processes here, or a Dask cluster elsewhere."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from ringmoe_cli.errors import RingmoeError

T = TypeVar("T")
R = TypeVar("R")

AHEAD = 2
"""Tasks in flight per worker: enough to keep it busy, few enough to bound memory."""

MOST_THREADS = 8
"""Threads by default at most: each holds a region in memory."""

LOST_RETRIES = 3
"""How often a task may lose its worker before the run is given up."""


@dataclass(frozen=True)
class Engine:
    """What runs independent tasks. Tasks must be importable functions that can be repeated."""

    workers: int | None = None
    """Processes of a local cluster; None: threads of this process."""
    scheduler: str | None = None
    """Address of a running Dask scheduler."""
    slurm: Mapping[str, str] = field(default_factory=dict)
    """Settings of a dask-jobqueue SLURMCluster, such as queue, cores, memory, walltime."""
    threads: int | None = None
    """Threads, where threads do the work; None: one per core available, up to `MOST_THREADS`."""

    @property
    def distributed(self) -> bool:
        """Whether Dask workers do the work."""
        return bool(self.workers or self.scheduler or self.slurm)

    def run(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Results of `function(task)` as they are finished, in any order.

        The first failure is raised and stops the rest.
        """
        return (
            self._on_dask(function, tasks)
            if self.distributed
            else self._on_threads(function, tasks)
        )

    def _on_threads(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        count = self.threads or min(available_cores(), MOST_THREADS)
        waiting = iter(tasks)
        with ThreadPoolExecutor(count) as pool:
            running: set[Future[R]] = set()
            try:
                while True:
                    for task in islice(waiting, count * AHEAD - len(running)):
                        running.add(pool.submit(function, task))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _on_dask(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        from distributed import as_completed

        waiting = iter(tasks)
        with self.client() as client:
            width = max(1, len(client.scheduler_info()["workers"])) * AHEAD
            first = [submit(client, function, t) for t in islice(waiting, width)]
            running = as_completed(first)
            for future in running:
                yield outcome(future)
                for task in islice(waiting, 1):
                    running.add(submit(client, function, task))

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A Dask client of this engine; clusters started here end with it.

        Raises:
            RingmoeError: if the scheduler or SLURM cannot be reached.
        """
        import dask
        from distributed import Client

        settings = {"distributed.scheduler.allowed-failures": LOST_RETRIES}
        with dask.config.set(settings):
            if self.scheduler:
                yield from connected(Client, self.scheduler)
                return
            with self.cluster() as cluster, Client(cluster) as client:
                yield client

    def cluster(self) -> Any:
        """A cluster that this process starts."""
        if self.slurm:
            return slurm_cluster(self.slurm, self.workers or 1)
        from distributed import LocalCluster

        return LocalCluster(
            n_workers=self.workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",  # None would still open 8787, which may be taken
        )


def connected(client: Any, address: str) -> Iterator[Any]:
    """A client of a running scheduler."""
    try:
        opened = client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise RingmoeError(f"no Dask scheduler answers at {address}: {error}") from error
    with opened:
        yield opened


def slurm_cluster(settings: Mapping[str, str], jobs: int) -> Any:
    """Dask workers as SLURM jobs.

    Raises:
        RingmoeError: if dask-jobqueue is missing or refuses the settings.
    """
    try:
        from dask_jobqueue.slurm import SLURMCluster
    except ImportError as error:
        raise RingmoeError("--slurm needs dask-jobqueue: pip install ringmoe[slurm]") from error
    plain: dict[str, Any] = {"cores": 1, "memory": "4GB", "processes": 1, **settings}
    for key in ("cores", "processes"):
        plain[key] = int(plain[key])
    try:
        cluster: Any = SLURMCluster(**plain)
    except (TypeError, ValueError) as error:
        raise RingmoeError(f"--slurm {settings}: {error}") from error
    cluster.scale(jobs=jobs)
    return cluster


def submit(client: Any, function: Callable[[T], R], task: T) -> Any:
    """One task on a Dask cluster; never taken from a cache of earlier results."""
    return client.submit(function, task, pure=False)


def outcome(future: Any) -> Any:
    """A finished task's result.

    Raises:
        RingmoeError: if its workers kept dying.
    """
    from distributed.scheduler import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        raise RingmoeError(
            f"a task lost its worker {LOST_RETRIES + 1} times (out of memory?); use fewer workers"
        ) from error


def parse_slurm(text: str | None) -> dict[str, str]:
    """`queue=short,cores=4` as a mapping.

    Raises:
        RingmoeError: for anything else.
    """
    if not text:
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(key and mark for key, mark, _ in pairs):
        raise RingmoeError(f"--slurm {text}: write key=value pairs, e.g. queue=short,memory=8GB")
    return {key.strip(): value.strip() for key, _, value in pairs}


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
