"""Values of every kind that travels, and a description that tells any two of them apart."""

from __future__ import annotations

import array
import ctypes
import datetime
import decimal
import os
import tempfile
import zlib
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

Point = namedtuple("Point", "x y")


class Tagged(np.ndarray):
    """A user's subclass with an attribute of its own, which it keeps when pickled."""

    tag = ""

    def __new__(cls, data: Any, tag: str = "") -> Tagged:
        self = np.asarray(data).view(cls)
        self.tag = tag
        return self

    def __array_finalize__(self, other: Any) -> None:
        self.tag = getattr(other, "tag", "")

    def __reduce__(self) -> Any:
        return (Tagged, (np.asarray(self), self.tag))


@dataclass
class Record:
    """A user's type that holds arrays."""

    name: str
    data: Any
    more: Any = None


class Plain:
    """A user's type, pickled by its dictionary."""

    def __init__(self, **kwargs: Any) -> None:
        self.__dict__.update(kwargs)


def read_only(x: Any) -> Any:
    x.flags.writeable = False
    return x


def memmap(n: int, mode: str) -> np.memmap:
    fd, path = tempfile.mkstemp()
    try:
        np.arange(n).tofile(path)
        return np.memmap(path, np.int64, mode)  # type: ignore[call-overload]
    finally:
        os.close(fd)
        os.unlink(path)


def masked(n: int, mask: Any) -> Any:
    return np.ma.masked_array(np.arange(n) * 1.0, mask=mask, fill_value=-1.0)


def square(n: int) -> np.ndarray:
    side = int(n**0.5)
    return np.arange(side * side).reshape(side, side)


def cube(n: int) -> np.ndarray:
    side = round(n ** (1 / 3))
    return np.arange(side**3).reshape(side, side, side)


NESTED = np.dtype([("a", "f4"), ("b", [("c", ">i2"), ("d", "u1", (3,))]), ("e", "S5")])
ALIGNED = np.dtype([("a", "i1"), ("b", "f8"), ("c", "i2")], align=True)


def structured(n: int, dtype: np.dtype) -> np.ndarray:
    x = np.zeros(n, dtype)
    x["a"] = np.arange(n) % 100
    return x


def frame(n: int) -> pd.DataFrame:
    i = np.arange(n)
    return pd.DataFrame(
        {
            "int": i,
            "float": np.where(i % 7, i * 0.5, np.nan),
            "float32": i.astype("f4"),
            "bool": i % 2 == 0,
            "text": [f"text {k}" for k in i],
            "when": pd.Timestamp("2020-01-01") + pd.to_timedelta(i, "h"),
            "tz": pd.date_range("2020-01-01", periods=n, freq="min", tz="Europe/Berlin"),
            "kind": pd.Categorical.from_codes(i % 3, ["a", "b", "c"]),
            "Int": pd.array(np.where(i % 5, i, 0), dtype="Int64"),
            "object": [(k, str(k)) for k in i],
        }
    )


def table(n: int) -> pa.Table:
    return pa.table(
        {
            "i": pa.array(range(n)),
            "f": pa.array([None if k % 3 == 0 else k / 2 for k in range(n)]),
            "s": pa.array([f"text {k}" for k in range(n)]),
            "d": pa.array([f"{k % 4}" for k in range(n)]).dictionary_encode(),
        }
    )


