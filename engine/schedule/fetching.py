"""Requests that wait because their prefix is being fetched: from another engine, host memory or a
disk.

A request that waits for its turn is looked at before it is let in. Where a ``Fetcher`` has more of
its prompt than the cache does, the fetch begins, the request goes on waiting, and those behind it
are let in as they would be; whoever runs is not held up. When the fetch has ended, well or not, the
request is let in like any other: it finds in the cache what came, and computes the rest. A request
is fetched for once. One whose beginning is on its way for another waits for that first.
"""

from __future__ import annotations

from typing import Protocol

from engine.requests.request import Request
from engine.schedule.cache_manager import CacheManager
from engine.text.outputs import Transferred
from hybridcache.tokens import common_prefix_len


class Outside(Protocol):
    """Work beside the steps, for other processes or memories. The engine's thread calls it."""

    @property
    def has_work(self) -> bool:
        """Whether ``advance`` has something to do though no request waits or runs."""
        ...

    def advance(self) -> None:
        """Between two steps: do what has become possible, in a bounded time."""
        ...

    def wait(self) -> None:
        """Nothing can be computed: sleep a little, or until something has become possible."""
        ...

    def give_up(self) -> None:
        """A step broke off, and what it computed is not known."""
        ...

    def close(self) -> None:
        """The engine ends."""
        ...


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

    def begin(self, request: Request, cached_len: int) -> Fetch | None:
        """Fetch what ``request``, which could resume at ``cached_len``, lacks. None: there is
        nothing, or it would not pay. May take memory, at the cost of what is cached."""
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


class Fetching:
    """Knows which waiting requests have a fetch under way."""

    def __init__(self, manager: CacheManager, fetcher: Fetcher) -> None:
        self._manager, self._fetcher = manager, fetcher
        self._pending: dict[Request, Fetch] = {}

    @property
    def has_work(self) -> bool:
        """See ``Outside``: its requests wait."""
        return False

    def is_pending(self, request: Request) -> bool:
        """Whether its fetch is under way. O(1)."""
        return request in self._pending

    def holds(self, request: Request) -> bool:
        """Whether waiting ``request`` goes on waiting for its prefix; begins its fetch. O(1) where
        that is under way, else O(its length)."""
        fetch = self._pending.get(request)
        if fetch is not None:
            if not fetch.has_ended:
                return True
            request.fetched_len, request.transferred = fetch.num_fetched, fetch.transferred
            del self._pending[request]
        if request.fetched_len is not None or request.wants_scores:
            return False
        match = self._manager.match(request)
        if not self._fetcher.has_room or self._comes_for_another(request, match.kv_len):
            return True
        fetch = self._fetcher.begin(request, match.cached_len)
        if fetch is None:
            request.fetched_len = 0
            return False
        self._pending[request] = fetch
        return True

    def _comes_for_another(self, request: Request, kv_len: int) -> bool:
        """Whether some fetch brings KV of ``request`` past the ``kv_len`` that is here."""
        least = kv_len + self._manager.checkpoint_grid
        return any(
            other.namespace == request.namespace
            and not fetch.has_ended
            and fetch.end >= least
            and common_prefix_len(request.tokens, other.tokens[: fetch.end]) >= least
            for other, fetch in self._pending.items()
        )

    def forget(self, request: Request) -> None:
        """``request`` waits no more."""
        fetch = self._pending.pop(request, None)
        if fetch is not None:
            fetch.cancel()

    def give_up(self) -> None:
        """Nobody may know what the rows hold any more: cancel all; those that wait compute."""
        for request in tuple(self._pending):
            self.forget(request)
            request.fetched_len = 0

    def advance(self) -> None:
        """Take in what has come."""
        self._fetcher.advance()

    def wait(self) -> None:
        """Nothing can be computed: sleep a little, or until something has come."""
        if self._pending:
            self._fetcher.wait(IDLE_S)

    def close(self) -> None:
        """The engine ends."""
        self._fetcher.close()
