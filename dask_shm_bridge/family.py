"""The family ``mmap-slot``, and one-pass copies of strided arrays on the default path.

Neither puts a reference to the pool in a header: a header may be passed on to a process that does
not share it. A frame is a plain buffer, and the comm decides how it travels.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from distributed.protocol.numpy import serialize_numpy_ndarray
from distributed.protocol.serialize import (
    dask_deserialize,
    dask_serialize,
    families,
    register_serialization_family,
)

NAME = "mmap-slot"
CONTEXT = "shm-bridge"  # our comms set it: strided frames are welcome here


def register() -> None:
    """Register the family and the serializer of strided arrays. May be called again."""
    register_serialization_family(NAME, dumps, loads)
    dask_serialize.register(np.ndarray)(serialize_ndarray)


def serialize_ndarray(
    x: np.ndarray[Any, Any], context: Any = None
) -> tuple[dict[str, Any], list[Any]]:
    """Serialize an array in Dask's stock form, which any peer can read.

    Over a comm of this package a strided array becomes a strided frame, so that the copy into
    the pool is the only one; the stock serializer makes a contiguous copy first.
    """
    if context and context.get(CONTEXT) and type(x) is np.ndarray:
        frame = _strided(x)
        if frame is not None:
            strides: list[int] = []
            step = x.itemsize
            for length in reversed(x.shape):
                strides.insert(0, step)
                step *= length
            header = {
                "dtype": (0, x.dtype.str),
                "shape": x.shape,
                "strides": tuple(strides),
                "writeable": [x.flags.writeable],
            }
            return header, [frame]
    header, frames = serialize_numpy_ndarray(x, context=context)
    return header, frames


def _strided(x: np.ndarray[Any, Any]) -> memoryview | None:
    """Return a strided array's memory as it lies; None where the stock serializer does as well."""
    if (
        x.flags.c_contiguous
        or x.flags.f_contiguous
        or 0 in x.strides
        or x.dtype.kind not in "biufcmM"
        or x.size == 0
    ):
        return None
    if x.itemsize in (1, 2, 4, 8):
        x = x.view(f"u{x.itemsize}")
    elif x.dtype.kind != "c" or not x.dtype.isnative:
        return None
    return x.data


def dumps(x: Any, context: Any = None) -> tuple[dict[str, Any], list[Any]]:
    """Serialize an array; anything else is left to the next family.

    Raises
    ------
    NotImplementedError
        For what is not an array of plain numbers.
    TypeError
        If the peer has told that it does not know this family.
    """
    if type(x) is not np.ndarray or x.dtype.hasobject:
        raise NotImplementedError(type(x))
    recipient = (context or {}).get("recipient")
    if recipient and CONTEXT not in recipient:
        raise TypeError(
            f"the peer at {recipient.get('address', 'the other end')} does not know the "
            f"serialization family {NAME!r}: install dask-shm-bridge there and load it "
            "(--preload dask_shm_bridge.preload), or take the name out of `serializers`"
        )
    header, frames = serialize_ndarray(x, context=context)
    return {"array": header}, frames


def loads(header: dict[str, Any], frames: list[Any]) -> Any:
    """Build an array over its frame, without a copy if the frame is writeable."""
    return dask_deserialize.dispatch(np.ndarray)(header["array"], frames)


def loaded() -> bool:
    """Say whether this process knows the family."""
    return "dask_shm_bridge.family" in sys.modules and NAME in families
