"""What the pool holds, and whose it is, on the dashboard page."""

from __future__ import annotations

from html import escape
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.models import (
    ColumnDataSource,
    Div,
    FactorRange,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.palettes import Category10
from bokeh.plotting import figure
from dask.utils import format_bytes
from distributed.dashboard.components import DashboardComponent
from distributed.dashboard.utils import update
from distributed.utils import log_errors

from dask_shm_bridge.layout import REGION_NAMES
from scheduler_plugin.dashboard import sampler
from scheduler_plugin.dashboard.sampler import Person

REGION_COLORS = {"input": "#4c9ed9", "output": "#eaaa6d", "scratch": "#8fbf8f"}
_OWNERS = Category10[10]
_IN_TRANSIT = "#555555"
_MOST_SEGMENTS = 1500
_MAP_TIPS = ("@y: @what", "@size", "@whose")
_MEMBERS = """
<style>
  table.shm {{ font-size: 12px; border-collapse: collapse; width: 100%; white-space: nowrap; }}
  table.shm th {{ text-align: left; font-weight: normal; border-bottom: 1px solid silver; }}
  table.shm td, table.shm th {{ padding: 4px 6px; }}
  table.shm tr:nth-child(even) td {{ background-color: #f0f0f0; }}
  table.shm td:nth-child(n + 4), table.shm th:nth-child(n + 4) {{ text-align: right; }}
  table.shm td:nth-child(3) {{ width: 100%; max-width: 0; overflow: hidden;
                               text-overflow: ellipsis; }}
</style>
<table class="shm">
  <thead><tr><th></th><th>Role</th><th>Address</th><th>Process</th><th>Holds</th></tr></thead>
  <tbody>{rows}</tbody>
</table>
"""
TIP = '<span style="font-size: 11px; font-family: Monaco, monospace;">{}</span>'


class Plot(DashboardComponent):
    """A plot of what the scheduler's sampler has seen."""

    root: Any
    source: Any

    def __init__(self, scheduler: Any) -> None:
        self.sampler = sampler.of(scheduler)
        self.sampler.ask()

    @without_property_validation
    @log_errors
    def update(self) -> None:
        """Show what is new."""
        self.sampler.ask()
        self._show()

    def _show(self) -> None:
        """Fill the sources."""
        raise NotImplementedError


def owner_color(people: list[Person], member: int | None) -> str:
    """Return the colour of a member: by its place, so that neighbours in the table differ."""
    for place, person in enumerate(people):
        if person.id == member:
            return str(_OWNERS[place % len(_OWNERS)])
    return _IN_TRANSIT


class PoolMap(Plot):
    """The slots of the pool, and what lies where, by region and owner."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self._layout: Any = None
        self.slots = ColumnDataSource({"y": [], "right": [], "color": [], "region": []})
        self.source = ColumnDataSource(
            {name: [] for name in ("y", "left", "right", "color", "edge", "what", "size", "whose")}
        )
        self.root = figure(
            title="Pool",
            tools="",
            name="shm_map",
            x_range=Range1d(0, 1),
            y_range=FactorRange("0"),
            **kwargs,
        )
        self.root.hbar(
            source=self.slots,
            y="y",
            right="right",
            height=0.86,
            fill_color="color",
            fill_alpha=0.18,
            line_color="color",
            line_alpha=0.6,
        )
        extents = self.root.hbar(
            source=self.source,
            y="y",
            left="left",
            right="right",
            height=0.66,
            fill_color="color",
            line_color="edge",
            line_width=1,
        )
        self.root.add_tools(
            HoverTool(
                renderers=[extents],
                point_policy="follow_mouse",
                tooltips="<div>" + "<br/>".join(map(TIP.format, _MAP_TIPS)) + "</div>",
            )
        )
        self.root.xaxis.formatter = NumeralTickFormatter(format="0 b")
        self.root.xaxis.ticker = FixedTicker()
        self.root.xaxis.minor_tick_line_alpha = 0
        self.root.grid.visible = False
        self.root.toolbar_location = None

    def _show(self) -> None:
        state = self.sampler.state
        if state is None:
            self.root.title.text = "Pool: this scheduler has joined none"
            self._layout = None
            update(self.slots, {name: [] for name in self.slots.data})
            update(self.source, {name: [] for name in self.source.data})
            return
        layout = state.layout
        names = [
            f"{region} {number}"
            for region, count in zip(REGION_NAMES, layout.slots, strict=True)
            for number in range(count)
        ]
        if self._layout != layout:
            self._layout = layout
            self.root.y_range.factors = names[::-1]
            self.root.x_range.end = layout.slot_bytes
            self.root.xaxis.ticker.ticks = [layout.slot_bytes * n // 4 for n in range(5)]
            regions = [name.rpartition(" ")[0] for name in names]
            update(
                self.slots,
                {
                    "y": names,
                    "right": [layout.slot_bytes] * len(names),
                    "color": [REGION_COLORS[region] for region in regions],
                    "region": regions,
                },
            )
        used = sum(state.used.values())
        segments = state.segments
        left_out = ""
        if len(segments) > _MOST_SEGMENTS:
            segments = sorted(segments, key=lambda one: one.start - one.end)[:_MOST_SEGMENTS]
            left_out = f", the {_MOST_SEGMENTS} largest of {len(state.segments)} shown"
        self.root.title.text = (
            f"Pool: {format_bytes(used)} of {format_bytes(layout.size_bytes)} lent{left_out}"
        )
        people = {person.id: person for person in state.members}
        update(
            self.source,
            {
                "y": [names[one.slot] for one in segments],
                "left": [one.start for one in segments],
                "right": [one.end for one in segments],
                "color": [
                    owner_color(state.members, one.owners[0] if one.owners else None)
                    for one in segments
                ],
                "edge": [REGION_COLORS[names[one.slot].rpartition(" ")[0]] for one in segments],
                "what": [
                    f"{one.extents} extent{'s' * (one.extents > 1)}"
                    + (f", {one.tickets} ticket{'s' * (one.tickets > 1)}" if one.tickets else "")
                    for one in segments
                ],
                "size": [
                    f"{format_bytes(one.end - one.start)} at {format_bytes(one.start)}"
                    for one in segments
                ],
                "whose": [
                    ", ".join(_name(people[member]) for member in one.owners if member in people)
                    or "in transit"
                    for one in segments
                ],
            },
        )


def _name(person: Person) -> str:
    return f"{person.role} {person.address or person.pid}"


class Members(Plot):
    """Who has joined the pool, and what they hold of it.

    Not a `DataTable`: Bokeh 3.9 draws one anew only where its number of rows changes.
    """

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        wide = ".bk-clearfix { width: 100%; }"
        self.root = Div(name="shm_members", stylesheets=[wide], **kwargs)
        self.root.styles = {"overflow": "auto"}

    def _show(self) -> None:
        state = self.sampler.state
        people = [] if state is None else state.members
        rows = "".join(
            f'<tr><td style="color: {owner_color(people, one.id)}">&#9632;</td>'
            f"<td>{escape(one.role)}</td>"
            f'<td title="{escape(one.address)}">{escape(one.address)}</td>'
            f"<td>{int(one.pid)}</td><td>{format_bytes(one.held_bytes)}</td></tr>"
            for one in people
        )
        text = _MEMBERS.format(rows=rows)
        if self.root.text != text:
            self.root.text = text
