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
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import numpy as np

from hybridcache.adapters.routing.outbox import Outbox
from hybridcache.adapters.routing.protocol import ReplicaId, ReplicaSpec, RouteRequest
from hybridcache.adapters.routing.registry import find_router
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import counted
from hybridcache.lab.results.result import Plain, StoredResult
from hybridcache.lab.runs.serving import RequestLog
from hybridcache.lab.runs.target import LeasedRequest, LeaseTarget, build_target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.trace import Tabular, Trace, TraceRequest
from hybridcache.radix.offload import PrefillTimes

TPOT_S = 0.02
"""Seconds of a token of an answer."""


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Replicas and their router."""

    replicas: int = 8
    """Number of caches, each with the memory of the scenario."""
    router: str = "checkpoint"
    """A word of ``ROUTERS``, or ``module:Class``."""
    load: float | None = None
    """Share of the trace's time that all prompts, computed cold, would keep the replicas busy. It
    sets their speed; None keeps the prefill times."""
    delay_s: float = 0.0
    """Seconds from a change in a cache until its event reaches the router."""
    failures: int = 0
    """Number of replicas that fail, evenly over the trace; each is replaced by an empty one."""
    replaced_s: float = 30.0
    """Seconds from a failure until the empty replica."""
    seed: int = 0
    """Number of the replica that fails first."""


@dataclass(frozen=True, slots=True)
class FleetResult(StoredResult, Tabular):
    """One cell. Counts are in tokens, for any unit of the trace."""

    trace: str
    gib: float
    fleet: FleetConfig
    requests: int
    prompt_tokens: int
    cached_tokens: int
    ttft_mean_s: float
    """Mean time from when a request could be asked to its first token."""
    cold_mean_s: float
    rerouted: int
    """Requests that lost their replica before the first token, and were routed again."""

    @property
    def token_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_record(self) -> Plain:
        return StoredResult.as_record(self) | {"token_hit_rate": self.token_hit_rate}

    def to_dicts(self) -> list[Plain]:
        """Return one flat dictionary: settings of the fleet and figures."""
        figures = self.as_record()
        return [figures.pop("fleet") | figures]


def run_fleet(trace: str | Trace, scenario: Scenario, fleet: FleetConfig) -> FleetResult:
    """Run a fleet over a trace, which is best held in memory (``Trace.kept``), or its name. Every
    replica has the cache, the memory and the machine of ``scenario``. ValueError unless it has one
    competitor and one size, no ``baseline``, and ``trace`` a request. O(events log events)."""
    trace = replace(scenario, trace=trace).opened()
    points, _ = scenario.points(trace, max(scenario.page_size, trace.unit))
    geometry, (cell, *others) = scenario.geometry(), scenario.cells(points)
    if others or cell.baseline:
        given = cell.title + f" and {counted(len(others), 'other')}" * bool(others)
        needed = "a fleet needs one policy with one placement at one size, gib=N, and no baseline"
        raise ValueError(f"{needed} (got {given}): run a fleet for each")
    work = [(one.timestamp_s, geometry.flops(0, one.num_tokens(trace.unit))) for one in trace]
    if not work:
        raise ValueError(f"{trace.full_name}: {trace.is_empty_because}")
    first_s, seconds = work[0][0], work[-1][0] - work[0][0]
    times = cell.prefill_times(geometry)
    if fleet.load is not None:
        # As on a server with large batches, which share the reads of the weights.
        cold_flops = sum(flops for _, flops in work)
        flops_per_s = cold_flops / (fleet.load * fleet.replicas * seconds)
        times = Roofline(geometry, flops_per_s=flops_per_s, bytes_per_s=math.inf, overhead_s=0.0)
    loop = Fleet(cell, geometry, trace.unit, fleet, times)
    # Failures are even over the trace, one place after the other, from the seed's on.
    for number in range(fleet.failures):
        when = first_s + seconds * (number + 1) / (fleet.failures + 1)
        loop.push(when, partial(loop.fail, (number + fleet.seed) % fleet.replicas))
    loop.run(trace.in_order())
    log = loop.log
    lengths, ttft_s = np.frombuffer(log.prompt_tokens, np.int64), np.frombuffer(log.ttft_s)
    return FleetResult(
        trace=trace.full_name,
        gib=cell.size_gib,
        fleet=fleet,
        requests=len(lengths),
        prompt_tokens=int(lengths.sum()),
        cached_tokens=sum(log.cached_tokens),
        ttft_mean_s=float(ttft_s.mean()),
        cold_mean_s=float(np.mean([times.seconds(0, length) for length in lengths.tolist()])),
        rerouted=loop.rerouted,
    )


@dataclass(slots=True)
class Asked:
    """One request on its way."""

    number: int
    request: TraceRequest
    asked_s: float
    """Time from which it waits: its timestamp, or the end of the session's last answer."""
    served: LeasedRequest | None = None


@dataclass(slots=True, eq=False)
class Replica:
    """One cache with its queue. It prefills one prompt at a time."""

    target: LeaseTarget
    id: int
    place: int
    """Place in the fleet, which another replica has after this one has failed."""
    outbox: Outbox | None
    """Sender of its events, if the router follows them."""
    queue: deque[Asked] = field(default_factory=deque)
    prefilling: Asked | None = None
    decoding: dict[int, Asked] = field(default_factory=dict)
    is_up: bool = True


