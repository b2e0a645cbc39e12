"""What a case must not do: unpickle anything, touch files elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_FILES = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_FILES |= {"os.symlink", "os.chmod", "shutil.rmtree", "os.listdir"}


class _Watch:
    def __init__(self) -> None:
        self.installed = False
        self.on = False
        self.folders: tuple[str, ...] = ()
        self.found: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "pickle.find_class":
            self.found.append(f"unpickled {arguments}")
        elif event in _FILES and arguments and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.fsdecode(arguments[0])
            # A plain name is one in an open folder of the pool's; the current one is not used.
            plain = "/" not in path and path != ".."
            # Hypothesis reads the sources of what was imported since, for constants to try.
            if "/.hypothesis/" in path or (path.endswith(".py") and arguments[1] in ("r", "rb")):
                return
            if not plain and not path.startswith((*self.folders, "/proc/", "/dev/null")):
                self.found.append(f"{event} {path}")


_watch = _Watch()


@contextlib.contextmanager
def watching(*folders: str, may_find: frozenset[tuple[str, str]] = frozenset()) -> Iterator[_Watch]:
    """Watch this process's file names and pickles (sys.addaudithook) while this lasts."""
    if not _watch.installed:
        _watch.installed = True
        sys.addaudithook(_watch.hook)
    _watch.folders, _watch.found = folders, []
    yield _watch
    _watch.on = False


@contextlib.contextmanager
def on(watch: _Watch) -> Iterator[None]:
    """Look at one case; nothing may have been found at its end."""
    watch.on = True
    try:
        yield
    finally:
        watch.on = False
    if watch.found:
        found, watch.found = watch.found, []
        raise AssertionError("; ".join(found[:5]))
