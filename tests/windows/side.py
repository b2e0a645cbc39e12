"""One side of a connection, on whatever platform: ``python -m tests.windows.side PART JSON``.

Prints lines of JSON; others are for people. A cluster lasts until its standard input ends.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import dask
import numpy as np
from distributed import Client, LocalCluster

import dask_shm_bridge

TIMEOUT_S = 60.0


def say(**what: Any) -> None:
    """Tell the test something."""
    print(json.dumps(what), flush=True)


def identity(x: Any) -> Any:
    """Return an array as it came."""
    return x


def eighth(x: Any) -> int:
    """Return one item."""
    return int(x[7])


def platform() -> str:
    """Return what this process runs on."""
    return sys.platform


@contextlib.contextmanager
def _client(address: str) -> Iterator[Client]:
    with Client(address, timeout=TIMEOUT_S, set_as_default=True) as client:
        client.wait_for_workers(1, timeout=TIMEOUT_S)
        yield client


# ---------------------------------------------------------------------------------- parts


def cluster(protocols: list[str], workers: int = 1, processes: bool = False) -> None:
    """Run a cluster for each protocol."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                LocalCluster(
                    n_workers=workers,
                    threads_per_worker=1,
                    processes=processes,
                    protocol=protocol,
                    host="127.0.0.1",
                    dashboard_address=None,
                    scheduler_kwargs={"dashboard_address": ":0"},
                    memory_limit=0,
                )
            )
            for protocol in protocols
        ]
        say(addresses=[one.scheduler_address for one in started], platform=sys.platform)
        sys.stdin.read()


def matrix(shm: str, tcp: str) -> None:
    """Send every kind of value to a worker and back, over both; tell what is not as it should be.

    Then some of them again, after `enable` has taken the second cluster into the pool.
    """
    from tests.process import values

    wrong: list[Any] = []
    unmade: set[str] = set()
    raised: set[str] = set()
    compared = 0
    names = list(values.VALUES)
    with _client(tcp) as plain, _client(shm) as client:
        far = client.submit(platform).result(TIMEOUT_S)
        figures = []
        for clients, cases in (
            ((plain, client), [(name, LARGE.get(name, 3000)) for name in names]),
            ((plain, client), [(name, 60) for name in names[::4]]),
            ((client, plain), [(name, LARGE.get(name, 3000)) for name in names[1::4]]),
        ):
            if clients[0] is client:
                dask_shm_bridge.enable(plain)
            before = dask_shm_bridge.stats(clients[1])
            for name, n in cases:
                try:
                    value = values.VALUES[name](n)
                except PermissionError:  # Windows removes no file that is mapped
                    unmade.add(name)
                    continue
                sent = _digest(values.describe(value))
                first, second = (_outcome(each, value) for each in clients)
                compared += 1
                if first[0] == "raised":
                    raised.add(name)
                if first != second and second != [sent, sent]:
                    wrong.append([name, n, first, second, sent])
            figures.append(_ways(before, dask_shm_bridge.stats(clients[1])))
        say(
            wrong=wrong,
            unmade=sorted(unmade),
            raised=sorted(raised),
            compared=compared,
            here=sys.platform,
            far=far,
            ways=figures,
            causes=sorted(dask_shm_bridge.stats()["fallbacks"]),
        )


# What takes long to make or to compare is smaller.
LARGE = dict.fromkeys(("DataFrame", "plain object", "dataclass", "python objects"), 600)


def _digest(x: Any) -> int:
    return zlib.crc32(repr(x).encode())


def seen(value: Any) -> tuple[int, Any]:
    """Return what a value is here, and the value."""
    from tests.process import values

    return _digest(values.describe(value)), value


def _outcome(client: Client, value: Any) -> list[Any]:
    """Say what a worker saw, and what came back; or that it raised, to be compared with TCP's."""
    from tests.process import values

    try:
        there, back = client.submit(seen, value, pure=False).result(TIMEOUT_S)
    except Exception as error:
        return ["raised", type(error).__name__]
    return [there, _digest(values.describe(back))]


