"""Arrivals of sessions, pauses between their turns, and the resulting order of requests."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from hybridcache.lab.traces.trace import TraceRequest


@dataclass(frozen=True, slots=True)
class Starts:
    """Arrivals of ``per_s`` sessions a second: ``poisson``, independent; ``bursts``, the same with
    ``size`` of them at once; ``fixed``, at equal distances."""

    kind: str
    per_s: float
    size: int = 1

    def times(self, rng: np.random.Generator) -> Iterator[float]:
        """Yield ascending start times in seconds, without end."""
        now = 0.0
        for number in count():
            if self.kind == "fixed":
                yield number / self.per_s
                continue
            now += float(rng.exponential(self.size / self.per_s))
            yield from [now] * self.size


@dataclass(frozen=True, slots=True)
class Pauses:
    """Time from one turn to the next of a session: writing the answer, then a pause of log-normal
    length."""

    median_s: float = 60.0
    spread: float = 1.0
    answer_tokens_per_s: float = 50.0

    def next(self, rng: np.random.Generator, num_answer_tokens: int) -> float:
        """Draw the seconds between an answer of this length and the next turn."""
        pause_s = num_answer_tokens / self.answer_tokens_per_s
        if self.median_s:
            pause_s = float(rng.lognormal(math.log(self.median_s), self.spread)) + pause_s
        return pause_s


def parse_starts(text: str) -> Starts:
    """Parse ``poisson:2`` or ``fixed:2`` (sessions a second), or ``bursts:2:32``."""
    kind, _, numbers = text.partition(":")
    rate_text, *sizes = numbers.split(":")
    try:
        rate, size = float(rate_text), {"poisson": 1, "fixed": 1, "bursts": 16}[kind]
        if sizes:
            [size] = map(int, sizes)
        if not 0 < rate < math.inf or size < 1 or (sizes and kind != "bursts"):
            raise ValueError(text)
    except (ValueError, KeyError):
        raise ValueError(
            f"arrivals {text!r} is not one of poisson, fixed, bursts with a rate above 0 after a "
            "colon"
        ) from None
    return Starts(kind, rate, size)


def interleave(
    sessions: Iterable[Sequence[TraceRequest]],
    starts: Starts,
    pauses: Pauses | None = None,
    *,
    unit: int = 1,
    seed: int = 0,
) -> Iterator[TraceRequest]:
    """Merge sessions by time: session k starts at the k-th start. Its turns follow after
    ``pauses``, or keep their distances. Ties go to the session that started first. O(log(open
    sessions)) a request; only open sessions are held."""
    rng = np.random.default_rng(seed)
    heap: list[tuple[float, int, int, Sequence[TraceRequest], list[float]]] = []

    def due(until: float) -> Iterator[TraceRequest]:
        while heap and heap[0][0] <= until:
            when, number, turn, session, times = heap[0]
            yield session[turn]._replace(timestamp_s=when)
            if turn + 1 < len(session):
                heapq.heapreplace(heap, (times[turn + 1], number, turn + 1, session, times))
            else:
                heapq.heappop(heap)

    for number, (session, start) in enumerate(zip(sessions, starts.times(rng), strict=False)):
        if not session:
            continue
        times, now = [], start
        for request in session:
            if pauses is None:
                now = start + (request.timestamp_s - session[0].timestamp_s)
            times.append(now)
            if pauses is not None:
                now += pauses.next(rng, len(request.output) * unit)
        yield from due(start)
        heapq.heappush(heap, (times[0], number, 0, session, times))
    yield from due(math.inf)
