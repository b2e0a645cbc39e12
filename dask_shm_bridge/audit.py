"""Whether the tables of a ledger are such as its members can have written them.

An attacher looks before it trusts them: an offset that is taken from a damaged table would be
somebody else's bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from dask_shm_bridge.layout import GRAIN_BYTES, REGION_NAMES, Layout, grains
from dask_shm_bridge.record import Tables


def faults(tables: Tables, layout: Layout) -> list[str]:
    """Return what is wrong with tables, whatever they hold; an empty list where nothing is.

    Parameters
    ----------
    tables : Tables
        As they were read, of any types.
    layout : Layout
        How the pool is divided.
    """
    found = list(_of_form(tables))
    return found or list(_of_sums(tables, layout))


def _number(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 1 << 64


def _row(value: Any, length: int) -> bool:
    return type(value) is list and len(value) == length and all(map(_number, value))


def _of_form(tables: Tables) -> Iterator[str]:
    """See that each table has rows of the right form."""
    if not _number(tables.next, 1):
        yield "the next id is no number"
    pressure: Any = tables.pressure
    if (
        type(pressure) is not list
        or len(pressure) != 3
        or not (_number(pressure[0]) and _number(pressure[2]))
        or type(pressure[1]) is not str
        or pressure[1] not in REGION_NAMES
    ):
        yield "the row of pressure is malformed"
    free: Any = tables.free
    if type(free) is not list or not all(_row(run, 2) for run in free):
        yield "the table of free runs is malformed"
    checks: dict[str, Callable[[Any], bool]] = {
        "extents": lambda row: _row(row, 4),
        "leases": lambda row: _row(row, 2),
        "connections": _is_connection,
        "members": _is_member,
    }
    for name, check in checks.items():
        table = getattr(tables, name)
        if type(table) is not dict:
            yield f"there is no table of {name}"
        elif not all(_number(id_) and check(row) for id_, row in table.items()):
            yield f"the table of {name} is malformed"
        elif name != "members" and any(id_ >= tables.next for id_ in table if _number(tables.next)):
            yield f"the table of {name} has an id that was not given out yet"


def _is_connection(row: Any) -> bool:
    return (
        type(row) is list
        and len(row) == 2
        and _number(row[0])
        and type(row[1]) is dict
        and all(_number(number) and _row(ticket, 3) for number, ticket in row[1].items())
    )


def _is_member(row: Any) -> bool:
    return (
        type(row) is list
        and len(row) == 3
        and _number(row[0])
        and type(row[1]) is str
        and _number(row[2])
    )


def _of_sums(tables: Tables, layout: Layout) -> Iterator[str]:
    """See that the tables agree with one another and with the pool."""
    spans = [(offset, length) for offset, length in tables.free]
    spans += [(row[0], row[1]) for row in tables.extents.values()]
    end = 0
    for offset, length in sorted(spans):
        if offset != end or length <= 0 or length % GRAIN_BYTES:
            yield f"free runs and extents leave a gap, or overlap, at {min(offset, end)}"
            return
        end = offset + length
    if end != layout.size_bytes:
        yield f"free runs and extents end at {end} of {layout.size_bytes}"
    for before, after in zip(tables.free, tables.free[1:], strict=False):
        if sum(before) >= after[0]:
            yield f"the free runs at {before[0]} and {after[0]} touch, or are out of order"
            return
    names: Counter[int] = Counter()
    held: Counter[int] = Counter()
    for lease, (extent, member) in tables.leases.items():
        names[extent] += 1
        if member not in tables.members or extent not in tables.extents:
            yield f"lease {lease} is of a member or an extent that is not there"
        else:
            held[member] += tables.extents[extent][1]
    for connection, (member, tickets) in tables.connections.items():
        if member not in tables.members:
            yield f"connection {connection} is of a member that is not there"
        for number, (extent, start, nbytes) in tickets.items():
            names[extent] += 1
            if extent not in tables.extents or start + nbytes > tables.extents[extent][2]:
                yield f"ticket {number} of connection {connection} is of no extent's bytes"
    for extent, (_, length, nbytes, count) in tables.extents.items():
        if names[extent] != count or not count:
            yield f"extent {extent} has {names[extent]} leases and tickets, but counts {count}"
        if length != grains(nbytes):
            yield f"extent {extent} has {length} bytes of room for {nbytes}"
    for member, (_, _, nbytes) in tables.members.items():
        if held[member] != nbytes:
            yield f"member {member} holds {held[member]} bytes, but counts {nbytes}"
