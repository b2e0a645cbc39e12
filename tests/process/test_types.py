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

THRESHOLD = 4096
SMALL, LARGE = 60, 16_000  # items of 8 bytes or so
LARGE_OTHERS = 2_000  # of what takes long to compare


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


def addresses(client: Client) -> list[str]:
    return sorted(client.scheduler_info(n_workers=-1)["workers"])


@pytest.mark.parametrize("name", values.VALUES)
def test_as_over_tcp(client: Client, plain: Client, name: str) -> None:
    make = values.VALUES[name]
    large = LARGE if isinstance(make(SMALL), np.ndarray) else LARGE_OTHERS
    for n in (SMALL, large):
        value = make(n)
        for route in ROUTES:
            over_tcp = outcome(plain, route, value, addresses(plain))
            over_shm = outcome(client, route, value, addresses(client))
            if over_tcp[0] == "raised" != over_shm[0]:
                over_tcp = values.describe(value)  # what TCP can't carry may arrive
            assert over_shm == over_tcp, (n, route.__name__)


@pytest.mark.parametrize("name", values.VALUES)
def test_through_the_pool(client: Client, name: str) -> None:
    value = values.VALUES[name](LARGE)
    nbytes = getattr(value, "nbytes", 0)
    if not isinstance(value, np.ndarray) or nbytes < 2 * THRESHOLD or value.dtype.hasobject:
        pytest.skip("not an array of one buffer")
    if 0 in value.strides or isinstance(value, values.Tagged):
        pytest.skip("Dask sends a part of it, or pickles it")
    with measured(client) as delta:
        result = scattered(client, value, addresses(client))
    assert delta().at("client", "sent", "copied") >= nbytes, delta()
    assert delta().at("client", "received", "viewed") >= nbytes, delta()
    assert delta().inline < max(40_000, nbytes // 2), delta()
    assert result.flags.aligned
    assert not result.flags.owndata
