"""The commands ``dask shm status``, ``config`` and ``clean``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import dask.config
import yaml
from rich.console import Console
from rich.table import Table

from dask_shm_bridge import config as configuration
from dask_shm_bridge.cli import HELP_OPTIONS
from dask_shm_bridge.errors import BridgeError
from dask_shm_bridge.status import view
from dask_shm_bridge.status.figures import PoolStatus, look

THERE, NONE, FAILED = 0, 1, 2
_path = click.option(
    "--path", type=click.Path(), help="Folder of the pool.  [default: shm-bridge.pool.path]"
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("status", context_settings=HELP_OPTIONS)
@_path
@click.option("--watch", is_flag=True, help="Look again and again, until interrupted.")
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True)
@click.option("--scheduler", help="Address of a cluster, for what its processes move.")
@_json
@click.pass_context
def status(
    ctx: click.Context,
    path: str | None,
    watch: bool,
    interval: float,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Show what is in the pool: slots, regions, members, leases and rates.

    A look takes the ledger's lock for less than a millisecond, and nothing else of anybody's.
    Exits with 0 if there is a pool, 1 if there is none, 2 if it can't be looked at.
    """
    try:
        if not watch and scheduler is None:
            seen = look(path)
            if as_json:
                click.echo(json.dumps(seen.as_dict(), indent=1))
            else:
                Console().print(view.panel(seen, None, None))
        else:
            seen = _watch(path, interval, scheduler, as_json, once=not watch)
    except (BridgeError, OSError) as error:
        _failed(error, as_json)
        ctx.exit(FAILED)
    except KeyboardInterrupt:
        ctx.exit(THERE)
    ctx.exit(NONE if seen.id is None else THERE)


def _watch(
    path: str | None, interval: float, scheduler: str | None, as_json: bool, once: bool
) -> PoolStatus:
    """Show figures and their rates, every so often; with `once`, for one interval."""
    from contextlib import ExitStack

    from rich.live import Live

    with ExitStack() as stack:
        moved: Callable[[], dict[str, dict[str, int]] | None] = lambda: None  # noqa: E731
        if scheduler is not None:
            from distributed import Client

            from dask_shm_bridge import upgrade

            upgrade.install()
            client = stack.enter_context(Client(scheduler, set_as_default=False))
            moved = lambda: _moved(client)  # noqa: E731
        before, sent, since = look(path), moved(), time.monotonic()
        live = None
        if not as_json:
            live = stack.enter_context(
                Live(view.panel(before, None, None), auto_refresh=False, console=Console())
            )
        while True:
            time.sleep(interval)
            seen, sent_now, now = look(path), moved(), time.monotonic()
            rows = None
            if seen.id is not None and seen.id == before.id:
                rows = (seen.next_id - before.next_id) / (now - since)
            rates = _rates(sent, sent_now, now - since)
            if live is not None:
                live.update(view.panel(seen, rows, rates), refresh=True)
            else:
                figures = {**seen.as_dict(), "rows_per_second": rows, "bytes_per_second": rates}
                click.echo(json.dumps(figures, indent=1 if once else None))
            if once:
                return seen
            before, sent, since = seen, sent_now, now


def _moved(client: Any) -> dict[str, dict[str, int]]:
    """Return the bytes that each process of a cluster has sent, by way; this one left out."""
    from dask_shm_bridge import stats

    found = stats(client)
    processes = {"scheduler": found["scheduler"], **found["workers"]}
    return {who: each["bytes"]["sent"] for who, each in processes.items() if each}


def _rates(
    before: dict[str, dict[str, int]] | None,
    after: dict[str, dict[str, int]] | None,
    seconds: float,
) -> dict[str, dict[str, float]] | None:
    if before is None or after is None:
        return None
    return {
        who: {way: (sent - before[who][way]) / seconds for way, sent in ways.items()}
        for who, ways in after.items()
        if who in before
    }