def _ways(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Return how many bytes went which way, through the pool or not, by who saw it."""
    found: dict[str, int] = {}
    for who in ("client", "scheduler"):
        for direction in ("sent", "received"):
            for way, nbytes in after[who]["bytes"][direction].items():
                found[f"{who} {direction} {way}"] = nbytes - before[who]["bytes"][direction][way]
    for address, figures in after["workers"].items():
        for direction in ("sent", "received"):
            for way, nbytes in figures["bytes"][direction].items():
                key = f"workers {direction} {way}"
                earlier = before["workers"][address]["bytes"][direction][way]
                found[key] = found.get(key, 0) + nbytes - earlier
    return found


def moves(shm: str, nbytes: int) -> None:
    """Move an array on each route of two workers that share a pool with this process."""
    with _client(shm) as client:
        client.wait_for_workers(2, timeout=TIMEOUT_S)
        one, two = sorted(client.scheduler_info(n_workers=-1)["workers"])
        data = np.random.default_rng(0).integers(0, 1 << 62, nbytes // 8, np.int64)
        routes: dict[str, Callable[[], Any]] = {
            "submit": lambda: client.submit(identity, data, workers=one, pure=False).result(),
            "scatter": lambda: client.scatter([data], hash=False)[0].result(),
            "worker to worker": lambda: client.submit(
                identity,
                client.scatter([data], hash=False, workers=one)[0],
                workers=two,
                pure=False,
            ).result(),
        }
        report = {}
        for name, route in routes.items():
            before = dask_shm_bridge.stats(client)
            back = route()
            good = bool((back == data).all()) and back.flags.writeable
            back[0] = -1  # reaches nobody
            again = route()
            good = good and bool((again == data).all())
            report[name] = {"good": good, "ways": _ways(before, dask_shm_bridge.stats(client))}
            del back, again
            gc.collect()
        # a view that somebody has written into is sent with what was written
        view = client.scatter([data], hash=False)[0].result()
        view[7] = 42
        seen = client.submit(eighth, view, pure=False).result()
        del view
        gc.collect()
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            client.run(gc.collect)
            left = dask_shm_bridge.stats(client)["client"]["pool"]
            if not left["leases"] + left["tickets"]:
                break
            time.sleep(0.1)
        say(routes=report, written=seen, left={k: left[k] for k in ("leases", "tickets")})


def by_file(shm: str, arrays: int) -> None:
    """Exchange arrays of random sizes with a worker of the other side."""
    from tests.two_kernels import traffic

    with _client(shm) as client:
        far = client.submit(platform).result(TIMEOUT_S)
        (worker,) = client.scheduler_info(n_workers=-1)["workers"]
        before = dask_shm_bridge.stats(client)
        total = traffic.exchange(client, range(arrays), worker)
        after = dask_shm_bridge.stats(client)
        say(
            here=sys.platform,
            far=far,
            total=total,
            ways=_ways(before, after),
            modes=sorted({one["mode"] for one in after["client"]["exchange"].values()}),
            fallbacks=traffic.Moved(before, after).fallbacks,
        )


def estimators(shm: str) -> None:
    """Fit a model on a worker, from a process that has no scikit-learn."""
    import importlib.util

    from dask_shm_bridge.cuml.cluster import KMeans
    from dask_shm_bridge.cuml.decomposition import PCA
    from dask_shm_bridge.cuml.linear_model import Ridge

    random = np.random.default_rng(0)
    centres = random.normal(0, 8, (4, 6))
    y = random.integers(0, 4, 400)
    X = centres[y] + random.normal(0, 1, (400, 6))
    with _client(shm) as client:
        model = KMeans(n_clusters=4, random_state=0, n_init=2)
        parameters = model.get_params()
        labels = model.fit(X).predict(X)
        pairs = {(int(a), int(b)) for a, b in zip(labels, y, strict=True)}
        reduced = PCA(n_components=2).fit_transform(X)
        ridge = Ridge().fit(X, X @ np.arange(6.0))
        say(
            here=sys.platform,
            far=client.submit(platform).result(TIMEOUT_S),
            sklearn=importlib.util.find_spec("sklearn") is not None,
            n_clusters=parameters["n_clusters"],
            one_to_one=len(pairs) == 4,
            reduced=[type(reduced).__name__, list(reduced.shape)],
            error=float(np.abs(ridge.predict(X) - X @ np.arange(6.0)).max()),
        )


def member(nbytes: int) -> None:
    """Hold a view of an extent until the standard input ends."""
    from dask_shm_bridge import store
    from dask_shm_bridge.shipment import Frame

    joined = store.attach()
    connection = joined.connect()
    assert connection is not None
    data = np.arange(nbytes // 8)
    joined.ship(connection, [Frame(0, 1, memoryview(data).cast("B"), nbytes)], "input")
    (view,) = joined.receive(connection, [1]).buffers
    say(members=len(joined.ledger.members()), right=bytes(view) == data.tobytes())
    sys.stdin.read()
    del view
    gc.collect()
    joined.disconnect(connection)
    joined.settle()
    store.detach_all()


def look(sweeping: bool) -> None:
    """Look at the pool from outside, as `dask shm check` and `dask shm sweep` do."""
    from dask_shm_bridge.config import Settings
    from dask_shm_bridge.recovery.survey import survey
    from dask_shm_bridge.recovery.sweeping import sweep

    path = Settings.from_config().path
    gone: list[str] = []
    if sweeping:
        swept = sweep(path, 5.0)
        gone, seen = [*swept.members, *swept.pools], swept.after
        assert not swept.refused, swept.refused
    else:
        seen = survey(path, 5.0)
    say(
        alive=sorted(str(each.alive) for pool in seen.pools for each in pool.members),
        held=sum(each.held_bytes for pool in seen.pools for each in pool.members),
        found=[found.kind for found in seen.all_findings()],
        gone=len(gone),
    )


def main(part: str, options: str) -> None:
    """Run a part with options in JSON."""
    quiet = {
        "distributed.client.scheduler-info-interval": "1h",  # as in tests.process.deployment
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": "60s",
        "distributed.admin.large-graph-warning-threshold": "1 TiB",
    }
    with dask.config.set(quiet):
        {f.__name__: f for f in PARTS}[part](**json.loads(options))


PARTS = (cluster, matrix, moves, by_file, estimators, member, look)

if __name__ == "__main__":
    from tests.windows import side  # so that its functions are pickled by their names

    side.main(*sys.argv[1:])
