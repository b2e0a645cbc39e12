"""The layout of a pool: slots, regions and grains, and the bytes of its header.

Integers in, integers out: nothing here sees memory, files or processes.

A pool file is a header of :data:`HEADER_BYTES` followed by the slots. Offsets are counted from
the first slot; add :data:`HEADER_BYTES` for the offset in the file. Extents are made of whole
grains of 64 KiB, the coarsest mapping granularity there is (Windows).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from dask_shm_bridge.errors import PoolError

GRAIN_BYTES = 64 * 1024
HEADER_BYTES = 2 * 1024 * 1024  # slots start on a huge-page border; the header is sparse
FORMAT_VERSION = 1
MAGIC = b"DASKSHMB"

_MOST_SLOTS = 2**32 - 1
_MOST_BYTES = 2**63 - 1

DEFAULT_SIZE_BYTES = 4 * 1024**3
DEFAULT_SLOT_BYTES = 256 * 1024**2
REGION_NAMES = ("input", "output", "scratch")

_HEADER = struct.Struct("<8sI4x16sQ3IQ3I")
_CRC = struct.Struct("<I")


def grains(nbytes: int) -> int:
    """Round a size in bytes up to whole grains, in bytes; an extent has at least one."""
    return max(1, -(-nbytes // GRAIN_BYTES)) * GRAIN_BYTES


@dataclass(frozen=True)
class Layout:
    """How a pool is divided.

    Parameters
    ----------
    slot_bytes : int
        Size of a slot, a multiple of :data:`GRAIN_BYTES`.
    slots : tuple of int
        How many slots each region of :data:`REGION_NAMES` has, in that order.

    Raises
    ------
    PoolError
        If the figures make no pool.
    """

    slot_bytes: int = DEFAULT_SLOT_BYTES
    slots: tuple[int, int, int] = (4, 4, 8)

    def __post_init__(self) -> None:
        if self.slot_bytes <= 0 or self.slot_bytes % GRAIN_BYTES:
            raise PoolError(
                f"a slot of {self.slot_bytes} bytes is not a multiple of {GRAIN_BYTES} "
                "(64 KiB): change shm-bridge.pool.slot-size"
            )
        if min(self.slots) < 0 or sum(self.slots) < 1:
            raise PoolError(
                f"{self.slots} slots in regions {REGION_NAMES}: each must be 0 or more, and "
                "together at least 1; change shm-bridge.pool.regions"
            )
        if max(self.slots) > _MOST_SLOTS or self.file_bytes > _MOST_BYTES:
            raise PoolError(
                f"{sum(self.slots)} slots of {self.slot_bytes} bytes: no pool is so large; change "
                "shm-bridge.pool.size, slot-size or regions"
            )

    @property
    def size_bytes(self) -> int:
        """All slots together, without the header."""
        return self.slot_bytes * sum(self.slots)

    @property
    def file_bytes(self) -> int:
        """Size of the pool file."""
        return HEADER_BYTES + self.size_bytes

    def window(self, region: str) -> tuple[int, int]:
        """Return the first offset of a region and the first one behind it."""
        index = REGION_NAMES.index(region)
        start = sum(self.slots[:index]) * self.slot_bytes
        return start, start + self.slots[index] * self.slot_bytes

    def windows(self, region: str, nbytes: int) -> list[tuple[int, int]]:
        """Return where an extent of `nbytes` for `region` may lie, in the order to try.

        Its own region first, then scratch. What neither could ever hold may span the pool.
        """
        windows = [self.window(region)]
        if region != "scratch":
            windows.append(self.window("scratch"))
        if all(end - start < nbytes for start, end in windows):
            windows.append((0, self.size_bytes))
        return [window for window in windows if window[1] > window[0]]

    def region_at(self, offset: int) -> str:
        """Return the name of the region that an offset lies in."""
        for region in REGION_NAMES:
            start, end = self.window(region)
            if start <= offset < end:
                return region
        raise ValueError(f"offset {offset} lies outside a pool of {self.size_bytes} bytes")

    def shrunk(self, available_bytes: int) -> Layout:
        """Return the same division with smaller slots, so that it fits `available_bytes`.

        The layout itself where it fits. At least one grain a slot remains.
        """
        if self.size_bytes <= available_bytes:
            return self
        slot = available_bytes // sum(self.slots) // GRAIN_BYTES * GRAIN_BYTES
        return Layout(max(slot, GRAIN_BYTES), self.slots)

    def __str__(self) -> str:
        division = ", ".join(
            f"{count} {name}" for name, count in zip(REGION_NAMES, self.slots, strict=True)
        )
        return (
            f"{sum(self.slots)} slots of {self.slot_bytes / 1024**2:g} MiB ({division}; "
            f"{self.size_bytes / 1024**3:g} GiB)"
        )


@dataclass(frozen=True)
class Header:
    """What the first bytes of a pool file say.

    Parameters
    ----------
    pool_id : bytes
        16 random bytes, different for each pool ever made.
    layout : Layout
        How the pool is divided.
    asked : Layout
        What its maker asked for; larger than `layout` where the file system was too small.
    """

    pool_id: bytes
    layout: Layout
    asked: Layout

    def pack(self) -> bytes:
        """Return the header's bytes, closed by a CRC-32 of what precedes."""
        body = _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            self.pool_id,
            self.layout.slot_bytes,
            *self.layout.slots,
            self.asked.slot_bytes,
            *self.asked.slots,
        )
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read a header.

        Raises
        ------
        PoolError
            If these are not the bytes of a pool of this version; the message says why.
        """
        if len(data) < _HEADER.size + _CRC.size or data[:8] != MAGIC:
            raise PoolError("not a pool file of dask-shm-bridge")
        body = data[: _HEADER.size]
        _, version, pool_id, slot, a, b, c, asked_slot, d, e, f = _HEADER.unpack(body)
        if version != FORMAT_VERSION:
            raise PoolError(f"a pool of format {version}; this version reads {FORMAT_VERSION}")
        if _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(body):
            raise PoolError("a damaged pool header (its checksum does not match)")
        return cls(pool_id, Layout(slot, (a, b, c)), Layout(asked_slot, (d, e, f)))


HEADER_SIZE = _HEADER.size + _CRC.size
