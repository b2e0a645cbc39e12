"""What moves, by which way and how fast, on the dashboard page."""

from __future__ import annotations

import math
from typing import Any

from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    FactorRange,
    FixedTicker,
    HoverTool,
    Legend,
    LegendItem,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.plotting import figure
from dask.utils import format_bytes
from distributed.dashboard.components.scheduler import TICKS_1024
from distributed.dashboard.utils import update
from distributed.metrics import time

from dask_shm_bridge import counters
from dask_shm_bridge.layout import REGION_NAMES
from scheduler_plugin.dashboard import sampler
from scheduler_plugin.dashboard.pool_plots import REGION_COLORS, TIP, Plot

WAY_COLORS = {
    "copied": "#4c9ed9",
    "referenced": "#59a14f",
    "pieces": "#b07aa1",
    "file": "#edc948",
    "inline": "#e15759",
}
_FEWEST_CAUSES = 5
_SHORTEST_MS = 10_000
_SIZES = [1 << bits for bits in (10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34)]


def _legend(items: list[tuple[str, list[Any]]]) -> Legend:
    return Legend(
        items=[LegendItem(label=label, renderers=found) for label, found in items],
        orientation="horizontal",
        location="left",
        label_text_font_size="10px",
        label_standoff=3,
        background_fill_alpha=0,
        border_line_alpha=0,
        padding=0,
        margin=2,
        spacing=6,
        glyph_height=10,
        glyph_width=12,
    )


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
            x_range=Range1d(0, 1),
            y_range=Range1d(0, 1),
            **kwargs,
        )
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.0 b")
        self.root.yaxis.ticker = BasicTicker(**TICKS_1024)
        self.root.xaxis.ticker.desired_num_ticks = 3
        self.root.xgrid.visible = False
        self.root.axis.minor_tick_line_alpha = 0
        self.root.toolbar_location = None

    def _add_legend(self, items: list[tuple[str, list[Any]]]) -> None:
        self.root.add_layout(_legend(items), "above")

    def _fill(self, stamps: list[float], columns: dict[str, list[float]], top: float) -> None:
        times = [stamp * 1000 for stamp in stamps] or [time() * 1000]
        self.root.x_range.start = min(times[0], times[-1] - _SHORTEST_MS)
        self.root.x_range.end = times[-1]
        update(self.source, {"time": times if stamps else [], **columns})
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
        self._add_legend([(r, [area]) for r, area in zip(REGION_NAMES, areas, strict=True)])

    def _show(self) -> None:
        history = self.sampler.history()
        used = history.used
        columns = {region: [one[region] for one in used] for region in REGION_NAMES}
        self._fill(history.times, columns, _highest([{"all": sum(one.values())} for one in used]))


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
        self._add_legend(lines)
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.0 b")

    def _show(self) -> None:
        history = self.sampler.history()
        rates = history.rates
        columns = {way: [one[way] for one in rates] for way in counters.SENT}
        self._fill(history.times, columns, _highest(rates))
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
        self._add_legend(lines)
        self.root.legend.glyph_width = 24  # dashes show

    def _show(self) -> None:
        history = self.sampler.history()
        rates = history.device_rates
        columns = {name: [one[name] for one in rates] for name in self._names}
        self._fill(history.times, columns, _highest(rates))
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
            x_range=Range1d(1 << 16, 1 << 28),
            y_range=Range1d(0.1, 100),
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
            items.append((label, [line, dots]))
            tips = f"{label}: @text in @ms{{0.000}} ms, @count times"
            self.root.add_tools(HoverTool(renderers=[dots], tooltips=TIP.format(tips)))
        self.source = self.sources["sent"]
        self.root.add_layout(_legend(items), "above")
        self.root.xaxis.ticker = FixedTicker(ticks=_SIZES, minor_ticks=[])
        self.root.xaxis.formatter = NumeralTickFormatter(format="0 b")
        self.root.yaxis.formatter = NumeralTickFormatter(format="0.[000]")
        self.root.axis.axis_label_text_font_size = "11px"
        self.root.axis.minor_tick_line_alpha = 0
        self.root.toolbar_location = None

    def _show(self) -> None:
        many = 0
        corners: list[tuple[float, float]] = []
        for direction, source in self.sources.items():
            rows = [row for _, row in sorted(self.sampler.totals["times"][direction].items())]
            rows = [row for row in rows if row[0] and row[1] and row[2]]
            sizes = [nbytes / count for count, nbytes, _ in rows]
            many += sum(count for count, _, _ in rows)
            means = [nanoseconds / count / 1e6 for count, _, nanoseconds in rows]
            corners += zip(sizes, means, strict=True)
            update(
                source,
                {
                    "size": sizes,
                    "ms": means,
                    "count": [count for count, _, _ in rows],
                    "text": [format_bytes(int(size)) for size in sizes],
                },
            )
        if corners:
            for axis, values in zip(
                (self.root.x_range, self.root.y_range), zip(*corners, strict=True), strict=True
            ):
                axis.start, axis.end = min(values) / 2, max(values) * 2
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
            y_range=FactorRange(*_padded([])),
            **kwargs,
        )
        self.root.hbar(
            source=self.source, y="cause", right="frames", height=0.7, color=WAY_COLORS["inline"]
        )
        self.root.add_tools(HoverTool(tooltips=TIP.format("@cause: @frames frames")))
        self.root.xaxis.formatter = NumeralTickFormatter(format="0,0")
        self.root.axis.minor_tick_line_alpha = 0
        self.root.ygrid.visible = False
        self.root.yaxis.major_tick_line_color = None
        self.root.toolbar_location = None

    def _show(self) -> None:
        causes = sorted(self.sampler.totals["fallbacks"].items(), key=lambda one: one[1])
        causes = [one for one in causes if one[1]]
        total = sum(frames for _, frames in causes)
        names = [cause for cause, _ in causes]
        if names != self.source.data["cause"]:
            self.root.y_range.factors = _padded(names)
        most = max((frames for _, frames in causes), default=0)
        self.root.x_range.end = max(10, 1.1 * most)
        self.root.title.text = f"Fallbacks: {total:,} frames" if total else "Fallbacks: none"
        update(self.source, {"cause": names, "frames": [frames for _, frames in causes]})


def _padded(causes: list[str]) -> list[str]:
    """Return names for an axis, with blank ones below: one bar alone would fill the plot."""
    blank = _FEWEST_CAUSES - len(causes)
    return [*(" " * (place + 1) for place in range(blank)), *causes]
