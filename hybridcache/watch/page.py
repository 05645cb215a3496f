"""Watch page as one HTML file. It follows its server, or replays an embedded recording."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from hybridcache.watch.recorder import Record

FORM = "hybridcache watch 1"
"""Format name in every recording and in every full state that a server sends."""
SCRIPTS = (
    "format.js",
    "model.js",
    "tree.js",
    "strip.js",
    "lanes.js",
    "table.js",
    "details.js",
    "view.js",
    "chat.js",
    "live.js",
    "replay.js",
    "main.js",
)
"""Scripts in the order in which they are concatenated."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy of the page: no external resources, connections to its server only."""


class Recording(NamedTuple):
    """Changes of one cache from its beginning."""

    meta: dict[str, Any]
    """Title of the cache and sizes of its items; see README.md."""
    records: Sequence[Record]


def live_page() -> str:
    """Return the page that follows the server it was loaded from. Cached."""
    return _page()


def recorded_page(recordings: Sequence[Recording]) -> str:
    """Return the page with ``recordings`` embedded, to be opened as a file. O(records)."""
    runs = [{"meta": one.meta, "records": one.records} for one in recordings]
    data = json.dumps({"form": FORM, "runs": runs}, separators=(",", ":"))
    # "<" is escaped so that no text in the data can end the script element.
    return _page().replace("/*RECORDING*/", data.replace("<", "\\u003c"))


@cache
def _page() -> str:
    folder = files("hybridcache.watch") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    script = "\n".join(map(read, SCRIPTS))
    return read("page.html").replace("/*STYLE*/", read("style.css")).replace("/*SCRIPT*/", script)
