"""What a trace is like: lengths, ideal token hit rate, how soon prefixes come again, and how deep
prompts agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.trace import Trace, TraceRequest

_PERCENTILES = (5, 50, 95, 99)
_PAGES = (16, 64, 512)


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, percentiles and largest of some quantity."""

    mean: float
    percentiles: dict[int, float]
    largest: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        """Of ``values``; all 0 where there are none. O(n log n)."""
        if not values:
            return cls(0.0, dict.fromkeys(_PERCENTILES, 0.0), 0.0)
        array = np.asarray(values, dtype=np.float64)
        found = np.percentile(array, _PERCENTILES).tolist()
        return cls(
            float(array.mean()), dict(zip(_PERCENTILES, found, strict=True)), float(array.max())
        )


@dataclass(frozen=True, slots=True)
class DepthBin:
    """Prompt tokens at depths [start, end) and how many of them some earlier request had at the
    same place."""

    start: int
    end: int
    tokens: int
    seen: int


@dataclass(frozen=True, slots=True)
class TraceStats:
    """All in tokens, whatever the trace's unit."""

    name: str
    unit: int
    num_requests: int
    num_sessions: int
    num_namespaces: int
    num_bad: int
    duration_s: float
    prompt: Summary
    output: Summary
    prompt_tokens: int
    ideal_tokens: int
    """Prompt tokens an infinite cache of prompts and answers would skip; of each prompt all but the
    last at most."""
    ideal_by_page: dict[int, int]
    """The same where only whole pages of so many tokens can be reused, as in caches of hashed
    pages."""
    ideal_requests: int
    """Requests that could skip anything at all."""
    distinct_tokens: int
    """Tokens of all prompts and answers, shared ones once: what an infinite cache holds."""
    reuse_requests: Summary
    """Requests since the deepest shared prefix was last used, of requests that share one."""
    reuse_s: Summary
    """Seconds since."""
    reuse_new_tokens: Summary
    """New tokens that entered in between: about the cache size (in tokens of KV) at which LRU
    starts to hit."""
    sharing: tuple[DepthBin, ...]

    @property
    def ideal_hit_rate(self) -> float:
        """``ideal_tokens`` of ``prompt_tokens``; 0 without any."""
        return self.ideal_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"ideal_hit_rate": self.ideal_hit_rate}


def trace_stats(
    trace: Trace, *, progress: Callable[[TraceRequest], None] | None = None
) -> TraceStats:
    """Read all of ``trace`` once. O(tokens); memory: the distinct ids."""
    gathered = _Gathered(trace.unit)
    for request in trace:
        gathered.add(request)
        if progress:
            progress(request)
    return gathered.stats(trace)


class _Gathered:
    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.cache = InfiniteCache()
        self.sessions: set[Any] = set()
        self.namespaces: set[Any] = set()
        self.times: list[float] = []
        self.prompts: list[float] = []
        self.outputs: list[float] = []
        self.ideal: list[int] = []
        # Tokens the cache held right after each visit, to tell how much came between two.
        self.held_after: list[int] = []
        self.reuse: tuple[list[float], list[float], list[float]] = ([], [], [])

    def add(self, request: TraceRequest) -> None:
        unit = self.unit
        held_before = self.cache.num_ids
        seen = self.cache.serve(request)
        self.held_after.append(self.cache.num_ids)
        self.sessions.add(request.session)
        self.namespaces.add(request.namespace)
        self.times.append(request.timestamp_s)
        num_tokens = request.num_tokens(unit)
        self.prompts.append(num_tokens)
        self.outputs.append(request.num_answer_tokens(unit))
        self.ideal.append(min(seen.length * unit, num_tokens - 1))
        if seen.length and seen.last_visit is not None:
            visit = seen.last_visit - 1
            requests, seconds, tokens = self.reuse
            requests.append(len(self.times) - 1 - visit)
            seconds.append(request.timestamp_s - self.times[visit])
            tokens.append((held_before - self.held_after[visit]) * unit)

    def stats(self, trace: Trace) -> TraceStats:
        return TraceStats(
            name=trace.name,
            unit=self.unit,
            num_requests=len(self.times),
            num_sessions=len(self.sessions),
            num_namespaces=len(self.namespaces),
            num_bad=trace.bad.count,
            duration_s=self.times[-1] - self.times[0] if self.times else 0.0,
            prompt=Summary.of(self.prompts),
            output=Summary.of(self.outputs),
            prompt_tokens=int(sum(self.prompts)),
            ideal_tokens=sum(self.ideal),
            ideal_by_page={
                page: sum(ideal // page * page for ideal in self.ideal)
                for page in _PAGES
                if page % self.unit == 0
            },
            ideal_requests=sum(map(bool, self.ideal)),
            distinct_tokens=self.cache.num_ids * self.unit,
            reuse_requests=Summary.of(self.reuse[0]),
            reuse_s=Summary.of(self.reuse[1]),
            reuse_new_tokens=Summary.of(self.reuse[2]),
            sharing=self._sharing(),
        )

    def _sharing(self) -> tuple[DepthBin, ...]:
        """Bins double in width; the first is as wide as the unit, but at least 64."""
        lengths = np.asarray(self.prompts, dtype=np.int64)
        seen = np.asarray(self.ideal, dtype=np.int64)
        bins = []
        start, end = 0, max(64, self.unit)
        longest = int(lengths.max(initial=0))
        while start < longest:
            tokens = int((np.minimum(lengths, end) - start).clip(0).sum())
            shared = int((np.minimum(seen, end) - start).clip(0).sum())
            bins.append(DepthBin(start, end, tokens, shared))
            start, end = end, end * 2
        return tuple(bins)
