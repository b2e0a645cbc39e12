"""Which client a call goes through: the user's, the worker's inside a task, or a new one."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from dask_shm_bridge.errors import BridgeError


class Home(NamedTuple):
    """A scheduler, as a pickled estimator knows it.

    Its address may have another name elsewhere, behind a tunnel, say; its `id` has not.
    """

    address: str
    security: Any
    id: str | None = None


class Options(NamedTuple):
    """What `options` sets."""

    client: Any = None
    timeout: float | None = None


_NO_OPTIONS = Options()
_options: ContextVar[Options] = ContextVar("shm-bridge-cuml-options", default=_NO_OPTIONS)
_lock = threading.Lock()
_opened: dict[str, Any] = {}
_last_home: Home | None = None


@contextlib.contextmanager
def options(client: Any = None, timeout: float | str | None = None) -> Iterator[None]:
    """Set the client and the time limit of the estimators' calls in a block.

    Parameters
    ----------
    client : distributed.Client, optional
        Instead of the current one.
    timeout : float or str, optional
        Seconds, or a text such as ``"5 minutes"``, for each call. Past it the remote task is
        cancelled and the call raises TimeoutError.
    """
    from dask.utils import parse_timedelta

    before = _options.get()
    seconds = before.timeout if timeout is None else float(parse_timedelta(timeout, default="s"))
    token = _options.set(Options(client if client is not None else before.client, seconds))
    try:
        yield
    finally:
        _options.reset(token)


def timeout() -> float | None:
    """Return the time limit of a call, in seconds."""
    return _options.get().timeout


def remember(home: Home | None) -> None:
    """Make a home the one to connect to, if this process has no client of its own.

    In a process of joblib's, say, clones of an estimator that came there know no home.
    """
    global _last_home
    if home is not None and current() is None:
        _last_home = home


def home_of(client: Any) -> Home:
    """Return the scheduler of a client."""
    return Home(client.scheduler.address, client.security, _id_of(client))


def _id_of(client: Any) -> str | None:
    # What Dask's client was told when it connected: scheduler_info() would ask again, and wait.
    found = getattr(client, "_scheduler_identity", {}).get("id")
    return str(found) if found is not None else None


def is_at(client: Any, home: Home) -> bool:
    """Whether a client is one of a home's scheduler."""
    here = _id_of(client)
    if here is not None and home.id is not None:
        return here == home.id
    return bool(client.scheduler.address == home.address)


def current() -> Any:
    """Return the client that this process uses now, or None."""
    from distributed import Client, get_worker

    chosen = _options.get().client
    if chosen is not None:
        return chosen
    if in_task():
        with contextlib.suppress(ValueError, AttributeError):
            return get_worker()._get_client()
    try:
        return Client.current()
    except ValueError:
        return None


def any_client(home: Home | None = None) -> Any:
    """Return the current client, whatever its scheduler; one of `home` where there is none.

    Raises
    ------
    BridgeError
        If there is neither.
    """
    client = current()
    return client if client is not None else find(home)


def find(home: Home | None = None) -> Any:
    """Return a client; of the scheduler `home` where one is given.

    Raises
    ------
    BridgeError
        If there is none.
    """
    client = current()
    if client is not None and (home is None or is_at(client, home)):
        return client
    if home is None:
        home = _last_home
    if home is None:
        raise BridgeError(
            "no Dask client: make a distributed.Client first, or name one by "
            "dask_shm_bridge.cuml.options(client=...)"
        )
    return _open(home)


def _open(home: Home) -> Any:
    from distributed import Client

    with _lock:
        client = _opened.get(home.address)
        if client is None or client.status != "running":
            client = Client(home.address, security=home.security, set_as_default=False)
            _opened[home.address] = client
            atexit.register(client.close, timeout=5)
        return client


def in_task() -> bool:
    """Whether this thread runs a Dask task."""
    from distributed.threadpoolexecutor import thread_state as pool_state
    from distributed.worker import thread_state

    return hasattr(pool_state, "executor") and hasattr(thread_state, "execution_state")


@contextlib.contextmanager
def seceded() -> Iterator[None]:
    """Give up a worker's thread while a task waits for another, which may need that thread."""
    from distributed import rejoin, secede
    from distributed.threadpoolexecutor import thread_state

    if not in_task() or not getattr(thread_state, "proceed", False):
        yield
        return
    secede()
    try:
        yield
    finally:
        rejoin()
