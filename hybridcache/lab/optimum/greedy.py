"""Clairvoyant greedy: builds a plan hit by hit, with the most tokens saved per byte and step first.

The result is not a bound. On traces that can be searched exhaustively it is close to the optimum,
and it is quick on traces of many thousand requests.

A hit is one request resuming at one position. It needs its checkpoint and everything on the path,
kept since the position's last visit. If nothing is shared, densities only fall as the plan fills.
They are measured again when a hit comes to the top, so the order is exact up to sharing.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from hybridcache.lab.optimum.plan import (
    Interval,
    MemoryBudget,
    Plan,
    overlapping,
)
from hybridcache.lab.optimum.trie import VisitedTrie


class _Growing:
    """Plan under construction, with one bool array of kept intervals per position and the bytes in
    use per step."""

    def __init__(self, trie: VisitedTrie, budget: MemoryBudget) -> None:
        self.trie, self.budget = trie, budget
        self.visits = [np.asarray(position.visits) for position in trie.positions]
        self.lengths = [np.diff(visits) for visits in self.visits]
        self.kv = [np.zeros(len(lengths), dtype=bool) for lengths in self.lengths]
        self.checkpoints = [np.zeros(len(lengths), dtype=bool) for lengths in self.lengths]
        self.sizes = [
            trie.span(position) * budget.kv_bytes_per_token for position in trie.positions
        ]
        self.usage = np.zeros(trie.num_requests, dtype=np.int64)
        self.running = budget.running_bytes
        """Bytes of running requests, less the KV that they reuse; None if they are not counted."""
        self.hit_depth = np.zeros(trie.num_requests, dtype=np.int64)
        self.hits: dict[int, int] = {}
        self.ordinal_of = [
            dict(zip(path, ordinals, strict=True))
            for path, ordinals in zip(trie.paths, trie.ordinals, strict=True)
        ]

    def needs(self, request: int, index: int) -> set[Interval]:
        """Return the checkpoint intervals that must be added for ``request`` to resume at
        ``index``, its own first."""
        needed = self._state_since(index, self.ordinal_of[request][index] - 1)
        depth = self.trie.positions[index].depth
        for above in self.trie.paths[request]:
            position = self.trie.positions[above]
            if position.depth >= depth:
                break
            ordinal = self.ordinal_of[request][above]
            if (
                position.depth > self.hit_depth[request]
                and ordinal < position.num_intervals
                and self.checkpoints[above][ordinal]
            ):
                needed |= self._state_since(above, ordinal - 1)
        return needed

    def _state_since(self, index: int, interval: int) -> set[Interval]:
        """Return the intervals back to the last visit that computed the state at ``index``, without
        those already kept."""
        needed = set()
        depth = self.trie.positions[index].depth
        while not self.checkpoints[index][interval]:
            needed.add((index, interval))
            if self.hit_depth[self.visits[index][interval]] <= depth:
                break
            interval -= 1
        return needed

    def missing(self, states: set[Interval]) -> list[tuple[int, int, npt.NDArray[np.intp]]]:
        """Return (position, bytes, intervals) to add: the checkpoints and the KV above them."""
        added = [
            (index, self.budget.state_bytes, np.asarray([interval])) for index, interval in states
        ]
        spans: dict[int, tuple[int, int]] = {}
        for index, interval in states:
            start, end = (int(step) for step in self.visits[index][interval : interval + 2])
            above: int | None = index
            while above is not None:
                first, last = spans.get(above, (start, end))
                spans[above] = min(first, start), max(last, end)
                above = self.trie.positions[above].parent
        for index, (start, end) in spans.items():
            within = overlapping(self.trie.positions[index].visits, start, end)
            absent = np.flatnonzero(~self.kv[index][within.start : within.stop]) + within.start
            if len(absent):
                added.append((index, self.sizes[index], absent))
            elif len(states) == 1:
                break  # kept KV has all KV above it
        return added

    def cost(self, added: list[tuple[int, int, npt.NDArray[np.intp]]]) -> float:
        """Return bytes times steps."""
        return float(
            sum(size * int(self.lengths[index][which].sum()) for index, size, which in added)
        )

    def running_with(self, request: int, tokens: int) -> npt.NDArray[np.int64] | None:
        """Return ``running`` once ``request`` reuses that many more tokens."""
        if self.running is None or not self.running[request]:
            return self.running
        running = self.running.copy()
        running[request] -= tokens * self.budget.kv_bytes_per_token
        return running

    def fits(
        self,
        added: list[tuple[int, int, npt.NDArray[np.intp]]],
        running: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.int64] | None:
        """Return the usage with ``added`` in place, or None if it would exceed the capacity at any
        step."""
        change = np.zeros(self.trie.num_requests + 1, dtype=np.int64)
        for index, size, which in added:
            np.add.at(change, self.visits[index][which], size)
            np.add.at(change, self.visits[index][which + 1], -size)
        usage: npt.NDArray[np.int64] = self.usage + np.cumsum(change)[:-1]
        most = usage.max(initial=0)
        if running is not None:
            most = max(most, (usage[:-1] + running[1:]).max(initial=0))
        return usage if most <= self.budget.capacity_bytes else None

    def add(
        self,
        request: int,
        index: int,
        states: set[Interval],
        added: list[tuple[int, int, npt.NDArray[np.intp]]],
        usage: npt.NDArray[np.int64],
    ) -> None:
        for place, (at, _, which) in enumerate(added):
            (self.checkpoints if place < len(states) else self.kv)[at][which] = True
        self.usage = usage
        self.hits[request] = index
        self.hit_depth[request] = self.trie.positions[index].depth

    def plan(self) -> Plan:
        def kept(flags: list[npt.NDArray[np.bool_]]) -> set[Interval]:
            return {
                (index, int(interval))
                for index, kept in enumerate(flags)
                for interval in np.flatnonzero(kept)
            }

        return Plan(kept(self.kv), kept(self.checkpoints), self.hits)


def clairvoyant_greedy(trie: VisitedTrie, budget: MemoryBudget) -> Plan:
    """Build a plan by density: add hits until no remaining hit is worthwhile or fits.

    Of the O(requests x depth) candidates only those that come to the top are measured, each in
    O(depth + steps) in numpy.
    """
    growing = _Growing(trie, budget)

    def first_density(index: int, interval: int) -> float:
        """Return the density in an empty plan: everything above the position was also visited at
        both ends of the interval."""
        position = trie.positions[index]
        start, end = position.visits[interval : interval + 2]
        size = position.depth * budget.kv_bytes_per_token + budget.state_bytes
        return position.depth / float((end - start) * size)

    heap = [
        (-first_density(index, interval), request, index)
        for request in range(trie.num_requests)
        for index, interval in trie.usable(request)
    ]
    heapq.heapify(heap)
    while heap:
        _, request, index = heapq.heappop(heap)
        if trie.positions[index].depth <= growing.hit_depth[request]:
            continue
        states = growing.needs(request, index)
        added = growing.missing(states)
        gain = trie.positions[index].depth - int(growing.hit_depth[request])
        cost = growing.cost(added)
        now = gain / cost if cost else float("inf")
        if heap and now < -heap[0][0] * (1 - 1e-9):
            heapq.heappush(heap, (-now, request, index))
            continue
        running = growing.running_with(request, gain)
        usage = growing.fits(added, running)
        if usage is not None:
            growing.running = running
            growing.add(request, index, states, added, usage)
    return growing.plan()
