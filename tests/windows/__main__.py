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
FIRST = ("mapping", "layout", "ledger", "folder", "pool")
SECOND = ("views", "comm", "family", "legacy")


def _suites(names: tuple[str, ...], options: list[str]) -> list[str]:
    files = [f"tests/test_{name}.py" for name in names]
    return ["-m", "pytest", "--timeout", "120", *options, *files]


def test(more: list[str]) -> int:
    """Run all there is for Windows, on two processors; 0 if it passed."""
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", *more]
    said: list[bytes] = []
    codes: list[int] = []

    def beside() -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, "tests/windows"],
            cwd=wine.REPOSITORY,
            env={**os.environ, ASKED: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as here:
            said.append(here.communicate()[0])
        with wine.popen(_suites(SECOND, options)) as there:
            said.append(wine.quiet(there.communicate()[0]))
        codes.extend([here.returncode, there.returncode])

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        codes.append(wine.stream(_suites(FIRST, options)))
    finally:
        thread.join()
        wine.stop_server()
    for title, text in zip(("processes on both sides", "more suites"), said, strict=False):
        print(f"\n{title}:", flush=True)
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
    return int(len(codes) < 3 or any(codes))


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
