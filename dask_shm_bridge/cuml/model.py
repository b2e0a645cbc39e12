"""The client's handle of a fitted model, and how long the model lives."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from dask.utils import parse_timedelta

from dask_shm_bridge import config
from dask_shm_bridge.cuml import clients, session
from dask_shm_bridge.cuml.outcome import Outcome
from dask_shm_bridge.errors import BridgeError

_kept: dict[int, Any] = {}
_numbers = itertools.count()


class Model:
    """A model on a worker: a Future, and what is known of it here.

    The model lives as long as a Future of it does: this one's, that of a copy of the estimator, or
    of one that was unpickled. A process that pickles the handle keeps the model for
    ``shm-bridge.cuml.keep-pickled``.

    Parameters
    ----------
    future : distributed.Future
        Of a `held.Held`.
    path : str
        Of the class.
    gpu : bool
        Whether cuML made it.
    params : dict
        Of the estimator when it was fitted.
    outcome : Outcome
        Of the fit.
    """

    def __init__(
        self, future: Any, path: str, gpu: bool, params: dict[str, Any], outcome: Outcome
    ) -> None:
        self._future = future
        self._key = future.key
        self.path = path
        self.gpu = gpu
        self.params = params
        self.worker = outcome.worker
        self.version = outcome.version
        self.names = frozenset(outcome.info.get("names", ()))
        self.cache: dict[str, Any] = dict(outcome.info.get("values", {}))
        self.home = clients.home_of(future.client)

    @property
    def key(self) -> str:
        """Key of the model's task."""
        return str(self._key)

    def client(self) -> Any:
        """Return a client of the model's scheduler.

        Raises
        ------
        BridgeError
            If the client that held the model was closed.
        """
        if self._future is None:
            return clients.find(self.home)
        client = clients.find(self.home) if clients.in_task() else self._future.client
        if client.status in ("closing", "closed"):
            raise BridgeError(f"the client that held this {self.path} was closed: fit it again")
        return client

    async def future(self, client: Any) -> Any:
        """Return the Future; take one of its own after unpickling.

        Raises
        ------
        BridgeError
            If the model is gone.
        """
        from distributed import Future

        if self._future is None or self._future.client is not client:
            holders = await client.scheduler.who_has(keys=[self._key])
            if not holders.get(self._key):
                raise BridgeError(
                    f"this {self.path} is gone from {self.home.address}: the estimator that it "
                    "was pickled from was deleted or fitted again, longer ago than "
                    "shm-bridge.cuml.keep-pickled. Keep that one, or fit this one"
                )
            future: Any = Future(self._key, client)
            if self._future is not None:
                return future  # a task's: the handle stays with its own client
            self._future = future
        return self._future

    def changed(self, params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters that are others than at the fit."""
        return {
            name: value
            for name, value in params.items()
            if name not in self.params or not same(self.params[name], value)
        }

    def __deepcopy__(self, memo: Any) -> Model:
        return self  # nothing changes it

    def __getstate__(self) -> dict[str, Any]:
        if self._future is not None and self._future.client.status == "running":
            _keep(self._future)
        return {**self.__dict__, "_future": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        clients.remember(self.home)
        # Connect when it is used; but where a client is at hand, hold the model from now on. Not on
        # an event loop: it may be the scheduler's, which unpickles graphs there and has to answer.
        if _on_event_loop():
            return
        client = clients.current()
        if _is_connected(client, self.home):
            self._future = _known(client, self._key)


def same(value: Any, default: Any) -> bool:
    """Whether a parameter has a value; false where that can't be told, as of arrays."""
    if value is default:
        return True
    if type(value) is not type(default):
        return False
    try:
        return bool(value == default) or bool(value != value and default != default)
    except Exception:  # an array
        return False


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_connected(client: Any, home: clients.Home) -> bool:
    if client is None or client.scheduler is None or client.status != "running":
        return False
    return clients.is_at(client, home)


def _known(client: Any, key: Any) -> Any:
    """Return a Future of a key that the scheduler still has, or None."""
    from distributed import Future

    async def has() -> bool:
        return bool((await client.scheduler.who_has(keys=[key])).get(key))

    return Future(key, client) if client.sync(has) else None


def _keep(future: Any) -> None:
    """Hold a model for as long as whoever gets the pickle may need to unpickle it."""
    seconds = float(parse_timedelta(config.get("cuml.keep-pickled"), default="s"))
    if not seconds:
        return
    # A client that was closed takes the timers of its loop with it.
    for number, kept in list(_kept.items()):
        if kept.client.status in ("closing", "closed"):
            _drop(number)
    number = next(_numbers)
    _kept[number] = future
    loop = future.client.loop
    loop.add_callback(loop.call_later, seconds, _drop, number)


def _drop(number: int) -> None:
    _kept.pop(number, None)  # returns nothing: the loop would wait for the Future's result


def attribute(model: Model, name: str) -> Any:
    """Return a fitted attribute, fetched once."""
    if name in model.cache:
        return model.cache[name]
    client = model.client()

    async def fetch() -> Any:
        future = await model.future(client)
        outcome = await session.attribute(client, future, model.gpu, name)
        model.cache[name] = session.received(outcome, "")
        return model.cache[name]

    return session.run(client, fetch)
