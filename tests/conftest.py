"""Every test has a pool folder of its own, and fails if it leaves anything of it behind."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import dask
import pytest

import dask_shm_bridge  # noqa: F401  (its defaults must not be registered within a test)

MiB = 1024 * 1024
WINDOWS = os.name == "nt"
# Tests that fork, stop processes, make links and pipes, or look at /proc.
posix = pytest.mark.skipif(WINDOWS, reason="no such thing on Windows (a fork, a signal, /proc ...)")
CLOEXEC = getattr(os, "O_CLOEXEC", 0)
MEMORY = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()).absolute()
POOL = {
    "shm-bridge.pool.size": "64 MiB",
    "shm-bridge.pool.slot-size": "4 MiB",
    "shm-bridge.pool.linger": "60s",
    "shm-bridge.copy-threads": 2,
    # arrays of tests are small; `make test-threshold` sets it to 1 byte
    "shm-bridge.threshold": os.environ.get("DASK_SHM_BRIDGE__THRESHOLD", "256 KiB"),
}
if WINDOWS:  # where a folder that is named may be shared with WSL2, so that a lane is made there
    POOL["shm-bridge.exchange.path"] = False
PATIENCE_S = 60.0


def environment_name(key: str) -> str:
    """Return the environment variable that sets a key of Dask's configuration."""
    return "DASK_" + key.upper().replace(".", "__").replace("-", "_")


def eventually(condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> bool:
    """Wait until something is true; say whether it came to be."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def descriptors(folder: Path) -> list[str]:
    """Return what this process holds open in a folder."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{fd}")
                if target.startswith(str(folder)):
                    found.append(target)
    return found


def bridge_threads() -> set[threading.Thread]:
    """Return the threads of this package."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("shm-bridge")}


def leave(folder: Path) -> None:
    """Leave the pool in `folder`; pools in other folders are other fixtures' affair."""
    module = sys.modules.get("dask_shm_bridge.store")
    if module is None:
        return
    if WINDOWS:  # where no living view can be detached
        gc.collect()
        for joined in module.joined():
            joined.settle()
    if set(module._pools) <= {str(folder)}:
        module.detach_all()
    else:
        joined = module._pools.pop(str(folder), None)
        if joined is not None:
            joined.close()


_later: list[Path] = []


def remove(folder: Path) -> None:
    """Remove a folder; on Windows what is still mapped goes with the last test."""
    gc.collect()
    try:
        shutil.rmtree(folder)
    except OSError:
        if not WINDOWS:
            raise
        _later.append(folder)


def pytest_collection_finish() -> None:
    """Leave what was imported out of each test's collections, which take most of the time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.collect()
    for folder in _later:
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(folder: Path) -> list[str]:
    """Return what a folder has besides the lock that is never removed."""
    if not folder.exists():
        return []
    return sorted(name for name in os.listdir(folder) if name != "lock")


@pytest.fixture(autouse=True)
def pool_folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Give this test a pool folder, in the configuration and in the environment of children."""
    folder = MEMORY / f"dask-shm-bridge-test-{os.getpid()}-{secrets.token_hex(4)}"
    config = {"shm-bridge.pool.path": str(folder), **POOL}
    threads = bridge_threads()
    with pytest.MonkeyPatch.context() as patch, dask.config.set(config):
        for key, value in config.items():
            patch.setenv(environment_name(key), str(value))
        yield folder
    leave(folder)
    request.node.funcargs.pop("small_pool", None)  # its mappings live as long as it does
    gc.collect()
    eventually(lambda: bridge_threads() <= threads)
    eventually(lambda: not descriptors(folder), 1.0)
    leaks = {
        "threads": sorted(thread.name for thread in bridge_threads() - threads),
        "file descriptors": descriptors(folder),
        "files": leftovers(folder),
    }
    shutil.rmtree(folder, ignore_errors=True)
    found = {kind: names for kind, names in leaks.items() if names}
    assert not found, f"this test left behind: {found}"


@pytest.fixture
def settings() -> Callable[..., Any]:
    """Return a function that makes `Settings` from the configuration, with changes."""
    from dask_shm_bridge.config import Settings

    def make(**changes: Any) -> Settings:
        return dataclasses.replace(Settings.from_config(), **changes)

    return make


