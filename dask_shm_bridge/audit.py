"""The rules of the ledger, held against its tables. Nothing here sees files or processes.

A process that joins looks before it trusts them: an offset from a damaged table would be somebody
else's bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dask_shm_bridge.layout import GRAIN_BYTES, REGION_NAMES, Layout
from dask_shm_bridge.record import MAX_EXTENTS, Tables


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not as it should be.

    Parameters
    ----------
    kind : str
        What sort of thing, in a word or two.
    subject : str
        Which one: a path, or a row of the ledger. Two findings of one kind and subject are equal.
    text : str
        A sentence for people.
    """

    kind: str
    subject: str
    text: str = field(compare=False)


def malformed(tables: Tables) -> str | None:
    """Say what is no table of a ledger, if anything; the rules can't be asked before."""
    try:
        for name in ("extents", "leases", "connections", "members"):
            if type(getattr(tables, name)) is not dict:
                return f"{name} is no table"
        _numbers([tables.next])
        number, region, nbytes = tables.pressure
        _numbers([number, nbytes])
        if region not in REGION_NAMES:
            return f"pressure names the region {region!r}"
        if type(tables.free) is not list:
            return "free is no table"
        for row in tables.free:
            _numbers(row, 2)
        for table, width in ((tables.extents, 4), (tables.leases, 2)):
            for key, row in table.items():
                _numbers([key, *row], 1 + width)
        for connection, (receiver, tickets) in tables.connections.items():
            _numbers([connection, receiver])
            if type(tickets) is not dict:
                return f"the tickets of connection {connection} are no table"
            for ticket, row in tickets.items():
                _numbers([ticket, *row], 4)
        for member, (pid, role, held) in tables.members.items():
            _numbers([member, pid, held])
            if type(role) is not str:
                return f"the role of member {member:016x} is {role!r}"
    except (TypeError, ValueError, AttributeError) as error:
        return f"a row has the wrong form ({error})"
    return None


def _numbers(row: Any, width: int | None = None) -> None:
    if type(row) is not list:
        raise TypeError(f"{row!r:.100} is no row")
    if width is not None and len(row) != width:
        raise ValueError(f"{len(row)} fields where there are {width}")
    for number in row:
        if type(number) is not int:
            raise TypeError(f"{number!r:.100} is no whole number")


def audit(tables: Tables, layout: Layout) -> list[Finding]:
    """Return what breaks the rules of the ledger.

    Parameters
    ----------
    tables : Tables
        All rows, as one transaction saw them. Not changed.
    layout : Layout
        Of the pool.
    """
    wrong = malformed(tables)
    if wrong is not None:
        return [Finding("tables", "ledger", f"the ledger is damaged: {wrong}")]
    return [
        *_space(tables, layout),
        *_names(tables),
        *_ids(tables),
    ]


def _space(tables: Tables, layout: Layout) -> Iterator[Finding]:
    """See that every byte is in exactly one extent or free run."""
    runs = [(offset, length, "free run", f"free at {offset}") for offset, length in tables.free]
    runs += [
        (row[0], row[1], f"extent {extent}", f"extent {extent}")
        for extent, row in tables.extents.items()
    ]
    good = []
    for offset, length, name, subject in runs:
        end = offset + length
        if offset < 0 or length <= 0 or end > layout.size_bytes:
            yield Finding(
                "outside", subject, f"{name} is [{offset}, {end}), not within the pool's slots"
            )
        elif offset % GRAIN_BYTES or length % GRAIN_BYTES:
            yield Finding("grains", subject, f"{name}, [{offset}, {end}), is not of whole grains")
        else:
            good.append((offset, length, name, subject))
    for extent, (_, length, nbytes, _) in tables.extents.items():
        if not length - GRAIN_BYTES < nbytes <= length:
            yield Finding(
                "size", f"extent {extent}", f"extent {extent} of {length} bytes holds {nbytes}"
            )
    if tables.free != sorted(tables.free):
        yield Finding("order", "free", "the free runs are not in the order of their offsets")
    reached, before = 0, ("", "")
    for offset, length, name, subject in sorted(good):
        if offset < reached:
            yield Finding(
                "overlap", f"{before[1]}, {subject}", f"{before[0]} and {name} overlap at {offset}"
            )
        elif offset > reached:
            yield _leak(reached, offset)
        if offset + length > reached:
            reached, before = offset + length, (name, subject)
    if reached < layout.size_bytes:
        yield _leak(reached, layout.size_bytes)
    for (offset, length), (following, _) in pairwise(sorted(tables.free)):
        if offset + length == following:
            yield Finding("split", f"free at {following}", f"free runs touch at {following}")
    if len(tables.extents) > MAX_EXTENTS:
        yield Finding("many", "extents", f"{len(tables.extents)} extents; {MAX_EXTENTS} may be")


def _leak(start: int, end: int) -> Finding:
    return Finding(
        "leak", f"[{start}, {end})", f"[{start}, {end}) is neither free nor in an extent"
    )


def _names(tables: Tables) -> Iterator[Finding]:
    """See that each extent is named by leases and tickets, and by as many as it counts."""
    names: Counter[int] = Counter()
    held: Counter[int] = Counter()
    for lease, (extent, member) in tables.leases.items():
        names[extent] += 1
        if extent not in tables.extents:
            yield Finding(
                "lease", f"lease {lease}", f"lease {lease} names extent {extent}, which is not"
            )
        else:
            held[member] += tables.extents[extent][1]
        if member not in tables.members:
            yield Finding(
                "lease",
                f"lease {lease} of {member:016x}",
                f"lease {lease} belongs to member {member:016x}, which is not in the ledger",
            )
    for connection, (receiver, tickets) in tables.connections.items():
        if receiver not in tables.members:
            yield Finding(
                "connection",
                f"connection {connection}",
                f"connection {connection}, with {len(tickets)} tickets, belongs to member "
                f"{receiver:016x}, which is not in the ledger",
            )
        for number, (extent, start, nbytes) in tickets.items():
            subject = f"ticket {number} of connection {connection}"
            names[extent] += 1
            row = tables.extents.get(extent)
            if row is None:
                yield Finding("ticket", subject, f"{subject} names extent {extent}, which is not")
            elif start < 0 or nbytes < 0 or start + nbytes > row[2]:
                yield Finding(
                    "ticket",
                    subject,
                    f"{subject} names [{start}, {start + nbytes}) of extent {extent}, which holds "
                    f"{row[2]} bytes",
                )
    for extent, row in tables.extents.items():
        if not names[extent]:
            yield Finding(
                "unnamed", f"extent {extent}", f"no lease and no ticket names extent {extent}"
            )
        elif names[extent] != row[3]:
            yield Finding(
                "count",
                f"extent {extent}",
                f"{names[extent]} leases and tickets name extent {extent}, which counts {row[3]}",
            )
    for member, (_, _, nbytes) in tables.members.items():
        if held[member] != nbytes:
            yield Finding(
                "held",
                f"member {member:016x}",
                f"member {member:016x} holds {held[member]} bytes by its leases, and {nbytes} by "
                "its row",
            )


def _ids(tables: Tables) -> Iterator[Finding]:
    """See that each id was given out, once."""
    ids = Counter([*tables.extents, *tables.leases, *tables.connections])
    for each, times in ids.items():
        if not 0 < each < tables.next:
            yield Finding(
                "id", str(each), f"there is an id {each}, but the next one is {tables.next}"
            )
        elif times > 1:
            yield Finding("id", str(each), f"the id {each} was given out {times} times")
