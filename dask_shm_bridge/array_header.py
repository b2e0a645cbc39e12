"""What the header of an array in a message may say, before an array is made of it.

NumPy adds strides up in 64 bits, so that a header can make them wrap round and lie far outside of
the frame; it takes a frame for addresses of objects if the header says so; and CuPy looks at
nothing. So the figures are added up here.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib import format as npy

from dask_shm_bridge.errors import HeaderError

MAX_DIMENSIONS = 32  # NumPy 1.26 allows no more
_MOST = 2**63 - 1
_MOST_TEXT = 10_000  # as NumPy has it for .npy files


def counts(value: Any, what: str, least: int = 0) -> tuple[int, ...]:
    """Return a list of a header's whole numbers.

    Raises
    ------
    HeaderError
        If it is no such list.
    """
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        raise HeaderError(f"an array's header has no list of numbers for {what}")
    if not all(type(each) is int and least <= each <= _MOST for each in value):
        raise HeaderError(f"an array's header has a {what} that no array has")
    return tuple(value)


def plain_dtype(text: Any) -> np.dtype[Any]:
    """Return the type that a header names; never one of objects, nor one of several fields.

    Raises
    ------
    HeaderError
        If it names none, or one that is not made of plain bytes.
    """
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise HeaderError("an array's header names no type")
    try:
        dtype = np.dtype(text)
    except Exception as error:
        raise HeaderError(f"an array's header names no type ({error!s:.200})") from None
    return _checked(dtype)


def _checked(dtype: Any) -> np.dtype[Any]:
    if (
        not isinstance(dtype, np.dtype)
        or dtype.hasobject
        or dtype.itemsize == 0
        or dtype.subdtype is not None
    ):
        raise HeaderError("an array's header names a type that is not one of plain bytes")
    return dtype


def described(dtype: np.dtype[Any]) -> str | None:
    """Return a type of several fields as text; None where that would not be all of it."""
    if dtype.metadata or dtype.type is not np.void or dtype.isalignedstruct or dtype.subdtype:
        return None
    text = repr(npy.dtype_to_descr(dtype))
    try:
        return text if fields_dtype(text) == dtype else None
    except HeaderError:
        return None


def fields_dtype(text: Any) -> np.dtype[Any]:
    """Return the type that `described` made text of. Not by a pickle: a damaged one ends Python.

    Raises
    ------
    HeaderError
        If it is no such text.
    """
    if not isinstance(text, str) or len(text) > _MOST_TEXT:
        raise HeaderError("an array's header names no type")
    try:
        dtype = npy.descr_to_dtype(ast.literal_eval(text))
    except Exception as error:
        raise HeaderError(f"an array's header names no type ({error!s:.200})") from None
    return _checked(dtype)


def check_within(shape: Sequence[int], strides: Sequence[int], itemsize: int, nbytes: int) -> None:
    """See that every element lies in a frame of `nbytes`.

    Raises
    ------
    HeaderError
        If one does not.
    """
    if len(shape) != len(strides):
        raise HeaderError(f"an array's header has {len(shape)} lengths and {len(strides)} strides")
    if 0 in shape:
        return
    low = high = 0
    for length, stride in zip(shape, strides, strict=True):
        reach = (length - 1) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
    if low < 0 or high + itemsize > nbytes:
        raise HeaderError(
            f"an array's header names bytes {low} to {high + itemsize} of a frame of {nbytes}"
        )


def array_over(
    frame: Any, shape: Sequence[int], strides: Sequence[int], dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    """Return an array whose elements lie in a frame, all of them.

    Raises
    ------
    HeaderError
        If they would not.
    """
    frame = memoryview(frame)
    if not frame.contiguous:
        raise HeaderError("the frame of an array is not contiguous")
    check_within(shape, strides, dtype.itemsize, frame.nbytes)
    try:
        return np.ndarray(shape, dtype, frame, strides=None if 0 in shape else strides)
    except (MemoryError, OverflowError, TypeError, ValueError) as error:
        raise HeaderError(f"an array of {tuple(shape)} can't be ({error!s:.200})") from None