def _failed(error: Exception, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": str(error)}))
    else:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------- config


@click.command("config", context_settings=HELP_OPTIONS)
@_json
@click.option("--yaml", "as_yaml", is_flag=True, help="Print YAML, to put into a file of Dask's.")
@click.pass_context
def show_config(ctx: click.Context, as_json: bool, as_yaml: bool) -> None:
    """Show the configuration as this process sees it, and whether it can be used.

    Exits with 0 if it can, 2 if it can't.
    """
    defaults = dict(_flat(yaml.safe_load(configuration.DEFAULTS_FILE.read_text())["shm-bridge"]))
    unknown = sorted(set(dict(_flat(dask.config.get("shm-bridge", {})))) - set(defaults))
    unknown = [key for key in unknown if not any(key.startswith(f"{k}.") for k in defaults)]
    values = {key: configuration.get(key) for key in defaults}
    problems = [f"shm-bridge.{key} is no key of this version" for key in unknown]
    for kind in (
        configuration.Settings,
        configuration.ExchangeSettings,
        configuration.PlacementSettings,
    ):
        try:
            kind.from_config()
        except BridgeError as error:
            problems.append(str(error))
    if as_json:
        click.echo(json.dumps({"values": values, "problems": problems}, indent=1))
    elif as_yaml:
        tree: dict[str, Any] = {}
        for key, value in values.items():
            dask.config.update(tree, _nested(key, value))
        click.echo(yaml.safe_dump({"shm-bridge": tree}, sort_keys=False), nl=False)
    else:
        table = Table("shm-bridge.", "value", "default", box=None, pad_edge=False)
        for key, value in values.items():
            changed = value != defaults[key]
            shown = yaml.safe_dump(value).replace("...", "").strip()
            default = yaml.safe_dump(defaults[key]).replace("...", "").strip() if changed else ""
            table.add_row(key, shown, default, style="bold" if changed else None)
        Console().print(table)
    for problem in problems if not as_json else []:
        Console(stderr=True).print(problem, style="red", markup=False, soft_wrap=True)
    ctx.exit(FAILED if problems else 0)


def _flat(tree: dict[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{before}{key}".replace("_", "-")
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


# ----------------------------------------------------------------------------------------- clean


@click.command("clean", context_settings=HELP_OPTIONS)
@_path
@click.option(
    "--lanes-older-than",
    default="1d",
    show_default=True,
    help="Also files of other kernels in the exchange folder, if they were not written since.",
)
@_json
@click.pass_context
def clean(ctx: click.Context, path: str | None, lanes_older_than: str, as_json: bool) -> None:
    """Remove what nobody living uses: pools, files of dead processes, old lanes.

    What a living process holds stays. Exits with 0, or 2 if it could not look.
    """
    from dask.utils import parse_timedelta

    from dask_shm_bridge.exchange import lane
    from dask_shm_bridge.recovery.sweeping import sweep

    settings = configuration.Settings.from_config()
    try:
        age = float(parse_timedelta(lanes_older_than, default="s"))
    except (ValueError, KeyError, AttributeError):
        raise click.BadParameter(
            f"{lanes_older_than!r} is no time such as '1d'", param_hint="--lanes-older-than"
        ) from None
    removed: list[str] = []
    try:
        where = settings.path if path is None else os.path.abspath(os.path.expanduser(path))
        if where is not None and os.path.isdir(where):
            swept = sweep(where, settings.ledger_timeout_s)
            removed += [*swept.pools, *swept.files, *(f"member {each}" for each in swept.members)]
        exchange = configuration.ExchangeSettings.from_config()
        if exchange.path is not None and os.path.isdir(exchange.path):
            removed += lane.clean(exchange, age)
    except (BridgeError, OSError) as error:
        _failed(error, as_json)
        ctx.exit(FAILED)
    if as_json:
        click.echo(json.dumps({"removed": removed}, indent=1))
    else:
        for name in removed:
            click.echo(f"removed {name}")
        if not removed:
            click.echo("there was nothing to remove")


def main(command: str, argv: Sequence[str] | None = None) -> int:
    """Run ``status``, ``config`` or ``clean`` with `argv` and return its exit status."""
    chosen = {"status": status, "config": show_config, "clean": clean}[command]
    try:
        done: Any = chosen.main(args=argv, prog_name=f"dask shm {command}", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    return int(done or 0)
