"""Tests of steps with drafts: overlap, memory, failed commits, and the line on the start screen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import SamplingParams
from tests.engine.drafted import MakeEngine, ScriptedDrafter, drafting_engine, prompts


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(drafting_engine, tmp_path)


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
