"""Tests of the optimum: plan and bound against brute force on tiny traces, plans against their
verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.lab.optimum import MemoryBudget, best_plan, build_trie, clairvoyant_greedy
from hybridcache.lab.trace import Trace, TraceRequest
from tests.lab.optimum.reference import brute_force

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
    found = best_plan(trace_of(pairs), geometry, capacity / GIB, grid=grid)
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
    assert clairvoyant_greedy(trie, budget).cached_lens(trie).sum() == brute_force(
        short, budget, grid
    )
    plan.verify(build_trie(trace_of(pairs), grid=grid), budget)


def test_optimum_of_a_worked_example() -> None:
    """Two prompts of 4 and 3 tokens alternate, and each comes twice. The memory fits KV and state
    of only one."""
    long, short = [1, 2, 3, 4, 9], [5, 6, 7, 9]
    pairs = [(long, []), (short, []), (long, []), (short, [])]
    for capacity, cached in ((6, [0, 0, 4, 0]), (6 + 5, [0, 0, 4, 3])):
        budget = MemoryBudget(capacity, kv_bytes_per_token=1, state_bytes=2)
        trie = build_trie(trace_of(pairs))
        assert clairvoyant_greedy(trie, budget).cached_lens(trie).tolist() == cached
