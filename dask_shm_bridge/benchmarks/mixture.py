"""Mixed traffic without an end: every way that Dask moves arrays, each result checked."""

from __future__ import annotations

import random
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np
from distributed import Client

from dask_shm_bridge.benchmarks.payload import Words, change, consume, generate

SMALLEST_BYTES = 64 * 1024
LARGEST_BYTES = 64 * 1024 * 1024
KEPT = 4  # results and futures that each thread keeps alive
TIMEOUT_SECONDS = 120.0


class WrongBytesError(AssertionError):
    """An array arrived other than it was sent."""


class Keeper:
    """An actor that keeps one array."""

    kept: Any = None  # Dask asks the class for the names of attributes

    def put(self, array: Words) -> int:
        """Keep an array; return its checksum."""
        self.kept = array
        return checksum(array)

    def get(self) -> Any:
        """Return what is kept."""
        return self.kept


def checksum(array: Any) -> int:
    """Sum the words of an array modulo 2**64, each 8 KiB of them with another weight.

    Pages that changed, changed places or came from another array change it.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(np.uint64)
    rows = words[: len(words) // 1024 * 1024].reshape(-1, 1024)
    weights = np.arange(1, 2 * len(rows), 2, dtype=np.uint64)
    weighted = int(np.add.reduce(np.add.reduce(rows, axis=1, dtype=np.uint64) * weights))
    return (consume(words).total * 31 + weighted) % 2**64


def answer(array: Words, right: int, step: int) -> tuple[Words, int]:
    """Check an argument, write all over it, and return it with its new checksum."""
    if checksum(array) != right:
        raise WrongBytesError("an argument arrived with other bytes")
    change(array, step)
    return array, checksum(array)


class Mixture:
    """Threads that move arrays in every way, until they are told to stop.

    Parameters
    ----------
    client
        Of a cluster with at least two workers; the default client, since actors ask for that.
    threads
        How many operations are under way at once.

    Attributes
    ----------
    done : Counter of str
        Finished operations, by name.
    errors : list of str
        What went wrong. The first error stops everything.
    """

    def __init__(self, client: Client, threads: int = 3) -> None:
        self.client = client
        self.workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"mixture-{number}")
            for number in range(threads)
        ]

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let each thread finish its operation, and wait for that."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        hand = _Hand(self.client, self.workers, number)
        while not self._stop.is_set():
            way = hand.random.choice(WAYS)
            try:
                way(hand)
            except Exception as error:
                self.errors.append(f"{way.__name__}: {error!r}")
                self._stop.set()
            with self._lock:
                self.done[way.__name__] += 1


class _Hand:
    """What one thread does, one operation after the other."""

    def __init__(self, client: Client, workers: list[str], number: int) -> None:
        self.client, self.workers, self.number = client, workers, number
        self.random = random.Random(number)
        self.step = number << 40
        self.kept: deque[Any] = deque(maxlen=KEPT)
        # One array for each size class, made once: to make a new one takes longer than to move it.
        self.stock: dict[int, Words] = {}

    def array(self) -> tuple[Words, int]:
        """Return an array of a random size with bytes that it never had, and their checksum."""
        self.step += 1
        octaves = (LARGEST_BYTES // SMALLEST_BYTES).bit_length() - 1
        size = SMALLEST_BYTES << self.random.randint(0, octaves)
        if size not in self.stock:
            self.stock[size] = generate(size, self.step)
        array = self.stock[size]
        change(array, self.step)
        return array, checksum(array)

    def submit(self, function: Callable[..., Any], *arguments: Any, **where: Any) -> Any:
        return self.client.submit(function, *arguments, pure=False, **where)

    def check(self, array: Any, right: int) -> None:
        if checksum(array) != right:
            raise WrongBytesError("a result arrived with other bytes")

    def argument_and_result(self) -> None:
        array, right = self.array()
        future = self.submit(answer, array, right, self.step)
        changed, total = future.result(TIMEOUT_SECONDS)
        self.check(changed, total)
        self.check(array, right)
        self.kept.append((future, changed))

    def scattered(self) -> None:
        array, right = self.array()
        direct = self.random.random() < 0.5
        (future,) = self.client.scatter([array], hash=False, direct=direct)
        seen = self.submit(checksum, future).result(TIMEOUT_SECONDS)
        back = self.client.gather(future, direct=not direct)
        self.check(back, right)
        if seen != right:
            raise WrongBytesError("a scattered array arrived with other bytes")

    def between_workers(self) -> None:
        array, right = self.array()
        here, there = self.random.sample(self.workers, 2)
        (made,) = self.client.scatter([array], hash=False, workers=[here])
        moved = self.submit(answer, made, right, self.step, workers=[there])
        changed, total = moved.result(TIMEOUT_SECONDS)
        self.check(changed, total)

    def broadcast(self) -> None:
        array, right = self.array()
        (future,) = self.client.scatter([array], hash=False, broadcast=True)
        seen = [self.submit(checksum, future, workers=[worker]) for worker in self.workers]
        if set(self.client.gather(seen)) != {right}:
            raise WrongBytesError("a broadcast array arrived with other bytes")

    def rechunked(self) -> None:
        import dask
        import dask.array as da

        array, right = self.array()
        square = array[: (len(array) // 256) * 256].reshape(256, -1)
        blocks = da.from_array(square, chunks=(64, -1), name=False)
        with dask.config.set({"array.rechunk.method": "p2p"}), self.client.as_current():
            columns = blocks.rechunk((-1, -(-square.shape[1] // 4)))
            result = self.client.compute(columns).result(TIMEOUT_SECONDS)
        self.check(result, right)

    def actor(self) -> None:
        array, right = self.array()
        keeper = self.submit(Keeper, actor=True).result(TIMEOUT_SECONDS)
        if keeper.put(array).result(TIMEOUT_SECONDS) != right:
            raise WrongBytesError("an actor got other bytes")
        self.check(keeper.get().result(TIMEOUT_SECONDS), right)

    def published(self) -> None:
        array, right = self.array()
        name = f"mixture-{self.number}"
        self.client.publish_dataset(array, name=name)
        self.check(self.client.get_dataset(name), right)
        self.client.unpublish_dataset(name)


#: The operations, each as likely as the others.
WAYS: tuple[Callable[[_Hand], None], ...] = (
    _Hand.argument_and_result,
    _Hand.scattered,
    _Hand.between_workers,
    _Hand.broadcast,
    _Hand.rechunked,
    _Hand.actor,
    _Hand.published,
)
