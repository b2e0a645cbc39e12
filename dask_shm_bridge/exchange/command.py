"""The command ``dask shm probe``: how arrays travel between this process and a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import time
from typing import Any

import click
import numpy as np
from dask.utils import format_bytes, parse_bytes

from dask_shm_bridge.cli import HELP_OPTIONS

_ROUNDS = 5
_MEANINGS = {
    "shared": "One kernel, one pool: arrays go by reference.",
    "file": "Two kernels, one folder: large arrays go by file, each piece checked.",
    "tcp": "Nothing in common that is right and faster: arrays go by TCP.",
}


@click.command("probe", context_settings=HELP_OPTIONS)
@click.argument("address")
@click.option("--size", default="16 MiB", show_default=True, help="Of the array to echo.")
@click.option(
    "--expect", type=click.Choice(sorted(_MEANINGS)), help="Exit with 1 in any other mode."
)
@click.option("--timeout", default=10.0, show_default=True, help="To connect, in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def probe(address: str, size: str, expect: str | None, timeout: float, as_json: bool) -> None:
    """Show how arrays travel between this machine and the scheduler or worker at ADDRESS.

    Uses the same configuration as a client would, TLS included. Exits with 0 if it was reached, 2
    if it was not.
    """
    try:
        nbytes = int(parse_bytes(size))
    except (ValueError, AttributeError):
        raise click.BadParameter(f"{size!r} is no size", param_hint="--size") from None
    try:
        found = asyncio.run(_probe(address, max(1, nbytes), timeout))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise click.exceptions.Exit(_unreached(address, error)) from None
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _show(found)
    if expect is not None and found["mode"] != expect:
        raise click.exceptions.Exit(1)


def _unreached(address: str, error: Exception) -> int:
    click.echo(f"{address} was not reached: {error}", err=True)
    return 2


async def _probe(address: str, nbytes: int, timeout: float) -> dict[str, Any]:
    from distributed.comm import connect
    from distributed.protocol import to_serialize
    from distributed.security import Security

    from dask_shm_bridge import comm as shm
    from dask_shm_bridge import upgrade

    upgrade.install()  # a peer at tcp:// may know us, too
    if "://" not in address:
        address = f"tcp://{address}"
    comm: Any = await connect(address, timeout=timeout, **Security().get_connection_args("client"))
    try:
        theirs = comm.remote_info.get(shm.KEY)
        found: dict[str, Any] = {"address": address, "known": isinstance(theirs, dict)}
        far = getattr(comm, "_file", None)
        if far is not None:
            from dask_shm_bridge.exchange import probe as between

            found["here_to_there"] = (await between.probe(far)).figures()
            with contextlib.suppress(TimeoutError):
                found["there_to_here"] = (await far.ask("ask", seconds=20.0))[0]
        noise = np.resize(np.random.default_rng().integers(0, 256, 1 << 16, "u1"), nbytes)
        seconds = []
        for _ in range(_ROUNDS):
            begun = time.monotonic()
            await comm.write({"op": "echo", "data": to_serialize(noise), "reply": True})
            answer = await comm.read()
            seconds.append(time.monotonic() - begun)
            echoed = getattr(answer, "data", answer)
            if not np.array_equal(echoed, noise):
                raise RuntimeError("the array that came back is another one")
        found["mode"] = getattr(comm, "mode", "tcp")
        found["cause"] = getattr(comm, "_cause", None) if found["mode"] == "tcp" else None
        found["echo_bytes"] = nbytes
        found["echo_seconds"] = statistics.median(seconds)
        return found
    finally:
        await comm.close()


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("mode", f"[bold]{found['mode']}[/bold]")
    table.add_row("", _MEANINGS[found["mode"]])
    if not found["known"]:
        table.add_row("", "The peer does not run dask-shm-bridge.")
    elif found["cause"]:
        table.add_row("cause", found["cause"])
    for key, name in (("here_to_there", "from here to there"), ("there_to_here", "and back")):
        verdict = found.get(key)
        if verdict:
            table.add_row(name, f"{verdict['mode']}: {verdict['why']}")
            if verdict["coherent"] is not None:
                what = "shows" if verdict["coherent"] else "does not show"
                table.add_row("", f"a mapping of the file {what} what the other side writes")
    rate = 2 * found["echo_bytes"] / max(found["echo_seconds"], 1e-9)
    table.add_row(
        "echo",
        f"{format_bytes(found['echo_bytes'])} there and back in "
        f"{found['echo_seconds'] * 1e3:.1f} ms ({format_bytes(int(rate))}/s)",
    )
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Run the command with `argv` and return its exit status."""
    try:
        status: Any = probe.main(args=argv, prog_name="dask shm probe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        return 130
    return int(status or 0)
