"""Simulated serving with several caches behind a router: events in order of time.

Each replica prefills one prompt after the other, in the order of their arrival, and decodes at the
same time. A request waits for the last answer of its session and is then routed at once. It holds
its lease from the start of its prefill to the end of its answer. A failed replica loses its cache.
Its requests without a first token are routed again, with their clocks running; the others are
aborted. A replica publishes changes of its cache at once, and they reach the router ``delay_s``
later.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

from hybridcache.export.events import Event, EventStream
from hybridcache.geometry.times import PrefillTimes
from hybridcache.lab.replicas.fleet import FleetConfig, Span
from hybridcache.lab.simulation.log import RequestLog
from hybridcache.lab.simulation.target import LeaseTarget, Served
from hybridcache.lab.trace import TraceRequest
from hybridcache.routing.protocol import ReplicaId, ReplicaSpec, RouteRequest
from hybridcache.routing.registry import find_router


class _Asked:
    """One request on its way."""

    __slots__ = ("asked_s", "expected_len", "number", "replica", "request", "served")

    def __init__(self, number: int, request: TraceRequest, asked_s: float) -> None:
        self.number, self.request, self.asked_s = number, request, asked_s
        self.expected_len = 0
        self.replica: _Replica | None = None
        self.served: Served | None = None


class _Replica:
    """One cache, its queue, and its counters."""

    def __init__(self, id_: int, target: LeaseTarget) -> None:
        self.id = id_
        self.target = target
        self.queue: deque[_Asked] = deque()
        self.prefilling: _Asked | None = None
        self.decoding: dict[int, _Asked] = {}
        self.outbox: list[Event] = []
        self.covered: list[int] = []
        self.num_batches = 0
        self.busy_s = 0.0
        self.num_requests = 0
        self.is_up = True


class FleetLog(NamedTuple):
    """Log of all requests, and of the fleet."""

    requests: RequestLog
    expected_tokens: array[int]
    """Tokens that the router expected to be reused, by request."""
    busy_s: tuple[float, ...]
    """Prefill seconds of each place, the replica that died and those that replaced it together."""
    seconds: float
    """From the first arrival to the last first token."""
    rerouted: int
    """Requests that lost their replica before the first token."""
    broken: int
    """And after it."""


def serve_fleet(
    make_target: Callable[[], LeaseTarget],
    requests: Iterable[TraceRequest],
    unit: int,
    config: FleetConfig,
    times: PrefillTimes,
    span: Span,
    spec: ReplicaSpec,
) -> FleetLog:
    """Serve all of ``requests``, in order of their timestamps. O(events log events)."""
    fleet = _Fleet(make_target, unit, config, times, spec)
    fleet.plan_failures(span)
    return fleet.run(requests)


_Change = Callable[[float], None]


class _Fleet:
    """The event loop."""

    def __init__(
        self,
        make_target: Callable[[], LeaseTarget],
        unit: int,
        config: FleetConfig,
        times: PrefillTimes,
        spec: ReplicaSpec,
    ) -> None:
        self._make_target, self._unit, self._config, self._times = make_target, unit, config, times
        self._events: list[tuple[float, int, _Change]] = []
        self._num_events = 0
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._places: list[_Replica | None] = []
        self._busy_s = [0.0] * config.replicas
        self._num_replicas = 0
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        self._homeless: list[_Asked] = []
        self._num_asked = 0
        self._log = RequestLog(unit)
        self._expected = array("q")
        self._rerouted = self._broken = 0
        self._last_s = 0.0
        self.router = find_router(config.router)(spec)
        for place in range(config.replicas):
            self._places.append(None)
            self._join(place, 0.0)

    def _join(self, place: int, now: float) -> None:
        replica = _Replica(self._num_replicas, self._make_target())
        self._num_replicas += 1
        self._places[place] = replica
        self._replicas[replica.id] = replica
        if self.router.follows_events:
            replica.target.cache.subscribe(EventStream(replica.outbox.append))
        self.router.joined(replica.id, now)
        homeless, self._homeless = self._homeless, []
        for asked in homeless:
            self._route(asked, now)

    def plan_failures(self, span: Span) -> None:
        """Evenly over the trace, one place after the other, from the seed's on."""
        count = self._config.failures
        for number in range(count):
            when = span.first_s + span.seconds * (number + 1) / (count + 1)
            place = (number + self._config.seed) % self._config.replicas
            self._push(when, lambda now, place=place: self._die(place, now))  # type: ignore[misc]

    def _push(self, when: float, change: _Change) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, change))

    def run(self, requests: Iterable[TraceRequest]) -> FleetLog:
        first_s: float | None = None
        for request in requests:
            first_s = request.timestamp_s if first_s is None else first_s
            self._until(request.timestamp_s)
            if request.session in self._later:
                self._later[request.session].append(request)
                continue
            self._later[request.session] = deque()
            self._ask(request, request.timestamp_s)
        self._until(float("inf"))
        for place, replica in enumerate(self._places):
            if replica is not None:
                self._busy_s[place] += replica.busy_s
        seconds = max(self._last_s - (first_s or 0.0), 0.0)
        return FleetLog(
            self._log,
            self._expected,
            tuple(self._busy_s),
            seconds,
            self._rerouted,
            self._broken,
        )

    def _until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            now, _, change = heapq.heappop(self._events)
            change(now)

    def _ask(self, request: TraceRequest, now: float) -> None:
        asked = _Asked(self._num_asked, request, now)
        self._num_asked += 1
        self._route(asked, now)

    def _route(self, asked: _Asked, now: float) -> None:
        if not self.router.loads:
            self._homeless.append(asked)
            return
        request = asked.request
        known = RouteRequest(
            asked.number,
            tuple(request.tokens.tolist()),
            request.namespace,
            request.boundaries,
        )
        choice = self.router.route(known, now)
        replica = self._replicas[choice.replica]
        asked.replica, asked.expected_len = replica, choice.expected_len
        replica.queue.append(asked)
        self._start(replica, now)

    def _start(self, replica: _Replica, now: float) -> None:
        if replica.prefilling is not None or not replica.queue:
            return
        asked = replica.queue[0]
        served = replica.target.begin(asked.request)
        if served is None and replica.decoding:
            return  # memory comes back when one of these finishes
        replica.queue.popleft()
        asked.served, replica.prefilling = served, asked
        cached = 0 if served is None else served.cached_len * self._unit
        seconds = self._times.seconds(cached, asked.request.num_tokens(self._unit))
        replica.busy_s += seconds
        self._publish(replica, now)
        self._push(now + seconds, lambda then: self._prefilled(asked, replica, then))

    def _prefilled(self, asked: _Asked, replica: _Replica, now: float) -> None:
        if not replica.is_up:
            return
        if asked.served is not None:
            asked.served.prefilled()
        self._log.add(asked.request, asked.served, 0.0)
        self._log.ttft_s.append(now - asked.asked_s)
        self._expected.append(asked.expected_len * self._unit)
        self._last_s = now
        self.router.prefilled(asked.number, now)
        replica.prefilling = None
        replica.decoding[asked.number] = asked
        replica.covered.append(asked.number)
        self._publish(replica, now)
        decode_s = len(asked.request.output) * self._unit * self._config.tpot_s
        self._push(now + decode_s, lambda then: self._finished(asked, replica, then))
        self._start(replica, now)

    def _finished(self, asked: _Asked, replica: _Replica, now: float) -> None:
        if not replica.is_up:
            return
        if asked.served is not None:
            asked.served.finish()
        del replica.decoding[asked.number]
        self.router.ended(asked.number, now)
        self._publish(replica, now)
        self._next_turn(asked.request.session, now)
        self._start(replica, now)

    def _next_turn(self, session: Hashable, now: float) -> None:
        later = self._later[session]
        if later:
            request = later.popleft()
            self._ask(request, max(request.timestamp_s, now))
        else:
            del self._later[session]

    def _publish(self, replica: _Replica, now: float) -> None:
        if not replica.outbox and not replica.covered:
            return
        sequence = replica.num_batches
        events, covered = tuple(replica.outbox), tuple(replica.covered)
        replica.outbox.clear()
        replica.covered.clear()
        replica.num_batches += 1

        def deliver(then: float) -> None:
            if replica.is_up:
                self.router.on_events(replica.id, sequence, events, covered)

        if self._config.delay_s:
            self._push(now + self._config.delay_s, deliver)
        else:
            deliver(now)

    def _die(self, place: int, now: float) -> None:
        replica = self._places[place]
        if replica is None:
            return
        replica.is_up = False
        self._busy_s[place] += replica.busy_s
        self._places[place] = None
        del self._replicas[replica.id]
        self.router.left(replica.id, now)
        waiting = [replica.prefilling] if replica.prefilling is not None else []
        waiting += replica.queue
        self._rerouted += len(waiting)
        self._broken += len(replica.decoding)
        self._push(now + self._config.replaced_s, lambda then: self._join(place, then))
        for asked in waiting:
            asked.served = None
            self._route(asked, now)
        for asked in replica.decoding.values():
            self._next_turn(asked.request.session, now)
