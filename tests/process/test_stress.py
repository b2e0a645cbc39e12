"""Many transfers at once through a pool that is far too small: right bytes, no end of waiting."""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from distributed import Client

from . import tasks
from .deployment import MiB, measured, usage

SECONDS = float(os.environ.get("SHM_BRIDGE_STRESS_SECONDS", "20"))
AT_ONCE = 64
PATIENCE_S = 90.0

pytestmark = pytest.mark.timeout(int(SECONDS) + 240)


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": 8 * MiB, "pool_slot_size": 512 * 1024}


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"threads": 4}


class Transfers:
    """What one of the threads does, over and over."""

    def __init__(self, client: Client, workers: list[str], number: int) -> None:
        self.client = client
        self.workers = workers
        self.random = random.Random(number)
        self.seed = number << 20

    def make(self) -> tuple[np.ndarray, int]:
        self.seed += 1
        nbytes = int(64 * 1024 * 128 ** self.random.random()) // 8 * 8
        x = tasks.ramp(nbytes, self.seed)
        return x, tasks.crc(x)

    def argument_and_result(self) -> None:
        x, right = self.make()
        result = self.submit(tasks.check_and_return, x, right).result(PATIENCE_S)
        assert tasks.crc(result) == right

    def overwritten_argument(self) -> None:
        x, right = self.make()
        result = self.submit(tasks.check_and_overwrite, x, right, 77).result(PATIENCE_S)
        assert tasks.crc(result) == tasks.crc(tasks.ramp(x.nbytes, 77))
        assert tasks.crc(x) == right

    def scattered(self) -> None:
        x, right = self.make()
        direct = self.random.random() < 0.5
        (future,) = self.client.scatter([x], hash=False, direct=direct)
        assert self.submit(tasks.crc, future).result(PATIENCE_S) == right
        assert tasks.crc(self.client.gather(future, direct=not direct)) == right

    def between_workers(self) -> None:
        x, right = self.make()
        here, there = self.random.sample(self.workers, 2)
        made = self.submit(tasks.ramp, x.nbytes, self.seed, workers=here)
        moved = self.submit(tasks.check_and_return, made, right, workers=there)
        assert tasks.crc(moved.result(PATIENCE_S)) == right

    def broadcast(self) -> None:
        x, right = self.make()
        (future,) = self.client.scatter([x], hash=False, broadcast=True)
        checks = [self.submit(tasks.crc, future, workers=w) for w in self.workers]
        assert self.client.gather(checks) == [right] * len(checks)

    def two_gathers(self) -> None:
        x, right = self.make()
        future = self.submit(tasks.ramp, x.nbytes, self.seed)
        first, second = future.result(PATIENCE_S), future.result(PATIENCE_S)
        first[:] = 0
        assert tasks.crc(second) == right

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        return self.client.submit(*args, pure=False, **kwargs)


WAYS: list[Callable[[Transfers], None]] = [
    Transfers.argument_and_result,
    Transfers.overwritten_argument,
    Transfers.scattered,
    Transfers.between_workers,
    Transfers.broadcast,
    Transfers.two_gathers,
]


def test_a_crowd(client: Client, workers: list[str]) -> None:
    done: Counter[str] = Counter()
    stop = threading.Event()
    until = time.monotonic() + SECONDS

    def run(number: int) -> None:
        transfers = Transfers(client, workers, number)
        try:
            while time.monotonic() < until and not stop.is_set():
                way = transfers.random.choice(WAYS)
                way(transfers)
                done[way.__name__] += 1
        except BaseException:
            stop.set()
            raise

    with measured(client) as delta, ThreadPoolExecutor(AT_ONCE) as threads:
        for future in [threads.submit(run, number) for number in range(AT_ONCE)]:
            future.result()
    d = delta()
    assert set(done) == {way.__name__ for way in WAYS}, done
    assert d.copied > 0, d
    assert d.pieces > 0, d
    assert d.everywhere("sent", "referenced") > 0, d
    counts = usage(extent=0, lease=0, ticket=0)
    assert (counts["extent"], counts["lease"], counts["ticket"]) == (0, 0, 0), counts
    print(f"{dict(done)}\n{d}")
