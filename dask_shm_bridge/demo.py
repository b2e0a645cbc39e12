"""The same jobs over the pool, over TCP, and by files on disk, and a comparison.

``python -m dask_shm_bridge.demo`` starts a client, a scheduler and two workers, each a process
of its own, for one way after the other, and ends with what every job took: time, bytes by way,
memory.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

import click
from distributed.comm.registry import get_backend
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dask_shm_bridge.benchmarks.command import names
from dask_shm_bridge.benchmarks.jobs import JOBS
from dask_shm_bridge.benchmarks.machine import describe, versions
from dask_shm_bridge.benchmarks.memory import Peak
from dask_shm_bridge.benchmarks.report import size_text
from dask_shm_bridge.benchmarks.traffic import RECEIVED, SENT
from dask_shm_bridge.benchmarks.trial import Record, TrialError, do_way_apart
from dask_shm_bridge.cli import HELP_OPTIONS

WAYS = ("shm", "tcp", "npy")


def disagreements(records: Sequence[Record]) -> list[str]:
    """Compare the results of every job between the ways; what does not agree, in words."""
    found = []
    for job in dict.fromkeys(r.job.name for r in records):
        first, *others = [r for r in records if r.job.name == job]
        for other in others:
            difference = first.job.difference(first.arrays, other.arrays)
            if not difference <= first.job.tolerance:
                found.append(
                    f"{job}: {first.way} and {other.way} differ by {difference:.3g}, "
                    f"allowed is {first.job.tolerance:g} of the largest number"
                )
    return found


def time_table(records: Sequence[Record]) -> Table:
    """Lay out times: how long each job took each way, and how the medians compare.

    ``rest`` is what the worker's own computing leaves: moving data, and Dask. The first run
    touches memory that nobody has used before, which costs the pool as much as anyone.
    """
    sheet = Table(title="seconds", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    sheet.add_column("job", no_wrap=True)
    sheet.add_column("way", no_wrap=True)
    headings = ("first", "median", "computing", "rest", "tcp/this", "npy/this", "differs")
    for heading in headings:
        sheet.add_column(heading, justify="right", no_wrap=True)
    for job in dict.fromkeys(r.job.name for r in records):
        ways = {r.way: r for r in records if r.job.name == job}
        first = next(iter(ways.values()))
        for record in ways.values():
            rest = record.rest_seconds
            sheet.add_row(
                job if record is first else "",
                record.way,
                f"{record.seconds[0]:.3f}",
                f"{record.median:.3f}",
                f"{statistics.median(record.computing_seconds):.3f}" if rest else "-",
                f"{statistics.median(rest):.3f}" if rest else "-",
                *(f"{ways[w].median / record.median:.2f}" if w in ways else "-" for w in WAYS[1:]),
                job_difference(first, record),
            )
        sheet.add_section()
    return sheet


def job_difference(first: Record, record: Record) -> str:
    """Say how far the results of `record` are from those of the first way."""
    if record is first:
        return "-"
    difference = first.job.difference(first.arrays, record.arrays)
    return "none" if difference == 0 else f"{difference:.1e}"


def traffic_table(records: Sequence[Record]) -> Table:
    """Lay out bytes by way and fallen-back frames, added up over all processes and runs."""
    counted = [(r.job.name, r.traffic) for r in records if r.traffic]
    sheet = Table(title="what moved, and how, over shm", title_justify="left", box=SIMPLE_HEAD)
    sheet.add_column("all processes, all runs")
    for job, _ in counted:
        sheet.add_column(job, justify="right")
    for key in SENT:
        sheet.add_row(f"sent, {key}", *(size_text(t.sent_bytes[key]) for _, t in counted))
    for key in RECEIVED:
        sheet.add_row(f"received, {key}", *(size_text(t.received_bytes[key]) for _, t in counted))
    for cause in sorted({cause for _, t in counted for cause, n in t.fallbacks.items() if n}):
        sheet.add_row(f"frames not taken: {cause}", *(str(t.fallbacks[cause]) for _, t in counted))
    frames = (str(t.fallbacks.total()) for _, t in counted)
    sheet.add_row("frames not taken, any cause", *frames)
    return sheet


def memory_table(records: Sequence[Record]) -> Table:
    """Lay out the peak memory of each process: of its own, and resident with shared pages."""
    sheet = Table(
        title="peak memory, MiB: private (resident, shared pages included)",
        title_justify="left", box=SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    sheet.add_column("job", no_wrap=True)
    sheet.add_column("way", no_wrap=True)
    for role in dict.fromkeys(role for r in records for role in r.peaks):
        sheet.add_column(role, justify="right", no_wrap=True)
    for job in dict.fromkeys(r.job.name for r in records):
        name = job
        for record in (r for r in records if r.job.name == job):
            sheet.add_row(name, record.way, *map(_peak_text, record.peaks.values()))
            name = ""
        sheet.add_section()
    return sheet


def write(path: str, records: Sequence[Record], wrong: Sequence[str]) -> None:
    """Write everything but the results themselves to a JSON file at `path`."""
    document = {
        "demo": "dask-shm-bridge",
        "machine": describe(),
        "versions": versions(),
        "wrong": list(wrong),
        "records": [record.as_dict() for record in records],
    }
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


@click.command("demo", context_settings=HELP_OPTIONS)
@click.option("--quick", is_flag=True, help="A tenth of the rows, one run of each job.")
@click.option(
    "--protocols", type=names(WAYS), metavar="NAMES", default=",".join(WAYS), show_default=True
)
@click.option("--repeats", type=click.IntRange(1), help="Runs of each job.  [default: 5]")
@click.option("--part", type=click.FloatRange(0, 1, min_open=True), help="Part of the rows.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Raw figures.")
@click.option("--patience", default=300.0, show_default=True, help="A run longer than this hung.")
@click.pass_context
def demo(
    ctx: click.Context,
    quick: bool,
    protocols: list[str],
    repeats: int | None,
    part: float | None,
    json_path: str | None,
    patience: float,
) -> None:
    """Do the same jobs over the shared pool, over TCP and by .npy files, and compare.

    Exits with 0 if all results agree.
    """
    for way in protocols:
        _require(way)
    console = Console()
    repeats = repeats or (1 if quick else 5)
    part = part or (0.1 if quick else 1.0)
    for job in JOBS:
        rows = round(job.shape[0] * part)
        size = size_text(rows * job.shape[1] * 8)
        console.print(f"{job.name}: {job.about}, {rows} x {job.shape[1]} float64, {size}")
    records: list[Record] = []
    wrong: list[str] = []
    with Progress(
        TextColumn("{task.description:16}"), BarColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("starting", total=len(protocols) * len(JOBS) * repeats)

        def advance(text: str) -> None:
            progress.update(bar, advance=1, description=text)

        for way in protocols:
            try:
                records += do_way_apart(way, JOBS, part, repeats, advance, patience)
            except TrialError as error:
                wrong.append(str(error))
    console.print(time_table(records), memory_table(records))
    if any(record.traffic for record in records):
        console.print(traffic_table(records))
    wrong += disagreements(records)
    if json_path:
        write(json_path, records, wrong)
    for text in wrong:
        console.print(text, style="red", markup=False)
    if not wrong:
        allowed = max(job.tolerance for job in JOBS)
        ways = ", ".join(protocols)
        console.print(f"all results agree over {ways} (allowed: {allowed:g} of the largest number)")
    ctx.exit(1 if wrong else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        return int(demo.main(args=argv, prog_name="demo", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code


def _require(way: str) -> None:
    """Refuse a protocol that Dask doesn't know before any cluster is started."""
    try:
        get_backend("tcp" if way == "npy" else way)
    except ValueError:
        raise click.UsageError(
            f"Dask knows no protocol {way!r}: install dask-shm-bridge, which brings it"
        ) from None


def _peak_text(peak: Peak) -> str:
    return f"{peak.private_bytes / 2**20:.0f} ({peak.resident_bytes / 2**20:.0f})"


if __name__ == "__main__":
    from dask_shm_bridge.demo import main as importable_main

    raise SystemExit(importable_main())
