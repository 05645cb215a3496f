"""Waiting requests whose prefix is loaded from another engine, host memory or a disk.

Each waiting request is checked once before it is admitted. If a ``Fetcher`` can load more of its
prompt than the cache holds, the request is held until that load has ended, successfully or not.
Then it is admitted like any other and computes the rest. A request is held for one of three
reasons: its own load is in progress, another request's load brings the same prefix, or all load
slots are taken.

A request that loads nothing is never held, whatever the slots do: requests behind a held one are
admitted as if it were not there, and running requests do not wait.
"""

from __future__ import annotations

from typing import Protocol

from engine.requests.request import Request
from engine.schedule.hooks import StepHooks
from engine.text.outputs import Transferred
from hybridcache.api import PrefixMatch
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import common_prefix_len

IDLE_S = 0.01
"""A step with nothing to compute waits so long for what is fetched: orders come between two
steps."""


class Fetch(Protocol):
    """One prefix on its way."""

    @property
    def has_ended(self) -> bool:
        """Nothing more will come: it is in the cache, or given up. Changes in ``Fetcher.advance``
        alone."""
        ...

    @property
    def end(self) -> int:
        """Where the prefix ends."""
        ...

    @property
    def num_fetched(self) -> int:
        """Tokens of KV that came into the cache; 0 as long as it has not ended, or where it was
        given up."""
        ...

    @property
    def transferred(self) -> Transferred | None:
        """What went between engines for it, once it has ended; None: another engine has no part in
        it."""
        ...

    def cancel(self) -> None:
        """Nobody waits for it any more: what it holds is free when this returns."""
        ...


class Fetcher(Protocol):
    """Brings prefixes into the cache. Only the engine's thread calls it, between two steps or, to
    begin a fetch, while a step is planned."""

    @property
    def has_room(self) -> bool:
        """Whether another fetch may begin."""
        ...

    def wants(self, request: Request, match: PrefixMatch) -> bool:
        """Return whether ``begin`` would load anything for ``request``, whose prefix in the cache
        is ``match``. Takes no memory and does not depend on ``has_room``."""
        ...

    def begin(self, request: Request, match: PrefixMatch) -> Fetch | None:
        """Load what ``request``, whose prefix in the cache is ``match``, lacks: called right after
        ``wants`` was True and ``has_room``. None if there is no memory. May evict cached
        entries."""
        ...

    def advance(self) -> None:
        """Copy what has come into rows and slots, and publish what is complete. A bounded time:
        those who run wait for it."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleep until something has come that ``advance`` would take."""
        ...

    def close(self) -> None:
        """The engine ends."""
        ...


class Fetching(StepHooks):
    """Loads in progress and the waiting requests that are held for them."""

    def __init__(self, manager: CacheManager, fetcher: Fetcher) -> None:
        self._manager, self._fetcher = manager, fetcher
        self._pending: dict[Request, Fetch] = {}
        self._held: dict[Request, Request | None] = {}
        """Requests without a load of their own, each with the request whose load brings its prefix;
        None if it waits for a load slot."""

    @property
    def requests(self) -> set[Request]:
        """Waiting requests that are held or have a load in progress."""
        return {*self._pending, *self._held}

    def is_holding(self, request: Request) -> bool:
        """Return whether ``holds`` would be True again without looking at the tokens of waiting
        ``request``. O(1)."""
        fetch = self._pending.get(request)
        if fetch is not None:
            return not fetch.has_ended
        if request not in self._held:
            return False
        other = self._held[request]
        if other is None:
            return not self._fetcher.has_room
        return other in self._pending and not self._pending[other].has_ended

    def holds(self, request: Request) -> bool:
        """Return whether waiting ``request`` must wait for a load; begins its own load if there is
        one to begin and a free slot. O(1) while nothing changed for it, else O(its length)."""
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
        if other is not None or (must_load and not self._fetcher.has_room):
            self._held[request] = other
            return True
        fetch = self._fetcher.begin(request, match) if must_load else None
        if fetch is None:
            request.fetched_len = 0
            return False
        self._pending[request] = fetch
        return True

    def _loading_for_another(self, request: Request, kv_match_len: int) -> Request | None:
        """Return a request whose load brings KV of ``request`` past ``kv_match_len``, the
        cached length; None if there is none."""
        least = kv_match_len + self._manager.checkpoint_grid
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

    def on_cache_lost(self) -> None:
        """Cancel all loads: the contents of rows are unknown. Waiting requests compute."""
        for request in tuple(self._pending):
            self.forget(request)
            request.fetched_len = 0

    def before_step(self) -> None:
        """Publish loads that have arrived."""
        self._fetcher.advance()

    def wait(self) -> None:
        """Nothing can be computed: sleep a little, or until something has come."""
        if self._pending:
            self._fetcher.wait(IDLE_S)

    def disconnect(self) -> None:
        """See ``StepHooks``."""
        self._fetcher.close()
