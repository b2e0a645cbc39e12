"""What a cluster says of itself: ``client.get_events("shm-bridge")``."""

from __future__ import annotations

import time
from typing import Any

import dask
import numpy as np
import pytest

from dask_shm_bridge import counters

from .deployment import MiB


def events(client: Any) -> list[dict[str, Any]]:
    return [event for _, event in client.get_events("shm-bridge")]


def eventually(client: Any, kind: str, **wanted: Any) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        for event in events(client):
            if event["kind"] == kind and wanted.items() <= event.items():
                return event
        assert time.monotonic() < deadline, f"no {kind} of {wanted} in {events(client)}"
        time.sleep(0.05)


def test_a_connection_says_its_mode_and_why(client, workers, pool_folder) -> None:
    event = eventually(client, "connection", mode="shared")
    assert str(pool_folder) in event["why"]


def test_it_says_so_once_for_each_host_and_way(client, workers) -> None:
    client.submit(np.ones, MiB, pure=False).result()
    said = [(e["peer"].rpartition(":")[0], e["mode"]) for e in events(client) if "peer" in e]
    # by each of the four processes: a scheduler, two workers, and this client
    assert max(said.count(one) for one in said) <= 4


def cause(dask_worker: Any = None) -> None:
    counters.explain("test", "something went the slow way")


@pytest.mark.parametrize("where", ["worker", "scheduler", "client"])
def test_a_fallback_is_an_event(client, workers, where) -> None:
    if where == "worker":
        client.run(cause, workers=[workers[0]])
    elif where == "scheduler":
        client.run_on_scheduler(lambda: counters.explain("on-it", "by the scheduler"))
    else:
        counters._said.discard("here")
        counters.explain("here", "by the client")
    name = {"worker": "test", "scheduler": "on-it", "client": "here"}[where]
    event = eventually(client, "fallback", cause=name)
    assert event["message"]


def test_a_peer_without_a_pool_is_told_of(client, deployment) -> None:
    with dask.config.set({"shm-bridge.pool.path": False}), deployment.client() as other:
        assert other.submit(sum, [1, 2], pure=False).result() == 3
        event = eventually(client, "connection", mode="tcp")
    assert "shm-bridge.pool.path" in event["why"] or "another pool" in event["why"]
