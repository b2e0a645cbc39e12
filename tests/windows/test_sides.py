"""Windows processes among themselves, and with Linux: each side is a program of `side`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.windows import build, wine

MiB = 1024 * 1024
PATIENCE_S = 240.0
CONFIG = {"DASK_SHM_BRIDGE__THRESHOLD": "4096", "DASK_SHM_BRIDGE__POOL__SIZE": "256 MiB"}


class Side:
    """A process of one side; what it says is heard line by line.

    Parameters
    ----------
    platform : {"win32", "linux"}
        Which side.
    part : str
        A part of `side`.
    pool : Path
        Linux's pool.
    exchange : Path or None
        A folder that both sides hand files over in.
    **options
        Of the part.
    """

    def __init__(
        self, platform: str, part: str, pool: Path, exchange: Path | None = None, **options: Any
    ) -> None:
        line = ["-m", "tests.windows.side", part, json.dumps(options)]
        config = dict(CONFIG)
        if exchange is not None:
            name = wine.name_of(exchange) if platform == "win32" else str(exchange)
            config["DASK_SHM_BRIDGE__EXCHANGE__PATH"] = name
            config["DASK_SHM_BRIDGE__EXCHANGE__MODE"] = "file"  # whether or not it is faster
        if platform == "win32":
            self.process = wine.popen(line, extra=config)
        else:
            self.process = subprocess.Popen(
                [sys.executable, *line],
                env={
                    **wine.own_environment(),
                    **config,
                    "DASK_SHM_BRIDGE__POOL__PATH": str(pool),
                    "PYTHONPATH": str(wine.REPOSITORY),
                },
                cwd=wine.REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        self.lines: list[str] = []
        self._timer = threading.Timer(PATIENCE_S, self.process.kill)
        self._timer.start()

    def hear(self) -> dict[str, Any]:
        """Wait for what it has to say."""
        assert self.process.stdout is not None
        for data in self.process.stdout:
            line = data.decode(errors="replace").strip()
            self.lines.append(line)
            if line.startswith('{"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError("it said nothing more: " + "\n".join(self.lines[-60:]))

    def rest(self) -> str:
        """Close its input, and return what it said last."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.lines += self.process.stdout.read().decode(errors="replace").splitlines()
        return "\n".join(self.lines[-60:])

    def end(self) -> None:
        """Close its input, and wait for a good end."""
        said = self.rest()
        assert self.process.wait() == 0, said

    def close(self) -> None:
        self._timer.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@pytest.fixture
def linux_pool() -> Iterator[Path]:
    """Give the Linux side a pool of its own; that of Windows is in its default place."""
    folder = Path("/dev/shm") / f"shm-bridge-test-{os.getpid()}-{secrets.token_hex(4)}"
    yield folder
    left = sorted(os.listdir(folder)) if folder.exists() else []
    shutil.rmtree(folder, ignore_errors=True)
    assert left in ([], ["lock"]), f"the Linux side left {left}"


@pytest.fixture(autouse=True)
def windows_pool() -> Iterator[None]:
    """See that nothing is left in the default place on Windows."""
    yield
    users = build.root() / "prefix" / "drive_c" / "users"
    left = [
        name
        for folder in users.glob("*/AppData/Local/dask-shm-bridge")
        for name in os.listdir(folder)
        if name != "lock"
    ]
    assert not left, f"the Windows side left {left}"


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[Path]:
    """Give a folder that both sides see; no file of theirs is left in it."""
    folder = tmp_path / "exchange"
    folder.mkdir(0o700)
    yield folder
    assert os.listdir(folder) == []


