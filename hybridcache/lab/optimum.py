"""Best plan with hindsight over KV segments and checkpoints, and the bound of an infinite cache.

A trie of the positions of a trace where keeping entries could be useful, a greedy search that
builds a plan on it, and a verifier of plans.
"""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Position:
    """One node of the trie."""

    depth: int
    parent: int | None
    """Number of the position above; None at the top."""
    visits: list[int]
    """Request numbers, ascending."""
    is_candidate: bool
    """True if a checkpoint may be saved here: its depth is on the grid."""


@dataclass(frozen=True, slots=True)
class VisitedTrie:
    """Positions and the paths of requests through them."""

    positions: list[Position]
    """By number. Parents come first."""
    paths: list[dict[int, int]]
    """Positions that each request visits, top down, with the number of that visit among those of
    the position."""
    prompt_lens: list[int]
    """Length of each request's prompt in tokens."""

    def span(self, position: Position) -> int:
        """Return the tokens of the segment that ends at ``position``."""
        above = 0 if position.parent is None else self.positions[position.parent].depth
        return position.depth - above

    def usable(self, request: int) -> Iterator[Interval]:
        """Yield (position, interval) from which ``request`` could resume, top down: candidates
        visited before, at most one token short of its prompt."""
        for index, visit in self.paths[request].items():
            position = self.positions[index]
            if visit and position.is_candidate and position.depth < self.prompt_lens[request]:
                yield index, visit - 1


def _cut(node: PrefixNode, depth: int) -> None:
    """Ensure that a node exists at ``depth`` on the path from the root to ``node``."""
    for above in node.path():
        assert above.parent is not None, "a path leaves out the root"
        if above.parent.depth < depth:
            if depth < above.depth:
                split(above, depth)
            return


def build_trie(requests: Iterable[TraceRequest], *, grid: int = 1) -> VisitedTrie:
    """Read a trace into its visited positions. O(tokens).

    Checkpoints may be at the deepest position that a set of requests shares (branch points, ends,
    prompt ends, floored to ``grid``). This loses nothing but the option to keep part of a segment.
    """
    roots: dict[object, PrefixNode] = {}
    ends: list[PrefixNode] = []
    lens: list[int] = []
    for request in requests:
        sequence = np.concatenate((request.tokens, request.output)).astype(np.int32, copy=False)
        root = roots.setdefault(request.namespace, new_root())
        ends.append(grow(*walk(root, sequence), sequence)[0])
        lens.append(len(request.tokens))
    _cut_candidates(roots.values(), ends, lens, grid)
    chains = [[*end.path()][::-1] for end in ends]
    visits: dict[PrefixNode, list[int]] = {}
    for request_number, chain in enumerate(chains):
        for node in chain:
            visits.setdefault(node, []).append(request_number)
    positions: list[Position] = []
    numbers: dict[PrefixNode, int] = {}
    paths: list[dict[int, int]] = []
    for request_number, chain in enumerate(chains):
        path, above = dict[int, int](), None
        for node in chain:
            found = visits[node]
            if len(found) < 2:
                break
            if node not in numbers:
                numbers[node] = len(positions)
                positions.append(Position(node.depth, above, found, node.depth % grid == 0))
            above = numbers[node]
            path[above] = bisect_left(found, request_number)
        paths.append(path)
    return VisitedTrie(positions, paths, lens)


def _cut_candidates(
    roots: Iterable[PrefixNode], ends: list[PrefixNode], lens: list[int], grid: int
) -> None:
    """Insert a node at every depth where a checkpoint could be useful. These are the grid positions
    at or above each branch point and each end, and at or above the last position from which each
    prompt may resume."""
    below = [*roots]
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


# --- Plan and its verifier ------------------------------------------------------------------------

Interval = tuple[int, int]
"""(position, interval number): from the position's visit with that number to its next one."""
Entries = tuple[int, int, npt.NDArray[np.intp]]
"""(position, bytes of one, interval numbers) of KV segments or checkpoints."""


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


