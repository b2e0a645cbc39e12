"""The commands ``dask shm check`` and ``dask shm sweep``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import click
from dask.utils import format_bytes
from rich.console import Console
from rich.table import Table

from dask_shm_bridge.cli import HELP_OPTIONS
from dask_shm_bridge.config import Settings
from dask_shm_bridge.errors import BridgeError
from dask_shm_bridge.recovery.survey import Survey, survey
from dask_shm_bridge.recovery.sweeping import Swept, sweep

RIGHT, FOUND, BLIND = 0, 1, 2

_EXIT = """
\b
Exits with 0 if all is right (or there is no pool), 1 if something was found,
2 if it could not look.
"""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option(
            "--path",
            type=click.Path(),
            help="Folder of the pool.  [default: shm-bridge.pool.path]",
        ),
    ):
        command = option(command)
    return command


def _asked(path: str | None) -> tuple[str | None, float]:
    settings = Settings.from_config()
    if path is None:
        return settings.path, settings.ledger_timeout_s
    return os.path.abspath(os.path.expanduser(path)), settings.ledger_timeout_s


def _blind(error: Exception, as_json: bool, ctx: click.Context) -> None:
    if as_json:
        click.echo(json.dumps({"error": str(error)}))
    else:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
    ctx.exit(BLIND)


def _document(seen: Survey) -> dict[str, Any]:
    return dataclasses.asdict(seen)


@click.command("check", epilog=_EXIT, context_settings=HELP_OPTIONS)
@_options
@click.pass_context
def check(ctx: click.Context, as_json: bool, path: str | None) -> None:
    """Look at the pool and its ledger; change nothing.

    Safe while the pool is in use. Looks for extents that overlap, leak or belong to nobody,
    rows of dead processes, damaged files, wrong owners and modes, and what killed processes left.
    """
    try:
        seen = survey(*_asked(path))
    except (BridgeError, OSError) as error:
        _blind(error, as_json, ctx)
        return
    if as_json:
        click.echo(json.dumps(_document(seen), indent=1))
    else:
        _show(seen, Console())
    ctx.exit(FOUND if seen.all_findings() else RIGHT)


@click.command("sweep", epilog=_EXIT, context_settings=HELP_OPTIONS)
@_options
@click.pass_context
def sweep_command(ctx: click.Context, as_json: bool, path: str | None) -> None:
    """Take away what dead processes left: their leases, pools and files.

    Safe while the pool is in use: what a living process holds is left alone. Looks again
    afterwards, as check does.
    """
    try:
        swept = sweep(*_asked(path))
    except (BridgeError, OSError) as error:
        _blind(error, as_json, ctx)
        return
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(swept), indent=1))
    else:
        _show_swept(swept, Console())
    ctx.exit(FOUND if swept.refused or swept.after.all_findings() else RIGHT)


def _show(seen: Survey, console: Console) -> None:
    if not seen.exists:
        console.print(f"there is no pool in {seen.path}", markup=False, soft_wrap=True)
        return
    if not seen.pools and not seen.findings:
        console.print(
            f"there is no pool in {seen.path}; its folder is right", markup=False, soft_wrap=True
        )
        return
    for pool in seen.pools:
        if pool.size_bytes is None or pool.used_bytes is None:
            continue
        counts = ", ".join(f"{count} {name}" for name, count in pool.counts.items())
        console.print(
            f"{seen.path}/{pool.name}: {format_bytes(pool.used_bytes)} of "
            f"{format_bytes(pool.size_bytes)} used; {counts}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        table = Table("member", "process", "role", "holds", "", box=None, pad_edge=False)
        for member in pool.members:
            state = {True: "", False: "dead", None: "its lock file is gone"}[member.alive]
            held = format_bytes(member.held_bytes)
            table.add_row(member.id, str(member.pid), member.role, held, state)
        console.print(table)
    found = seen.all_findings()
    for finding in found:
        console.print(
            f"{finding.kind}: {finding.text}",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if not found:
        console.print("all is right")


def _show_swept(swept: Swept, console: Console) -> None:
    for what, names in (
        ("removed the pool", swept.pools),
        ("removed the file", swept.files),
        ("took the dead member out of the ledger:", swept.members),
        ("could not sweep", swept.refused),
    ):
        for name in names:
            console.print(f"{what} {name}", markup=False, highlight=False, soft_wrap=True)
    if swept.members:
        console.print(f"{swept.extents} extents became free")
    if not (swept.pools or swept.files or swept.members or swept.refused):
        console.print("there was nothing to sweep")
    _show(swept.after, console)


def main(command: str, argv: Sequence[str] | None = None) -> int:
    """Run ``check`` or ``sweep`` with `argv` and return its exit status."""
    chosen = {"check": check, "sweep": sweep_command}[command]
    try:
        return int(chosen.main(args=argv, prog_name=f"dask shm {command}", standalone_mode=False))
    except click.ClickException as error:
        error.show()
        return error.exit_code
