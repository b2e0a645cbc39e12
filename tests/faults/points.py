"""The steps of the protocol, wrapped from outside, so that a fault can be put before or after each.

Production code knows nothing of this. `install` replaces the functions in `POINTS` in a process
that is to be disturbed; one that is not there any more is an error that names it. A fault is armed
by `arm`, or by a file in the folder ``FAULTS_FOLDER`` that is named ``arm-`` and the role of the
process that shall take it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import importlib
import inspect
import itertools
import json
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

POINTS = {
    # joining and leaving
    "attach": "dask_shm_bridge.folder:attach",
    "create": "dask_shm_bridge.folder:_create",
    "publish": "dask_shm_bridge.folder:_publish",
    "join": "dask_shm_bridge.ledger:Ledger.join",
    "connect": "dask_shm_bridge.ledger:Ledger.connect",
    "leave": "dask_shm_bridge.folder:Attachment.leave",
    "remove": "dask_shm_bridge.folder:_remove",
    "unlink": "dask_shm_bridge.folder:_unlink",
    # sending; `allocate` and `ticket` are inside the transaction that `ship` is
    "ship": "dask_shm_bridge.ledger:Ledger.ship",
    "allocate": "dask_shm_bridge.ledger:Ledger._allocate",
    "ticket": "dask_shm_bridge.ledger:_ticket",
    "commit": "dask_shm_bridge.store:Pool._commit",
    "copy": "dask_shm_bridge.copying:Copier.copy",
    "send": "dask_shm_bridge.comm:ShmTCP._send",
    "send-pieces": "dask_shm_bridge.comm:ShmTCP._write_in_pieces",
    # receiving
    "receive": "dask_shm_bridge.comm:ShmTCP._read_frames",
    "adopt": "dask_shm_bridge.ledger:Ledger.adopt",
    "view": "dask_shm_bridge.views:Views.claim",
    "copy-out": "dask_shm_bridge.store:Pool.copy_out",
    "take-piece": "dask_shm_bridge.store:Pool.take_piece",
    # giving back
    "release": "dask_shm_bridge.ledger:Ledger.give_back",
    "detach": "dask_shm_bridge.views:Views.detach",
    "sweep": "dask_shm_bridge.folder:Attachment.sweep",
    "expel": "dask_shm_bridge.ledger:Ledger.leave",
    # the ledger's lock: held after `lock` and before `unlock`
    "lock": "dask_shm_bridge.record:Record._take",
    "unlock": "dask_shm_bridge.record:Record._release",
}
# Where there is nothing of ours: for the same faults over plain tcp.
STOCK = {
    "stock-send": "distributed.comm.tcp:TCP.write",
    "stock-receive": "distributed.comm.tcp:TCP.read",
}
WHENS = ("before", "after")
ACTIONS = ("kill", "stop", "cancel", "cut")
FOLDER = "FAULTS_FOLDER"
OVER = "over"  # a file in that folder: what is armed and was not met is met no more


@dataclass(frozen=True)
class Fault:
    """What shall happen, and where: at the nth time that a process comes there."""

    point: str
    when: str
    action: str
    nth: int = 1

    def __post_init__(self) -> None:
        if self.point not in POINTS | STOCK or self.when not in WHENS or self.action not in ACTIONS:
            raise ValueError(f"no such fault: {self}")


class MissingPointError(AttributeError):
    """A step of the protocol is not where `POINTS` says."""


_armed: tuple[Fault, Any] | None = None
_report: Callable[[dict[str, Any]], None] = print
_folder: str | None = None
_comm: contextvars.ContextVar[Any] = contextvars.ContextVar("comm", default=lambda: None)
_task: contextvars.ContextVar[Any] = contextvars.ContextVar("task", default=lambda: None)
_comms: weakref.WeakSet[Any] = weakref.WeakSet()


def install(
    report: Callable[[dict[str, Any]], None] | None = None,
    folder: str | None = None,
    stock: bool = False,
) -> None:
    """Wrap all points of this process.

    Parameters
    ----------
    report : callable, optional
        Told of a fault just before it happens.
    folder : str, optional
        Where to look for faults to take (and, without `report`, to write of them).
    stock : bool
        Wrap `STOCK` instead.

    Raises
    ------
    MissingPointError
        If a function is not there any more.
    """
    global _report, _folder
    found = {point: _find(point) for point in (STOCK if stock else POINTS)}
    for point, (owner, name, function) in found.items():
        setattr(owner, name, _wrapped(point, function))
    _track(stock)
    _folder = folder
    _report = report or (_write_report if folder else _report)


def arm(fault: Fault | None) -> None:
    """Have this process meet a fault; None disarms it."""
    global _armed
    _armed = None if fault is None else (fault, itertools.count(1))


def role() -> str:
    """Return what this process is."""
    for module, name in (
        ("distributed.worker", "Worker"),
        ("distributed.scheduler", "Scheduler"),
        ("distributed.nanny", "Nanny"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and len(kind._instances):
            return name.lower()
    return os.environ.get("FAULTS_ROLE", "client")


def _find(point: str) -> tuple[Any, str, Any]:
    place = (POINTS | STOCK)[point]
    module_name, _, path = place.partition(":")
    *parents, name = path.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
        for parent in parents:
            owner = getattr(owner, parent)
        function = vars(owner)[name]
    except (ImportError, AttributeError, KeyError) as error:
        raise MissingPointError(
            f"the step {point!r} is not at {place} any more: say in "
            f"tests/faults/points.py where it is now ({error!r})"
        ) from error
    if not inspect.isfunction(function):
        raise MissingPointError(f"the step {point!r}, {place}, is no function any more")
    return owner, name, function


def _wrapped(point: str, function: Any) -> Any:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            _reached(point, "before")
            try:
                return await function(*args, **kwargs)
            finally:
                _reached(point, "after")

        return awaited

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        _reached(point, "before")
        try:
            return function(*args, **kwargs)
        finally:
            _reached(point, "after")

    return called


def _track(stock: bool) -> None:
    """Know on whose behalf a step runs, on a thread of the pool too: which comm, which task."""

    def tracked(function: Any) -> Any:
        @functools.wraps(function)
        async def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            _comms.add(self)
            # Weakly: streams keep a copy of the context, and Dask's finalizers keep the streams.
            task = asyncio.current_task()
            assert task is not None
            comm_token = _comm.set(weakref.ref(self))
            task_token = _task.set(weakref.ref(task))
            try:
                return await function(self, *args, **kwargs)
            finally:
                _comm.reset(comm_token)
                _task.reset(task_token)

        return call

    if stock:
        from distributed.comm.tcp import TCP

        TCP.read, TCP.write = tracked(TCP.read), tracked(TCP.write)
        return
    from dask_shm_bridge.comm import ShmTCP
    from dask_shm_bridge.store import Pool

    ShmTCP.read = tracked(ShmTCP.read)  # type: ignore[method-assign]
    ShmTCP.write = tracked(ShmTCP.write)  # type: ignore[method-assign]
    submit = Pool.submit

    def submit_tracked(self: Any, job: Any, *args: Any) -> Any:
        return submit(self, contextvars.copy_context().run, job, *args)

    Pool.submit = submit_tracked  # type: ignore[method-assign]


def _reached(point: str, when: str) -> None:
    if _folder is not None:
        _look(_folder)
    armed = _armed
    if armed is None:
        return
    fault, count = armed
    if (fault.point, fault.when) == (point, when) and next(count) == fault.nth:
        _act(fault)


def _look(folder: str) -> None:
    """Take the fault that is meant for this role, if there is one."""
    path = f"{folder}/arm-{role()}"
    if os.path.exists(path):
        mine = f"{folder}/taken-{os.getpid()}-{threading.get_ident()}"
        with contextlib.suppress(FileNotFoundError):  # another one was quicker
            os.rename(path, mine)
            with open(mine) as file:
                arm(Fault(**json.load(file)))
            os.unlink(mine)


def _act(fault: Fault) -> None:
    if _folder is not None and os.path.exists(f"{_folder}/{OVER}"):
        return
    message = {"hit": asdict(fault), "pid": os.getpid(), "role": role()}
    if fault.action == "kill":
        _report(message)
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    elif fault.action == "stop":
        _report(message)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # here, not a little later
    elif fault.action == "cancel":
        _report({**message, "done": _cancel()})
    elif fault.action == "cut":
        _report({**message, "done": _cut()})


def _cancel() -> bool:
    with contextlib.suppress(RuntimeError):
        task = asyncio.current_task()
        if task is not None:
            return task.cancel()
    task = _task.get()()
    if task is None:
        return False
    task.get_loop().call_soon_threadsafe(task.cancel)
    return True


def _cut() -> bool:
    """End the connection that this step works for, or any, under the comm's feet."""
    for comm in [_comm.get()(), *list(_comms)]:
        stream = getattr(comm, "stream", None)
        if stream is not None and not stream.closed():
            with contextlib.suppress(OSError, AttributeError):
                stream.socket.shutdown(socket.SHUT_RDWR)
                return True
    return False


def _write_report(message: dict[str, Any]) -> None:
    data = (json.dumps(message) + "\n").encode()
    fd = os.open(f"{_folder}/hits", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.write(fd, data)
    os.close(fd)
