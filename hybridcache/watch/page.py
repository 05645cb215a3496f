"""The page as one HTML file: it asks the server that served it, or replays the recording it
carries."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from hybridcache.watch.recorder import Record

FORM = "hybridcache watch 1"
"""Stands in every recording and every whole state that a server sends."""
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
"""In the order in which they stand in the page."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy to serve it with: it loads nothing, and asks its own server only."""


class Recording(NamedTuple):
    """What happened in one cache, from its beginning."""

    meta: dict[str, Any]
    """What it is called and what things weigh in it."""
    records: Sequence[Record]


def live_page() -> str:
    """The page that follows the server it comes from. Read once."""
    return _page()


def recorded_page(recordings: Sequence[Recording]) -> str:
    """The page with ``recordings`` in it, to be opened as a file. O(records)."""
    runs = [{"meta": one.meta, "records": one.records} for one in recordings]
    data = json.dumps({"form": FORM, "runs": runs}, separators=(",", ":"))
    # Nothing in it may end the element it stands in.
    return _page().replace("/*RECORDING*/", data.replace("<", "\\u003c"))


@cache
def _page() -> str:
    folder = files("hybridcache.watch") / "page"

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    script = "\n".join(map(read, SCRIPTS))
    return read("page.html").replace("/*STYLE*/", read("style.css")).replace("/*SCRIPT*/", script)
