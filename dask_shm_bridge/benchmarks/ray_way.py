"""The cases over Ray's object store, for comparison, where Ray is installed."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

from dask_shm_bridge.benchmarks.cases import CaseMethod, Way
from dask_shm_bridge.benchmarks.payload import Words, consume, echo_size, generate


class RayWay(Way):
    """One local Ray instance with two actors in the place of Dask's workers.

    Ray copies a result into its store while the task that makes it ends, before the clock of
    ``gather`` and ``worker-to-worker`` starts: those two leave out a copy that Dask's have. What
    Ray hands out is read-only.

    Parameters
    ----------
    workers
        Number of CPUs that Ray may use.
    store_bytes
        Size of Ray's object store.
    tiny_tasks
        How many small tasks one run of the case ``tiny`` times.
    """

    name = "ray"

    def __init__(self, workers: int, store_bytes: int, tiny_tasks: int = 100) -> None:
        self.ray: Any = import_module("ray")
        self.tiny_tasks = tiny_tasks
        self.ray.init(
            num_cpus=max(2, workers),
            object_store_memory=store_bytes,
            include_dashboard=False,
            log_to_driver=False,
        )
        actor = self.ray.remote(_Reader)
        self.readers: Any = [actor.options(num_cpus=1).remote() for _ in range(2)]

    def close(self) -> None:
        """Stop Ray."""
        self.ray.shutdown()

    def case_methods(self) -> dict[str, CaseMethod]:
        """Offer put, get and tasks; Ray has no rechunk, and one store makes broadcast a put."""
        return {
            "submit": self.submit,
            "scatter": self.scatter,
            "worker-to-worker": self.worker_to_worker,
            "gather": self.gather,
            "tiny": self.tiny,
        }

    def submit(self, array: Words, number: int) -> list[float]:
        """Pass `array` to an actor that reads all of it."""
        started = time.perf_counter()
        received = self.ray.get(self.readers[0].consume.remote(array))
        seconds = time.perf_counter() - started
        self.check("submit", consume(array), received)
        return [seconds]

    def scatter(self, array: Words, number: int) -> list[float]:
        """Put `array` into the object store."""
        started = time.perf_counter()
        reference = self.ray.put(array)
        seconds = time.perf_counter() - started
        received = self.ray.get(self.readers[0].consume.remote(reference))
        self.check("scatter", consume(array), received)
        return [seconds]

    def worker_to_worker(self, array: Words, number: int) -> list[float]:
        """Consume in the second actor what the first has made."""
        reference = self._made(array, number)
        started = time.perf_counter()
        received = self.ray.get(self.readers[1].consume.remote(reference))
        seconds = time.perf_counter() - started
        sent = self.ray.get(self.readers[0].consume.remote(reference))
        self.check("worker-to-worker", sent, received)
        return [seconds]

    def gather(self, array: Words, number: int) -> list[float]:
        """Get what the first actor has made."""
        reference = self._made(array, number)
        started = time.perf_counter()
        gathered = self.ray.get(reference)
        seconds = time.perf_counter() - started
        sent = self.ray.get(self.readers[0].consume.remote(reference))
        self.check("gather", sent, consume(gathered))
        return [seconds]

    def tiny(self, array: Words, number: int) -> list[float]:
        """Do small tasks, one after the other; the seconds of each."""
        seconds = []
        for _ in range(self.tiny_tasks):
            started = time.perf_counter()
            self.ray.get(self.readers[0].echo_size.remote(array))
            seconds.append(time.perf_counter() - started)
        return seconds

    def _made(self, array: Words, number: int) -> Any:
        reference = self.readers[0].generate.remote(array.nbytes, number)
        self.ray.wait([reference], fetch_local=False)
        return reference


class _Reader:
    """The tasks of `payload`, as the methods of an actor."""

    def consume(self, array: Any) -> Any:
        return consume(array)

    def generate(self, size_bytes: int, seed: int) -> Any:
        return generate(size_bytes, seed)

    def echo_size(self, array: Any) -> int:
        return echo_size(array)
