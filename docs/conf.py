"""Sphinx configuration: `make docs` builds the site into out/docs, with warnings as errors.

The notebooks of ``examples/`` and the README files of the packages are copied here, and the figures
in ``docs/figures`` are drawn. Notebooks are executed.
"""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import match_figure  # noqa: E402

project = "hybridcache"
author = "The hybridcache authors"
copyright = "2026, the hybridcache authors"
smartquotes = False  # Flags keep their two hyphens.
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


LINK = re.compile(r"\[([^\]\n]+)\]\(([\w./-]+\.(?:md|py|ipynb))(#[\w-]+)?\)")
READMES = {
    ROOT / folder / "README.md": DOCS / "packages" / f"{folder.rpartition('/')[2]}.md"
    for folder in (
        *("hybridcache", "hybridcache/lab", "hybridcache/sglang", "hybridcache/adapters/watch"),
        *("engine", "kernels"),
    )
}
NOTEBOOKS = {path: DOCS / "examples" / path.name for path in (ROOT / "examples").glob("*.ipynb")}


def lines_of(file, name):
    """Return the lines of a class or function, as in "12-40", or "" if the file has none."""
    body, found = ast.parse(file.read_text()).body if file.suffix == ".py" else [], None
    for part in name.split("."):
        found = next((one for one in body if getattr(one, "name", None) == part), None)
        body = getattr(found, "body", [])
    return f"{found.lineno}-{found.end_lineno}" if found is not None else ""


def on_site(text, folder, page_folder):
    """Return ``text`` from ``folder`` for a page in ``page_folder``: links to files that are not
    part of the site become their text and path."""

    def link(found):
        target = (folder / found[2]).resolve()
        target = (READMES | NOTEBOOKS).get(target, target)
        if target.is_relative_to(DOCS):
            return f"[{found[1]}]({os.path.relpath(target, page_folder)}{found[3] or ''})"
        path = target.relative_to(ROOT)
        if lines := lines_of(target, found[1].strip("`")):
            return f"{found[1]} (`{path}`, lines {lines})"
        return found[1] if found[1].startswith("`") else f"{found[1]} (`{path}`)"

    return LINK.sub(link, text)


for notebook, page in NOTEBOOKS.items():
    page.parent.mkdir(exist_ok=True)
    shutil.copyfile(notebook, page)
for readme, page in READMES.items():
    page.parent.mkdir(exist_ok=True)
    page.write_text(on_site(readme.read_text(), readme.parent, page.parent))
match_figure.draw(DOCS / "figures")
# The kernels of notebooks import this checkout too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))


def setup(app):
    """Name pages outside of the site by path."""

    def read(app, name, source):
        folder = (DOCS / name).parent
        source[0] = on_site(source[0], folder, folder)

    app.connect("source-read", read)
