"""Workers under pressure: data spilled from the pool, a paused worker, a reader that is stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
from distributed import Client, wait
from distributed.core import Status

from . import tasks
from .deployment import Deployment, MiB, measured, usage

SIZE = 2 * MiB
SMALL = 400_000


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    # Dask would let a worker that was paused by hand run again, having looked at its memory
    return {
        "pool_size": 32 * MiB,
        "pool_slot_size": 2 * MiB,
        "distributed.worker.memory.pause": False,
    }


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    # a limit, so that workers can spill; nothing here comes near it
    return {"memory_limit": "4 GB"}


@pytest.fixture(autouse=True)
def nothing_left(client: Client) -> Any:
    yield
    counts = usage(extent=0, lease=0, ticket=0)
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts


def spill(dask_worker: Any = None) -> int:
    """Put everything that this worker keeps on disk; return how many bytes lie there."""
    while dask_worker.data.fast:
        dask_worker.data.evict()
    return int(dask_worker.data.spilled_total.disk)


def spilled(dask_worker: Any = None) -> int:
    return int(dask_worker.data.spilled_total.disk)


def pause(status: str, dask_worker: Any = None) -> None:
    dask_worker.status = Status[status]


def test_what_is_spilled_gives_its_lease_back(client: Client, workers: list[str]) -> None:
    arrays = [tasks.numbers(SIZE, seed) for seed in range(6)]
    futures = client.scatter(arrays, hash=False, workers=workers[:1])
    assert usage(extent=6, lease=6, ticket=0)["lease"] == 6  # the worker's
    on_disk = client.run(spill, workers=workers[:1])[workers[0]]
    assert on_disk >= 6 * SIZE
    assert usage(extent=0, lease=0)["lease"] == 0
    # from disk to the client, to a task there, and to the other worker
    for future, array in zip(futures, arrays, strict=True):
        assert (future.result() == array).all()
    there = client.map(tasks.crc, futures, workers=workers[:1], pure=False)
    assert client.gather(there) == [tasks.crc(array) for array in arrays]
    client.run(spill, workers=workers[:1])
    with measured(client) as delta:
        beyond = client.map(tasks.crc, futures, workers=workers[1:], pure=False)
        assert client.gather(beyond) == [tasks.crc(array) for array in arrays]
    assert delta().at("workers", "sent", "copied") == 6 * SIZE, delta()
    assert delta().fallbacks == {}, delta()
    del futures
    for future in (*there, *beyond):
        future.release()


def test_spilling_under_a_reader(client: Client, workers: list[str]) -> None:
    """What a client looks at keeps its own lease while the worker's copy goes to disk."""
    future = client.submit(tasks.numbers, SIZE, 9, workers=workers[:1], pure=False)
    here = future.result()
    assert client.run(spill, workers=workers[:1])[workers[0]] >= SIZE
    again = future.result()
    here[:] = 0
    assert tasks.crc(again) == tasks.crc(tasks.numbers(SIZE, 9))
    assert tasks.crc(future.result()) == tasks.crc(tasks.numbers(SIZE, 9))
    del here, again


def test_a_paused_worker(client: Client, workers: list[str]) -> None:
    paused, other = workers
    kept = client.scatter([tasks.numbers(SIZE, 20)], hash=False, workers=[paused])
    client.run(pause, "paused", workers=[paused])
    try:
        held = [
            client.submit(tasks.crc, tasks.numbers(SIZE, seed), pure=False, workers=[paused])
            for seed in range(4)
        ]
        with measured(client) as delta:
            for seed in range(20):  # far more than the pool holds
                x = tasks.numbers(SIZE, 100 + seed)
                result = client.submit(tasks.fresh, x, pure=False, workers=[other]).result()
                assert (result == x + 1).all()
        del result
        assert delta().inline < SMALL, delta()
        assert delta().everywhere("received", "viewed") >= 60 * SIZE, delta()
        assert not any(future.done() for future in held)
        assert (kept[0].result() == tasks.numbers(SIZE, 20)).all()  # it still serves data
    finally:
        client.run(pause, "running", workers=[paused])
    right = [tasks.crc(tasks.numbers(SIZE, seed)) for seed in range(4)]
    assert client.gather(held) == right
    del kept


def test_a_worker_that_is_stopped_for_a_while(
    client: Client, workers: list[str], deployment: Deployment
) -> None:
    """It reads nothing: what was sent to it stays in the pool, and the others go on."""
    stopped, other = workers
    pid = client.run(os.getpid, workers=[stopped])[stopped]
    os.kill(pid, signal.SIGSTOP)
    try:
        sent = [
            client.submit(tasks.crc, tasks.numbers(SIZE, seed), pure=False, workers=[stopped])
            for seed in range(40)
        ]
        moved = []
        for seed in range(10):
            x = tasks.numbers(SIZE, 100 + seed)
            future = client.submit(tasks.fresh, x, pure=False, workers=[other])
            moved.append(bool((future.result(60) == x + 1).all()))
        assert moved == [True] * 10
        assert not any(future.done() for future in sent)
    finally:
        os.kill(pid, signal.SIGCONT)
    right = [tasks.crc(tasks.numbers(SIZE, seed)) for seed in range(40)]
    assert client.gather(sent) == right
    assert sorted(client.scheduler_info(n_workers=-1)["workers"]) == workers
    for future in sent:
        future.release()


def test_a_worker_that_holds_everything(client: Client, workers: list[str]) -> None:
    """Twice the pool in one worker's memory, and all of it named again at once."""
    futures = []
    with measured(client) as delta:
        for seed in range(32):
            x = np.full(SIZE // 8, seed)
            futures += client.scatter([x], hash=False, workers=workers[:1])
        wait(futures)
        for seed, array in enumerate(client.gather(futures)):
            assert (array == seed).all()
        del array
        there = client.map(tasks.crc, futures, workers=workers[1:], pure=False)
        right = [tasks.crc(np.full(SIZE // 8, seed)) for seed in range(32)]
        assert client.gather(there) == right
    d = delta()
    assert set(d.fallbacks) <= {"detached", "hold-limit", "full"}, d
    assert "detached" in d.fallbacks, d
    # While all of it is alive there, others find room: what is old has pages of its own by then.
    x = tasks.numbers(SIZE, 5)
    deadline = time.monotonic() + 30
    while True:
        with measured(client) as delta:
            assert client.submit(tasks.crc, x, pure=False).result() == tasks.crc(x)
        if delta().copied == SIZE and set(delta().fallbacks) <= {"detached"}:
            break
        assert time.monotonic() < deadline, delta()
    for future in (*futures, *there):
        future.release()
