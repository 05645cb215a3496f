"""A record of everything that leases did to one cache, in order, and its replay on another.

The engine can keep one while it serves; replaying it on a fresh cache of the same sizes and
policies takes the very same decisions, hit for hit and eviction for eviction, without a model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hybridcache.interface import PrefixCache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.protocol import PlacementPolicy


class LeaseEvent(NamedTuple):
    """One verb of one lease, or of the cache itself."""

    verb: str
    """begin, extend, reserve_checkpoint_slots, take_checkpoint_slots, roll_back, plan_checkpoint,
    publish, finish, preempt, abort: the lease's; reset: the cache's."""
    lease: int | None
    """Number of the lease, counted from 0; None: ``begin`` was refused, or the verb is the
    cache's."""
    arguments: tuple[Any, ...]
    result: Any
    """What it gave: begin (cached_len or None), extend (bool), reserve_checkpoint_slots (how many
    are still wanted), take_checkpoint_slots ((position, slot), ...); else None."""


class LeaseLog:
    """Events, appended as they happen. Holds every request's tokens: for tests and studies."""

    def __init__(self) -> None:
        self.events: list[LeaseEvent] = []
        self._numbers: dict[int, int] = {}
        self._num_begun = 0

    def begin(self, lease: Lease | None, request: LeaseRequest) -> None:
        """A lease began, or (None) was refused."""
        if lease is None:
            self.events.append(LeaseEvent("begin", None, (request,), None))
            return
        self._numbers[id(lease)] = self._num_begun
        self._num_begun += 1
        self.record("begin", lease, (request,), lease.cached_len)

    def record(
        self, verb: str, lease: Lease, arguments: tuple[Any, ...] = (), result: Any = None
    ) -> None:
        """``lease`` did ``verb``; see ``LeaseEvent`` for what ``result`` is."""
        self.events.append(LeaseEvent(verb, self._numbers[id(lease)], arguments, result))
        if verb in ("finish", "preempt", "abort"):
            del self._numbers[id(lease)]

    def reset(self) -> None:
        """The cache was reset."""
        self.events.append(LeaseEvent("reset", None, (), None))


def replay(cache: PrefixCache, placement: PlacementPolicy, log: LeaseLog) -> LeaseLog:
    """Do to ``cache`` what was recorded; returns the record of that, which equals ``log`` where
    both decided alike.

    Stops at the first ``begin`` or ``extend`` whose outcome differs, since what follows would have
    been different.
    """
    again = LeaseLog()
    leases: dict[int, Lease] = {}
    for event in log.events:
        if event.verb == "reset":
            cache.reset()
            again.reset()
        elif event.verb == "begin":
            begun = Lease.begin(cache, placement, *event.arguments)
            again.begin(begun, *event.arguments)
            if begun is not None and event.lease is not None:
                leases[event.lease] = begun
        elif event.lease is not None:
            lease = leases[event.lease]
            result = getattr(lease, event.verb)(*event.arguments)
            again.record(
                event.verb, lease, event.arguments, None if event.result is None else result
            )
        if again.events[-1].lease != event.lease or again.events[-1].result != event.result:
            break
    return again