@pytest.fixture
def small_pool() -> Any:
    """Join this test's pool: 16 slots of 4 MiB."""
    from dask_shm_bridge import store

    return store.attach()


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a script in a process of its own."""

    def run(
        code: str, *args: Any, timeout_s: float = 60, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


class Child:
    """A script in a process of its own, which talks by lines of JSON.

    In the script, ``say(value)`` and ``hear()`` are defined; here `hear` and `say`.
    """

    PRELUDE = textwrap.dedent(
        """
        import json, sys
        def say(value=None):
            print(json.dumps(value), flush=True)
        def hear():
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(3)  # the test has ended
            return json.loads(line)
        """
    )

    def __init__(self, code: str, *args: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PRELUDE + textwrap.dedent(code), *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_lines, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_lines(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(self.process.stderr)

    def hear(self, timeout_s: float = 60) -> Any:
        try:
            line = self._lines.get(timeout=timeout_s)
        except Empty:
            line = ""
        if not line:
            self.process.kill()
            self._readers[1].join(5)
            raise AssertionError(f"the child said nothing more: {''.join(self._errors)}")
        return json.loads(line)

    def say(self, value: Any = None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def ask(self, value: Any = None) -> Any:
        self.say(value)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def wait(self, timeout_s: float = 60) -> int:
        """Wait for its end; it must be a good one."""
        code = self.process.wait(timeout_s)
        self._readers[1].join(5)
        assert code == 0, "".join(self._errors)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
        for file in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()


@pytest.fixture
def child(pool_folder: Path) -> Iterator[Callable[..., Child]]:
    """Return a function that starts a `Child`; all are ended with the test."""
    children: list[Child] = []

    def start(code: str, *args: Any) -> Child:
        children.append(Child(code, *args))
        return children[-1]

    yield start
    for one in children:
        one.close()


def _key(name: str) -> str:
    """Read ``pool__slot_size`` as ``shm-bridge.pool.slot-size``; take a dotted key as it is."""
    if "." in name:
        return name
    return "shm-bridge." + name.replace("__", ".").replace("_", "-")


@pytest.fixture
def cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pool_folder: Path
) -> Callable[..., contextlib.AbstractContextManager[tuple[Any, Any]]]:
    """Return a context manager: a cluster of real processes, and a client of it.

    ``cluster(n_workers=2, protocol="shm", scheduler_process=False, **config)`` yields
    ``(client, cluster)``. Configuration is ``threshold="1 KiB"``, ``pool__size="1 GiB"`` or
    ``**{"distributed.worker.memory.target": 0.5}``.

    At the end nothing may be left in the ledger but connections and members. Futures are
    cancelled for that, but what the test itself still holds it must drop before (``del``).
    """
    from dask_shm_bridge import store

    def drained(client: Any) -> None:
        from distributed.utils import TimeoutError as DaskTimeoutError

        if client.status == "running":
            with contextlib.suppress(DaskTimeoutError):
                client.cancel(list(client.futures), force=True)
        joined = store.attached(str(pool_folder))
        if joined is None:
            return
        counts: dict[str, int] = {}

        def empty() -> bool:
            gc.collect()
            counts.update(joined.ledger.usage()["counts"])
            return not (counts["lease"] or counts["ticket"] or counts["extent"])

        if not eventually(empty):
            holders = [member for member in joined.ledger.members() if member.held_bytes]
            raise AssertionError(
                f"left in the ledger: {counts}, held by {holders}; living views in this process "
                f"({os.getpid()}): {len(joined.views)}"
            )

    @contextlib.contextmanager
    def make(
        n_workers: int = 2,
        protocol: str = "shm",
        scheduler_process: bool = False,
        **config: Any,
    ) -> Iterator[tuple[Any, Any]]:
        from distributed import Client, LocalCluster

        config = {_key(name): value for name, value in config.items()}
        config.setdefault("distributed.worker.profile.enabled", False)
        options: dict[str, Any] = {
            "n_workers": n_workers,
            "threads_per_worker": 1,
            "dashboard_address": None,
            "silence_logs": False,
        }
        server = {"dashboard_address": ":0"}  # not the usual port, which somebody may have
        with monkeypatch.context() as patch, dask.config.set(config):
            for key, value in config.items():
                patch.setenv(environment_name(key), str(value))
            if scheduler_process:
                from distributed.deploy.subprocess import SubprocessCluster

                started = SubprocessCluster(
                    scheduler_kwargs={
                        **server,
                        "protocol": protocol,
                        "scheduler_file": str(tmp_path / f"scheduler-{secrets.token_hex(4)}"),
                    },
                    worker_kwargs={"local_directory": str(tmp_path), "memory_limit": 0},
                    **options,
                )
            else:
                started = LocalCluster(
                    processes=True,
                    protocol=protocol,
                    scheduler_kwargs=server,
                    local_directory=str(tmp_path),
                    memory_limit=0,
                    **options,
                )
            with started, Client(started, set_as_default=False) as client:
                client.wait_for_workers(n_workers, timeout=60)
                yield client, started
                drained(client)

    return make
