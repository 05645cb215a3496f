"""Tests of steps with drafts: overlap, memory, failed commits, and the line on the start screen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.plugins.speculation.draft_manager import Drafting, DraftLength, Source
from tests.engine.drafted import MakeEngine, ScriptedDrafter, drafting_engine, prompts
from tests.oracle import OracleRunner, OracleSampler


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(drafting_engine, tmp_path)


def test_the_next_step_waits_for_drafts_of_an_aborted_request() -> None:
    """Check that a step with drafts is committed before the next one, even if its request has left.

    A runner can commit the drafts of its newest batch only.
    """
    drafter = ScriptedDrafter(lambda done, most: most)
    prompts = [list(range(100)), list(range(100, 200))]
    engine = Engine(
        EngineConfig(check=True, overlap="on"),
        runner=OracleRunner(1024, 8),
        sampler=OracleSampler(),
        drafting=Drafting([Source(drafter, partial(DraftLength, 4))], max_verified=20),
    )
    num_drafts: list[int] = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        num_drafts.append(sum(segment.num_drafts for segment in batch.segments))
        return forward(batch, *drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=40)
    plain = Engine(EngineConfig(), runner=OracleRunner(1024, 8), sampler=OracleSampler())
    expected = plain.generate(prompts, params)
    drafter.learn(expected)
    leaving = engine.submit(prompts[0], params)
    while not (num_drafts and num_drafts[-1]):
        engine.step()
    engine.abort(leaving)
    (output,) = engine.generate(prompts[1:], params)
    assert output.token_ids == expected[1].token_ids


def test_entries_published_by_a_failed_commit_are_forgotten(make_engine: MakeEngine) -> None:
    """Check that published entries are forgotten after a failed commit.

    The runner's commit writes their states, so a hit would resume from memory that was never
    written.
    """
    params = SamplingParams(max_tokens=12, temperature=0)
    plain = make_engine().generate(prompts(), params)
    drafter = ScriptedDrafter(lambda done, most: most)
    drafter.learn(plain)
    engine = make_engine(drafter)
    commit, num_cached = engine.runner.commit, []

    def fail_once(batch: Any, taken: Any) -> None:
        if not num_cached:
            num_cached.append(engine.report().kv.cached)
            raise MemoryError
        commit(batch, taken)

    engine.runner.commit = fail_once  # type: ignore[method-assign]
    for prompt in prompts():
        engine.submit(prompt, params)
    with pytest.raises(MemoryError):
        while engine.has_work():
            engine.step()
    assert num_cached[0] > 0 == engine.report().kv.cached
    engine.check()
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert engine.report().kv.held == 0
