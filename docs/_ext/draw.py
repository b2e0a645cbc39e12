"""The pictures of the documentation; ``python docs/_ext/draw.py`` writes them to docs/_static.

The states of an extent come from the two tables below, which tests compare with what the ledger
does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

STATIC = Path(__file__).resolve().parents[1] / "_static"

# What names an extent.
STATES = {
    "free": "not in the ledger",
    "held": "leases",
    "sent": "leases and tickets",
    "in transit": "tickets alone",
}

# Every change of an extent's state, and the operations of the ledger that make it.
CHANGES: dict[tuple[str, str], tuple[str, ...]] = {
    ("free", "held"): ("allocate",),
    ("free", "sent"): ("ship",),
    ("held", "sent"): ("ship",),
    ("sent", "held"): ("adopt", "give_back", "leave"),
    ("sent", "in transit"): ("give_back", "leave"),
    ("in transit", "held"): ("adopt",),
    ("in transit", "sent"): ("adopt",),
    ("held", "free"): ("give_back", "leave"),
    ("sent", "free"): ("give_back", "leave"),
    ("in transit", "free"): ("give_back", "leave"),
}

# Operations that write to the ledger and change no extent's state.
UNCHANGING = ("join", "connect", "guard")

INK, PAPER, LINE = "#1c2b36", "#ffffff", "#5b6b77"
ORANGE, GREEN, BLUE, YELLOW, GREY = "#fc6e6b", "#a6dba0", "#9ecae1", "#ffcc55", "#eef1f3"
FONT = "font-family='Inter, Helvetica, Arial, sans-serif'"


class Point(NamedTuple):
    """A place in a picture."""

    x: float
    y: float


def text(at: Point, words: str, size: int = 14, anchor: str = "middle", weight: int = 400) -> str:
    return (
        f"<text x='{at.x:g}' y='{at.y:g}' font-size='{size}' text-anchor='{anchor}' "
        f"font-weight='{weight}' fill='{INK}' {FONT}>{escape(words)}</text>"
    )


def box(at: Point, width: float, height: float, fill: str = PAPER, radius: int = 8) -> str:
    return (
        f"<rect x='{at.x:g}' y='{at.y:g}' width='{width:g}' height='{height:g}' rx='{radius}' "
        f"fill='{fill}' stroke='{LINE}' stroke-width='1.5'/>"
    )


def arrow(path: str) -> str:
    return (
        f"<path d='{path}' fill='none' stroke='{LINE}' stroke-width='1.8' marker-end='url(#tip)'/>"
    )


def picture(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            f"width='{width}' height='{height}' role='img'>",
            f"<title>{escape(title)}</title>",
            "<defs><marker id='tip' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
            "markerHeight='7' orient='auto-start-reverse'>"
            f"<path d='M0 0L10 5L0 10z' fill='{LINE}'/></marker></defs>",
            f"<rect width='{width}' height='{height}' fill='{PAPER}'/>",
            *parts,
            "</svg>",
            "",
        ]
    )


# ------------------------------------------------------------------------- states of an extent

CENTRES = {
    "free": Point(120, 210),
    "held": Point(420, 70),
    "sent": Point(760, 210),
    "in transit": Point(420, 350),
}
NODE = (150, 62)


def _edge(start: Point, end: Point) -> tuple[str, Point]:
    """Return a bowed line between the borders of two nodes, and the middle of the bow."""
    distance = math.dist(start, end)
    across = Point((end.y - start.y) / distance, (start.x - end.x) / distance)
    bow = 26.0
    control = Point(
        (start.x + end.x) / 2 + 2 * bow * across.x, (start.y + end.y) / 2 + 2 * bow * across.y
    )
    first, last = _border(start, control), _border(end, control)
    middle = Point((first.x + 2 * control.x + last.x) / 4, (first.y + 2 * control.y + last.y) / 4)
    return (
        f"M{first.x:.1f} {first.y:.1f} Q{control.x:.1f} {control.y:.1f} {last.x:.1f} {last.y:.1f}",
        middle,
    )


def _border(centre: Point, towards: Point) -> Point:
    """Return where the line from a node's centre leaves it."""
    dx, dy = towards.x - centre.x, towards.y - centre.y
    part = min((NODE[0] / 2 + 3) / abs(dx or 1e-9), (NODE[1] / 2 + 3) / abs(dy or 1e-9))
    return Point(centre.x + dx * part, centre.y + dy * part)


