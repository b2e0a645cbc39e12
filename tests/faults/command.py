"""The command line of the fault runs."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from faults import chaos, report
from faults import direct as pairs
from faults.points import ACTIONS, POINTS


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def faults() -> None:
    """Kill, stop, cancel and cut processes at every step of the protocol, and count the damage."""


base = click.option(
    "--base", type=click.Path(exists=True, file_okay=False), default="/dev/shm", help="For pools."
)
output = click.option("--json", "path", type=click.Path(dir_okay=False), help="Raw outcomes.")


@faults.command()
@click.option("--kills", default=1000, help="At least so many, spread over all points and roles.")
@click.option("--others", default=1, help="How often each stop, cancel and cut is tried.")
@click.option("--jobs", default=2, help="Trials at once.")
@click.option("--seed", default=1)
@click.option("--seconds", default=0.0, help="Begin no trial after this time; 0: do all.")
@click.option("--points", default="", help="Only these, divided by commas.")
@click.option("--actions", default="", help="Only these, divided by commas.")
@base
@output
def direct(
    kills: int,
    others: int,
    jobs: int,
    seed: int,
    seconds: float,
    points: str,
    actions: str,
    base: str,
    path: str | None,
) -> None:
    """Two processes, comm to comm; one meets a fault, the other and a fresh one check all."""
    plan = pairs.plan(kills, others, seed, base)
    for name, known, wanted in (("point", POINTS, points), ("action", ACTIONS, actions)):
        chosen = set(filter(None, wanted.split(",")))
        if chosen - set(known):
            raise click.BadParameter(f"no such {name}: {chosen - set(known)}")
        plan = [job for job in plan if not chosen or getattr(job, name) in chosen]
    began, count = time.monotonic(), 0

    def told(outcome: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        if report.failed(outcome):
            click.echo(json.dumps(outcome, indent=1).replace("\\n", "\n"))
        if sys.stderr.isatty() or count % 50 == 0:
            click.echo(f"{count}/{len(plan)} {time.monotonic() - began:.0f} s", err=True)

    outcomes = pairs.run(plan, jobs, told, seconds)
    result = {
        "kind": "direct",
        "seed": seed,
        "jobs": jobs,
        "seconds": round(time.monotonic() - began),
        "outcomes": outcomes,
    }
    if path:
        Path(path).write_text(json.dumps(result, indent=1))
    click.echo(report.direct_table(result))
    sys.exit(any(map(report.failed, outcomes)))


@faults.command()
@click.option("--rounds", default=1, help="Rounds, each with a cluster and a seed of its own.")
@click.option("--kills", default=0, help="More rounds, until there were so many kills.")
@click.option("--seconds", default=30.0, help="How long a round has faults.")
@click.option("--jobs", default=1, help="Rounds at once; each wants two processors.")
@click.option("--seed", default=1, help="Of the first round; the next has the next.")
@click.option("--tcp/--no-tcp", default=False, help="Each seed over plain tcp as well.")
@click.option("--broadcast/--no-broadcast", default=False, help="Also scatter to all workers.")
@base
@output
def cluster(
    rounds: int,
    kills: int,
    seconds: float,
    jobs: int,
    seed: int,
    tcp: bool,
    broadcast: bool,
    base: str,
    path: str | None,
) -> None:
    """A cluster with two clients under all kinds of traffic, while its processes meet faults."""
    began = time.monotonic()
    found: list[dict[str, Any]] = []
    if broadcast:
        os.environ["FAULTS_BROADCAST"] = "1"
    context = multiprocessing.get_context("spawn")
    protocols = ("shm", "tcp") if tcp else ("shm",)

    def plan() -> Iterator[tuple[int, float, str, str]]:
        for number in itertools.count():
            if number >= rounds and sum(map(report.kills, found)) >= kills:
                return
            yield from ((seed + number, seconds, protocol, base) for protocol in protocols)

    waiting = plan()
    with context.Pool(jobs, maxtasksperchild=1) as processes:
        running: list[Any] = []
        while True:
            while len(running) < jobs and (arguments := next(waiting, None)) is not None:
                running.append(processes.apply_async(chaos.run_round, (arguments,)))
            if not running:
                break
            ready = next((one for one in running if one.ready()), None)
            if ready is None:
                time.sleep(0.1)
                continue
            running.remove(ready)
            found.append(ready.get())
            text = "FAILED" if report.failed(found[-1]) else "ok"
            click.echo(
                f"{found[-1]['protocol']} {found[-1]['seed']}: {text}, "
                f"{report.kills(found[-1])} kills, {found[-1]['seconds']} s",
                err=True,
            )
            if report.failed(found[-1]):
                click.echo(json.dumps(found[-1], indent=1).replace("\\n", "\n"))
    result = {
        "kind": "cluster",
        "seed": seed,
        "jobs": jobs,
        "seconds": round(time.monotonic() - began),
        "rounds": found,
    }
    if path:
        Path(path).write_text(json.dumps(result, indent=1))
    click.echo(report.cluster_table(result))
    sys.exit(any(report.failed(one) for one in found if one["protocol"] == "shm"))


@faults.command("report")
@click.argument("paths", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--into",
    type=click.Path(exists=True, dir_okay=False),
    help="A Markdown file that gets the tables between its marks <!-- direct --> and the like.",
)
def read(paths: tuple[str, ...], into: str | None) -> None:
    """Write the tables of runs that were kept with --json; runs of a kind are added up."""
    tables = report.tables([json.loads(Path(path).read_text()) for path in paths])
    for kind, text in tables.items():
        if into:
            page = Path(into).read_text()
            start, end = f"<!-- {kind} -->", f"<!-- /{kind} -->"
            before, _, rest = page.partition(start)
            _, found, after = rest.partition(end)
            if not found:
                raise click.ClickException(f"{into} has no {start} and {end}")
            Path(into).write_text(f"{before}{start}\n{text}\n{end}{after}")
        else:
            click.echo(text + "\n")
