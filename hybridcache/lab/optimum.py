"""Best plan with hindsight over KV segments and checkpoints, and the bound of an infinite cache.

A trie of the positions of a trace where keeping entries could be useful, a greedy search that
builds a plan on it, and a verifier of plans.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.model import ModelGeometry
from hybridcache.lab.prefix_tree import InfiniteCache, PrefixNode, grow, new_root, split, walk
from hybridcache.lab.simulation.sizes import budget_bytes
from hybridcache.lab.trace import Trace, TraceRequest

# --- Trie -----------------------------------------------------------------------------------------
#
# A *position* is a node of the static trie over all sequences (prompt + output) of the trace: a
# branch point, or a candidate for a checkpoint. The time between two of its consecutive visits is
# one *interval*: keeping its KV segment or its checkpoint over that interval is one decision.
# Positions that only one request visits can never be reused and are left out.


@dataclass(slots=True)
class Position:
    """One node of the trie. ``visits`` are request numbers, ascending; ``parent`` is None at the
    top."""

    index: int
    depth: int
    parent: int | None
    visits: list[int]
    is_candidate: bool
    """True if a checkpoint may be saved here: its depth is on the grid."""


@dataclass(frozen=True, slots=True)
class VisitedTrie:
    """Positions and the paths of requests through them.

    In ``positions``, parents come first. ``paths[r]`` lists the positions that request r visits,
    top down. ``ordinals[r][i]`` is the index of that visit among the visits of ``paths[r][i]``.
    ``prompt_lens[r]`` is the length of its prompt in tokens.
    """

    positions: list[Position]
    paths: list[list[int]]
    ordinals: list[list[int]]
    prompt_lens: list[int]

    @property
    def num_requests(self) -> int:
        return len(self.paths)

    def span(self, position: Position) -> int:
        """Return the tokens of the segment that ends at ``position``."""
        above = 0 if position.parent is None else self.positions[position.parent].depth
        return position.depth - above

    def usable(self, request: int) -> list[tuple[int, int]]:
        """Return (position, interval) from which ``request`` could resume, top down: candidates
        visited before, at most one token short of its prompt."""
        limit = self.prompt_lens[request] - 1
        return [
            (index, ordinal - 1)
            for index, ordinal in zip(self.paths[request], self.ordinals[request], strict=True)
            if ordinal > 0
            and self.positions[index].is_candidate
            and self.positions[index].depth <= limit
        ]


def _cut(node: PrefixNode, depth: int) -> None:
    """Ensure that a node exists at ``depth`` on the path from the root to ``node``."""
    for above in node.path():
        assert above.parent is not None, "a path leaves out the root"
        if above.parent.depth < depth:
            if depth < above.depth:
                split(above, depth)
            return


def _cut_candidates(root: PrefixNode, ends: list[PrefixNode], lens: list[int], grid: int) -> None:
    """Insert a node at every depth where a checkpoint could be useful. These are the grid positions
    at or above each branch point and each end, and at or above the last position from which each
    prompt may resume."""
    below = [root]
    branch_points = []
    while below:
        node = below.pop()
        below.extend(node.children.values())
        if len(node.children) > 1:
            branch_points.append(node)
    for node in branch_points + ends:
        _cut(node, node.depth // grid * grid)
    for node, prompt_len in zip(ends, lens, strict=True):
        _cut(node, (prompt_len - 1) // grid * grid)


def build_trie(requests: Iterable[TraceRequest], *, grid: int = 1) -> VisitedTrie:
    """Read a trace into its visited positions. O(tokens).

    Checkpoints may be at the deepest position that a set of requests shares (branch points, ends,
    prompt ends, floored to ``grid``). This loses nothing but the option to keep part of a segment.
    """
    roots: dict[object, PrefixNode] = {}
    ends: list[PrefixNode] = []
    owners: list[PrefixNode] = []
    lens: list[int] = []
    for request in requests:
        sequence = np.concatenate((request.tokens, request.output)).astype(np.int32, copy=False)
        root = roots.setdefault(request.namespace, new_root())
        ends.append(grow(*walk(root, sequence), sequence)[0])
        owners.append(root)
        lens.append(len(request.tokens))
    for root in roots.values():
        mine = [number for number, owner in enumerate(owners) if owner is root]
        _cut_candidates(root, [ends[n] for n in mine], [lens[n] for n in mine], grid)
    return _number(ends, lens, grid)


def _number(ends: Sequence[PrefixNode], lens: list[int], grid: int) -> VisitedTrie:
    chains: list[list[PrefixNode]] = []
    visits: dict[int, list[int]] = {}
    for request, end in enumerate(ends):
        chain = [*end.path()][::-1]
        for node in chain:
            visits.setdefault(id(node), []).append(request)
        chains.append(chain)
    positions: list[Position] = []
    numbers: dict[int, int] = {}
    paths: list[list[int]] = []
    ordinals: list[list[int]] = []
    seen: list[int] = []
    for chain in chains:
        path: list[int] = []
        for node in chain:
            if len(visits[id(node)]) < 2:
                break
            index = numbers.get(id(node))
            if index is None:
                index = numbers[id(node)] = len(positions)
                parent = path[-1] if path else None
                positions.append(
                    Position(index, node.depth, parent, visits[id(node)], node.depth % grid == 0)
                )
                seen.append(0)
            path.append(index)
        paths.append(path)
        ordinals.append([seen[index] for index in path])
        for index in path:
            seen[index] += 1
    return VisitedTrie(positions, paths, ordinals, lens)


# --- Plan and its verifier ------------------------------------------------------------------------

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


# --- Greedy search --------------------------------------------------------------------------------
#
# The plan is built hit by hit, with the most tokens saved per byte and step first. The result is
# not a bound. On traces that can be searched exhaustively it is close to the optimum, and it is
# quick on traces of many thousand requests.
#
# A hit is one request resuming at one position. It needs its checkpoint and everything on the path,
# kept since the position's last visit. If nothing is shared, densities only fall as the plan fills.
# They are measured again when a hit comes to the top, so the order is exact up to sharing.


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
                and ordinal < len(position.visits) - 1
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
        lengths = growing.lengths  # of intervals, in steps
        cost = float(sum(size * int(lengths[at][which].sum()) for at, size, which in added))
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


# --- A trace and a budget -------------------------------------------------------------------------


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
    geometry: ModelGeometry,
    gib: float,
    *,
    grid: int = 1,
    counts_running: bool = False,
) -> Optimum:
    """Build a plan of contents of the cache and positions of checkpoints, with hindsight.

    ``grid`` is in tokens. ``counts_running``: the running request's KV and state take memory too,
    as in every cache of this project. A request that the memory cannot hold counts nothing.

    Raises ValueError for a grid that does not fit the trace's unit and for a trace without a
    request.

    >>> from hybridcache.lab.generators import resend
    >>> best = best_plan(resend().head(60), ModelGeometry.preset("qwen3-next"), 2.0)
    >>> 0 < best.reached <= best.bound < 1
    True
    """
    if grid % trace.unit and trace.unit % grid:
        raise ValueError(
            f"the grid ({grid}) must divide or be divided by the trace's unit ({trace.unit})"
        )
    began = time.perf_counter()
    requests = list(trace)
    if not requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    trie = build_trie(requests, grid=max(1, grid // trace.unit))
    capacity_bytes = budget_bytes(gib)
    kv_bytes, state_bytes = geometry.kv_bytes_per_token * trace.unit, geometry.state_bytes
    running_bytes = None
    if counts_running:
        lens = [len(request.tokens) + len(request.output) for request in requests]
        running_bytes = np.asarray(lens, dtype=np.int64) * kv_bytes + state_bytes
        running_bytes[running_bytes > capacity_bytes] = 0
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
        gib=gib,
        num_requests=len(requests),
        prompt_tokens=prompt_tokens,
        reached=float(cached.sum()) / prompt_tokens,
        bound=bound_tokens / prompt_tokens,
        cached_tokens=cached,
        wall_s=time.perf_counter() - began,
        recipe=trace.full_name,
    )
