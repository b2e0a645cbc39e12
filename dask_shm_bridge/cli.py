"""``dask shm …``. Dask loads this at each call of its command, so it imports click alone."""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def shm() -> None:
    """Move arrays between processes of one host through a shared memory pool."""


_FORWARD = {"ignore_unknown_options": True, "help_option_names": []}


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: tuple[str, ...]) -> None:
    """Run the same jobs over the pool, TCP and .npy files, and compare (--help for options)."""
    from dask_shm_bridge.demo import main

    raise SystemExit(main(list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Measure transfers of many sizes over the pool, TCP and others (--help for options)."""
    from dask_shm_bridge.benchmarks.command import main

    raise SystemExit(main(list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def check(arguments: tuple[str, ...]) -> None:
    """Look whether the pool and its ledger are right (--help for options)."""
    from dask_shm_bridge.recovery.command import main

    raise SystemExit(main("check", list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def sweep(arguments: tuple[str, ...]) -> None:
    """Take away what dead processes left in the pool (--help for options)."""
    from dask_shm_bridge.recovery.command import main

    raise SystemExit(main("sweep", list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def doctor(arguments: tuple[str, ...]) -> None:
    """Check this machine and a cluster, and say what to change (--help for options)."""
    from dask_shm_bridge.doctor.command import main

    raise SystemExit(main(list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def probe(arguments: tuple[str, ...]) -> None:
    """Show whether this process and a server may share memory, and how fast (--help)."""
    from dask_shm_bridge.exchange.command import main

    raise SystemExit(main(list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def status(arguments: tuple[str, ...]) -> None:
    """Show what is in the pool: slots, members, leases and rates (--help for options)."""
    from dask_shm_bridge.status.command import main

    raise SystemExit(main("status", list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def config(arguments: tuple[str, ...]) -> None:
    """Show the configuration, and whether it can be used (--help for options)."""
    from dask_shm_bridge.status.command import main

    raise SystemExit(main("config", list(arguments)))


@shm.command(context_settings=_FORWARD)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def clean(arguments: tuple[str, ...]) -> None:
    """Remove what nobody living uses (--help for options)."""
    from dask_shm_bridge.status.command import main

    raise SystemExit(main("clean", list(arguments)))
