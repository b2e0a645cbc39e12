"""One large piece against many small ones, by file, beside TCP and the pool.

``python -m dask_shm_bridge.benchmarks.exchange --folder FOLDER``

Two processes of one machine stand in for two kernels: what is measured is the cost of the way, with
writing and reading overlapped or not, on the file system that FOLDER lies on. Between real kernels
``dask shm probe`` measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import Any

import click
import dask
import numpy as np
from dask.utils import format_bytes, parse_bytes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dask_shm_bridge.benchmarks.machine import describe, versions
from dask_shm_bridge.cli import HELP_OPTIONS

MiB = 1 << 20


def _settings(folder: str, piece: int | None, pool: str | bool) -> dict[str, Any]:
    return {
        "shm-bridge.pool.path": pool,
        "shm-bridge.pool.size": None,
        "shm-bridge.exchange.path": folder if piece else False,
        "shm-bridge.exchange.mode": "file",
        "shm-bridge.exchange.size": "2 GiB",
        "shm-bridge.exchange.piece": piece or "16 MiB",
    }


def _serve(settings: dict[str, Any], pipe: Connection) -> None:
    """Listen; answer each array with its last byte."""

    async def run() -> None:
        from distributed.comm import CommClosedError, listen

        async def answer(comm: Any) -> None:
            with contextlib.suppress(CommClosedError):
                while True:
                    array = (await comm.read())["x"]
                    await comm.write(int(array[-1]))

        listener = await listen("shm://127.0.0.1:0", answer)
        pipe.send(listener.contact_address)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        stopping: Any = listener.stop()
        if stopping is not None:
            await stopping

    with dask.config.set(settings):
        asyncio.run(run())


async def _measure(
    peers: dict[str, tuple[dict[str, Any], str]], sizes: list[int], rounds: int
) -> dict[int, dict[str, list[float]]]:
    from distributed.comm import connect
    from distributed.protocol import to_serialize

    comms: dict[str, Any] = {}
    for name, (settings, address) in peers.items():
        with dask.config.set(settings):
            comms[name] = await connect(address)
    seconds: dict[int, dict[str, list[float]]] = {size: defaultdict(list) for size in sizes}
    for size in sizes:
        array = np.random.default_rng(size).integers(0, 256, size, "u1")
        for turn in range(rounds + 2):
            for name, comm in comms.items():
                begun = time.perf_counter()
                await comm.write({"x": to_serialize(array)})
                last = await comm.read()
                ended = time.perf_counter()
                if last != array[-1]:
                    raise RuntimeError(f"{name}: the array did not arrive")
                if turn >= 2:  # warm
                    seconds[size][name].append(ended - begun)
    for name, comm in comms.items():
        expected = "tcp" if name == "tcp" else "shared" if name == "pool" else "file"
        if comm.mode != expected:
            raise RuntimeError(f"{name} went by {comm.mode}")
        await comm.close()
    return seconds


@click.command("exchange", context_settings=HELP_OPTIONS)
@click.option(
    "--folder", type=click.Path(exists=True, file_okay=False), help="Where.  [default: temporary]"
)
@click.option("--sizes", default="64 MiB,256 MiB", show_default=True)
@click.option("--pieces", default="4 MiB,8 MiB,16 MiB,32 MiB,64 MiB,1 GiB", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="All figures.")
def exchange(
    folder: str | None, sizes: str, pieces: str, rounds: int, json_path: str | None
) -> None:
    """Send arrays from one process to another by file, in pieces of several sizes, in turns."""
    wanted = [int(parse_bytes(size)) for size in sizes.split(",")]
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        ways = {"tcp": _settings(base, None, False), "pool": _settings(base, None, f"{base}/pool")}
        for piece in (int(parse_bytes(piece)) for piece in pieces.split(",")):
            # a folder for each: a process has one lane in a folder
            ways[format_bytes(piece)] = _settings(f"{base}/{piece}", piece, False)
        peers = {}
        for name, settings in ways.items():
            ours, theirs = context.Pipe()
            server = context.Process(target=_serve, args=(settings, theirs), daemon=True)
            server.start()
            stack.callback(server.join, 20)
            stack.callback(ours.send, None)
            peers[name] = (settings, ours.recv())
        seconds = asyncio.run(_measure(peers, wanted, rounds))
    _show(seconds)
    if json_path:
        result = {
            "benchmark": "dask-shm-bridge exchange",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe(),
            "versions": versions(),
            "seconds": {str(size): dict(found) for size, found in seconds.items()},
        }
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def _show(seconds: dict[int, dict[str, list[float]]]) -> None:
    table = Table(title="medians, ms, one way", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way")
    for size in seconds:
        table.add_column(format_bytes(size), justify="right")
    for name in next(iter(seconds.values())):
        cells = [f"{statistics.median(found[name]) * 1e3:.1f}" for found in seconds.values()]
        table.add_row(name if name in ("tcp", "pool") else f"file, {name}", *cells)
    Console().print(table)


if __name__ == "__main__":
    exchange()
