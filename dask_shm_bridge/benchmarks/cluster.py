"""A cluster whose scheduler and workers are processes of their own, started by command line.

``LocalCluster`` keeps its scheduler in the client's process, where nobody can tell the memory
of the two apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from distributed import Client

from dask_shm_bridge.benchmarks.deadline import within

START_SECONDS = 60.0
STOP_SECONDS = 20.0

#: One computing thread a worker, as Dask's nanny has it.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class ClusterError(RuntimeError):
    """A process of the cluster did not start; the message holds the end of its log."""


class ProcessCluster:
    """A scheduler and single-threaded workers on this host, and a client of them.

    Parameters
    ----------
    protocol
        Protocol of every connection: ``tcp``, ``shm``.
    workers
        How many worker processes.
    default
        Whether the client is the default one of this process, as actors need it.
    config
        Dask's settings for the scheduler and the workers, beside those they read themselves.

    Attributes
    ----------
    client : distributed.Client
        There from entering to leaving the context.
    pids : dict of str to int
        Process ids by role: ``client``, ``scheduler``, ``worker-0``, and so on.

    Examples
    --------
    >>> with ProcessCluster("tcp", workers=2) as cluster:  # doctest: +SKIP
    ...     cluster.client.submit(sum, [1, 2]).result()
    3
    """

    client: Client

    def __init__(
        self,
        protocol: str,
        workers: int = 2,
        *,
        default: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.protocol = protocol
        self.workers = workers
        self.default = default
        self._variables = {
            "DASK_" + key.upper().replace(".", "__").replace("-", "_"): repr(value)
            for key, value in (config or {}).items()
        }
        self.pids: dict[str, int] = {"client": os.getpid()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ProcessCluster:
        """Start everything; ClusterError, with nothing left running, if that fails."""
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop everything, by force what does not go by itself."""
        self._stop()

    def _start(self) -> None:
        temporary = tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True)
        self._folder = Path(self._stack.enter_context(temporary))
        contact = self._folder / "scheduler.json"
        place = ["--host", "127.0.0.1", "--protocol", self.protocol, "--no-dashboard"]
        ports = ["--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self._launch("scheduler", [*place, *ports, "--scheduler-file", str(contact)])
        address = self._address(contact)
        alone = ["--no-nanny", "--nthreads", "1", "--memory-limit", "0"]
        alone += ["--local-directory", str(self._folder)]
        for number in range(self.workers):
            self._launch(
                f"worker-{number}",
                [address, *place, *alone, "--name", f"worker-{number}"],
            )
        self.client = Client(address, set_as_default=self.default, timeout=START_SECONDS)
        try:
            self.client.wait_for_workers(self.workers, timeout=START_SECONDS)
        except TimeoutError:
            self._stop_client()
            raise ClusterError("\n".join(map(self._log, self._processes))) from None

    def _launch(self, role: str, arguments: list[str]) -> None:
        module = f"distributed.cli.dask_{role.partition('-')[0]}"
        with open(self._folder / f"{role}.log", "wb") as log:
            self._processes[role] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_ONE_THREAD, **os.environ, **self._variables},
            )
        self.pids[role] = self._processes[role].pid

    def _address(self, contact: Path) -> str:
        """Wait for the scheduler to write where it listens."""
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up and self._processes["scheduler"].poll() is None:
            with contextlib.suppress(OSError, json.JSONDecodeError):
                return str(json.loads(contact.read_text())["address"])
            time.sleep(0.05)
        raise ClusterError(self._log("scheduler"))

    def _log(self, role: str) -> str:
        text = (self._folder / f"{role}.log").read_text(errors="replace")
        return f"{role} did not come up; its log ends:\n{text[-8000:]}"

    def _stop_client(self) -> None:
        for end in (self.client.shutdown, self.client.close):
            with contextlib.suppress(Exception):
                within(STOP_SECONDS, end)

    def _stop(self) -> None:
        if hasattr(self, "client"):
            self._stop_client()
        for insist in (_nothing, subprocess.Popen.terminate, subprocess.Popen.kill):
            for process in self._processes.values():
                if process.poll() is None:
                    insist(process)
            give_up = time.monotonic() + STOP_SECONDS / 2
            for process in self._processes.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, give_up - time.monotonic()))
        self._stack.close()


def _nothing(process: subprocess.Popen[bytes]) -> None:
    """Leave a process alone: it was asked to close and may need a moment."""
