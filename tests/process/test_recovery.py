"""Check and sweep beside a cluster at work: they see it all right, and cost it nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from . import tasks
from .deployment import Deployment, MiB, environment, measured, usage

AT_ONCE = 4
LOOKS = 5


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": 32 * MiB, "pool_slot_size": 2 * MiB}  # crowded: extents come and go


def shm(command: str, config: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Run a command in a process of its own; return its exit status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "dask", "shm", command, "--json"],
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


class Traffic:
    """Threads that move arrays through a cluster, and look at each byte, until it is left."""

    def __init__(self, client: Client, scatter: bool = True) -> None:
        self.client = client
        self.scatter = scatter
        self.done: Counter[str] = Counter()
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(AT_ONCE)

    def _run(self, number: int) -> None:
        seed = number << 20
        while not self._stop.is_set():
            seed += 1
            x = tasks.ramp(MiB, seed)
            right = tasks.crc(x)
            future = self.client.submit(tasks.check_and_return, x, right, pure=False)
            assert tasks.crc(future.result(60)) == right
            if self.scatter:
                (there,) = self.client.scatter([x], hash=False)
                assert self.client.submit(tasks.crc, there, pure=False).result(60) == right
            self.done["rounds"] += 1

    def __enter__(self) -> Traffic:
        self._futures = [self._threads.submit(self._run, number) for number in range(AT_ONCE)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for future in self._futures:
            future.result(120)
        self._threads.shutdown()


def test_beside_traffic(client: Client, pool_config: dict[str, Any]) -> None:
    seen_used = 0
    with measured(client) as moved, Traffic(client) as traffic:
        for _ in range(LOOKS):
            code, seen = shm("check", pool_config)
            assert code == 0, seen
            (pool,) = seen["pools"]
            assert all(member["alive"] for member in pool["members"])
            assert pool["counts"]["members"] >= 4  # a client, a scheduler, two workers
            seen_used += pool["used_bytes"]
            code, swept = shm("sweep", pool_config)
            assert code == 0, swept
            assert (swept["members"], swept["files"], swept["pools"]) == ([], [], [])
    assert traffic.done["rounds"] > LOOKS
    assert seen_used > 0
    assert moved().copied > 0, moved()
    counts = usage(extent=0, lease=0, ticket=0)
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts


def test_a_worker_killed_in_traffic(pool_config: dict[str, Any], tmp_path: Path) -> None:
    # Dask's work stealing keeps closed workers, and these the tasks that they ran last: in one run
    # of ten the scheduler keeps such a task and its array (docs/what-remains.md).
    config = {**pool_config, "distributed.scheduler.work-stealing": False}
    with (
        Deployment(tmp_path, config, workers=3) as deployment,
        deployment.client() as client,
    ):
        # Dask's scatter fails when a worker that it has chosen dies, over any protocol.
        with Traffic(client, scatter=False) as traffic:
            for worker in deployment.processes[2:]:
                before = traffic.done["rounds"]
                while traffic.done["rounds"] < before + 2 * AT_ONCE:
                    code, seen = shm("check", pool_config)
                    assert code == 0, seen
                os.kill(worker.pid, signal.SIGKILL)
                worker.wait(10)
                code, swept = shm("sweep", pool_config)  # its peers may have been quicker
                assert code == 0, swept
                (pool,) = swept["after"]["pools"]
                assert worker.pid not in [member["pid"] for member in pool["members"]]
        code, seen = shm("check", pool_config)
        assert code == 0, seen
        assert usage(extent=0, lease=0, ticket=0)["extent"] == 0
