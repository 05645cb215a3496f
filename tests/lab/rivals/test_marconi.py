"""Tests of the rebuilt Marconi: shared behaviour of its variants, each difference on a case worked
out by hand, and the memory of running requests."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.lab.rivals import marconi
from hybridcache.lab.rivals.marconi import PAPER_7B, LayerFlops, MarconiCache, Reading
from hybridcache.lab.rivals.protocol import BaselineConfig, replay
from hybridcache.lab.traces.generators import short
from hybridcache.lab.traces.prefix_tree import nodes
from hybridcache.radix.tokens import Tokens

MODEL_7B = BaselineConfig(10**9, kv_bytes_per_token=65_536, state_bytes=24 * 1_116_160)
SMALL = BaselineConfig(budget_bytes=10**6, kv_bytes_per_token=1, state_bytes=10)
ONE_WIDE = LayerFlops(1, 2, 8.0, 4.0, 32.0, 38.0)
"""FLOPs per layer: attention 8 L + 4 L^2, MLP 16 L, linear 38 L."""


def cache(
    reading: Reading, budget: int = 10**6, alpha: float = 0.0, is_charged: bool = False
) -> MarconiCache:
    """Return a cache; as published, its running requests hold no memory."""
    config = BaselineConfig(budget, SMALL.kv_bytes_per_token, SMALL.state_bytes)
    peer = MarconiCache(config, reading, alpha, is_charged=is_charged)
    peer.flops = ONE_WIDE
    return peer


def ids(*numbers: int) -> Tokens:
    return np.array(numbers, np.int32)


def run(first: int, length: int) -> Tokens:
    return np.arange(first, first + length, dtype=np.int32)


def ends(peer: MarconiCache) -> dict[int, int]:
    """Return the number of checkpoints at each depth."""
    depths = [node.depth for node in peer.candidates]
    return {depth: depths.count(depth) for depth in sorted(depths)}


def test_sizes_and_flops_match_the_paper() -> None:
    assert MODEL_7B.state_bytes / MODEL_7B.kv_bytes_per_token == pytest.approx(409, abs=1)
    every_16 = 10_000 // 16 * MODEL_7B.state_bytes + 10_000 * MODEL_7B.kv_bytes_per_token
    assert every_16 / 1e9 == pytest.approx(17.4, abs=0.05)
    transformer = 10_000 * MODEL_7B.kv_bytes_per_token / 4 * 32
    assert every_16 / transformer == pytest.approx(3.3, abs=0.05)
    flops = PAPER_7B
    per_byte = 1000 * flops.linear_token / MODEL_7B.state_bytes
    assert per_byte / 1000 == pytest.approx(200, rel=0.1), "FLOPs per byte and token"
    attention_bytes = 1000 * MODEL_7B.kv_bytes_per_token
    assert flops.attention(1000) / attention_bytes == pytest.approx(1000 + 2 * 4096)


@pytest.mark.parametrize(
    ("reading", "saved", "size"),
    [
        ("paper", (140 - 60) + 38 * 2 + 32 * 2, 2 + 10),
        ("artifact", (140 - 60) + 38 * 2 + 2 * (16 * 5 - (8 * 3 + 4 * 9)), 5 + 10),
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
    ("reading", "scores"), [("paper", [0, 0.75, 1]), ("artifact", [0, 0.375, 1])]
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


@pytest.mark.parametrize(
    ("reading", "depths"), [("paper", {2: 0, 4: 2}), ("artifact", {2: 1, 4: 2})]
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


@pytest.mark.parametrize(("reading", "kept"), [("paper", {4: 1, 8: 1}), ("artifact", {8: 1})])
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


@pytest.mark.parametrize("reading", ["paper", "artifact"])
@pytest.mark.parametrize(("alpha", "evicted"), [(0.0, 10), (0.2, 10), (0.6, 2), (2.0, 2)])
def test_the_least_score_is_evicted(reading: Reading, alpha: float, evicted: int) -> None:
    """Three prompts have 10, 2 and 4 tokens, from the oldest to the newest.

    A fourth needs room. The normalised efficiencies are 1, 0 and 0.27 (51, 11.7 and 22.3 FLOPs per
    byte). In the paper, recencies are 0, 1/2 and 1: the second has the least score if alpha exceeds
    1/2. In the artifact they are 0, 1/4 and 1.
    """
    lengths = [10, 2, 4]
    peer = cache(reading, budget=sum(lengths) + 3 * SMALL.state_bytes, alpha=alpha)
    for number, length in enumerate([*lengths, 1]):
        replay(peer, run(100 * number, length), ids())
    peer.check()
    assert ends(peer) == {length: 1 for length in sorted([1, *lengths]) if length != evicted}


@pytest.mark.parametrize(("reading", "kept"), [("paper", [1, 4, 5]), ("artifact", [1, 5])])
def test_bytes_of_a_dead_leaf_are_its_own_or_those_of_the_last_candidate(
    reading: Reading, kept: list[int]
) -> None:
    """15 bytes are needed. The oldest prompt has 20, and the newest, which is walked last, 11."""
    peer = cache(reading, budget=45)
    for number, length in enumerate([10, 4, 1, 5]):
        replay(peer, run(100 * number, length), ids())
    assert list(ends(peer)) == kept


@pytest.mark.parametrize(("reading", "time"), [("paper", 4), ("artifact", 9)])
def test_a_merged_node_has_the_recency_of_its_child_or_the_later_one(
    reading: Reading, time: int
) -> None:
    peer = cache(reading)
    replay(peer, ids(1, 2), ids())
    replay(peer, ids(1, 2, 3), ids())
    above, below = sorted(peer.candidates, key=lambda node: node.depth)
    above.time, below.time = 9, 4
    peer._remove(above)
    peer.check()
    assert (below.depth, len(below.tokens), below.time) == (3, 3, time)


@pytest.mark.parametrize(("reading", "saved"), [("paper", 3), ("artifact", PAPER_7B.total(3))])
def test_alpha_is_tuned_by_hit_tokens_or_flops(reading: Reading, saved: float) -> None:
    requests = [(ids(1, 2, 3), ids(), None), (ids(1, 2, 3, 4), ids(), None)]
    assert cache(reading)._saved(requests, 0.0) == saved


@pytest.mark.parametrize(("reading", "waits"), [("paper", 3), ("artifact", 2)])
def test_alpha_is_tuned_after_the_expected_number_of_requests(
    reading: Reading, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of 2 and the first eviction in request n, alpha is set in request 3 n of the
    paper and 2 n of the artifact."""
    config = BaselineConfig(budget_bytes=400, kv_bytes_per_token=1, state_bytes=10)
    monkeypatch.setattr(marconi, "WINDOW", 2)
    peer = MarconiCache(config, reading, is_charged=False)
    first = tuned = None
    for number, request in enumerate(list(short())[:60], 1):
        replay(peer, request.tokens[:80] + number, request.output[:10])
        first = first or (number if peer._tuned_at else None)
        tuned = tuned or (number if peer._recorded is None else None)
    assert first is not None and tuned is not None
    seen = first - 1 if reading == "paper" else first
    assert tuned == max(waits * seen, first)
    peer.check()