def states() -> str:
    """Return the picture of an extent's states."""
    parts = []
    for (start, end), operations in CHANGES.items():
        path, middle = _edge(CENTRES[start], CENTRES[end])
        parts.append(arrow(path))
        for place, line in enumerate(operations):
            y = middle.y + 4 + 14 * (place - (len(operations) - 1) / 2)
            width = 7.2 * len(line) + 6
            parts.append(
                f"<rect x='{middle.x - width / 2:.1f}' y='{y - 11:.1f}' width='{width:.1f}' "
                f"height='14' fill='{PAPER}'/>"
            )
            parts.append(text(Point(round(middle.x, 1), round(y, 1)), line, 12))
    fills = {"free": GREY, "held": GREEN, "sent": BLUE, "in transit": YELLOW}
    for name, what in STATES.items():
        at = CENTRES[name]
        parts.append(box(Point(at.x - NODE[0] / 2, at.y - NODE[1] / 2), *NODE, fills[name], 14))
        parts.append(text(Point(at.x, at.y - 3), name, 16, weight=700))
        parts.append(text(Point(at.x, at.y + 18), what, 12))
    return picture(880, 420, "The states of an extent", parts)


# ------------------------------------------------------------------------------------ the pool


def pool() -> str:
    """Return the picture of a message's way."""
    parts = []
    for x, name, lines in (
        (30, "client", ("an array is copied", "into the pool, once")),
        (330, "scheduler", ("passes the same", "references on")),
        (630, "worker", ("gets a writeable,", "private view of it")),
    ):
        parts.append(box(Point(x, 20), 220, 96, GREY))
        parts.append(text(Point(x + 110, 46), f"{name} process", 16, weight=700))
        for place, line in enumerate(lines):
            parts.append(text(Point(x + 110, 72 + 20 * place), line, 14))
    for x in (252, 552):
        parts.append(arrow(f"M{x} 60 L{x + 74} 60"))
        parts.append(text(Point(x + 38, 50), "message", 12))
        parts.append(text(Point(x + 38, 78), "+ tickets", 12))
    parts.append(arrow("M140 118 L140 196"))
    parts.append(text(Point(150, 162), "one copy", 13, "start"))
    parts.append(arrow("M740 196 L740 120"))
    parts.append(text(Point(730, 162), "copy-on-write pages", 13, "end"))
    parts.append(box(Point(30, 200), 820, 104))
    parts.append(text(Point(46, 222), "the pool: one sparse file in memory", 14, "start", 700))
    for slot in range(16):
        fill = GREEN if slot < 4 else YELLOW if slot < 8 else BLUE
        parts.append(box(Point(46 + slot * 49.4, 234), 45, 32, fill, 4))
    for x, words in ((143, "input"), (341, "output"), (638, "scratch")):
        parts.append(text(Point(x, 288), words, 13))
    parts.append(
        text(Point(834, 222), "16 slots of 256 MiB, unused ones take no memory", 12, "end")
    )
    parts.append(box(Point(30, 318), 820, 40, GREY))
    parts.append(
        text(Point(440, 343), "the ledger beside it: who may read or write which bytes", 14)
    )
    return picture(880, 374, "How an array travels from a client to a worker", parts)


PICTURES = {"pool.svg": pool, "extent-states.svg": states}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (STATIC / name).write_text(draw(), encoding="utf-8")
