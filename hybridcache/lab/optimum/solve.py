"""The best hit rate that any policy could reach for a trace and a budget, with its gap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hybridcache.geometry.units import GIB
from hybridcache.lab.defaults import LIMIT_S, RELATIVE_GAP
from hybridcache.lab.extras import explain_missing
from hybridcache.lab.optimum.greedy import clairvoyant_greedy
from hybridcache.lab.optimum.plan import LowerBudget, MemoryBudget, Plan
from hybridcache.lab.optimum.program import Program, Solution
from hybridcache.lab.optimum.trie import Placement, build_trie
from hybridcache.lab.trace import Trace, TraceRequest

Method = Literal["milp", "lp", "greedy"]
WINDOW = 100
WINDOW_LIMIT_S = 8.0


@dataclass(frozen=True, slots=True)
class Optimum:
    """Best possible result on one trace with one budget.

    ``reached`` is the token hit rate of a plan, verified from scratch. ``bound`` cannot be exceeded
    by any policy; it is None if only the greedy ran, which proves no bound. The optimum is between
    the two.
    """

    trace: str
    """Name of the trace."""
    capacity_bytes: int
    """Memory for KV and states."""
    method: Method
    """Method that was asked for."""
    plan_by: Literal["greedy", "milp"]
    """Source of the plan. It is also ``greedy`` if ``milp`` found no improvement in its time, and
    always with ``lp``."""
    num_requests: int
    """Number of requests."""
    prompt_tokens: int
    """Tokens of all prompts."""
    reached: float
    """Token hit rate of the plan, 0 to 1."""
    bound: float | None
    """Token hit rate that no plan exceeds; None if only the greedy ran."""
    cached_tokens: npt.NDArray[np.int64]
    """Tokens that each request skips under the plan: int64[requests]."""
    prices: npt.NDArray[np.float64] | None
    """Shadow price of a byte between requests t and t + 1: tokens that one more byte would save."""
    num_variables: int
    """Variables of the linear program."""
    num_nonzeros: int
    """Nonzeros of its matrix."""
    wall_s: float
    """Seconds of the computation."""
    lower: tuple[LowerBudget, ...] = ()
    """Tiers below the device. If there are any, ``reached`` and ``bound`` are net of copy costs."""

    @property
    def gib_worth(self) -> float | None:
        """Token hit rate that one more GiB throughout would add to the bound; None if only the
        greedy ran. It is derived from the prices, so it holds for small increases only."""
        if self.prices is None:
            return None
        return float(self.prices.sum()) * GIB / self.prompt_tokens

    @property
    def gap(self) -> float | None:
        """(bound - reached) / bound."""
        if self.bound is None:
            return None
        return (self.bound - self.reached) / self.bound if self.bound else 0.0

    def record(self, *, with_prices: bool = False) -> dict[str, object]:
        """Return a record for a JSON line: all fields except the tokens that each request skips.
        Prices are included if ``with_prices``, in tokens per GiB."""
        record: dict[str, object] = {
            "trace": self.trace,
            "capacity_bytes": self.capacity_bytes,
            "method": self.method,
            "plan_by": self.plan_by,
            "num_requests": self.num_requests,
            "prompt_tokens": self.prompt_tokens,
            "reached": self.reached,
            "bound": self.bound,
            "gap": self.gap,
            "gib_worth": self.gib_worth,
            "num_variables": self.num_variables,
            "num_nonzeros": self.num_nonzeros,
            "wall_s": self.wall_s,
        }
        if self.lower:
            record["lower"] = [
                {"capacity_bytes": tier.capacity_bytes, "tokens_per_byte": tier.tokens_per_byte}
                for tier in self.lower
            ]
        if with_prices and self.prices is not None:
            prices = (GIB * self.prices).round(3).tolist()
            record["prices_tokens_per_gib"] = prices
        return record


@explain_missing()
def best_plan(
    trace: Trace,
    *,
    capacity_bytes: int,
    kv_bytes_per_token: int,
    state_bytes: int,
    grid: int = 1,
    method: Method = "milp",
    placement: Placement = "shared",
    relative_gap: float = RELATIVE_GAP,
    limit_s: float = LIMIT_S,
    lower: tuple[LowerBudget, ...] = (),
    counts_running: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Optimum:
    """Compute the offline optimum over the contents of the cache and the positions of checkpoints.

    ``greedy`` builds a plan (any length of trace). ``lp`` adds the relaxation's bound and the
    prices. ``milp`` improves the plan window by window, then as a whole, until the gap is
    ``relative_gap`` or ``limit_s`` is over. ``lower``: tiers below the device, for ``greedy`` and
    ``lp``; results are then net of copy costs, in tokens. ``grid`` is in tokens.
    ``counts_running``: the running request's KV and state take memory too, as in every cache of
    this project; for ``greedy`` alone. A request that the memory cannot hold counts nothing.

    Raises ValueError for a budget, a grid or a time that is not positive and for a trace without a
    request; TimeoutError if ``limit_s`` was too short for any bound; ImportError without the extra
    ``lab`` (not needed by ``greedy``).

    >>> from hybridcache.lab.generators import resend
    >>> best = best_plan(resend().head(60), capacity_bytes=4 << 30, kv_bytes_per_token=24576,
    ...                  state_bytes=77_266_944, method="greedy")
    >>> 0 < best.reached < 1
    True
    """
    if capacity_bytes <= 0 or kv_bytes_per_token <= 0:
        raise ValueError("the optimum needs a positive capacity and positive bytes per token")
    _refuse_bad_limits(grid, trace.unit, relative_gap, limit_s)
    if lower and method == "milp":
        raise ValueError(
            "method milp does not support tiers below the device: use greedy, which makes a plan, "
            "or lp, which also bounds it"
        )
    if counts_running and method != "greedy":
        raise ValueError(
            f"counts_running needs method greedy (got {method}): the bound does not count them"
        )
    say = on_progress or (lambda _: None)
    began = time.perf_counter()
    requests = list(trace)
    if not requests:
        raise ValueError(f"{trace.name}: {trace.is_empty_because}")
    trie = build_trie(requests, grid=max(1, grid // trace.unit), placement=placement)
    budget = MemoryBudget(
        capacity_bytes,
        kv_bytes_per_token * trace.unit,
        state_bytes,
        tuple(LowerBudget(at.capacity_bytes, at.tokens_per_byte / trace.unit) for at in lower),
        _running_bytes(requests, capacity_bytes, kv_bytes_per_token * trace.unit, state_bytes)
        if counts_running
        else None,
    )
    prompt_tokens = sum(request.num_tokens(trace.unit) for request in requests)
    say(f"{len(requests)} requests, {len(trie.positions)} shared positions; greedy")
    plan = greedy = clairvoyant_greedy(trie, budget)
    bound: float | None = None
    prices = None
    size = (0, 0)
    if method != "greedy":
        program = Program(trie, budget)
        relaxed = program.solve(integral=False, limit_s=limit_s)
        bound, prices = relaxed.bound, relaxed.prices
        size = relaxed.num_variables, relaxed.num_nonzeros
        say(f"LP bound {bound * trace.unit / prompt_tokens:.4f}")
        if method == "milp":
            plan, bound = _improve(
                program, plan, bound, relative_gap, began + limit_s, say, trace.unit / prompt_tokens
            )
    plan.verify(trie, budget)
    cached = plan.cached_lens(trie) * trace.unit
    copied = plan.copy_tokens(trie, budget) * trace.unit if lower else 0.0
    return Optimum(
        trace=trace.name,
        capacity_bytes=capacity_bytes,
        method=method,
        plan_by="greedy" if plan is greedy else "milp",
        num_requests=len(requests),
        prompt_tokens=prompt_tokens,
        reached=(float(cached.sum()) - copied) / prompt_tokens,
        bound=None if bound is None else bound * trace.unit / prompt_tokens,
        cached_tokens=cached,
        prices=prices,
        num_variables=size[0],
        num_nonzeros=size[1],
        wall_s=time.perf_counter() - began,
        lower=lower,
    )


def _running_bytes(
    requests: Sequence[TraceRequest], capacity_bytes: int, kv_bytes: int, state_bytes: int
) -> npt.NDArray[np.int64]:
    """Return the bytes of each request while it runs; 0 for one that is larger than the memory."""
    tokens = [len(request.tokens) + len(request.output) for request in requests]
    found = np.asarray(tokens, dtype=np.int64) * kv_bytes + state_bytes
    found[found > capacity_bytes] = 0
    return found


def _refuse_bad_limits(grid: int, unit: int, relative_gap: float, limit_s: float) -> None:
    if grid < 1 or not limit_s > 0 or not relative_gap >= 0:
        raise ValueError(
            "the optimum needs a positive grid, a positive time limit and no negative gap"
        )
    if grid % unit and unit % grid:
        raise ValueError(
            f"the grid ({grid}) must divide or be divided by the trace's unit ({unit})"
        )


def _improve(
    program: Program,
    plan: Plan,
    bound: float,
    relative_gap: float,
    deadline: float,
    say: Callable[[str], None],
    rate: float,
) -> tuple[Plan, float]:
    """Improve the plan by solving one window of requests at a time with the rest fixed. Then lower
    the bound by solving the whole program from there. ``deadline`` is in perf_counter seconds; a
    third of the time is reserved for the whole."""
    num_requests = program.trie.num_requests
    saved = float(plan.cached_lens(program.trie).sum())

    def closed() -> bool:
        return saved >= bound * (1 - relative_gap) or time.perf_counter() >= deadline

    def better(solution: Solution) -> bool:
        return solution.plan is not None and round(solution.saved) > saved

    windows_until = deadline - (deadline - time.perf_counter()) / 3
    while num_requests > WINDOW and not closed() and time.perf_counter() < windows_until:
        before = saved
        for first in range(0, num_requests - WINDOW // 2, WINDOW // 2):
            left_s = windows_until - time.perf_counter()
            if closed() or left_s <= 1:
                break
            solution = program.solve(
                integral=True,
                start=plan,
                window=(first, min(first + WINDOW, num_requests - 1)),
                relative_gap=relative_gap / 10,
                limit_s=min(WINDOW_LIMIT_S, left_s),
            )
            if better(solution) and solution.plan is not None:
                plan, saved = solution.plan, solution.saved
            say(f"window at {first}: {saved * rate:.4f} of {bound * rate:.4f}")
        if saved == before:
            break
    if not closed():
        solution = program.solve(
            integral=True,
            start=plan,
            relative_gap=relative_gap,
            limit_s=max(1.0, deadline - time.perf_counter()),
        )
        bound = min(bound, solution.bound)
        if better(solution) and solution.plan is not None:
            plan = solution.plan
        say(f"whole: {solution.saved * rate:.4f} of {bound * rate:.4f}")
    return plan, bound
