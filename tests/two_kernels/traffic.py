"""Arrays of random sizes that go to a worker and come back, and what the figures say of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from distributed import Client

KiB = 1024
SMALLEST, LARGEST = 64 * KiB, 8 * 1024 * KiB
TIMEOUT_S = 300


def array(number: int) -> np.ndarray:
    """Return the array of this number: of 64 KiB to 8 MiB, as many small ones as large ones."""
    random = np.random.default_rng(number)
    size = int(np.exp(random.uniform(np.log(SMALLEST), np.log(LARGEST))))
    return np.frombuffer(random.bytes(size), np.uint8)


def turned(data: np.ndarray) -> np.ndarray:
    """Runs at the worker: make other bytes of each; of a wrong one comes no right one."""
    return ~data


def exchange(client: Client, numbers: Iterable[int], worker: str = "far") -> int:
    """Send arrays to a worker and have others back; return how many bytes went each way."""
    total = 0
    for number in numbers:
        data = array(number)
        sent = client.scatter(data, workers=worker, hash=False)
        result = client.submit(turned, sent, workers=worker, pure=False)
        back = result.result(timeout=TIMEOUT_S)
        assert np.array_equal(back, ~data), f"wrong bytes, array {number} of {data.nbytes}"
        total += data.nbytes
    return total


def processes(stats: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the figures of each process."""
    return {"client": stats["client"], "scheduler": stats["scheduler"], **stats["workers"]}


class Moved:
    """What was moved between two looks at the figures of a cluster."""

    def __init__(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        self._before = processes(before)
        self._after = processes(after)

    def nbytes(self, who: str, direction: str, way: str) -> int:
        """Return bytes of ``client``, ``scheduler`` or ``worker`` (the one there is)."""
        if who == "worker":
            (who,) = set(self._after) - {"client", "scheduler"}
        count: int = self._after[who]["bytes"][direction][way]
        before = self._before.get(who)
        return count - (before["bytes"][direction][way] if before else 0)

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Causes to frames, by process."""
        found = {}
        for who, figures in self._after.items():
            before = self._before.get(who, {"fallbacks": {}})["fallbacks"]
            changed = {
                cause: frames - before.get(cause, 0)
                for cause, frames in figures["fallbacks"].items()
                if frames != before.get(cause, 0)
            }
            if changed:
                found[who] = changed
        return found

    def cause(self, cause: str) -> int:
        """Return frames that fell back for a cause, anywhere."""
        return sum(causes.get(cause, 0) for causes in self.fallbacks.values())

    def __repr__(self) -> str:
        lines = [
            f"{who}: {f['bytes']} exchange {f['exchange']} connections {f['connections']}"
            for who, f in self._after.items()
        ]
        return "\n".join([*lines, f"fallbacks: {self.fallbacks}"])
