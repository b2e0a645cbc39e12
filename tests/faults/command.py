"""The command line of the fault runs."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from faults import direct as pairs
from faults import report
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
