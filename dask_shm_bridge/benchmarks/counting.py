"""What counting costs: messages with and without it, in turns; a heartbeat; a scrape; a look.

``python -m dask_shm_bridge.benchmarks.counting``
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import time
from typing import Any

import click

from dask_shm_bridge.cli import HELP_OPTIONS

_COUNTING = ("count", "count_device", "moved", "fallback")


def _switch(on: bool, kept: dict[str, Any]) -> None:
    from dask_shm_bridge import counters

    for name in _COUNTING:
        kept.setdefault(name, getattr(counters, name))
        setattr(counters, name, kept[name] if on else _nothing)


def _nothing(*args: Any) -> None:
    pass


async def _answer(comm: Any) -> None:
    kept: dict[str, Any] = {}
    while True:
        message = await comm.read()
        if message["next"] is None:
            await comm.close()
            return
        await comm.write({"op": "answer"})
        _switch(message["next"], kept)


def _serve(settings: dict[str, Any], pipe: Any) -> None:
    import dask
    from distributed.comm import listen

    async def main() -> None:
        done = asyncio.Event()

        async def handle(comm: Any) -> None:
            await _answer(comm)
            done.set()

        listener = await listen("shm://127.0.0.1:0", handle)
        pipe.send(listener.contact_address)
        await done.wait()
        listener.stop()

    with dask.config.set(settings):
        asyncio.run(main())


async def _measure(address: str, nbytes: int, pairs: int) -> dict[bool, list[float]]:
    import numpy as np
    from distributed.comm import connect
    from distributed.protocol import to_serialize

    comm = await connect(address)
    if comm.mode != "shared":
        raise click.ClickException("the two processes share no pool")
    x = np.ones(nbytes, dtype="u1")
    kept: dict[str, Any] = {}
    found: dict[bool, list[float]] = {True: [], False: []}
    on = False
    for number in range(2 * pairs):
        following = bool((number + 1 + (number + 1) // 2) % 2)  # off, on, on, off: drift cancels
        _switch(on, kept)
        await asyncio.sleep(0)
        start = time.perf_counter()
        await comm.write({"next": following, "x": to_serialize(x)})
        await comm.read()
        found[on].append(time.perf_counter() - start)
        on = following
    _switch(True, kept)
    await comm.write({"next": None})
    await comm.close()
    return found


def _mean_us(job: Any, rounds: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(rounds):
        job()
    return (time.perf_counter() - start) / rounds * 1e6


@click.command(context_settings=HELP_OPTIONS)
@click.option("--size", default="1 MB", show_default=True, help="Bytes of a message's array.")
@click.option(
    "--pairs", default=10_000, show_default=True, help="Messages with, and as many without."
)
@click.option("--pool", default=None, help="Folder of the pool.")
def main(size: str, pairs: int, pool: str | None) -> None:
    """Measure what counting costs where arrays move, and what showing the figures costs."""
    import dask
    import msgpack
    from dask.utils import parse_bytes

    from dask_shm_bridge import counters, figures, metrics
    from dask_shm_bridge.store import attached, detach_all

    settings = {"shm-bridge.threshold": "64 KiB"}
    if pool is not None:
        settings["shm-bridge.pool.path"] = pool
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    with dask.config.set(settings):
        peer = context.Process(target=_serve, args=(settings, theirs))
        peer.start()
        found = asyncio.run(_measure(ours.recv(), int(parse_bytes(size)), pairs))
        peer.join(30)
        off, on = (statistics.median(found[key]) * 1e6 for key in (False, True))
        differences = sorted((b - a) * 1e6 for a, b in zip(found[False], found[True], strict=True))
        middle, half = len(differences) // 2, int(0.98 * len(differences) ** 0.5)
        click.echo(f"{size} and an answer: {off:.1f} us without counting, {on:.1f} with (medians)")
        click.echo(
            f"  median of the differences of neighbours {differences[middle]:+.2f} us, "
            f"95 % interval {differences[middle - half]:+.2f} to {differences[middle + half]:+.2f}"
        )
        one = _mean_us(lambda: counters.count("sent", "copied", 1))
        two = _mean_us(lambda: counters.moved("sent", {"copied": [1000]}, 1e-3))
        click.echo(
            f"counting a frame: {one:.2f} us; a message in the pool, with its time: {two:.2f} us"
        )
        packed = len(msgpack.packb(figures.figures()))
        click.echo(f"figures for a heartbeat: {_mean_us(figures.figures):.0f} us, {packed} bytes")
        joined = attached()
        if joined is not None:
            click.echo(f"a look into the ledger: {_mean_us(joined.ledger.snapshot):.0f} us")
        try:
            collector = metrics.Collector()
            scrape = _mean_us(lambda: list(collector.collect()), 200)
            click.echo(f"collecting for a scrape: {scrape:.0f} us")
        except ImportError:
            pass
        detach_all()


if __name__ == "__main__":
    main()
