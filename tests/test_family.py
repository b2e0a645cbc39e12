"""The family mmap-slot by itself, and the one-pass serializer of the default path."""

from __future__ import annotations

import numpy as np
import pytest
from distributed.protocol import deserialize, serialize
from distributed.protocol.core import dumps, loads
from distributed.protocol.numpy import serialize_numpy_ndarray
from distributed.protocol.serialize import Serialize, Serialized

from dask_shm_bridge import family
from dask_shm_bridge.copying import Copier, as_bytes
from dask_shm_bridge.errors import HeaderError

family.register()

SHARED = {family.CONTEXT: True}
BASE = np.arange(2 * 3 * 4 * 5, dtype="f8").reshape(2, 3, 4, 5)

LAYOUTS = {
    "c": BASE,
    "fortran": np.asfortranarray(BASE[0, 0]),
    "strided": BASE[:, ::2, :, ::2],
    "negative": BASE[::-1, :, ::-1],
    "transposed": BASE.transpose(2, 0, 3, 1),
    "complex": (BASE + 1j)[:, :, ::2],
    "dates": BASE.astype("i8").astype("M8[s]")[:, ::2],
    "spans": BASE.astype("i8").astype("m8[ns]")[..., ::3],
    "big-endian": BASE.astype(">f4")[:, ::2],
    "big-endian complex": BASE.astype(">c16")[:, ::2],
    "bool": (BASE > 7)[:, ::2],
    "half": BASE.astype("f2")[::-1],
    "long": BASE.astype("g")[:, ::2],
    "structured": np.zeros((6, 6), [("a", "i4"), ("b", "f8")])[::2, ::2],
    "text": BASE.astype("U5")[:, ::2],
    "broadcast": np.broadcast_to(BASE[0], (7, 3, 4, 5)),
    "empty": BASE[:0, ::2],
    "scalar": np.array(3.5),
    "one": BASE[:1, :1, :1, ::4],
}


def filled(frames: list) -> list:
    """Do with frames what a comm does: copy them out in C order."""
    out = []
    for frame in frames:
        view = memoryview(frame)
        target = np.empty(view.nbytes, np.uint8)
        Copier(1).copy(target, frame)
        out.append(target.data)
    return out


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("serializers", [["dask"], [family.NAME]])
def test_round_trip(x: np.ndarray, serializers: list[str]) -> None:
    header, frames = serialize(x, serializers=serializers, on_error="raise", context=SHARED)
    assert header["serializer"] == serializers[0]
    y = deserialize(header, filled(frames))
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    np.testing.assert_array_equal(y, x)
    assert y.flags.writeable == x.flags.writeable


@pytest.mark.parametrize("name", ["strided", "negative", "transposed", "complex", "dates", "bool"])
def test_a_strided_array_is_copied_once(name: str) -> None:
    x = LAYOUTS[name]
    _, (frame,) = serialize(x, serializers=["dask"], context=SHARED)
    view = memoryview(frame)
    assert not view.c_contiguous
    assert np.shares_memory(np.asarray(view), x)


@pytest.mark.parametrize("name", ["strided", "transposed", "complex"])
def test_the_stock_form_where_no_pool_is_shared(name: str) -> None:
    # Another comm, or spilling to disk: frames must be contiguous there.
    for context in (None, {}, {"compression": None}):
        header, frames = serialize(LAYOUTS[name], serializers=["dask"], context=context)
        assert all(memoryview(frame).c_contiguous for frame in frames)
        stock, _ = serialize_numpy_ndarray(LAYOUTS[name])
        assert header["sub-header"] == stock


@pytest.mark.parametrize("name", ["strided", "negative", "transposed", "dates", "big-endian"])
def test_any_peer_can_read_the_default_path(name: str) -> None:
    header, _ = serialize(LAYOUTS[name], serializers=["dask"], context=SHARED)
    stock, _ = serialize_numpy_ndarray(LAYOUTS[name])
    assert header["serializer"] == "dask"
    assert header["sub-header"] == stock


