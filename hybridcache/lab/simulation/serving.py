"""Simulated serving of a trace: one request after the other, or concurrently.

In turn, waiting times are computed afterwards from the prefill times (first come, first served).
Concurrent requests wait for the last answer of their session, for a server and for memory, and
publish when their prefill is done. The time to first token counts from the timestamp, or from the
end of the session's last answer if that was later.
"""

from __future__ import annotations

import heapq
import math
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

from hybridcache.adapters.routing.outbox import Outbox
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.target import Served, Target
from hybridcache.lab.trace import TraceRequest
from hybridcache.radix.api import Losses
from hybridcache.radix.offload import PrefillTimes

NUM_SUMS = len(Losses._fields) + 4


class RequestLog:
    """One entry a request, in the order of their first tokens. Tokens and seconds."""

    def __init__(self, unit: int, has_causes: bool = True) -> None:
        self.unit = unit
        self.has_causes = has_causes
        """False for rebuilt peers: they report no losses, also where no request fits."""
        self.arrival_s = array("d")
        self.prompt_tokens = array("q")
        self.cached_tokens = array("q")
        self.sessions: dict[Hashable, list[int]] = {}
        """Sums of each session, in the order of their first requests: lost ids by cause, in the
        order of ``Losses``, then tokens of bypassed requests, requests, and tokens of prompts and
        of their reused parts."""
        self.copy_s = array("d")
        self.prefill_s = array("d")
        self.ttft_s = array("d")
        self.num_bypassed = 0
        """Requests that could not hold memory at all, and were computed without the cache."""
        self.control_s = 0.0
        """Spent in the cache's own code."""

    def add(self, request: TraceRequest, served: Served | None, control_s: float) -> None:
        """Record a request."""
        unit = self.unit
        length = request.num_tokens(unit)
        sums = self.sessions.get(request.session)
        if sums is None:
            sums = self.sessions[request.session] = [0] * NUM_SUMS
        cached, copy_s = 0, 0.0
        if served is None:
            self.num_bypassed += 1
            sums[-4] += length
        else:
            cached, copy_s = served.cached_len * unit, served.copy_s
            if served.losses is not None:
                for cause, num_ids in enumerate(served.losses):
                    sums[cause] += num_ids
        sums[-3] += 1
        sums[-2] += length
        sums[-1] += cached
        self.arrival_s.append(request.timestamp_s)
        self.prompt_tokens.append(length)
        self.cached_tokens.append(cached)
        self.copy_s.append(copy_s)
        self.control_s += control_s

    @property
    def losses(self) -> Losses:
        """Lost tokens of all requests. O(sessions)."""
        totals = [sum(column) for column in zip(*self.sessions.values(), strict=True)]
        return self.losses_of(totals or [0] * NUM_SUMS)

    def losses_of(self, sums: Sequence[int]) -> Losses:
        """Return lost tokens by cause. Those without another cause count as never seen: a prompt's
        last id may stand for less than a unit."""
        *ids, bypassed, _, prompt_tokens, cached_tokens = sums
        _, *others, refused, not_fetched = [num_ids * self.unit for num_ids in ids]
        others += refused + bypassed, not_fetched
        return Losses(prompt_tokens - cached_tokens - sum(others), *others)


def serve(
    target: Target, requests: Iterable[TraceRequest], unit: int, scenario: Scenario
) -> RequestLog:
    """Serve all of ``requests`` on the machine of ``scenario``, and return their log."""
    log = RequestLog(unit, has_causes=not scenario.baseline)
    times = scenario.prefill_times(scenario.geometry())
    if scenario.max_running is None:
        for request in requests:
            start = perf_counter()
            served = target.begin(request)
            if served is not None:
                served.prefilled()
                served.finish(request.output)
            log.add(request, served, perf_counter() - start)
    else:
        replica = Replica(target, scenario.servers, scenario.max_running)
        EventLoop(log, times, scenario.tpot_s, replica).run(requests)
    log.prefill_s.extend(map(times.seconds, log.cached_tokens, log.prompt_tokens))
    if scenario.max_running is None:
        log.ttft_s = _queue(log, scenario.servers)
    return log


def _queue(log: RequestLog, servers: int) -> array[float]:
    """Return the times to first token: waiting for a server, then the prefill."""
    free_at = [0.0] * servers
    found = array("d")
    for arrival, copied, prefill in zip(log.arrival_s, log.copy_s, log.prefill_s, strict=True):
        start = free_at[0]
        done = (arrival if arrival > start else start) + copied + prefill
        heapq.heapreplace(free_at, done)
        found.append(done - arrival)
    return found


