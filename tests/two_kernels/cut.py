"""Cuts a probe at the process that is asked: it gives no answer, or dies of the question.

A preload of Dask; ``TWO_KERNELS_CUT`` says which: silent or dies.
"""

from __future__ import annotations

import os
from typing import Any

from dask_shm_bridge.exchange.stream import FarStream

VARIABLE = "TWO_KERNELS_CUT"
STATUS = 77


def dask_setup(server: Any) -> None:
    """Do so from the start; Dask calls this."""
    how = os.environ[VARIABLE]
    real = FarStream.say

    def say(self: FarStream, op: str, *words: Any, **options: Any) -> None:
        if op != "reply":
            real(self, op, *words, **options)
        elif how == "dies":
            os._exit(STATUS)

    FarStream.say = say  # type: ignore[method-assign]
