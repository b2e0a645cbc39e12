"""Schedulers and workers in processes of their own, and figures of what they moved."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client

import dask_shm_bridge
from dask_shm_bridge import store

# What a child needs so that functions of these tests can be pickled by reference.
ROOT = str(Path(__file__).resolve().parents[len((__package__ or "x").split("."))])

MiB = 1024 * 1024
# What `make test-threshold` sets: then it holds for all processes of all tests.
THRESHOLD = os.environ.get("DASK_SHM_BRIDGE__THRESHOLD")
MESSAGES = 64 * 1024
START_TIMEOUT_S = 60.0
# A signal cancels all of a worker's coroutines. If that meets a `BatchedSend` in a write, it never
# says that it has stopped, and Dask waits for it for 30 s (docs/what-remains.md).
STOP_TIMEOUT_S = 60.0

QUIET = {
    "distributed.admin.large-graph-warning-threshold": "1 TiB",
    "distributed.scheduler.worker-saturation": "inf",
    "distributed.worker.profile.enabled": False,
    "distributed.comm.timeouts.connect": "30s",
    # What it asks for, without workers, may be what `Client.scheduler_info` returns meanwhile.
    "distributed.client.scheduler-info-interval": "1h",
    # It drops a replica of a worker's at its next look, once in two seconds.
    "distributed.scheduler.active-memory-manager.start": False,
}


def settings(folder: str | bool, **more: Any) -> dict[str, Any]:
    """Return configuration: `folder` as the pool, and `pool_size="64 MiB"` and the like."""
    result = {"shm-bridge.pool.path": folder, "shm-bridge.threshold": "256 KiB", **QUIET}
    if THRESHOLD is not None:
        more["threshold"] = THRESHOLD
    for name, value in more.items():
        key = name.replace("_", "-")
        for group in ("pool", "distributed"):
            if key.startswith(f"{group}-"):
                key = f"{group}.{key[len(group) + 1 :]}"
        result[key if key.startswith("distributed.") else f"shm-bridge.{key}"] = value
    return result


def environment(config: dict[str, Any]) -> dict[str, str]:
    """Return the environment of a child that has this configuration."""
    result = {k: v for k, v in os.environ.items() if not k.startswith("DASK_")}
    for key, value in config.items():
        result["DASK_" + key.upper().replace(".", "__").replace("-", "_")] = str(value)
    paths = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    result["PYTHONPATH"] = os.pathsep.join(paths)
    result["PYTHONFAULTHANDLER"] = "1"
    return result


def run(code: str, *args: str, config: dict[str, Any]) -> str:
    """Run a script in a process of its own, with this configuration; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def private_pool(**more: Any) -> Iterator[dict[str, Any]]:
    """Give this process and its children a new pool; yield the configuration of both."""
    folder = Path(f"/dev/shm/shm-bridge-test-{os.getpid()}-{secrets.token_hex(4)}")
    config = settings(str(folder), **more)
    try:
        with dask.config.set(config):
            yield config
        gc.collect()
        leave(folder)
        left = sorted(os.listdir(folder)) if folder.exists() else []
        assert left in ([], ["lock"]), f"the last to leave the pool left {left}"
    finally:
        leave(folder)
        shutil.rmtree(folder, ignore_errors=True)


def leave(folder: Path) -> None:
    """Leave the pool in `folder`, and no other that this process may be in."""
    joined = store._pools.pop(str(folder), None)
    if joined is not None:
        joined.close()


