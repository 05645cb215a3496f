"""Best plan with hindsight over KV segments and checkpoints, and an upper bound for every cache.

A trie of the positions of a trace where keeping entries could be useful, a greedy search that
builds a plan on it, a verifier of plans, and a relaxation whose value no cache exceeds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.model import ModelGeometry
from hybridcache.lab.traces.prefix_tree import PrefixNode, grow, new_root, nodes, split, walk
from hybridcache.lab.traces.sizes import budget_bytes
from hybridcache.lab.traces.trace import Trace, TraceRequest

# --- Trie -----------------------------------------------------------------------------------------
#
# A *position* is a node of the static trie over all sequences (prompt + output) of the trace: a
# branch point, or a candidate for a checkpoint. The time between two of its consecutive visits is
# one *interval*: keeping its KV segment or its checkpoint over that interval is one decision.
# Positions that only one request visits can never be reused and are left out.


@dataclass(slots=True, eq=False)
class Position:
    """One node of the trie, and what a plan keeps there, by interval."""

    depth: int
    parent: Position | None
    visits: npt.NDArray[np.intp]
    is_candidate: bool
    """True if a checkpoint may be saved here: its depth is on the grid."""
    kv: npt.NDArray[np.bool_] = field(init=False)
    """True for each interval over which the segment that ends here is kept."""
    checkpoints: npt.NDArray[np.bool_] = field(init=False)
    """True for each interval over which a checkpoint is kept."""

    def __post_init__(self) -> None:
        self.kv, self.checkpoints = np.zeros((2, len(self.visits) - 1), dtype=bool)

    @property
    def span(self) -> int:
        """Tokens of the segment that ends here."""
        return self.depth - (self.parent.depth if self.parent else 0)

    def overlapping(self, start: int, end: int) -> slice:
        """Return the intervals that overlap (start, end], both visits of it. O(log n)."""
        first, last = np.searchsorted(self.visits, (start, end)).tolist()
        return slice(first, last)


@dataclass(frozen=True, slots=True)
class VisitedTrie:
    """Positions and the paths of requests through them."""

    positions: list[Position]
    paths: list[dict[Position, int]]
    """Positions that each request visits, top down, with the number of that visit among those of
    the position."""
    prompt_lens: list[int]

    def usable(self, request: int) -> Iterator[Interval]:
        """Yield (position, interval) from which ``request`` could resume, top down."""
        for position, visit in self.paths[request].items():
            if visit and position.is_candidate and position.depth < self.prompt_lens[request]:
                yield position, visit - 1


def _cut(node: PrefixNode, depth: int) -> None:
    """Ensure that a node exists at ``depth`` on the path from the root to ``node``."""
    for above in node.path():
        assert above.parent is not None, "a path leaves out the root"
        if above.parent.depth < depth:
            if depth < above.depth:
                split(above, depth)
            return


def build_trie(requests: Iterable[TraceRequest], *, grid: int = 1) -> VisitedTrie:
    """Read a trace into its visited positions. O(tokens). Checkpoints may be at the deepest
    position that a set of requests shares, which loses nothing but the option to keep part of a
    segment."""
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
    positions: dict[PrefixNode, Position] = {}
    paths: list[dict[Position, int]] = []
    for request_number, chain in enumerate(chains):
        path, above = dict[Position, int](), None
        for node in chain:
            found = visits[node]
            if len(found) < 2:
                break
            if node not in positions:
                is_candidate = node.depth % grid == 0
                positions[node] = Position(node.depth, above, np.asarray(found), is_candidate)
            above = positions[node]
            path[above] = bisect_left(found, request_number)
        paths.append(path)
    return VisitedTrie([*positions.values()], paths, lens)


def _cut_candidates(
    roots: Iterable[PrefixNode], ends: list[PrefixNode], lens: list[int], grid: int
) -> None:
    """Insert a node at every depth where a checkpoint could be useful. These are the grid positions
    at or above each branch point and each end, and at or above the last position from which each
    prompt may resume."""
    branch_points = [one for root in roots for one in nodes(root) if len(one.children) > 1]
    for node in branch_points + ends:
        _cut(node, node.depth // grid * grid)
    for node, prompt_len in zip(ends, lens, strict=True):
        _cut(node, (prompt_len - 1) // grid * grid)


# --- Plan and its verifier ------------------------------------------------------------------------

Interval = tuple[Position, int]
"""(position, interval number): from the position's visit with that number to its next one."""
Entries = tuple[Position, npt.NDArray[np.bool_], int, npt.NDArray[np.intp]]
"""(position, its ``kv`` or ``checkpoints``, bytes of one, interval numbers)."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes that may be kept between two requests, and the sizes of entries."""

    capacity_bytes: int
    kv_bytes_per_token: int
    state_bytes: int


