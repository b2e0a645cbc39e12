"""For the tests of projects that build on this: a small pool, a cluster, and leak checks.

With ``pytest_plugins = ["dask_shm_bridge.testing"]`` in a conftest.py, tests have these fixtures:

``shm_pool``
    A small pool of the test's own, and the path of its folder. After the test nothing of it may be
    left.
``shm_cluster``
    A function that starts a cluster in that pool, and returns a client of it; see `cluster` for its
    arguments.
``shm_client``
    A client of a cluster with two workers.

The functions below do the same without pytest's fixtures.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster

from dask_shm_bridge import store
from dask_shm_bridge.errors import LedgerError

__all__ = ["Leaks", "cluster", "private_pool", "shm_client", "shm_cluster", "shm_pool"]

PATIENCE_S = 10.0
_LOCK = "lock"  # the only file that a folder keeps when the last process has left its pool
# Python keeps these for later children.
_KEPT_PROCESSES = ("resource_tracker", "forkserver")
_FAILED: pytest.StashKey[bool] = pytest.StashKey()


class Leaks:
    """What was there before, and what is there too much by now.

    Parameters
    ----------
    folder : path-like
        The pool's.

    Examples
    --------
    >>> leaks = Leaks("/dev/shm/nobody-has-a-pool-here")
    >>> leaks.found()
    {}
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._threads = _threads()
        self._processes = _processes()

    def found(self) -> dict[str, Any]:
        """Return what is too much now.

        Returns
        -------
        dict
            With any of ``extents``, ``leases`` and ``tickets`` (how many the ledger has; of a pool
            that this process has joined), ``descriptors`` (of this process, in the folder),
            ``threads`` (names) and ``processes`` (children of this process that still run, by id).
            Empty if there is nothing.
        """
        leaks: dict[str, Any] = {}
        joined = store.attached(str(self.folder))
        if joined is not None:
            with contextlib.suppress(LedgerError):  # it was left just now
                usage = joined.usage()
                leaks.update({name: usage[name] for name in ("extents", "leases", "tickets")})
        else:  # as long as a process is a member these are as they should be
            leaks["descriptors"] = _descriptors(self.folder)
            leaks["threads"] = sorted(thread.name for thread in _threads() - self._threads)
        leaks["processes"] = sorted(_processes() - self._processes)
        return {kind: what for kind, what in leaks.items() if what}

    def files(self) -> list[str]:
        """Return what the folder holds, besides the lock that is never removed."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(name for name in os.listdir(self.folder) if name != _LOCK)
        return []

    def check(self, timeout_s: float | None = None, *, files: bool = False) -> None:
        """Wait until nothing is too much.

        Parameters
        ----------
        timeout_s : float, optional
            How long; `PATIENCE_S` (10 s) if not given.
        files : bool
            Whether the folder must be empty, too: when the last process has left the pool.

        Raises
        ------
        AssertionError
            If something still is after that time. The message names it.
        """
        deadline = time.monotonic() + (PATIENCE_S if timeout_s is None else timeout_s)
        while True:
            gc.collect()
            leaks = self.found()
            if files and (names := self.files()):
                leaks["files"] = names
            if not leaks:
                return
            if time.monotonic() > deadline:
                raise AssertionError(f"left behind in {self.folder}: {leaks}")
            time.sleep(0.02)


@contextlib.contextmanager
def private_pool(
    size: str = "64 MiB",
    slot_size: str = "4 MiB",
    threshold: str = "256 KiB",
    *,
    check: Callable[[], bool] = lambda: True,
    **config: Any,
) -> Iterator[Path]:
    """Give this process, and those that it starts, a small pool of their own.

    Parameters
    ----------
    size, slot_size, threshold : str
        As in the configuration.
    check : callable
        Called at the end: whether something that is left behind is an error.
    **config
        More of Dask's configuration, as ``{"shm-bridge.hold-limit": 0.2}``.

    Yields
    ------
    pathlib.Path
        The pool's folder. It is removed at the end.

    Raises
    ------
    AssertionError
        At the end, if extents, leases, tickets, files, descriptors, threads or processes are left.

    Notes
    -----
    The configuration is set in `dask.config` and in the environment, where children find it. It
    belongs to the whole process: no two such blocks at once.

    Examples
    --------
    >>> import dask
    >>> with private_pool("8 MiB", "1 MiB") as folder:
    ...     str(folder) == dask.config.get("shm-bridge.pool.path")
    True
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() else Path(tempfile.gettempdir())
    folder = parent / f"shm-bridge-testing-{os.getpid()}-{secrets.token_hex(4)}"
    settings = {
        "shm-bridge.pool.path": str(folder),
        "shm-bridge.pool.size": size,
        "shm-bridge.pool.slot-size": slot_size,
        "shm-bridge.pool.linger": "60s",
        "shm-bridge.copy-threads": 2,
        "shm-bridge.threshold": threshold,
        **config,
    }
    leaks = Leaks(folder)
    try:
        with dask.config.set(settings), _environment(settings):
            yield folder
            if check():
                leaks.check()
            _leave(folder)
            if check():
                leaks.check(files=True)
    finally:
        try:
            _leave(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster(
    n_workers: int = 2,
    protocol: str = "shm",
    *,
    config: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Iterator[Client]:
    """Start a cluster whose workers are processes, and connect to it.

    Parameters
    ----------
    n_workers : int
        How many processes.
    protocol : str
        ``shm``; ``tcp`` for a comparison.
    config : dict, optional
        More of Dask's configuration.
    **kwargs
        For `distributed.LocalCluster`. Workers have one thread and no memory limit, and there is no
        dashboard, unless they say otherwise.

    Yields
    ------
    distributed.Client
        Not the default client. All its futures are cancelled at the end.

    See Also
    --------
    private_pool : Wherein it belongs, in tests.
    """
    options = {
        "threads_per_worker": 1,
        "memory_limit": 0,
        "dashboard_address": None,
        "scheduler_kwargs": {"dashboard_address": ":0"},  # not the port that somebody may have
        **kwargs,
    }
    config = config or {}
    with (
        dask.config.set(config),
        _environment(config),
        tempfile.TemporaryDirectory() as scratch,
    ):
        options.setdefault("local_directory", scratch)
        with (
            LocalCluster(n_workers=n_workers, protocol=protocol, **options) as started,
            Client(started, set_as_default=False) as client,
        ):
            if n_workers:
                client.wait_for_workers(n_workers, timeout=60)
            yield client
            client.cancel(list(client.futures), force=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Remember whether the test itself failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture
def shm_pool(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give this test a small pool of its own, in which it must leave nothing behind."""

    def passed() -> bool:  # one that failed keeps its variables, for the report
        return not request.node.stash.get(_FAILED, False)

    with private_pool(check=passed) as folder:
        yield folder


@pytest.fixture
def shm_cluster(shm_pool: Path) -> Iterator[Callable[..., Client]]:
    """Return a function that starts a cluster in this test's pool; see `cluster`."""
    with contextlib.ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> Client:
            return stack.enter_context(cluster(*args, **kwargs))

        yield start


@pytest.fixture
def shm_client(shm_cluster: Callable[..., Client]) -> Client:
    """Return a client of a cluster with two workers, in this test's pool."""
    return shm_cluster()


@contextlib.contextmanager
def _environment(config: dict[str, Any]) -> Iterator[None]:
    """Set keys of Dask's configuration for the processes that are started here."""
    names = {"DASK_" + key.upper().replace(".", "__").replace("-", "_"): key for key in config}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(config[key]) for name, key in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _leave(folder: Path) -> None:
    """Leave the pool in `folder`, and no other that this process may be in."""
    joined = store._pools.pop(str(folder), None)
    if joined is not None:
        joined.close()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("shm-bridge")}


def _processes() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                continue
            if not any(name in word for word in child.cmdline() for name in _KEPT_PROCESSES):
                found.add(child.pid)
    return found


def _descriptors(folder: Path) -> list[str]:
    """Return what this process holds open in a folder; nothing where that can't be seen."""
    found = []
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{fd}")
                if target.startswith(f"{folder}/"):
                    found.append(target)
    return sorted(found)
