"""Plan of a clairvoyant cache, with its verifier: intervals to keep, and positions to resume
from."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridcache.lab.optimum.trie import VisitedTrie

Interval = tuple[int, int]
"""(position, interval number): from the position's visit with that number to its next one."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that may be kept between two requests, and the sizes of entries.

    Without ``running_bytes``, memory held by the running request itself is not counted, so the
    optimum also bounds caches that do not count it.
    """

    capacity_bytes: int
    kv_bytes_per_token: int
    state_bytes: int
    running_bytes: npt.NDArray[np.int64] | None = None
    """Bytes that each request holds while it runs, if nothing of it is cached: int64[requests].
    Counted next to the entries kept since the request before; cached KV is counted once."""


@dataclass(slots=True)
class Plan:
    """KV segments and checkpoints to keep, and the position from which each request resumes (None
    for the start)."""

    kv: set[Interval] = field(default_factory=set)
    checkpoints: set[Interval] = field(default_factory=set)
    hits: dict[int, int] = field(default_factory=dict)

    def cached_lens(self, trie: VisitedTrie) -> npt.NDArray[np.int64]:
        """Return the tokens skipped by each request: int64[requests]."""
        lens = np.zeros(trie.num_requests, dtype=np.int64)
        for request, index in self.hits.items():
            lens[request] = trie.positions[index].depth
        return lens

    def usage(self, trie: VisitedTrie, budget: MemoryBudget) -> npt.NDArray[np.int64]:
        """Return the bytes kept on the device between request t and t + 1: int64[requests]."""
        change = np.zeros(trie.num_requests + 1, dtype=np.int64)
        for kept, is_kv in ((self.kv, True), (self.checkpoints, False)):
            for index, interval in kept:
                position = trie.positions[index]
                size = (
                    trie.span(position) * budget.kv_bytes_per_token if is_kv else budget.state_bytes
                )
                change[position.visits[interval]] += size
                change[position.visits[interval + 1]] -= size
        return np.cumsum(change)[:-1]

    def verify(self, trie: VisitedTrie, budget: MemoryBudget) -> None:
        """Check from scratch that a cache could execute the plan. Raises AssertionError naming the
        rule that is broken."""
        usage = self.usage(trie, budget)
        assert usage.max(initial=0) <= budget.capacity_bytes, "over capacity"
        if budget.running_bytes is not None:
            saved_bytes = self.cached_lens(trie) * budget.kv_bytes_per_token
            running = budget.running_bytes - saved_bytes
            running[budget.running_bytes == 0] = 0
            most = (usage[:-1] + running[1:]).max(initial=0)
            assert most <= budget.capacity_bytes, "over capacity while a request runs"
        for request, index in self.hits.items():
            path = trie.paths[request]
            where = path.index(index)
            assert trie.positions[index].depth < trie.prompt_lens[request], (
                "nothing left to compute"
            )
            assert (index, trie.ordinals[request][where] - 1) in self.checkpoints, "no checkpoint"
            for above, ordinal in zip(
                path[: where + 1], trie.ordinals[request][: where + 1], strict=True
            ):
                assert (above, ordinal - 1) in self.kv, "a hole in the KV"
        for index, interval in self.checkpoints:
            position = trie.positions[index]
            assert position.is_candidate, "a checkpoint off the grid"
            assert (index, interval) in self.kv, "a checkpoint without its KV"
            if (index, interval - 1) not in self.checkpoints:
                hit = self.hits.get(position.visits[interval])
                assert hit is None or trie.positions[hit].depth < position.depth, (
                    "a checkpoint of a state nobody computed"
                )
        for index, interval in self.kv:
            position = trie.positions[index]
            if position.parent is None:
                continue
            parent = trie.positions[position.parent]
            for overlap in overlapping(
                parent.visits, position.visits[interval], position.visits[interval + 1]
            ):
                assert (parent.index, overlap) in self.kv, "KV without its parent's"


def overlapping(visits: list[int], start: int, end: int) -> range:
    """Return the intervals of ``visits`` that overlap (start, end], both visits themselves. O(log
    n)."""
    return range(bisect_left(visits, start), bisect_left(visits, end))
