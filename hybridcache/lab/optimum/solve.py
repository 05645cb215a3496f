"""A plan with hindsight for a trace and a budget, and the bound that it is compared with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.units import GIB
from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.optimum.greedy import clairvoyant_greedy
from hybridcache.lab.optimum.plan import MemoryBudget
from hybridcache.lab.optimum.trie import build_trie
from hybridcache.lab.trace import Trace, TraceRequest


@dataclass(frozen=True, slots=True)
class Optimum:
    """Plan with hindsight for one trace and one budget, verified from scratch.

    The optimum is at least ``reached`` and at most ``bound``.
    """

    trace: str
    """Name of the trace."""
    capacity_bytes: int
    """Memory for KV and states."""
    gib: float
    """Memory as it was asked for, GiB."""
    num_requests: int
    """Number of requests."""
    prompt_tokens: int
    """Tokens of all prompts."""
    reached: float
    """Token hit rate of the plan, 0 to 1."""
    bound: float
    """Token hit rate of an infinite token-granular cache, which no plan exceeds."""
    cached_tokens: npt.NDArray[np.int64]
    """Tokens that each request skips under the plan: int64[requests]."""
    wall_s: float
    """Seconds of the computation."""
    recipe: str
    """Trace as ``open_trace`` takes it, options and seed included."""

    @property
    def gap(self) -> float:
        """(bound - reached) / bound."""
        return (self.bound - self.reached) / self.bound if self.bound else 0.0

    def record(self) -> dict[str, object]:
        """Return a record for a JSON line: the trace's recipe, ``gib``, and all fields except the
        tokens that each request skips."""
        names = ("capacity_bytes", "gib", "num_requests", "prompt_tokens")
        rates = ("reached", "bound", "gap", "wall_s")
        return {"trace": self.recipe} | {name: getattr(self, name) for name in (*names, *rates)}


def best_plan(
    trace: Trace,
    *,
    capacity_bytes: int,
    kv_bytes_per_token: int,
    state_bytes: int,
    grid: int = 1,
    counts_running: bool = False,
) -> Optimum:
    """Build a plan of contents of the cache and positions of checkpoints, with hindsight.

    ``grid`` is in tokens. ``counts_running``: the running request's KV and state take memory too,
    as in every cache of this project. A request that the memory cannot hold counts nothing.

    Raises ValueError for a budget or a grid that is not positive and for a trace without a request.

    >>> from hybridcache.lab.generators import resend
    >>> best = best_plan(resend().head(60), capacity_bytes=2 << 30, kv_bytes_per_token=24576,
    ...                  state_bytes=77_266_944)
    >>> 0 < best.reached <= best.bound < 1
    True
    """
    if capacity_bytes <= 0 or kv_bytes_per_token <= 0 or grid < 1:
        raise ValueError(
            "the optimum needs a positive capacity, positive bytes per token and a positive grid"
        )
    if grid % trace.unit and trace.unit % grid:
        raise ValueError(
            f"the grid ({grid}) must divide or be divided by the trace's unit ({trace.unit})"
        )
    began = time.perf_counter()
    requests = list(trace)
    if not requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    trie = build_trie(requests, grid=max(1, grid // trace.unit))
    kv_bytes = kv_bytes_per_token * trace.unit
    running = _running_bytes(requests, capacity_bytes, kv_bytes, state_bytes)
    running_bytes = running if counts_running else None
    budget = MemoryBudget(capacity_bytes, kv_bytes, state_bytes, running_bytes)
    plan = clairvoyant_greedy(trie, budget)
    plan.verify(trie, budget)
    infinite = InfiniteCache()
    bound_tokens = sum(infinite.ideal_tokens(request, trace.unit) for request in requests)
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in requests)
    cached = plan.cached_lens(trie) * trace.unit
    return Optimum(
        trace=trace.name,
        capacity_bytes=capacity_bytes,
        gib=capacity_bytes / GIB,
        num_requests=len(requests),
        prompt_tokens=prompt_tokens,
        reached=float(cached.sum()) / prompt_tokens,
        bound=bound_tokens / prompt_tokens,
        cached_tokens=cached,
        wall_s=time.perf_counter() - began,
        recipe=trace.full_name,
    )


def _running_bytes(
    requests: Sequence[TraceRequest], capacity_bytes: int, kv_bytes: int, state_bytes: int
) -> npt.NDArray[np.int64]:
    """Return the bytes of each request while it runs; 0 for one that is larger than the memory."""
    tokens = [len(request.tokens) + len(request.output) for request in requests]
    found = np.asarray(tokens, dtype=np.int64) * kv_bytes + state_bytes
    found[found > capacity_bytes] = 0
    return found