def test_whole_messages() -> None:
    message = {"data": Serialize({"x": LAYOUTS["strided"], "y": [LAYOUTS["c"], "text"]})}
    for serializers in (None, [family.NAME, "dask", "pickle"]):
        frames = dumps(message, serializers=serializers, context=SHARED, frame_split_size=1 << 62)
        result = loads([frames[0], *filled(frames[1:])])["data"]
        np.testing.assert_array_equal(result["x"], LAYOUTS["strided"])
        np.testing.assert_array_equal(result["y"][0], LAYOUTS["c"])
        assert result["y"][1] == "text"


@pytest.mark.parametrize("x", [1, "text", None, np.array([{}], object), np.ma.array([1, 2])])
def test_what_is_no_plain_array_goes_to_the_next_family(x: object) -> None:
    header, _ = serialize(x, serializers=[family.NAME, "pickle"])
    assert header["serializer"] == "pickle"


def test_a_peer_without_the_family_is_named_at_once() -> None:
    context = {"recipient": {"address": "tcp://10.0.0.1:1", "python": (3, 12)}}
    with pytest.raises(TypeError, match="Could not serialize") as error:
        serialize(LAYOUTS["c"], [family.NAME, "dask"], on_error="raise", context=context)
    assert "tcp://10.0.0.1:1" in str(error.value.__cause__)
    assert "preload" in str(error.value.__cause__)


def test_bytes_of_any_buffer() -> None:
    assert bytes(as_bytes(b"abc")) == b"abc"
    assert bytes(as_bytes(bytearray(b"abc"))) == b"abc"
    assert as_bytes(memoryview(b"")).nbytes == 0
    assert as_bytes(BASE.data).nbytes == BASE.nbytes
    assert as_bytes(LAYOUTS["strided"].data) is None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["c", "strided", "column"])
def test_large_copies_by_several_threads(threads: int, order: str) -> None:
    x = np.random.default_rng(0).integers(0, 255, (1031, 65537), np.uint8)
    x = {"c": x, "strided": x[:, ::2], "column": x[::2]}[order]
    copier = Copier(threads)
    target = np.zeros(x.nbytes, np.uint8)
    copier.copy(target, x.data)
    copier.close()
    assert (target.reshape(x.shape) == x).all()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2**32 + 1,), "strides": (2**32,)},  # wraps round in 64 bits
        {"shape": (13,), "strides": (1,)},
        {"shape": (2,), "strides": (-1,)},
        {"shape": (3,), "strides": ()},
        {"shape": (1.0,)},
        {"dtype": (0, "O")},
        {"dtype": (0, "(2,)u1")},
        {"dtype": (1, b"cos\nsystem\n.")},
        {"dtype": (1, b""), "fields": "[('a', 'O')]"},
        {"dtype": (1, b""), "fields": "[" * 5000},
        {"pickle": True},
        {"dtype": None},
    ],
)
def test_a_header_that_does_not_fit_its_frame_is_refused(change: dict[str, object]) -> None:
    header, _ = family.dumps(np.arange(12, dtype=np.uint8))
    with pytest.raises(HeaderError):
        family.loads({"array": {**header["array"], **change}}, [bytearray(12)])


def test_structured_arrays_come_as_they_were() -> None:
    x = np.zeros(3, [("a", "<i4"), ("b", "<f8", (2,))])
    x["a"] = [1, 2, 3]
    header, frames = family.dumps(x)
    y = family.loads(header, [bytearray(memoryview(frames[0]).cast("B"))])
    assert y.dtype == x.dtype
    assert (y == x).all()


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype((np.record, [("a", "<i4")])),
        np.dtype([("a", "u1"), ("b", "<f8")], align=True),
        np.dtype([("a", "<i4")], metadata={"unit": "m"}),
    ],
)
def test_types_with_more_to_them_go_to_the_next_family(dtype: np.dtype) -> None:
    header, _ = serialize(np.zeros(3, dtype), serializers=[family.NAME, "dask"])
    assert header["serializer"] == "dask"


def test_nothing_is_unpickled_for_a_structured_array() -> None:
    header, frames = family.dumps(np.zeros(3, [("a", "<i4"), ("b", "S3")]))
    array = {**header["array"], "dtype": (1, b"not looked at")}
    assert family.loads({"array": array}, [bytearray(memoryview(frames[0]).cast("B"))]).size == 3


def test_a_relay_passes_on_what_it_can_not_translate() -> None:
    header = {"serializer": family.NAME}
    assert family.translated(Serialized(header, [])).header == header
