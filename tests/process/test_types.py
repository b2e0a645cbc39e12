"""Every kind of value arrives as it was sent, and in no way unlike it does over plain TCP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from distributed import Client

from . import values
from .deployment import Deployment, measured
from .tasks import identity

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass is not")  # NumPy's

THRESHOLD = 4096
SMALL, LARGE = 60, 16_000  # items of 8 bytes or so
LARGE_OTHERS = 1_200  # of what takes long to compare


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "1 GiB", "threshold": THRESHOLD}


@pytest.fixture(scope="module")
def plain(
    pool_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """Start the same cluster over TCP."""
    folder = tmp_path_factory.mktemp("tcp")
    with (
        Deployment(folder, pool_config, protocol="tcp") as deployment,
        deployment.client() as client,
    ):
        yield client


Route = Callable[[Client, Any, list[str]], Any]


def submitted(client: Client, value: Any, workers: list[str]) -> Any:
    return client.submit(identity, value, pure=False, workers=workers[0]).result()


def seen_by_the_task(client: Client, value: Any, workers: list[str]) -> Any:
    return client.submit(values.describe, value, pure=False, workers=workers[0]).result()


def in_a_nested_argument(client: Client, value: Any, workers: list[str]) -> Any:
    future = client.submit(identity, {"a": [value]}, pure=False, workers=workers[0])
    return future.result()["a"][0]


def scattered(client: Client, value: Any, workers: list[str]) -> Any:
    return client.scatter([value], hash=False)[0].result()


def scattered_and_gathered_directly(client: Client, value: Any, workers: list[str]) -> Any:
    future = client.scatter([value], hash=False, direct=True)[0]
    return client.gather(future, direct=True)


def from_worker_to_worker(client: Client, value: Any, workers: list[str]) -> Any:
    here = client.scatter([value], hash=False, workers=workers[0])[0]
    there = client.submit(identity, here, workers=workers[1], pure=False)
    return there.result()


def seen_on_the_second_worker(client: Client, value: Any, workers: list[str]) -> Any:
    here = client.scatter([value], hash=False, workers=workers[0])[0]
    return client.submit(values.describe, here, workers=workers[1], pure=False).result()


def around_twice(client: Client, value: Any, workers: list[str]) -> Any:
    return scattered(client, submitted(client, value, workers), workers[::-1])


ROUTES: list[Route] = [
    submitted,
    seen_by_the_task,
    in_a_nested_argument,
    scattered,
    scattered_and_gathered_directly,
    from_worker_to_worker,
    seen_on_the_second_worker,
    around_twice,
]


def outcome(client: Client, route: Route, value: Any, workers: list[str]) -> Any:
    """Describe what comes out of a route, which may be an error."""
    try:
        result = route(client, value, workers)
    except Exception as error:  # to be compared with TCP's
        return "raised", type(error).__name__
    return result if route.__name__.startswith("seen") else values.describe(result)


@pytest.fixture(scope="module")
def both(client: Client, plain: Client) -> list[tuple[Client, list[str]]]:
    """Clients over TCP and over the pool, and the addresses of their workers."""
    return [(c, sorted(c.scheduler_info(n_workers=-1)["workers"])) for c in (plain, client)]


@pytest.mark.parametrize("name", values.VALUES)
def test_as_over_tcp(both: list[tuple[Client, list[str]]], name: str) -> None:
    small = values.VALUES[name](SMALL)
    simple = isinstance(small, np.ndarray) and not small.dtype.hasobject
    large = values.VALUES[name](LARGE if simple else LARGE_OTHERS)
    for value, routes in ((small, ROUTES[::3]), (large, ROUTES)):
        for route in routes:
            over_tcp, over_shm = (outcome(c, route, value, workers) for c, workers in both)
            if over_shm != over_tcp and over_shm == values.describe(value):
                # Exactly what was sent, where TCP raises (a strided memoryview) or drops flags:
                # its scheduler asks for pickle protocol 4, which forgets what was read-only.
                continue
            assert over_shm == over_tcp, route.__name__


def of_one_buffer(name: str) -> bool:
    """Say whether a value is an array that Dask sends as it is: not a part of it, not pickled."""
    value = values.VALUES[name](SMALL)
    return (
        isinstance(value, np.ndarray)
        and value.nbytes >= SMALL
        and not isinstance(value, values.Tagged)
        and not value.dtype.hasobject
        and value.dtype.kind != "T"
        and 0 not in value.strides
    )


@pytest.mark.parametrize("name", [*filter(of_one_buffer, values.VALUES)])
def test_through_the_pool(client: Client, workers: list[str], name: str) -> None:
    value = values.VALUES[name](LARGE)
    with measured(client) as delta:
        result = scattered(client, value, workers)
    assert delta().at("client", "sent", "copied", messages=True) >= value.nbytes, delta()
    assert delta().at("client", "received", "viewed", messages=True) >= value.nbytes, delta()
    assert delta().inline < 20_000, delta()
    assert result.flags.aligned
    assert not result.flags.owndata