class Deployment:
    """A scheduler and workers, each a process of its own, ended by their ids.

    Parameters
    ----------
    folder : Path
        Where logs and the scheduler's file go.
    config : dict
        Dask configuration of the children.
    workers, threads : int
        How many.
    protocol : str
        Of the scheduler and the workers.
    scheduler_args, worker_args : sequence of str
        More arguments.
    memory_limit : str
        Of each worker.
    nanny : bool
        Whether workers have one.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        workers: int = 2,
        threads: int = 1,
        protocol: str = "shm",
        scheduler_args: tuple[str, ...] = (),
        worker_args: tuple[str, ...] = (),
        memory_limit: str = "0",
        nanny: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.protocol = protocol
        self.threads = threads
        self.memory_limit = memory_limit
        self.nanny = nanny
        self.file = folder / f"scheduler-{secrets.token_hex(4)}.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[Path] = []
        try:
            self.scheduler = self._start(
                "distributed.cli.dask_scheduler",
                *("--protocol", protocol, "--host", "127.0.0.1", "--port", "0"),
                *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
                *("--scheduler-file", str(self.file)),
                *scheduler_args,
            )
            self._wait(self._has_address, "the scheduler's file")
            for number in range(workers):
                self.add_worker(f"w{number}", worker_args)
        except BaseException:
            self.close()
            raise

    def _has_address(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # not there, or not written to its end
            return bool(self.address)
        return False

    @property
    def address(self) -> str:
        """Address of the scheduler."""
        return str(json.loads(self.file.read_text())["address"])

    def add_worker(
        self,
        name: str,
        args: tuple[str, ...] = (),
        config: dict[str, Any] | None = None,
        command: Callable[[list[str]], list[str]] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start another worker."""
        return self._start(
            "distributed.cli.dask_worker",
            self.address,
            *(["--nanny"] if self.nanny else ["--no-nanny"]),
            *("--host", "127.0.0.1", "--name", name, "--nthreads", str(self.threads)),
            *("--memory-limit", self.memory_limit, "--no-dashboard"),
            *("--local-directory", str(self.folder), "--death-timeout", "60"),
            *args,
            config=config,
            command=command,
        )

    def _start(
        self,
        module: str,
        *args: str,
        config: dict[str, Any] | None = None,
        command: Callable[[list[str]], list[str]] | None = None,
    ) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", module, *args]
        if command is not None:
            line = command([module, *args])
        log = self.folder / f"{module.rpartition('_')[2]}-{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            process = subprocess.Popen(
                line,
                cwd=self.folder,
                env=environment(self.config if config is None else config),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if time.monotonic() > deadline or self.scheduler.poll() is not None:
                raise RuntimeError(f"{what} did not come:\n{self.said()}")
            time.sleep(0.02)

    def said(self) -> str:
        """Return what the processes wrote."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs)

    @contextlib.contextmanager
    def client(self, workers: int | None = None, **kwargs: Any) -> Iterator[Client]:
        """Connect; wait for `workers`."""
        kwargs = {"set_as_default": False, "timeout": 30, **kwargs}
        with Client(self.address, **kwargs) as client:
            client.wait_for_workers(workers or max(1, len(self.processes) - 1), timeout=60)
            yield client

    def close(self) -> None:
        """End all processes, the workers first; one that doesn't end says where it is."""
        stuck = []
        # A nanny does not wait for a worker that it has killed.
        workers = [
            child
            for process in self.processes
            if process.poll() is None
            for child in psutil.Process(process.pid).children(recursive=True)
        ]
        # A worker that gets its signal while its scheduler closes may wait for ever, in Dask.
        for group in (self.processes[1:], self.processes[:1]):
            for process in group:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
            for process in group:
                try:
                    process.wait(STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    stuck.append(process.pid)
                    process.send_signal(signal.SIGABRT)  # its stacks go to its log
                    process.wait(10)
        stuck += [one.pid for one in psutil.wait_procs(workers, STOP_TIMEOUT_S)[1]]
        if stuck:
            raise RuntimeError(f"processes {stuck} did not end:\n{self.said()}")

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---------------------------------------------------------------------------------- figures


def payload(nbytes: int) -> int:
    """Return what of these bytes, that went through the pool, were payloads.

    Where all messages go through the pool, they come to less than 64 KiB beside the payloads, whose
    sizes are multiples of that.
    """
    return nbytes if THRESHOLD is None else nbytes - nbytes % MESSAGES


class Delta:
    """What was moved between two looks at the figures; `measured` makes one."""

    def __init__(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._before = before
        self._after = after

    def at(
        self, who: str, direction: str, way: str, what: str = "bytes", messages: bool = False
    ) -> int:
        """Return a figure of ``client``, ``scheduler``, ``workers`` (all) or one address.

        Where all messages go through the pool, these count with their payloads if `messages`.
        """
        total = sum(
            after[what][direction][way] - before[what][direction][way]
            for before, after in self._pairs(who)
        )
        exact = messages or what != "bytes" or way in ("inline", "pieces")
        return total if exact else payload(total)

    def everywhere(
        self, direction: str, way: str, what: str = "bytes", messages: bool = False
    ) -> int:
        """Return a figure summed over client, scheduler and workers."""
        everybody = ("client", "scheduler", "workers")
        return sum(self.at(who, direction, way, what, messages) for who in everybody)

    @property
    def inline(self) -> int:
        """Bytes that went over sockets, anywhere."""
        return self.everywhere("sent", "inline")

    @property
    def copied(self) -> int:
        """Bytes that were copied into the pool, anywhere."""
        return self.everywhere("sent", "copied")

    @property
    def pieces(self) -> int:
        """Bytes that went through the pool in pieces."""
        return self.everywhere("sent", "pieces")

    @property
    def fallbacks(self) -> dict[str, int]:
        """Causes to frames, summed."""
        total: Counter[str] = Counter()
        for who in ("client", "scheduler", "workers"):
            for before, after in self._pairs(who):
                total.update(after["fallbacks"])
                total.subtract(before["fallbacks"])
        return {cause: frames for cause, frames in total.items() if frames}

    def _pairs(self, who: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        if who in ("client", "scheduler"):
            return [(self._before[who], self._after[who])]
        before, after = self._before["workers"], self._after["workers"]
        return [(before[w], after[w]) for w in after if w in before and who in ("workers", w)]

    def __repr__(self) -> str:
        lines = []
        for who in ("client", "scheduler", *self._after["workers"]):
            ways = {
                f"{direction}.{way}": self.at(who, direction, way)
                for direction in ("sent", "received")
                for way in self._after["client"]["bytes"][direction]
            }
            lines.append(f"{who}: { {k: v for k, v in ways.items() if v} }")
        return "\n".join([*lines, f"fallbacks: {self.fallbacks}"])


@contextlib.contextmanager
def measured(client: Client) -> Iterator[Callable[[], Delta]]:
    """Yield a function that returns what was moved in the block, once it is over."""
    before = dask_shm_bridge.stats(client)
    after: dict[str, Any] = {}
    yield lambda: Delta(before, after)
    after.update(dask_shm_bridge.stats(client))


def reported(client: Client, workers: int = 1, timeout_s: float = 60.0) -> None:
    """Wait until as many workers have told the scheduler of their GPUs."""

    def devices(dask_scheduler: Any = None) -> int:
        plugin = dask_scheduler.plugins.get("shm-bridge")
        return len(plugin.devices) if plugin is not None else 0

    deadline = time.monotonic() + timeout_s
    while client.run_on_scheduler(devices) < workers:
        assert time.monotonic() < deadline, "no worker has reported a GPU"
        time.sleep(0.05)


def device(client: Client) -> dict[str, Any]:
    """Return what the one worker tells of its GPU, and what it copied."""
    (worker,) = dask_shm_bridge.stats(client)["workers"].values()
    figures: dict[str, Any] = worker["device"]
    return figures


class Copied:
    """Bytes that the one worker copied to and from its GPU since this was made."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._before = device(client)

    def __call__(self, direction: str) -> dict[str, int]:
        after = device(self._client)
        return {
            way: after[direction][way] - self._before[direction][way]
            for way in ("pinned", "staged", "pageable")
        }


def usage(timeout_s: float = 10.0, **wanted: int) -> dict[str, int]:
    """Return the counts of this process's pool, once they are as wanted or time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        gc.collect()
        joined = store.attached()
        assert joined is not None
        counts: dict[str, int] = joined.ledger.usage()["counts"]
        if all(counts[name] == value for name, value in wanted.items()):
            return counts
        if time.monotonic() > deadline:
            return counts
        time.sleep(0.05)
