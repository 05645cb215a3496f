"""Simulated serving of a trace: one request after the other.

Waiting times are computed afterwards from the prefill times (first come, first served).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Iterable, Sequence
from time import perf_counter

from hybridcache.lab.results.result import RequestRecord
from hybridcache.lab.runs.target import Served, Target
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.radix.api import Losses

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
        self.records: list[RequestRecord] | None = None
        """Records of requests without their times; None if they are not kept."""

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
        if self.records is not None:
            lost = None if served is None else served.losses
            main = Losses._fields[lost.index(max(lost))] if lost else "refused" * self.has_causes
            facts = str(request.session), request.timestamp_s, length, cached, 0.0, main
            self.records.append(RequestRecord(*facts, **getattr(served, "found", {})))

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
    log.records = [] if scenario.by_request else None
    times = scenario.prefill_times(scenario.geometry())
    for request in requests:
        start = perf_counter()
        served = target.begin(request)
        if served is not None:
            served.prefilled()
            served.finish(request.output)
        log.add(request, served, perf_counter() - start)
    log.prefill_s.extend(map(times.seconds, log.cached_tokens, log.prompt_tokens))
    log.ttft_s = _queue(log, scenario.servers)
    for number, one in enumerate(log.records or ()):
        log.records[number] = one._replace(ttft_s=log.ttft_s[number])  # type: ignore[index]
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
