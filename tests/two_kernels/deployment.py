"""A scheduler and workers on both sides of two kernels, each at an address that all can reach.

What listens in the guest is found at 127.0.0.1 from the host as well, since its port is forwarded.
What listens on the host is 10.0.2.2 for the guest, so a worker of the host gives that as its
address where the scheduler is in the guest; the client goes through the scheduler.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distributed import Client
from process.deployment import environment

from . import far
from .guest import HOST, Guest

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 120.0
# Under emulation everything takes its time, and nothing here is about time.
PATIENT = {
    "distributed.comm.timeouts.connect": "180s",
    "distributed.comm.timeouts.tcp": "600s",
    "distributed.scheduler.worker-ttl": "1h",
    "distributed.scheduler.allowed-failures": 10,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.large-graph-warning-threshold": "1 TiB",
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}
SCHEDULER = "distributed.cli.dask_scheduler"
WORKER = "distributed.cli.dask_worker"


class HostProcess:
    """A process of Dask on the host."""

    def __init__(self, folder: Path, config: dict[str, Any], module: str, *args: str) -> None:
        self._log = folder / f"{module.rpartition('_')[2]}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                cwd=folder,
                env=environment(config),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid

    def ended(self) -> int | None:
        return self._process.poll()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def said(self) -> str:
        return f"--- {self._log.name} (host, {self.pid})\n{self._log.read_text()[-6000:]}"


class GuestProcess:
    """A process of Dask in the guest; one that is gone with its guest has ended."""

    def __init__(
        self, guest: Guest, config: dict[str, Any], module: str, *args: str, **more: str
    ) -> None:
        self._guest = guest
        names = {k: v for k, v in environment(config).items() if k.startswith("DASK_")}
        self.pid: int = guest.call(far.start, far.dask, module, *args, **names, **more)

    def ended(self) -> int | None:
        if not self._guest.lives:
            return -signal.SIGKILL
        code: int | None = self._guest.call(far.ended, self.pid)
        return code

    def send_signal(self, number: int) -> None:
        if self._guest.lives:
            self._guest.call(far.send_signal, self.pid, number)

    def said(self) -> str:
        text = self._guest.call(far.log, self.pid) if self._guest.lives else "gone with its guest"
        return f"--- guest, {self.pid}\n{text[-6000:]}"


class TwoSides:
    """A scheduler on one side, and workers on any.

    Parameters
    ----------
    guest : Guest
        The second kernel.
    folder : Path
        For logs and files of the processes of the host.
    host_config, guest_config : dict
        Dask's configuration of each side.
    scheduler : str
        Where the scheduler is: host or guest.
    protocol : str
        Of everything.
    """

    def __init__(
        self,
        guest: Guest,
        folder: Path,
        host_config: dict[str, Any],
        guest_config: dict[str, Any],
        scheduler: str = "host",
        protocol: str = "tcp",
    ) -> None:
        self.guest = guest
        self.folder = folder
        self.configs = {
            "host": {**PATIENT, **host_config},
            "guest": {**PATIENT, **guest_config},
        }
        self.side = scheduler
        self.protocol = protocol
        self.processes: list[HostProcess | GuestProcess] = []
        self.workers: dict[str, HostProcess | GuestProcess] = {}
        self._port = guest.port() if scheduler == "guest" else _free_port()
        try:
            self.scheduler = self._start(
                scheduler,
                SCHEDULER,
                *("--protocol", protocol, "--port", str(self._port)),
                *("--host", "0.0.0.0" if scheduler == "guest" else "127.0.0.1"),
                *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
            )
            self._wait_for_scheduler()
        except BaseException:
            self.close()
            raise

    def _wait_for_scheduler(self) -> None:
        """Wait where it is: QEMU takes each connection to a forwarded port, and then drops it."""
        deadline = time.monotonic() + START_TIMEOUT_S
        call = self.guest.call if self.side == "guest" else lambda function, port: function(port)
        while not call(far.listens, self._port):
            if self.scheduler.ended() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the scheduler does not start:\n{self.said()}")
            time.sleep(0.1)

    def address(self, side: str) -> str:
        """Return the scheduler's address as a side has to call it."""
        far_away = side == "guest" and self.side == "host"
        return f"{self.protocol}://{HOST if far_away else '127.0.0.1'}:{self._port}"

    def add_worker(
        self, side: str, name: str, *args: str, **environment: str
    ) -> HostProcess | GuestProcess:
        """Start a worker on a side; one in the guest may have something in its environment."""
        port = self.guest.port() if side == "guest" else _free_port()
        listen = "0.0.0.0" if side == "guest" else "127.0.0.1"
        contact = HOST if side == "host" and self.side == "guest" else "127.0.0.1"
        self.workers[name] = self._start(
            side,
            WORKER,
            self.address(side),
            *("--listen-address", f"{self.protocol}://{listen}:{port}"),
            *("--contact-address", f"{self.protocol}://{contact}:{port}"),
            *("--no-nanny", "--no-dashboard", "--nthreads", "1", "--memory-limit", "0"),
            *("--name", name, "--death-timeout", "300"),
            *("--local-directory", "/mnt/tmp" if side == "guest" else str(self.folder)),
            *args,
            **environment,
        )
        return self.workers[name]

    def _start(
        self, side: str, module: str, *args: str, **environment: str
    ) -> HostProcess | GuestProcess:
        started: HostProcess | GuestProcess
        if side == "guest":
            started = GuestProcess(self.guest, self.configs[side], module, *args, **environment)
        else:
            started = HostProcess(self.folder, self.configs[side], module, *args)
        self.processes.append(started)
        return started

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Client]:
        """Connect from the host; wait for the workers."""
        options = {"set_as_default": False, "timeout": START_TIMEOUT_S, **options}
        try:
            with Client(self.address("host"), **options) as client:
                self._wait_for_workers(client)
                yield client
        except BaseException as error:
            error.add_note(self.said())
            raise

    def _wait_for_workers(self, client: Client) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(client.scheduler_info(n_workers=-1)["workers"]) < len(self.workers):
            if any(worker.ended() is not None for worker in self.workers.values()):
                raise RuntimeError("a worker ended")
            if time.monotonic() > deadline:
                raise RuntimeError("the workers did not come")
            time.sleep(0.1)

    def said(self) -> str:
        """Return what the processes wrote."""
        return "\n".join(process.said() for process in self.processes)

    def close(self) -> None:
        """End all processes, the workers first; one that does not end is an error."""
        stuck = []
        for group in (self.processes[1:], self.processes[:1]):
            for process in group:
                if process.ended() is None:
                    process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for process in group:
                while process.ended() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if process.ended() is None:
                    stuck.append(process)
                    process.send_signal(signal.SIGABRT)  # its stacks go to its log
        if stuck:
            time.sleep(3)
            texts = "\n".join(process.said() for process in stuck)
            for process in stuck:
                process.send_signal(signal.SIGKILL)
            raise RuntimeError(f"processes did not end:\n{texts}")

    def __enter__(self) -> TwoSides:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
