"""Runs the Windows Python of `build` as a program of this machine."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.windows import build

# What Wine says itself, of a root folder that is no drive.
_NOISE = rb"wine: Read access denied for device [^\n]*\n"
REPOSITORY = Path(__file__).resolve().parents[2]


def name_of(path: str | Path) -> str:
    """Return the name by which a Windows program knows a file of this machine."""
    return "Z:" + str(path).replace("/", "\\")


def own_environment() -> dict[str, str]:
    """Return ours, without what speaks of Python, and of where a test's pool is."""
    ours = ("PYTHON", "PYTEST", "DASK_")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours)}


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a Windows process."""
    return {
        **own_environment(),
        "WINEPREFIX": str(build.root() / "prefix"),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml,winedbg.exe=",  # nothing to be offered, no debugger
        "PYTHONUTF8": "1",
        "PYTHONPATH": name_of(REPOSITORY),
        **(extra or {}),
    }


def popen(
    line: Sequence[str], *, extra: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Start the Windows Python with the arguments in `line`.

    Its standard streams are pipes: with a plain file as one of them, CPython does not start under
    Wine 8.
    """
    return subprocess.Popen(
        [build.WINE, str(build.root() / "python.exe"), *line],
        env=environment(extra),
        stdin=options.pop("stdin", subprocess.PIPE),
        stdout=subprocess.PIPE,
        stderr=options.pop("stderr", subprocess.STDOUT),
        cwd=options.pop("cwd", REPOSITORY),
        **options,
    )


def quiet(data: bytes) -> bytes:
    """Return what a process said, without what Wine says itself."""
    return re.sub(_NOISE, b"", data)


def stream(line: Sequence[str], *, extra: Mapping[str, str] | None = None) -> int:
    """Run the Windows Python, its output going where ours goes; return its exit status."""
    with popen(line, extra=extra) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        while data := process.stdout.read1(65536):
            os.write(1, quiet(data))
    return process.returncode


def stop_server() -> None:
    """End Wine's own processes of this prefix, which would linger."""
    subprocess.run(
        ["/usr/lib/wine/wineserver64", "-k"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
