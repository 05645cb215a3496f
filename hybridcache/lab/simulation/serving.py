"""Simulated serving of a trace: one request after the other, or concurrently.

In turn: every request is matched, prefilled, decoded and released before the next. Waiting times
are computed afterwards from the prefill times (first come, first served, over all servers). This is
the usual view of a cache, and the fast one.

Concurrent: events in order of time. A request waits for the last answer of its session, for a
server and for memory. It holds its lease from the start of its prefill to the end of its answer,
and publishes when its prefill is done. Entries held by other requests cannot be evicted, and
unpublished entries cannot be hit. The time to first token counts from the timestamp, or from the
end of the session's last answer if that was later.
"""

from __future__ import annotations

import heapq
from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import add
from time import perf_counter
from typing import Literal

import numpy as np

from hybridcache.api import Losses
from hybridcache.geometry.times import PrefillTimes, prefill_seconds
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.target import Served, Target
from hybridcache.lab.trace import TraceRequest


class RequestLog:
    """One entry a request, in the order in which they were begun. Tokens and seconds."""

    def __init__(self, unit: int, has_causes: bool = True) -> None:
        self.unit = unit
        self.has_causes = has_causes
        """False for rebuilt peers: they report neither losses nor missed tokens, also where no
        request fits."""
        self.arrival_s = array("d")
        self.prompt_tokens = array("q")
        self.cached_tokens = array("q")
        self.missed_tokens = 0
        """Further tokens of all requests that a checkpoint which was evicted would have saved."""
        self.sessions = array("i")
        """Number of the request's session, in the order of their first requests."""
        self.session_numbers: dict[Hashable, int] = {}
        """Number of each session, in the same order."""
        self.copy_s = array("d")
        """Seconds of copies from lower tiers."""
        self.ttft_s = array("d")
        self.num_bypassed = 0
        """Requests that could not hold memory at all, and were computed without the cache."""
        self._lost: list[list[int]] = []
        """Lost ids of each session by cause, in the order of ``Losses``, and last the tokens of
        bypassed requests."""
        self.control_s = 0.0
        """Spent in the cache's own code."""

    def add(self, request: TraceRequest, served: Served | None, control_s: float) -> int:
        """Record that a request has begun, and return its place."""
        unit = self.unit
        length = request.num_tokens(unit)
        place, session = len(self.sessions), self.session_numbers.get(request.session)
        if session is None:
            session = self.session_numbers[request.session] = len(self._lost)
            self._lost.append([0] * (len(Losses._fields) + 1))
        lost, cached, copy_s = self._lost[session], 0, 0.0
        if served is None:
            self.num_bypassed += 1
            lost[-1] += length
        else:
            cached, copy_s = served.cached_len * unit, served.copy_s
            missed_len = served.missed_len
            if missed_len is not None and missed_len > served.cached_len:
                self.missed_tokens += missed_len * unit - cached
            if served.losses is not None:
                lost[:-1] = map(add, lost, served.losses)
        self.arrival_s.append(request.timestamp_s)
        self.prompt_tokens.append(length)
        self.cached_tokens.append(cached)
        self.sessions.append(session)
        self.copy_s.append(copy_s)
        self.control_s += control_s
        return place

    @property
    def losses(self) -> Losses:
        """Lost tokens of all requests. O(requests)."""
        total = [sum(column) for column in zip(*self._lost, strict=True)]
        return self._by_cause(total, sum(self.prompt_tokens) - sum(self.cached_tokens))

    def losses_of(self, session: int, computed_tokens: int) -> Losses:
        """Return the ``computed_tokens`` of session number ``session`` by cause."""
        return self._by_cause(self._lost[session], computed_tokens)

    def _by_cause(self, lost: Sequence[int], computed_tokens: int) -> Losses:
        """Return tokens by cause. Those without another cause count as never seen: a prompt's last
        id may stand for less than a unit."""
        *ids, bypassed = lost or [0] * (len(Losses._fields) + 1)
        found = Losses(*(num_ids * self.unit for num_ids in ids))
        known = found._replace(never_seen=0, refused=found.refused + bypassed)
        return known._replace(never_seen=computed_tokens - sum(known))


