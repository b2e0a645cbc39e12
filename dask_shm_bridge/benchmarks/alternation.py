"""Measuring several ways side by side: one run of each in turn, again and again."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from dask_shm_bridge.benchmarks.cases import BIG_BYTES, CASES, TINY_BYTES, Way
from dask_shm_bridge.benchmarks.deadline import within
from dask_shm_bridge.benchmarks.payload import Words, change, generate
from dask_shm_bridge.benchmarks.traffic import Traffic


@dataclass
class Measurement:
    """What one way took for one case at one size.

    Attributes
    ----------
    case, way
        Their names.
    size_bytes
        Size of the array moved.
    seconds
        Every timed run, in the order taken.
    error
        What went wrong, or None. No run follows an error.
    traffic
        What moved by which way, warm-up and checks included; None where nobody counts.
    """

    case: str
    way: str
    size_bytes: int
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    traffic: Traffic | None = None

    @property
    def median(self) -> float | None:
        """Median of the timed runs, in seconds; None without any or after an error."""
        return statistics.median(self.seconds) if self.seconds and not self.error else None

    def as_dict(self) -> dict[str, Any]:
        """Return everything, raw samples included, for JSON."""
        return {
            "case": self.case,
            "way": self.way,
            "size_bytes": self.size_bytes,
            "median_s": self.median,
            "min_s": min(self.seconds, default=None),
            "max_s": max(self.seconds, default=None),
            "samples_s": self.seconds,
            "error": self.error,
            "traffic": self.traffic.as_dict() if self.traffic else None,
        }


class Alternation:
    """Runs every case of every way, the ways in turn.

    Parameters
    ----------
    ways
        The ways to compare.
    reps
        Timed runs of each.
    deadline_seconds
        A run that takes longer counts as hung; its way is not asked again.
    advance
        Called with a short text after every run.

    Notes
    -----
    Each run happens in a thread of its own, so that a hung one can be left behind. Nothing but
    the bodies of the cases is timed, so starting the thread costs nobody anything.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        reps: int,
        deadline_seconds: float = 120.0,
        advance: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.ways = list(ways)
        self.reps = reps
        self.deadline_seconds = deadline_seconds
        self.advance = advance
        self.hung: set[str] = set()
        self._numbers = count(1)

    def plan(self, sizes: Sequence[int], cases: Sequence[str]) -> list[tuple[str, int]]:
        """List what is measured: each case at each size, ``tiny`` at its own alone."""
        plan = [(case, size) for size in sizes for case in cases if case != "tiny"]
        return plan + [("tiny", TINY_BYTES)] * ("tiny" in cases)

    def runs(self, plan: Sequence[tuple[str, int]]) -> int:
        """Count the runs of `plan`, warm-up included."""
        return sum(
            self.reps + _warm_ups(size)
            for case, size in plan
            for way in self.ways
            if case in way.case_methods()
        )

    def measure(self, plan: Sequence[tuple[str, int]]) -> Iterator[list[Measurement]]:
        """Yield the measurements of each case and size of `plan`, one a way."""
        array: Words = generate(0, 0)
        for case, size_bytes in plan:
            if case not in CASES:
                raise ValueError(f"no case {case!r}; there are {', '.join(CASES)}")
            if array.nbytes != size_bytes:
                array = generate(size_bytes, next(self._numbers))
            yield self._measure(case, array)

    def _measure(self, case: str, array: Words) -> list[Measurement]:
        ways = [way for way in self.ways if case in way.case_methods()]
        results = {way.name: Measurement(case, way.name, array.nbytes) for way in ways}
        before = {way.name: self._traffic(way) for way in ways}
        for turn in range(-_warm_ups(array.nbytes), self.reps):
            for way in ways:
                self._take(way, results[way.name], array, timed=turn >= 0)
        for way in ways:
            then, now = before[way.name], self._traffic(way)
            results[way.name].traffic = now.since(then) if now and then else None
        return list(results.values())

    def _traffic(self, way: Way) -> Traffic | None:
        if way.name in self.hung:
            return None
        try:
            return within(self.deadline_seconds, way.traffic)
        except TimeoutError:
            self.hung.add(way.name)
            return None

    def _take(self, way: Way, result: Measurement, array: Words, timed: bool) -> None:
        """Do one run and note its outcome; after an error, do nothing but advance."""
        if way.name in self.hung and not result.error:
            result.error = "not run: an earlier run hung"
        if not result.error:
            number = next(self._numbers)
            change(array, number)
            try:
                seconds = within(self.deadline_seconds, lambda: _run(way, result, array, number))
                result.seconds.extend(seconds if timed else ())
            except TimeoutError as error:
                self.hung.add(way.name)
                result.error = str(error)
            except Exception as error:
                result.error = repr(error)
        self.advance(f"{result.case} {way.name}")


def _run(way: Way, result: Measurement, array: Words, number: int) -> list[float]:
    seconds = way.run(result.case, array, number)
    way.settle()
    return seconds


def _warm_ups(size_bytes: int) -> int:
    return 2 if size_bytes >= BIG_BYTES else 1
