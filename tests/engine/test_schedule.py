"""Tests of the scheduler: budget, order, memory, overlap, and requests that wait for a shared
prefix."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.interfaces import StepReport
from engine.requests.spec import SamplingInput
from tests.engine.test_engine import ids, make_engine
from tests.oracle import OracleDrawn, OracleRunner, OracleSampler


def answer(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens)


def run(engine: Engine) -> dict[str, list[int]]:
    """Return for each request the steps that gave it a token."""
    steps: dict[str, list[int]] = {}
    number = 0
    while engine.has_work():
        for output in engine.step():
            steps.setdefault(output.request_id, []).append(number)
        engine.check()
        number += 1
    return steps


def events(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the calls on leases."""
    seen: list[str] = []
    for name in ("begin", "preempt", "finish"):
        verb = getattr(engine._manager, name)

        def spy(request: Any, verb: Any = verb, name: str = name) -> Any:
            done = verb(request)
            seen.append(name if done is not False else f"{name} refused")
            return done

        monkeypatch.setattr(engine._manager, name, spy)
    return seen


@pytest.mark.parametrize("token_budget", [64, 100, 256])
def test_prefills_use_the_budget_left_by_decodes_or_one_tile(
    token_budget: int,
) -> None:
    reports: list[StepReport] = []
    engine = Engine(
        EngineConfig(token_budget=token_budget, max_running=8),
        runner=OracleRunner(8192, 32),
        sampler=OracleSampler(),
        observer=reports.append,
    )
    prompts = [ids(40 + 61 * i, first=17 * i) for i in range(12)]
    engine.generate(prompts, [answer(5 + 9 * (i % 5)) for i in range(12)])
    assert max(report.num_decode_tokens for report in reports) > 3
    for report in reports:
        room = max(token_budget - report.num_decode_tokens, 64)
        assert report.num_prefill_tokens <= room


def test_with_overlap_the_oldest_waits_one_step_for_memory() -> None:
    """Check that a younger request is preempted right after the step in flight, although it has
    rows for 16 tokens more."""
    engine = make_engine(kv_tokens=330, overlap="on", checkpoints=("none",))
    steps = [0]
    first = engine.submit(ids(100), answer(150))
    for number in range(1000):
        if number == 16:
            engine.submit(ids(90, first=99), answer(150))
        if any(output.request_id == first for output in engine.step()):
            steps.append(number)
        if len(steps) > 150:
            break
    assert max(later - one for one, later in itertools.pairwise(steps)) <= 3


