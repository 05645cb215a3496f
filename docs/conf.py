"""Sphinx configuration: `make docs` builds the site into out/docs, with warnings as errors.

The notebooks of ``examples/`` are copied here and executed while the site is built, and the figures
in ``docs/figures`` are drawn.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import generate  # noqa: E402
import match_figure  # noqa: E402

project = "hybridcache"
author = "The hybridcache authors"
copyright = "2026, the hybridcache authors"
extensions = ["myst_nb"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
myst_heading_anchors = 3
myst_enable_extensions = ["html_image"]
html_theme = "furo"
html_title = "hybridcache"
html_static_path = ["figures", "static"]
html_css_files = ["site.css"]
html_favicon = "static/logo.svg"
exclude_patterns = ["figures", "static"]
nitpicky = True


NOTEBOOKS = ROOT / "docs" / "examples"
NOTEBOOKS.mkdir(exist_ok=True)
for notebook in (ROOT / "examples").glob("*.ipynb"):
    shutil.copyfile(notebook, NOTEBOOKS / notebook.name)
match_figure.draw(ROOT / "docs" / "figures")
# The kernels of notebooks import this checkout too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))


def setup(app):
    """Insert the generated parts of the reference, and name pages outside of the site by path."""

    def read(app, name, source):
        folder = (ROOT / "docs" / name).parent
        source[0] = OUTSIDE.sub(lambda link: shown(folder, link), generate.insert(source[0]))

    app.connect("source-read", read)


OUTSIDE = re.compile(r"\[([^\]\n]+)\]\(((?:\.\./)+[\w./-]+\.md)(?:#[\w-]+)?\)")


def shown(folder, link):
    """Return a link to a page; if the page is not part of the site, its text and its path."""
    page = (folder / link[2]).resolve()
    if page.is_relative_to(ROOT / "docs"):
        return link[0]
    return f"{link[1]} (`{page.relative_to(ROOT)}`)"
