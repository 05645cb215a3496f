"""Tests of steps with drafts: overlap, memory, failed commits, and the line on the start screen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, EngineConfig, RequestOutput, SamplingParams, engine_config
from engine.plugins.speculation import SpeculationConfig
from engine.plugins.speculation.draft_length import DraftLength
from engine.plugins.speculation.draft_manager import Drafting, Source
from engine.schedule.batch import StepHooks
from engine.worker.screen import start_screen
from tests.engine.drafted import MakeEngine, ScriptedDrafter, drafting_engine, prompts
from tests.oracle import OracleRunner, OracleSampler


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(drafting_engine, tmp_path)


def test_state_slots_are_reserved_for_the_tokens_of_a_verification() -> None:
    assert EngineConfig(overlap="on").num_step_states == 0
    assert engine_config(draft="tree").num_step_states == 4 * 9
    assert engine_config(draft="tree:3", max_running=2).num_step_states == 8
    assert SpeculationConfig(draft="tree,mtp:4").drafters == {"tree": 8, "mtp": 4}


def test_only_steps_without_drafts_overlap(make_engine: MakeEngine) -> None:
    """Check that neither a step with drafts nor the one before it overlaps, and that answers are
    the same.

    Where drafts do not pay, the next step is launched before this one is committed.
    """
    params = SamplingParams(max_tokens=60, temperature=0, logprobs=2)
    drafter = ScriptedDrafter(lambda done, most: 0)
    plain = make_engine().generate(prompts(), params)
    drafter.learn(plain)
    engine = make_engine(drafter, overlap="on")
    steps: list[tuple[bool, bool]] = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        drafts = any(segment.num_drafts for segment in batch.segments)
        steps.append((bool(batch.late_tokens), drafts))
        return forward(batch, *drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    (output,) = engine.generate(prompts()[:1], params)
    assert (output.token_ids, output.logprobs) == (plain[0].token_ids, plain[0].logprobs)
    assert output.drafts.drafted.total() >= 4
    assert not any(is_late and drafts for is_late, drafts in steps)
    assert sum(is_late for is_late, _ in steps) > 40
    for (is_late, _), (_, drafts_before) in zip(steps[1:], steps, strict=False):
        assert not (is_late and drafts_before)
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert [o.logprobs for o in outputs] == [o.logprobs for o in plain]


@pytest.mark.parametrize(("limit", "overlap"), [(None, "off"), (2, "off"), (2, "on")])
def test_only_steps_of_few_requests_have_drafts(
    limit: int | None, overlap: str, make_engine: MakeEngine
) -> None:
    """By default at most four requests decode in a step with drafts on a CPU."""
    params = SamplingParams(max_tokens=40, temperature=0)
    engine = make_engine(draft="tree:3", draft_running=limit, overlap=overlap)
    plain = make_engine().generate(prompts() * 2, params)
    counts: list[tuple[int, int]] = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        if all(segment.is_decode for segment in batch.segments):
            drafted = sum(bool(segment.num_drafts) for segment in batch.segments)
            counts.append((len(batch.segments), drafted))
        return forward(batch, *drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    outputs = engine.generate(prompts() * 2, params)
    outputs += engine.generate(prompts()[:2], params)
    assert [output.token_ids for output in outputs[: len(plain)]] == [
        output.token_ids for output in plain
    ]
    assert max(number for number, _ in counts) > 4
    assert max(number for number, drafted in counts if drafted) <= (limit or 4)


def test_the_start_screen_shows_the_memory_of_drafts(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:3")
    screen = start_screen(engine, "")
    (line,) = [line for line in screen.splitlines() if line.startswith("  drafts")]
    assert "tree:3: up to 3 tokens a request; up to 16 verified a step, whose states take" in line
    assert "drafts" not in start_screen(make_engine(), "")


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


def test_drafts_take_no_memory_from_other_requests() -> None:
    """Check that drafts are dropped if there are rows only for the next tokens of both requests.

    The younger request is not preempted.
    """
    drafter = ScriptedDrafter(lambda done, most: most)
    prompts = [list(range(100)), list(range(100, 200))]
    params = [SamplingParams(max_tokens=60), SamplingParams(max_tokens=2)]

    def serve(drafting: Drafting | None) -> list[RequestOutput]:
        engine = Engine(
            EngineConfig(check=True),
            runner=OracleRunner(204, 8),
            sampler=OracleSampler(),
            drafting=drafting,
        )
        return engine.generate(prompts, params)

    plain = serve(None)
    drafter.learn(plain)
    outputs = serve(Drafting([Source(drafter, partial(DraftLength, 4))], max_verified=20))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert [output.num_preemptions for output in (*plain, *outputs)] == [0] * 4
    assert outputs[0].drafts.accepted.total() > 40


def test_no_hook_runs_while_a_verification_is_in_flight(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=30, temperature=0)
    drafter = ScriptedDrafter(lambda done, most: done % (most + 1))
    plain = make_engine().generate(prompts(), params)
    drafter.learn(plain)
    engine = make_engine(drafter, overlap="on")
    must_commit: list[bool] = []

    class MemoryUser(StepHooks):
        def before_step(self) -> None:
            must_commit.append(engine._scheduler.must_commit)

    engine._hooks = (MemoryUser(),)
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert must_commit and not any(must_commit)


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


def test_texts_of_other_requests_are_drafted_from_until_a_reset(
    make_engine: MakeEngine,
) -> None:
    """Check drafts from earlier texts for a new prompt, which is not in the tree."""
    engine = make_engine(draft="tree")
    params = SamplingParams(max_tokens=20, temperature=0)
    (first,) = engine.generate(prompts()[:1], params)
    text = [*prompts()[0], *first.token_ids]

    def num_drafted() -> int:
        (output,) = engine.generate([[250, 251, *text[5:-12]]], params)
        return output.drafts.drafted.total()

    engine.generate([[249, *text]], SamplingParams(max_tokens=2, temperature=0))
    assert num_drafted() > 0
    engine.reset_prefix_cache()
    assert num_drafted() == 0
