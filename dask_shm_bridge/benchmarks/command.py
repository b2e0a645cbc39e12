"""The command line of the benchmarks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import click
from dask.utils import parse_bytes
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dask_shm_bridge.benchmarks import plot, report
from dask_shm_bridge.benchmarks.alternation import Alternation
from dask_shm_bridge.benchmarks.cases import CASES, DEFAULT_CASES
from dask_shm_bridge.benchmarks.dask_way import DaskWay
from dask_shm_bridge.benchmarks.disk import filesystem
from dask_shm_bridge.benchmarks.disk_way import DiskWay
from dask_shm_bridge.benchmarks.lineup import PROTOCOLS, lineup, missing_package
from dask_shm_bridge.cli import HELP_OPTIONS

DEFAULT_SIZES = "64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,256MiB,1GiB"
QUICK_SIZES = "256KiB,4MiB,32MiB"
TINY_TASKS = 500


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a reader of lists of names, divided by commas, each out of `known`."""

    def read(text: str) -> list[str]:
        found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            what = ", ".join(unknown) or "an empty list"
            raise click.BadParameter(f"{what}: choose from {', '.join(known)}")
        return found

    return read


def sizes_of(text: str) -> list[int]:
    """Read a list of sizes, divided by commas: ``64KiB,1MiB``; rounded down to whole words."""
    try:
        sizes = [int(parse_bytes(size)) // 8 * 8 for size in text.split(",") if size.strip()]
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if not sizes or min(sizes) < 8:
        raise click.BadParameter("give at least one size, of at least 8 bytes")
    return list(dict.fromkeys(sizes))


@click.command("benchmarks", context_settings=HELP_OPTIONS)
@click.option(
    "--sizes",
    type=sizes_of,
    metavar="SIZES",
    help=f"Sizes to move.  [default: {DEFAULT_SIZES}]",
)
@click.option(
    "--cases",
    type=names(tuple(CASES)),
    metavar="NAMES",
    default=",".join(DEFAULT_CASES),
    show_default=True,
    help=f"Out of {', '.join(CASES)}.",
)
@click.option(
    "--protocols",
    type=names(tuple(PROTOCOLS)),
    metavar="NAMES",
    default="tcp,shm,npy",
    show_default=True,
    help=f"Out of {', '.join(PROTOCOLS)}; npy: files on disk, named over tcp.",
)
@click.option("--reps", type=click.IntRange(1), help="Timed runs of each.  [default: 7]")
@click.option("--workers", type=click.IntRange(2), default=2, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Raw figures.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False), help="A PNG picture.")
@click.option(
    "--scratch",
    type=click.Path(exists=True, file_okay=False),
    help="Where .npy files go; choose a folder on a disk.  [default: the temporary folder]",
)
@click.option("--deadline", default=120.0, show_default=True, help="A run longer than this hung.")
@click.option("--quick", is_flag=True, help=f"Few runs, few sizes: 3 and {QUICK_SIZES}.")
@click.pass_context
def benchmarks(
    ctx: click.Context,
    sizes: list[int] | None,
    cases: list[str],
    protocols: list[str],
    reps: int | None,
    workers: int,
    json_path: str | None,
    plot_path: str | None,
    scratch: str | None,
    deadline: float,
    quick: bool,
) -> None:
    """Measure how long arrays take between processes, the ways side by side.

    Exits with 1 if anything failed, hung, or arrived other than it was sent.
    """
    console = Console()
    for protocol in [name for name in protocols if missing_package(name)]:
        console.print(f"{protocol} skipped: {missing_package(protocol)} isn't installed")
        protocols = [name for name in protocols if name != protocol]
    sizes = sizes or sizes_of(QUICK_SIZES if quick else DEFAULT_SIZES)
    reps = reps or (3 if quick else 7)
    tiny_tasks = max(1, (TINY_TASKS // 10 if quick else TINY_TASKS) // reps)
    settings: dict[str, Any] = {
        "sizes_bytes": sizes,
        "cases": cases,
        "protocols": protocols,
        "reps": reps,
        "workers": workers,
        "tiny_tasks_per_run": tiny_tasks,
    }
    quieten()
    with lineup(protocols, workers, tiny_tasks, scratch) as ways:
        for way in ways:
            if isinstance(way, DiskWay):
                settings["npy_filesystem"] = filesystem(way.folder)
                console.print(f"npy: files on {settings['npy_filesystem']}")
            elif isinstance(way, DaskWay):
                console.print(f"{way.name}: scheduler at {way.client.scheduler_info()['address']}")
        with Progress(
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as progress:
            bar = progress.add_task("starting")
            alternation = Alternation(
                ways,
                reps,
                deadline,
                lambda text: progress.update(bar, advance=1, description=text),
            )
            plan = alternation.plan(sizes, cases)
            progress.update(bar, total=alternation.runs(plan))
            measurements = [m for step in alternation.measure(plan) for m in step]
    for sheet in report.tables(measurements):
        console.print(sheet)
    for complaint in report.complaints(measurements):
        console.print(complaint, markup=False)
    if json_path:
        report.write(json_path, measurements, settings)
    if plot_path:
        plot.draw(plot_path, measurements)
    ctx.exit(1 if any(m.error for m in measurements) else 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        status = benchmarks.main(args=argv, prog_name="benchmarks", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return int(status or 0)


def quieten() -> None:
    """Large graphs are what is measured here, not an oversight to be warned of."""
    warnings.filterwarnings("ignore", message="Sending large graph")
    logging.getLogger("distributed").setLevel(logging.ERROR)
