"""The page ``/shm-pool`` on Dask's dashboard, and plots of it for JupyterLab's Dask extension.

Nothing here runs, and no plotting library is imported by it, while nobody has the page open.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger("dask_shm_bridge")

PAGE = "shm-pool"
PLOTS = {"individual-shm-pool": "Shm Pool", "individual-shm-transfers": "Shm Transfers"}


def offer() -> None:
    """Have the dashboards of schedulers that this process will make serve the page.

    Also those whose plugin does not start. May be called again.
    """
    try:
        from distributed.dashboard.scheduler import applications
    except ImportError as error:
        logger.debug("no dashboard page: %s", error)
        return
    for path, document in _documents().items():
        applications.setdefault(path, document)


def add(scheduler: Any) -> bool:
    """Have a scheduler that runs already serve the page; say whether it does. May be called again.

    It does not where it has no dashboard: it was started without, or there is no Bokeh.
    """
    try:
        from bokeh.server.tornado import BokehTornado
    except ImportError as error:
        logger.debug("no dashboard page: %s", error)
        return False
    http = getattr(scheduler, "http_application", None)
    served = [app for app in getattr(http, "applications", ()) if isinstance(app, BokehTornado)]
    if not served:
        logger.debug("no dashboard page: this scheduler has no dashboard")
        return False
    missing = {
        path: document
        for path, document in _documents().items()
        if not any(path in app.app_paths for app in served)
    }
    if missing:
        _serve(scheduler, served[0], missing)
    _name(scheduler)
    return True


def _documents() -> dict[str, Any]:
    return {f"/{name}": functools.partial(_document, name) for name in (PAGE, *PLOTS)}


def _document(name: str, scheduler: Any, extra: dict[str, Any], doc: Any) -> None:
    """Fill a session's document, as Dask's own functions of this form do."""
    from scheduler_plugin.dashboard import page

    page.document(name, scheduler, extra, doc)


def _serve(scheduler: Any, first: Any, documents: dict[str, Any]) -> None:
    from bokeh.application import Application
    from bokeh.server.contexts import ApplicationContext
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    application = BokehApplication(
        documents,
        scheduler,
        prefix=first.prefix,
        template_variables=template_variables(scheduler),
    )
    scheduler.http_application.add_application(application)
    application.initialize(IOLoop.current())
    application.start()
    # JupyterLab's extension asks Dask for plots, which names those of its own application alone.
    for path in documents:
        first.applications[path] = ApplicationContext(Application(), IOLoop.current(), url=path)


def _name(scheduler: Any) -> None:
    """Name the page and the plots in the navigation of all of the dashboard's pages."""
    from distributed.dashboard.scheduler import template_variables

    known = template_variables(scheduler)  # one object for each scheduler, which all pages read
    if PAGE not in known["pages"]:
        known["pages"].append(PAGE)
    for url, title in PLOTS.items():
        if not any(plot["url"] == url for plot in known["plots"]):
            known["plots"].append({"url": url, "name": title})
    known["plots"].sort(key=lambda plot: plot["name"])
