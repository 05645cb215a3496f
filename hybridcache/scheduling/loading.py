"""Waiting requests with a prefix to load from another engine, host memory or a disk.

A waiting request is held until its load has ended, successfully or not, while another request's
load brings the same prefix, or while all load slots are taken. Then it is admitted like any other
and computes the rest. Requests behind a held one are admitted as if it were not there.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.tokens import common_prefix_len
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.request import ScheduledRequest

logger = logging.getLogger(__name__)


IDLE_S = 0.01
"""Maximum wait for data in a step with nothing to compute."""


@dataclass(eq=False)
class PrefixLoad(ABC):
    """Load of one prefix. Only its ``Loader`` and ``cancel`` change it."""

    end: int
    """Length of the prefix that is loaded."""
    has_ended: bool = False
    """True if the load is complete or given up."""
    num_loaded: int = 0
    """Tokens of KV that were loaded into the cache; 0 if the load was given up."""

    @abstractmethod
    def cancel(self) -> None:
        """End the load, unless it has ended. Its memory is free when this returns."""


R = TypeVar("R", bound=ScheduledRequest)


class Loader(ABC, Generic[R]):
    """Loads in progress from one source, and the waiting requests that are held for them. Used by
    one thread: between two steps or, to begin a load, while a step is planned."""

    max_loads: int
    """Maximum number of loads in progress."""

    def __init__(self, manager: CacheManager) -> None:
        self.manager = manager
        self._pending: dict[R, PrefixLoad] = {}
        self._held: dict[R, R | None] = {}
        """Requests without a load in progress, each with the request that loads its prefix, or None
        if it waits for a load slot."""

    # --- The source -------------------------------------------------------------------------------

    @abstractmethod
    def wants(self, request: R, match: PrefixMatch) -> bool:
        """Return True if ``begin`` would load anything after ``match``, the prefix of ``request``
        in the cache."""

    @abstractmethod
    def begin(self, request: R, match: PrefixMatch) -> PrefixLoad | None:
        """Start to load the part of the prompt after ``match``. Called directly after ``wants``.
        Returns None for lack of memory. May evict cached entries."""

    @abstractmethod
    def advance(self) -> None:
        """Copy arrived data into rows and slots, and publish complete loads, in a bounded time."""

    @abstractmethod
    def wait_for_data(self) -> None:
        """Sleep until data has arrived for ``advance``, for ``IDLE_S`` at most."""

    # --- Held requests ----------------------------------------------------------------------------

    @property
    def requests(self) -> set[R]:
        """Waiting requests that are held or have a load in progress."""
        return {*self._pending, *self._held}

    @property
    def _has_room(self) -> bool:
        """True if another load may begin."""
        return sum(not load.has_ended for load in self._pending.values()) < self.max_loads

    def is_holding(self, request: R) -> bool:
        """Return True if ``holds`` would be True again, without looking at tokens. O(1)."""
        load = self._pending.get(request)
        if load is not None:
            return not load.has_ended
        if request not in self._held:
            return False
        other = self._held[request]
        if other is None:
            return not self._has_room
        return other in self._pending and not self._pending[other].has_ended

    def holds(self, request: R) -> bool:
        """Return True if waiting ``request`` must wait for a load. Begins its load if one is due
        and a slot is free. O(1) while nothing changed for the request, else O(its length)."""
        if self.is_holding(request):
            return True
        self._held.pop(request, None)
        ended = self._pending.pop(request, None)
        if ended is not None:
            request.loaded_len = ended.num_loaded
        if request.loaded_len is not None or request.wants_scores:
            return False
        match = self.manager.cache.match(request.tokens, request.namespace)
        other = self._loading_for_another(request, match.kv_match_len)
        must_load = other is not None or self.wants(request, match)
        if other is not None or (must_load and not self._has_room):
            self._held[request] = other
            return True
        load = self.begin(request, match) if must_load else None
        if load is None:
            request.loaded_len = 0
            return False
        self._pending[request] = load
        return True

    def _loading_for_another(self, request: R, kv_match_len: int) -> R | None:
        """Return a request whose load covers more of ``request`` than the cache, or None."""
        least = kv_match_len + self.manager.cache.checkpoint_grid
        for other, load in self._pending.items():
            if (
                other.namespace == request.namespace
                and not load.has_ended
                and load.end >= least
                and common_prefix_len(request.tokens, other.tokens[: load.end]) >= least
            ):
                return other
        return None

    def wait(self) -> None:
        """Sleep until a load can go on, because nothing can be computed. Returns at once if there
        is none."""
        if self._pending:
            self.wait_for_data()

    def forget(self, request: R) -> None:
        """End the load of ``request``, which no longer waits."""
        self._held.pop(request, None)
        load = self._pending.pop(request, None)
        if load is not None:
            load.cancel()

    def step_failed(self, *, was_lost: bool) -> None:
        """End all loads if rows ``was_lost``: a failed step alone touches none of theirs."""
        if was_lost:
            self.end_all()

    def disconnect(self, *, at_once: bool) -> None:
        """End all loads ``at_once``, because the engine ends, or let them finish."""
        if at_once:
            self.end_all()

    def end_all(self) -> None:
        """End all loads, because rows were lost or the engine ends. Waiting requests compute."""
        for request in tuple(self._pending):
            request.loaded_len = 0
            try:
                self.forget(request)
            except MemoryError:  # The caller begins again.
                raise
            except Exception:  # An exception has left the cache half changed, or the load.
                logger.exception("The load of a prefix could not be ended.")
        self._held.clear()
