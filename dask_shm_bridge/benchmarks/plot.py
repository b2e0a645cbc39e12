"""The measurements as a picture: time against size, one panel a case."""

from __future__ import annotations

from collections.abc import Sequence

from dask_shm_bridge.benchmarks.alternation import Measurement
from dask_shm_bridge.benchmarks.report import size_text

_STYLES = {
    "tcp": {"color": "tab:red", "marker": "o"},
    "shm": {"color": "tab:blue", "marker": "s"},
    "npy": {"color": "tab:orange", "marker": "^"},
    "ray": {"color": "tab:green", "marker": "D"},
    "ucxx": {"color": "tab:purple", "marker": "v"},
    "memcpy": {"color": "0.5", "linestyle": "--"},
}


def draw(path: str, measurements: Sequence[Measurement]) -> None:
    """Draw a log-log plot of medians, with bars from minimum to maximum, into a PNG file.

    Parameters
    ----------
    path
        Where the file goes.
    measurements
        What to draw. Case ``tiny``, failures, and cases without any point are left out.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [m for m in measurements if m.median and m.case != "tiny"]
    cases = list(dict.fromkeys(m.case for m in drawn)) or ["nothing measured"]
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for case, panel in zip(cases, panels, strict=False):  # not the other way: it eats a panel
        chosen = [m for m in drawn if m.case == case]
        for way in dict.fromkeys(m.way for m in chosen):
            points = sorted((m for m in chosen if m.way == way), key=lambda m: m.size_bytes)
            sizes = [m.size_bytes for m in points]
            middles = [(m.median or 0) * 1e3 for m in points]
            below = [mid - min(m.seconds) * 1e3 for mid, m in zip(middles, points, strict=True)]
            above = [max(m.seconds) * 1e3 - mid for mid, m in zip(middles, points, strict=True)]
            style = {"markersize": 4, "capsize": 2, **_STYLES.get(way, {})}
            panel.errorbar(sizes, middles, yerr=[below, above], label=way, **style)
        panel.set(title=case, xlabel="size", ylabel="ms", xscale="log", yscale="log")
        ticks = sorted({m.size_bytes for m in chosen})
        panel.set_xticks(ticks, [size_text(t) for t in ticks], rotation=45, minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(True, which="major", alpha=0.3)
        if chosen:
            panel.legend(fontsize="small")
    for panel in panels:
        panel.axis("off")
    figure.savefig(path, dpi=120, format="png")
