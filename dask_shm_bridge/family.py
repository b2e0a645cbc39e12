"""The family ``mmap-slot``, and one-pass copies of strided arrays on the default path.

Neither puts a reference to the pool in a header: a header may be passed on to a process that does
not share it. A frame is a plain buffer, and the comm decides how it travels.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
from distributed.protocol.numpy import serialize_numpy_ndarray
from distributed.protocol.serialize import (
    Serialized,
    dask_serialize,
    register_serialization_family,
)

from dask_shm_bridge.array_header import array_over, counts, described, fields_dtype, plain_dtype
from dask_shm_bridge.errors import HeaderError

NAME = "mmap-slot"
CONTEXT = "shm-bridge"  # our comms set it: strided frames are welcome here

_UNKNOWN = (
    f"the peer at {{peer}} does not know the serialization family {NAME!r}: install "
    "dask-shm-bridge there and load it (--preload dask_shm_bridge.preload), or name other "
    "families in `serializers` as well"
)


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
                "writeable": [True],  # as with the stock serializer, which makes a copy
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
        If the peer does not know this family: an error at once, not in some other process.
    """
    if type(x) is not np.ndarray or x.dtype.hasobject:
        raise NotImplementedError(type(x))
    recipient = (context or {}).get("recipient")
    if recipient and CONTEXT not in recipient:
        raise TypeError(_UNKNOWN.format(peer=recipient.get("address", "the other end")))
    fields = described(x.dtype) if x.dtype.kind == "V" else None
    if x.dtype.kind == "V" and fields is None:
        raise NotImplementedError(x.dtype)
    header, frames = serialize_ndarray(x, context=context)
    if fields is not None:
        header = {**header, "fields": fields}  # besides Dask's own pickle, for a relay's sake
    return {"array": header}, frames


def loads(header: dict[str, Any], frames: list[Any]) -> Any:
    """Build an array over its frame, without a copy if the frame is writeable.

    Raises
    ------
    HeaderError
        If the header does not fit the frame, or wants something unpickled that `dumps` does not
        pickle.
    """
    array = header.get("array")
    if not isinstance(array, dict) or array.get("pickle"):
        raise HeaderError(f"a header of {NAME} has no array")
    if len(frames) != 1:
        raise HeaderError(f"an array of {NAME} came in {len(frames)} frames")
    try:
        (custom, dtype), (writeable,) = array["dtype"], array["writeable"]
    except (KeyError, TypeError, ValueError):
        raise HeaderError(f"a header of {NAME} has no type") from None
    shape = counts(array.get("broadcast_to") or array.get("shape"), "shape")
    strides = counts(array.get("strides"), "strides", least=-(2**63))
    kind = fields_dtype(array.get("fields")) if custom else plain_dtype(dtype)
    x = array_over(frames[0], shape, strides, kind)
    if not writeable:
        x.flags.writeable = False
    elif not x.flags.writeable:
        x = np.require(x, requirements=["W"])  # as Dask does
    return x


def _without(serializers: Sequence[str]) -> list[str]:
    """Return the families to name to a peer that does not know this one.

    Where no other is left, msgpack: an array is an error then, at once, and not asked for again.
    """
    return [name for name in serializers if name != NAME] or ["msgpack"]


def translated(message: Any, depth: int = 3) -> Any:
    """Return a message as a peer that does not know this family can handle it.

    A relay passes on headers and requests that name the family, to a worker or client that was
    never asked whether it knows it. There a header fails with a KeyError, and a request to
    serialize by it makes Dask ask again, for ever.
    """
    if isinstance(message, Serialized):
        return Serialized(_stock(message.header), message.frames)
    if depth and type(message) is dict:
        result = {key: translated(value, depth - 1) for key, value in message.items()}
        if isinstance(result.get("serializers"), (list, tuple)):
            result["serializers"] = _without(result["serializers"])
        return result
    return message


def _stock(header: Any) -> Any:
    """Return the header of Dask's own family for the same frames."""
    if not isinstance(header, dict):
        return header  # whoever reads it will say so
    if isinstance(header.get("sub-headers"), (list, tuple)):
        return {**header, "sub-headers": [_stock(each) for each in header["sub-headers"]]}
    if header.get("serializer") != NAME or "array" not in header:
        return header
    return {
        **{key: value for key, value in header.items() if key != "array"},
        "serializer": "dask",
        "sub-header": header["array"],
        "type": "numpy.ndarray",
        "type-serialized": pickle.dumps(np.ndarray),
    }
