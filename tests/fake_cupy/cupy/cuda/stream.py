"""Streams and events: a queue each, which runs when somebody waits for it."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from cupy import fake

_pointers = itertools.count(0x1000, 0x10)
_by_pointer: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
_local = threading.local()


class Stream:
    null: Stream

    def __init__(self, null: bool = False, non_blocking: bool = False) -> None:
        self.ptr = 0 if null else next(_pointers)
        self.non_blocking = non_blocking
        self._queue: list[Any] = []
        self._done = 0
        self._running = threading.RLock()
        _by_pointer[self.ptr] = self
        fake.streams.add(self)

    def _add(self, job: Callable[[], None]) -> None:
        with fake.lock:
            self._queue.append(job)

    def _waiting(self) -> list[Any]:
        return self._queue[self._done :]

    def _run(self, until: int) -> None:
        with self._running:
            while self._done < until:
                try:
                    self._queue[self._done]()
                finally:
                    self._queue[self._done] = None
                    self._done += 1

    def synchronize(self) -> None:
        self._run(len(self._queue))

    def _finish(self) -> None:
        """Do what comes before a piece of work on this stream: the legacy one waits for others."""
        for stream in _blocking() if self.ptr == 0 else [self]:
            stream.synchronize()

    def wait_event(self, event: Event) -> None:
        self._add(event.synchronize)

    def record(self, event: Event) -> None:
        event.record(self)

    def later(self, job: Callable[[], None]) -> None:
        """Run a "kernel" on this stream."""
        self._add(job)

    def __enter__(self) -> Stream:
        _local.current = [*getattr(_local, "current", []), self]
        return self

    def __exit__(self, *_: object) -> None:
        _local.current.pop()


def _blocking() -> list[Stream]:
    return [stream for stream in list(fake.streams) if not stream.non_blocking]


class Event:
    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self._marks: list[tuple[Stream, int]] = []

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        streams = _blocking() if stream.ptr == 0 else [stream]
        self._marks = [(one, len(one._queue)) for one in streams]

    def synchronize(self) -> None:
        for stream, until in self._marks:
            stream._run(until)


def get_current_stream() -> Stream:
    current = getattr(_local, "current", None)
    return current[-1] if current else Stream.null


def by_pointer(pointer: int) -> Stream:
    return _by_pointer[pointer]


Stream.null = Stream(null=True)
