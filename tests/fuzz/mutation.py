"""Changes to what is right: bytes, and structures of plain values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from random import Random
from typing import Any

EXTREMES = (
    *(-1, 0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 256, 4095, 4096, 65535, 65536, 65537),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**47, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-(2**31), -(2**32), -(2**63), -65536, -4096, -8),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "a", "\0", "..", "/", "nan", "inf", "-1", "1e400", "é", "\ud800", "x" * 3000)


def number(rng: Random) -> int:
    """Return a whole number, often one that something may stumble over."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randrange(16)
    if kind == 1:
        return rng.getrandbits(rng.choice((8, 16, 32, 40, 63, 64)))
    return rng.choice(EXTREMES)


def value(rng: Random, depth: int = 3) -> Any:
    """Return any plain value."""
    kind = rng.randrange(12 if depth else 8)
    if kind < 3:
        return number(rng)
    if kind == 3:
        return rng.choice(FLOATS)
    if kind == 4:
        return rng.choice(TEXTS)
    if kind == 5:
        return rng.choice((None, True, False))
    if kind == 6:
        return rng.randbytes(rng.randrange(20))
    if kind == 7:
        return 10 ** rng.randrange(100)
    items = [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return items
    if kind == 9:
        return tuple(items)
    if kind == 10:
        return {rng.choice((number(rng), *TEXTS)): item for item in items}
    deep: Any = 0
    for _ in range(rng.choice((5, 70, 200))):
        deep = [deep]
    return deep


def _places(thing: Any) -> Iterator[tuple[Any, Any]]:
    """Name every place of a structure of dictionaries and lists."""
    if isinstance(thing, dict):
        for key in thing:
            yield thing, key
            yield from _places(thing[key])
    elif isinstance(thing, list):
        for index in range(len(thing)):
            yield thing, index
            yield from _places(thing[index])


def _listed(thing: Any) -> Any:
    if isinstance(thing, dict):
        return {key: _listed(item) for key, item in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [_listed(item) for item in thing]
    return copy.copy(thing)


def twist(rng: Random, thing: Any, most: int = 3) -> Any:
    """Return a copy of a structure with some of its values changed, gone or doubled."""
    thing = _listed(thing)
    for _ in range(rng.randrange(1, most + 1)):
        places = list(_places(thing))
        if not places:
            return value(rng)
        parent, key = rng.choice(places)
        kind = rng.randrange(6)
        found = parent[key]
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(found, (bytes, bytearray)):
            parent[key] = mutate(rng, bytes(found))
        elif kind <= 2 and type(found) is int:
            parent[key] = found + rng.choice((-1, 1, 64, -64, 65536, -65536))
        elif kind == 3 and isinstance(parent, list):
            parent.insert(key, _listed(rng.choice(parent)))
        elif kind == 3:
            parent[rng.choice((number(rng), *TEXTS))] = _listed(found)
        elif kind == 4:
            parent[key] = number(rng)
        else:
            parent[key] = value(rng, 2)
    return thing


def mutate(rng: Random, data: bytes, most: int = 4) -> bytes:
    """Return bytes with some flipped, inserted, deleted, cut off or replaced by extremes."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, most + 1)):
        size = len(changed)
        at = rng.randrange(size) if size else 0
        kind = rng.randrange(8)
        if kind == 0 and size:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            changed[at] = rng.getrandbits(8)
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 3:
            del changed[at : at + rng.randrange(1, 17)]
        elif kind == 4:
            del changed[at:]
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            wanted = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
            changed[at : at + width] = wanted.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 6 and size:
            other = rng.randrange(size)
            changed[at:at] = changed[other : other + rng.randrange(1, 33)]
        else:
            changed[at : at + 8] = bytes(8)
    return bytes(changed)
