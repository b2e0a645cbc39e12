"""Dask as it is between two kernels: a failure here is the harness's, not the bridge's."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from .deployment import TwoSides
from .guest import Guest

SIZES = (64 * 1024, 1024 * 1024, 5 * 1024 * 1024 + 8)


def kernel_release() -> str:
    return os.uname().release


def negative(array: np.ndarray) -> np.ndarray:
    return -array


def arrays() -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(0, 1 << 60, size // 8) for size in SIZES]


@pytest.mark.parametrize("scheduler", ["host", "guest"])
def test_arrays_go_both_ways(guest: Guest, tmp_path: Path, scheduler: str) -> None:
    with TwoSides(guest, tmp_path, {}, {}, scheduler) as sides:
        sides.add_worker("guest" if scheduler == "host" else "host", "far")
        with sides.client() as client:
            there = client.submit(kernel_release, workers="far").result(timeout=120)
            assert (there == guest.kernel.release) == (scheduler == "host")
            here = client.run_on_scheduler(kernel_release)
            assert (here == guest.kernel.release) == (scheduler == "guest")
            for array in arrays():
                sent = client.scatter(array, workers="far")
                result = client.submit(negative, sent, workers="far").result(timeout=120)
                np.testing.assert_array_equal(result, -array)


def test_worker_to_worker(guest: Guest, tmp_path: Path) -> None:
    with TwoSides(guest, tmp_path, {}, {}, "guest") as sides:
        sides.add_worker("guest", "far")
        sides.add_worker("host", "near")
        with sides.client() as client:
            for array in arrays():
                for source, target in (("far", "near"), ("near", "far")):
                    sent = client.scatter(array, workers=source)
                    made = client.submit(negative, sent, workers=source)
                    back = client.submit(negative, made, workers=target).result(timeout=120)
                    np.testing.assert_array_equal(back, array)
