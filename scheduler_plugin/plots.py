"""The plots of the dashboard page, in the style of Dask's own."""

from __future__ import annotations

import math
from typing import Any

from bokeh.core.properties import without_property_validation
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FactorRange,
    HoverTool,
    HTMLTemplateFormatter,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.widgets import DataTable, TableColumn
from bokeh.palettes import Category10
from bokeh.plotting import figure
from dask.utils import format_bytes
from distributed.dashboard.components import DashboardComponent
from distributed.dashboard.components.scheduler import TICKS_1024
from distributed.dashboard.utils import _DATATABLE_STYLESHEETS_KWARGS, update
from distributed.utils import log_errors

from dask_shm_bridge import counters
from dask_shm_bridge.layout import REGION_NAMES
from scheduler_plugin import sampler
from scheduler_plugin.sampler import State

REGION_COLORS = {"input": "#4c9ed9", "output": "#eaaa6d", "scratch": "#8fbf8f"}
WAY_COLORS = {
    "copied": "#4c9ed9",
    "referenced": "#59a14f",
    "pieces": "#b07aa1",
    "file": "#edc948",
    "inline": "#e15759",
}
_OWNERS = Category10[10]
_IN_TRANSIT = "#555555"
_MOST_SEGMENTS = 1500
_TIP = '<span style="font-size: 11px; font-family: Monaco, monospace;">{}</span>'


class Plot(DashboardComponent):
    """A plot of what the scheduler's sampler has seen."""

    def __init__(self, scheduler: Any) -> None:
        self.sampler = sampler.of(scheduler)
        self.sampler.ask()

    @without_property_validation
    @log_errors
    def update(self) -> None:
        """Show what is new."""
        self.sampler.ask()
        self.show()

    def show(self) -> None:
        """Fill the sources."""
        raise NotImplementedError


def owner_color(state: State, member: int | None) -> str:
    """Return the colour of a member: by its place, so that neighbours in the table differ."""
    for place, person in enumerate(state.members):
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
                tooltips="<div>" + "<br/>".join(map(_TIP.format, _MAP_TIPS)) + "</div>",
            )
        )
        self.root.xaxis.formatter = NumeralTickFormatter(format="0 b")
        self.root.xaxis.ticker = BasicTicker(**TICKS_1024)
        self.root.xaxis.minor_tick_line_alpha = 0
        self.root.grid.visible = False
        self.root.toolbar_location = None

    def show(self) -> None:
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
                    owner_color(state, one.owners[0] if one.owners else None) for one in segments
                ],
                "edge": [
                    REGION_COLORS[names[one.slot].rpartition(" ")[0]] for one in segments
                ],
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


_MAP_TIPS = ("@y: @what", "@size", "@whose")


def _name(person: Any) -> str:
    return f"{person.role} {person.address or person.pid}"