class Fleet:
    """Event loop of several replicas behind a router."""

    def __init__(
        self,
        cell: Scenario,
        geometry: ModelGeometry,
        unit: int,
        config: FleetConfig,
        times: PrefillTimes,
    ) -> None:
        self.log, self._times = RequestLog(unit), times
        self._cell, self._config = cell, config
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = self._num_requests = 0
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        """Sessions with a waiting or running request, and the requests that arrived meanwhile."""
        self._ids = count()
        self.replicas: dict[ReplicaId, Replica] = {}
        self._homeless: list[Asked] = []
        self.rerouted = 0
        cache, stateful = cell.cache_config(geometry, unit), bool(geometry.num_linear_layers)
        spec = ReplicaSpec(
            times,
            unit,
            cache.page_size,
            cache.grid,
            cache.kv_bytes_per_token,
            geometry.state_bytes if stateful else 0,
            cell.budget_bytes,
            stateful,
            cell.placement(unit),
        )
        self.router = find_router(config.router)(spec)
        for place in range(config.replicas):
            self._join(place, 0.0)

    def run(self, requests: Iterable[TraceRequest]) -> None:
        """Serve all of ``requests``."""
        for request in requests:
            self._until(request.timestamp_s)
            if request.session in self._later:
                self._later[request.session].append(request)
                continue
            self._later[request.session] = deque()
            self._ask(request, request.timestamp_s)
        self._until(math.inf)

    def _until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            now, _, change = heapq.heappop(self._events)
            change(now)

    def push(self, when: float, change: Callable[[float], None]) -> None:
        """Call ``change`` at that time."""
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, change))

    def _join(self, place: int, now: float) -> None:
        target = build_target(self._cell, self.log.unit)
        assert isinstance(target, LeaseTarget)
        outbox = Outbox(target.cache) if self.router.follows_events else None
        replica = Replica(target, next(self._ids), place, outbox)
        self.replicas[replica.id] = replica
        self.router.joined(replica.id, now)
        homeless, self._homeless = self._homeless, []
        for asked in homeless:
            self._route(asked, now)

    def _ask(self, request: TraceRequest, now: float) -> None:
        self._num_requests += 1
        self._route(Asked(self._num_requests, request, now), now)

    def _route(self, asked: Asked, now: float) -> None:
        if not self.router.loads:
            self._homeless.append(asked)
            return
        request = asked.request
        known = RouteRequest(asked.number, request.tokens, request.namespace, request.boundaries)
        replica = self.replicas[self.router.route(known, now).replica]
        replica.queue.append(asked)
        self._start(replica, now)

    def _start(self, replica: Replica, now: float) -> None:
        """Begin the next prefill of a replica if it is idle and has the memory."""
        if not replica.queue or replica.prefilling is not None:
            return
        asked = replica.queue[0]
        served = replica.target.begin(asked.request)
        if served is None and replica.decoding:
            return  # memory comes back when one of these finishes
        replica.queue.popleft()
        asked.served, replica.prefilling = served, asked
        cached = 0 if served is None else served.cached_len * self.log.unit
        seconds = self._times.seconds(cached, asked.request.num_tokens(self.log.unit))
        seconds += 0.0 if served is None else served.copy_s
        self._publish(replica, now)
        self.push(now + seconds, partial(self._prefilled, asked, replica))

    def _prefilled(self, asked: Asked, replica: Replica, now: float) -> None:
        if not replica.is_up:
            return
        if asked.served is not None:
            asked.served.prefilled()
        self.log.add(asked.request, asked.served, 0.0)
        self.log.ttft_s.append(now - asked.asked_s)
        replica.prefilling = None
        replica.decoding[asked.number] = asked
        self.router.prefilled(asked.number, now)
        if replica.outbox is not None:
            replica.outbox.cover(asked.number)
        self._publish(replica, now)
        decode_s = len(asked.request.output) * self.log.unit * TPOT_S
        self.push(now + decode_s, partial(self._finished, asked, replica))
        self._start(replica, now)

    def _finished(self, asked: Asked, replica: Replica, now: float) -> None:
        if not replica.is_up:
            return
        if asked.served is not None:
            asked.served.finish(asked.request.output)
        del replica.decoding[asked.number]
        self.router.ended(asked.number, now)
        self._publish(replica, now)
        self._next_turn(asked.request.session, now)
        self._start(replica, now)

    def _next_turn(self, session: Hashable, now: float) -> None:
        """Ask the next request of a session whose answer is complete, if it has one."""
        later = self._later[session]
        if later:
            request = later.popleft()
            self._ask(request, max(request.timestamp_s, now))
        else:
            del self._later[session]

    def _publish(self, replica: Replica, now: float) -> None:
        batch = None if replica.outbox is None else replica.outbox.flush()
        if batch is None:
            return

        def deliver(then: float) -> None:
            if replica.is_up:
                self.router.on_events(replica.id, *batch)

        if self._config.delay_s:
            self.push(now + self._config.delay_s, deliver)
        else:
            deliver(now)

    def fail(self, place: int, now: float) -> None:
        """End the replica at ``place``, if there is one."""
        replica = next((one for one in self.replicas.values() if one.place == place), None)
        if replica is None:
            return
        replica.is_up = False
        del self.replicas[replica.id]
        self.router.left(replica.id, now)
        waiting = [one for one in (replica.prefilling, *replica.queue) if one is not None]
        self.rerouted += len(waiting)
        self.push(now + self._config.replaced_s, partial(self._join, place))
        for asked in waiting:
            asked.served = None
            self._route(asked, now)
        for asked in replica.decoding.values():
            self._next_turn(asked.request.session, now)
