"""One way of moving data put to the demo's jobs, by a client process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import psutil

from dask_shm_bridge.benchmarks.cluster import ProcessCluster
from dask_shm_bridge.benchmarks.jobs import Arrays, Job, Outcome
from dask_shm_bridge.benchmarks.memory import MemoryWatch, Peak
from dask_shm_bridge.benchmarks.traffic import Traffic

#: Part of the rows of a job that warms a cluster up: imports, connections, first tasks.
WARM_UP_PART = 0.002


@dataclass
class Record:
    """What one job took one way.

    Attributes
    ----------
    job, way
        What was done, and how.
    seconds
        Each run, from the array in the client's memory to the results there.
    computing_seconds
        Of each run, the worker's own computing; empty where the work is spread.
    arrays
        The results of the last run.
    traffic
        What moved by which way, over all runs; None where nobody counts.
    peaks
        Memory of each process, over all runs.
    """

    job: Job
    way: str
    seconds: list[float] = field(default_factory=list)
    computing_seconds: list[float] = field(default_factory=list)
    arrays: Arrays = field(default_factory=list)
    traffic: Traffic | None = None
    peaks: dict[str, Peak] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.seconds)

    @property
    def rest_seconds(self) -> list[float]:
        """Of each run, what is not the worker's computing; empty where that isn't known."""
        if not self.computing_seconds:
            return []
        pairs = zip(self.seconds, self.computing_seconds, strict=True)
        return [whole - computing for whole, computing in pairs]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the results, for JSON."""
        return {
            "job": self.job.name,
            "way": self.way,
            "seconds": self.seconds,
            "computing_s": self.computing_seconds,
            "traffic": self.traffic.as_dict() if self.traffic else None,
            "peaks": {role: vars(peak) for role, peak in self.peaks.items()},
        }


def do_way(
    way: str,
    jobs: Sequence[Job],
    part: float,
    repeats: int,
    advance: Callable[[str], None] = lambda text: None,
    started: Callable[[Sequence[int]], None] = lambda pids: None,
) -> list[Record]:
    """Start a cluster, do every job `repeats` times over it, and stop it.

    Parameters
    ----------
    way
        One of `WAYS`; ``npy`` means files between processes and a ``tcp`` cluster.
    jobs
        What to do.
    part
        Part of the full number of rows.
    repeats
        Timed runs of each job, after one with little data.
    advance
        Called with a short text before every run.
    started
        Called once, with the ids of the cluster's processes.
    """
    records = []
    with (
        ProcessCluster("tcp" if way == "npy" else way) as cluster,
        tempfile.TemporaryDirectory(prefix="npy-", ignore_cleanup_errors=True) as folder,
    ):
        started(list(cluster.pids.values()))

        def run(job: Job, array: Any) -> Outcome:
            if way == "npy":
                return job.run_by_file(cluster.client, array, folder)
            return job.run(cluster.client, array)

        for job in jobs:
            run(job, job.data(WARM_UP_PART))
            array = job.data(part)
            record = Record(job, way)
            before = Traffic.of(cluster.client) if way == "shm" else None
            with MemoryWatch(cluster.pids) as watch:
                for _ in range(repeats):
                    advance(f"{way}: {job.name}")
                    began = time.perf_counter()
                    outcome = run(job, array)
                    record.seconds.append(time.perf_counter() - began)
                    if outcome.computing_seconds is not None:
                        record.computing_seconds.append(outcome.computing_seconds)
            now = Traffic.of(cluster.client) if before else None
            record.traffic = now.since(before) if now and before else None
            # Copies: results of the pool's way would keep hold of it, past the cluster's end.
            record.arrays = [result.copy() for result in outcome.arrays]
            record.peaks = watch.peaks
            records.append(record)
            del outcome, array
    return records


class TrialError(RuntimeError):
    """A way failed or hung; the message says how."""


def do_way_apart(
    way: str,
    jobs: Sequence[Job],
    part: float,
    repeats: int,
    advance: Callable[[str], None] = lambda text: None,
    patience_seconds: float = 300.0,
) -> list[Record]:
    """Do the same as `do_way`, with the client in a fresh process.

    So the client's memory is the way's own, not what the way before has left, and a way that
    hangs can be ended.

    Parameters
    ----------
    way, jobs, part, repeats, advance
        As for `do_way`.
    patience_seconds
        A run or a start that takes longer counts as hung.

    Raises
    ------
    TrialError
        If the way failed or hung. Nothing of it is left running.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_report_way, args=(sender, way, list(jobs), part, repeats), name=f"demo-{way}"
    )
    process.start()
    sender.close()
    family = _living([process.pid or 0])
    try:
        while receiver.poll(patience_seconds):
            kind, content = receiver.recv()
            if kind == "started":
                family |= _living(content)
            elif kind == "doing":
                advance(content)
            elif kind == "done":
                records: list[Record] = content
                process.join(patience_seconds)
                return records
            else:
                raise TrialError(f"{way} failed:\n{content}")
        raise TrialError(f"{way} hung: no news for {patience_seconds:g} s")
    except EOFError:
        raise TrialError(f"{way} failed: its client process ended unasked") from None
    finally:
        for member in family:
            with contextlib.suppress(psutil.Error):
                member.kill()
        process.join()
        process.close()
        receiver.close()


def _report_way(
    sender: Connection, way: str, jobs: Sequence[Job], part: float, repeats: int
) -> None:
    """Do a way, in the process started for it, and send what comes of it."""
    warnings.filterwarnings("ignore", message="Sending large graph")
    try:
        records = do_way(
            way,
            jobs,
            part,
            repeats,
            advance=lambda text: sender.send(("doing", text)),
            started=lambda pids: sender.send(("started", pids)),
        )
        sender.send(("done", records))
    except Exception:
        sender.send(("failed", traceback.format_exc()))


def _living(pids: Sequence[int]) -> set[psutil.Process]:
    """Take hold of processes while they are there: each is known by its start time as well."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.add(psutil.Process(pid))
    return found