@pytest.mark.parametrize("reading", ["paper", "artifact"])
@pytest.mark.parametrize(("returning", "other", "alpha"), [(10, 2, 1.1), (2, 10, 0.0)])
def test_alpha_is_the_least_that_keeps_the_returning_text(
    reading: Reading, returning: int, other: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text grows in every third request. The two between have new texts of another length.

    When the second of them needs room, the text is the oldest of two candidates. If it is the
    longer one, its score is alpha, and the other's is 1. If it is the shorter one, every alpha
    saves equally much.
    """
    monkeypatch.setattr(marconi, "WINDOW", 2)
    peer = MarconiCache(BaselineConfig(40, 1, 10), reading, is_charged=False)
    peer.flops, text = ONE_WIDE, run(0, returning)
    for number in range(6):
        assert peer.alpha == 0.0 and peer._recorded is not None
        if number % 3:
            replay(peer, run(100 * number, other), ids())
        else:
            replay(peer, text, ids())
            text = np.append(text, np.int32(5000 + number))
    assert peer._recorded is None and peer.alpha == alpha


@pytest.mark.parametrize("reading", ["paper", "artifact"])
def test_a_running_request_displaces_cached_text(reading: Reading) -> None:
    """A state has 10 bytes and a token one, of 45 bytes.

    Texts of 10 and 8 tokens take 20 and 18. A prompt of 12 takes 22 when it begins: the older text
    goes. Its return, with one token more, takes 21, so the other goes too. A prompt of 4 needs 14
    and must wait. The first answer of 2 fits: 24 and 21 are 45. The second of 1 displaces that.
    """
    peer = cache(reading, budget=45, is_charged=True)
    old, new = run(0, 10), run(100, 8)
    for prompt in (old, new):
        replay(peer, prompt, ids())
    first = peer.begin(run(200, 12))
    peer.check()
    assert first is not None and (ends(peer), peer.used_bytes) == ({8: 1}, 18)
    second = peer.begin(np.append(old, np.int32(1)))
    assert second is not None and second.cached_len == peer.used_bytes == 0
    assert peer.begin(run(300, 4)) is None
    first.finish(ids(1, 2))
    assert (ends(peer), peer.used_bytes) == ({14: 1}, 24)
    second.finish(ids(1))
    assert (ends(peer), peer.used_bytes) == ({12: 1}, 22)
    peer.check()


@pytest.mark.parametrize(("is_charged", "cached"), [(True, 0), (False, 10)])
def test_published_figures_are_of_the_tree_alone(is_charged: bool, cached: int) -> None:
    """The case above, and in the published simulations the older text is still there."""
    peer = cache("paper", budget=45, is_charged=is_charged)
    for prompt in (run(0, 10), run(100, 8)):
        replay(peer, prompt, ids())
    assert peer.begin(run(200, 12)) is not None
    session = peer.begin(run(0, 11))
    assert session is not None and session.cached_len == cached


@pytest.mark.parametrize("reading", ["paper", "artifact"])
def test_text_that_a_running_request_resumed_from_stays(reading: Reading) -> None:
    """A text of 10 tokens takes 20 of 45 bytes, and 5 more tokens of a running request 15. So a
    prompt of 12, which needs 22, waits, although the text is the only candidate. An answer of 11
    tokens does not fit either, and then nothing of that request is kept."""
    peer = cache(reading, budget=45, is_charged=True)
    replay(peer, run(0, 10), ids())
    session = peer.begin(run(0, 15))
    assert session is not None and session.cached_len == 10
    assert peer.begin(run(100, 12)) is None and ends(peer) == {10: 1}
    session.finish(run(500, 11))
    assert (ends(peer), peer.used_bytes) == ({10: 1}, 20)
    assert peer.begin(run(100, 12)) is not None
    peer.check()
    replay(peer := cache(reading, budget=60, is_charged=True), run(0, 10), ids())
    assert peer.begin(run(0, 15)) is not None
    replay(peer, run(100, 5), ids())
    assert peer.begin(run(200, 6)) is not None and ends(peer) == {10: 1}, "the newer text goes"
