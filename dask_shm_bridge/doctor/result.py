"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail", "n/a"]
_ORDER: tuple[State, ...] = ("n/a", "ok", "warn", "fail")


@dataclass(frozen=True)
class Result:
    """What one check found.

    Attributes
    ----------
    name : str
        The check.
    state : {"ok", "warn", "fail", "n/a"}
        ``fail``: something that was asked for does not work. ``warn``: it works, but slower or
        less surely than it could. ``n/a``: there is nothing to check here.
    text : str
        What was found.
    advice : str
        What to change, where that would be better.
    """

    name: str
    state: State
    text: str
    advice: str = ""


def worst(results: Iterable[Result]) -> State:
    """Return the worst state of all; "n/a" where there are none."""
    return max((result.state for result in results), key=_ORDER.index, default="n/a")
