"""``python -m tests.windows make``, ``run ARGUMENTS`` or ``test``: see ``make test-windows``."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from tests.windows import build, wine
from tests.windows.conftest import ASKED

# What runs on Windows itself; the tests of this folder run here, and start Windows processes.
SUITES = [
    f"tests/test_{name}.py"
    for name in (
        *("mapping", "layout", "ledger", "folder", "pool", "views", "comm", "family", "legacy"),
    )
]


def test(more: list[str]) -> int:
    """Run all there is for Windows; 0 if it passed."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", *more]
    here = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, "tests/windows"],
        cwd=wine.REPOSITORY,
        env={**os.environ, ASKED: "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.append(here.communicate()[0]))
    reader.start()
    try:
        there = wine.stream(["-m", "pytest", "--timeout", "120", *options, *SUITES])
    finally:
        reader.join()
        wine.stop_server()
    print("\nprocesses on both sides:", flush=True)
    os.write(1, said[0])
    return there or here.returncode


def main(line: list[str]) -> int:
    """Do what is asked; 0 if it went well, or could not be done here."""
    if not build.is_made():
        start = time.monotonic()
        try:
            build.make()
        except build.CannotBuild as error:
            print(f"SKIPPED: nothing was tested on Windows, as there is none here: {error}")
            return 0
        print(f"made a Windows Python in {build.root()}: {time.monotonic() - start:.0f} s")
    what, *rest = line
    if what == "run":
        return wine.stream(rest)
    return test(rest) if what == "test" else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
