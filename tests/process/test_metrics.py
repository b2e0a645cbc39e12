"""What schedulers and workers show Prometheus is what `stats` says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import dask
import msgpack
import numpy as np
import pytest
from conftest import eventually
from distributed import Client, LocalCluster

import dask_shm_bridge
from dask_shm_bridge import counters, figures, metrics, store
from scheduler_plugin.reports import Reports

from . import tasks
from .deployment import MiB, run, usage

prometheus_client = pytest.importorskip("prometheus_client")

DOCS = Path(__file__).resolve().parents[2] / "docs"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    """Return this package's samples; none may be there twice."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name.startswith("dask_shm_"):
                key = (name.removeprefix("dask_shm_"), frozenset(labels.items()))
                assert key not in found, key
                found[key] = value
    return found


def scraped(port: int) -> Samples:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return parsed(answer.read().decode())


def value(found: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples that have these labels."""
    return sum(
        number for (one, its), number in found.items() if one == name and set(labels.items()) <= its
    )


@pytest.fixture(scope="module")
def ports(client: Client) -> dict[str, int]:
    """Port of each server's HTTP, by its address."""
    info = client.scheduler_info(n_workers=-1)
    found = {address: one["services"]["dashboard"] for address, one in info["workers"].items()}
    return {info["address"]: info["services"]["dashboard"], **found}


def everywhere(client: Client, ports: dict[str, int]) -> dict[tuple[str, str], Samples]:
    """Scrape all servers; return what they show by role and address."""
    scheduler = client.scheduler.address
    found: dict[tuple[str, str], Samples] = {}
    for address, port in ports.items():
        for (name, labels), number in scraped(port).items():
            label = dict(labels)
            who = label.pop("role"), label.pop("address")
            assert who[1] == address or (who[0] == "client" and address == scheduler)
            found.setdefault(who, {})[name, frozenset(label.items())] = number
    return found


def flat(one: dict[str, Any]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return a process's `stats` as the counters that Prometheus has of them."""
    found = {}
    for direction in ("sent", "received"):
        for what in ("bytes", "frames"):
            for way, number in one[what][direction].items():
                found[f"{direction}_{what}_total", frozenset({("way", way)})] = number
    for cause, frames in one["fallbacks"].items():
        found["fallback_frames_total", frozenset({("cause", cause)})] = frames
    return found


def pairs(
    client: Client, stats: dict[str, Any], shown: dict[tuple[str, str], Samples]
) -> Iterator[tuple[str, Any, float, Samples]]:
    """Yield who, the sample's key and what `stats` says, and what that process shows."""
    who = {("scheduler", client.scheduler.address): stats["scheduler"]}
    who[("client", client.id)] = stats["client"]
    who.update({("worker", address): one for address, one in stats["workers"].items()})
    for key, one in who.items():
        for sample, number in flat(one).items():
            yield key[0], sample, number, shown[key]


def traffic(client: Client, workers: list[str], rounds: int = 3) -> None:
    for number in range(rounds):
        x = tasks.numbers(MiB, number)
        there = client.submit(tasks.fresh, x, pure=False, workers=[workers[0]])
        again = client.submit(tasks.fresh, there, pure=False, workers=[workers[1]])
        np.testing.assert_array_equal(again.result(), x + 2)


@pytest.mark.threshold
def test_metrics_equal_stats_after_traffic(
    client: Client, workers: list[str], ports: dict[str, int]
) -> None:
    traffic(client, workers)
    usage(ticket=0, extent=0)
    stats = dask_shm_bridge.stats(client)
    shown = everywhere(client, ports)
    compared = 0
    for who, (name, labels), number, found in pairs(client, stats, shown):
        inline = ("way", "inline") in labels
        if not inline:  # asking for figures is a message too, and a heartbeat
            assert found[name, labels] == number, (who, name, labels)
            compared += number > 0
        else:
            assert found[name, labels] >= number, (who, name, labels)
    assert compared >= 8
    joined = store.attached()
    assert joined is not None
    for (role, _), found in shown.items():
        regions = {
            region: found["pool_size_bytes", frozenset({("pool", joined.id), ("region", region)})]
            for region in (stats["scheduler"]["pool"]["regions"] if role != "client" else ())
        }
        for region, size in regions.items():
            assert size == stats["scheduler"]["pool"]["regions"][region]["size_bytes"]
    members = ("pool_rows", frozenset({("pool", joined.id), ("table", "members")}))
    assert shown["scheduler", client.scheduler.address][members] == 4


def test_metrics_lie_between_stats_while_traffic_runs(
    client: Client, workers: list[str], ports: dict[str, int]
) -> None:
    stop = threading.Event()

    def run_on() -> None:
        while not stop.is_set():
            traffic(client, workers, 1)

    thread = threading.Thread(target=run_on)
    thread.start()
    try:
        grew = 0
        for _ in range(3):
            before = dask_shm_bridge.stats(client)
            shown = everywhere(client, ports)
            after = dask_shm_bridge.stats(client)
            for who, key, number, found in pairs(client, before, shown):
                assert number <= found[key], (who, key)
            for who, key, number, found in pairs(client, after, shown):
                # a cause that came up since has no sample yet
                assert found.get(key, 0) <= number, (who, key)
                grew += found.get(key, 0) < number
    finally:
        stop.set()
        thread.join(60)
    assert grew  # there was traffic to look at


@pytest.mark.threshold
def test_times_count_each_message_that_went_through_the_pool(
    client: Client, workers: list[str], ports: dict[str, int]
) -> None:
    before = dask_shm_bridge.stats(client)["client"]
    then = everywhere(client, ports)["client", client.id]
    x = tasks.numbers(MiB, 5)
    futures = [client.scatter(x + n, workers=[workers[0]]) for n in range(4)]
    del futures
    after = dask_shm_bridge.stats(client)["client"]
    now = everywhere(client, ports)["client", client.id]
    size = str(1 << MiB.bit_length())
    grown = {
        name: value(now, name, direction="sent", size=size)
        - value(then, name, direction="sent", size=size)
        for name in ("transfers_total", "transfer_bytes_total", "transfer_seconds_total")
    }
    assert grown["transfers_total"] == 4
    sent = after["bytes"]["sent"]["copied"] - before["bytes"]["sent"]["copied"]
    assert grown["transfer_bytes_total"] == sent == 4 * MiB
    assert 0 < grown["transfer_seconds_total"] < 60


def told(client: Client) -> dict[str, Any]:
    """Return when the scheduler was told of clients, and what."""

    def look(dask_scheduler: Any = None) -> dict[str, Any]:
        reports = dask_scheduler.plugins["shm-bridge"].reports
        return {name: (one.stamp, one.figures) for name, one in reports.clients.items()}

    return client.run_on_scheduler(look)


@pytest.mark.threshold  # to tell it moves more
def test_a_client_tells_what_it_moved_without_being_asked(
    deployment: Any, workers: list[str]
) -> None:
    with deployment.client() as other:
        x = tasks.numbers(MiB, 9)
        future = other.scatter(x, workers=[workers[0]])
        want = counters.snapshot()["bytes"]["sent"]["copied"]
        assert want
        assert eventually(
            lambda: (
                told(other).get(other.id, (0, {"bytes": {"sent": {"copied": -1}}}))[1]["bytes"][
                    "sent"
                ]["copied"]
                == want
            )
        )
        del future
        name = other.id
    with deployment.client() as other:
        assert eventually(lambda: name not in told(other))


@pytest.mark.threshold
def test_an_idle_client_tells_nothing(deployment: Any) -> None:
    with deployment.client() as other:
        teller = figures.Teller(other)

        def tell_twice(delay_s: float) -> list[Any]:
            async def go() -> list[Any]:
                seen = []
                await teller.tell()
                for _ in range(3):
                    first = teller._told
                    await teller.tell()
                    seen.append(teller._told is first)
                return seen

            return other.sync(go)

        assert eventually(lambda: tell_twice(0) == [True, True, True])
        assert teller._told is not None


def test_figures_are_plain_small_and_without_the_ledger(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = store.attached()
    assert joined is not None

    def forbidden(*args: Any) -> None:
        raise AssertionError("a transaction")

    monkeypatch.setattr(joined.ledger.record, "_take", forbidden)
    packed = msgpack.packb(figures.figures())
    assert len(packed) < 2500
    assert msgpack.unpackb(packed, strict_map_key=False) == figures.figures()


def test_the_heartbeat_carries_them(client: Client, workers: list[str]) -> None:
    def look(dask_scheduler: Any = None) -> list[Any]:
        return [ws.metrics.get("shm-bridge") for ws in dask_scheduler.workers.values()]

    assert eventually(lambda: all(client.run_on_scheduler(look)))
    found = client.run_on_scheduler(look)
    assert len({one["process"] for one in found}) == len(workers) == 2
    joined = store.attached()
    assert joined is not None
    assert {one["member"] for one in found} < {one.id for one in joined.ledger.members()}


@pytest.mark.parametrize(
    "trash",
    [
        {},
        {"process": "x"},
        {"process": ["x"], "bytes": 1},
        {**figures.figures(), "process": "y", "times": {"sent": [[1]]}},
        {**figures.figures(), "process": "z", "fallbacks": {"full": "many"}},
        {**figures.figures(), "process": "w", "bytes": {"sent": {"copied": "1"}}},
    ],
)
def test_figures_that_are_none_do_no_harm(
    client: Client, ports: dict[str, int], trash: dict[str, Any]
) -> None:
    async def tell(figures: Any, name: str) -> Any:
        number = 1 << 40  # newer than all that this client tells by itself meanwhile
        return await client.scheduler.shm_bridge_figures(
            client=name, figures=figures, number=number
        )

    assert client.sync(tell, trash, "nobody") == "unknown client"
    assert client.sync(tell, [1], client.id) == "no figures"
    assert client.sync(tell, trash, client.id) == "OK"
    found = scraped(ports[client.scheduler.address])
    assert value(found, "connections", role="scheduler") > 0

    def look(dask_scheduler: Any = None) -> Any:
        from scheduler_plugin.dashboard import sampler

        reports = dask_scheduler.plugins["shm-bridge"].reports.all()
        sound = [one for one in reports if sampler._is_sound(one)]
        return [one.role for one in sound], sampler.add_up(sound)["connections"]

    roles, connections = client.run_on_scheduler(look)
    assert roles == ["scheduler", "worker", "worker"]
    assert connections["shared"] > 0

    def forget(dask_scheduler: Any = None) -> None:
        dask_scheduler.plugins["shm-bridge"].reports.clients.clear()

    client.run_on_scheduler(forget)


def test_one_collector_for_all_servers_of_a_process() -> None:
    options = {"processes": False, "protocol": "shm", "dashboard_address": None}
    with (
        LocalCluster(n_workers=2, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        servers = [cluster.scheduler, *cluster.workers.values()]
        assert eventually(lambda: all("shm-bridge" in one.metrics for one in servers[1:]))
        traffic(client, sorted(one.address for one in servers[1:]), 1)
        for server in servers:
            before = counters.snapshot()["bytes"]["sent"]["copied"]
            found = scraped(server.http_server.port)
            after = counters.snapshot()["bytes"]["sent"]["copied"]  # heartbeats, at 1 byte
            owners = {(dict(labels)["role"], dict(labels)["address"]) for _, labels in found}
            assert owners == {("scheduler", cluster.scheduler.address)}
            assert 0 < before <= value(found, "sent_bytes_total", way="copied") <= after


def test_without_prometheus_client(pool_config: dict[str, Any]) -> None:
    code = """
import sys
sys.modules["prometheus_client"] = None
import logging
logging.basicConfig(level="INFO")
logging.getLogger("dask_shm_bridge").setLevel("DEBUG")
from distributed import Client, LocalCluster
if __name__ == "__main__":
    options = {"processes": False, "protocol": "shm", "dashboard_address": None}
    with LocalCluster(n_workers=1, **options) as cluster, Client(cluster) as client:
        print(client.submit(lambda: 5).result())
        from urllib.request import urlopen
        port = cluster.scheduler.http_server.port
        print(urlopen(f"http://127.0.0.1:{port}/metrics").read().decode())
"""
    said = run(code, config=pool_config)
    assert said.startswith("5\n")
    assert "not available" in said


def test_the_namespace_is_dasks() -> None:
    with dask.config.set({"distributed.dashboard.prometheus.namespace": "other"}):
        names = {family.name for family in metrics.Collector().describe()}
    assert names == {f"other_shm_{name}" for name in metrics.FAMILIES}


def test_what_is_documented_is_what_is_there() -> None:
    rows = re.findall(
        r"^\| `dask_shm_(\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$",
        (DOCS / "metrics.md").read_text(),
        re.MULTILINE,
    )
    documented = {
        name.removesuffix("_total"): (
            kind,
            tuple(re.findall(r"`(\w+)`", labels)),
            text.strip(),
        )
        for name, kind, labels, text in rows
    }
    assert documented == {
        name: (family.kind, family.labels, family.text) for name, family in metrics.FAMILIES.items()
    }
    assert all(name.endswith("_total") == (kind == "counter") for name, kind, *_ in rows)


def test_the_grafana_dashboard_asks_for_metrics_and_labels_that_are_there() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    asked: set[str] = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for name, labels in re.findall(r"dask_shm_(\w+)(?:\{([^}]*)\})?", expression):
                family = metrics.FAMILIES[name.removesuffix("_total")]
                assert name.endswith("_total") == (family.kind == "counter"), name
                known = {"role", "address", "instance", "job", *family.labels}
                assert set(re.findall(r"(\w+)\s*[=!]", labels)) <= known, expression
                for by in re.findall(r"by \(([^)]*)\)", expression):
                    assert set(re.split(r",\s*", by)) <= known | {"le"}, expression
                asked.add(name.removesuffix("_total"))
    assert asked == set(metrics.FAMILIES)


def test_reports_have_one_for_each_process() -> None:
    class Worker:
        def __init__(self, address: str, found: Any) -> None:
            self.address, self.metrics, self.last_seen = address, found, 1.0

    class Scheduler:
        def __init__(self) -> None:
            self.address = "shm://s"
            self.clients = {"a": 1, "b": 2, "c": 3}
            self.workers: dict[str, Any] = {}

    own = figures.figures()
    there = {**own, "process": "there"}
    scheduler = Scheduler()
    scheduler.workers = {
        "w1": Worker("w1", {"shm-bridge": there}),
        "w2": Worker("w2", {"shm-bridge": there}),
        "w3": Worker("w3", {}),
        "w4": Worker("w4", {"shm-bridge": own}),
    }
    reports = Reports(scheduler)
    assert reports.client_told("a", own) == "OK"  # a client in the scheduler's process
    assert reports.client_told("b", {**own, "process": "b"}, 1.0) == "OK"
    assert reports.client_told("c", {**own, "process": "b"}) == "OK"  # two clients of one process
    assert reports.client_told("b", {**own, "process": "old"}, 1.0, 3) == "OK"
    assert reports.client_told("b", {**own, "process": "b"}, 1.0, 4) == "OK"
    assert reports.client_told("b", {**own, "process": "old"}, 1.0, 2) == "OK"  # overtaken
    found = [(one.role, one.address) for one in reports.all()]
    assert found == [("scheduler", "shm://s"), ("worker", "w1"), ("client", "b")]
