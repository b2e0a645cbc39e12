"""How the documentation is built: ``make docs``, without network, warnings are errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import dask_shm_bridge  # noqa: E402

project = "dask-shm-bridge"
author = "dask-shm-bridge contributors"
copyright = author
version = release = dask_shm_bridge.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.extlinks",
    "reference",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_ext", "_templates"]
templates_path = ["_templates"]
nitpicky = True

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4

# In docstrings, `name` is a name in this package's or in somebody else's code.
default_role = "code"
autodoc_typehints = "none"
autosummary_generate = False
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

html_theme = "dask_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["local.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2}


def without_network(app: Any, exception: Exception | None) -> None:
    """Take what the theme fetches from elsewhere (fonts) out of the built pages."""
    style = Path(app.outdir) / "_static" / "css" / "style.css"
    if exception is None and style.exists():
        style.write_text(re.sub(r'@import url\("https:[^"]*"\);\n?', "", style.read_text()))


def setup(app: Any) -> None:
    app.connect("build-finished", without_network)
