"""Many processes at one ledger: whether its rules hold, how fast it is, and how long one waits.

``python -m dask_shm_bridge.benchmarks.contention --operations 10000000 --processes 8``

Each process is a member with a connection. It ships extents to the others and by reference what it
holds, adopts what comes, gives back what it has, and allocates, at random, through the `Ledger`
that pools use and under its lock. An operation is one transaction. Meanwhile the tables are
audited, and at the end everything is given back and the pool is lent out whole, as one extent.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import shutil
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import click
import numpy as np

from dask_shm_bridge.audit import audit
from dask_shm_bridge.benchmarks import machine
from dask_shm_bridge.benchmarks.contender import OUTCOMES, Plan, work
from dask_shm_bridge.cli import HELP_OPTIONS
from dask_shm_bridge.errors import LedgerBusyError
from dask_shm_bridge.ledger import Ledger


def measure(
    plan: Plan, check_every_s: float = 1.0, report: Any = lambda done, total, seconds: None
) -> dict[str, Any]:
    """Run a plan in a new folder, and return its figures.

    Raises
    ------
    AssertionError
        If a rule of the ledger did not hold, or anything was left at the end.
    """
    context = multiprocessing.get_context("spawn")
    os.mkdir(plan.path, 0o700)
    Ledger.create(plan.path, plan.layout)
    progress = context.RawArray("Q", plan.processes)
    pipes = [context.Pipe(duplex=False) for _ in range(plan.processes)]
    controls, workers = [], []
    for index in range(plan.processes):
        ours, theirs = context.Pipe()
        controls.append(ours)
        outboxes = [writer for _, writer in pipes]
        arguments = (plan, index, theirs, pipes[index][0], outboxes, progress)
        workers.append(context.Process(target=work, args=arguments, daemon=True))
    try:
        with plan.ledger() as ledger:
            for worker in workers:
                worker.start()
            return _watch(plan, ledger, controls, workers, progress, check_every_s, report)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            if worker.pid is not None:
                worker.join()
        shutil.rmtree(plan.path)


def _watch(
    plan: Plan,
    ledger: Ledger,
    controls: list[Any],
    workers: list[Any],
    progress: Any,
    check_every_s: float,
    report: Any,
) -> dict[str, Any]:
    connections = [control.recv() for control in controls]
    start = time.perf_counter()
    for control in controls:
        control.send(connections)
    total = plan.operations * plan.processes
    audits, most_extents = 0, 0
    waiting = list(controls)
    while waiting:
        ended: list[Any] = wait(waiting, check_every_s)
        for control in ended:
            assert control.recv() is None  # an EOFError says that it failed
            waiting.remove(control)
        most_extents = max(most_extents, _audited(ledger, plan))
        audits += 1
        report(sum(progress), total, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    for control in controls:
        control.send(None)
    latencies = np.concatenate([np.frombuffer(c.recv_bytes(), np.float32) for c in controls])
    outcomes: Counter[str] = Counter()
    for control in controls:
        outcomes.update(control.recv())
    _audited(ledger, plan)
    _check_empty(ledger, plan)
    for control in controls:
        control.send(None)
        control.recv()
    assert ledger.members() == []
    done = sum(outcomes[name] for name in OUTCOMES[:4])
    p50, p99, p999 = (float(v) for v in np.percentile(latencies, (50, 99, 99.9)))
    return {
        "operations": done,
        "processes": plan.processes,
        "seconds": seconds,
        "operations_per_s": done / seconds,
        "p50_us": p50 * 1e6,
        "p99_us": p99 * 1e6,
        "p99.9_us": p999 * 1e6,
        "longest_us": float(latencies.max()) * 1e6,
        "outcomes": {name: outcomes[name] for name in OUTCOMES},
        "audits": audits + 1,
        "most_extents": most_extents,
    }


def _audited(ledger: Ledger, plan: Plan) -> int:
    """See that every rule holds just now; return how many extents there are."""
    while True:
        try:
            with ledger.record.reading() as tables:
                found = audit(tables, plan.layout)
                assert not found, found
                return len(tables.extents)
        except LedgerBusyError:
            continue


def _check_empty(ledger: Ledger, plan: Plan) -> None:
    """See that nothing was lost: the pool can be lent out whole."""
    counts = ledger.usage()["counts"]
    for name in ("extent", "lease", "ticket"):
        assert counts[name] == 0, counts
    ledger.join(1 << 40, os.getpid(), "client")
    (grant,) = ledger.allocate(1 << 40, [plan.layout.size_bytes], "scratch")
    assert grant is not None, "the pool is in pieces"
    assert grant.offset == 0
    ledger.leave([1 << 40])


@click.command("contention", context_settings=HELP_OPTIONS)
@click.option("--operations", default=1_000_000, show_default=True, type=click.IntRange(1))
@click.option("--processes", default=8, show_default=True, type=click.IntRange(1, 512))
@click.option("--seed", default=0, show_default=True)
@click.option("--check-every", default=1.0, show_default=True, help="Seconds between audits.")
@click.option("--timeout", default=2.0, show_default=True, help="Of an operation, in seconds.")
@click.option(
    "--path",
    default="/dev/shm",
    show_default=True,
    type=click.Path(exists=True, file_okay=False),
    help="Where the ledger lies, in a folder of its own.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="The figures.")
def main(
    operations: int,
    processes: int,
    seed: int,
    check_every: float,
    timeout: float,
    path: str,
    json_path: str | None,
) -> None:
    """Have many processes work at one ledger at once, and audit it meanwhile."""
    last = [0.0]

    def report(done: int, total: int, seconds: float) -> None:
        if seconds - last[0] >= 10 or done >= total:
            last[0] = seconds
            click.echo(f"{seconds:6.0f} s: {done} of {total} operations", err=True)

    folder = os.path.join(path, f"shm-bridge-contention-{os.getpid()}-{secrets.token_hex(4)}")
    plan = Plan(folder, processes, -(-operations // processes), seed, timeout)
    figures = measure(plan, check_every, report)
    figures |= {"machine": machine.describe(), "versions": machine.versions()}
    if json_path:
        Path(json_path).write_text(json.dumps(figures, indent=2) + "\n")
    click.echo(
        f"{figures['operations']} operations by {processes} processes in "
        f"{figures['seconds']:.1f} s: {figures['operations_per_s']:.0f} a second, "
        f"p50 {figures['p50_us']:.0f} us, p99 {figures['p99_us']:.0f} us, p99.9 "
        f"{figures['p99.9_us']:.0f} us; {figures['audits']} audits without a fault, at most "
        f"{figures['most_extents']} extents; at the end the pool was lent out whole"
    )
    click.echo(", ".join(f"{count} {name}" for name, count in figures["outcomes"].items()))


if __name__ == "__main__":
    main()
