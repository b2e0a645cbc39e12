"""A long day in a notebook: living arrays and futures don't push new work out of the pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from distributed import Client

from . import tasks
from .deployment import MiB, measured

SIZE = MiB
ROUNDS = 60


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "64 MiB", "pool_slot_size": "4 MiB"}


def test_a_day_does_not_drift_to_inline(client: Client) -> None:
    kept: list[Any] = []  # arrays that the notebook looks at, far more than the pool can hold
    futures: list[Any] = []
    shares = []
    for hour in range(4):
        copied = inline = 0
        with measured(client) as moved:
            for number in range(ROUNDS):
                seed = hour * ROUNDS + number
                x = tasks.numbers(SIZE, seed)
                future = client.submit(tasks.fresh, x, pure=False)
                kept.append((seed, future.result()))
                futures.append(future)
                if number % 10 == 0:
                    client.publish_dataset(future, name=f"result-{seed}")
        delta = moved()
        inline = delta.everywhere("sent", "inline")
        copied = delta.everywhere("sent", "copied") + delta.everywhere("sent", "referenced")
        shares.append(inline / (inline + copied))
    # Each hour pins twice what the pool can hold. Without relief, all hours but the first go
    # inline whole.
    print(shares)
    assert max(shares) < 0.25, shares
    for seed, array in kept[:: ROUNDS // 2]:
        np.testing.assert_array_equal(array, tasks.numbers(SIZE, seed) + 1)
    for name in client.list_datasets():
        client.unpublish_dataset(name)
    kept.clear()
    futures.clear()
