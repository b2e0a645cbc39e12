"""A client process that sends everything through a cluster, and looks at each byte that comes back.

``python -m faults.traffic ADDRESS SEED`` writes a line of JSON for each thing done, until a line
comes to its standard input. What a task or a call raises is written too: `chaos` judges it.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client
from process import tasks

THREADS = 3
HANG_S = 60.0
BROADCAST = "FAULTS_BROADCAST"  # left out otherwise: it hangs with Dask alone (docs/reliability.md)
PATIENCE_S = 300.0  # a call that takes longer than `HANG_S` is reported, and waited for no longer


class WrongBytesError(AssertionError):
    """Something that came back is not what it should be."""


class Keeper:
    """An actor that keeps an array."""

    kept = np.empty(0)  # Dask asks the class for the names of attributes

    def put(self, x: np.ndarray) -> int:
        self.kept = x
        return tasks.crc(x)

    def get(self) -> np.ndarray:
        return self.kept


def equal(found: Any, right: Any, what: str) -> None:
    if isinstance(right, np.ndarray):
        same = found.shape == right.shape and bool((found == right).all())
    else:
        same = found == right
    if not same:
        raise WrongBytesError(f"{what}: not what was sent")


class Traffic:
    """What one thread does, over and over."""

    def __init__(self, client: Client, seed: int, number: int) -> None:
        self.client = client
        self.random = random.Random(f"{seed}-{number}")
        self.name = f"{seed}-{number}"
        # `ramp` puts the seed in the upper half of each word
        self.seeds = itertools.count((seed % 1000 << 20) + (number << 14))

    def make(self, most: int = 64) -> tuple[np.ndarray, int, int]:
        seed = next(self.seeds)
        nbytes = int(32 * 1024 * most ** self.random.random()) // 8 * 8
        x = tasks.ramp(nbytes, seed)
        return x, tasks.crc(x), seed

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        return self.client.submit(*args, pure=False, **kwargs)

    def somewhere(self) -> dict[str, Any]:
        """A worker, if it still lives when the task is to run."""
        workers = list(self.client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            return {}
        return {"workers": [self.random.choice(workers)], "allow_other_workers": True}

    def submitted(self) -> None:
        x, right, seed = self.make()
        result = self.submit(tasks.check_and_return, x, right).result(PATIENCE_S)
        equal(result, tasks.ramp(x.nbytes, seed), "a returned argument")

    def overwritten(self) -> None:
        x, right, seed = self.make()
        result = self.submit(tasks.check_and_overwrite, x, right, 77).result(PATIENCE_S)
        equal(result, tasks.ramp(x.nbytes, 77), "an overwritten argument")
        equal(x, tasks.ramp(x.nbytes, seed), "what was sent")

    def scattered(self) -> None:
        x, right, seed = self.make()
        direct = self.random.random() < 0.5
        (future,) = self.client.scatter([x], hash=False, direct=direct, timeout=PATIENCE_S)
        equal(self.submit(tasks.crc, future).result(PATIENCE_S), right, "scattered")
        found = self.client.gather(future, direct=not direct)
        equal(found, tasks.ramp(x.nbytes, seed), "gathered")

    def broadcast(self) -> None:
        x, right, _ = self.make(16)
        (future,) = self.client.scatter([x], hash=False, broadcast=True, timeout=PATIENCE_S)
        checks = [self.submit(tasks.crc, future, **self.somewhere()) for _ in range(3)]
        for check in checks:
            equal(check.result(PATIENCE_S), right, "broadcast")

    def between_workers(self) -> None:
        nbytes, seed = self.random.randrange(1 << 16, 1 << 21, 8), next(self.seeds)
        right = tasks.crc(tasks.ramp(nbytes, seed))
        made = self.submit(tasks.ramp, nbytes, seed, **self.somewhere())
        moved = self.submit(tasks.check_and_return, made, right, **self.somewhere())
        first, second = moved.result(PATIENCE_S), made.result(PATIENCE_S)
        first[:] = 0
        equal(second, tasks.ramp(nbytes, seed), "made by a worker")

    def rechunked(self) -> None:
        method = self.random.choice(("tasks", "p2p"))
        rows = self.random.choice((256, 512))
        x = tasks.ramp(rows * 512 * 8, next(self.seeds)).reshape(rows, 512)
        before = da.from_array(x, chunks=(64, -1))
        after = before.rechunk((-1, 128), method=method) + 1
        equal(self.client.compute(after).result(PATIENCE_S), x + 1, f"rechunked by {method}")

    def acted(self) -> None:
        x, right, seed = self.make()
        actor = self.submit(Keeper, actor=True, **self.somewhere()).result(PATIENCE_S)
        equal(actor.put(x).result(PATIENCE_S), right, "given to an actor")
        equal(actor.get().result(PATIENCE_S), tasks.ramp(x.nbytes, seed), "kept by an actor")

    def published(self) -> None:
        x, _, seed = self.make()
        name = f"{self.name}-{seed}"
        self.client.publish_dataset(x, name=name)
        try:
            found = self.client.get_dataset(name)
            equal(found, tasks.ramp(x.nbytes, seed), "published")
            found[:] = 0
        finally:
            self.client.unpublish_dataset(name)


WAYS: list[Callable[[Traffic], None]] = [
    Traffic.submitted,
    Traffic.overwritten,
    Traffic.scattered,
    Traffic.between_workers,
    Traffic.rechunked,
    Traffic.acted,
    Traffic.published,
]

if os.environ.get(BROADCAST):
    WAYS.append(Traffic.broadcast)

_lock = threading.Lock()
_busy: dict[int, tuple[str, float]] = {}


def tell(**message: Any) -> None:
    with _lock:
        print(json.dumps(message), flush=True)


def work(client: Client, seed: int, number: int, stop: threading.Event) -> None:
    traffic = Traffic(client, seed, number)
    while not stop.is_set():
        way = traffic.random.choice(WAYS)
        _busy[number] = (way.__name__, time.monotonic())
        try:
            way(traffic)
        except BaseException as error:
            if not stop.is_set():
                time.sleep(0.1)
            tell(way=way.__name__, **described(error))
        else:
            tell(way=way.__name__)
        finally:
            _busy.pop(number, None)


def described(error: BaseException) -> dict[str, Any]:
    """Say what was raised, by all names that it goes by, with what it came from."""
    kinds, seen = [], error
    while seen is not None and len(kinds) < 8:
        kinds.append(f"{type(seen).__module__}.{type(seen).__qualname__}")
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    return {
        "raised": kinds,
        "file": file,
        "text": str(error)[:500],
        "traceback": traceback.format_exc()[-3000:],
    }


def end_if_broken(client: Client) -> None:
    """End this process where Dask's client has given up without saying so (docs/reliability.md).

    If it is sent anything else with the answer to its reconnecting, an assertion fails in
    `Client._ensure_connected`, the task that reads from the scheduler ends, and nothing that
    waits for a future ever returns.
    """
    task = client._handle_report_task
    if task is not None and task.done() and not task.cancelled():
        error = task.exception()
        if isinstance(error, AssertionError):
            frames = traceback.extract_tb(error.__traceback__)
            tell(dasks=f"AssertionError in Client.{frames[-1].name}: {frames[-1].line}")
            os._exit(4)


def never_run(dask_scheduler: Any = None) -> list[str]:
    """Return the tasks that Dask's scheduler forgets though they may run on any of its workers.

    One of `somewhere` that came while there was no worker stays in ``no-worker`` for ever
    (docs/reliability.md).
    """
    if not dask_scheduler.running:
        return []
    return [str(task.key) for task in dask_scheduler.unrunnable if task.loose_restrictions]


def end_if_forgotten(client: Client) -> None:
    """End this process where what it waits for is a task of `never_run`."""
    ours = set(client.run_on_scheduler(never_run)) & {str(key) for key in client.futures}
    if ours:
        tell(dasks=f"no-worker, with loose restrictions: {sorted(ours)}")
        os._exit(4)


def watch(client: Client) -> None:
    """Report what takes longer than a minute, once."""
    said: set[tuple[int, float]] = set()
    while True:
        time.sleep(1)
        end_if_broken(client)
        for number, (way, since) in list(_busy.items()):
            if time.monotonic() - since > HANG_S and (number, since) not in said:
                said.add((number, since))
                end_if_forgotten(client)
                faulthandler.dump_traceback(all_threads=True)
                tell(way=way, hang=True)


def main(address: str, seed: int) -> None:
    faulthandler.enable()
    client = Client(address, timeout=60, set_as_default=True)
    stop = threading.Event()
    threading.Thread(target=watch, args=(client,), daemon=True).start()
    threads = [
        threading.Thread(target=work, args=(client, seed, number, stop), daemon=True)
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    tell(started=os.getpid())
    sys.stdin.readline()
    stop.set()
    deadline = time.monotonic() + HANG_S + 30
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    tell(stopped=not any(thread.is_alive() for thread in threads))
    client.close(timeout=20)
    tell(closed=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
