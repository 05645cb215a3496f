"""Record of the calls of all leases of one cache, and its replay on another.

A fresh cache of the same sizes and policies then makes the same decisions, hit for hit and eviction
for eviction, without a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hybridcache.cache import HybridRadixCache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.protocol import FetchRule, PlacementPolicy


class LeaseEvent(NamedTuple):
    """One call on a lease, or on the cache itself."""

    verb: str
    """Name of the method: begin, extend, take_checkpoint_slots, roll_back, plan_checkpoint,
    publish, finish, preempt or abort of a lease, or reset of the cache."""
    lease: int | None
    """Number of the lease, counted from 0. None if ``begin`` was refused, or for calls on the
    cache."""
    arguments: tuple[Any, ...]
    result: Any
    """Returned value: cached_len or None (begin), bool (extend), ((position, slot), ...)
    or None (take_checkpoint_slots). None for the others."""


class LeaseLog:
    """Record of events, in order."""

    def __init__(self) -> None:
        self.events: list[LeaseEvent] = []
        self._numbers: dict[int, int] = {}
        self._num_begun = 0

    def begin(self, lease: Lease | None, request: LeaseRequest) -> None:
        """Record that a lease began, or was refused (None)."""
        if lease is None:
            self.events.append(LeaseEvent("begin", None, (request,), None))
            return
        self._numbers[id(lease)] = self._num_begun
        self._num_begun += 1
        self.record("begin", lease, (request,), lease.cached_len)

    def record(
        self, verb: str, lease: Lease, arguments: tuple[Any, ...] = (), result: Any = None
    ) -> None:
        """Record a call of ``lease``; see ``LeaseEvent`` for ``result``."""
        self.events.append(LeaseEvent(verb, self._numbers[id(lease)], arguments, result))
        if verb in ("finish", "preempt", "abort"):
            del self._numbers[id(lease)]

    def reset(self) -> None:
        """Record that the cache was reset."""
        self.events.append(LeaseEvent("reset", None, (), None))


VERBS = (
    *("extend", "take_checkpoint_slots", "roll_back"),
    *("plan_checkpoint", "publish", "finish", "preempt", "abort"),
)
"""Recorded methods of a lease."""


def logged_lease(log: LeaseLog) -> type[Lease]:
    """Return a subclass of ``Lease`` that records its calls in ``log``."""

    class LoggedLease(Lease):
        @classmethod
        def begin(
            cls,
            cache: HybridRadixCache,
            placement: PlacementPolicy,
            request: LeaseRequest,
            exchange: FetchRule | None = None,
        ) -> Lease | None:
            lease = super().begin(cache, placement, request, exchange)
            log.begin(lease, request)
            return lease

    for verb in VERBS:
        setattr(LoggedLease, verb, _recording(log, verb))
    return LoggedLease


def _recording(log: LeaseLog, verb: str) -> Callable[..., Any]:
    method = getattr(Lease, verb)

    def call(lease: Lease, *arguments: Any) -> Any:
        result = method(lease, *arguments)
        log.record(verb, lease, arguments, None if verb == "publish" else result)
        return result

    return call


def replay(cache: HybridRadixCache, placement: PlacementPolicy, log: LeaseLog) -> LeaseLog:
    """Repeat the recorded calls on ``cache`` and return their record.

    It equals ``log`` if both caches made the same decisions. Stops at the first ``begin`` or
    ``extend`` with another result.
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
            if event.verb in ("publish", "finish", "preempt"):
                cache.take_step().done()  # There are no tensors.
            result = getattr(lease, event.verb)(*event.arguments)
            again.record(
                event.verb, lease, event.arguments, None if event.result is None else result
            )
        if again.events[-1].lease != event.lease or again.events[-1].result != event.result:
            break
    return again