def talk(
    here: str,
    there: str,
    part: str,
    pool: Path,
    cluster: dict[str, Any],
    exchange: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run a part against a cluster; return what it found."""
    with contextlib.ExitStack() as stack:
        far = Side(there, "cluster", pool, exchange, **cluster)
        stack.callback(far.close)
        addresses = dict(zip(("shm", "tcp"), far.hear()["addresses"], strict=False))
        near = Side(here, part, pool, exchange, **addresses, **options)
        stack.callback(near.close)
        try:
            found = near.hear()
            near.end()
        except AssertionError as error:
            raise AssertionError(f"{error}\nThe other side:\n{far.rest()}") from None
        far.end()
    return found


def test_windows_processes_share_a_pool(linux_pool: Path) -> None:
    """One process is the client, one the scheduler, two are workers."""
    found = talk(
        "win32",
        "win32",
        "moves",
        linux_pool,
        {"protocols": ["shm"], "workers": 2, "processes": True},
        nbytes=8 * MiB,
    )
    for name, route in found["routes"].items():
        ways = route["ways"]
        assert route["good"], name
        # each route was taken twice
        assert ways["client sent copied"] == 16 * MiB, (name, ways)
        assert ways["client received viewed"] == 16 * MiB, (name, ways)
        # what nobody has written into is passed on by reference, by whoever relays it
        assert ways["scheduler sent referenced"] == ways["scheduler received viewed"], (name, ways)
        assert ways["workers sent referenced"] == ways["workers received viewed"], (name, ways)
        assert not any(
            nbytes
            for way, nbytes in ways.items()
            if way.endswith("sent copied") and not way.startswith("client")
        ), (name, ways)
        assert all(n < 100_000 for way, n in ways.items() if "inline" in way), (name, ways)
    assert found["routes"]["worker to worker"]["ways"]["workers received viewed"] == 32 * MiB
    assert found["written"] == 42
    assert found["left"] == {"leases": 0, "tickets": 0}


def test_a_windows_process_that_is_killed(linux_pool: Path) -> None:
    """It is seen to be dead, and what it held is had again; who joins then looks at the ledger."""
    with contextlib.ExitStack() as stack:

        def start(part: str, **options: Any) -> Side:
            side = Side("win32", part, linux_pool, **options)
            stack.callback(side.close)
            return side

        def look(**options: Any) -> dict[str, Any]:
            side = start("look", **options)
            found = side.hear()
            side.end()
            return found

        one = start("member", nbytes=MiB)
        assert one.hear() == {"members": 1, "right": True}
        two = start("member", nbytes=MiB)
        assert two.hear() == {"members": 2, "right": True}
        held = {"alive": ["True", "True"], "held": 2 * MiB, "found": [], "gone": 0}
        assert look(sweeping=False) == held
        two.process.kill()
        two.process.wait()
        seen = look(sweeping=False)
        assert seen["alive"] == ["False", "True"]
        assert seen["found"] == ["dead"]
        three = start("member", nbytes=MiB)  # which sweeps
        assert three.hear() == {"members": 2, "right": True}
        assert look(sweeping=False) == held
        three.process.kill()
        three.process.wait()
        swept = {"alive": ["True"], "held": MiB, "found": [], "gone": 1}
        assert look(sweeping=True) == swept
        one.process.kill()
        one.process.wait()
        # nobody is left: all of it goes
        assert look(sweeping=True) == {"alive": [], "held": 0, "found": [], "gone": 1}


@pytest.mark.parametrize(("here", "there"), [("win32", "linux"), ("linux", "win32")])
def test_windows_and_linux_agree_on_tcp(linux_pool: Path, here: str, there: str) -> None:
    found = talk(here, there, "matrix", linux_pool, {"protocols": ["shm", "tcp"]})
    assert (found["here"], found["far"]) == (here, there)
    assert not found["wrong"]
    assert found["compared"] > 200
    # Over TCP, too: a long double is not the same on both, nor is Dask's trust in other sizes.
    assert set(found["unmade"]) <= {"memmap r", "memmap c", "memmap part"}
    assert len(found["raised"]) < 20, found["raised"]
    assert found["causes"] == ["no-common-pool"]
    for ways in found["ways"]:
        moved = {way for way, nbytes in ways.items() if nbytes and way.startswith("client")}
        assert moved == {"client sent inline", "client received inline"}, ways
    # the far side's own two processes' halves share a pool of theirs meanwhile
    assert found["ways"][0]["scheduler sent copied"] > 0


@pytest.mark.parametrize(("here", "there"), [("win32", "linux"), ("linux", "win32")])
def test_arrays_go_by_file(linux_pool: Path, exchange: Path, here: str, there: str) -> None:
    """The client on one side, the scheduler and a worker on the other, a process each."""
    cluster = {"protocols": ["shm"], "processes": True}
    found = talk(here, there, "by_file", linux_pool, cluster, exchange, arrays=60)
    assert (found["here"], found["far"]) == (here, there)
    total, ways = found["total"], found["ways"]
    for who in ("client", "scheduler"):
        for direction in ("sent", "received"):
            assert ways[f"{who} {direction} file"] == total, ways
    # on their own side the scheduler and the worker have a pool
    assert ways["scheduler sent referenced"] == ways["workers received viewed"] == total, ways
    assert found["modes"] == ["file"]
    assert found["fallbacks"] == {}


def test_estimators_from_windows(linux_pool: Path) -> None:
    found = talk("win32", "linux", "estimators", linux_pool, {"protocols": ["shm"]})
    assert (found["here"], found["far"]) == ("win32", "linux")
    assert found["sklearn"] is False
    assert found["n_clusters"] == 4
    assert found["one_to_one"]
    assert found["reduced"] == ["ndarray", [400, 2]]
    assert found["error"] < 0.5
