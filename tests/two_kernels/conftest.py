"""One guest for each kernel, for all tests; `make test-two-kernels` runs them.

``TWO_KERNELS`` names the kernels (``older``, ``newer`` or both, with a comma): without it these
tests are skipped, since they install programs, and since emulation takes minutes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import dask
import pytest
from process.deployment import private_pool

from dask_shm_bridge.exchange.lane import close_all

from . import far, supply
from .deployment import PATIENT, TwoSides
from .guest import Guest

WANTED = [name for name in os.environ.get("TWO_KERNELS", "").split(",") if name]
TEST_TIMEOUT_S = 1200


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.process)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))
            if not WANTED:
                item.add_marker(pytest.mark.skip("`make test-two-kernels` runs these"))


@pytest.fixture(scope="session", params=WANTED or ["none"])
def kernel(request: pytest.FixtureRequest) -> supply.Kernel:
    """Have a kernel, and all that it needs to run beside this one."""
    if request.param not in supply.KERNELS:
        raise pytest.UsageError(f"TWO_KERNELS is {request.param!r}, not of {supply.KERNELS}")
    try:
        supply.provide_programs()
        return supply.kernel(request.param)
    except supply.Missing as error:
        pytest.skip(f"no second kernel ({request.param}): {error}")


class Guests:
    """The guest of a kernel; once it has been killed, the next test has a new one."""

    def __init__(
        self, kernel: supply.Kernel, exchange: Path, folder: Callable[[], Path], say: Callable
    ) -> None:
        self._kernel = kernel
        self._exchange = exchange
        self._folder = folder
        self._say = say
        self._guest: Guest | None = None

    def get(self) -> Guest:
        if self._guest is None or not self._guest.lives:
            self.close()
            self._guest = guest = Guest(self._kernel, self._exchange, self._folder())
            self._say(
                f"guest: Linux {guest.kernel.release}, booted in {guest.boot_s:.0f} s, "
                f"Python with Dask after another {guest.python_s:.0f} s"
            )
        return self._guest

    def close(self) -> None:
        if self._guest is not None:
            self._guest.kill()


@pytest.fixture(scope="session")
def exchange(kernel: supply.Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the folder that both kernels see; at the end nothing may be left in it."""
    folder = tmp_path_factory.mktemp("exchange")
    yield folder
    left = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder)
    assert not left, f"left in the exchange folder: {left}"


@pytest.fixture(scope="session")
def guests(
    kernel: supply.Kernel,
    exchange: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Iterator[Guests]:
    """Keep this kernel's guest."""
    plugins = pytestconfig.pluginmanager
    reporter, capture = map(plugins.get_plugin, ("terminalreporter", "capturemanager"))

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.write_line(f"\n{text}")

    kept = Guests(kernel, exchange, lambda: tmp_path_factory.mktemp("guest"), say)
    yield kept
    kept.close()


@pytest.fixture
def guest(guests: Guests) -> Guest:
    """Have the second kernel."""
    return guests.get()


# What the processes of both sides are set to. Slots are small, so that they are used again and
# again: a few hundred MiB of arrays go through 24 MiB.
EXCHANGE = {
    "shm-bridge.threshold": "64 KiB",
    "shm-bridge.exchange.mode": "file",
    "shm-bridge.exchange.size": "24 MiB",
    "shm-bridge.exchange.piece": "2 MiB",
    "shm-bridge.pool.size": "128 MiB",
    "shm-bridge.pool.slot-size": "16 MiB",
    "shm-bridge.pool.linger": "1s",
}
GUEST_POOL = "/dev/shm/shm-bridge"


class Sides(Protocol):
    """Starts a scheduler on a side, with the exchange folder mounted in one way in the guest."""

    def __call__(
        self, scheduler: str, way: str = "mmap", **guest_config: Any
    ) -> contextlib.AbstractContextManager[TwoSides]:
        """Yield it; workers are to be added."""


@pytest.fixture
def pool_folder() -> Iterator[Path]:
    """Stand in for the fixture of this name above: these tests leave pools on both sides."""
    with private_pool(**{}) as config:
        yield Path(config["shm-bridge.pool.path"])


@pytest.fixture
def sides(guests: Guests, exchange: Path, pool_folder: Path, tmp_path: Path) -> Iterator[Sides]:
    """Make clusters of which each side has a pool of its own, and both the exchange folder."""
    common = {**PATIENT, **EXCHANGE}
    host = {
        **common,
        "shm-bridge.pool.path": str(pool_folder),
        "shm-bridge.exchange.path": str(exchange),
    }

    @contextlib.contextmanager
    def make(scheduler: str, way: str = "mmap", **guest_config: Any) -> Iterator[TwoSides]:
        there = {
            **common,
            "shm-bridge.pool.path": GUEST_POOL,
            "shm-bridge.exchange.path": f"/mnt/{way}",
            **guest_config,
        }
        with (
            dask.config.set(host),
            TwoSides(guests.get(), tmp_path, host, there, scheduler, "shm") as two,
        ):
            yield two

    with dask.config.set(host):
        yield make
        gc.collect()
        close_all()
    assert not guests.get().call(far.living), "processes are left in the guest"
    for _ in range(100):
        left = sorted(path.name for path in exchange.iterdir())
        if not left:
            break
        time.sleep(0.1)
    assert not left, f"left in the exchange folder: {left}"
