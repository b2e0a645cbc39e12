"""Records the warnings of one thread, beside others that warn at the same time."""

from __future__ import annotations

import contextlib
import pickle
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()
_records: dict[int, list[Warning]] = {}
_stack = contextlib.ExitStack()
_shown: Any = None


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    record = _records.get(threading.get_ident())
    if record is None:
        _shown(message, category, filename, lineno, file, line)
    else:
        record.append(message if isinstance(message, Warning) else category(message))


@contextlib.contextmanager
def recorded() -> Iterator[list[Warning]]:
    """Collect what this thread warns of.

    `warnings.catch_warnings` changes the whole process, and two of them that overlap in two
    threads leave the filters of one behind. So the first in sets them and the last out puts
    them back. Other threads' warnings are shown in between, repeated ones too.
    """
    global _shown
    ident = threading.get_ident()
    record: list[Warning] = []
    with _lock:
        outer = _records.get(ident)
        if not _records:
            # A user's catch_warnings that began during an earlier call and ended after it put our
            # hook back: it is not to lead to itself.
            if warnings.showwarning is not _show:
                _shown = warnings.showwarning
            _stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = _show
        _records[ident] = record
    try:
        yield record
    finally:
        with _lock:
            if outer is not None:
                _records[ident] = outer
            else:
                del _records[ident]
            if not _records:
                _stack.close()


def portable(record: list[Warning]) -> list[tuple[bytes | None, str]]:
    """Return warnings so that a process without their class can still say them."""
    result: list[tuple[bytes | None, str]] = []
    for warning in record:
        data: bytes | None = None
        with contextlib.suppress(Exception):
            data = pickle.dumps(warning)
        result.append((data, f"{type(warning).__name__}: {warning}"))
    return result


def say_again(said: list[tuple[bytes | None, str]], stacklevel: int) -> None:
    """Raise warnings again, in this process; those of unknown classes as UserWarning."""
    for data, text in said:
        warning: Warning = UserWarning(text)
        if data is not None:
            with contextlib.suppress(Exception):
                warning = pickle.loads(data)
        warnings.warn(warning, stacklevel=stacklevel + 1)
