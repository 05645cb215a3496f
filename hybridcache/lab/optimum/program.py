"""Offline optimum as a linear program: variables in [0, 1], integral for the MILP, relaxed for the
LP.

Over a ``VisitedTrie``, with k the interval between a position's visits k and k + 1:

- ``X[v, k]``: the KV segment that ends at v is kept; ``Y[v, k]``: a checkpoint at v is kept (only
  at candidates);
- ``S[r, v]``: request r resumes at v or deeper.  ``S[v] - S[next]`` is then "resumes exactly at v";
- ``U[t]``: bytes kept between requests t and t + 1, at most the capacity.

Maximise the sum over r, v of S[r, v] * (depth of v - depth of the candidate above it). Subject to:

- S[r, next] <= S[r, v] <= X[v, k] for every position on the path: a hit needs its KV, kept from
  the last visit until this one;
- S[r, v] - S[r, next] <= Y[v, k]: it needs its checkpoint, kept as long;
- Y[v, k] <= X[v, k], and X[v, k] <= X[parent, j] for every j that overlaps (long runs of j through
  shared columns): residency is closed under ancestors;
- Y[v, k] <= Y[v, k - 1] + 1 - S[r, next]: a request that resumes below v never computes v's state,
  so the state can be present afterwards only if it was present before;
- U[t] = U[t - 1] + bytes of the intervals that begin at t - bytes of those that end at t.

The dual of ``U[t] <= capacity`` is the price of a byte at time t: tokens that one more byte would
save. Only Y and S must be declared integral: the least X that allows them is then integral too.
Solved by HiGHS (https://highs.dev).

Source of the idea: the LP/MILP bounds used for offline caching with variable sizes, applied here to
two resources on a tree.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridcache.lab.defaults import LIMIT_S, RELATIVE_GAP
from hybridcache.lab.optimum.plan import (
    Interval,
    MemoryBudget,
    Plan,
    overlapping,
)
from hybridcache.lab.optimum.trie import VisitedTrie

Kept = tuple[dict[Interval, int], dict[Interval, int]]
"""Columns of the KV and of the checkpoints that are kept."""


def add_lower(program: Program) -> list[Kept]:
    """Add the columns and rows of all tiers below the device. Returns the columns of kept entries
    by tier."""
    tiers: list[Kept] = []
    for _ in program.budget.lower:
        kv = {item: program.column() for item in program.kv}
        tiers.append((kv, {item: program.column() for item in program.checkpoint}))
    for place, columns in enumerate((program.kv, program.checkpoint)):
        for item, column in columns.items():
            below = [(tier[place][item], 1.0) for tier in tiers]
            program.row([*below, (column, -1.0)], 0)
    for request in range(program.trie.num_requests):
        _add_copies(program, tiers, request)
    return tiers


def _add_copies(program: Program, tiers: list[Kept], request: int) -> None:
    trie, budget = program.trie, program.budget
    usable = dict(trie.usable(request))
    following: int | None = None
    for index, ordinal in zip(
        reversed(trie.paths[request]), reversed(trie.ordinals[request]), strict=True
    ):
        if ordinal == 0:
            continue
        interval = (index, ordinal - 1)
        mine = program.resume.get((request, index)) if index in usable else following
        if mine is None:
            continue  # no resumable position from here on
        size = trie.span(trie.positions[index]) * budget.kv_bytes_per_token
        _need(program, tiers, 0, interval, [(mine, 1.0)], size)
        if index in usable:
            only = [(mine, 1.0)] if following is None else [(mine, 1.0), (following, -1.0)]
            _need(program, tiers, 1, interval, only, budget.state_bytes)
            following = mine


def _need(
    program: Program,
    tiers: list[Kept],
    place: int,
    interval: Interval,
    wanted: list[tuple[int, float]],
    size_bytes: int,
) -> None:
    """Require ``interval`` on the device, or its copy, for ``wanted``. ``place`` is 0 for KV, 1 for
    a state."""
    kept = (program.kv, program.checkpoint)[place][interval]
    row = [*wanted, (kept, -1.0)]
    for tier, budget in zip(tiers, program.budget.lower, strict=True):
        below = tier[place][interval]
        copy = program.column(-size_bytes * budget.tokens_per_byte)
        program.row([(copy, 1.0), (below, -1.0)], 0)
        row += [(below, 1.0), (copy, -1.0)]
    program.row(row, 0)


@dataclass(frozen=True, slots=True)
class Solution:
    """Result of the solver. ``saved`` and ``bound`` are prompt tokens skipped over the whole
    trace."""

    saved: float
    """Value of the best plan found (MILP), or of the relaxation (LP, equal to the bound)."""
    bound: float
    """Upper bound on the tokens that any policy can save."""
    plan: Plan | None
    """Best plan found, or None for an LP."""
    prices: npt.NDArray[np.float64] | None
    """LP only: float64[requests - 1], tokens per byte between requests t and t + 1."""
    num_variables: int
    num_nonzeros: int
    wall_s: float

    @property
    def gap(self) -> float:
        """(bound - saved) / bound."""
        return (self.bound - self.saved) / self.bound if self.bound else 0.0


class Program:
    """Linear program of one trace and one budget, in columns and rows."""

    def __init__(self, trie: VisitedTrie, budget: MemoryBudget) -> None:
        self.trie, self.budget = trie, budget
        self.kv: dict[Interval, int] = {}
        self.checkpoint: dict[Interval, int] = {}
        self.resume: dict[tuple[int, int], int] = {}
        self.deeper: dict[Interval, int] = {}
        self.runs: dict[tuple[int, int, int], int] = {}
        self.gain: list[float] = []
        self.rows: list[int] = []
        self.columns: list[int] = []
        self.values: list[float] = []
        self.upper: list[float] = []
        self._add_columns()
        self._add_hits()
        self._add_residency()
        self.lower: list[Kept] = []
        """Columns of kept entries for each tier below the device."""
        if budget.lower:
            self.lower = add_lower(self)
        self._add_capacity()

    def column(self, gain: float = 0.0) -> int:
        self.gain.append(gain)
        return len(self.gain) - 1

    def row(self, terms: list[tuple[int, float]], upper: float) -> None:
        """Add the row: sum of value * column <= upper."""
        self.rows.extend([len(self.upper)] * len(terms))
        self.columns.extend(column for column, _ in terms)
        self.values.extend(value for _, value in terms)
        self.upper.append(upper)

    def _add_columns(self) -> None:
        for position in self.trie.positions:
            for interval in range(position.num_intervals):
                self.kv[position.index, interval] = self.column()
                if position.is_candidate:
                    self.checkpoint[position.index, interval] = self.column()

    def _add_hits(self) -> None:
        positions = self.trie.positions
        for request in range(self.trie.num_requests):
            usable = self.trie.usable(request)
            above = 0
            for index, interval in usable:
                depth = positions[index].depth
                self.resume[request, index] = self.column(float(depth - above))
                above = depth
                self.row([(self.resume[request, index], 1), (self.kv[index, interval], -1)], 0)
            for place, (index, interval) in enumerate(usable):
                mine = self.resume[request, index]
                state = self.checkpoint[index, interval]
                if place + 1 == len(usable):
                    self.row([(mine, 1), (state, -1)], 0)
                    continue
                following = self.resume[request, usable[place + 1][0]]
                self.row([(following, 1), (mine, -1)], 0)
                self.row([(mine, 1), (following, -1), (state, -1)], 0)
                self.deeper[index, interval + 1] = following
            self._add_holes(request, dict(usable))

    def _add_holes(self, request: int, usable: dict[int, int]) -> None:
        """Add rows for segments that end off the grid: they have no checkpoint, but a deeper hit
        needs their KV too."""
        pending: list[int] = []
        path, ordinals = self.trie.paths[request], self.trie.ordinals[request]
        for index, ordinal in zip(path, ordinals, strict=True):
            if index in usable:
                for column in pending:
                    self.row([(self.resume[request, index], 1), (column, -1)], 0)
                pending = []
            elif ordinal > 0:
                pending.append(self.kv[index, ordinal - 1])

    def _add_residency(self) -> None:
        for (index, interval), column in self.checkpoint.items():
            self.row([(column, 1), (self.kv[index, interval], -1)], 0)
            if interval > 0 and (index, interval) in self.deeper:
                before = self.checkpoint[index, interval - 1]
                self.row([(column, 1), (before, -1), (self.deeper[index, interval], 1)], 1)
        for (index, interval), column in self.kv.items():
            position = self.trie.positions[index]
            if position.parent is None:
                continue
            visits = self.trie.positions[position.parent].visits
            overlaps = overlapping(visits, position.visits[interval], position.visits[interval + 1])
            size = 1 << (len(overlaps).bit_length() - 1)
            for first in {overlaps.start, overlaps.stop - size}:
                self.row([(column, 1), (self._throughout(position.parent, first, size), -1)], 0)

    def _throughout(self, index: int, first: int, size: int) -> int:
        """Return a column that is at most X over the ``size`` (a power of two) intervals from
        ``first``. A hot parent is visited far more often than its children, and two such columns
        cover any run of its intervals."""
        if size == 1:
            return self.kv[index, first]
        key = (index, first, size)
        if key not in self.runs:
            self.runs[key] = self.column()
            for half in (first, first + size // 2):
                part = self._throughout(index, half, size // 2)
                self.row([(self.runs[key], 1), (part, -1)], 0)
        return self.runs[key]

    def _add_capacity(self) -> None:
        """Add U[t] in units of each tier's capacity, as equality rows appended last. Entries kept
        in a tier do not use the device."""
        self.num_inequalities = len(self.upper)
        here: Kept = self.kv, self.checkpoint
        kept = [(here, 1.0), *((lower, -1.0) for lower in self.lower)]
        self.usage = self._add_usage(kept, self.budget.capacity_bytes)
        for lower, tier in zip(self.lower, self.budget.lower, strict=True):
            self._add_usage([(lower, 1.0)], tier.capacity_bytes)

    def _add_usage(self, kept: list[tuple[Kept, float]], capacity_bytes: int) -> list[int]:
        changes: list[list[tuple[int, float]]] = [[] for _ in range(self.trie.num_requests)]
        for (kv, checkpoints), sign in kept:
            scale = sign / capacity_bytes
            for columns, is_kv in ((kv, True), (checkpoints, False)):
                for (index, interval), column in columns.items():
                    position = self.trie.positions[index]
                    tokens_bytes = self.trie.span(position) * self.budget.kv_bytes_per_token
                    size = scale * (tokens_bytes if is_kv else self.budget.state_bytes)
                    changes[position.visits[interval]].append((column, -size))
                    changes[position.visits[interval + 1]].append((column, size))
        usage = [self.column() for _ in range(self.trie.num_requests)]
        for time_step, terms in enumerate(changes):
            before = [(usage[time_step - 1], -1.0)] if time_step else []
            self.row([(usage[time_step], 1.0), *before, *terms], 0)
        return usage

    def solve(
        self,
        *,
        integral: bool,
        start: Plan | None = None,
        window: tuple[int, int] | None = None,
        relative_gap: float = RELATIVE_GAP,
        limit_s: float = LIMIT_S,
    ) -> Solution:
        """Run HiGHS on one thread.

        ``start`` is a plan to improve on. With ``window`` = (first, last) request, only variables
        that touch those requests may change, and the rest stays as in ``start``. The bound then
        holds for the window alone. Raises TimeoutError if it ends without a solution or, if not
        ``integral``, without the bound.
        """
        import highspy

        began = time.perf_counter()
        solver = self._solver(integral, relative_gap, limit_s)
        if integral and start is not None:
            values = self.values_of(start)
            if window is not None:
                fixed = self._outside(*window)
                solver.changeColsBounds(len(fixed), fixed, values[fixed], values[fixed])
            self._hand_over(solver, values)
        solver.run()
        info = solver.getInfo()
        values = np.asarray(solver.getSolution().col_value)
        solved = integral or solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
        if not solved or not len(values) or not np.isfinite(info.objective_function_value):
            raise TimeoutError(f"HiGHS found no solution within {limit_s:g} s; greedy needs none")
        objective = float(info.objective_function_value)
        prices = None
        if not integral:
            duals = np.abs(np.asarray(solver.getSolution().col_dual))
            prices = duals[self.usage][:-1] / self.budget.capacity_bytes
        return Solution(
            saved=objective,
            bound=float(info.mip_dual_bound) if integral else objective,
            plan=self._plan(values) if integral else None,
            prices=prices,
            num_variables=len(self.gain),
            num_nonzeros=len(self.values),
            wall_s=time.perf_counter() - began,
        )

    def _solver(self, integral: bool, relative_gap: float, limit_s: float) -> Any:
        import highspy

        rows, columns = len(self.upper), len(self.gain)
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = columns, rows
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = np.asarray(self.gain)
        lp.col_lower_ = np.zeros(columns)
        lp.col_upper_ = np.ones(columns)
        lower = np.full(rows, -highspy.kHighsInf)
        lower[self.num_inequalities :] = 0.0
        lp.row_lower_, lp.row_upper_ = lower, np.asarray(self.upper, dtype=np.float64)
        order = np.argsort(np.asarray(self.rows), kind="stable")
        counts = np.bincount(np.asarray(self.rows), minlength=rows)
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        lp.a_matrix_.index_ = np.asarray(self.columns, dtype=np.int32)[order]
        lp.a_matrix_.value_ = np.asarray(self.values)[order]
        if integral:
            kinds = [highspy.HighsVarType.kContinuous] * columns
            for column in (*self.checkpoint.values(), *self.resume.values()):
                kinds[column] = highspy.HighsVarType.kInteger
            lp.integrality_ = kinds
        solver: Any = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("time_limit", limit_s)
        solver.setOptionValue("mip_rel_gap", relative_gap)
        solver.passModel(lp)
        return solver

    def values_of(self, plan: Plan) -> npt.NDArray[np.float64]:
        """Return a plan as column values: float64[columns]."""
        values = np.zeros(len(self.gain))
        values[[self.kv[item] for item in plan.kv]] = 1
        values[[self.checkpoint[item] for item in plan.checkpoints]] = 1
        for (index, first, size), column in self.runs.items():
            kept = all((index, at) in plan.kv for at in range(first, first + size))
            values[column] = float(kept)
        for request, hit in plan.hits.items():
            for index, _ in self.trie.usable(request):
                values[self.resume[request, index]] = 1
                if index == hit:
                    break
        values[self.usage] = plan.usage(self.trie, self.budget) / self.budget.capacity_bytes
        return values

    def _outside(self, first: int, last: int) -> npt.NDArray[np.int32]:
        """Return the columns that do not affect requests first .. last."""
        outside = [
            column
            for columns in (self.kv, self.checkpoint)
            for (index, interval), column in columns.items()
            if self.trie.positions[index].visits[interval] >= last
            or self.trie.positions[index].visits[interval + 1] <= first
        ]
        outside += [
            column for (request, _), column in self.resume.items() if not first <= request <= last
        ]
        return np.asarray(sorted(outside), dtype=np.int32)

    def _hand_over(self, solver: Any, values: npt.NDArray[np.float64]) -> None:
        import highspy

        solution = highspy.HighsSolution()
        solution.col_value = values.tolist()
        solver.setSolution(solution)

    def _plan(self, values: npt.NDArray[np.float64]) -> Plan:
        plan = Plan(
            checkpoints={item for item, column in self.checkpoint.items() if values[column] > 0.5}
        )
        for index, interval in plan.checkpoints:
            start, end = self.trie.positions[index].visits[interval : interval + 2]
            above: int | None = index
            while above is not None:
                position = self.trie.positions[above]
                plan.kv.update((above, at) for at in overlapping(position.visits, start, end))
                above = position.parent
        for request in range(self.trie.num_requests):
            for index, _ in self.trie.usable(request):
                if values[self.resume[request, index]] > 0.5:
                    plan.hits[request] = index
        return plan
