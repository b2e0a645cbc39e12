"""The cases over a Dask cluster, whatever protocol its client speaks."""

from __future__ import annotations

import time
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, Future, wait

from dask_shm_bridge.benchmarks.cases import CaseMethod, MismatchError, Way
from dask_shm_bridge.benchmarks.payload import Words, consume, echo_size, generate
from dask_shm_bridge.benchmarks.traffic import Traffic

SETTLE_SECONDS = 10.0


class DaskWay(Way):
    """A protocol of Dask.

    Parameters
    ----------
    name
        Name of the protocol, as the report shows it.
    client
        A client of a cluster with at least two workers. It stays the caller's.
    tiny_tasks
        How many small tasks one run of the case ``tiny`` times.
    """

    def __init__(self, name: str, client: Client, tiny_tasks: int = 100) -> None:
        self.name = name
        self.client = client
        self.tiny_tasks = tiny_tasks
        self.workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
        if len(self.workers) < 2:
            raise ValueError(f"the cases need two workers, {name} has {len(self.workers)}")
        client.amm.stop()  # it takes replicas away every two seconds, also in a broadcast

    def case_methods(self) -> dict[str, CaseMethod]:
        """Offer every case."""
        return {
            "submit": self.submit,
            "scatter": self.scatter,
            "broadcast": self.broadcast,
            "worker-to-worker": self.worker_to_worker,
            "gather": self.gather,
            "gather-read": self.gather_read,
            "rechunk": self.rechunk,
            "tiny": self.tiny,
        }

    def run(self, case: str, array: Words, number: int) -> list[float]:
        """Do `case` once with this way's client as the one that Dask's functions find."""
        with self.client.as_current():
            return super().run(case, array, number)

    def settle(self) -> None:
        """Wait until neither the scheduler nor a worker holds anything of the last run."""
        give_up = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < give_up:
            tasks = self.client.run_on_scheduler(_tasks)
            if not tasks and not any(self.client.run(_held).values()):
                return
            time.sleep(0.002)

    def traffic(self) -> Traffic | None:
        """Add up what the cluster's processes have counted; None without a pool."""
        return Traffic.of(self.client) if self.name == "shm" else None

    def start(self, function: Any, *args: Any, worker: int = 0) -> Future[Any]:
        """Submit a task, never answered from a cache, to one worker by its number."""
        return self.client.submit(function, *args, pure=False, workers=[self.workers[worker]])

    def made(self, array: Words, number: int) -> Future[Any]:
        """Make a fresh array of the size of `array` on the first worker, and wait for it."""
        future = self.start(generate, array.nbytes, number)
        wait(future)
        return future

    def submit(self, array: Words, number: int) -> list[float]:
        """Send `array` as the argument of a task that reads all of it."""
        started = time.perf_counter()
        received = self.start(consume, array).result()
        seconds = time.perf_counter() - started
        self.check("submit", consume(array), received)
        return [seconds]

    def scatter(self, array: Words, number: int) -> list[float]:
        """Scatter `array` to the first worker."""
        started = time.perf_counter()
        future = self.client.scatter(array, hash=False, workers=[self.workers[0]])
        wait(future)
        seconds = time.perf_counter() - started
        self.check("scatter", consume(array), self.start(consume, future).result())
        return [seconds]

    def broadcast(self, array: Words, number: int) -> list[float]:
        """Scatter `array` to every worker."""
        started = time.perf_counter()
        future = self.client.scatter(array, hash=False, broadcast=True)
        wait(future)
        seconds = time.perf_counter() - started
        holders = self.client.who_has([future])[future.key]
        if sorted(holders) != self.workers:
            raise MismatchError(self.name, "broadcast", self.workers, sorted(holders))
        sent = consume(array)
        for worker in range(len(self.workers)):
            received = self.start(consume, future, worker=worker).result()
            self.check("broadcast", sent, received)
        return [seconds]

    def worker_to_worker(self, array: Words, number: int) -> list[float]:
        """Consume on the second worker what the first has made."""
        future = self.made(array, number)
        started = time.perf_counter()
        received = self.start(consume, future, worker=1).result()
        seconds = time.perf_counter() - started
        self.check("worker-to-worker", self.start(consume, future).result(), received)
        return [seconds]

    def gather(self, array: Words, number: int) -> list[float]:
        """Bring to the client what the first worker has made."""
        future = self.made(array, number)
        started = time.perf_counter()
        gathered = self.client.gather(future)
        seconds = time.perf_counter() - started
        self.check("gather", self.start(consume, future).result(), consume(gathered))
        return [seconds]

    def gather_read(self, array: Words, number: int) -> list[float]:
        """Bring to the client what the first worker has made, and read it there."""
        future = self.made(array, number)
        started = time.perf_counter()
        received = consume(self.client.gather(future))
        seconds = time.perf_counter() - started
        self.check("gather-read", self.start(consume, future).result(), received)
        return [seconds]

    def rechunk(self, array: Words, number: int) -> list[float]:
        """Turn row blocks into column blocks by a p2p shuffle that stays in memory."""
        rows, columns = grid_shape(array.nbytes)
        blocks = min(2 * len(self.workers), columns)
        tall, wide = -(-rows // blocks), -(-columns // blocks)
        settings = {"array.rechunk.method": "p2p", "distributed.p2p.storage.disk": False}
        with dask.config.set(settings):
            by_rows = self.client.persist(_grid(rows, columns, (tall, columns), number))
            wait(by_rows)
            started = time.perf_counter()
            by_columns = self.client.persist(by_rows.rechunk((rows, wide)))
            wait(by_columns)
            seconds = time.perf_counter() - started
        for axis in (0, 1):
            sent, received = self.client.gather(
                self.client.compute([by_rows.sum(axis=axis), by_columns.sum(axis=axis)])
            )
            if not np.array_equal(sent, received):
                raise MismatchError(self.name, "rechunk", sent, received)
        return [seconds]

    def tiny(self, array: Words, number: int) -> list[float]:
        """Do small tasks, one after the other; the seconds of each."""
        seconds = []
        for _ in range(self.tiny_tasks):
            started = time.perf_counter()
            size_bytes = self.start(echo_size, array).result()
            seconds.append(time.perf_counter() - started)
            if size_bytes != array.nbytes:
                raise MismatchError(self.name, "tiny", array.nbytes, size_bytes)
        return seconds


def grid_shape(size_bytes: int) -> tuple[int, int]:
    """Choose rows and columns of a nearly square grid of 8-byte numbers in `size_bytes`."""
    cells = max(4, size_bytes // 8)
    columns = 2 ** ((cells.bit_length() - 1) // 2)
    return cells // columns, columns


def _grid(rows: int, columns: int, chunks: tuple[int, int], seed: int) -> Any:
    blocks = da.core.normalize_chunks(chunks, shape=(rows, columns))
    return da.map_blocks(
        _grid_block, chunks=blocks, dtype=np.int64, meta=np.empty((0, 0), np.int64), seed=seed
    )


def _grid_block(seed: int, block_info: Any = None) -> Any:
    place, shape = block_info[None]["chunk-location"], block_info[None]["chunk-shape"]
    generator = np.random.Generator(np.random.SFC64([seed, *place]))
    return generator.integers(0, 2**53, size=shape, dtype=np.int64)


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


def _held(dask_worker: Any) -> int:
    return len(dask_worker.data)