# Each makes a value of about 8 n bytes or more.
VALUES: dict[str, Callable[[int], Any]] = {
    # dtypes
    **{
        f"dtype {dtype}": lambda n, dtype=dtype: np.arange(n).astype(dtype)
        for dtype in ("i1", "u2", "i4", "u8", "f2", "f4", "f8", "g", "c8", "c16", "G", "?")
    },
    **{
        f"big-endian {dtype}": lambda n, dtype=dtype: np.arange(n).astype(dtype)
        for dtype in (">i2", ">f4", ">f8", ">c16", ">U3")
    },
    "datetime64": lambda n: np.arange(n).astype("M8[ns]"),
    "datetime64[D]": lambda n: np.arange(n).astype("M8[D]"),
    "timedelta64": lambda n: np.arange(n).astype("m8[us]"),
    "datetime64 strided": lambda n: np.arange(2 * n).astype("M8[s]")[::2],
    "timedelta64 big-endian": lambda n: np.arange(n).astype(">m8[ms]"),
    "str": lambda n: np.array([str(k) for k in range(n)]),
    "bytes dtype": lambda n: np.array([str(k).encode() for k in range(n)]),
    "bytes strided": lambda n: np.array([str(k).encode() for k in range(n)])[::2],
    "void": lambda n: np.arange(n).view("V8"),
    "structured": lambda n: structured(n, np.dtype([("a", "f4"), ("b", "i4")])),
    "structured nested": lambda n: structured(n, NESTED),
    "structured aligned": lambda n: structured(n, ALIGNED),
    "structured strided": lambda n: structured(2 * n, NESTED)[::2],
    "structured field": lambda n: structured(n, NESTED)["b"]["c"],
    "structured 2-D Fortran": lambda n: np.asfortranarray(
        structured(n, ALIGNED)[: n // 10 * 10].reshape(-1, 10)
    ),
    "object": lambda n: np.array([(k, str(k)) for k in range(n)] + [None], object),
    "object of arrays": lambda n: np.array([np.arange(n), None, np.arange(n) * 1.5], object),
    "recarray": lambda n: np.rec.fromarrays([np.arange(n), np.arange(n) * 0.5], names="a,b"),
    "datetime with metadata": lambda n: np.arange(n).astype(np.dtype("f8", metadata={"a": 1})),
    # layouts
    "0-d": lambda n: np.array(7.5),
    "0-d object": lambda n: np.array({"a": n}, object),
    "0-d structured": lambda n: structured(1, NESTED)[0:1].reshape(()),
    "scalar": lambda n: np.float32(7.5),
    "structured scalar": lambda n: structured(2, NESTED)[1],
    "empty": lambda n: np.empty(0),
    "empty 3-D": lambda n: np.empty((3, 0, 4), order="F"),
    "empty strided": lambda n: np.empty((4, 0, 4))[::2],
    "one element of many": lambda n: np.arange(n)[n // 2 : n // 2 + 1],
    "2-D": square,
    "Fortran": lambda n: np.asfortranarray(square(n)),
    "transposed": lambda n: square(n).T,
    "transposed 3-D": lambda n: cube(n).transpose(1, 0, 2),
    "transposed 3-D other": lambda n: cube(n).transpose(2, 0, 1),
    "moved axis of Fortran 3-D": lambda n: np.asfortranarray(cube(n)).transpose(0, 2, 1),
    "strided": lambda n: np.arange(2 * n)[::2],
    "strided rows": lambda n: square(2 * n)[::2],
    "strided columns": lambda n: square(2 * n)[:, ::2],
    "column": lambda n: np.arange(4 * n).reshape(-1, 4)[:, 1],
    "columns": lambda n: np.arange(4 * n).reshape(-1, 4)[:, 1:3],
    "inner block": lambda n: square(4 * n)[5:-5, 7:-7],
    "negative strides": lambda n: np.arange(n)[::-1],
    "negative rows": lambda n: square(n)[::-1],
    "negative both": lambda n: square(n)[::-1, ::-2],
    "negative of Fortran": lambda n: np.asfortranarray(square(n))[:, ::-1],
    "strided f2": lambda n: np.arange(n).astype("f2")[::2],
    "strided u1": lambda n: np.arange(8 * n).astype("u1")[::3],
    "strided bool": lambda n: (np.arange(8 * n) % 3 == 0)[::3],
    "strided c8": lambda n: np.arange(2 * n).astype("c8")[::2],
    "strided c16": lambda n: np.arange(2 * n).astype("c16")[::2],
    "strided >c16": lambda n: np.arange(2 * n).astype(">c16")[::2],
    "strided longdouble": lambda n: np.arange(2 * n).astype("g")[::2],
    "strided clongdouble": lambda n: np.arange(2 * n).astype("G")[::2],
    "strided big-endian": lambda n: np.arange(2 * n).astype(">f8")[::2],
    "strided 4-D": lambda n: np.arange(n // 60 * 60).reshape(3, 4, 5, -1)[::2, 1:, ::-1],
    "with an axis of one": lambda n: np.arange(2 * n)[::2].reshape(1, -1, 1),
    "broadcast rows": lambda n: np.broadcast_to(np.arange(n), (5, n)),
    "broadcast columns": lambda n: np.broadcast_to(np.arange(n)[:, None], (n, 5)),
    "broadcast scalar": lambda n: np.broadcast_to(np.float64(3), (n, 2)),
    "broadcast strided": lambda n: np.broadcast_to(np.arange(2 * n)[::2], (5, n)),
    "broadcast writeable": lambda n: np.lib.stride_tricks.as_strided(np.arange(n), (3, n), (0, 8)),
    "overlapping windows": lambda n: np.lib.stride_tricks.sliding_window_view(np.arange(n), 3),
    "unaligned": lambda n: np.arange(n + 1).view("u1")[3:-5].view("f8"),
    "read-only": lambda n: read_only(np.arange(n)),
    "read-only strided": lambda n: read_only(np.arange(2 * n)[::2]),
    "read-only Fortran": lambda n: read_only(np.asfortranarray(square(n))),
    "over bytes": lambda n: np.frombuffer(bytes(8 * n), np.float64),
    # subclasses
    "masked": lambda n: masked(n, np.arange(n) % 3 == 0),
    "masked without mask": lambda n: masked(n, np.ma.nomask),
    "masked strided": lambda n: masked(2 * n, np.arange(2 * n) % 3 == 0)[::2],
    "masked 2-D": lambda n: np.ma.masked_less(square(n), 10),
    "masked hard": lambda n: np.ma.masked_array(np.arange(n), np.arange(n) < 5, hard_mask=True),
    "masked datetime": lambda n: np.ma.masked_array(
        np.arange(n).astype("M8[s]"), mask=np.arange(n) < 3
    ),
    "masked constant": lambda n: np.ma.masked,
    "memmap r": lambda n: memmap(n, "r"),
    "memmap c": lambda n: memmap(n, "c"),
    "memmap part": lambda n: memmap(n, "c")[5:-5],
    "matrix": lambda n: square(n).view(np.matrix),
    "matrix strided": lambda n: square(2 * n).view(np.matrix)[:, ::2],
    "subclass": lambda n: Tagged(np.arange(n), "mine"),
    "subclass strided": lambda n: Tagged(np.arange(2 * n)[::2], "mine"),
    # pandas
    "DataFrame": frame,
    "DataFrame of floats": lambda n: pd.DataFrame(square(n) * 0.5),
    "DataFrame slice": lambda n: pd.DataFrame(square(2 * n) * 0.5).iloc[::2, 3:],
    "DataFrame of a Fortran array": lambda n: pd.DataFrame(np.asfortranarray(square(n))),
    "Series": lambda n: pd.Series(np.arange(n), name="s"),
    "Series of text": lambda n: pd.Series([f"text {k}" for k in range(n)]),
    "Series of pyarrow text": lambda n: pd.Series(
        [f"text {k}" if k % 9 else None for k in range(n)], dtype="string[pyarrow]"
    ),
    "Series of python text": lambda n: pd.Series(
        [f"text {k}" if k % 9 else None for k in range(n)], dtype="string[python]"
    ),
    "Series of ArrowDtype": lambda n: pd.Series(range(n), dtype="int64[pyarrow]"),
    "Series tz": lambda n: pd.Series(pd.date_range("2020", periods=n, freq="s", tz="UTC")),
    "Series sparse": lambda n: pd.Series(pd.arrays.SparseArray(np.arange(n) % 5)),
    "Series categorical": lambda n: pd.Series([f"{k % 7}" for k in range(n)], dtype="category"),
    "Index": lambda n: pd.Index(np.arange(n) * 0.5, name="i"),
    "RangeIndex": lambda n: pd.RangeIndex(n),
    "DatetimeIndex": lambda n: pd.date_range("2020", periods=n, freq="min", tz="Asia/Tokyo"),
    "MultiIndex": lambda n: pd.MultiIndex.from_arrays(
        [np.arange(n) % 13, [f"k{k}" for k in range(n)]], names=["a", "b"]
    ),
    "DataFrame with MultiIndex": lambda n: pd.DataFrame({"a": np.arange(n), "b": 1}).set_index(
        ["a", "b"], drop=False
    ),
    "Interval": lambda n: pd.interval_range(0, n),
    "Period": lambda n: pd.period_range("2020", periods=n, freq="D"),
    # others
    "arrow Table": table,
    "arrow Table slice": lambda n: table(2 * n).slice(n // 2, n),
    "arrow RecordBatch": lambda n: table(n).to_batches()[0],
    "arrow Array": lambda n: pa.array([None if k % 3 == 0 else k for k in range(n)]),
    "arrow ChunkedArray": lambda n: pa.chunked_array([list(range(n)), [1, 2]]),
    **{
        f"sparse {kind}": lambda n, kind=kind: getattr(
            sp.random(400, n // 4, density=0.05, random_state=1), f"to{kind}"
        )()
        for kind in ("csr", "csc", "coo", "bsr", "lil", "dok")
    },
    "sparse dia": lambda n: sp.dia_matrix((np.ones((3, n)), [-1, 0, 2]), shape=(n, n)),
    "sparse array csr": lambda n: sp.csr_array(sp.random(n, 20, density=0.1, random_state=1)),
    "sparse array coo": lambda n: sp.coo_array(sp.random(n, 20, density=0.1, random_state=1)),
    "bytes": lambda n: os.urandom(8) * n,
    "bytearray": lambda n: bytearray(b"12345678" * n),
    "memoryview": lambda n: memoryview(b"12345678" * n),
    "memoryview of an array": lambda n: memoryview(np.arange(n)),
    "memoryview writeable": lambda n: memoryview(bytearray(8 * n)),
    "memoryview strided": lambda n: memoryview(np.arange(2 * n))[::2],
    "array.array": lambda n: array.array("d", range(n)),
    "ctypes": lambda n: (ctypes.c_double * n)(*range(n)),
    "long str": lambda n: "täxt ☃ " * n,
    "python objects": lambda n: {
        k: (str(k), [k, decimal.Decimal(k)], datetime.date(2020, 1, 1 + k % 28)) for k in range(n)
    },
    "set": lambda n: set(range(n)),
    "list of arrays": lambda n: [np.arange(n), np.arange(n) * 0.5, square(n).T],
    "list of many small arrays": lambda n: [np.arange(50) + k for k in range(n // 50)],
    "dict of arrays": lambda n: {"a": np.arange(n), "b": {"c": (np.arange(n)[::2], "text")}},
    "named tuple": lambda n: Point(np.arange(n), np.arange(n)[::-1]),
    "dataclass": lambda n: Record("r", np.arange(n), [read_only(np.arange(n)), table(n)]),
    "plain object": lambda n: Plain(x=np.arange(n), frame=frame(n), y=np.asfortranarray(square(n))),
    "the same array twice": lambda n: [np.arange(n)] * 2,
    "array and a view of it": lambda n: (lambda x: [x, x[10:], x.T])(np.arange(n)),
}
if hasattr(np.dtypes, "StringDType"):
    VALUES["StringDType"] = lambda n: np.array(
        [f"some longer text {k}" for k in range(n)], dtype=np.dtypes.StringDType()
    )
    VALUES["StringDType strided"] = lambda n: VALUES["StringDType"](2 * n)[::2]


def describe(x: Any) -> Any:
    """Return everything about a value that a receiver could notice, as plain tuples."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}"
    if isinstance(x, np.ma.core.MaskedConstant):
        return (kind,)
    if isinstance(x, np.ma.MaskedArray):
        mask = describe(x.mask) if x.mask is not np.ma.nomask else None
        return kind, describe(x.data), mask, repr(x.fill_value), x.hardmask
    if isinstance(x, np.ndarray):
        return (
            kind,
            *(str(x.dtype.descr) if x.dtype.names else x.dtype.str, str(x.dtype), x.dtype.itemsize),
            *(x.dtype.isalignedstruct, repr(x.dtype.metadata), x.shape, x.strides),
            *(x.flags.c_contiguous, x.flags.f_contiguous, x.flags.writeable),
            content(x),
            getattr(x, "tag", None),
        )
    if isinstance(x, np.generic):
        return kind, str(x.dtype), repr(x)
    if isinstance(x, pd.DataFrame | pd.Series | pd.Index):
        return kind, *pandas_facts(x)
    if isinstance(x, pa.Table | pa.RecordBatch):
        return kind, str(x.schema), x.num_rows, [describe(column) for column in x.columns]
    if isinstance(x, pa.ChunkedArray):
        return kind, str(x.type), [describe(chunk) for chunk in x.chunks]
    if isinstance(x, pa.Array):
        x.validate(full=True)
        return kind, str(x.type), len(x), x.offset, zlib.crc32(repr(x.to_pylist()).encode())
    if sp.issparse(x):
        parts = [getattr(x, name, None) for name in ("data", "indices", "indptr", "row", "col")]
        if x.format in ("dok", "lil"):
            parts = []
        total = content(x.tocoo().data)
        return kind, x.shape, str(x.dtype), [describe(part) for part in parts], total
    if isinstance(x, memoryview):
        return kind, x.format, x.shape, x.readonly, zlib.crc32(x.tobytes())
    if isinstance(x, bytes | bytearray):
        return kind, len(x), zlib.crc32(x)
    if isinstance(x, array.array):
        return kind, x.typecode, len(x), zlib.crc32(x.tobytes())
    if isinstance(x, ctypes.Array):
        return "ctypes", len(x), zlib.crc32(bytes(x))
    if isinstance(x, list | tuple):
        if len(x) == 2 and all(isinstance(item, np.ndarray) for item in x):
            return kind, [describe(item) for item in x], x[0] is x[1]
        return kind, [describe(item) for item in x]
    if isinstance(x, dict):
        return kind, [(repr(key), describe(value)) for key, value in x.items()]
    if is_dataclass(x):
        return kind, [describe(getattr(x, field.name)) for field in fields(x)]
    if isinstance(x, Plain):
        return kind, describe(vars(x))
    return kind, repr(x)


def content(x: np.ndarray) -> Any:
    """Checksum what an array holds, not what lies between its fields."""
    x = np.asarray(x)
    if x.dtype.names:
        return [content(x[name]) for name in x.dtype.names]
    if x.dtype.hasobject:
        return zlib.crc32(repr([describe(item) for item in x.ravel()]).encode())
    if x.dtype.kind == "T":
        return zlib.crc32(repr(x.tolist()).encode())
    data = x.tobytes()
    if x.dtype.char in "gG":  # a long double has ten bytes that count, on x86
        data = np.frombuffer(data, "u1").reshape(-1, 16)[:, :10].tobytes()
    return zlib.crc32(data)


def pandas_facts(x: Any) -> tuple[Any, ...]:
    facts: list[Any] = [
        zlib.crc32(repr(x.to_dict() if hasattr(x, "to_dict") else list(x)).encode())
    ]
    if isinstance(x, pd.Index):
        facts += [str(x.dtype), list(x.names), str(getattr(x, "freq", None)), len(x)]
        if isinstance(x, pd.MultiIndex):
            facts += [[describe(level) for level in x.levels], [len(code) for code in x.codes]]
        return tuple(facts)
    facts += [describe(axis) for axis in x.axes]
    facts += [str(x.dtypes), repr(x.attrs), x.flags.allows_duplicate_labels]
    for block in x._mgr.blocks:
        values = block.values
        facts.append(str(values.dtype))
        if isinstance(values, np.ndarray) and not values.dtype.hasobject:
            facts += [values.flags.writeable, values.flags.c_contiguous, values.strides]
    return tuple(facts)
