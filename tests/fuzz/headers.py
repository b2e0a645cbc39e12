"""Entries: headers of the pool, of the family's arrays, of device arrays; the configuration."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import dask
import numpy as np
from distributed.protocol.serialize import Serialized

from dask_shm_bridge import config, family, location
from dask_shm_bridge.cuda import arrays
from dask_shm_bridge.errors import HeaderError, PoolError
from dask_shm_bridge.layout import HEADER_SIZE, REGION_NAMES, Header, Layout

from .mutation import EXTREMES, TEXTS, mutate, number, twist, value
from .watch import on, watching

Case = Callable[[Random], str]


@contextlib.contextmanager
def pool_header() -> Iterator[Case]:
    """Read the first bytes of a pool file."""
    small = Layout(1 << 20, (1, 1, 2))
    seeds = [
        Header(bytes(range(16)), small, small).pack(),
        Header(b"\xff" * 16, Layout(), Layout(1 << 30, (4, 0, 9))).pack(),
    ]

    def case(rng: Random) -> str:
        data = rng.choice(seeds)
        kind = rng.randrange(4)
        if kind == 0:
            data = mutate(rng, data)
        elif kind == 1:
            data = rng.randbytes(rng.randrange(2 * HEADER_SIZE))
        else:  # with a checksum that is right
            body = bytearray(mutate(rng, data[:-4]).ljust(HEADER_SIZE - 4, b"\0"))
            if kind == 2:
                body[:12] = data[:12]
            data = bytes(body) + struct.pack("<I", zlib.crc32(bytes(body[: HEADER_SIZE - 4])))
            data += rng.randbytes(rng.randrange(2))
        try:
            header = Header.unpack(data)
        except PoolError:
            return "refused"
        assert Header.unpack(header.pack()) == header
        for layout in (header.layout, header.asked):
            assert 0 < layout.file_bytes < 2**63
            spans = [layout.window(region) for region in REGION_NAMES]
            assert spans[0][0] == 0
            assert spans[-1][1] == layout.size_bytes
            assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
            str(layout)
        return "read"

    yield case


_STRUCTURED = np.dtype([("a", "<i4"), ("b", "<f8")])
_ARRAYS = [
    np.arange(12, dtype="<f8").reshape(3, 4),
    np.asfortranarray(np.arange(12, dtype="<i2").reshape(3, 4)),
    np.arange(100, dtype="u1")[::3],
    np.array(5),
    np.zeros((0, 3)),
    np.broadcast_to(np.arange(3), (4, 3)),
    np.zeros(5, _STRUCTURED),
    np.zeros(5, [("a", "<i4", (2, 2)), ("b", [("c", "S3")])]),
    np.array(["a", "bcd"]),
    np.array(["2020-01-01"], "M8[D]"),
]
_DTYPES = ("<f8", "|u1", ">i4", "O", "|O8", "V8", "V0", "<U2", "S0", "M8[s]", "f8,O", "(2,)f8")


def _within(x: np.ndarray[Any, Any], frame: bytearray) -> None:
    """See that an array's elements lie in its frame, or in memory of its own; and read them."""
    assert not x.dtype.hasobject
    start = np.frombuffer(frame, np.uint8).__array_interface__["data"][0] if frame else 0
    address = x.__array_interface__["data"][0]
    if x.size and (not frame or start - 4096 <= address <= start + len(frame) + 4096):
        low = sum(min(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True))
        high = sum(max(0, (n - 1) * s) for n, s in zip(x.shape, x.strides, strict=True))
        assert address + low >= start
        assert address + high + x.itemsize <= start + len(frame)
    if x.nbytes <= 1 << 16:
        x.tobytes()


def _bent(rng: Random, header: dict[str, Any]) -> Any:
    """Change a header: anything, or figures only."""
    kind = rng.randrange(4)
    if kind == 0:
        return twist(rng, header)
    header = dict(header)
    dimensions = rng.randrange(4)
    if kind == 1:
        header["shape"] = tuple(number(rng) for _ in range(dimensions))
        header["strides"] = tuple(number(rng) for _ in range(dimensions))
    elif kind == 2:
        key = rng.choice(("shape", "strides"))
        figures = list(header[key]) or [1]
        figures[rng.randrange(len(figures))] = rng.choice(EXTREMES)
        header[key] = tuple(figures)
    else:
        # strides that wrap round in 64 bits
        power = rng.randrange(1, 63)
        header["shape"] = (2**power + rng.randrange(2),)
        header["strides"] = (rng.choice((1, -1)) * 2 ** (64 - power),)
    return header


