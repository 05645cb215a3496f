"""Tests of the scheduler: budget, order, memory, overlap, and requests that wait for a shared
prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from engine import Engine, RequestSpec, SamplingParams
from engine.requests.request import SamplingInput
from engine.schedule.report import StepReport
from tests.engine.test_engine import ids, make_engine
from tests.oracle import OracleDrawn, OracleSampler


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


@pytest.mark.parametrize("token_budget", [64, 100, 256])
def test_prefills_use_the_budget_left_by_decodes_or_one_tile(token_budget: int) -> None:
    reports: list[StepReport] = []
    engine = make_engine(8192, 32, token_budget=token_budget, max_running=8)
    engine.observers.append(reports.append)
    prompts = [ids(40 + 61 * i, first=17 * i) for i in range(12)]
    engine.generate(prompts, [answer(5 + 9 * (i % 5)) for i in range(12)])
    assert max(report.num_decode_tokens for report in reports) > 3
    for report in reports:
        room = max(token_budget - report.num_decode_tokens, 64)
        assert report.num_prefill_tokens <= room


@pytest.mark.parametrize("namespace", [None, "salt"])
def test_a_follower_is_admitted_as_soon_as_it_can_resume(namespace: str | None) -> None:
    """Guard against admission a step later, which cannot resume at its own last token."""
    engine = make_engine(token_budget=192)
    for _ in range(2):
        engine.submit(ids(640), answer(1), namespace=namespace)
    assert [engine.step() for _ in range(3)] == [[], [], []]
    assert [output.cached_len for output in engine.step()] == [0, 576]


def test_a_request_whose_admission_failed_gives_its_memory_back() -> None:
    engine = make_engine()
    engine.submit(ids(100), answer(1))
    scheduler = engine._scheduler
    [request] = scheduler.waiting
    assert scheduler.manager.begin(request) and request.lease.extend(64)
    assert scheduler.recover() == () and scheduler.manager.held() == (0, 0)
    engine.check()


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
    engine = make_engine(2048, 8, overlap=overlap, token_budget=64)
    engine._sampler = Recorder()
    seeded = [SamplingParams(max_tokens=12, seed=seed) for seed in (1, 2)]
    engine.generate([ids(10), ids(200)], seeded)
    assert draws == {1: list(range(12)), 2: list(range(12))}


def test_a_prompt_without_a_draw_has_no_row_of_drawn_tokens() -> None:
    engine = make_engine(overlap="on")
    engine.submit(ids(50), answer(0), prompt_logprobs=0)
    other = engine.submit(ids(60, first=90), answer(9))
    assert run(engine)[other] == list(range(1, 10))
    [scored] = engine.generate([RequestSpec(ids(50), answer(0), prompt_logprobs=0)])
    assert (scored.finish_reason, scored.token_ids) == ("length", [])
