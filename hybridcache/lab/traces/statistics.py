"""Statistics of a trace: lengths, ideal token hit rate, time between uses, depth of sharing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from hybridcache.lab.traces.intervals import percentiles
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.trace import FreshIds, Tabular, Trace, TraceRequest, has_sessions
from hybridcache.radix.tokens import common_prefix_len

_PAGES = (16, 64, 512)
NO_ANSWERS = "no answer has ids: a later prompt that contains one finds the tokens before it alone"


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, percentiles and maximum of a quantity."""

    mean: float
    percentiles: dict[int, float]
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Summarise ``values``; all 0 if there are none. O(n log n)."""
        array = np.asarray(values or [0.0], dtype=np.float64)
        return cls(float(array.mean()), percentiles(array), float(array.max()))


@dataclass(frozen=True, slots=True)
class TraceStats(Tabular):
    """Statistics in tokens, for any unit of the trace."""

    name: str
    unit: int
    num_requests: int
    num_sessions: int
    """0 if no record names a session and no prompt continues another."""
    num_namespaces: int
    num_bad: int
    duration_s: float
    prompt: Summary
    output: Summary
    prompt_tokens: int
    ideal_tokens: int
    """Prompt tokens that an infinite cache of prompts and answers would skip: at most all but the
    last of each prompt."""
    ideal_by_page: dict[int, int]
    """The same for caches that reuse whole pages, by tokens of a page."""
    ideal_requests: int
    """Requests that could skip at least one token."""
    distinct_tokens: int
    """Tokens of all prompts and answers, shared ones counted once: the contents of an infinite
    cache."""
    reuse_new_tokens: Summary
    """New tokens since the last use of the deepest shared prefix, over requests that share one:
    about the cache size (in tokens of KV) at which LRU starts to hit."""
    counted_by: str = ""
    repeated_answers: float | None = None
    """Share of the tokens of answers that the next prompt of the session repeats, behind the whole
    prompt; None if no answer with known ids is followed by a prompt."""
    columns: str = ""
    times: str = ""
    """Unit of the times in the file, and the reason for it."""
    arrivals: str = ""
    """Arrivals that are drawn; empty if times are recorded or generated."""
    limits: str = ""
    """Sentence on reuse that the trace cannot show; empty if there is none."""

    @property
    def ideal_hit_rate(self) -> float:
        """``ideal_tokens`` of ``prompt_tokens``."""
        return self.ideal_tokens / self.prompt_tokens

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one flat dictionary, with columns such as ``prompt_mean`` and ``output_p95``."""
        row: dict[str, Any] = {"ideal_hit_rate": self.ideal_hit_rate}
        for name in (one.name for one in fields(self)):
            if isinstance(value := getattr(self, name), Summary):
                ranks = {f"p{rank}": of for rank, of in value.percentiles.items()}
                whole = {"mean": value.mean, **ranks, "largest": value.largest}
                row |= {f"{name}_{part}": of for part, of in whole.items()}
            elif isinstance(value, dict):
                row |= {f"{name}_{key}": of for key, of in value.items()}
            else:
                row[name] = value
        return [row]


def doubts(ideal_hit_rate: float) -> list[str]:
    """Return the sentence about an ideal hit rate that is printed as 0 or 100 %, as that of a file
    that is not read as it was meant; else none.

    >>> doubts(0.4)
    []
    """
    if 0 < (percent := round(100 * ideal_hit_rate, 1)) < 100:
        return []
    seen = "nearly all tokens of prompts repeat an earlier one: if they should not"
    seen = seen if percent else "no prompt begins as an earlier one: if some should"
    return [f"{seen}, compare the unit, columns and namespaces of `trace stats` with the file"]


def trace_stats(trace: Trace, *, progress: Callable[[int], None] | None = None) -> TraceStats:
    """Read ``trace`` once and return its statistics; ``progress`` takes the number of requests so
    far. O(tokens). ValueError if there is no request."""
    unit, cache = trace.unit, InfiniteCache()
    namespaces: set[Hashable] = set()
    last: dict[Hashable, TraceRequest] = {}  # of each session
    # Time, tokens of prompt and answer, ideal tokens, and ids in the cache after each request. The
    # difference of two of the last is the number added between them.
    visits: list[tuple[float, int, int, int, int]] = []
    reuse: list[int] = []  # New tokens since the last use of a shared prefix.
    # Ids of answers that a prompt of their session follows, and of those it repeats.
    num_answered = num_repeated = 0
    has_answer_ids = False  # True if any answer is more than a length.
    is_known = False  # The same of answers that no prompt of their session follows.
    for request in trace.in_order():
        held_before = cache.num_ids
        seen = cache.serve(request)
        namespaces.add(request.namespace)
        is_known |= bool(len(request.output)) and bool(request.output.min() < FreshIds.FLOOR)
        before = last.get(request.session)
        last[request.session] = request
        if before is not None:
            num_answered += len(before.output)
            if common_prefix_len(before.tokens, request.tokens) == len(before.tokens):
                follows = request.tokens[len(before.tokens) :]
                num_repeated += common_prefix_len(before.output, follows)
            if not has_answer_ids and len(before.output):
                has_answer_ids = bool(before.output.min() < FreshIds.FLOOR or num_repeated)
        now_s, num_tokens = request.timestamp_s, request.num_tokens(unit)
        if seen.length and seen.last_visit is not None:
            held_then = visits[seen.last_visit - 1][-1]
            reuse.append((held_before - held_then) * unit)
        answer, ideal = request.num_answer_tokens(unit), min(seen.length * unit, num_tokens - 1)
        visits.append((now_s, num_tokens, answer, ideal, cache.num_ids))
        if progress:
            progress(len(visits))
    if not visits:
        raise ValueError(f"{trace.full_name}: {trace.is_empty_because}")
    times, prompts, outputs, ideals, _ = zip(*visits, strict=True)
    return TraceStats(
        name=trace.name,
        unit=unit,
        num_requests=len(times),
        num_sessions=len(last) if has_sessions(last, len(times)) else 0,
        num_namespaces=len(namespaces),
        num_bad=trace.bad.count,
        duration_s=times[-1] - times[0],
        prompt=Summary.of(prompts),
        output=Summary.of(outputs),
        prompt_tokens=sum(prompts),
        ideal_tokens=sum(ideals),
        ideal_by_page={
            page: sum(one // page * page for one in ideals) for page in _PAGES if page % unit == 0
        },
        ideal_requests=sum(map(bool, ideals)),
        distinct_tokens=cache.num_ids * unit,
        reuse_new_tokens=Summary.of(reuse),
        counted_by=trace.counted_by,
        repeated_answers=num_repeated / num_answered if has_answer_ids else None,
        columns=trace.columns,
        times=trace.times,
        arrivals=trace.arrivals,
        limits=trace.limits or NO_ANSWERS * (not is_known and not has_answer_ids),
    )