@contextlib.contextmanager
def family_header() -> Iterator[Case]:
    """Build arrays by the family's headers; translate such headers for stock peers."""
    seeds = [family.dumps(x) for x in _ARRAYS]

    def case(rng: Random) -> str:
        header, frames = rng.choice(seeds)
        array = dict(header["array"])
        kind = rng.randrange(6)
        if kind == 0:
            array["dtype"] = (0, rng.choice((*_DTYPES, value(rng, 2))))
        elif kind == 1 and array["dtype"][0]:
            text = mutate(rng, array["fields"].encode()).decode("latin-1")
            array["fields"] = rng.choice((text, value(rng, 2)))
        elif kind == 2:
            array["dtype"] = (1, rng.choice((b"cos\nsystem\n.", b"cnumpy\nndarray\n.", b"N.")))
        elif kind < 5:
            array = _bent(rng, array)
        frame = bytearray(b"".join(bytes(memoryview(f).cast("B")) for f in frames))
        if rng.randrange(3) == 0:
            frame = frame[: rng.randrange(len(frame) + 1)]
        header = {"array": array} if rng.randrange(20) else twist(rng, {"array": array})
        count = 1 if rng.randrange(10) else rng.randrange(3)
        with on(watch):
            if isinstance(header, dict):
                whole = {**header, "serializer": family.NAME}
                body = {"x": Serialized(whole, [frame]), "serializers": value(rng, 1)}
                assert isinstance(family.translated(body), dict)
                family.translated(Serialized(twist(rng, {"sub-headers": [whole]}), []))
            else:
                header = {}
            try:
                x = family.loads(header, [frame] * count)
            except HeaderError:
                return "refused"
        _within(x, frame)
        return "read"

    with watching() as watch:
        yield case


@contextlib.contextmanager
def device_header() -> Iterator[Case]:
    """Build arrays by the headers of device arrays, in a process without a device."""

    def case(rng: Random) -> str:
        x = np.ascontiguousarray(rng.choice(_ARRAYS))
        header: Any = {"shape": x.shape, "typestr": x.dtype.str, "strides": x.strides}
        kind = rng.randrange(6)
        if kind == 0:
            header["typestr"] = rng.choice((*_DTYPES, value(rng, 2)))
        elif kind < 5:
            header = _bent(rng, header)
        frame = bytearray(x.tobytes())
        if rng.randrange(3) == 0:
            frame = frame[: rng.randrange(len(frame) + 1)]
        frames = [frame] * (1 if rng.randrange(10) else rng.randrange(3))
        build = rng.choice((arrays.deserialize, arrays.rebuild, _through_dask))
        with on(watch):
            try:
                found = build(header, frames)
            except HeaderError:
                return "refused"
        _within(found, frame)
        return "read"

    config.get("threshold")  # the file of the defaults is read once
    with dask.config.set({"shm-bridge.cuda.no-device": "numpy"}), watching() as watch:
        yield case


def _through_dask(header: Any, frames: list[Any]) -> Any:
    whole = {"type": "cupy.ndarray", "sub-header": header, "serializer": "dask"}
    return arrays._loads_without_cupy(whole, frames)


_KEYS = ("threshold", "hold-limit", "copy-threads", "tls", "ledger-timeout", "pool.linger")
_KEYS += ("pool.path", "pool.size", "pool.slot-size", "pool.regions")
_EXCHANGE = ("exchange.path", "exchange.mode", "exchange.size", "exchange.piece")
_PLACEMENT = ("placement.enabled", "placement.modules", "placement.no-gpu")
_WORDS = (
    "4 GiB",
    "64 KiB",
    "1e30 B",
    "5s",
    "-5s",
    "1e400s",
    "nan s",
    "1 potato",
    "~",
    "\0",
    *TEXTS,
)


@contextlib.contextmanager
def settings() -> Iterator[Case]:
    """Read a configuration."""

    def any_value(rng: Random) -> Any:
        kind = rng.randrange(4)
        if kind == 0:
            return rng.choice(_WORDS)
        if kind == 1:
            names = (*REGION_NAMES, rng.choice(_WORDS), number(rng))
            return {rng.choice(names): number(rng) for _ in range(rng.randrange(4))}
        return value(rng, 2)

    def case(rng: Random) -> str:
        keys = (*_KEYS, *_EXCHANGE, *_PLACEMENT)
        changes = {
            f"shm-bridge.{rng.choice(keys)}": any_value(rng) for _ in range(rng.randrange(1, 4))
        }
        if not rng.randrange(10):  # not beside others: Dask can't take those back then
            changes = {
                f"shm-bridge.{rng.choice(('pool', 'exchange', 'placement'))}": any_value(rng)
            }
        outcome = "read"
        with dask.config.set(changes), on(watch):
            try:
                found = config.Settings.from_config()
            except PoolError as error:
                assert "shm-bridge." in str(error), error
                outcome = "refused"
            else:
                _usable(found)
            try:
                exchange = config.ExchangeSettings.from_config()
            except PoolError as error:
                assert "shm-bridge." in str(error), error
            else:
                assert exchange.path is None or os.path.isabs(exchange.path)
                assert exchange.mode in config.EXCHANGE_MODES
                assert 0 < exchange.piece_bytes < exchange.size_bytes
            try:
                placement = config.PlacementSettings.from_config()
            except PoolError as error:
                assert "shm-bridge." in str(error), error
            else:
                assert placement.no_gpu in config.NO_GPU_MODES
        return outcome

    config.get("threshold")  # the file of the defaults is read once
    location.foreign("/")  # and what says which file systems there are, loaded
    with watching("/") as watch:  # it is looked where each of these folders lies
        yield case


def _usable(found: config.Settings) -> None:
    assert found.path is None or os.path.isabs(found.path)
    assert found.path is None or "\0" not in found.path
    assert found.threshold_bytes >= 1
    assert 0 <= found.hold_limit <= 1
    assert 1 <= found.copy_threads <= 1024
    for seconds in (found.ledger_timeout_s, found.linger_s):
        assert math.isfinite(seconds)
        assert seconds >= 0
    if found.layout is not None:
        header = Header(bytes(16), found.layout, found.layout)
        assert Header.unpack(header.pack()) == header
