"""The page on Dask's dashboard: where it is, what it shows, in a real browser too."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from conftest import eventually
from distributed import Client
from tornado.ioloop import IOLoop

import dask_shm_bridge
from dask_shm_bridge import figures, store
from dask_shm_bridge.errors import LedgerBusyError
from dask_shm_bridge.layout import GRAIN_BYTES, Layout
from scheduler_plugin import dashboard
from scheduler_plugin.dashboard import sampler
from scheduler_plugin.reports import Report

from . import tasks
from .browser import SIZES, chromium, column, complaints, fit, members, proxy, title
from .deployment import Deployment, MiB

pytest.importorskip("bokeh")

DASHBOARD = ("--dashboard", "--dashboard-address", "127.0.0.1:0")
PAGES = ["shm-pool", "individual-shm-pool", "individual-shm-transfers"]


@pytest.fixture(scope="module")
def pool_options() -> dict[str, Any]:
    return {"pool_size": "64 MiB", "pool_slot_size": "4 MiB"}


@pytest.fixture(scope="module")
def deployment_options() -> dict[str, Any]:
    return {"scheduler_args": DASHBOARD}


def port_of(client: Client) -> int:
    port: int = client.scheduler_info(n_workers=-1)["services"]["dashboard"]
    return port


def get(port: int, path: str) -> str:
    with urlopen(f"http://127.0.0.1:{port}/{path}", timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def is_offered(port: int, prefix: str = "") -> None:
    """See that the page and its plots are served, and named once each."""
    for page in PAGES:
        assert "Bokeh" in get(port, prefix + page)
    for page in ("status", "shm-pool"):
        html = get(port, prefix + page)
        assert html.count('<a href="shm-pool">Shm-Pool</a>') == 1
        for plot in PAGES[1:]:
            assert html.count(f'href="{plot}"') == 1
    plots = json.loads(get(port, prefix + "individual-plots.json"))
    assert plots["Individual Shm Pool"] == "/individual-shm-pool"
    assert plots["Individual Shm Transfers"] == "/individual-shm-transfers"
    assert plots["Individual Progress"] == "/individual-progress"


def is_running(client: Client) -> bool:
    def look(dask_scheduler: Any = None) -> bool:
        from scheduler_plugin.dashboard import sampler

        return sampler.of(dask_scheduler).running

    running: bool = client.run_on_scheduler(look)
    return running


# ----------------------------------------------------------------------------------- where it is


def test_nothing_looks_while_nobody_does(deployment: Deployment) -> None:
    with deployment.client() as client:

        def modules(dask_scheduler: Any = None) -> bool:
            import sys

            return "scheduler_plugin.dashboard.page" in sys.modules

        assert not client.run_on_scheduler(modules)
        assert not is_running(client)


def test_shm_alone_offers_the_page(client: Client) -> None:
    is_offered(port_of(client))


def test_it_is_offered_once_however_often_it_is_asked_for(client: Client) -> None:
    for _ in range(2):
        dask_shm_bridge.enable(client)

    def again(dask_scheduler: Any = None) -> Any:
        from bokeh.server.tornado import BokehTornado

        from scheduler_plugin import dashboard

        done = dashboard.add(dask_scheduler)
        found = dask_scheduler.http_application.applications
        return done, sum(isinstance(one, BokehTornado) for one in found)

    assert client.run_on_scheduler(again) == (True, 2)
    is_offered(port_of(client))


def test_it_stops_looking_when_the_page_is_closed(client: Client) -> None:
    def asked(dask_scheduler: Any = None) -> Any:
        from scheduler_plugin.dashboard import sampler

        return sampler.of(dask_scheduler)._asked

    before = client.run_on_scheduler(asked)
    get(port_of(client), "shm-pool")  # a session that nobody connects to
    assert client.run_on_scheduler(asked) > before
    assert eventually(lambda: not is_running(client), 90)  # Bokeh keeps it for half a minute


def test_the_preload_offers_it_before_the_scheduler_starts(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    options = (*DASHBOARD, "--preload", "dask_shm_bridge.preload")
    with (
        Deployment(tmp_path, pool_config, 0, protocol="tcp", scheduler_args=options) as deployment,
        Client(deployment.address, set_as_default=False) as client,
    ):
        is_offered(port_of(client))

        def applications(dask_scheduler: Any = None) -> int:
            from bokeh.server.tornado import BokehTornado

            found = dask_scheduler.http_application.applications
            return sum(isinstance(one, BokehTornado) for one in found)

        assert client.run_on_scheduler(applications) == 1
        dask_shm_bridge.enable(client)
        assert client.run_on_scheduler(applications) == 1
        is_offered(port_of(client))


def test_enable_offers_it_on_a_running_cluster_with_a_prefix(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    options = (*DASHBOARD, "--dashboard-prefix", "some/where")
    with (
        Deployment(tmp_path, pool_config, 0, protocol="tcp", scheduler_args=options) as deployment,
        Client(deployment.address, set_as_default=False) as client,
    ):
        port = port_of(client)
        with pytest.raises(HTTPError):
            get(port, "some/where/shm-pool")
        dask_shm_bridge.enable(client)
        is_offered(port, "some/where/")


def test_a_scheduler_without_a_dashboard_has_none(
    pool_config: dict[str, Any], tmp_path: Path
) -> None:
    with (
        Deployment(tmp_path, pool_config, workers=1) as deployment,
        deployment.client() as client,
    ):
        with pytest.raises(HTTPError):
            get(port_of(client), "shm-pool")
        assert client.submit(tasks.fresh, 1).result() == 2


def test_without_bokeh(pool_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "bokeh.py").write_text("raise ImportError('there is no bokeh here')\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    options = (*DASHBOARD, "--preload", "dask_shm_bridge.preload")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        with (
            Deployment(tmp_path, pool_config, 1, scheduler_args=options) as deployment,
            deployment.client() as client,
        ):
            assert client.submit(tasks.fresh, 1).result() == 2
            port = port_of(client)
            assert "dask_shm_" in get(port, "metrics")
            with pytest.raises(HTTPError):
                get(port, "shm-pool")
            client.run_on_scheduler(lambda: __import__("dask_shm_bridge"))
        assert "Traceback" not in deployment.said()


@pytest.mark.parametrize("how", ["offer", "add"])
def test_without_bokeh_it_says_so_once_and_quietly(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.server.tornado", None)
    monkeypatch.setitem(sys.modules, "distributed.dashboard.scheduler", None)
    caplog.set_level(logging.DEBUG, "dask_shm_bridge")
    if how == "offer":
        dashboard.offer()
    else:
        assert not dashboard.add(object())
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "no dashboard page" in record.message


# --------------------------------------------------------------------------------- what it shows


def tables(**found: Any) -> dict[str, dict[Any, Any]]:
    return {name: {} for name in ("extent", "lease", "ticket", "member")} | found


def test_extents_are_cut_at_slots_and_joined_where_alike() -> None:
    grain = GRAIN_BYTES
    layout = Layout(4 * grain, (1, 1, 2))
    found = sampler.cut(
        tables(
            extent={
                1: (0, grain, 5, 1),
                2: (grain, grain, 5, 1),
                3: (2 * grain, 4 * grain, 9, 2),
                4: (7 * grain, grain, 9, 1),
            },
            lease={(1, 10): 7, (2, 11): 7, (3, 13): 7, (3, 12): 8},
            ticket={(1, 1): (4, 0, 9)},
        ),
        layout,
    )
    assert found == [
        sampler.Segment(0, 0, 2 * grain, (7,), 0, 2),
        sampler.Segment(0, 2 * grain, 4 * grain, (8, 7), 0, 1),
        sampler.Segment(1, 0, 2 * grain, (8, 7), 0, 1),
        sampler.Segment(1, 3 * grain, 4 * grain, (), 1, 1),
    ]


def report(process: str, stamp: float, seconds: float = 0.0, **sent: int) -> Report:
    found = figures.figures()
    found["process"] = process
    found["bytes"]["sent"] = {way: sent.get(way, 0) for way in found["bytes"]["sent"]}
    found["fallbacks"] = {"full": 2}
    found["times"] = {"sent": [[20, 1, 1000, 500]], "received": []}
    return Report("worker", "w", found, stamp, seconds)


def test_rates_are_of_the_time_in_which_bytes_moved() -> None:
    flow = sampler._Flow()
    assert flow.rates(report("a", 100.0, copied=5000), 100.0).get("copied", 0) == 0  # so far
    rates = flow.rates(report("a", 102.0, copied=9000), 102.0)
    assert rates["copied"] == 2000
    assert flow.rates(report("a", 102.0, copied=9000), 103.0)["copied"] == 2000  # nothing new yet
    assert flow.rates(report("a", 102.0, copied=9000), 110.0) == {}
    # a client that was idle for long says in which time these came about
    rates = flow.rates(report("a", 200.0, 1.0, copied=10000), 200.0)
    assert rates["copied"] == 1000


def test_totals_are_of_all_processes() -> None:
    total = sampler.add_up([report("a", 1.0), report("b", 1.0)])
    assert total["fallbacks"] == {"full": 4}
    assert total["times"]["sent"] == {20: [2, 2000, 1000]}
    assert sampler.add_up([])["fallbacks"] == {}


class Scheduler:
    """As much of one as a sampler needs."""

    def __init__(self, *reports: Report) -> None:
        self.plugins = {"shm-bridge": self}
        self.reports = self
        self.status = type("Status", (), {"name": "running"})
        self._reports = list(reports)

    @property
    def loop(self) -> IOLoop:
        return IOLoop.current()

    def all(self) -> list[Report]:
        return self._reports


def test_a_sample_has_the_pool_and_who_is_in_it() -> None:
    shared = store.attach()
    one = report("a", 1.0)
    one.figures["member"] = shared.member
    bad = Report("client", "c", {"process": "x", "bytes": 5}, 1.0, 0.0)
    look = sampler.Sampler(scheduler := Scheduler(one, bad))
    grants = shared.ledger.allocate(shared.member, [3 * MiB, 5 * MiB], "output")
    try:
        asyncio.run(look.sample())
    finally:
        shared.ledger.give_back([(grant.extent, grant.lease) for grant in grants if grant])
    assert all(grants)
    state = look.state
    assert state is not None
    assert state.used == {"input": 0, "output": 8 * MiB, "scratch": 0}
    assert [(s.slot, s.start, s.end) for s in state.segments] == [
        (4, 0, 4 * MiB),
        (5, 0, 4 * MiB),
    ]
    (person,) = (one for one in state.members if one.id == shared.member)
    assert person[1:] == (os.getpid(), "worker", "w", 8 * MiB)
    assert look.used[-1] == state.used
    assert look.totals["fallbacks"] == {"full": 2}
    assert scheduler is not None


def test_a_ledger_that_is_not_had_leaves_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = store.attach()
    look = sampler.Sampler(scheduler := Scheduler())
    asyncio.run(look.sample())
    seen = look.state

    def busy(*args: Any) -> None:
        raise LedgerBusyError("busy")

    monkeypatch.setattr(shared.ledger, "snapshot", busy)
    asyncio.run(look.sample())
    assert look.state is seen is not None
    assert len(look.times) == 2
    assert scheduler is not None


def test_nobody_is_asked_any_more_once_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.02)
    monkeypatch.setattr(sampler, "_PATIENCE_S", 0.3)
    look = sampler.Sampler(scheduler := Scheduler())

    async def watch() -> None:
        assert not look.running
        while not look.times:
            look.ask()
            await asyncio.sleep(0.02)
        look.ask()
        assert look.running
        while look.running:
            await asyncio.sleep(0.02)
        seen = len(look.times)
        await asyncio.sleep(0.2)
        assert len(look.times) == seen
        while len(look.times) < seen + 2:
            look.ask()
            await asyncio.sleep(0.02)
        assert look.used[seen]["input"] != look.used[seen]["input"]  # NaN: no line across the gap
        scheduler.status.name = "closed"
        while look.running:
            await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(watch(), 30))


def test_it_is_asked_from_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "INTERVAL_S", 0.02)
    look = sampler.Sampler(scheduler := Scheduler())

    async def watch() -> None:
        loop = IOLoop.current()
        monkeypatch.setattr(Scheduler, "loop", loop)
        await asyncio.to_thread(look.ask)
        assert look.running
        while len(look.history().times) < 3:
            await asyncio.sleep(0.02)
        look.stop()

    asyncio.run(asyncio.wait_for(watch(), 30))
    assert {len(part) for part in look.history()} == {len(look.times)}
    assert scheduler is not None


def test_a_pool_of_many_extents_is_drawn_in_part(client: Client) -> None:
    from scheduler_plugin.dashboard import pool_plots

    scheduler = Scheduler()
    layout = Layout(4 * MiB, (4, 4, 8))
    segments = [
        sampler.Segment(n % 16, GRAIN_BYTES * (n // 16), GRAIN_BYTES * (n // 16 + 1), (n,), 0, 1)
        for n in range(1600)
    ]

    async def draw() -> Any:
        plot = pool_plots.PoolMap(scheduler)
        plot.sampler.state = sampler.State("id", "path", layout, {"input": MiB}, segments, [])
        plot.update()
        plot.sampler.stop()
        return plot

    plot = asyncio.run(draw())
    assert len(plot.source.data["left"]) == 1500
    assert "1500 largest of 1600" in plot.root.title.text


# ------------------------------------------------------------------------------- in a real browser


@contextmanager
def traffic(client: Client, workers: list[str]) -> Iterator[None]:
    """Move arrays from client to worker to worker, some larger than a slot, until the end."""
    stop = threading.Event()

    def run() -> None:
        kept = []
        number = 0
        while not stop.is_set():
            number += 1
            x = tasks.numbers(MiB * (1 + number % 6), number)
            there = client.submit(tasks.fresh, x, pure=False, workers=[workers[number % 2]])
            again = client.submit(
                tasks.fresh, there, pure=False, workers=[workers[(number + 1) % 2]]
            )
            kept.append((again, again.result()))
            del there, again, kept[:-4]
            stop.wait(0.05)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(120)
        assert not thread.is_alive()


def shows(browser: Any, name: str, key: str) -> Any:
    """Return a column of a plot, once it is there."""
    assert eventually(lambda: column(browser, name, key) is not None)
    return column(browser, name, key)


def go_to_the_page(browser: Any, root: str) -> None:
    """Follow the link on Dask's own page; leave aside what that one has to complain of."""
    browser.get(f"{root}/status")
    (link,) = browser.find_elements("link text", "Shm-Pool")
    target = link.get_property("href")
    assert target == f"{root}/shm-pool"
    browser.get("about:blank")
    complaints(browser)
    browser.get(target)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_page_in_a_browser(
    client: Client, workers: list[str], width: int, height: int, tmp_path: Path
) -> None:
    with (
        chromium(width, height) as browser,
        traffic(client, workers),
    ):
        go_to_the_page(browser, f"http://127.0.0.1:{port_of(client)}")
        fit(browser, width, height)
        before = shows(browser, "shm_rates", "time")
        assert eventually(lambda: len(column(browser, "shm_rates", "time")) >= len(before) + 10)
        assert max(v or 0 for v in column(browser, "shm_rates", "copied")) > MiB
        assert max(v or 0 for v in column(browser, "shm_usage", "output")) > 0
        everybody = {
            *(("worker", address) for address in workers),
            ("scheduler", client.scheduler.address),
            ("client", client.id),
        }
        assert eventually(lambda: {(row[0], row[1]) for row in members(browser)} == everybody)
        held = {row[3] for row in members(browser)}
        assert eventually(lambda: {row[3] for row in members(browser)} - held)  # drawn anew
        assert eventually(lambda: column(browser, "shm_map", "left", "renderers[1].data_source"))
        assert "MiB lent" in str(title(browser, "shm_map"))
        assert "mean by size" in str(title(browser, "shm_times"))
        parts = browser.execute_script(
            """
            return Array.from(document.querySelectorAll("#shm > div")).map(part => {
                const box = part.getBoundingClientRect();
                return [part.id, box.left, box.top, box.right, box.bottom];
            });
            """
        )
        assert len(parts) == 8
        for name, left, top, right, bottom in parts:  # all there, without scrolling
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, name
            assert right - left > 100 and bottom - top > 20, name
        picture = Path(os.environ.get("SHM_SCREENSHOTS", tmp_path)) / f"dashboard-{width}.png"
        assert browser.save_screenshot(str(picture))
        assert picture.stat().st_size > 20_000
        assert complaints(browser) == []


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES[1:])
def test_a_plot_alone_in_a_browser(client: Client, workers: list[str], page: str) -> None:
    name = {"individual-shm-pool": "shm_map", "individual-shm-transfers": "shm_rates"}[page]
    with chromium(800, 600) as browser, traffic(client, workers):
        browser.get(f"http://127.0.0.1:{port_of(client)}/{page}")
        assert eventually(lambda: title(browser, name))
        first = title(browser, name)
        assert eventually(lambda: title(browser, name) != first)
        # a page without a template asks for an icon, which Dask doesn't have
        assert [text for text in complaints(browser) if "favicon" not in text] == []


def works_at(browser: Any, root: str) -> None:
    """See that the page is reached from Dask's own under this URL, and follows."""
    go_to_the_page(browser, root)
    before = shows(browser, "shm_rates", "time")
    assert eventually(lambda: len(column(browser, "shm_rates", "time")) > len(before) + 3)
    assert complaints(browser) == []


@pytest.mark.browser
def test_behind_a_proxy_in_a_browser(client: Client) -> None:
    path = "/user/me/proxy/8787"  # as of JupyterHub, which takes it off
    with proxy(port_of(client), path) as port, chromium(1280, 800) as browser:
        works_at(browser, f"http://127.0.0.1:{port}{path}")


@pytest.mark.browser
def test_with_a_prefix_in_a_browser(pool_config: dict[str, Any], tmp_path: Path) -> None:
    # For proxies that leave their path on.
    options = (*DASHBOARD, "--dashboard-prefix", "some/where")
    with (
        Deployment(tmp_path, pool_config, 0, scheduler_args=options) as deployment,
        Client(deployment.address, set_as_default=False) as client,
        chromium(1280, 800) as browser,
    ):
        works_at(browser, f"http://127.0.0.1:{port_of(client)}/some/where")