class _History(Plot):
    """Lines or areas over the last two minutes."""

    def __init__(self, scheduler: Any, title: str, name: str, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self.source = ColumnDataSource({"time": []})
        self.root = figure(
            title=title,
            name=name,
            tools="",
            x_axis_type="datetime",
            y_range=Range1d(0, 1),
            **kwargs,
        )
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.0 b")
        self.root.yaxis.ticker = BasicTicker(**TICKS_1024)
        self.root.xgrid.visible = False
        self.root.axis.minor_tick_line_alpha = 0
        self.root.toolbar_location = None

    def _legend(self, items: list[tuple[str, list[Any]]]) -> None:
        legend = Legend(
            items=[LegendItem(label=label, renderers=found) for label, found in items],
            orientation="horizontal",
            location="left",
            label_text_font_size="11px",
            background_fill_alpha=0,
            border_line_alpha=0,
            padding=0,
            margin=2,
            spacing=8,
            glyph_height=12,
            glyph_width=16,
        )
        self.root.add_layout(legend, "above")

    def _fill(self, columns: dict[str, list[float]], top: float) -> None:
        update(self.source, {"time": [t * 1000 for t in self.sampler.times], **columns})
        end = _round_up(top)
        if self.root.y_range.end != end:
            self.root.y_range.end = end


def _round_up(value: float) -> float:
    """Return an end for an axis: a power of two, or one and a half of it, with some air."""
    if value <= 0:
        return 1024.0
    power = 2.0 ** math.floor(math.log2(value))
    return next(end for end in (power, 1.5 * power, 2 * power, 3 * power) if end >= value * 1.05)


class Usage(_History):
    """Bytes lent over time, by region."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler, "Lent over time", "shm_usage", **kwargs)
        self.source.data = {name: [] for name in ("time", *REGION_NAMES)}
        areas = self.root.varea_stack(
            list(REGION_NAMES),
            x="time",
            color=[REGION_COLORS[region] for region in REGION_NAMES],
            fill_alpha=0.75,
            source=self.source,
        )
        self._legend([(r, [area]) for r, area in zip(REGION_NAMES, areas, strict=True)])

    def show(self) -> None:
        used = list(self.sampler.used)
        columns = {region: [one[region] for one in used] for region in REGION_NAMES}
        self._fill(columns, max((sum(one.values()) for one in used), default=0))


class Rates(_History):
    """Bytes sent a second, by way, by all processes together."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler, "Sent", "shm_rates", **kwargs)
        self.source.data = {name: [] for name in ("time", *counters.SENT)}
        lines = []
        for way in counters.SENT:
            line = self.root.line(
                "time", way, source=self.source, color=WAY_COLORS[way], line_width=2
            )
            lines.append((way, [line]))
        self._legend(lines)
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.0 b")

    def show(self) -> None:
        rates = list(self.sampler.rates)
        columns = {way: [one[way] for one in rates] for way in counters.SENT}
        self._fill(columns, _highest(rates))
        now = sum(rates[-1].values()) if rates else 0.0
        now = 0.0 if math.isnan(now) else now
        self.root.title.text = f"Sent by way: {format_bytes(int(now))}/s"


class DeviceRates(_History):
    """Bytes a second between host and GPUs: solid to the device, dashed from it."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler, "GPU copies", "shm_device", **kwargs)
        self._names = [f"{to} {way}" for to, way in sampler.DEVICE_WAYS]
        self.source.data = {name: [] for name in ("time", *self._names)}
        colors = dict(zip(counters.DEVICE, ("#76B900", "#4c9ed9", "#e15759"), strict=True))
        lines = []
        for to, way in sampler.DEVICE_WAYS:
            line = self.root.line(
                "time",
                f"{to} {way}",
                source=self.source,
                color=colors[way],
                line_width=2,
                line_dash="solid" if to == "to_device" else "dashed",
            )
            lines.append((f"{'to' if to == 'to_device' else 'from'} {way}", [line]))
        self._legend(lines)

    def show(self) -> None:
        rates = list(self.sampler.device_rates)
        columns = {name: [one[name] for one in rates] for name in self._names}
        self._fill(columns, _highest(rates))
        total = sum(self.sampler.totals["device"].values())
        self.root.title.text = (
            f"GPU copies: {format_bytes(total)} in all" if total else "GPU copies: none so far"
        )


def _highest(rates: list[dict[str, float]]) -> float:
    return max((v for one in rates for v in one.values() if not math.isnan(v)), default=0.0)


class Times(Plot):
    """How long messages take a process, against their size."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self.root = figure(
            title="Time per transfer",
            name="shm_times",
            tools="",
            x_axis_type="log",
            y_axis_type="log",
            x_axis_label="size of the message's frames",
            y_axis_label="ms",
            **kwargs,
        )
        self.sources = {}
        items = []
        for direction, color, label in (
            ("sent", WAY_COLORS["copied"], "send"),
            ("received", WAY_COLORS["referenced"], "receive"),
        ):
            source = ColumnDataSource({name: [] for name in ("size", "ms", "count", "text")})
            self.sources[direction] = source
            line = self.root.line("size", "ms", source=source, color=color, line_width=2)
            dots = self.root.scatter("size", "ms", source=source, color=color, size=7)
            items.append(LegendItem(label=label, renderers=[line, dots]))
            tips = f"{label}: @text in @ms{{0.000}} ms, @count times"
            self.root.add_tools(HoverTool(renderers=[dots], tooltips=_TIP.format(tips)))
        self.source = self.sources["sent"]
        self.root.add_layout(
            Legend(
                items=items,
                orientation="horizontal",
                location="left",
                label_text_font_size="11px",
                background_fill_alpha=0,
                border_line_alpha=0,
                padding=0,
                margin=2,
            ),
            "above",
        )
        self.root.xaxis.formatter = NumeralTickFormatter(format="0 b")
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.[000]")
        self.root.axis.axis_label_text_font_size = "11px"
        self.root.axis.minor_tick_line_alpha = 0
        self.root.toolbar_location = None

    def show(self) -> None:
        many = 0
        for direction, source in self.sources.items():
            rows = sorted(self.sampler.totals["times"][direction].values(), key=lambda r: r[1])
            rows = [row for row in rows if row[0] and row[1] and row[2]]
            sizes = [nbytes / count for count, nbytes, _ in rows]
            many += sum(count for count, _, _ in rows)
            update(
                source,
                {
                    "size": sizes,
                    "ms": [nanoseconds / count / 1e6 for count, _, nanoseconds in rows],
                    "count": [count for count, _, _ in rows],
                    "text": [format_bytes(int(size)) for size in sizes],
                },
            )
        self.root.title.text = (
            "Time per transfer, mean by size" if many else "Time per transfer: none so far"
        )


