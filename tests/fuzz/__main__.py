"""``python -m tests.fuzz``: many cases over each entry; each has a number, to be had again by."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import importlib
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import click
import dask

ENTRIES = {
    "frames": "messages.frames",
    "handshake": "messages.handshake",
    "control-items": "exchange.control_items",
    "exchange-handshake": "exchange.exchange_handshake",
    "pool-header": "headers.pool_header",
    "family-header": "headers.family_header",
    "device-header": "headers.device_header",
    "legacy": "legacy.legacy_message",
    "config": "headers.settings",
    "ledger-record": "store.ledger_record",
    "ledger-rules": "store.ledger_rules",
    "ledger-pages": "store.ledger_pages",
    "pool-files": "store.pool_files",
}
_HANG_S = 60
_STEP = 1000


def entry(name: str) -> Any:
    """Return an entry: a context manager that gives the function of its cases."""
    module, _, function = ENTRIES[name].partition(".")
    return getattr(importlib.import_module(f"{__package__}.{module}"), function)()


@contextlib.contextmanager
def own_pool() -> Iterator[None]:
    """Have a small pool in a new folder, and nothing of it at the end."""
    folder = tempfile.mkdtemp(prefix="shm-bridge-fuzz-", dir="/dev/shm")
    config = {
        "shm-bridge.pool.path": folder,
        "shm-bridge.pool.size": "16 MiB",
        "shm-bridge.pool.slot-size": "1 MiB",
        "shm-bridge.pool.linger": "1h",
        "shm-bridge.copy-threads": 1,
        "shm-bridge.hold-limit": 0.01,  # so that some frames are viewed, and some copied out
    }
    try:
        with dask.config.set(config):
            yield
    finally:
        shutil.rmtree(folder)


def run(name: str, case: Callable[[Random], str], first: int, cases: int) -> None:
    """Run cases by number; a violation says which."""
    outcomes: collections.Counter[str] = collections.Counter()
    start = time.monotonic()
    for number in range(first, first + cases):
        if number % 100 == 0:
            faulthandler.dump_traceback_later(_HANG_S, exit=True)
        try:
            outcomes[case(Random(number))] += 1
        except BaseException:
            click.echo(f"{name}: case {number}", err=True)
            raise
        if (number - first + 1) % _STEP == 0:
            click.echo(f"{name}: {number - first + 1} cases", err=True)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    click.echo(f"{name}: {cases} cases from {first} in {seconds:.0f} s, {peak} MiB: {counts}")


@click.command()
@click.option("--entry", "names", multiple=True, type=click.Choice(tuple(ENTRIES)), help="[all]")
@click.option("--cases", default=2000, show_default=True, type=click.IntRange(1))
@click.option("--first", default=0, show_default=True, help="Number of the first case.")
@click.option("--atheris", is_flag=True, help="Led by coverage, for --cases runs of one entry.")
def main(names: tuple[str, ...], cases: int, first: int, atheris: bool) -> None:
    """Feed bad input to everything that reads what comes from outside the process."""
    faulthandler.enable()
    if atheris:
        _atheris(names, cases)
        return
    for name in names or ENTRIES:
        with own_pool(), entry(name) as case:
            run(name, case, first, cases)


def _atheris(names: tuple[str, ...], cases: int) -> None:
    import atheris
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    (name,) = names
    with atheris.instrument_imports(include=["dask_shm_bridge"]):
        made = entry(name)
    with own_pool(), made as case:

        @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def one(rng: Random) -> None:
            case(rng)

        atheris.Setup([sys.argv[0], f"-runs={cases}"], one.hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
