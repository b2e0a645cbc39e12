"""Runs in the guest: a Python that calls functions for the tests, and forks processes for them.

``python -m two_kernels.far HOST PORT`` connects to the test on the host. Importing Dask takes the
better part of a minute under emulation, so that is done once here, and each process starts as a
fork.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

KEY = "TWO_KERNELS_KEY"
LOGS = Path("/mnt/logs")

_children: dict[int, int | None] = {}


class Forked(BaseException):
    """Ends the work of the parent in a child, which has work of its own."""

    def __init__(self, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args


def main() -> None:
    """Do what the test asks; in a child, what it was started for."""
    import distributed.cli.dask_scheduler
    import distributed.cli.dask_worker  # noqa: F401

    import dask_shm_bridge  # noqa: F401

    LOGS.mkdir(exist_ok=True)
    try:
        serve()
    except Forked as child:
        function, args = child.function, child.args
    else:
        return
    function(*args)


def serve() -> None:
    """Do what the test asks, one thing after the other, until it hangs up."""
    host, port = sys.argv[1:]
    with Client((host, int(port)), authkey=bytes.fromhex(os.environ.pop(KEY))) as asked:
        while True:
            try:
                function, args, options = asked.recv()
            except EOFError:
                return
            try:
                answer = (True, function(*args, **options))
            except Exception:
                answer = (False, traceback.format_exc())
            asked.send(answer)


# What follows is called from the host.


def start(function: Callable[..., None], *args: Any, **environment: str) -> int:
    """Run a function in a child, with this added to its environment; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        _children[pid] = None
        return pid
    os.setsid()
    log = os.open(LOGS / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    os.environ.update(environment)
    raise Forked(function, args)


def dask(module: str, *args: str) -> None:
    """Be a process of Dask: what ``python -m module args`` would do."""
    import importlib

    import dask

    dask.config.refresh()
    importlib.import_module(module).main(list(args))


def ended(pid: int) -> int | None:
    """Return how a child ended (as in `subprocess`), or None while it lives."""
    if _children[pid] is None:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            _children[pid] = os.waitstatus_to_exitcode(status)
    return _children[pid]


def listens(port: int) -> bool:
    """Say whether somebody on this side takes connections to a port."""
    import socket

    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


def send_signal(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a child a signal, if it lives."""
    if ended(pid) is None:
        os.kill(pid, number)


def log(pid: int) -> str:
    """Return what a child wrote."""
    return (LOGS / str(pid)).read_text(errors="replace")


def living() -> dict[int, str]:
    """Return the processes that came of this one, and live."""
    import psutil

    return {
        child.pid: child.status()
        for child in psutil.Process().children(recursive=True)
        if child.pid not in _children or ended(child.pid) is None
    }


def system(command: str) -> tuple[int, str]:
    """Run a command of the host's system in the guest; return its status and what it said."""
    import subprocess

    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    from two_kernels import far  # what the host names is there, not in __main__

    far.main()
