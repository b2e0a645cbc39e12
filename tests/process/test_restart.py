"""Workers that are restarted, by the client or by their nanny, with arrays in the pool."""

from __future__ import annotations

import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from dask_shm_bridge import store

from . import tasks
from .deployment import MiB, measured, usage

SIZE = 2 * MiB


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "128 MiB", "pool_slot_size": "8 MiB"}


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"nanny": True}


def count_members(client: Client) -> int:
    joined = store.attached()
    assert joined is not None
    joined.attachment.sweep()
    return len(joined.ledger.members())


def left(members: int, client: Client) -> list[int]:
    """Extents, leases, tickets, and members more than before, once there are none.

    What Dask had on a connection to a worker that died is in cycles, for the collector to find.
    """
    deadline = time.monotonic() + 20
    while True:
        client.run_on_scheduler(gc.collect)
        client.run(gc.collect)
        counts = usage(timeout_s=0.2, extent=0, lease=0, ticket=0)
        found = [counts["extent"], counts["lease"], counts["ticket"]]
        found.append(count_members(client) - members)
        if not any(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def moves(client: Client) -> None:
    """Move an array to each worker and back, by the pool alone."""
    x = tasks.numbers(SIZE, 77)
    addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
    assert len(addresses) == 2
    with measured(client) as delta:
        for worker in addresses:
            future = client.submit(tasks.fresh, x, pure=False, workers=[worker])
            assert (future.result(60) == x + 1).all()
    assert delta().inline < 200_000, delta()
    assert delta().fallbacks == {}, delta()


def test_the_client_restarts_all_workers(client: Client) -> None:
    moves(client)
    members = count_members(client)
    x = tasks.numbers(SIZE, 1)
    pids = client.run(os.getpid).values()
    futures = client.scatter([x + seed for seed in range(6)], hash=False)
    made = [client.submit(tasks.fresh, future) for future in futures]
    kept = client.gather(made)
    client.publish_dataset(x, name="published")
    client.restart(timeout=60)
    assert not set(pids) & set(client.run(os.getpid).values())
    assert all((array == x + seed + 1).all() for seed, array in enumerate(kept))
    assert (client.get_dataset("published") == x).all()  # the scheduler's own
    client.unpublish_dataset("published")
    moves(client)
    kept[0][:] = 0
    del kept, futures, made
    assert left(members, client) == [0, 0, 0, 0]


def end_once(x: np.ndarray, mark: str, how: str) -> int:
    """End this process, the first time, with its argument and more arrays alive."""
    found = tasks.crc(x)
    if not os.path.exists(mark):
        open(mark, "w").close()
        if how == "_exit":
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    return found


@pytest.mark.parametrize("how", ["_exit", "SIGKILL"])
def test_the_nanny_restarts_a_worker(client: Client, tmp_path: Path, how: str) -> None:
    moves(client)
    members = count_members(client)
    pids = set(client.run(os.getpid).values())
    x = tasks.numbers(SIZE, 2)
    others = [client.submit(tasks.numbers, SIZE, seed, pure=False) for seed in range(6)]
    kept = client.gather(others)
    future = client.submit(end_once, x, str(tmp_path / "mark"), how, pure=False)
    assert future.result(90) == tasks.crc(x)
    assert (tmp_path / "mark").exists()
    client.wait_for_workers(2, timeout=60)
    now = set(client.run(os.getpid).values())
    assert len(pids & now) == 1
    assert len(now) == 2
    for seed, (array, again) in enumerate(zip(kept, client.gather(others), strict=True)):
        right = tasks.numbers(SIZE, seed)
        assert (array == right).all()
        assert (again == right).all()  # what was lost was made again
    moves(client)
    del kept, others, array, again, future
    assert left(members, client) == [0, 0, 0, 0]
