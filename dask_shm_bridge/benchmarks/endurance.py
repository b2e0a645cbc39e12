"""An hour of traffic, and what grows over it that should not.

Run ``python -m dask_shm_bridge.benchmarks.endurance --help``. A scheduler, two workers and a
client, each a process, move arrays in every way that Dask has, without a pause; what they hold is
sampled all the time.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import click
from distributed import Client
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dask_shm_bridge.benchmarks import growth
from dask_shm_bridge.benchmarks.census import Census, Trend, moved_bytes, remaining
from dask_shm_bridge.benchmarks.cluster import ProcessCluster
from dask_shm_bridge.benchmarks.command import quieten
from dask_shm_bridge.benchmarks.machine import describe, versions
from dask_shm_bridge.benchmarks.mixture import Mixture
from dask_shm_bridge.cli import HELP_OPTIONS

MiB = 1 << 20
GB = 1e9

#: What Dask keeps no more of what it did, where it has a setting for that.
NO_RECORDS = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.low-level-log-length": 100,
    "distributed.admin.system-monitor.log-length": 100,
}


@click.command("endurance", context_settings=HELP_OPTIONS)
@click.option("--seconds", type=click.FloatRange(10), default=3600.0, show_default=True)
@click.option("--every", type=click.FloatRange(0.5), default=5.0, show_default=True)
@click.option("--protocol", type=click.Choice(["shm", "tcp"]), default="shm", show_default=True)
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=3, show_default=True)
@click.option(
    "--records/--no-records",
    default=True,
    show_default=True,
    help="Whether Dask keeps spans (for ever), profiles (1,000 s) and logs (1,000 entries).",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="All samples.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="A PNG picture.")
@click.option(
    "--beside",
    "earlier",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="Run nothing: compare the private memory of runs that were kept with --json.",
)
@click.pass_context
def endurance(
    ctx: click.Context,
    seconds: float,
    every: float,
    protocol: str,
    workers: int,
    threads: int,
    records: bool,
    json_path: str | None,
    plot_path: str | None,
    earlier: tuple[str, ...],
) -> None:
    """Move arrays for a long time and see what grows.

    Exits with 1 if a result was wrong, an operation failed, or the ledger is not empty after.
    """
    console = Console()
    if earlier:
        runs = [growth.read(path) for path in earlier]
        console.print(growth.table(runs))
        if plot_path:
            growth.draw(plot_path, runs)
        return
    quieten()
    window = min(300.0, seconds / 10)
    config = {} if records else NO_RECORDS
    with ProcessCluster(protocol, workers, default=True, config=config) as cluster:
        if not records:
            _without_spans(cluster.client)
        census = Census(cluster.client, cluster.pids)
        mixture = Mixture(cluster.client, threads)
        mixture.start()
        try:
            _watch(console, census, mixture, seconds, every)
        finally:
            mixture.stop()
        left = remaining()
    trends = census.trends(window)
    console.print(_table(trends, window))
    result = {
        "benchmark": "dask-shm-bridge endurance",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "dask_shm_bridge.benchmarks.endurance", *sys.argv[1:]],
        "machine": describe(),
        "versions": versions(),
        "window_seconds": window,
        "records": records,
        "operations": dict(mixture.done),
        "errors": mixture.errors,
        "moved_bytes": moved_bytes(census.samples[-1]) if census.samples else 0,
        "traffic": census.samples[-1]["traffic"] if census.samples else {},
        "left_in_ledger": left,
        "trends": [trend._asdict() for trend in trends],
        "samples": census.samples,
    }
    for name in ("operations", "errors", "moved_bytes", "traffic", "left_in_ledger"):
        console.print(f"{name}: {result[name]}", markup=False)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    if plot_path:
        draw(plot_path, census)
    held = [kind for kind in ("extent", "lease", "ticket") if left.get(kind)]
    ctx.exit(1 if mixture.errors or held else 0)


def _without_spans(client: Client) -> None:
    """Take away Dask's extension, which has no switch; first where heartbeats speak of it."""

    async def forget(dask_worker: Any) -> None:
        dask_worker.extensions.pop("spans")
        await dask_worker.heartbeat()  # those before it have come

    client.run(forget)
    client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.extensions.pop("spans") and None)


def _watch(
    console: Console, census: Census, mixture: Mixture, seconds: float, every: float
) -> None:
    """Sample until time is up, or something went wrong."""
    started = time.monotonic()
    told = started
    while not mixture.errors:
        sample = census.take()
        sample["operations"] = mixture.done.total()
        now = time.monotonic()
        if now - started >= seconds:
            return
        if now - told >= 60:
            told = now
            console.print(
                f"{sample['seconds']:5.0f} s: {moved_bytes(sample) / GB:.0f} GB moved, "
                f"{mixture.done.total()} operations, {sample['ledger']}",
                markup=False,
            )
        time.sleep(max(0.0, min(every, started + seconds - now)))


def _table(trends: Sequence[Trend], window: float) -> Table:
    sheet = Table(
        title=f"means of the first, the middle and the last {window:.0f} s",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    sheet.add_column("figure", no_wrap=True)
    for heading in ("first", "middle", "last", "last - middle"):
        sheet.add_column(heading, justify="right", no_wrap=True)
    for trend in trends:
        values = (trend.first, trend.middle, trend.last, trend.last - trend.middle)
        sheet.add_row(_name(trend.name), *(_text(trend.name, value) for value in values))
    return sheet


def _name(name: str) -> str:
    if name == "bytes moved a second":
        return "MiB moved a second"
    return name.replace("_bytes", " MiB")


def _text(name: str, value: float) -> str:
    if "bytes" in name:
        return f"{value / MiB:.1f}"
    return f"{value:.2%}" if "share" in name else f"{value:.1f}"


def draw(path: str, census: Census) -> None:
    """Draw every figure over time into a PNG file.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    minutes = [sample["seconds"] / 60 for sample in census.samples[1:]]
    series = census.series()
    panels: dict[str, dict[str, list[float]]] = {}
    for name, values in series.items():
        process, _, what = name.partition(" ")
        if process in census.pids:
            panels.setdefault(what, {})[process] = values
        else:
            panels[name] = {"": values}
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (title, lines) in zip(places, panels.items(), strict=False):
        for process, values in lines.items():
            scale = MiB if "bytes" in title else 1
            place.plot(minutes, [v / scale for v in values], label=process, linewidth=0.8)
        place.set(title=_name(title), xlabel="minutes")
        place.set_ylim(bottom=0)
        place.grid(True, alpha=0.3)
        if len(lines) > 1:
            place.legend(fontsize="x-small", ncols=2)
    for place in places[len(panels) :]:
        place.axis("off")
    figure.savefig(path, dpi=110, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        status: Any = endurance.main(args=argv, prog_name="endurance", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return int(status or 0)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        raise SystemExit(main())
