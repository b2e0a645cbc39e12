"""The command ``dask shm doctor``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dask_shm_bridge.cli import HELP_OPTIONS
from dask_shm_bridge.config import ExchangeSettings, Settings
from dask_shm_bridge.doctor import cluster, gpu, network, places, software, space
from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result, State, worst
from dask_shm_bridge.errors import PoolError

RIGHT, WARNED, FAILED = 0, 1, 2
_EXIT = """
\b
Exits with 0 if nothing is to be changed, 1 if there are warnings,
2 if something that was asked for does not work.
"""
_STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red", "n/a": "dim"}

Check = Callable[[Machine], Iterable[Result]]
CHECKS: dict[str, Check] = {
    "python": software.python,
    "packages": software.packages,
    "kernel": software.kernel,
    "pool folder": space.pool_folder,
    "room": space.room,
    "memory": space.memory,
    "limits": space.limits,
    "overcommit": space.overcommit,
    "logout": space.logout,
    "pool": places.pool_in_use,
    "exchange folder": places.exchange,
    "network": network.mode,
    "localhost": network.localhost,
    "cuda": gpu.cuda,
    "pinned memory": gpu.pinned,
}


def examine(scheduler: str | None = None, timeout_s: float = 10.0) -> Iterator[Result]:
    """Make all checks.

    Parameters
    ----------
    scheduler : str, optional
        Address of a scheduler whose cluster is checked as well.
    timeout_s : float
        How long to wait for each of its answers, in seconds.
    """
    settings, folder = None, None
    try:
        settings = Settings.from_config()
        folder = ExchangeSettings.from_config().path
    except PoolError as error:
        yield Result(
            "configuration", "fail", str(error), "correct it (dask config find shm-bridge)"
        )
    else:
        yield Result("configuration", "ok", "it can be used")
    machine = Machine.this(settings, folder)
    for name, check in CHECKS.items():
        yield from guarded(name, partial(check, machine))
    if scheduler is not None:
        yield from guarded("address", lambda: network.address(machine, scheduler))
        yield from guarded("scheduler", lambda: cluster.check(scheduler, timeout_s))


def guarded(name: str, check: Callable[[], Iterable[Result]]) -> Iterator[Result]:
    """Make a check; an error of the check itself is no reason to leave the others out."""
    try:
        yield from check()
    except Exception as error:
        yield Result(name, "warn", f"could not be checked ({type(error).__name__}: {error})")


@click.command("doctor", epilog=_EXIT, context_settings=HELP_OPTIONS)
@click.option("--scheduler", metavar="ADDRESS", help="Check this scheduler and its workers, too.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1, 600),
    default=10.0,
    show_default=True,
    help="Seconds to wait for each answer of the scheduler.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--all", "show_all", is_flag=True, help="Show what does not apply as well.")
@click.pass_context
def doctor(
    ctx: click.Context, scheduler: str | None, timeout: float, as_json: bool, show_all: bool
) -> None:
    """Check this machine, and say what to change; change nothing.

    Looks at versions, memory and limits, the pool and where it lies, WSL and its networking, and
    CUDA. Joins no pool and makes no CUDA context. Run it on both sides of WSL and Windows.
    """
    results = list(examine(scheduler, timeout))
    state = worst(results)
    if as_json:
        document = {"state": state, "checks": [dataclasses.asdict(one) for one in results]}
        click.echo(json.dumps(document, indent=1))
    else:
        show(results, Console(), show_all)
    ctx.exit({"fail": FAILED, "warn": WARNED}.get(state, RIGHT))


def show(results: Iterable[Result], console: Console, show_all: bool) -> None:
    """Print a table of results, and what to change."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for result in results:
        if result.state == "n/a" and not show_all:
            continue
        text = Text(result.text)
        if result.advice:
            text.append(f"\n-> {result.advice}", style="italic")
        table.add_row(Text(result.state, style=_STYLES[result.state]), result.name, text)
    console.print(table, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        return int(doctor.main(args=argv, prog_name="dask shm doctor", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        return error.exit_code
