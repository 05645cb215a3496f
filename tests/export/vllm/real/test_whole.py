"""Our scheduler in vLLM on a CPU: hits equal cold runs, and nothing leaks.

The load has chats, branches, edits, preemption, aborts and several prompts in one batch, in a pool
that is too small for it. Asynchronous scheduling is forced on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import pytest

from tests.export.vllm.real.engine import (
    GRID,
    Answer,
    Ask,
    Engine,
    assert_same_bits,
    assert_same_tokens,
    force_async_scheduling,
    words,
    write_model,
)

SCHEDULER = os.environ.get("SCHEDULER", "hybridcache.vllm.HybridScheduler")
NUM_BLOCKS = 44
"""Blocks of the pool: too few for the load."""


class Served(NamedTuple):
    """One request with its answer."""

    ask: Ask
    answer: Answer
    alone: bool
    """True if no other request was served at that time."""

    @property
    def tokens(self) -> list[int]:
        return [*self.ask.prompt, *self.answer.tokens]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    force_async_scheduling()
    yield Engine(
        write_model(tmp_path_factory.mktemp("model")),
        scheduler_cls=SCHEDULER,
        prefix_match_unit=GRID,
        num_gpu_blocks_override=NUM_BLOCKS,
        additional_config={"hybridcache": {"debug": True}},
    )


def batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield groups of ``size`` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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


@dataclass
class Load:
    """Requests served so far, and a source of random tokens."""

    engine: Engine
    served: list[Served] = field(default_factory=list)
    source: Iterator[int] = field(default_factory=lambda: words(5))

    def take(self, num_tokens: int) -> list[int]:
        return [*islice(self.source, num_tokens)]

    def serve(self, *asks: Ask) -> list[Served]:
        """Serve requests at once."""
        answers = self.engine.serve(asks)
        new = [Served(*pair, len(asks) == 1) for pair in zip(asks, answers, strict=True)]
        self.served += new
        return new

    def chats(self, at_once: int) -> list[list[int]]:
        """Serve six conversations of four turns. Returns their histories."""
        system = self.take(200)
        histories = [[*system, *self.take(60)] for _ in range(6)]
        for turn in range(4):
            for group in batched(histories, at_once):
                asks = [Ask(tuple(h), 8 + len(h) % 13) for h in group]
                for history, one in zip(group, self.serve(*asks), strict=True):
                    history[:] = [*one.tokens, *self.take(40 + 30 * turn)]
        return histories

    def branches_and_edits(self, history: list[int], at_once: int) -> None:
        """Continue a conversation in three ways, change its middle, and continue from there."""
        branches = [Ask((*history, *self.take(50))) for _ in range(3)]
        edited = [*history[:300], *self.take(30), *history[330:]]
        edits = [Ask(tuple(edited)), Ask((*edited, *self.take(70)))]
        for group in batched([*branches, *edits], at_once):
            self.serve(*group)

    def aborts(self, beside: list[int]) -> None:
        """Abort requests in the prompt and in the answer, then ask for their beginnings."""
        longs = [tuple(self.take(1300)) for _ in range(3)]
        ends = (2, 5, 14)
        asks = [Ask(long, 40, abort_after=end) for long, end in zip(longs, ends, strict=True)]
        self.serve(*asks, Ask(tuple(beside)))
        self.serve(*(Ask((*long[:1000], *self.take(40))) for long in longs))

    def crowd(self) -> None:
        """Serve eight answers that all need new blocks, then continue them."""
        prompts = [tuple(self.take(250)) for _ in range(8)]
        answers = self.serve(*(Ask(prompt, 150) for prompt in prompts))
        self.serve(*(Ask((*one.tokens, *self.take(30))) for one in answers))


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
