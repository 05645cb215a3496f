"""Waiting requests with a prefix to load from another engine, host memory or a disk.

A waiting request is held until its load has ended, successfully or not, while another request's
load brings the same prefix, or while all load slots are taken. Then it is admitted like any other
and computes the rest. Requests behind a held one are admitted as if it were not there.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from engine.requests.request import Request
from engine.schedule.scheduler import StepHooks
from engine.text.answers import Transferred
from hybridcache.api import PrefixMatch
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import Holding
from hybridcache.tokens import common_prefix_len

IDLE_S = 0.01
"""Maximum wait for a load in a step with nothing to compute."""

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Fetch(ABC):
    """Load of one prefix. Only ``Fetcher.advance`` and ``cancel`` change it."""

    end: int
    """Length of the prefix that is loaded."""
    has_ended: bool = False
    """True if the load is complete or given up."""
    num_fetched: int = 0
    """Tokens of KV that were loaded into the cache; 0 if the load was given up."""
    transferred: Transferred | None = None
    """Statistics after the end of a transfer from another engine."""

    @abstractmethod
    def cancel(self) -> None:
        """End the load. Its memory is free when this returns."""


class Fetcher(Protocol):
    """Loads prefixes into the cache. Called in the engine's thread, between two steps or, to begin
    a load, while a step is planned."""

    max_loads: int
    """Maximum number of loads in progress."""

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        """Return True if ``begin`` would load anything after ``match``, the prefix of ``request``
        in the cache."""

    def begin(self, request: Request, match: PrefixMatch) -> Fetch | None:
        """Start to load the part of the prompt after ``match``. Called directly after ``wants``.
        Returns None for lack of memory. May evict cached entries."""

    def advance(self) -> None:
        """Copy arrived data into rows and slots, and publish complete loads, in a bounded time."""

    def wait(self, timeout_s: float) -> None:
        """Sleep until data has arrived for ``advance``."""


class Fetching(StepHooks, Holding[Request]):
    """Loads in progress and the waiting requests that are held for them."""

    loads = True

    def __init__(self, manager: CacheManager, fetcher: Fetcher) -> None:
        self._manager, self._fetcher = manager, fetcher
        self._pending: dict[Request, Fetch] = {}
        self._held: dict[Request, Request | None] = {}
        """Requests without a load in progress, each with the request that loads its prefix, or None
        if it waits for a load slot."""

    @property
    def requests(self) -> set[Request]:
        """Waiting requests that are held or have a load in progress."""
        return {*self._pending, *self._held}

    @property
    def _has_room(self) -> bool:
        """True if another load may begin."""
        num_loads = sum(not fetch.has_ended for fetch in self._pending.values())
        return num_loads < self._fetcher.max_loads

    def is_holding(self, request: Request) -> bool:
        """Return True if ``holds`` would be True again. O(1)."""
        fetch = self._pending.get(request)
        if fetch is not None:
            return not fetch.has_ended
        if request not in self._held:
            return False
        other = self._held[request]
        if other is None:
            return not self._has_room
        return other in self._pending and not self._pending[other].has_ended

    def holds(self, request: Request) -> bool:
        """Return True if ``request`` must wait for a load. Begins its load if one is due and a slot
        is free. O(1) while nothing changed for the request, else O(its length)."""
        if self.is_holding(request):
            return True
        self._held.pop(request, None)
        fetch = self._pending.pop(request, None)
        if fetch is not None:
            request.fetched_len, request.transferred = fetch.num_fetched, fetch.transferred
        if request.fetched_len is not None or request.wants_scores:
            return False
        match = self._manager.match(request)
        other = self._loading_for_another(request, match.kv_match_len)
        must_load = other is not None or self._fetcher.wants(request, match)
        if other is not None or (must_load and not self._has_room):
            self._held[request] = other
            return True
        fetch = self._fetcher.begin(request, match) if must_load else None
        if fetch is None:
            request.fetched_len = 0
            return False
        self._pending[request] = fetch
        return True

    def _loading_for_another(self, request: Request, kv_match_len: int) -> Request | None:
        """Return a request whose load covers more of ``request`` than the cache, or None."""
        least = kv_match_len + self._manager.cache.checkpoint_grid
        for other, fetch in self._pending.items():
            if (
                other.namespace == request.namespace
                and not fetch.has_ended
                and fetch.end >= least
                and common_prefix_len(request.tokens, other.tokens[: fetch.end]) >= least
            ):
                return other
        return None

    def forget(self, request: Request) -> None:
        """End the load of ``request``, which no longer waits."""
        self._held.pop(request, None)
        fetch = self._pending.pop(request, None)
        if fetch is not None:
            fetch.cancel()

    def on_step_failed(self, *, was_lost: bool) -> None:
        """See ``StepHooks``. If rows were lost, waiting requests compute instead of loading."""
        if was_lost:
            self._end_all()

    def _end_all(self) -> None:
        for request in tuple(self._pending):
            request.fetched_len = 0
            try:
                self.forget(request)
            except Exception:  # An exception has left the cache half changed, or the load.
                logger.exception("The load of a prefix could not be ended.")
        self._held.clear()

    def before_step(self) -> None:
        self._fetcher.advance()

    def wait(self) -> None:
        if self._pending:
            self._fetcher.wait(IDLE_S)

    def disconnect(self, *, at_once: bool) -> None:
        if at_once:
            self._end_all()
