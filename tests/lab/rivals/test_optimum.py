"""Tests of the optimum: plan and bound against brute force on tiny traces, plans against their
verifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.rivals.optimum import (
    MemoryBudget,
    Relaxation,
    best_plan,
    build_trie,
    clairvoyant_greedy,
)
from hybridcache.lab.runs.simulate import simulate
from hybridcache.lab.traces.trace import Trace, TraceRequest

GEOMETRY = ModelGeometry.preset("qwen3.5-0.8b")
Pair = tuple[Sequence[int], Sequence[int]]


def trace_of(pairs: Sequence[Pair], unit: int = 1) -> Trace:
    requests = [
        TraceRequest(
            float(number), number, None, np.array(prompt, np.int32), np.array(output, np.int32)
        )
        for number, (prompt, output) in enumerate(pairs)
    ]
    return Trace("test", unit, lambda: requests)


# --- Reference: exhaustive search over the possible cache contents after each request ----------

Text = tuple[int, ...]
Cache = frozenset[tuple[str, Text]]
"""Items of a cache. ("kv", path) is the KV of the last token of ``path``, and ("state", path) a
checkpoint after it."""


def brute_force(
    requests: Sequence[tuple[Sequence[int], Sequence[int]]], budget: MemoryBudget, grid: int = 1
) -> int:
    """Return the largest possible number of cached tokens over requests (prompt, output).

    Exponential: use at most a dozen tokens.
    """
    best: dict[Cache, int] = {frozenset(): 0}
    for prompt, output in requests:
        sequence = (*prompt, *output)
        prefixes = [tuple(sequence[: n + 1]) for n in range(len(sequence))]
        following: dict[Cache, int] = {}
        for cache, saved in best.items():
            for hit in usable_hits(cache, prefixes, len(prompt)):
                available = set(cache)
                available |= {("kv", prefix) for prefix in prefixes}
                available |= {
                    ("state", prefix)
                    for prefix in prefixes
                    if len(prefix) > hit and len(prefix) % grid == 0
                }
                for kept in caches_of(available, budget):
                    following[kept] = max(following.get(kept, 0), saved + hit)
        best = following
    return max(best.values(), default=0)


def usable_hits(cache: Cache, prefixes: list[Text], prompt_len: int) -> Iterator[int]:
    """Yield the lengths from which the prompt can be resumed, 0 included."""
    yield 0
    for depth in range(1, prompt_len):
        if ("kv", prefixes[depth - 1]) not in cache:
            return
        if ("state", prefixes[depth - 1]) in cache:
            yield depth


def caches_of(available: set[tuple[str, Text]], budget: MemoryBudget) -> Iterator[Cache]:
    """Yield every subset that fits, is closed under ancestors, and has KV at each checkpoint."""
    items = sorted(available)
    price = {"kv": budget.kv_bytes_per_token, "state": budget.state_bytes}
    for count in range(len(items) + 1):
        for chosen in combinations(items, count):
            if sum(price[kind] for kind, _ in chosen) > budget.capacity_bytes:
                continue
            kept = frozenset(chosen)
            if all(
                (kind == "kv" or ("kv", path) in kept)
                and (len(path) == 1 or ("kv", path[:-1]) in kept)
                for kind, path in kept
            ):
                yield kept


# --- Tests --------------------------------------------------------------------------------------

tokens = st.lists(st.integers(0, 1), min_size=1, max_size=3)
pairs = st.lists(st.tuples(tokens, st.lists(st.integers(0, 1), max_size=1)), min_size=1, max_size=4)


@settings(max_examples=100)
@given(
    pairs=pairs, capacity=st.integers(1, 9), state=st.integers(1, 3), grid=st.sampled_from([1, 2])
)
def test_optimum_lies_between_plan_and_bound(
    pairs: list[Pair], capacity: int, state: int, grid: int
) -> None:
    best = brute_force(pairs, MemoryBudget(capacity, 1, state), grid)
    geometry = replace(GEOMETRY, kv_bytes_per_token=1, recurrent_elements=0, conv_bytes=state)
    found = best_plan(trace_of(pairs), capacity / GIB, geometry, grid=grid)
    assert found.cached_tokens.sum() <= best <= round(found.bound * found.prompt_tokens)
    if grid == 1 and capacity >= 12 * (1 + state):
        assert found.cached_tokens.sum() == best


@settings(max_examples=40)
@given(pairs=pairs, state=st.integers(1, 3), grid=st.sampled_from([1, 2]))
def test_plan_with_ample_memory_is_the_optimum(pairs: list[Pair], state: int, grid: int) -> None:
    budget = MemoryBudget(1000, 1, state)
    plan = clairvoyant_greedy(build_trie(trace_of(pairs), grid=grid), budget)
    short = pairs[:2]  # the search has no memory limit to prune it
    trie = build_trie(trace_of(short), grid=grid)
    assert clairvoyant_greedy(trie, budget).cached_lens.sum() == brute_force(short, budget, grid)
    plan.verify()


def test_optimum_of_a_worked_example() -> None:
    """Two prompts of 4 and 3 tokens alternate, and each comes twice. The memory fits KV and state
    of only one."""
    long, short = [1, 2, 3, 4, 9], [5, 6, 7, 9]
    pairs = [(long, []), (short, []), (long, []), (short, [])]
    for capacity, cached in ((6, [0, 0, 4, 0]), (6 + 5, [0, 0, 4, 3])):
        budget = MemoryBudget(capacity, kv_bytes_per_token=1, state_bytes=2)
        trie = build_trie(trace_of(pairs))
        assert clairvoyant_greedy(trie, budget).cached_lens.tolist() == cached
        assert Relaxation(trie).bound(budget) == sum(cached)
    # Memory for the short one and 5/6 of the long one in part: the linear program has 3 + 1/3.
    assert Relaxation(trie).bound(MemoryBudget(5, 1, 2)) == 3


def test_no_cache_exceeds_the_bound_and_more_memory_never_lowers_it() -> None:
    """Rebuilt systems have other grids."""
    peers = ["vllm", "vllm-unit32", "sglang", "sglang-end", "marconi-static", "sglang-plus"]
    for spec in ("short?head=60", "few-shot?head=40"):
        result = simulate(
            spec, gib=[0.15, 6], policy=["lru", "survival"], baseline=peers,
            optimum=True, progress=False,
        )  # fmt: skip
        limits = [run.limit_tokens for run in next(iter(result.by_label().values()))]
        assert limits == sorted(limits) and limits[0] < 0.8 * limits[-1]
        assert limits[-1] == result.runs[0].bound_tokens, "all of it fits"
        for run in result.runs:
            assert max(run.cached_tokens, run.optimum_tokens) <= run.limit_tokens, run
        assert "(upper bound)" in result.table()
