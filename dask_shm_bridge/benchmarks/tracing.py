"""Times of the steps of a transfer, taken in every process by wrapping functions from outside.

Nothing in the package or in Dask knows of it: `install` puts wrappers in the place of functions
and handlers, for good, so it is for processes of a benchmark alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Event(NamedTuple):
    """One moment in one process.

    Attributes
    ----------
    ns
        ``time.monotonic_ns()``, which all processes of a host share.
    role
        The process: ``client`` (with the scheduler, in a ``LocalCluster``), ``worker-0``, ...
    step
        What happened, with ``:begin`` or ``:end``.
    user_s, system_s, faults
        What this thread had used and met until then: time in its own code, time in the kernel,
        minor page faults.
    """

    ns: int
    role: str
    step: str
    user_s: float
    system_s: float
    faults: int


#: Functions looked up anew at each call: module, name, step, and whether only large ones count.
FUNCTIONS = (
    ("distributed.comm.tcp", "to_frames", "to-frames", True),
    ("distributed.comm.tcp", "from_frames", "from-frames", True),
    ("distributed.worker", "_run_task", "task", False),
    ("distributed.worker", "Worker.gather_dep", "gather-dep", False),
    ("distributed.worker", "Worker.execute", "execute", False),
    ("dask_shm_bridge.comm", "to_frames", "to-frames", True),
    ("dask_shm_bridge.comm", "from_frames", "from-frames", True),
    ("dask_shm_bridge.comm", "ShmTCP._send", "send-frames", False),
    ("dask_shm_bridge.store", "Pool.ship", "ship", False),
    ("dask_shm_bridge.store", "Pool.receive", "receive", False),
    ("dask_shm_bridge.store", "Pool._commit", "commit", False),
    ("dask_shm_bridge.ledger", "Ledger.ship", "ledger", False),
    ("dask_shm_bridge.copying", "Copier.copy", "copy", False),
)

#: Handlers of messages, which a server keeps in a dictionary of its own.
HANDLERS = ("get_data", "gather", "scatter", "update_data")
STREAM_HANDLERS = ("update-graph", "compute-task", "task-finished", "key-in-memory")

_events: list[Event] = []
_role = ""
_installed: set[int] = set()


def note(step: str, ns: int | None = None) -> None:
    """Add an event of now, or of a time already taken. Linux only."""
    import resource

    used = resource.getrusage(resource.RUSAGE_THREAD)
    _events.append(
        Event(
            time.monotonic_ns() if ns is None else ns,
            _role,
            step,
            used.ru_utime,
            used.ru_stime,
            used.ru_minflt,
        )
    )


def drain() -> list[tuple[Any, ...]]:
    """Return this process's events so far, as plain tuples, and forget them."""
    found = [tuple(event) for event in _events]
    _events.clear()
    return found


def install(role: str, least_bytes: int, servers: tuple[Any, ...]) -> None:
    """Wrap everything in this process; what is wrapped already stays as it is.

    Parameters
    ----------
    role
        Name of this process in events.
    least_bytes
        Frames of fewer bytes than this are not the payload.
    servers
        The scheduler, client or worker whose handlers are to be wrapped.
    """
    global _role
    _role = role
    if not _installed:
        for module, name, step, large in FUNCTIONS:
            owner: Any = importlib.import_module(module)
            *path, last = name.split(".")
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, last, _wrapped(getattr(owner, last), step, least_bytes * large))
        _wrap_streams()
        _installed.add(0)
    for server in servers:
        if id(server) in _installed:
            continue
        _installed.add(id(server))
        for attribute, names, word in (
            ("handlers", HANDLERS, "rpc"),
            ("stream_handlers", STREAM_HANDLERS, "recv"),
            ("_stream_handlers", STREAM_HANDLERS, "recv"),
        ):
            handlers = getattr(server, attribute, {})
            for name in names:
                if name in handlers:
                    handlers[name] = _wrapped(handlers[name], f"{word} {name}", 0)


def install_in_worker(roles: dict[str, str], least_bytes: int, dask_worker: Any) -> None:
    """Do the same in a worker, which knows itself by its address."""
    install(roles[dask_worker.address], least_bytes, (dask_worker,))


def _wrap_streams() -> None:
    """Note what is handed to a stream: it goes out now, or when the stream's pause is over."""
    from distributed.batched import BatchedSend

    send = BatchedSend.send

    @functools.wraps(send)
    def wrapper(self: Any, *messages: Any) -> None:
        for message in messages:
            operation = message.get("op") if isinstance(message, dict) else None
            if operation in STREAM_HANDLERS:
                note(f"send {operation}")
        send(self, *messages)

    BatchedSend.send = wrapper  # type: ignore[method-assign]


def _wrapped(function: Callable[..., Any], step: str, least_bytes: int) -> Callable[..., Any]:
    begin, end = f"{step}:begin", f"{step}:end"

    def finish(arguments: tuple[Any, ...], result: Any, began: int) -> None:
        if not least_bytes or max(_size(arguments[:1]), _size((result,))) >= least_bytes:
            if least_bytes:
                note(begin, began)
            note(end)

    def start() -> int:
        if not least_bytes:
            note(begin)
        return time.monotonic_ns()

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = start()
            result = await function(*args, **kwargs)
            finish(args, result, began)
            return result
    else:

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = start()
            result = function(*args, **kwargs)
            finish(args, result, began)
            return result

    return wrapper


def _size(values: tuple[Any, ...]) -> int:
    """Add up the frames in a list of them; anything else counts nothing."""
    if not values or not isinstance(values[0], list):
        return 0
    return sum(
        frame.nbytes if isinstance(frame, (memoryview, np.ndarray)) else len(frame)
        for frame in values[0]
        if isinstance(frame, (memoryview, np.ndarray, bytes, bytearray))
    )
