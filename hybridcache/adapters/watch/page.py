"""Watch page as one HTML file that follows its server."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

FORM = "hybridcache watch 1"
"""Format name in every full state that a server sends."""
SCRIPTS = (
    *("format", "model", "tree", "strip", "lanes", "table", "details", "view"),
    *("chat", "live", "main"),
)
"""Scripts in the order in which they are concatenated."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: no external resources, connections to its server only."""


@cache
def live_page() -> str:
    """Return the page that follows the server it was loaded from."""
    folder = files("hybridcache.adapters.watch") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    script = "\n".join(read(f"{name}.js") for name in SCRIPTS)
    return read("page.html").replace("/*STYLE*/", read("style.css")).replace("/*SCRIPT*/", script)
