"""Integers in, integers out: the division of a pool, and the bytes of its header."""

from __future__ import annotations

import pickle
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dask_shm_bridge import errors
from dask_shm_bridge.errors import PoolError
from dask_shm_bridge.layout import (
    FORMAT_VERSION,
    GRAIN_BYTES,
    HEADER_BYTES,
    HEADER_SIZE,
    REGION_NAMES,
    Header,
    Layout,
    grains,
)

MiB = 1024**2

layouts = st.builds(
    Layout,
    st.integers(1, 1 << 30).map(lambda count: count * GRAIN_BYTES),
    st.tuples(*[st.integers(0, 1000)] * 3).filter(any),
)

# Written down once; other versions of this package, and other programs, read these bytes.
GOLDEN = bytes.fromhex(
    "4441534b53484d42"  # DASKSHMB
    "01000000"
    "00000000"  # format 1, padding
    "000102030405060708090a0b0c0d0e0f"  # pool id
    "0000001000000000"
    "04000000"
    "04000000"
    "08000000"  # 256 MiB; 4, 4 and 8 slots
    "0000002000000000"
    "01000000"
    "02000000"
    "03000000"  # asked: 512 MiB; 1, 2 and 3 slots
    "f3086dca"  # CRC-32 of all that
)


def test_golden_bytes_of_the_header():
    header = Header(bytes(range(16)), Layout(), Layout(512 * MiB, (1, 2, 3)))
    assert header.pack() == GOLDEN
    assert len(GOLDEN) == HEADER_SIZE == 76
    assert zlib.crc32(GOLDEN[:-4]).to_bytes(4, "little") == GOLDEN[-4:]
    assert Header.unpack(GOLDEN) == header
    assert Header.unpack(GOLDEN + b"whatever follows") == header


def test_golden_figures():
    # A change of any of these is a change of the format.
    assert (65536, 2 * MiB, 1) == (GRAIN_BYTES, HEADER_BYTES, FORMAT_VERSION)
    assert REGION_NAMES == ("input", "output", "scratch")
    assert Layout() == Layout(256 * MiB, (4, 4, 8))
    assert Layout().size_bytes == 4 * 1024**3
    assert Layout().file_bytes == 4 * 1024**3 + 2 * MiB


@given(st.binary(min_size=16, max_size=16), layouts, layouts)
def test_a_header_survives_the_round_trip(pool_id, layout, asked):
    header = Header(pool_id, layout, asked)
    assert Header.unpack(header.pack()) == header


@given(st.binary(max_size=200))
@example(b"")
@example(b"DASKSHMB")
@example(GOLDEN[:-1])
def test_random_bytes_are_a_pool_error(data):
    with pytest.raises(PoolError):
        Header.unpack(data)


@given(st.binary(min_size=HEADER_SIZE - 12, max_size=HEADER_SIZE - 12))
@example(bytes(HEADER_SIZE - 12))
def test_random_figures_with_a_right_checksum_are_a_pool_error_or_a_pool(rest):
    body = b"DASKSHMB" + rest
    body = body[:8] + FORMAT_VERSION.to_bytes(4, "little") + body[12:]
    try:
        header = Header.unpack(body + zlib.crc32(body).to_bytes(4, "little"))
    except PoolError:
        return
    assert Header.unpack(header.pack()) == header


@given(st.integers(0, HEADER_SIZE * 8 - 1))
def test_any_one_wrong_bit_is_a_pool_error(bit):
    data = bytearray(GOLDEN)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PoolError):
        Header.unpack(bytes(data))


def test_another_version_is_named_before_the_checksum_is_looked_at():
    data = bytearray(GOLDEN)
    data[8] = 7
    with pytest.raises(PoolError, match=r"format 7.*reads 1"):
        Header.unpack(bytes(data))
    damaged = bytearray(GOLDEN)
    damaged[20] ^= 1
    with pytest.raises(PoolError, match="checksum"):
        Header.unpack(bytes(damaged))


@pytest.mark.parametrize("slot", [0, -65536, 1, 65535, 65537, 100_000])
def test_a_slot_is_whole_grains(slot):
    with pytest.raises(PoolError, match="slot-size"):
        Layout(slot, (1, 1, 1))


@pytest.mark.parametrize("slots", [(0, 0, 0), (-1, 1, 1), (1, 1, -1)])
def test_regions_are_not_negative_and_not_all_empty(slots):
    with pytest.raises(PoolError, match="regions"):
        Layout(GRAIN_BYTES, slots)


@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [(0, 1), (1, 1), (65535, 1), (65536, 1), (65537, 2), (10 * 65536, 10), (10 * 65536 + 1, 11)],
)
def test_grains_round_up(nbytes, expected):
    assert grains(nbytes) == expected * GRAIN_BYTES


@given(layouts)
def test_windows_divide_the_pool_without_gap_or_overlap(layout):
    ends = [0]
    for region, count in zip(REGION_NAMES, layout.slots, strict=True):
        start, end = layout.window(region)
        assert start == ends[-1]
        assert end - start == count * layout.slot_bytes
        if count:
            assert layout.region_at(start) == layout.region_at(end - 1) == region
        ends.append(end)
    assert ends[-1] == layout.size_bytes
    for outside in (-1, layout.size_bytes):
        with pytest.raises(ValueError, match="outside"):
            layout.region_at(outside)


def test_windows_to_try():
    layout = Layout(MiB, (4, 2, 3))
    own, other, scratch = (0, 4 * MiB), (4 * MiB, 6 * MiB), (6 * MiB, 9 * MiB)
    everything = (0, 9 * MiB)
    assert layout.windows("input", 1) == [own, scratch]
    assert layout.windows("input", 4 * MiB) == [own, scratch]
    assert layout.windows("input", 4 * MiB + 1) == [own, scratch, everything]
    assert layout.windows("output", 3 * MiB) == [other, scratch]
    assert layout.windows("output", 3 * MiB + 1) == [other, scratch, everything]
    assert layout.windows("scratch", 3 * MiB) == [scratch]
    assert layout.windows("scratch", 3 * MiB + 1) == [scratch, everything]
    assert layout.windows("input", 10 * MiB) == [own, scratch, everything]
    with pytest.raises(ValueError, match="not in tuple"):
        layout.windows("elsewhere", 1)


def test_windows_of_regions_without_slots():
    layout = Layout(MiB, (0, 4, 0))
    assert layout.windows("input", 1) == [(0, 4 * MiB)]
    assert layout.windows("scratch", 1) == [(0, 4 * MiB)]
    assert layout.windows("output", 5 * MiB)[0] == (0, 4 * MiB)


@given(layouts, st.integers(-1, 1 << 48))
def test_shrunk_fits_and_keeps_the_division(layout, available):
    shrunk = layout.shrunk(available)
    assert shrunk.slots == layout.slots
    if layout.size_bytes <= available:
        assert shrunk is layout
    elif available >= GRAIN_BYTES * sum(layout.slots):
        assert shrunk.size_bytes <= available
        # no smaller than it must be: one grain more a slot would not fit
        larger = (shrunk.slot_bytes + GRAIN_BYTES) * sum(layout.slots)
        assert larger > available
    else:
        assert shrunk.slot_bytes == GRAIN_BYTES


def test_it_says_what_it_is():
    assert str(Layout()) == "16 slots of 256 MiB (4 input, 4 output, 8 scratch; 4 GiB)"


@pytest.mark.parametrize(
    "error",
    [
        errors.PoolLayoutError("/pool", "this", "that"),
        errors.PoolUnsafeError("unsafe"),
        errors.StaleTicketError("stale"),
    ],
)
def test_errors_cross_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