@dataclass(slots=True)
class Asked:
    """One request on its way."""

    number: int
    request: TraceRequest
    asked_s: float
    """Time from which it waits: its timestamp, or the end of the session's last answer."""
    served: Served | None = None


@dataclass(slots=True, eq=False)
class Replica:
    """One cache with its queue. At most ``servers`` prompts are prefilled at the same time, and at
    most ``max_running`` requests are served."""

    target: Target
    servers: int = 1
    max_running: float = math.inf
    queue: deque[Asked] = field(default_factory=deque)
    prefilling: dict[int, Asked] = field(default_factory=dict)
    decoding: dict[int, Asked] = field(default_factory=dict)
    is_up: bool = True
    id: int = 0
    place: int = 0
    """Place in a fleet, which another replica has after this one has failed."""
    outbox: Outbox | None = None
    """Sender of its events, if its router follows them."""


class EventLoop:
    """Requests in order of time, on one replica, or on several in a fleet. A request waits for the
    last answer of its session and is then routed at once."""

    def __init__(
        self, log: RequestLog, times: PrefillTimes, tpot_s: float, replica: Replica | None = None
    ) -> None:
        self.log, self.times, self.tpot_s, self.replica = log, times, tpot_s, replica
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = self._num_requests = 0
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        """Sessions with a waiting or running request, and the requests that arrived meanwhile."""

    def route(self, asked: Asked, now: float) -> None:
        """Queue a request on a replica, and start that."""
        assert self.replica is not None
        self.replica.queue.append(asked)
        self.start(self.replica, now)

    def on_begun(self, replica: Replica, now: float) -> None:
        """Called when a prefill has begun."""

    def on_prefilled(self, asked: Asked, replica: Replica, now: float) -> None:
        """Called at the first token of a request."""

    def on_finished(self, asked: Asked, replica: Replica, now: float) -> None:
        """Called at the end of an answer."""

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

    def _ask(self, request: TraceRequest, now: float) -> None:
        self._num_requests += 1
        self.route(Asked(self._num_requests, request, now), now)

    def next_turn(self, session: Hashable, now: float) -> None:
        """Ask the next request of a session whose answer is complete, if it has one."""
        later = self._later[session]
        if later:
            request = later.popleft()
            self._ask(request, max(request.timestamp_s, now))
        else:
            del self._later[session]

    def start(self, replica: Replica, now: float) -> None:
        """Begin the prefills of a replica for which it has servers and memory."""
        while replica.queue and len(replica.prefilling) < replica.servers:
            if len(replica.prefilling) + len(replica.decoding) >= replica.max_running:
                return
            asked = replica.queue[0]
            began = perf_counter()
            served = replica.target.begin(asked.request)
            self.log.control_s += perf_counter() - began
            if served is None and (replica.prefilling or replica.decoding):
                return  # memory comes back when one of these finishes
            replica.queue.popleft()
            asked.served, replica.prefilling[asked.number] = served, asked
            cached = 0 if served is None else served.cached_len * self.log.unit
            seconds = self.times.seconds(cached, asked.request.num_tokens(self.log.unit))
            seconds += 0.0 if served is None else served.copy_s
            self.on_begun(replica, now)
            self.push(now + seconds, partial(self._prefilled, asked, replica))

    def _prefilled(self, asked: Asked, replica: Replica, now: float) -> None:
        if not replica.is_up:
            return
        began = perf_counter()
        if asked.served is not None:
            asked.served.prefilled()
        self.log.add(asked.request, asked.served, perf_counter() - began)
        self.log.ttft_s.append(now - asked.asked_s)
        del replica.prefilling[asked.number]
        replica.decoding[asked.number] = asked
        self.on_prefilled(asked, replica, now)
        decode_s = len(asked.request.output) * self.log.unit * self.tpot_s
        self.push(now + decode_s, partial(self._finished, asked, replica))
        self.start(replica, now)

    def _finished(self, asked: Asked, replica: Replica, now: float) -> None:
        if not replica.is_up:
            return
        began = perf_counter()
        if asked.served is not None:
            asked.served.finish(asked.request.output)
        self.log.control_s += perf_counter() - began
        del replica.decoding[asked.number]
        self.on_finished(asked, replica, now)
        self.next_turn(asked.request.session, now)
        self.start(replica, now)
