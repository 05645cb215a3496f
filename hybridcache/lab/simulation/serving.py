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
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np

from hybridcache.geometry.times import PrefillTimes, prefill_seconds
from hybridcache.lab.simulation.log import RequestLog
from hybridcache.lab.simulation.target import Served, Target
from hybridcache.lab.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Serving:
    """The machine around the cache."""

    times: PrefillTimes
    servers: int = 1
    """Prefills at the same time; all share one cache."""
    max_running: int | None = None
    """Number of requests that hold memory at the same time, or None to serve them in turn."""
    tpot_s: float = 0.02
    """Seconds per answer token, concurrent mode only."""

    def __post_init__(self) -> None:
        if self.servers < 1:
            raise ValueError(f"servers must be at least 1, got {self.servers}")
        if self.max_running is not None and self.max_running < 1:
            raise ValueError(f"max_running must be at least 1, got {self.max_running}")


def serve(
    target: Target, requests: Iterable[TraceRequest], unit: int, serving: Serving
) -> RequestLog:
    """Serve all of ``requests`` and return their log."""
    log = RequestLog(unit)
    if serving.max_running is None:
        _serve_in_turn(target, requests, log)
        log.ttft_s = _queue(log, serving)
    else:
        _Concurrent(target, unit, serving, serving.max_running, log).run(requests)
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


def _queue(log: RequestLog, serving: Serving) -> array[float]:
    """Return the time to first token of each request: waiting for a server, then its prefill.
    O(n log servers)."""
    free_at = [0.0] * serving.servers
    cached = np.frombuffer(log.cached_tokens, np.int64)
    lengths = np.frombuffer(log.prompt_tokens, np.int64)
    found = array("d")
    for arrival, copied, spent in zip(
        log.arrival_s, log.copy_s, prefill_seconds(serving.times, cached, lengths), strict=True
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
        self, target: Target, unit: int, serving: Serving, max_running: int, log: RequestLog
    ) -> None:
        self._target, self._unit, self._serving, self._log = target, unit, serving, log
        self._max_running = max_running
        # With when each could be asked.
        self._waiting: deque[tuple[TraceRequest, float]] = deque()
        # Sessions with a waiting or running request, and their requests that arrived meanwhile.
        self._later: dict[Hashable, deque[TraceRequest]] = {}
        self._events: list[tuple[float, int, _Kind, _Running]] = []
        self._num_events = 0
        self._num_running = 0
        self._free_servers = serving.servers

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
            spent = self._log.copy_s[place] + self._serving.times.seconds(cached, length)
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
            decode_s = len(running.request.output) * self._unit * self._serving.tpot_s
            self._push(now + decode_s, "finished", running)
        else:
            if served is not None:
                served.finish()
            self._num_running -= 1
            self._next_turn(running.request.session, now)
        self._log.control_s += perf_counter() - start
        self._start(now)
