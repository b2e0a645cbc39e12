"""The documents of the dashboard's sessions. It imports Bokeh, so it is imported at first use."""

from __future__ import annotations

from html import escape
from typing import Any

from bokeh.models import Div
from distributed.dashboard.components import add_periodic_callback
from distributed.dashboard.components.scheduler import BOKEH_THEME, env
from distributed.utils import log_errors

from scheduler_plugin.dashboard import pool_plots, traffic_plots
from scheduler_plugin.dashboard.pool_plots import Plot

_INTERVAL_MS = 500
_ALONE = {
    "individual-shm-pool": pool_plots.PoolMap,
    "individual-shm-transfers": traffic_plots.Rates,
}
_PARTS = (
    pool_plots.PoolMap,
    pool_plots.Members,
    traffic_plots.Usage,
    traffic_plots.Rates,
    traffic_plots.Times,
    traffic_plots.Fallbacks,
    traffic_plots.DeviceRates,
)

# As Dask's own pages, it grows with the window, and becomes a column where that is narrow.
_TEMPLATE = """
{% extends "base.html" %}
{% block extra_resources %}
<style>
  #shm { display: grid; height: 100%; gap: 6px; grid-template-columns: minmax(0, 1fr);
         grid-template-rows: 26px; grid-auto-rows: 320px; }
  #shm > div { min-width: 0; min-height: 0; }
  @media (min-width: 992px) {
    #shm { grid-template-columns: minmax(0, 4fr) minmax(0, 3fr) minmax(0, 3fr);
           grid-template-rows: 26px repeat(3, minmax(190px, 1fr)); }
    #shm-summary { grid-column: 1 / span 3; grid-row: 1; }
    #shm-map { grid-column: 1; grid-row: 2 / span 2; }
    #shm-members { grid-column: 1; grid-row: 4; }
    #shm-usage { grid-column: 2; grid-row: 2; }
    #shm-rates { grid-column: 3; grid-row: 2; }
    #shm-times { grid-column: 2; grid-row: 3; }
    #shm-fallbacks { grid-column: 3; grid-row: 3; }
    #shm-device { grid-column: 2 / span 2; grid-row: 4; }
  }
</style>
{% endblock %}
{% block content %}
{% from macros import embed %}
<div id="shm">
{% for part in ["summary", "map", "members", "usage", "rates", "times", "fallbacks", "device"] %}
  <div id="shm-{{ part }}">{{ embed(roots["shm_" + part]) }}</div>
{% endfor %}
</div>
{{ plot_script }}
{% endblock %}
"""


class Summary(Plot):
    """One line: which pool, how it is divided, who uses it."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self.root = Div(name="shm_summary", **kwargs)
        self.root.styles = {"font-size": "13px", "white-space": "nowrap", "overflow": "hidden"}

    def _show(self) -> None:
        state, totals = self.sampler.state, self.sampler.totals
        modes = totals["connections"]
        said = ", ".join(f"{count} {mode}" for mode, count in modes.items() if count) or "none"
        if state is None:
            text = f"No pool. Connections: {said}"
        else:
            text = f"<b>{escape(state.path)}</b>: {state.layout}. Connections: {said}"
        if self.root.text != text:
            self.root.text = text


class Parts(Plot):
    """All of the page, shown anew at once: its parts tell of one moment."""

    def __init__(self, scheduler: Any, **kwargs: Any) -> None:
        super().__init__(scheduler)
        self._parts = [part(scheduler, **kwargs) for part in (Summary, *_PARTS)]
        self.root = [part.root for part in self._parts]

    def _show(self) -> None:
        for part in self._parts:
            part.update()


@log_errors
def document(name: str, scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
    """Fill a session's document.

    Parameters
    ----------
    name : str
        The page, or a plot of it alone.
    scheduler : distributed.Scheduler
        Whose it is.
    extra : dict
        What Dask's templates need.
    doc : bokeh.document.Document
        To fill.
    """
    doc.theme = BOKEH_THEME
    if name in _ALONE:
        plot = _ALONE[name](scheduler, sizing_mode="stretch_both")
        _place(doc, plot)
        doc.title = f"Dask: {type(plot).__name__}"
        return
    _place(doc, Parts(scheduler, sizing_mode="stretch_both"))
    doc.title = "Dask: Shared memory pool"
    doc.template = env.from_string(_TEMPLATE)
    doc.template_variables.update(extra)


def _place(doc: Any, part: Plot) -> None:
    part.update()
    add_periodic_callback(doc, part, _INTERVAL_MS)
    for root in part.root if isinstance(part, Parts) else [part.root]:
        doc.add_root(root)
