"""What the measurements say: a table for people, a file for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dask_shm_bridge.benchmarks.alternation import Measurement
from dask_shm_bridge.benchmarks.cases import CASES
from dask_shm_bridge.benchmarks.machine import describe, versions

_UNITS = ("B", "KiB", "MiB", "GiB")


def size_text(size_bytes: int) -> str:
    """Write a size the way people do: ``64 KiB``.

    Examples
    --------
    >>> size_text(64 * 1024), size_text(3 * 2**29), size_text(100)
    ('64 KiB', '1.5 GiB', '100 B')
    """
    value, unit = float(size_bytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {_UNITS[unit]}"


def ratios(measurements: Iterable[Measurement]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Compare medians with those of ``tcp`` and ``memcpy`` for the same case and size.

    Returns
    -------
    dict
        By case, size and way: ``tcp_over_this`` (how many times as fast as tcp) and
        ``this_over_memcpy`` (how many copies' worth of time); None where either is missing.
    """
    medians = {(m.case, m.size_bytes, m.way): m.median for m in measurements}
    return {
        (case, size, way): {
            "tcp_over_this": _quotient(medians.get((case, size, "tcp")), median),
            "this_over_memcpy": _quotient(median, medians.get((case, size, "memcpy"))),
        }
        for (case, size, way), median in medians.items()
    }


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """Lay the measurements out for a terminal: one table a case, one line a size and way."""
    compared = ratios(measurements)
    sheets = []
    for case in dict.fromkeys(m.case for m in measurements):
        sheet = Table(
            title=f"{case}: {CASES[case]}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1),
            pad_edge=False,
        )
        sheet.add_column("size", justify="right", no_wrap=True)
        sheet.add_column("way", no_wrap=True)
        for heading in ("median ms", "min .. max ms", "tcp/this", "this/memcpy", "runs"):
            sheet.add_column(heading, justify="right", no_wrap=True)
        previous = -1
        for m in (m for m in measurements if m.case == case):
            if previous not in (-1, m.size_bytes):
                sheet.add_section()
            size = "" if previous == m.size_bytes else size_text(m.size_bytes)
            previous = m.size_bytes
            ratio = compared[m.case, m.size_bytes, m.way]
            sheet.add_row(size, m.way, *_figures(m, ratio), style="red" if m.error else None)
        sheets.append(sheet)
    return sheets


def complaints(measurements: Sequence[Measurement]) -> list[str]:
    """Say what failed, and which frames could not take the pool, the same thing once."""
    sizes: dict[str, list[str]] = {}
    for m in measurements:
        said = []
        if m.error:
            said.append(f"{m.case} over {m.way} failed: {m.error}")
        if m.traffic and m.traffic.fallbacks.total():
            causes = ", ".join(sorted(key for key, n in m.traffic.fallbacks.items() if n))
            said.append(f"{m.case} over {m.way}, frames fell back: {causes}")
        for text in said:
            sizes.setdefault(text, []).append(size_text(m.size_bytes))
    return [f"{text} ({', '.join(found)})" for text, found in sizes.items()]


def document(measurements: Sequence[Measurement], settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that is known of a run, raw samples included, ready for JSON."""
    compared = ratios(measurements)
    return {
        "benchmark": "dask-shm-bridge",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "-m", "dask_shm_bridge.benchmarks", *sys.argv[1:]],
        "settings": settings,
        "machine": describe(),
        "versions": versions(),
        "results": [m.as_dict() | compared[m.case, m.size_bytes, m.way] for m in measurements],
    }


def write(path: str, measurements: Sequence[Measurement], settings: dict[str, Any]) -> None:
    """Write `document` to a JSON file at `path`."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document(measurements, settings), file, indent=1)
        file.write("\n")


def _figures(m: Measurement, ratio: dict[str, Any]) -> tuple[str, ...]:
    if m.error or not m.seconds:
        return ("failed", "", "", "", str(len(m.seconds)))
    return (
        _text((m.median or 0) * 1e3),
        f"{_text(min(m.seconds) * 1e3)} .. {_text(max(m.seconds) * 1e3)}",
        _text(ratio["tcp_over_this"]),
        _text(ratio["this_over_memcpy"]),
        str(len(m.seconds)),
    )


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _text(number: float | None) -> str:
    if number is None:
        return "-"
    return f"{number:.2f}" if number < 100 else f"{number:.0f}"
