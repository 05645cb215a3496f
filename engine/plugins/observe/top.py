"""Command ``engine top``: shows the cache of a server in a terminal.

Reads the same events as the page (``hybridcache/watch/README.md``), and draws with rich.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from engine.server.settings import server_address
from hybridcache.api import Losses
from hybridcache.geometry.units import format_bytes, format_seconds

COLOURS = {
    "cached": "cyan",
    "never_seen": "bright_black",
    "kv_evicted": "yellow",
    "checkpoint_evicted": "red",
    "never_checkpointed": "magenta",
    "below_grid": "blue",
    "refused": "bright_magenta",
    "not_fetched": "green",
}
WORDS = {name: name.replace("_", " ").replace("kv", "KV") for name in COLOURS} | {
    "cached": "reused"
}
GOING = ("waiting", "prefill", "decode")
MAX_REQUESTS = 500
TIMEOUT_S, RETRY_S, REFRESH_S = 30.0, 1.0, 0.25
BAR, NARROW_BAR, WIDE = 16, 8, 100
"""Columns of a request's bar, in a terminal of ``WIDE`` columns or more and in a narrower one."""
SHORT_ID = 17
"""Characters of a request's id: enough for ``/v1/cache/explanations/ID``."""


class Watched:
    """State of one server, from its events."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}
        self.memory: dict[str, Any] | None = None
        self.requests: dict[str, dict[str, Any]] = {}
        self.note = "connecting"
        self.num_events = 0

    def take(self, message: dict[str, Any]) -> None:
        """Apply one event. An event of type ``whole`` replaces the state."""
        if "meta" in message:
            self.meta, self.requests = message["meta"], {}
        for kind, *rest in message["records"]:
            if kind == "memory":
                [self.memory] = rest
            elif kind == "request":
                [one] = rest
                self.requests.pop(one["id"], None)
                self.requests[one["id"]] = one
        while len(self.requests) > MAX_REQUESTS:
            del self.requests[next(iter(self.requests))]
        self.note = ""
        self.num_events += 1

    def ended(self) -> list[dict[str, Any]]:
        return [one for one in self.requests.values() if one["state"] not in GOING]


def events(url: str, key: str | None) -> Iterator[dict[str, Any]]:
    """Yield the messages of a server's stream. Raises OSError if it cannot be reached, refuses or
    disconnects."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/cache/events", headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as stream:
        for line in stream:
            if line.startswith(b"data: "):
                message = json.loads(line[6:])
                if isinstance(message, str):
                    raise OSError(message)
                yield message


def follow(watched: Watched, url: str, key: str | None) -> None:
    """Keep ``watched`` up to date while the process runs."""
    while True:
        try:
            for message in events(url, key):
                watched.take(message)
            watched.note = "the connection was lost"
        except urllib.error.HTTPError as error:
            watched.note = _refusal(error)
        except OSError as error:
            watched.note = f"{url} does not answer ({getattr(error, 'reason', error)})"
        time.sleep(RETRY_S)


def _refusal(error: urllib.error.HTTPError) -> str:
    try:
        said = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"the server answers {error.code}"
    if error.code != 401:
        return said
    return f"{said.rstrip('.')}. Name the file of the operator's key: engine top --key-file FILE"


def screen(watched: Watched, height: int, width: int) -> RenderableType:
    """Return the complete view, for a terminal of ``height`` lines and ``width`` columns."""
    parts: list[RenderableType] = [_head(watched)]
    if watched.memory is not None:
        parts += [_numbers(watched), _memory(watched), _legend()]
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        for name in ("id", "chat", "prompt", "reused", "", "TTFT", "tok/s", "state"):
            justify: Literal["left", "right"] = "left" if name in ("id", "", "state") else "right"
            table.add_column(name, justify=justify, no_wrap=name == "id")
        latest = sorted(watched.requests.values(), key=lambda one: -one["arrived_s"])
        for one in latest[: max(3, height - 9)]:
            table.add_row(*_row(one, BAR if width >= WIDE else NARROW_BAR))
        parts += [Text(), table]
    return Group(*parts)


def _head(watched: Watched) -> Text:
    title = Text(watched.meta.get("title", "engine"), style="bold")
    if watched.note:
        title.append(f"   {watched.note}", style="red")
    return title