def serve(
    target: Target, requests: Iterable[TraceRequest], unit: int, scenario: Scenario
) -> RequestLog:
    """Serve all of ``requests`` on the machine of ``scenario``, and return their log."""
    log = RequestLog(unit, has_causes=not scenario.baseline)
    times = scenario.prefill_times(scenario.geometry())
    if scenario.max_running is None:
        _serve_in_turn(target, requests, log)
        log.ttft_s = _queue(log, times, scenario.servers)
    else:
        _Concurrent(target, unit, times, scenario, log).run(requests)
    return log


def _serve_in_turn(target: Target, requests: Iterable[TraceRequest], log: RequestLog) -> None:
    begin, add = target.begin, log.add
    for request in requests:
        start = perf_counter()
        served = begin(request)
        if served is not None:
            served.prefilled()
            served.finish()
        add(request, served, perf_counter() - start)


def _queue(log: RequestLog, times: PrefillTimes, servers: int) -> array[float]:
    """Return the time to first token of each request: waiting for a server, then its prefill.
    O(n log servers)."""
    free_at = [0.0] * servers
    cached = np.frombuffer(log.cached_tokens, np.int64)
    lengths = np.frombuffer(log.prompt_tokens, np.int64)
    found = array("d")
    for arrival, copied, spent in zip(
        log.arrival_s, log.copy_s, prefill_seconds(times, cached, lengths), strict=True
    ):
        done = max(arrival, free_at[0]) + copied + spent
        heapq.heapreplace(free_at, done)
        found.append(done - arrival)
    return found


_Kind = Literal["prefilled", "finished"]


@dataclass(slots=True)
class _Running:
    number: int
    request: TraceRequest
    asked_s: float
    served: Served | None
    control_s: float = 0.0


class _Concurrent:
    """The event loop of the concurrent mode."""

    def __init__(
        self, target: Target, unit: int, times: PrefillTimes, scenario: Scenario, log: RequestLog
    ) -> None:
        self._target, self._unit, self._times, self._log = target, unit, times, log
        self._max_running, self._tpot_s = scenario.max_running or 1, scenario.tpot_s
        # With when each could be asked.
        self._waiting: deque[tuple[TraceRequest, float]] = deque()
        # Sessions with a waiting or running request, and their requests that arrived meanwhile.
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        self._events: list[tuple[float, int, _Kind, _Running]] = []
        self._num_events = 0
        self._num_running = 0
        self._free_servers = scenario.servers

    def run(self, requests: Iterable[TraceRequest]) -> None:
        for request in requests:
            while self._events and self._events[0][0] <= request.timestamp_s:
                self._next_event()
            if request.session in self._later:
                self._later[request.session].append(request)
                continue
            self._later[request.session] = deque()
            self._waiting.append((request, request.timestamp_s))
            self._start(request.timestamp_s)
        while self._events:
            self._next_event()

    def _start(self, now: float) -> None:
        while self._waiting and self._free_servers and self._num_running < self._max_running:
            request, asked_s = self._waiting[0]
            start = perf_counter()
            served = self._target.begin(request)
            if served is None and self._num_running:
                return  # memory comes back when one of the others finishes
            self._waiting.popleft()
            place = self._log.add(request, served, perf_counter() - start)
            self._log.ttft_s.append(0.0)
            running = _Running(place, request, asked_s, served)
            self._num_running += 1
            self._free_servers -= 1
            cached = self._log.cached_tokens[place]
            length = self._log.prompt_tokens[place]
            spent = self._log.copy_s[place] + self._times.seconds(cached, length)
            self._push(now + spent, "prefilled", running)

    def _next_turn(self, session: Hashable, now: float) -> None:
        later = self._later[session]
        if later:
            request = later.popleft()
            self._waiting.append((request, max(request.timestamp_s, now)))
        else:
            del self._later[session]

    def _push(self, when: float, kind: _Kind, running: _Running) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (when, self._num_events, kind, running))

    def _next_event(self) -> None:
        now, _, kind, running = heapq.heappop(self._events)
        start = perf_counter()
        served = running.served
        if kind == "prefilled":
            if served is not None:
                served.prefilled()
            self._log.ttft_s[running.number] = now - running.asked_s
            self._free_servers += 1
            decode_s = len(running.request.output) * self._unit * self._tpot_s
            self._push(now + decode_s, "finished", running)
        else:
            if served is not None:
                served.finish()
            self._num_running -= 1
            self._next_turn(running.request.session, now)
        self._log.control_s += perf_counter() - start
        self._start(now)
