"""Sends calls to a worker and waits for them: the client's half, apart from classes."""

from __future__ import annotations

import asyncio
import contextlib
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from dask_shm_bridge import config, counters
from dask_shm_bridge.cuml import clients, warned
from dask_shm_bridge.cuml import worker as tasks
from dask_shm_bridge.cuml.outcome import Outcome, held_here
from dask_shm_bridge.cuml.packing import LARGE_BYTES, Arguments, Packed
from dask_shm_bridge.errors import BridgeError

# Says on which workers a task may run, never how many: a task may wait for another of its kind.
GPU_SHARE = {"GPU": 2**-20}


def run(client: Any, function: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine function for a call of the user's, with the time limit of `clients.options`.

    Returns its result, or for an asynchronous client an awaitable of it. Past the time limit, or
    at Ctrl-C, the coroutine is cancelled, and with it the tasks that it waits for.
    """
    limit = clients.timeout()

    async def limited() -> Any:
        try:
            async with asyncio.timeout(limit) as timer:
                return await function()
        except TimeoutError:
            if not timer.expired():  # the call's own
                raise
            raise TimeoutError(
                f"not done after {limit:g} s; the remote task was cancelled"
            ) from None

    if client.asynchronous:
        return limited()

    async def quiet() -> Any:
        try:
            return await limited()
        except asyncio.CancelledError:  # by Ctrl-C, which the user sees as what it is
            raise BridgeError("the call was cancelled") from None

    with clients.seceded():
        return client.sync(quiet)


def task(name: str, gpu: bool) -> Callable[..., Any]:
    """Return a function of `worker`, marked for placement where it needs the GPU."""
    return tasks.OnGpu(name) if gpu else getattr(tasks, name)


def submit(client: Any, name: str, gpu: bool, label: str, *args: Any) -> Any:
    """Submit a task of `worker`, to GPU workers only if it needs one."""
    return client.submit(
        task(name, gpu),
        *args,
        key=f"{label}-{name}-{uuid.uuid4().hex}",
        pure=False,
        resources=GPU_SHARE if gpu else None,
    )


def _any(worker: dict[str, Any]) -> bool:
    return True


def _running(worker: dict[str, Any]) -> bool:
    return bool(worker.get("status") == "running")  # neither paused nor about to leave


async def identity(
    client: Any, ready: Callable[[dict[str, Any]], bool] = _any
) -> dict[str, dict[str, Any]]:
    """Return the scheduler's workers by address that are `ready`, once there is one."""
    wanted = None
    try:
        while True:
            workers = (await client.scheduler.identity(n_workers=-1))["workers"]
            found = {address: worker for address, worker in workers.items() if ready(worker)}
            if found:
                return found
            if wanted is None:  # a cluster that adapts to its work starts no worker without any
                wanted = client.submit(int, pure=False)
            await asyncio.sleep(0.1)
    finally:
        if wanted is not None:
            wanted.release()


async def has_gpu(client: Any, path: str, counterpart: bool) -> bool:
    """Whether a worker has a GPU.

    Raises
    ------
    BridgeError
        If none has, and ``shm-bridge.cuml.fallback`` is false or there is nothing else to run.
    """
    workers = await identity(client)
    if any(w.get("resources", {}).get("GPU", 0) > 0 for w in workers.values()):
        return True
    if not config.get("cuml.fallback"):
        raise BridgeError(
            f"{path} needs a GPU, and no worker has the resource GPU: start one with "
            "--resources GPU=1, or set shm-bridge.cuml.fallback to true"
        )
    if not counterpart:
        raise BridgeError(
            f"{path} needs a GPU, and no worker has the resource GPU: scikit-learn has no "
            "counterpart that a CPU worker could run. Start a worker with --resources GPU=1"
        )
    counters.fallback("no-gpu-worker")
    counters.explain(
        "no-gpu-worker",
        f"no worker has a GPU: {path} and the like run as scikit-learn's on a CPU worker",
    )
    return False


async def ship(
    client: Any, recipe: Any, arguments: Arguments, worker: str | None, goes_on: bool = False
) -> list[Any]:
    """Scatter what is large, and return the packed recipe and all other arguments of the task.

    A task's definition lives as long as its result. If it held the data, a model would keep its
    training data in the scheduler. A model that goes on from another would keep the definitions of
    all before it too, each with its batch: there the recipe is scattered whatever its size. What
    can't be computed again is forgotten, as scattered data can't.
    """
    values = [Packed(recipe), *arguments.values]
    for index, model in arguments.models.items():
        values[index + 1] = await model.future(client)
    large = [index + 1 for index in arguments.large]
    if goes_on or len(values[0].data) >= LARGE_BYTES:
        large.append(0)
    if large:
        workers = await identity(client, _running)
        # All to one worker: the call needs them in one place.
        chosen = worker if worker in workers else random.choice(_suitable(workers, recipe.gpu))
        sent = await client.scatter(
            [values[index] for index in large], workers=[chosen], hash=False, asynchronous=True
        )
        for index, future in zip(large, sent, strict=True):
            values[index] = future
    return values


def _suitable(workers: dict[str, Any], gpu: bool) -> list[str]:
    with_gpu = [a for a, w in workers.items() if w.get("resources", {}).get("GPU", 0) > 0]
    return with_gpu if gpu and with_gpu else list(workers)


@contextlib.asynccontextmanager
async def owned(client: Any, arguments: Arguments | None = None) -> AsyncIterator[list[Any]]:
    """Yield a list for a call's Futures; they are cancelled if the call is given up.

    Raises
    ------
    BridgeError
        If what the tasks need is lost.
    """
    from distributed.client import FutureCancelledError, FuturesCancelledError

    futures: list[Any] = []
    # Never cancelled, for their keys may be those of Futures of the user's: dask names blocks.
    started = arguments.started if arguments is not None else []
    try:
        yield futures
    except asyncio.CancelledError:
        for future in started:
            future.release()
        with contextlib.suppress(Exception):
            await client.cancel(futures, asynchronous=True, force=True)
        raise
    except BaseException as error:
        # The client keeps the error of each living Future, the error its traceback, and that the
        # frames with these Futures and with the estimator: nothing of it would ever be freed.
        for future in (*futures, *started):
            future.release()
        if isinstance(error, (FutureCancelledError, FuturesCancelledError)):
            raise BridgeError(
                "the model, or the data of this call, was lost with its worker, or was cancelled: "
                f"fit the estimator again ({error})"
            ) from None
        raise


async def result_of(client: Any, future: Any) -> Any:
    """Wait for the result of a call's only task."""
    async with owned(client) as futures:
        futures.append(future)
        (result,) = await client.gather([future], asynchronous=True)
        return result


def received(result: Outcome, version: str) -> Any:
    """Return an outcome's value, once its warnings and conversions are said again here."""
    for library in result.converted:
        counters.explain(
            f"no-{library}",
            f"{library} is not installed here: its results come as NumPy or pandas",
        )
    if result.version is not None and version not in ("", result.version):
        counters.explain(
            "cuml-version",
            f"the worker has cuML {result.version}, and this catalogue describes {version}: "
            "parameters and defaults may differ (shm-bridge.cuml.catalogue names another)",
        )
    warned.say_again(result.warned, stacklevel=2)
    return result.value


async def fit(
    client: Any, recipe: Any, arguments: Arguments, old: Any, worker: str | None
) -> tuple[Any, Outcome, Any]:
    """Fit a model; return its Future, what came of it, and a Future of what the method gave.

    The last is None unless the recipe says that the result stays.
    """
    label = recipe.path.rpartition(".")[2]
    async with owned(client, arguments) as futures:
        packed, *values = await ship(client, recipe, arguments, worker, goes_on=old is not None)
        pair = submit(client, "fit", recipe.gpu, label, packed, old, *values)
        model = submit(client, "model_of", recipe.gpu, label, pair)
        told = "summary_of" if recipe.stays else "outcome_of"
        summary = submit(client, told, recipe.gpu, label, pair, *([recipe.holds] * recipe.stays))
        futures += [pair, model, summary]
        value = None
        if recipe.stays:
            value = submit(client, "value_of", recipe.gpu, label, pair)
            futures.append(value)
        (result,) = await client.gather([summary], asynchronous=True)
        await _finished(client, model)
    return model, result, value


async def _finished(client: Any, future: Any) -> None:
    """Wait for a task whose result stays: whoever unpickles its key asks the scheduler for it."""
    from distributed import wait

    with client.as_current():
        waiting = wait([future])
    await waiting


async def call(
    client: Any, recipe: Any, arguments: Arguments, model: Any, worker: str | None
) -> Outcome:
    """Call a method or function, and return its outcome."""
    label = recipe.path.rpartition(".")[2]
    async with owned(client, arguments) as futures:
        packed, *values = await ship(client, recipe, arguments, worker)
        future = submit(client, "call", recipe.gpu, label, packed, model, *values)
        futures.append(future)
        (result,) = await client.gather([future], asynchronous=True)
    return result  # type: ignore[no-any-return]


async def later(
    client: Any, recipe: Any, arguments: Arguments, model: Any, worker: str | None
) -> Any:
    """Call a method or function whose result stays; return a Future of the value."""
    label = recipe.path.rpartition(".")[2]
    async with owned(client, arguments):
        packed, *values = await ship(client, recipe, arguments, worker)
        future = submit(client, "call", recipe.gpu, label, packed, model, *values)
        return submit(client, "value_of", recipe.gpu, label, future)


async def attribute(client: Any, model: Any, gpu: bool, name: str) -> Outcome:
    """Fetch a fitted attribute."""
    future = submit(client, "attribute", gpu, "model", model, name, held_here())
    return await result_of(client, future)  # type: ignore[no-any-return]


async def describe(client: Any, path: str) -> dict[str, Any]:
    """Let a GPU worker describe what cuML has under a name."""
    if not (await client.scheduler.identity(n_workers=-1))["workers"]:
        raise BridgeError("there is no worker that could describe it")  # a misspelt name won't wait
    await has_gpu(client, path, counterpart=False)
    future = submit(client, "describe_path", True, "cuml", path)
    return await result_of(client, future)  # type: ignore[no-any-return]
