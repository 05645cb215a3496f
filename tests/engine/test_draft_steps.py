"""What drafts do to the steps around them: which overlap, whose memory they may have, and what the
start says of it."""

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
from engine.testing.oracle import OracleRunner
from engine.testing.oracle_sampler import OracleSampler
from engine.worker.screen import start_screen
from tests.engine.drafted import Guesses, MakeEngine, guessing_engine, prompts


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(guessing_engine, tmp_path)


def test_states_are_planned_for_what_a_step_verifies() -> None:
    assert EngineConfig(overlap="on").num_step_states == 0
    assert engine_config(draft="tree").num_step_states == 4 * 9
    assert engine_config(draft="tree:3", max_running=2).num_step_states == 8
    assert SpeculationConfig(draft="tree,mtp:4").drafters == {"tree": 8, "mtp": 4}


def test_only_steps_without_drafts_overlap(make_engine: MakeEngine) -> None:
    """Where drafts do not pay the device is given the next step before this one is committed;
    a step with drafts, and the one before it, are committed first. The answers are the same."""
    params = SamplingParams(max_tokens=60, temperature=0, logprobs=2)
    guesses = Guesses(lambda done, most: 0)
    plain = make_engine().generate(prompts(), params)
    guesses.learn(plain)
    engine = make_engine(guesses, overlap="on")
    told: list[tuple[bool, bool]] = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        drafts = any(segment.num_drafts for segment in batch.segments)
        told.append((bool(batch.late_tokens), drafts))
        return forward(batch, *drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    (output,) = engine.generate(prompts()[:1], params)
    assert (output.token_ids, output.logprobs) == (plain[0].token_ids, plain[0].logprobs)
    assert output.drafts.drafted.total() >= 4
    assert not any(is_late and drafts for is_late, drafts in told)
    assert sum(is_late for is_late, _ in told) > 40
    for (is_late, _), (_, drafts_before) in zip(told[1:], told, strict=False):
        assert not (is_late and drafts_before)
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert [o.logprobs for o in outputs] == [o.logprobs for o in plain]


def test_the_start_says_what_drafts_take_and_what_they_exclude(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:3")
    engine.runner.weights_note = "seeded"
    screen = start_screen(engine, "")
    (line,) = [line for line in screen.splitlines() if line.startswith("  drafts")]
    assert "tree:3: up to 3 tokens a request; up to 16 verified a step, whose states take" in line
    assert "drafts" not in start_screen(make_engine(), "")


def test_a_step_waits_for_drafts_whose_request_has_left() -> None:
    """A runner commits the drafts of its newest batch alone. So nobody is computed between a step
    and its drafts' commit, though nobody who runs wants a guess any more."""
    guesses = Guesses(lambda done, most: most)
    prompts = [list(range(100)), list(range(100, 200))]
    engine = Engine(
        EngineConfig(check=True, overlap="on"),
        runner=OracleRunner(1024, 8),
        sampler=OracleSampler(),
        drafting=Drafting([Source(guesses, partial(DraftLength, 4))], max_verified=20),
    )
    told: list[int] = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        told.append(sum(segment.num_drafts for segment in batch.segments))
        return forward(batch, *drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=40)
    plain = Engine(EngineConfig(), runner=OracleRunner(1024, 8), sampler=OracleSampler())
    expected = plain.generate(prompts, params)
    guesses.learn(expected)
    leaving = engine.submit(prompts[0], params)
    while not (told and told[-1]):
        engine.step()
    engine.abort(leaving)
    (output,) = engine.generate(prompts[1:], params)
    assert output.token_ids == expected[1].token_ids


def test_a_guess_takes_no_memory_from_others() -> None:
    """There are rows for the next tokens of both, not for four guesses of the older: it goes on
    without, and the younger is not preempted."""
    guesses = Guesses(lambda done, most: most)
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
    guesses.learn(plain)
    outputs = serve(Drafting([Source(guesses, partial(DraftLength, 4))], max_verified=20))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]
    assert [output.num_preemptions for output in (*plain, *outputs)] == [0] * 4
    assert outputs[0].drafts.accepted.total() > 40


def test_memory_is_nobody_elses_while_a_verification_is_in_flight(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=30, temperature=0)
    guesses = Guesses(lambda done, most: done % (most + 1))
    plain = make_engine().generate(prompts(), params)
    guesses.learn(plain)
    engine = make_engine(guesses, overlap="on")
    told: list[bool] = []

    class Other(StepHooks):
        def before_step(self) -> None:
            told.append(engine._scheduler.must_commit)

    engine._hooks = (Other(),)
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert told and not any(told)


def test_what_a_commit_published_that_broke_off_is_forgotten(make_engine: MakeEngine) -> None:
    """The states of a verification are where the runner's commit puts them: a hit on what was
    published before it would resume from what nobody wrote."""
    params = SamplingParams(max_tokens=12, temperature=0)
    plain = make_engine().generate(prompts(), params)
    guesses = Guesses(lambda done, most: most)
    guesses.learn(plain)
    engine = make_engine(guesses)
    commit, broken = engine.runner.commit, []

    def breaks(batch: Any, taken: Any) -> None:
        if not broken:
            broken.append(engine.report().kv.cached)
            raise MemoryError
        commit(batch, taken)

    engine.runner.commit = breaks  # type: ignore[method-assign]
    for prompt in prompts():
        engine.submit(prompt, params)
    with pytest.raises(MemoryError):
        while engine.has_work():
            engine.step()
    assert broken[0] > 0 == engine.report().kv.cached
    engine.check()
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert engine.report().kv.held == 0


def test_answers_to_others_are_guessed_from_until_the_cache_is_emptied(
    make_engine: MakeEngine,
) -> None:
    """Another prompt, which the tree does not know, that comes to where an earlier text was."""
    engine = make_engine(draft="tree")
    params = SamplingParams(max_tokens=20, temperature=0)
    (first,) = engine.generate(prompts()[:1], params)
    text = [*prompts()[0], *first.token_ids]

    def guessed() -> int:
        (output,) = engine.generate([[250, 251, *text[5:-12]]], params)
        return output.drafts.drafted.total()

    engine.generate([[249, *text]], SamplingParams(max_tokens=2, temperature=0))
    assert guessed() > 0
    engine.reset_prefix_cache()
    assert guessed() == 0
