"""Where the time of a transfer goes: its critical path, interval by interval, in all processes.

``python -m dask_shm_bridge.benchmarks.timeline --case worker-to-worker --size 256MiB``. The cases
are those of the benchmarks, over the same clusters; the steps are timed from outside.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dask_shm_bridge.benchmarks import critical, dask_way, tracing
from dask_shm_bridge.benchmarks.cases import MemcpyWay
from dask_shm_bridge.benchmarks.command import names, quieten, sizes_of
from dask_shm_bridge.benchmarks.critical import OWNERS, Passage
from dask_shm_bridge.benchmarks.dask_way import DaskWay
from dask_shm_bridge.benchmarks.lineup import lineup
from dask_shm_bridge.benchmarks.machine import describe, versions
from dask_shm_bridge.benchmarks.payload import Words, change, generate
from dask_shm_bridge.cli import HELP_OPTIONS

WARM_UPS = 3


def trace(way: DaskWay, least_bytes: int) -> None:
    """Have every process of a way's cluster note its steps."""
    roles = {address: f"worker-{number}" for number, address in enumerate(way.workers)}
    way.client.run(tracing.install_in_worker, roles, least_bytes)
    scheduler = getattr(way.client.cluster, "scheduler", None)
    tracing.install("client", least_bytes, (scheduler, way.client))
    clock = SimpleNamespace(perf_counter=_noted_clock, monotonic=time.monotonic, sleep=time.sleep)
    vars(dask_way)["time"] = clock  # the cases' own clock is noted as well


def _noted_clock() -> float:
    tracing.note("clock")
    return time.perf_counter()


def once(way: DaskWay, case: str, array: Words, number: int) -> Passage:
    """Do `case` once and divide its time."""
    tracing.drain()
    way.client.run(tracing.drain)
    way.run(case, array, number)
    events = tracing.drain()
    for found in way.client.run(tracing.drain).values():
        events += found
    way.settle()
    return critical.divide(
        [tracing.Event(*event) for event in events], critical.path(case, way.name)
    )


def summary(passages: Sequence[Passage], memcpy: Sequence[float]) -> dict[str, Any]:
    """Return medians of the whole, of each interval, of each owner, and of a bare copy; in ms."""
    rows = []
    for column in zip(*(passage.intervals for passage in passages), strict=True):
        row: dict[str, Any] = {"interval": column[0].point.label, "owner": column[0].point.owner}
        row["ms"] = _median_ms([interval.seconds for interval in column])
        if row["owner"] in ("copy", "task"):
            row["user_ms"] = _median_ms([interval.user_s for interval in column])
            row["system_ms"] = _median_ms([interval.system_s for interval in column])
            row["faults"] = int(statistics.median(interval.faults for interval in column))
        rows.append(row)
    owners = {
        owner: _median_ms(
            [
                sum(i.seconds for i in passage.intervals if i.point.owner == owner)
                for passage in passages
            ]
        )
        for owner in OWNERS
        if any(i.point.owner == owner for i in passages[0].intervals)
    }
    return {
        "total_ms": _median_ms([passage.seconds for passage in passages]),
        "samples_ms": [round(passage.seconds * 1e3, 2) for passage in passages],
        "memcpy_ms": _median_ms(memcpy),
        "owners_ms": owners,
        "intervals": rows,
    }


def _median_ms(seconds: Sequence[float]) -> float:
    return round(statistics.median(seconds) * 1e3, 3)


def table(title: str, result: dict[str, Any]) -> Table:
    """Lay a summary out for a terminal."""
    sheet = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
    )
    sheet.add_column("interval", no_wrap=True)
    sheet.add_column("whose", no_wrap=True)
    for heading in ("ms", "share", "user + sys", "faults"):
        sheet.add_column(heading, justify="right", no_wrap=True)
    whole = result["total_ms"]
    for row in result["intervals"]:
        used = f"{row['user_ms']:.1f} + {row['system_ms']:.1f}" if "faults" in row else ""
        sheet.add_row(
            row["interval"],
            row["owner"],
            f"{row['ms']:.2f}",
            f"{row['ms'] / whole:.0%}",
            used,
            str(row.get("faults", "")),
        )
    sheet.add_section()
    for owner, ms in result["owners_ms"].items():
        sheet.add_row(OWNERS[owner], owner, f"{ms:.2f}", f"{ms / whole:.0%}", "", "")
    sheet.add_section()
    sheet.add_row("total, as measured", "", f"{whole:.2f}", "100%", "", "")
    sheet.add_row("one memcpy in the same run", "", f"{result['memcpy_ms']:.2f}", "", "", "")
    return sheet


@click.command("timeline", context_settings=HELP_OPTIONS)
@click.option(
    "--case",
    "cases",
    type=names(critical.CASES),
    metavar="NAMES",
    default="worker-to-worker",
    show_default=True,
    help=f"Out of {', '.join(critical.CASES)}.",
)
@click.option("--size", type=sizes_of, metavar="SIZE", default="256MiB", show_default=True)
@click.option("--reps", type=click.IntRange(1), default=15, show_default=True)
@click.option(
    "--protocol",
    "protocols",
    type=names(("shm", "tcp")),
    metavar="NAMES",
    default="shm",
    show_default=True,
    help="shm, tcp, or both: they take turns.",
)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Medians and totals.")
def timeline(
    cases: list[str], size: list[int], reps: int, protocols: list[str], json_path: str | None
) -> None:
    """Divide the time of transfers among the steps that they wait for, one after the other."""
    console = Console()
    quieten()
    results: dict[str, dict[str, Any]] = {}
    array = generate(size[0], 0)
    number = 0
    with lineup(protocols) as ways:
        for way in ways:
            if isinstance(way, DaskWay):
                trace(way, size[0] // 2)
        for case in cases:
            passages: dict[str, list[Passage]] = {name: [] for name in protocols}
            memcpy: list[float] = []
            for turn in range(-WARM_UPS, reps):
                for way in ways:
                    number += 1
                    change(array, number)
                    if isinstance(way, DaskWay):
                        passage = once(way, case, array, number)
                        passages[way.name] += [passage] * (turn >= 0)
                    elif isinstance(way, MemcpyWay):
                        memcpy += way.run(case, array, number) * (turn >= 0)
            for name, found in passages.items():
                result = results[f"{case} {name}"] = summary(found, memcpy)
                console.print(table(f"{case} over {name}, {size[0]} bytes", result))
    if json_path:
        document = {"size_bytes": size[0], "reps": reps, "machine": describe()}
        document |= {"versions": versions(), "results": results}
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        timeline.main(args=argv, prog_name="timeline", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


if __name__ == "__main__":
    # Under its own name: worker processes import the main module of their parent again.
    from dask_shm_bridge.benchmarks.timeline import main as run

    raise SystemExit(run())