def test_no_request_is_preempted_while_a_step_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard against a donated state that still changes."""
    engine = make_engine(kv_tokens=330, overlap="on")
    preempt, was_in_flight = engine._manager.preempt, []
    monkeypatch.setattr(
        engine._manager,
        "preempt",
        lambda request: (
            was_in_flight.append(request.scheduled_len > request.computed_len) or preempt(request)
        ),
    )
    engine.generate([ids(100), ids(90, first=99), ids(80, first=200)], answer(150))
    assert was_in_flight and not any(was_in_flight)


def test_memory_freed_by_preemption_goes_to_running_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(kv_tokens=330, max_running=2, checkpoints=("none",))
    seen = events(engine, monkeypatch)
    engine.submit(ids(100), answer(150))
    for _ in range(16):
        engine.step()
    engine.submit(ids(90, first=99), answer(150))
    engine.submit(ids(64, first=200), answer(1))
    run(engine)
    assert seen[:4] == ["begin", "begin", "preempt", "finish"]


@pytest.mark.parametrize("end", ["finishes", "is aborted"])
def test_an_ended_request_makes_room_while_others_run(end: str) -> None:
    engine = make_engine(kv_tokens=512)
    running = engine.submit(ids(64), answer(200))
    short = engine.submit(ids(64, first=100), answer(5 if end == "finishes" else 200))
    engine.step()
    large = engine.submit(ids(350, first=200), answer(1))
    engine.step()
    assert engine.num_waiting == 1
    if end == "is aborted":
        engine.abort(short)
    steps = run(engine)
    assert steps[large][0] < 10 < steps[running][-1]


@pytest.mark.parametrize("namespace", [None, "salt"])
def test_a_follower_is_admitted_as_soon_as_it_can_resume(
    namespace: str | None,
) -> None:
    """Guard against admission a step later, which cannot resume at its own last token."""
    engine = make_engine(token_budget=192)
    for _ in range(2):
        engine.submit(ids(640), answer(1), namespace=namespace)
    assert [engine.step() for _ in range(3)] == [[], [], []]
    assert [output.cached_len for output in engine.step()] == [0, 576]


def test_a_follower_does_not_wait_for_a_preempted_leader() -> None:
    engine = make_engine(kv_tokens=512, token_budget=64, checkpoints=("end",))
    engine.submit(ids(128, first=50), answer(200))
    while not engine.step():
        pass
    leader = engine.submit(ids(320), answer(1))
    follower = engine.submit(ids(320), answer(1))
    steps = run(engine)
    assert steps[leader] and steps[follower]


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_draws_are_numbered_from_zero_with_and_without_overlap(overlap: str) -> None:
    class Recorder(OracleSampler):
        def launch(
            self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]
        ) -> OracleDrawn:
            for request in requests:
                draws.setdefault(request.seed, []).append(request.draw)
            return super().launch(logits, requests, rows)

    draws: dict[int, list[int]] = {}
    engine = Engine(
        EngineConfig(overlap=overlap, token_budget=64),
        runner=OracleRunner(2048, 8),
        sampler=Recorder(),
    )
    seeded = [SamplingParams(max_tokens=12, seed=seed) for seed in (1, 2)]
    engine.generate([ids(10), ids(200)], seeded)
    assert draws == {1: list(range(12)), 2: list(range(12))}


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_scores_of_a_preempted_prompt_are_reported_once(overlap: str) -> None:
    engine = make_engine(kv_tokens=384, token_budget=64, overlap=overlap)
    engine.submit(ids(120, first=50), answer(140))
    engine.step()
    scored = engine.submit(ids(250), answer(2), prompt_logprobs=0)
    last: dict[str, RequestOutput] = {}
    while engine.has_work():
        last.update((output.request_id, output) for output in engine.step())
    [cold] = make_engine().generate([ids(250)], answer(2), prompt_logprobs=0)
    assert last[scored].prompt_logprobs == cold.prompt_logprobs


def test_decodes_come_before_an_older_prompt_admitted_later() -> None:
    """Check a prompt that waited for a shared prefix; the runner asserts the order."""
    engine = make_engine(token_budget=128)
    prompts = [ids(320), ids(320) + ids(300, first=77), ids(10, first=200)]
    outputs = engine.generate(prompts, answer(40))
    alone = [make_engine().generate([prompt], answer(40))[0].token_ids for prompt in prompts]
    assert outputs[1].cached_len == 320
    assert [output.token_ids for output in outputs] == alone


def test_a_prompt_without_a_draw_has_no_row_of_drawn_tokens() -> None:
    engine = make_engine(overlap="on")
    engine.submit(ids(50), answer(0), prompt_logprobs=0)
    other = engine.submit(ids(60, first=90), answer(9))
    assert run(engine)[other] == list(range(1, 10))


def test_a_preempted_request_is_queued_before_later_ones() -> None:
    engine = make_engine(kv_tokens=330, max_running=2, checkpoints=("none",))
    for i in range(4):
        engine.submit(ids(100, first=80 * i), answer(120))
    steps = run(engine)  # It checks the order of both lists after every step.
    ends = [steps[f"request-{i}"][-1] for i in range(4)]
    assert ends == sorted(ends)


def test_the_token_of_an_aborted_request_is_dropped() -> None:
    """Check the other request, which comes after the aborted one in the step in flight."""
    engine = make_engine(overlap="on")
    aborted = engine.submit(ids(10), answer(50))
    running = engine.submit(ids(20, first=90), answer(20))
    for _ in range(4):
        engine.step()
    engine.abort(aborted)
    tokens: list[int] = []
    while engine.has_work():
        tokens += [t for o in engine.step() if o.request_id == running for t in o.new_token_ids]
    [alone] = make_engine().generate([ids(20, first=90)], answer(20))
    assert tokens == alone.token_ids[-len(tokens) :]
