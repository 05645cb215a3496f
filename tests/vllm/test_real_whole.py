"""Our scheduler in vLLM on a CPU: hits equal cold runs, and nothing leaks.

The load has chats, branches, edits, preemption, aborts and several prompts in one batch, in a pool
that is too small for it. Asynchronous scheduling is forced on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.vllm.real_engine import (
    GRID,
    Ask,
    Engine,
    Load,
    Served,
    assert_same_bits,
    assert_same_tokens,
    force_async_scheduling,
    write_model,
)

NUM_BLOCKS = 44
"""Blocks of the pool: too few for the load."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    force_async_scheduling()
    yield Engine(
        write_model(tmp_path_factory.mktemp("model")),
        scheduler_cls="hybridcache.vllm.HybridScheduler",
        prefix_match_unit=GRID,
        num_gpu_blocks_override=NUM_BLOCKS,
    )


class Seen:
    """Counters of a load that show what it has exercised."""

    def __init__(self, scheduler: Any) -> None:
        self.preempted = self.largest_batch = self.ahead = 0
        preempt, schedule = scheduler._preempt_request, scheduler.schedule

        def preempt_request(*args: Any, **kwargs: Any) -> Any:
            self.preempted += 1
            return preempt(*args, **kwargs)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.ahead += any(r.num_output_placeholders for r in scheduler.running)
            step = schedule(*args, **kwargs)
            self.largest_batch = max(self.largest_batch, len(step.num_scheduled_tokens))
            return step

        scheduler._preempt_request, scheduler.schedule = preempt_request, counted


@pytest.fixture(scope="module")
def load(engine: Engine) -> tuple[list[Served], Seen]:
    """Serve everything, first one request at a time."""
    load, seen = Load(engine), Seen(engine.scheduler)
    for at_once in (1, 6):
        histories = load.chats(at_once)
        for history in histories[:3]:
            load.branches_and_edits(history, at_once)
    load.aborts(histories[4])
    load.crowd()
    for history in histories:
        load.serve(Ask(tuple(history)))
    return load.served, seen


def exact(served: list[Served]) -> list[bool]:
    """Return whether each request must have the bits of a cold run.

    It has if it was alone, and the state that it resumed from was made by prefills of such
    requests. A state of the decode, or of another batch, is rounded differently.
    """
    found: list[bool] = []
    for i, one in enumerate(served):
        end = one.answer.cached_len
        makers = [j for j in range(i) if end and served[j].tokens[:end] == [*one.ask.prompt[:end]]]
        is_exact = all(found[j] and end <= len(served[j].ask.prompt) for j in makers)
        found.append(one.alone and end % GRID == 0 and is_exact)
    return found


def test_hits_equal_cold_runs(engine: Engine, load: tuple[list[Served], Seen]) -> None:
    """A hit has the bits of the cold run if nothing but the cache can differ, else its tokens."""
    served, _ = load
    must_be_exact = exact(served)
    for one, is_exact in zip(served, must_be_exact, strict=True):
        if one.answer.tokens:
            cold = engine.cold(one.ask.prompt, len(one.answer.tokens))
            (assert_same_bits if is_exact else assert_same_tokens)(one.answer, cold)


def test_the_load_covers_what_it_says(load: tuple[list[Served], Seen]) -> None:
    served, seen = load
    hits = [one.answer.cached_len > 0 for one in served]
    assert sum(hit and is_exact for hit, is_exact in zip(hits, exact(served), strict=True)) >= 10
    assert seen.preempted > 0
    assert seen.largest_batch >= 6
    assert seen.ahead > 100  # Steps scheduled before the last one's tokens were known.
    cut = [one for one in served if len(one.answer.tokens) < one.ask.max_tokens]
    assert len(cut) == 3 and any(not one.answer.tokens for one in cut)
    hit_tokens = sum(one.answer.cached_len for one in served)
    print(f"{len(served)} requests, {sum(hits)} hits, {hit_tokens} tokens; {vars(seen)}")
