"""Sphinx configuration: `make docs` builds the site into out/docs, with warnings as errors."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402

project = "hybridcache"
author = "The hybridcache authors"
copyright = "2026, the hybridcache authors"
extensions = ["myst_parser"]
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
html_theme = "furo"
html_title = "hybridcache"
html_static_path = ["figures"]
exclude_patterns = ["figures"]
nitpicky = True


def setup(app):
    """Insert the generated parts of the reference when a page is read."""

    def insert(app, name, source):
        source[0] = generate.insert(source[0])

    app.connect("source-read", insert)
