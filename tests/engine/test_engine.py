"""Tests of the engine through its public interface, on a runner that proves every read."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from engine import (
    Engine,
    EngineConfig,
    RequestOutput,
    SamplingParams,
    engine_config,
)
from engine.interfaces import StepReport
from engine.schedule.batch import Batch
from engine.text.tokenizer import ByteTokenizer
from tests.oracle import OracleDrawn, OracleRunner, OracleSampler

GREEDY = SamplingParams(max_tokens=8)


def make_engine(
    kv_tokens: int = 4096,
    slots: int = 16,
    *,
    tokenizer: ByteTokenizer | None = None,
    **settings: object,
) -> Engine:
    config = engine_config(check=True, **settings)
    runner = OracleRunner(kv_tokens, slots, exact=config.exact)
    return Engine(config, runner=runner, sampler=OracleSampler(), tokenizer=tokenizer)


def ids(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 320 for i in range(length)]


def record_late_tokens(engine: Engine) -> list[int]:
    """Return a list that collects, for each later step, its tokens that are only on the device."""
    num_late: list[int] = []
    forward = engine.runner.forward

    def spy(batch: Batch, drawn: Sequence[int] = ()) -> Any:
        num_late.append(len(batch.late_tokens))
        return forward(batch, drawn)

    engine.runner.forward = spy  # type: ignore[method-assign]
    return num_late


def test_importing_the_engine_loads_no_torch() -> None:
    script = "import engine, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_repeated_prompt_skips_its_cached_part() -> None:
    engine = make_engine()
    [cold] = engine.generate([ids(200)], GREEDY)
    computed = engine.runner.num_tokens_computed
    [hit] = engine.generate([ids(200)], GREEDY)
    assert (cold.cached_len, hit.cached_len) == (0, 192)
    assert cold.token_ids == hit.token_ids
    assert engine.runner.num_tokens_computed == computed + 8 + 7
    assert hit.losses.below_grid == 8 and sum(hit.losses) == 8


def test_the_next_turn_resumes_in_the_last_answer() -> None:
    engine = make_engine()
    [first] = engine.generate([ids(100)], SamplingParams(max_tokens=100))
    [second] = engine.generate([ids(100) + first.token_ids + [1, 2, 3]], GREEDY)
    assert second.cached_len == 192


@pytest.mark.parametrize("token_budget", [64, 128, 1000])
def test_equal_prompts_that_arrive_together_are_computed_once(token_budget: int) -> None:
    engine = make_engine(token_budget=token_budget)
    outputs = engine.generate([ids(1000)] * 4, SamplingParams(max_tokens=5))
    assert [output.cached_len for output in outputs] == [0, 960, 960, 960]
    assert engine.runner.num_tokens_computed == 1000 + 3 * 40 + 4 * 4


def test_a_request_does_not_wait_for_a_prefix_that_is_cached() -> None:
    engine = make_engine()
    engine.generate([ids(640)], GREEDY)
    engine.submit(ids(640), SamplingParams(max_tokens=1), prompt_logprobs=0)
    engine.submit(ids(640), SamplingParams(max_tokens=1))
    assert [output.cached_len for output in engine.step()] == [0, 576]


def test_a_running_request_decodes_while_another_prefills() -> None:
    reports: list[StepReport] = []
    config = EngineConfig(token_budget=64)
    engine = Engine(
        config,
        runner=OracleRunner(4096, 16),
        sampler=OracleSampler(),
        observer=reports.append,
    )
    engine.submit(ids(10), SamplingParams(max_tokens=20))
    engine.step()
    engine.submit(ids(640, first=9), SamplingParams(max_tokens=1))
    while engine.has_work():
        engine.step()
    mixed = [r for r in reports if r.num_prefill_tokens and r.num_decode_tokens]
    assert len(mixed) == 10


def engine_short_of_kv(**settings: object) -> tuple[Engine, list[list[int]]]:
    """Return an engine with room for the prompts of its requests but not for their answers."""
    engine = make_engine(kv_tokens=512, slots=12, token_budget=64, **settings)
    return engine, [ids(100, first=40 * i) for i in range(4)]


@pytest.mark.parametrize("exact", [False, True])
def test_preempted_requests_resume_from_their_published_prefix(exact: bool) -> None:
    engine, prompts = engine_short_of_kv(exact=exact)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=150, logprobs=0))
    alone = [
        make_engine(exact=exact).generate([p], SamplingParams(max_tokens=150, logprobs=0))[0]
        for p in prompts
    ]
    preempted = [output for output in outputs if output.num_preemptions]
    assert preempted and not outputs[0].num_preemptions
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert [o.logprobs for o in outputs] == [o.logprobs for o in alone]
    without_reuse = sum(100 + 150 for _ in prompts) + sum(250 for o in preempted)
    assert engine.runner.num_tokens_computed < without_reuse


def test_overlapped_steps_use_tokens_that_are_only_on_the_device() -> None:
    plain, overlapped = make_engine(), make_engine(overlap="on")
    num_late = record_late_tokens(overlapped)
    prompts = [ids(100, first=50 * i) for i in range(3)]
    expected = plain.generate(prompts, SamplingParams(max_tokens=30))
    outputs = overlapped.generate(prompts, SamplingParams(max_tokens=30))
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert num_late == [0] + [3] * 29
    assert overlapped.runner.num_tokens_computed == plain.runner.num_tokens_computed


def test_steps_are_committed_while_the_device_computes_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that a step is awaited, published and finished only after the next one is launched."""
    engine = make_engine(overlap="on")
    calls: list[str] = []
    for owner, name in (
        (engine.runner, "forward"),
        (engine._manager, "publish"),
        (engine._manager, "finish"),
        (OracleDrawn, "wait"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, f=original, n=name: (calls.append(n), f(*given))[1]
        )
    engine.generate([ids(100)], SamplingParams(max_tokens=4))
    # A prefill and three decodes; none is awaited before the next is launched.
    assert calls == [
        "forward",
        "forward",
        "wait",
        "publish",
        *["forward", "wait"] * 2,
        "wait",
        "finish",
    ]


def test_the_extra_step_of_a_stopped_answer_leaves_nothing() -> None:
    engine = make_engine(overlap="on")
    [free] = make_engine().generate([ids(100)], SamplingParams(max_tokens=60))
    stop = SamplingParams(max_tokens=60, stop_token_ids=(free.token_ids[27],))  # state at 127
    [stopped] = engine.generate([ids(100)], stop)
    while engine.has_work():
        engine.step()
    engine.check()
    assert stopped.token_ids == free.token_ids[:28]
    [turn] = engine.generate([ids(100) + stopped.token_ids + [1, 2]], GREEDY)
    [cold] = make_engine().generate([ids(100) + stopped.token_ids + [1, 2]], GREEDY)
    assert turn.token_ids == cold.token_ids


def test_an_abort_frees_everything_in_any_state_of_the_request() -> None:
    engine = make_engine(max_running=2, token_budget=64)
    prefilling = engine.submit(ids(300), GREEDY)
    decoding = engine.submit(ids(10, first=50), SamplingParams(max_tokens=100))
    waiting = engine.submit(ids(10, first=90), GREEDY)
    for _ in range(7):
        engine.step()
    again = engine.submit(ids(300, first=7), GREEDY)
    engine.step()
    for request_id in (again, prefilling, waiting, decoding):
        engine.abort(request_id)
        engine.check()
    report = engine.report()
    assert report.kv.held == report.slots.held == report.num_running == report.num_waiting == 0
    assert report.kv.free + report.kv.cached == report.kv.total
    assert engine.abort(decoding) is None


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("broken_step", [0, 2, 9])
def test_an_interrupted_step_loses_no_request(broken_step: int, overlap: str) -> None:
    prompts = [ids(200), ids(200), ids(90, first=70)]
    expected = make_engine().generate(prompts, SamplingParams(max_tokens=20))
    engine = make_engine(overlap=overlap, token_budget=64)
    forward, steps = engine.runner.forward, itertools.count()

    def interrupted(batch: Batch, drawn: Sequence[int] = ()) -> object:
        if next(steps) == broken_step:
            forward(Batch(batch.segments[:1], batch.restores, batch.row_writes), drawn)
            raise KeyboardInterrupt
        return forward(batch, drawn)

    engine.runner.forward = interrupted  # type: ignore[method-assign]
    for prompt in prompts:
        engine.submit(prompt, SamplingParams(max_tokens=20))
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work():
        with contextlib.suppress(KeyboardInterrupt):
            outputs.update((output.request_id, output) for output in engine.step())
        engine.check()
    for i, alone in enumerate(expected):
        assert outputs[f"request-{i}"].token_ids == alone.token_ids


def test_a_stream_yields_the_whole_answer_and_ends_when_closed() -> None:
    engine = make_engine(tokenizer=ByteTokenizer())
    [whole] = engine.generate(["abc"], SamplingParams(max_tokens=30, ignore_eos=True, logprobs=1))
    pieces = list(engine.stream("abc", SamplingParams(max_tokens=30, ignore_eos=True, logprobs=1)))
    assert "".join(piece.new_text for piece in pieces) == whole.text == pieces[-1].text
    assert [t for piece in pieces for t in piece.new_token_ids] == whole.token_ids
    assert [s for piece in pieces for s in piece.new_logprobs] == whole.logprobs
    stream = engine.stream("abcd", SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    stream.close()
    assert not engine.has_work()


def test_stop_tokens_and_stop_strings_end_an_answer() -> None:
    engine = make_engine(tokenizer=ByteTokenizer())
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    [free] = engine.generate([ids(20)], long)
    token = free.token_ids[10]
    [stopped] = engine.generate(
        [ids(20)], SamplingParams(max_tokens=60, ignore_eos=True, stop_token_ids=(token,))
    )
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    stop = free.text[12:15]
    [cut] = engine.generate([ids(20)], SamplingParams(max_tokens=60, ignore_eos=True, stop=stop))
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.index(stop)]
    assert len(cut.token_ids) < 60


def test_prompt_logprobs_read_no_cache_but_publish() -> None:
    engine = make_engine(token_budget=64)
    engine.generate([ids(200)], GREEDY)
    none = SamplingParams(max_tokens=0)
    [scored] = engine.generate([ids(200)], none, prompt_logprobs=0)
    assert (scored.cached_len, scored.token_ids, scored.finish_reason) == (0, [], "length")
    assert len(scored.prompt_logprobs) == 200 and scored.prompt_logprobs[0] is None
    [cold] = make_engine().generate([ids(200)], none, prompt_logprobs=0)
    assert cold.prompt_logprobs == scored.prompt_logprobs
    [fresh] = engine.generate([ids(200, first=9)], none, prompt_logprobs=0)
    [hit] = engine.generate([ids(200, first=9)], GREEDY)
    assert (fresh.cached_len, hit.cached_len) == (0, 192)


def test_namespaces_share_nothing() -> None:
    engine = make_engine()
    engine.generate([ids(200)], GREEDY, namespace="one")
    [other] = engine.generate([ids(200)], GREEDY, namespace="other")
    [same] = engine.generate([ids(200)], GREEDY, namespace="one")
    assert (other.cached_len, same.cached_len) == (0, 192)


def test_a_reset_removes_every_prefix() -> None:
    engine = make_engine()
    engine.generate([ids(200)], GREEDY)
    engine.reset_prefix_cache()
    assert engine.report().kv.cached == engine.report().slots.cached == 0
    [cold] = engine.generate([ids(200)], GREEDY)
    assert cold.cached_len == 0