def overlapping(visits: list[int], start: int, end: int) -> range:
    """Return the intervals of ``visits`` that overlap (start, end], both visits themselves. O(log
    n)."""
    return range(bisect_left(visits, start), bisect_left(visits, end))


class Plan:
    """KV segments and checkpoints to keep, and the position from which each request resumes. It is
    built hit by hit."""

    def __init__(self, trie: VisitedTrie, budget: MemoryBudget) -> None:
        num_requests = len(trie.paths)
        self.trie, self.budget = trie, budget
        self.visits = [np.asarray(position.visits) for position in trie.positions]
        self.lengths = [np.diff(visits) for visits in self.visits]
        """Steps of each interval of a position."""
        self.kv = [np.zeros(len(lengths), dtype=bool) for lengths in self.lengths]
        """True for each interval over which the segment of a position is kept."""
        self.checkpoints = [np.zeros(len(lengths), dtype=bool) for lengths in self.lengths]
        self.sizes = [
            trie.span(position) * budget.kv_bytes_per_token for position in trie.positions
        ]
        self.usage = np.zeros(num_requests, dtype=np.int64)
        """Bytes kept on the device between request t and t + 1."""
        self.running = budget.running_bytes
        """Bytes of running requests, less the KV that they reuse; None if they are not counted."""
        self.cached_lens = np.zeros(num_requests, dtype=np.int64)
        """Tokens skipped by each request."""
        self.hits: dict[int, int] = {}
        """Position from which each request resumes, if it does."""

    def needs(self, request: int, index: int) -> set[Interval]:
        """Return the checkpoint intervals that must be added for ``request`` to resume at
        ``index``, its own first."""
        needed = self._state_since(index, self.trie.paths[request][index] - 1)
        depth = self.trie.positions[index].depth
        for above, visit in self.trie.paths[request].items():
            position = self.trie.positions[above]
            if position.depth >= depth:
                break
            is_last = visit == len(position.visits) - 1
            is_computed = position.depth > self.cached_lens[request]
            if is_computed and not is_last and self.checkpoints[above][visit]:
                needed |= self._state_since(above, visit - 1)
        return needed

    def _state_since(self, index: int, interval: int) -> set[Interval]:
        """Return the intervals back to the last visit that computed the state at ``index``, without
        those already kept."""
        needed = set()
        depth = self.trie.positions[index].depth
        while not self.checkpoints[index][interval]:
            needed.add((index, interval))
            if self.cached_lens[self.visits[index][interval]] <= depth:
                break
            interval -= 1
        return needed

    def missing(self, states: set[Interval]) -> list[Entries]:
        """Return the entries to add: the checkpoints and the KV above them."""
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

    def bytes_of(self, entries: Iterable[Entries]) -> npt.NDArray[np.int64]:
        """Return the bytes of ``entries`` between request t and t + 1: int64[requests]."""
        change = np.zeros(len(self.usage) + 1, dtype=np.int64)
        for index, size, which in entries:
            np.add.at(change, self.visits[index][which], size)
            np.add.at(change, self.visits[index][which + 1], -size)
        usage: npt.NDArray[np.int64] = np.cumsum(change)[:-1]
        return usage

    def fits(self, usage: npt.NDArray[np.int64], running: npt.NDArray[np.int64] | None) -> bool:
        """Return whether kept entries, and running requests, stay within the capacity."""
        most = usage.max(initial=0)
        if running is not None:
            most = max(most, (usage[:-1] + running[1:]).max(initial=0))
        return bool(most <= self.budget.capacity_bytes)

    def verify(self) -> None:
        """Check from scratch that a cache could execute the plan. Raises AssertionError naming the
        rule that is broken."""
        trie, budget, positions = self.trie, self.budget, self.trie.positions
        of_kv = [
            (at, size, np.flatnonzero(kept))
            for at, (size, kept) in enumerate(zip(self.sizes, self.kv, strict=True))
        ]
        of_states = [
            (at, budget.state_bytes, np.flatnonzero(kept))
            for at, kept in enumerate(self.checkpoints)
        ]
        kv, states = (
            {(at, int(interval)) for at, _, which in entries for interval in which}
            for entries in (of_kv, of_states)
        )
        running = budget.running_bytes
        if running is not None:
            reused = self.cached_lens * budget.kv_bytes_per_token
            running = np.where(running == 0, 0, running - reused)
        assert self.fits(self.bytes_of([*of_kv, *of_states]), running), "over capacity"
        for request, index in self.hits.items():
            depth, path = positions[index].depth, trie.paths[request]
            assert self.cached_lens[request] == depth, "another length than the hit's"
            assert depth < trie.prompt_lens[request], "nothing left to compute"
            assert (index, path[index] - 1) in states, "no checkpoint"
            for above, visit in path.items():
                is_above = positions[above].depth <= depth
                assert not is_above or (above, visit - 1) in kv, "a hole in the KV"
        for index, interval in states:
            position = positions[index]
            assert position.is_candidate, "a checkpoint off the grid"
            assert (index, interval) in kv, "a checkpoint without its KV"
            if (index, interval - 1) not in states:
                hit = self.hits.get(position.visits[interval])
                assert hit is None or positions[hit].depth < position.depth, (
                    "a checkpoint of a state nobody computed"
                )
        for index, interval in kv:
            position = positions[index]
            if position.parent is None:
                continue
            start, end = position.visits[interval : interval + 2]
            for overlap in overlapping(positions[position.parent].visits, start, end):
                assert (position.parent, overlap) in kv, "KV without its parent's"