def _numbers(watched: Watched) -> Text:
    memory = watched.memory
    assert memory is not None
    prompt, cached = memory["prompt_tokens"], memory["cached_tokens"]
    ended = watched.ended()[-32:]
    text = Text()
    text.append(f"{cached / prompt:.1%}" if prompt else "-", style="bold cyan")
    text.append(f" of {prompt:,} prompt tokens reused    ")
    text.append(f"{memory['running']} running, {memory['waiting']} waiting")
    if "sessions" in memory:
        policy = memory["admission"].partition(";")[0]  # Its figures are on the page.
        text.append(f"    {memory['sessions'][0]} live sessions ({policy})")
    waits = [
        one["first_token_s"] - one["arrived_s"] for one in ended if one["first_token_s"] is not None
    ]
    if waits:
        text.append(f"    TTFT {format_seconds(median(waits))}")
    rates = [rate for one in ended if (rate := _rate(one)) is not None]
    if rates:
        text.append(f"    {median(rates):.0f} tok/s a request")
    return text


def _memory(watched: Watched) -> Text:
    assert watched.memory is not None
    free, cached, held = watched.memory["bytes"]
    text, total = Text(), max(free + cached + held, 1)
    for number, style in ((cached, "cyan"), (held, "yellow"), (free, "bright_black")):
        text.append("█" * round(48 * number / total), style=style)
    text.append(f"  {format_bytes(cached)} cached, {format_bytes(held)} held, ")
    text.append(f"{format_bytes(free)} free; ")
    text.append(f"{watched.memory['kv'][1]:,} KV tokens, {watched.memory['slots'][1]} checkpoints")
    return text


def _legend() -> Text:
    text = Text()
    for name, colour in COLOURS.items():
        text.append("■ ", style=colour)
        text.append(f"{WORDS[name]}  ", style="dim")
    return text


def _row(one: dict[str, Any], bar: int) -> tuple[str | Text, ...]:
    wait = None if one["first_token_s"] is None else one["first_token_s"] - one["arrived_s"]
    rate = _rate(one)
    state = one["state"]
    if state == "prefill":
        state = f"prefill {one['computed'] / one['prompt']:.0%}"
    elif state == "decode":
        state = f"{one['answer']} tokens"
    name = str(one["conversation"])
    return (
        one["id"][:SHORT_ID],
        name if one["namespace"] is None else f"{name} ({one['namespace'][:6]})",
        f"{one['prompt']:,}",
        f"{one['cached'] / one['prompt']:.1%}" if one["losses"] else "-",
        _bar(one, bar),
        "-" if wait is None else format_seconds(wait),
        "-" if rate is None else f"{rate:.0f}",
        state,
    )


def _bar(one: dict[str, Any], width: int) -> Text:
    """Return a bar of ``width`` columns with the reused tokens, and the others by cause."""
    text = Text()
    if one["losses"] is None:
        return text
    tokens = {"cached": one["cached"]} | {name: one["losses"][name] for name in Losses._fields}
    done = drawn = 0
    for name, number in tokens.items():
        done += number
        columns = round(width * done / one["prompt"]) - drawn
        drawn += columns
        text.append("█" * columns, style=COLOURS[name])
    return text


def _rate(one: dict[str, Any]) -> float | None:
    """Return tokens per second after the first one, or None if there are too few."""
    if one["finished_s"] is None or one["first_token_s"] is None or one["answer"] < 2:
        return None
    spent = one["finished_s"] - one["first_token_s"]
    return (one["answer"] - 1) / spent if spent > 0 else None


def top(url: str, key_file: str | None, once: bool) -> int:
    """Show the view until interrupted, or only ``once``, as in a pipe.

    Raises ValueError for a wrong address, a key that cannot be read, or a server that does not
    answer the first time.
    """
    key, url = None, server_address(url)
    if key_file is not None:
        try:
            key = Path(key_file).read_text().strip()
        except OSError as error:
            raise ValueError(f"--key-file {key_file} cannot be read ({error.strerror}).") from None
    watched, console = Watched(), Console()
    following = threading.Thread(target=follow, args=(watched, url, key), daemon=True)
    following.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not watched.num_events:
        if watched.note != "connecting" or time.monotonic() > deadline:
            raise ValueError(f"{watched.note.rstrip('.')}.")
        time.sleep(0.02)
    if once or not console.is_terminal:
        console.print(screen(watched, console.height, console.width))
        return 0
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(screen(watched, console.height, console.width), refresh=True)
            time.sleep(REFRESH_S)