class Plan:
    """KV segments and checkpoints to keep, which are marked at the positions of the trie, and the
    position from which each request resumes. It is built hit by hit."""

    def __init__(self, trie: VisitedTrie, budget: MemoryBudget) -> None:
        num_requests = len(trie.paths)
        self.trie, self.budget = trie, budget
        self.usage = np.zeros(num_requests, dtype=np.int64)
        """Bytes kept on the device between request t and t + 1."""
        self.cached_lens = np.zeros(num_requests, dtype=np.int64)
        self.hits: dict[int, Position] = {}

    def needs(self, request: int, position: Position) -> set[Interval]:
        """Return the checkpoint intervals to add for ``request`` to resume at ``position``."""
        path = self.trie.paths[request]
        needed = self._state_since(position, path[position] - 1)
        for above, visit in path.items():
            if above.depth >= position.depth:
                break
            is_last, is_computed = visit == len(above.kv), above.depth > self.cached_lens[request]
            if is_computed and not is_last and above.checkpoints[visit]:
                needed |= self._state_since(above, visit - 1)
        return needed

    def _state_since(self, position: Position, interval: int) -> set[Interval]:
        """Return the intervals to add since the last visit that computed the state."""
        needed = set()
        while not position.checkpoints[interval]:
            needed.add((position, interval))
            if self.cached_lens[position.visits[interval]] <= position.depth:
                break
            interval -= 1
        return needed

    def missing(self, states: set[Interval]) -> list[Entries]:
        """Return the entries to add: the checkpoints and the KV above them."""
        state_bytes, kv_bytes = self.budget.state_bytes, self.budget.kv_bytes_per_token
        added: list[Entries] = [
            (position, position.checkpoints, state_bytes, np.asarray([interval]))
            for position, interval in states
        ]
        spans: dict[Position, tuple[int, int]] = {}
        for position, interval in states:
            start, end = position.visits[interval : interval + 2].tolist()
            above: Position | None = position
            while above is not None:
                first, last = spans.get(above, (start, end))
                spans[above] = min(first, start), max(last, end)
                above = above.parent
        for position, (start, end) in spans.items():
            within = position.overlapping(start, end)
            absent = np.flatnonzero(~position.kv[within]) + within.start
            if len(absent):
                added.append((position, position.kv, position.span * kv_bytes, absent))
            elif len(states) == 1:
                break  # kept KV has all KV above it
        return added

    def bytes_of(self, entries: Iterable[Entries]) -> npt.NDArray[np.int64]:
        """Return the bytes of ``entries`` between request t and t + 1: int64[requests]."""
        change = np.zeros(len(self.usage) + 1, dtype=np.int64)
        for position, _, size, which in entries:
            np.add.at(change, position.visits[which], size)
            np.add.at(change, position.visits[which + 1], -size)
        usage: npt.NDArray[np.int64] = np.cumsum(change)[:-1]
        return usage

    def fits(self, usage: npt.NDArray[np.int64]) -> bool:
        """Return whether kept entries stay within the capacity."""
        return bool(usage.max(initial=0) <= self.budget.capacity_bytes)

    def verify(self) -> None:
        """Check from scratch that a cache could execute the plan. Raises AssertionError."""
        budget, paths, lens = self.budget, self.trie.paths, self.trie.prompt_lens
        entries: list[Entries] = []
        for position in self.trie.positions:
            kv_bytes = position.span * budget.kv_bytes_per_token
            for kept, size in ((position.kv, kv_bytes), (position.checkpoints, budget.state_bytes)):
                entries.append((position, kept, size, np.flatnonzero(kept)))
        assert self.fits(self.bytes_of(entries)), "over capacity"
        for request, position in self.hits.items():
            path = paths[request]
            assert self.cached_lens[request] == position.depth, "another length than the hit's"
            assert position.depth < lens[request], "nothing left to compute"
            assert position.checkpoints[path[position] - 1], "no checkpoint"
            for above, visit in path.items():
                is_above = above.depth <= position.depth
                assert not is_above or above.kv[visit - 1], "a hole in the KV"
        for position in self.trie.positions:
            assert position.is_candidate or not position.checkpoints.any(), "off the grid"
            assert not (position.checkpoints & ~position.kv).any(), "a checkpoint without its KV"
            for interval in np.flatnonzero(position.checkpoints):
                if not (interval and position.checkpoints[interval - 1]):
                    hit = self.hits.get(int(position.visits[interval]))
                    assert hit is None or hit.depth < position.depth, (
                        "a checkpoint of a state nobody computed"
                    )
            if position.parent is None:
                continue
            for interval in np.flatnonzero(position.kv):
                start, end = position.visits[interval : interval + 2]
                within = position.parent.overlapping(start, end)
                assert position.parent.kv[within].all(), "KV without its parent's"


