"""A pool in words, bars and HTML."""

from __future__ import annotations

from collections import Counter
from html import escape
from typing import TYPE_CHECKING, Any

from dask.utils import format_bytes

if TYPE_CHECKING:
    from rich.console import Group

    from dask_shm_bridge.status.figures import PoolStatus

COLOURS = {"input": "#4c78a8", "output": "#f58518", "scratch": "#72b7b2"}
_STYLES = {"input": "blue", "output": "dark_orange", "scratch": "cyan"}
_CELLS = 6


def text(status: PoolStatus) -> str:
    """Return one line."""
    if status.id is None:
        return f"<no pool in {status.path}: {status.why}>"
    return (
        f"<pool {status.id[:8]} in {status.path}: {format_bytes(status.used_bytes)} of "
        f"{format_bytes(status.size_bytes)} used, {len(status.slots)} slots, "
        f"{len(status.members)} members, {status.leases} leases, {status.tickets} tickets>"
    )


def html(status: PoolStatus) -> str:
    """Return a table and the slots, in the manner of Dask's own."""
    if status.id is None:
        return f"<div><b>No pool</b> in {escape(str(status.path))}: {escape(status.why)}</div>"
    cells = "".join(
        f'<div title="{slot.region} {number}: {format_bytes(slot.used_bytes)} of '
        f'{format_bytes(slot.size_bytes)}" style="flex:1;min-width:14px;height:28px;'
        f"border:1px solid #8888;background:linear-gradient(to top,{COLOURS[slot.region]} "
        f'{_share(slot.used_bytes, slot.size_bytes):.0f}%,#8882 0)"></div>'
        for number, slot in enumerate(status.slots)
    )
    rows = [
        ("Path", escape(str(status.path))),
        ("Used", f"{format_bytes(status.used_bytes)} of {format_bytes(status.size_bytes)}"),
        *(
            (
                f'<span style="color:{COLOURS[name]}">&#9632;</span> {name}',
                f"{format_bytes(used)} of {format_bytes(size)}",
            )
            for name, (used, size) in status.regions.items()
            if size
        ),
        ("Members", _roles(status)),
        (
            "Ledger",
            f"{status.extents} extents, {status.leases} leases, {status.tickets} tickets, "
            f"{status.connections} connections",
        ),
    ]
    body = "".join(
        f'<tr><td style="text-align:left">{name}</td><td style="text-align:left">{value}</td></tr>'
        for name, value in rows
    )
    return (
        f'<div><b>Shared pool</b> <code>{status.id[:8]}</code><div style="display:flex;gap:2px;'
        f'max-width:480px;margin:6px 0">{cells}</div><table>{body}</table></div>'
    )


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def _roles(status: PoolStatus) -> str:
    roles = Counter(member.role for member in status.members)
    return ", ".join(f"{count} {role}" for role, count in sorted(roles.items())) or "none"


def panel(status: PoolStatus, rows_per_second: float | None, moved: dict[str, Any] | None) -> Group:
    """Return what ``dask shm status`` shows.

    Parameters
    ----------
    status : PoolStatus
        The pool.
    rows_per_second : float or None
        How many rows of its ledger are made a second; None where that is not known yet.
    moved : dict or None
        Bytes a second by process and way, where a cluster is asked.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    if status.id is None:
        return Group(Text(f"There is no pool in {status.path}: {status.why}."))
    head = Text.assemble(
        ("pool ", "bold"),
        status.id[:8],
        f" in {status.path}\n{format_bytes(status.used_bytes)} of "
        f"{format_bytes(status.size_bytes)} used",
    )
    slots = Table(box=None, pad_edge=False, show_header=False)
    for name, (used, size) in status.regions.items():
        if not size:
            continue
        line = Text()
        for slot in status.slots:
            if slot.region == name:
                full = _CELLS * slot.used_bytes / slot.size_bytes
                # what is lent out shows, however little it is
                cells = min(_CELLS, round(full) or int(slot.used_bytes > 0))
                line.append("█" * cells, _STYLES[name])
                line.append("░" * (_CELLS - cells) + " ", "dim")
        slots.add_row(
            Text(name, _STYLES[name]), line, f"{format_bytes(used)} of {format_bytes(size)}"
        )
    members = Table("process", "role", "holds", box=None, pad_edge=False)
    for member in sorted(status.members, key=lambda each: (each.role, each.pid)):
        members.add_row(str(member.pid), member.role, format_bytes(member.held_bytes))
    ledger = (
        f"{status.extents} extents, {status.leases} leases, {status.tickets} tickets, "
        f"{status.connections} connections"
    )
    if rows_per_second is not None:
        ledger += f"; {rows_per_second:.0f} rows a second"
    parts: list[Any] = [head, slots, Text(ledger), members]
    if moved:
        rates = Table("bytes a second", box=None, pad_edge=False)
        ways = sorted({way for found in moved.values() for way in found})
        for way in ways:
            rates.add_column(way, justify="right")
        for who, found in moved.items():
            rates.add_row(who, *(format_bytes(int(found.get(way, 0))) for way in ways))
        parts.append(rates)
    return Group(*parts)
