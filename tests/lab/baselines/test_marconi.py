"""Tests of the rebuilt Marconi: shared behaviour of its variants, and each difference on a case
worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.geometry.model import ModelGeometry
from hybridcache.lab.baselines import BaselineConfig, build_baseline, replay
from hybridcache.lab.baselines.marconi import LayerFlops, MarconiCache, Reading
from hybridcache.lab.baselines.prefix_tree import nodes
from hybridcache.lab.generators import few_shot, short
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.target import BaselineTarget, build_target
from hybridcache.tokens import Tokens
from tests.lab.baselines.prompts import QWEN3_NEXT, repeated_hits, text

READINGS: tuple[Reading, ...] = ("paper", "artifact", "repaired")
MODEL_7B = BaselineConfig(10**9, kv_bytes_per_token=65_536, state_bytes=24 * 1_116_160)
SMALL = BaselineConfig(budget_bytes=10**6, kv_bytes_per_token=1, state_bytes=10)
ONE_WIDE = LayerFlops(num_attention=1, num_linear=1, num_mlp=2, hidden=1, state=1)
"""FLOPs per layer: attention 8 L + 4 L^2, MLP 16 L, linear 38 L."""


def cache(reading: Reading, budget: int = 10**6, alpha: float = 0.0) -> MarconiCache:
    config = BaselineConfig(budget, SMALL.kv_bytes_per_token, SMALL.state_bytes)
    return MarconiCache(config, reading, alpha, flops=ONE_WIDE)


def ids(*numbers: int) -> Tokens:
    return np.array(numbers, np.int32)


def run(first: int, length: int) -> Tokens:
    return np.arange(first, first + length, dtype=np.int32)


def ends(peer: MarconiCache) -> dict[int, int]:
    """Return the number of checkpoints at each depth."""
    depths = [node.depth for node in peer.candidates]
    return {depth: depths.count(depth) for depth in sorted(depths)}


def test_checkpoints_are_at_the_branch_point_and_the_last_token() -> None:
    peer = MarconiCache(QWEN3_NEXT, alpha=1.0)
    assert repeated_hits(peer, text(0, 1500), 4) == [0, 0, 1500, 1500]
    prompt, answer = text(1, 300), text(2, 40)
    replay(peer, prompt, answer)
    assert replay(peer, np.concatenate((prompt, answer, text(3, 9))), text(4, 1)) == 340
    assert replay(peer, prompt, answer) == 0, "there is no state before the end of the prompt"


def test_flops_are_those_of_the_simulated_model() -> None:
    """The paper's 7B model is used only if a configuration has no model."""
    for name in ("qwen3-next", "marconi-7b"):
        geometry = ModelGeometry.preset(name)
        cell = Scenario("own", model=geometry, gib=1.0, baseline="marconi")
        target = build_target(cell, unit=1)
        assert isinstance(target, BaselineTarget) and isinstance(target.baseline, MarconiCache)
        for length in (1, 64, 100_000):
            assert target.baseline.flops.total(length) == pytest.approx(geometry.flops(0, length))
    assert MarconiCache(MODEL_7B).flops == LayerFlops()


def test_sizes_and_flops_match_the_paper() -> None:
    assert MODEL_7B.state_bytes / MODEL_7B.kv_bytes_per_token == pytest.approx(409, abs=1)
    every_16 = 10_000 // 16 * MODEL_7B.state_bytes + 10_000 * MODEL_7B.kv_bytes_per_token
    assert every_16 / 1e9 == pytest.approx(17.4, abs=0.05)
    transformer = 10_000 * MODEL_7B.kv_bytes_per_token / 4 * 32
    assert every_16 / transformer == pytest.approx(3.3, abs=0.05)
    flops = LayerFlops()
    per_byte = flops.linear(1000) / MODEL_7B.state_bytes
    assert per_byte / 1000 == pytest.approx(200, rel=0.1), "FLOPs per byte and token"
    attention_bytes = 1000 * MODEL_7B.kv_bytes_per_token
    assert flops.attention(1000) / attention_bytes == pytest.approx(1000 + 2 * 4096)


@pytest.mark.parametrize("reading", READINGS)
def test_alpha_0_evicts_as_lru_and_alpha_2_keeps_deep_prefixes(reading: Reading) -> None:
    config = BaselineConfig(budget_bytes=700_000, kv_bytes_per_token=100, state_bytes=50_000)
    deep, first, second = text(0, 3000), text(1, 2000), text(2, 2000)
    for alpha, kept in ((0.0, 0), (2.0, 3001)):
        peer = MarconiCache(config, reading, alpha)
        for prompt in (deep, first, second, first):
            replay(peer, prompt, text(9, 1))
        peer.check()
        assert replay(peer, np.concatenate((deep, text(9, 1), text(8, 5))), text(7, 1)) == kept


@pytest.mark.parametrize("reading", READINGS)
def test_readings_agree_without_pressure(reading: str) -> None:
    peer = build_baseline({"paper": "marconi"}.get(reading, f"marconi-{reading}"), QWEN3_NEXT)
    trace = list(few_shot())[:60]
    reused = sum(replay(peer, request.tokens, request.output) for request in trace)
    plain = MarconiCache(QWEN3_NEXT, leaf_lru=True)
    assert reused == sum(replay(plain, request.tokens, request.output) for request in trace)