# --- Greedy search --------------------------------------------------------------------------------
#
# A hit is one request resuming at one position. It needs its checkpoint and everything on the path,
# kept since the position's last visit. Hits are added with the most tokens saved per byte and step
# first. Densities fall as the plan fills, if nothing is shared, so they are measured again when a
# hit comes to the top. The result is not a bound.


def clairvoyant_greedy(trie: VisitedTrie, budget: MemoryBudget) -> Plan:
    """Build a plan by density: add hits until no remaining hit is worthwhile or fits. Only
    candidates that come to the top are measured, each in O(depth + steps) in numpy."""
    plan = Plan(trie, budget)

    def first_density(position: Position, interval: int) -> float:
        """Return the density in an empty plan."""
        start, end = position.visits[interval : interval + 2].tolist()
        size = position.depth * budget.kv_bytes_per_token + budget.state_bytes
        return position.depth / float((end - start) * size)

    heap = [
        (-first_density(position, interval), request, position.depth, position)
        for request in range(len(trie.paths))
        for position, interval in trie.usable(request)
    ]
    heapq.heapify(heap)
    while heap:
        _, request, depth, position = heapq.heappop(heap)
        gain = depth - int(plan.cached_lens[request])
        if gain <= 0:
            continue
        added = plan.missing(plan.needs(request, position))
        steps = (int((at.visits[which + 1] - at.visits[which]).sum()) for at, _, _, which in added)
        cost = float(sum(size * num for (_, _, size, _), num in zip(added, steps, strict=True)))
        now = gain / cost if cost else float("inf")
        if heap and now < -heap[0][0] * (1 - 1e-9):
            heapq.heappush(heap, (-now, request, depth, position))
            continue
        usage = plan.usage + plan.bytes_of(added)
        if plan.fits(usage):
            plan.usage = usage
            for _, kept, _, which in added:
                kept[which] = True
            plan.hits[request] = position
            plan.cached_lens[request] = depth
    return plan


# --- Upper bound ----------------------------------------------------------------------------------

ROUNDS = 1000
"""Most evaluations of the dual function."""


