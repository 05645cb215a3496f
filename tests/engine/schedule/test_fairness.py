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

    def __init__(self, token_budget: int, max_running: int = 16, step_s: float = 0.0) -> None:
        sizes = {"token_budget": token_budget, "max_running": max_running}
        self.engine = make_engine(60_000, 64, **sizes, step_s=step_s)
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


class TimedLoad(Load):
    """Load on a device that needs a constant time for a step and for each tile."""

    def __init__(self, step_s: float, constant_s: float, tile_s: float) -> None:
        super().__init__(token_budget=1024, step_s=step_s)
        self.now_s, self.durations_s = 0.0, list[float]()
        self.engine._scheduler.clock = lambda: self.now_s
        forward = self.engine.runner.forward

        def timed(batch, drawn=()):
            tiles = [-(-len(one.token_ids) // TILE) for one in batch.segments if not one.is_decode]
            self.durations_s.append(constant_s + tile_s * sum(tiles))
            self.now_s += self.durations_s[-1]
            return forward(batch, drawn)

        self.engine.runner.forward = timed


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


@pytest.mark.parametrize(
    ("constant_s", "tile_s"),
    [(0.25, 0.15), (0.02, 0.26), (0.0, 1.4), (0.1, 0.001)],
    ids=["fixed cost", "530M", "9B", "fast"],
)
def test_a_step_takes_about_the_declared_time(constant_s: float, tile_s: float) -> None:
    """It is the least number of tiles that takes so long, or half as long while others decode."""
    load = TimedLoad(1.0, constant_s, tile_s)
    load.add("alone", tokens(5000, 0), max_tokens=1)
    load.run()
    assert load.tiles[0] == 1, "the speed is not known yet"
    whole = [seconds for seconds, tiles in zip(load.durations_s, load.tiles, strict=True) if tiles]
    assert all(seconds < 1.0 + 2 * tile_s for seconds in whole)
    assert min(whole[4:-1]) > min(1.0 - tile_s, constant_s + 16 * tile_s - 1e-9)
    load.add("stream", tokens(5, 1), max_tokens=1000)
    load.step()
    load.add("long", tokens(5000, 2), max_tokens=1)
    before = len(load.durations_s)
    while "long" not in load.first:
        load.step()
    assert all(seconds < 0.5 + 2 * tile_s for seconds in load.durations_s[before + 3 :])


@pytest.mark.parametrize("tile_s", [0.26, 1.4])
def test_steps_bounded_by_time_serve_short_prompts_in_every_second_one(tile_s: float) -> None:
    load = TimedLoad(1.0, 0.0, tile_s)
    load.add("long", tokens(6000, 0), max_tokens=1)
    for _ in range(5):
        load.step()
    for i, length in enumerate((88, 200, 5)):
        load.add(f"short-{i}", tokens(length, i + 1), max_tokens=1)
    begun = load.num_steps
    load.add("next", tokens(3000, 9), max_tokens=1)
    load.run()
    tiles_of_a_step = 2 if tile_s < 1 else 1
    assert load.first["short-0"] - begun <= 2 * -(-2 // tiles_of_a_step)
    assert load.first["short-2"] - begun <= 2 * -(-(2 + 4 + 1) // tiles_of_a_step)
    assert load.first["long"] < load.first["next"]
    assert load.first["long"] - begun <= 2 * -(-6000 // (TILE * tiles_of_a_step))