@pytest.mark.parametrize(
    ("reading", "saved", "size"),
    [
        ("paper", (140 - 60) + 38 * 2 + 32 * 2, 2 + 10),
        ("artifact", (140 - 60) + 38 * 2 + 2 * (16 * 5 - (8 * 3 + 4 * 9)), 5 + 10),
        ("repaired", (140 - 60) + 38 * 2 + 32 * 2, 2 + 10),
    ],
)
def test_flops_per_byte_match_hand_computed_values(reading: Reading, saved: int, size: int) -> None:
    """A checkpoint at 5 tokens follows one at 3."""
    peer = cache(reading)
    replay(peer, ids(1, 2, 3), ids())
    replay(peer, ids(1, 2, 3, 4), ids(5))
    (node,) = (node for node in peer.candidates if node.depth == 5)
    assert peer._efficiency(node) == pytest.approx(saved / size)


@pytest.mark.parametrize(
    ("reading", "scores"),
    [("paper", [0, 0.75, 1]), ("artifact", [0, 0.375, 1]), ("repaired", [0, 0.375, 1])],
)
def test_recency_scores_match_hand_computed_values(reading: Reading, scores: list[float]) -> None:
    """The checkpoints were last used 5, 2 and 1 ticks ago."""
    peer = cache(reading)
    for prompt in (ids(1, 1), ids(2, 2), ids(3, 3)):
        replay(peer, prompt, ids())
    pool = list(peer.candidates)
    peer.clock = 10
    for node, time in zip(pool, (5, 8, 9), strict=True):
        node.time = time
    assert peer._scores(pool) == pytest.approx(scores)


@pytest.mark.parametrize(("reading", "left"), [("paper", 1), ("artifact", 0), ("repaired", 1)])
def test_eviction_counts_the_bytes_of_a_dead_leaf(reading: Reading, left: int) -> None:
    """After texts of 50, 30 and 1 tokens comes one of 50. Evicting the oldest frees enough, but the
    last visited leaf is short."""
    peer = cache(reading, budget=111 + 10)
    for first, length in ((0, 50), (100, 30), (200, 1)):
        replay(peer, run(first, length), ids())
    replay(peer, run(300, 50), ids())
    peer.check()
    assert ends(peer).get(30, 0) == left


@pytest.mark.parametrize(
    ("reading", "depths"),
    [("paper", {2: 0, 4: 2}), ("artifact", {2: 1, 4: 2}), ("repaired", {2: 1, 4: 2})],
)
def test_checkpoints_where_answers_diverge(reading: Reading, depths: dict[int, int]) -> None:
    """Two answers to one prompt diverge after their first token."""
    peer = cache(reading)
    replay(peer, ids(1), ids(2, 3, 4))
    replay(peer, ids(1), ids(2, 5, 6))
    peer.check()
    (root,) = peer.roots.values()
    states = [node.depth for node in nodes(root) if node.has_state]
    assert {depth: states.count(depth) for depth in depths} == depths


def test_inserting_a_repeated_answer_refreshes_it_in_the_artifact() -> None:
    for reading, refreshed in (("paper", False), ("artifact", True), ("repaired", True)):
        peer = cache(reading)
        replay(peer, ids(1), ids(2, 3))
        (node,) = peer.candidates
        before = node.time
        replay(peer, ids(1), ids(2, 3, 4))
        assert (node.time > before) == refreshed


@pytest.mark.parametrize("reading", READINGS)
def test_text_larger_than_the_budget_evicts_all_others(reading: Reading) -> None:
    peer = cache(reading, budget=40)
    replay(peer, run(0, 20), ids())
    replay(peer, run(100, 50), ids())
    assert peer.used_bytes == 60
    peer.check()


@pytest.mark.parametrize(
    ("reading", "kept"), [("paper", {4: 1, 8: 1}), ("artifact", {8: 1}), ("repaired", {8: 1})]
)
def test_eviction_is_after_or_before_the_insertion(reading: Reading, kept: dict[int, int]) -> None:
    """Two prompts of 8 tokens share 4, and 30 bytes do not fit both.

    The paper inserts the second with its branch point, and evicts the rest of the first. The
    artifact evicts the whole first prompt, so there is no branch point.
    """
    peer = cache(reading, budget=30)
    replay(peer, run(0, 8), ids())
    replay(peer, np.concatenate((run(0, 4), run(100, 4))), ids())
    peer.check()
    assert ends(peer) == kept


def test_merged_node_keeps_the_later_time_in_the_artifact() -> None:
    for reading, merged in (("paper", 1), ("artifact", 9), ("repaired", 9)):
        peer = cache(reading)
        replay(peer, ids(1, 2), ids())
        replay(peer, ids(1, 2, 3), ids(4))
        inner, leaf = sorted(peer.candidates, key=lambda node: node.depth)
        inner.time, leaf.time = 9, 1
        peer._remove(inner)
        assert leaf.time == merged
        peer.check()


@pytest.mark.parametrize(("reading", "waits"), [("paper", 3), ("artifact", 2), ("repaired", 2)])
def test_alpha_is_tuned_after_the_expected_number_of_requests(reading: Reading, waits: int) -> None:
    """With a window of 2 and the first eviction in request n, alpha is set in request 3 n of the
    paper and 2 n of the artifact."""
    config = BaselineConfig(budget_bytes=400, kv_bytes_per_token=1, state_bytes=10)
    peer = MarconiCache(config, reading, window=2)
    first = tuned = None
    for number, request in enumerate(list(short())[:60], 1):
        replay(peer, request.tokens[:80] + number, request.output[:10])
        first = first or (number if peer.num_evictions else None)
        tuned = tuned or (number if peer._tuner is None else None)
    assert first is not None and tuned is not None
    seen = first - 1 if reading == "paper" else first
    assert tuned == max(waits * seen, first)
    peer.check()