# --- Greedy search --------------------------------------------------------------------------------
#
# The plan is built hit by hit, with the most tokens saved per byte and step first. The result is
# not a bound. On traces that can be searched exhaustively it is close to the optimum, and it is
# quick on traces of many thousand requests.
#
# A hit is one request resuming at one position. It needs its checkpoint and everything on the path,
# kept since the position's last visit. If nothing is shared, densities only fall as the plan fills.
# They are measured again when a hit comes to the top, so the order is exact up to sharing.


def clairvoyant_greedy(trie: VisitedTrie, budget: MemoryBudget) -> Plan:
    """Build a plan by density: add hits until no remaining hit is worthwhile or fits.

    Of the O(requests x depth) candidates only those that come to the top are measured, each in
    O(depth + steps) in numpy.
    """
    plan = Plan(trie, budget)

    def first_density(index: int, interval: int) -> float:
        """Return the density in an empty plan: everything above the position was also visited at
        both ends of the interval."""
        position = trie.positions[index]
        start, end = position.visits[interval : interval + 2]
        size = position.depth * budget.kv_bytes_per_token + budget.state_bytes
        return position.depth / float((end - start) * size)

    heap = [
        (-first_density(index, interval), request, index)
        for request in range(len(trie.paths))
        for index, interval in trie.usable(request)
    ]
    heapq.heapify(heap)
    while heap:
        _, request, index = heapq.heappop(heap)
        if trie.positions[index].depth <= plan.cached_lens[request]:
            continue
        states = plan.needs(request, index)
        added = plan.missing(states)
        gain = trie.positions[index].depth - int(plan.cached_lens[request])
        cost = float(sum(size * int(plan.lengths[at][which].sum()) for at, size, which in added))
        now = gain / cost if cost else float("inf")
        if heap and now < -heap[0][0] * (1 - 1e-9):
            heapq.heappush(heap, (-now, request, index))
            continue
        running, usage = plan.running, plan.usage + plan.bytes_of(added)
        if running is not None and running[request]:
            running = running.copy()
            running[request] -= gain * budget.kv_bytes_per_token
        if plan.fits(usage, running):
            plan.running, plan.usage = running, usage
            for place, (at, _, which) in enumerate(added):  # the checkpoints come first
                (plan.checkpoints if place < len(states) else plan.kv)[at][which] = True
            plan.hits[request] = index
            plan.cached_lens[request] = trie.positions[index].depth
    return plan


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
    plan.verify()
    infinite = InfiniteCache()
    bound_tokens = sum(infinite.ideal_tokens(request, trace.unit) for request in requests)
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in requests)
    cached = plan.cached_lens * trace.unit
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
