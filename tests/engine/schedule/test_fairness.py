"""Tests of how a step's tokens are shared: short prompts do not wait for long ones, and no step is
left emptier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine import RequestOutput, SamplingParams
from engine.config import MAX_SCORED, TILE
from hybridcache.scheduling.planner import TILES
from tests.engine.test_engine import make_engine


class Load:
    """Engine with requests that arrive at once, and the steps of their first and last tokens."""

    def __init__(self, token_budget: int, max_running: int = 16) -> None:
        sizes = {"token_budget": token_budget, "max_running": max_running}
        self.engine = make_engine(60_000, 64, **sizes)
        config, runner = self.engine.config, self.engine.runner
        self.first: dict[str, int] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.num_steps = 0
        self.prefilled: list[int] = []
        """Prompt tokens of each step."""
        self.tiles: list[int] = []
        """Number of tiles that the prompt tokens of each step begin."""
        forward = runner.forward

        def spy(batch, drawn=()):
            assert sum(len(one.token_ids) for one in batch.segments) <= config.most_step_tokens
            lengths = [len(s.token_ids) for s in batch.segments if not s.is_decode]
            self.prefilled.append(sum(lengths))
            self.tiles.append(sum(-(-length // TILE) for length in lengths))
            assert sum(s.num_logits for s in batch.segments if s.scores) <= MAX_SCORED
            for one in batch.segments:
                assert one.scores == (one.request.wants_scores and not one.is_decode)
            return forward(batch, drawn)

        runner.forward = spy

    def add(
        self, name: str, prompt: list[int], max_tokens: int = 4, scores: int | None = None
    ) -> None:
        rule = SamplingParams(max_tokens=max_tokens)
        self.engine.submit(prompt, rule, request_id=name, prompt_logprobs=scores)

    def run(self) -> None:
        while self.engine.has_work():
            self.step()

    def step(self) -> None:
        self.num_steps += 1
        for output in self.engine.step():
            self.first.setdefault(output.request_id, self.num_steps)
            self.outputs[output.request_id] = output


def tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 320, count).tolist()


@pytest.mark.full
def test_a_short_prompt_does_not_wait_for_followers_of_a_long_one() -> None:
    load, long = Load(token_budget=1024), tokens(20_000, 0)
    load.add("leader", long)
    for i in range(40):
        load.add(f"follower-{i}", [*long[:-10], *[i] * 10])
    load.add("short", [1, 2, 3], max_tokens=1)
    load.run()
    assert load.first["short"] == 1
    assert load.first["leader"] == 20  # as without the others, except for three tokens
    assert all(o.cached_len >= 19_968 for n, o in load.outputs.items() if n[:3] == "fol")


def test_a_single_short_prompt_overtakes_a_running_long_one() -> None:
    load = Load(token_budget=256)
    load.add("long", tokens(4096, 0), max_tokens=1)
    load.step()
    load.add("short", tokens(50, 1), max_tokens=1)
    load.run()
    assert load.first["short"] == 2
    assert load.prefilled[:2] == [256, 242]  # chunks of the long prompt end on the grid


def test_a_step_scores_at_most_so_many_tokens_of_a_long_prompt() -> None:
    load = Load(token_budget=4096)
    load.add("scored", tokens(3000, 0), max_tokens=1, scores=0)
    load.add("other", tokens(3000, 1), max_tokens=1)
    load.run()
    assert load.first == {"other": 1, "scored": 3}


@given(
    sizes=st.lists(st.one_of(st.integers(1, 200), st.integers(1, 3000)), min_size=1, max_size=12),
    token_budget=st.sampled_from([64, 100, 128, 256, 1000]),
)
@example(sizes=[1, 1, 1, 1], token_budget=100)
@settings(max_examples=60, deadline=None)
@pytest.mark.timeout(300)
def test_steps_are_full_while_requests_wait(sizes: list[int], token_budget: int) -> None:
    """Check that, while requests wait, a step leaves less than a tile unused or begins all tiles it
    may."""
    load = Load(token_budget)
    for i, size in enumerate(sizes):
        load.add(f"{i}", tokens(size, i), max_tokens=1)
    load.run()
    assert sum(load.prefilled) == sum(sizes)
    left = sum(sizes)
    for prefilled, tiles in zip(load.prefilled, load.tiles, strict=True):
        left -= prefilled
        is_full = prefilled > token_budget - TILE or tiles >= TILES * token_budget // TILE
        assert is_full or not left, (load.prefilled, sizes)
        # The last prompt of a step may begin more tiles than are left.
        assert tiles <= TILES * max(token_budget, TILE) // TILE + prefilled // TILE
