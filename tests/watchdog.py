"""Pytest plugin that watches every engine of this process: a request that gets no output while its
engine is idle was lost, which is a failure of the engine.

The product ends such requests with its heartbeats. The watchdog does not rely on them.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest

PATIENCE = 15
"""Number of looks, one each second, after which a request is lost."""


class Watchdog:
    """Looks at the engines that were added, every ``tick_s`` seconds."""

    def __init__(self, tick_s: float = 1.0) -> None:
        self._tick_s, self._pid, self.stopped = tick_s, 0, threading.Event()
        self.fronts, self.engines = WeakSet[Any](), WeakSet[Any]()
        """Started ``AsyncEngine`` objects, and engines in this process."""
        self.found: list[str] = []
        """Descriptions of lost requests."""
        self._waits: dict[Any, int] = {}
        """Waiting reader, or engine with a request -> looks in a row that found its engine idle."""
        self._used: dict[int, float] = {}
        """Processor time of each process at the last look, in clock ticks."""

    def start(self) -> None:
        """Start to look, unless this process does so already. Further engines are added when they
        are made."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        while not self.stopped.wait(self._tick_s):
            with suppress(Exception):  # An engine that is being made, or no memory on purpose.
                self.look()

    def look(self) -> None:
        """Count the looks of all that waits, and fail readers that have waited too long."""
        arrivals = [
            stream._arrival
            for front in self.fronts
            if front._streams and self._is_idle(front.channel)
            for stream in {*front._streams.values()}
            if stream._arrival is not None and not stream._arrival.done()
        ]
        waits = {one: self._waits.get(one, 0) + 1 for one in (*arrivals, *self.stuck())}
        self._waits = waits
        lost = [one for one, number in waits.items() if number == PATIENCE]
        self.found += [f"{one} had no output while its engine was idle" for one in lost]
        error = AssertionError("lost: no output while the engine was idle")
        for arrival in arrivals:
            if arrival in lost:
                arrival.get_loop().call_soon_threadsafe(fail, arrival, error)

    def stuck(self) -> list[Any]:
        """Return the engines in this process with requests and without work."""
        return [one for one in self.engines if [*one.requests] and not one.has_work()]

    def _is_idle(self, channel: Any) -> bool:
        if (host := getattr(channel, "host", None)) is not None:
            return not (host._commands or host.engine.has_work())
        if getattr(channel, "pid", None) is None:  # Replicas compute in several processes.
            return False
        stat = Path(f"/proc/{channel.pid}/stat").read_text().rpartition(")")[2].split()
        used, before = float(stat[11]) + float(stat[12]), self._used.get(channel.pid, 0.0)
        self._used[channel.pid] = used
        return stat[0] in "SZ" and used - before <= 2


def fail(arrival: asyncio.Future[None], error: Exception) -> None:
    """Raise ``error`` in a reader that still waits."""
    if not arrival.done():
        arrival.set_exception(error)


WATCHDOG = Watchdog()


def note(module: str, owner: str, method: str, known: WeakSet[Any]) -> None:
    """Add each object of a class to ``known`` when ``method`` is called, once it is imported."""
    found = getattr(sys.modules.get(module), owner, None)
    original = getattr(found, method, None)
    if found is None or original is None or hasattr(original, "is_noted"):
        return

    @functools.wraps(original)
    def noted(self: Any, *arguments: Any, **options: Any) -> Any:
        known.add(self)
        return original(self, *arguments, **options)

    noted.is_noted = True  # type: ignore[attr-defined]
    setattr(found, method, noted)


@pytest.fixture(autouse=True)
def no_request_is_lost() -> Iterator[None]:
    """Fail a test in which a request was lost."""
    note("engine.front.async_engine", "AsyncEngine", "start", WATCHDOG.fronts)
    note("engine.core", "EngineCore", "__init__", WATCHDOG.engines)
    WATCHDOG.start()
    yield
    found, WATCHDOG.found = WATCHDOG.found, []
    WATCHDOG.engines.difference_update(WATCHDOG.stuck())  # Other tests did not cause it.
    assert not found, found