class Relaxation:
    """Upper bound on the reused tokens of every cache of a capacity, on every checkpoint grid.

    A request that resumes at ``depth`` on its path needs the checkpoint there, which occupies
    ``state_bytes`` since the last visit of that position, and the KV of each segment above it,
    which occupies its bytes since the last visit of that segment. Each of these intervals ends at
    this request, so no other hit has any use for it. The relaxation keeps this and the capacity
    between two requests. It leaves out that a state must have been computed when its interval
    begins, and the memory of running requests, so it is solved by the entries of every real cache.

    Let ``price[s] >= 0`` be the price, in tokens, of the whole capacity between requests s and s +
    1. Multiply each capacity limit by its price and add it to the objective: the reused tokens are
    at most ``sum(price)`` plus, for each request, the largest value of ``depth`` less the price of
    its bytes, or 0 for no hit. This holds for any prices (weak duality), and inside a segment too:
    the value is linear in ``depth`` there, and at the lower end it is at most that of the position
    above, whose interval is no longer. A subgradient method lowers the sum; with the best prices,
    it is the value of the linear program.
    """

    def __init__(self, trie: VisitedTrie) -> None:
        """``trie`` has a grid of 1. O(positions on all paths)."""
        rows: list[tuple[int, int, int, int]] = []
        for request, path in enumerate(trie.paths):
            for position, visit in path.items():
                if not visit or position.depth >= trie.prompt_lens[request]:
                    break
                before = int(position.visits[visit - 1])
                rows.append((request, before, position.span, position.depth))
        self.num_requests = len(trie.paths)
        columns = np.asarray(rows, np.int64).reshape(-1, 4).T
        self._end, self._start, self._span, self._depth = columns
        is_first = np.diff(self._end, prepend=-1) > 0
        self._firsts, self._group = np.flatnonzero(is_first), np.cumsum(is_first) - 1

    def bound(self, budget: MemoryBudget) -> int:
        """Return tokens that no cache exceeds. O(rounds * positions on all paths)."""
        num_steps = self.num_requests
        flat = (np.full(num_steps, price) for price in (0.0, *np.geomspace(1e-3, 1e6, 46)))
        lowest, best = min(
            ((self._dual(one, budget)[0], one) for one in flat), key=lambda it: it[0]
        )
        prices, gap, num_worse = best, lowest / 20, 0
        for _ in range(ROUNDS):
            value, slope = self._dual(prices, budget)
            if value < lowest - gap / 1000:
                lowest, best, num_worse = value, prices, 0
            else:
                num_worse += 1
            if num_worse == 8:  # aim at a smaller improvement, from the best prices
                gap, num_worse, prices = gap / 2, 0, best
                value, slope = self._dual(prices, budget)
            slope = np.where((prices > 0) | (slope < 0), slope, 0)
            length = float(slope @ slope)
            if gap < 1e-4 * lowest or not length:
                break
            prices = np.maximum(0, prices - (value - lowest + gap) / length * slope)
        return int(lowest * (1 + 1e-9))  # hits are whole tokens

    def _dual(
        self, prices: npt.NDArray[np.float64], budget: MemoryBudget
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the bound of ``prices``, and its slope: the free part of the capacity."""
        if not len(self._end):
            return float(prices.sum()), np.ones(self.num_requests)
        until = np.concatenate(([0.0], np.cumsum(prices)))
        price = (until[self._end] - until[self._start]) / budget.capacity_bytes
        costs = np.cumsum(paid := self._span * budget.kv_bytes_per_token * price)
        costs -= (costs - paid)[self._firsts][self._group]
        values = self._depth - costs - budget.state_bytes * price
        most = np.maximum.reduceat(values, self._firsts)
        at = np.flatnonzero((values == most[self._group]) & (values > 0))
        hits = at[np.diff(self._group[at], prepend=-1) > 0]  # the first of equal ones
        last = np.full(len(self._firsts), -1)
        last[self._group[hits]] = hits
        held = np.flatnonzero(np.arange(len(values)) <= last[self._group])
        size = self._span[held] * budget.kv_bytes_per_token
        which = np.concatenate((held, hits))
        parts = np.concatenate((size, np.full(len(hits), budget.state_bytes)))
        parts = parts / budget.capacity_bytes
        begun, ended = (
            np.bincount(times[which], parts, self.num_requests + 1)
            for times in (self._start, self._end)
        )
        usage = np.cumsum(begun - ended)[:-1]
        return float(prices.sum() + np.maximum(most, 0).sum()), 1 - usage


# --- A trace and a budget -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Optimum:
    """Plan with hindsight for one trace and one budget, verified from scratch. The optimum is at
    least ``reached`` and at most ``bound``."""

    trace: str
    gib: float
    """Memory for KV and states, GiB."""
    num_requests: int
    prompt_tokens: int
    reached: float
    """Token hit rate of the plan, 0 to 1."""
    bound: float
    """Token hit rate that no cache of this memory exceeds, on any grid (``Relaxation``)."""
    cached_tokens: npt.NDArray[np.int64]
    """Tokens that each request skips under the plan: int64[requests]."""

    @property
    def gap(self) -> float:
        """(bound - reached) / bound."""
        return (self.bound - self.reached) / self.bound if self.bound else 0.0


def best_plan(trace: Trace, gib: float, geometry: ModelGeometry, *, grid: int = 1) -> Optimum:
    """Build a plan of contents of the cache and positions of checkpoints, with hindsight.

    ``grid`` is in tokens. Running requests take no memory. ValueError for a grid that does not fit
    the trace's unit and for a trace without a request.

    >>> from hybridcache.lab.traces.generators import resend
    >>> best = best_plan(resend().head(60), 2.0, ModelGeometry.preset("qwen3-next"))
    >>> 0 < best.reached <= best.bound < 1
    True
    """
    if grid % trace.unit and trace.unit % grid:
        raise ValueError(
            f"the grid ({grid}) must divide or be divided by the trace's unit ({trace.unit})"
        )
    requests = list(trace)
    if not requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    trie = build_trie(requests, grid=max(1, grid // trace.unit))
    row_bytes = geometry.kv_bytes_per_token * trace.unit
    budget = MemoryBudget(budget_bytes(gib), row_bytes, geometry.state_bytes)
    plan = clairvoyant_greedy(trie, budget)
    plan.verify()
    if grid > trace.unit:
        trie = build_trie(requests)
    bound_tokens = Relaxation(trie).bound(budget) * trace.unit
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in requests)
    cached = plan.cached_lens * trace.unit
    return Optimum(
        trace=trace.name,
        gib=gib,
        num_requests=len(requests),
        prompt_tokens=prompt_tokens,
        reached=float(cached.sum()) / prompt_tokens,
        bound=bound_tokens / prompt_tokens,
        cached_tokens=cached,
    )
