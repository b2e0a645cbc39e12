"""The cases as the old bridge did them: ``.npy`` files on disk, passed on by name."""

from __future__ import annotations

import time

from distributed import Client, wait

from dask_shm_bridge.benchmarks.cases import CaseMethod
from dask_shm_bridge.benchmarks.dask_way import DaskWay
from dask_shm_bridge.benchmarks.disk import consume_file, load, save
from dask_shm_bridge.benchmarks.payload import Words, consume


class DiskWay(DaskWay):
    """Arrays in files, names over a plain TCP cluster.

    Parameters
    ----------
    client
        A client of a cluster with protocol ``tcp``. It stays the caller's.
    folder
        Folder for the files. Each is removed by whoever reads it.
    """

    def __init__(self, client: Client, folder: str) -> None:
        super().__init__("npy", client)
        self.folder = folder

    def case_methods(self) -> dict[str, CaseMethod]:
        """Offer the cases that move one array from one process to one other."""
        return {
            "submit": self.submit,
            "scatter": self.scatter,
            "worker-to-worker": self.worker_to_worker,
            "gather": self.gather,
        }

    def submit(self, array: Words, number: int) -> list[float]:
        """Save `array`, and submit a task that loads and reads it."""
        started = time.perf_counter()
        received = self.start(consume_file, save(array, self.folder)).result()
        seconds = time.perf_counter() - started
        self.check("submit", consume(array), received)
        return [seconds]

    def scatter(self, array: Words, number: int) -> list[float]:
        """Save `array`, and have the first worker load it."""
        started = time.perf_counter()
        future = self.start(load, save(array, self.folder))
        wait(future)
        seconds = time.perf_counter() - started
        self.check("scatter", consume(array), self.start(consume, future).result())
        return [seconds]

    def worker_to_worker(self, array: Words, number: int) -> list[float]:
        """Save on the first worker, load and consume on the second."""
        future = self.made(array, number)
        started = time.perf_counter()
        saved = self.start(save, future, self.folder)
        received = self.start(consume_file, saved, worker=1).result()
        seconds = time.perf_counter() - started
        self.check("worker-to-worker", self.start(consume, future).result(), received)
        return [seconds]

    def gather(self, array: Words, number: int) -> list[float]:
        """Save on the first worker, load in the client."""
        future = self.made(array, number)
        started = time.perf_counter()
        gathered = load(self.start(save, future, self.folder).result())
        seconds = time.perf_counter() - started
        self.check("gather", self.start(consume, future).result(), consume(gathered))
        return [seconds]