class Fallbacks(Plot):
    """Frames that did not go through the pool, or were moved out of it, by cause."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self.source = ColumnDataSource({"cause": [], "frames": []})
        self.root = figure(
            title="Fallbacks",
            name="shm_fallbacks",
            tools="",
            x_range=Range1d(0, 1),
            y_range=FactorRange("none"),
            **kwargs,
        )
        self.root.hbar(
            source=self.source, y="cause", right="frames", height=0.7, color=WAY_COLORS["inline"]
        )
        self.root.add_tools(HoverTool(tooltips=_TIP.format("@cause: @frames frames")))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0,0")
        self.root.axis.minor_tick_line_alpha = 0
        self.root.ygrid.visible = False
        self.root.toolbar_location = None

    def show(self) -> None:
        causes = sorted(self.sampler.totals["fallbacks"].items(), key=lambda one: one[1])
        causes = [one for one in causes if one[1]]
        total = sum(frames for _, frames in causes)
        names = [cause for cause, _ in causes]
        if names != self.source.data["cause"]:
            self.root.y_range.factors = names or ["none"]
        most = max((frames for _, frames in causes), default=0)
        self.root.x_range.end = max(10, 1.1 * most)
        self.root.title.text = f"Fallbacks: {total:,} frames" if total else "Fallbacks: none"
        update(self.source, {"cause": names, "frames": [frames for _, frames in causes]})


class Members(Plot):
    """Who has joined the pool, and what they hold of it."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self.source = ColumnDataSource(
            {name: [] for name in ("color", "role", "address", "pid", "held")}
        )
        swatch = HTMLTemplateFormatter(template='<span style="color: <%= value %>">&#9632;</span>')
        self.root = DataTable(
            source=self.source,
            name="shm_members",
            columns=[
                TableColumn(field="color", title="", formatter=swatch, width=16),
                TableColumn(field="role", title="Role", width=60),
                TableColumn(field="address", title="Address", width=190),
                TableColumn(field="pid", title="Process", width=60),
                TableColumn(field="held", title="Holds", width=70),
            ],
            index_position=None,
            sortable=False,
            reorderable=False,
            selectable=False,
            **_DATATABLE_STYLESHEETS_KWARGS,
            **kwargs,
        )

    def show(self) -> None:
        state = self.sampler.state
        members = [] if state is None else state.members
        update(
            self.source,
            {
                "color": [owner_color(state, one.id) for one in members if state is not None],
                "role": [one.role for one in members],
                "address": [one.address for one in members],
                "pid": [one.pid for one in members],
                "held": [format_bytes(one.held_bytes) for one in members],
            },
        )
