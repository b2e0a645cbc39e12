"""A deadline for calls that have none of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own and wait for it.

    Parameters
    ----------
    seconds
        How long to wait. A call that takes longer is left behind, in a daemon thread.
    function
        What to call.

    Raises
    ------
    TimeoutError
        If the call isn't done in time. What `function` raises is raised here.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=call, name="benchmark-run", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"hung: not done after {seconds:g} s")
    if failure:
        raise failure[0]
    return outcome[0]
