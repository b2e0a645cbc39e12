"""A worker's memory limit counts its own memory, not the pool's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from distributed import Client

from . import tasks
from .deployment import Deployment, MiB, measured

LIMIT = 1_000_000_000
SIZE = 256_000_000


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    # what Dask does by default about a worker's memory
    return {"pool_size": "2 GiB", "pool_slot_size": "64 MiB"}


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"workers": 1, "nanny": True, "memory_limit": str(LIMIT)}


def status_changes(client: Client) -> list[Any]:
    """What the scheduler has heard of workers that paused, ran again or left."""
    events = [e for topic in client.get_events().values() for _, e in topic if isinstance(e, dict)]
    return [
        event
        for event in events
        if event.get("action") in ("worker-status-change", "remove-worker")
        and event.get("prev-status") != "init"
    ]


def figures(client: Client) -> dict[str, Any]:
    (result,) = client.run(tasks.memory_of_worker).values()
    return dict(result)


def circulate(client: Client, total_bytes: int, *, make: bool) -> None:
    before = figures(client)
    assert before["limit"] == LIMIT
    assert before["status"] == "running"
    most = {"dask": 0, "rss": 0, "private": 0}
    x = np.arange(SIZE // 8)
    with measured(client) as delta:
        for number in range(total_bytes // (2 * SIZE)):
            x[0] = number
            future = client.submit(tasks.memory_within, x, make, pure=False)
            inside, result = future.result()
            assert (result[::4096] == x[::4096] + make).all()
            del future, result
            after = figures(client)
            for now in (inside, after):
                assert now["pid"] == before["pid"], "the worker was restarted"
                assert now["status"] == "running", now
                assert now["spilled"] == (0, 0), now
                most = {name: max(most[name], now[name]) for name in most}
    assert status_changes(client) == []
    assert most["dask"] < LIMIT * 0.6, most  # below where spilling begins
    assert delta().fallbacks.keys() <= {"detached"}, delta()
    assert delta().inline < 2_000_000


@pytest.mark.parametrize("make", [False, True])
def test_gigabytes_one_at_a_time(client: Client, make: bool) -> None:
    circulate(client, 2_100_000_000, make=make)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_gigabytes_one_at_a_time(client: Client) -> None:
    circulate(client, 10_000_000_000, make=False)
    circulate(client, 10_000_000_000, make=True)


def test_what_a_task_writes_counts(client: Client) -> None:
    # pages of a received array become private by writing
    def write(x: np.ndarray) -> tuple[int, int]:
        from distributed import get_worker

        before = tasks.memory_of_worker(get_worker())["dask"]
        x[:] = 1
        return before, tasks.memory_of_worker(get_worker())["dask"]

    before, after = client.submit(write, np.arange(SIZE // 8)).result()
    assert after - before > SIZE * 0.9


def test_what_a_worker_keeps_counts_as_managed(client: Client, deployment: Deployment) -> None:
    future = client.submit(tasks.identity, np.arange(64 * MiB // 8), pure=False)
    future.result()
    assert client.run_on_scheduler(tasks.managed_bytes) >= 64 * MiB
