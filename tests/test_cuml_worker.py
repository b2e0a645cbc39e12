"""The worker's half of a call, with stand-ins for what is on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_shm_bridge.cuml import worker
from dask_shm_bridge.cuml.held import Held
from dask_shm_bridge.cuml.outcome import Outcome
from dask_shm_bridge.cuml.packing import ModelSlot, Slot
from dask_shm_bridge.cuml.recipe import Recipe

LARGE, SMALL = np.zeros(20_000), np.zeros(3)


def recipe(*plain: Any, **more: Any) -> Recipe:
    known = {
        "path": "cuml.x.X",
        "entry": {},
        "gpu": True,
        "params": {},
        "given": set(),
        "changed": {},
        "method": "fit",
        "plain": (list(plain), {}),
        "holds": frozenset({"pandas"}),
        "stays": False,
    }
    return Recipe(**{**known, **more})


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Move large arrays to a device that is not there; tell when cuML was to give NumPy."""
    import contextlib

    found: list[bool] = []

    def numpy_out(wanted: bool) -> Any:
        found.append(wanted)
        return contextlib.nullcontext()

    def on_device(value: Any) -> Any:
        large = isinstance(value, np.ndarray) and value.nbytes >= 64 * 1024
        return memoryview(value) if large else value

    monkeypatch.setattr(worker, "_numpy_out", numpy_out)
    monkeypatch.setattr(worker, "_on_device", on_device)
    return found


def test_the_first_argument_decides_the_output(outputs: list[bool]) -> None:
    for first, second, numpy in [
        (LARGE, SMALL, True),
        (SMALL, LARGE, False),
        (SMALL, SMALL, False),
    ]:
        call = worker._Call(recipe(Slot(0), Slot(1)), (first, second))
        assert call(lambda *args: "called", None, None) == "called"
        assert (call.output == "numpy") is numpy
    assert outputs == [True, False, False]


def test_a_model_as_an_argument_does_not_decide_beside_data(outputs: list[bool]) -> None:
    held = Held("the model", True, "numpy")
    alone = worker._Call(recipe(ModelSlot(0), method=""), (held,))
    assert alone(lambda model: model, None, None) == "the model"
    beside = worker._Call(recipe(ModelSlot(0), Slot(1), method=""), (held, SMALL))
    beside(lambda model, X: X, None, None)
    large = worker._Call(recipe(ModelSlot(0), Slot(1), method=""), (held, LARGE))
    large(lambda model, X: X, None, None)
    assert outputs == [True, False, True]


class Rows:
    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    def __getitem__(self, rows: slice) -> Frame:
        return Frame(self.frame.data[rows])


class Frame:
    """A frame of a library that the client lacks."""

    __module__ = "cudf.core"

    def __init__(self, data: pd.DataFrame) -> None:
        self.data = data
        self.shape = data.shape
        self.iloc = Rows(self)

    def to_pandas(self) -> pd.DataFrame:
        return self.data


def test_a_summary_is_of_what_the_client_has() -> None:
    frame = Frame(pd.DataFrame({"a": [1.0, 2.0]}))
    told = worker.summary_of((Held(None, True, None), Outcome(frame)), frozenset({"pandas"}))
    assert type(told.value["meta"]) is pd.DataFrame
    assert len(told.value["meta"]) == 0
    assert told.value["shape"] == (2, 1)


def test_what_stays_is_not_converted() -> None:
    frame = Frame(pd.DataFrame({"a": [1.0]}))
    for stays, kind in ((True, Frame), (False, pd.DataFrame)):
        found = worker._outcome(recipe(gpu=False, stays=stays), frame, [], None)
        assert type(found.value) is kind
        assert found.converted == (() if stays else ("cudf",))


def test_an_error_is_raised_without_what_can_not_be_unpickled() -> None:
    Lost = type("Lost", (MemoryError,), {"__module__": "cupy.cuda"})

    def lose() -> None:
        raise Lost("all of it")

    def hide() -> None:
        try:
            lose()
        except MemoryError as error:
            raise KeyError("a key") from error

    with pytest.raises(MemoryError, match=r"cupy.cuda.Lost: all of it") as caught:
        worker._portably(frozenset(), lose)
    assert type(caught.value) is MemoryError
    assert caught.value.__context__ is None
    assert "lose" in [entry.name for entry in caught.traceback]
    with pytest.raises(KeyError, match="a key") as other:
        worker._portably(frozenset(), hide)
    assert other.value.__cause__ is None
    assert other.value.__context__ is None
