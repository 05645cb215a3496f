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
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import numpy as np

from hybridcache.export.events import Event, EventStream
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import PrefillTimes, Roofline, describe_times
from hybridcache.lab.scenario import GIB_SPEC, Scenario
from hybridcache.lab.simulation.result import PERCENTILES
from hybridcache.lab.simulation.serving import RequestLog
from hybridcache.lab.simulation.sizes import sizes_for
from hybridcache.lab.simulation.target import LeaseTarget, Served, build_target
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.routing.protocol import ReplicaId, ReplicaSpec, RouteRequest
from hybridcache.routing.registry import find_router


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """Replicas and their router."""

    replicas: int = 8
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
    """Until the one that replaces it is up."""
    seed: int = 0
    """Number of the replica that fails first."""

    def __post_init__(self) -> None:
        for name, least in (("replicas", 1), ("failures", 0), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name in ("load", "delay_s", "replaced_s"):
            value = getattr(self, name)
            if name == "load" and value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf or (name == "load" and not value):
                range_ = "above 0" if name == "load" else "of at least 0"
                raise ValueError(f"{name} must be a finite number {range_}, got {value!r}")


@dataclass(frozen=True, slots=True)
class Span:
    """Total work of a trace."""

    first_s: float
    seconds: float
    """Seconds from its first request to its last."""
    cold_flops: int
    """FLOPs of computing every prompt from its first token."""

    @classmethod
    def of(cls, trace: Trace, geometry: ModelGeometry) -> Span:
        """Add up the work of ``trace``. O(requests). ValueError if there is none."""
        work = [(one.timestamp_s, geometry.flops(0, one.num_tokens(trace.unit))) for one in trace]
        if not work:
            raise ValueError(f"{trace.name}: {trace.is_empty_because}")
        first_s = work[0][0]
        return cls(first_s, work[-1][0] - first_s, sum(flops for _, flops in work))


def times_of(
    config: FleetConfig, span: Span, geometry: ModelGeometry, times: PrefillTimes
) -> PrefillTimes:
    """Return ``times``, or with a load the times that keep the replicas that busy: proportional to
    FLOPs, as on a server with large batches, which share the reads of the weights. ValueError for a
    load of a trace that takes no time."""
    if config.load is None:
        return times
    if span.seconds <= 0:
        raise ValueError(
            "load is a share of the trace's time, and all its requests come at once: name starts "
            "(starts=poisson:2), or leave the load out"
        )
    flops_per_s = span.cold_flops / (config.load * config.replicas * span.seconds)
    return Roofline(geometry, flops_per_s=flops_per_s, bytes_per_s=math.inf, overhead_s=0.0)


@dataclass(frozen=True, slots=True)
class FleetResult:
    """One cell. Counts are in tokens, for any unit of the trace; sizes are those of one replica."""

    trace: str
    model: str
    gib: float
    policy: str
    checkpoints: str
    fleet: FleetConfig
    times: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    overpromised_tokens: int
    """Tokens that the router expected on the chosen replica and that were computed."""
    underpromised_tokens: int
    """Reused tokens that the router did not expect."""
    ttft_s: dict[int, float]
    """Percentiles of the time from when a request could be asked to its first token."""
    ttft_mean_s: float
    cold_mean_s: float
    """Mean prefill time of a prompt without any reuse, for comparison."""
    busy_share: float
    """Share of the fleet's time spent in prefills."""
    imbalance: float
    """Prefill seconds of the busiest place over the mean; 1 is perfect."""
    rerouted: int
    """Requests that lost their replica before the first token, and were routed again."""
    broken: int
    """Requests that lost their replica after the first token: their answers ended early."""
    bypassed: int

    @property
    def token_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_record(self) -> dict[str, Any]:
        """Return a record for JSON."""
        return asdict(self) | {"token_hit_rate": self.token_hit_rate}


def run_fleet(trace: Trace, scenario: Scenario, fleet: FleetConfig) -> FleetResult:
    """Run a fleet over a trace, which is best held in memory (``Trace.kept``). Every replica has
    the cache, the memory and the machine of ``scenario``. O(events log events). ValueError for a
    router that does not exist or chooses no replica, for a rebuilt peer and for a scenario of
    several policies or sizes."""
    if scenario.baseline:
        raise ValueError(
            f"baseline {scenario.baseline}: rebuilt peers publish no events for routers: leave "
            "it out for a fleet"
        )
    spec, geometry = GIB_SPEC if scenario.gib is None else scenario.gib, scenario.geometry()
    cells = scenario.cells(sizes_for(spec, trace, geometry, max(scenario.page_size, trace.unit)))
    if len(cells) > 1:
        raise ValueError(
            "a fleet has one policy, one placement and one size of its replicas, gib: run one for "
            "each"
        )
    cell = cells[0]
    span = Span.of(trace, geometry)
    times = times_of(fleet, span, geometry, cell.prefill_times(geometry))
    loop = _Fleet(cell, geometry, trace.unit, fleet, times)
    loop.run(trace.in_order(), span)
    return loop.summary(geometry, trace.full_name)


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

    def __init__(self, id_: int, place: int, target: LeaseTarget) -> None:
        self.id, self.place, self.target = id_, place, target
        self.queue: deque[_Asked] = deque()
        self.prefilling: _Asked | None = None
        self.decoding: dict[int, _Asked] = {}
        self.outbox: list[Event] = []
        self.covered: list[int] = []
        self.num_batches = 0
        self.is_up = True


_Change = Callable[[float], None]


class _Fleet:
    """The event loop."""

    def __init__(
        self,
        cell: Scenario,
        geometry: ModelGeometry,
        unit: int,
        config: FleetConfig,
        times: PrefillTimes,
    ) -> None:
        self._cell, self._unit, self._config, self._times = cell, unit, config, times
        self._events: list[tuple[float, int, _Change]] = []
        self._numbers = {name: count() for name in ("event", "replica", "request")}
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._places: list[_Replica | None] = []
        self._busy_s = [0.0] * config.replicas
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        self._homeless: list[_Asked] = []
        self._log = RequestLog(unit)
        self._expected = array("q")
        self._rerouted = self._broken = 0
        self._last_s = self._seconds = 0.0
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
            self._places.append(None)
            self._join(place, 0.0)

    def _join(self, place: int, now: float) -> None:
        target = build_target(self._cell, self._unit)
        assert isinstance(target, LeaseTarget)
        replica = _Replica(next(self._numbers["replica"]), place, target)
        self._places[place] = replica
        self._replicas[replica.id] = replica
        if self.router.follows_events:
            replica.target.cache.subscribe(EventStream(replica.outbox.append))
        self.router.joined(replica.id, now)
        homeless, self._homeless = self._homeless, []
        for asked in homeless:
            self._route(asked, now)

    def _plan_failures(self, span: Span) -> None:
        """Plan failures evenly over the trace, one place after the other, from the seed's on."""
        num_failures = self._config.failures
        for number in range(num_failures):
            when = span.first_s + span.seconds * (number + 1) / (num_failures + 1)
            place = (number + self._config.seed) % self._config.replicas
            self._push(when, lambda now, place=place: self._die(place, now))  # type: ignore[misc]

    def _push(self, when: float, change: _Change) -> None:
        heapq.heappush(self._events, (when, next(self._numbers["event"]), change))

    def run(self, requests: Iterable[TraceRequest], span: Span) -> None:
        self._plan_failures(span)
        for request in requests:
            self._until(request.timestamp_s)
            if request.session in self._later:
                self._later[request.session].append(request)
                continue
            self._later[request.session] = deque()
            self._ask(request, request.timestamp_s)
        self._until(float("inf"))
        self._seconds = max(self._last_s - span.first_s, 0.0)

    def _until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            now, _, change = heapq.heappop(self._events)
            change(now)

    def _ask(self, request: TraceRequest, now: float) -> None:
        self._route(_Asked(next(self._numbers["request"]), request, now), now)

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
        seconds += 0.0 if served is None else served.copy_s
        self._busy_s[replica.place] += seconds
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
        decode_s = len(asked.request.output) * self._unit * self._cell.tpot_s
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

    def summary(self, geometry: ModelGeometry, trace: str) -> FleetResult:
        """Return the figures of the run. O(requests)."""
        log, times, cell, fleet = self._log, self._times, self._cell, self._config
        described = describe_times(times)
        if fleet.load is not None and isinstance(times, Roofline):
            described = f"arithmetic at {times.flops_per_s:.4g} FLOP/s"
        lengths = np.frombuffer(log.prompt_tokens, np.int64)
        cached = np.frombuffer(log.cached_tokens, np.int64)
        expected = np.frombuffer(self._expected, np.int64)
        ttft = np.frombuffer(log.ttft_s, np.float64)
        cold = [times.seconds(0, length) for length in lengths.tolist()]
        busy, seconds = np.array(self._busy_s), self._seconds
        return FleetResult(
            trace=trace,
            model=geometry.name,
            gib=cell.size_gib,
            policy=str(cell.policy),
            checkpoints=str(cell.checkpoints),
            fleet=fleet,
            times=described,
            requests=len(lengths),
            prompt_tokens=int(lengths.sum()),
            cached_tokens=int(cached.sum()),
            overpromised_tokens=int(np.maximum(expected - cached, 0).sum()),
            underpromised_tokens=int(np.maximum(cached - expected, 0).sum()),
            ttft_s={rank: float(np.percentile(ttft, rank)) for rank in PERCENTILES},
            ttft_mean_s=float(ttft.mean()),
            cold_mean_s=float(np.mean(cold)),
            busy_share=float(busy.sum() / (fleet.replicas * seconds)) if seconds else 0.0,
            imbalance=float(busy.max() / busy.mean()) if busy.sum() else 1.0,
            rerouted=self._rerouted,
            broken=self._broken,
            bypassed=log.num_bypassed,
        )
