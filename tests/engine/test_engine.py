"""Tests of the engine through its public interface, on a runner that proves every read."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine import (
    Engine,
    EngineConfig,
    RequestOutput,
    RequestSpec,
    SamplingParams,
    engine_config,
)
from engine.interfaces import StepReport
from engine.schedule.batch import Batch
from engine.text.tokenizer import ByteTokenizer
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import parse_placement
from hybridcache.scheduling import cache_manager
from tests.lease_log import LeaseLog, logged_lease, replay
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


def test_forked_prompts_share_the_common_prefix() -> None:
    engine = make_engine()
    prompts = [ids(640) + ids(70, first=100 + i) for i in range(5)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=1))
    assert [output.cached_len for output in outputs] == [0, 640, 640, 640, 640]


@pytest.mark.parametrize("settings", [{"checkpoints": ("none",)}, {"prefix_cache": "none"}])
def test_equal_prompts_do_not_wait_if_nothing_is_cached(settings: dict[str, object]) -> None:
    engine = make_engine(**settings)
    outputs = engine.generate([ids(320)] * 2, SamplingParams(max_tokens=1))
    assert [output.cached_len for output in outputs] == [0, 0]
    assert outputs[0].num_preemptions == outputs[1].num_preemptions == 0
    assert engine.runner.num_steps == 1


def test_a_request_does_not_wait_for_a_prefix_that_is_cached() -> None:
    engine = make_engine()
    engine.generate([ids(640)], GREEDY)
    engine.submit(ids(640), SamplingParams(max_tokens=1), prompt_logprobs=0)
    engine.submit(ids(640), SamplingParams(max_tokens=1))
    assert [output.cached_len for output in engine.step()] == [0, 576]


def test_the_youngest_request_is_preempted_first() -> None:
    engine = make_engine(kv_tokens=512, token_budget=256)
    answers = SamplingParams(max_tokens=130)
    outputs = engine.generate([ids(140), ids(140), ids(70, first=99)], answers)
    assert outputs[1].timings.queue_s > outputs[2].timings.queue_s
    assert [output.num_preemptions > 0 for output in outputs] == [False, False, True]


def test_chunks_end_on_the_grid_or_at_the_end() -> None:
    engine = make_engine(token_budget=150, max_running=4)
    seen: list[tuple[int, int]] = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: (  # type: ignore[method-assign]
        seen.extend((s.start, s.end) for s in batch.segments if not s.is_decode) or forward(batch)
    )
    engine.generate([ids(300), ids(90, first=50)], GREEDY)
    assert seen == [(0, 128), (128, 256), (256, 300), (0, 90)]


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


def test_waiting_for_the_device_is_reported_apart_from_commit_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: list[StepReport] = []
    now = [0.0]
    sampler = OracleSampler()
    launch = sampler.launch

    class SlowDraw:
        def __init__(self, drawn: Any) -> None:
            self.tokens = drawn.tokens
            self._drawn = drawn

        def wait(self) -> Any:
            now[0] += 1.0
            return self._drawn.wait()

    monkeypatch.setattr(sampler, "launch", lambda *given: SlowDraw(launch(*given)))
    engine = Engine(
        EngineConfig(),
        runner=OracleRunner(4096, 16),
        sampler=sampler,
        observer=reports.append,
        clock=lambda: now[0],
    )
    engine.generate([ids(10)], SamplingParams(max_tokens=3))
    assert [report.wait_s for report in reports] == [1.0] * 3
    assert {report.commit_s for report in reports} == {0.0}


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


@pytest.mark.parametrize(("overlap", "cached_len"), [("off", 128), ("on", 0)])
def test_a_state_beyond_the_end_is_not_saved(overlap: str, cached_len: int) -> None:
    """Check an answer that stops on the grid, at 128, without a slot for a copy.

    A step made ahead has advanced its own state by one token.
    """
    prompt = ids(100)
    [free] = make_engine().generate([prompt], SamplingParams(max_tokens=60))
    assert free.token_ids[28] not in free.token_ids[:28]
    placement = "branch,boundary,backoff,end"
    engine = make_engine(slots=2, overlap=overlap, checkpoints=placement)
    other = engine.submit(ids(10, first=200), SamplingParams(max_tokens=60))
    stop = SamplingParams(max_tokens=60, stop_token_ids=(free.token_ids[28],))
    [stopped] = engine.generate([prompt], stop)
    engine.abort(other)
    assert stopped.token_ids == free.token_ids[:29]
    turn = prompt + stopped.token_ids + [1, 2]
    [hit] = engine.generate([turn], GREEDY)
    [cold] = make_engine().generate([turn], GREEDY)
    assert (hit.cached_len, hit.token_ids) == (cached_len, cold.token_ids)


def test_requests_with_penalties_are_not_overlapped() -> None:
    engine = make_engine(overlap="on")
    num_late = record_late_tokens(engine)
    penalised = SamplingParams(max_tokens=20, frequency_penalty=0.5)
    [output] = engine.generate([ids(30)], penalised)
    assert len(output.token_ids) == 20 and not any(num_late)


def test_penalties_do_not_stop_the_overlap_of_other_requests() -> None:
    engine = make_engine(overlap="on")
    num_late = record_late_tokens(engine)
    prompts = [ids(30, first=40 * i) for i in range(4)]
    alone = [make_engine().generate([p], SamplingParams(max_tokens=20))[0] for p in prompts]
    rules = [SamplingParams(max_tokens=20, frequency_penalty=0.5 * (i == 2)) for i in range(4)]
    outputs = engine.generate(prompts, rules)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert num_late[:20] == [0] + [3] * 19


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
def test_the_next_turn_resumes_in_an_aborted_answer(overlap: str) -> None:
    engine = make_engine(overlap=overlap)
    streamed = engine.stream(ids(100), SamplingParams(max_tokens=1000))
    outputs = itertools.islice(streamed, 100)
    answer = [token for output in outputs for token in output.new_token_ids]
    streamed.close()  # Ends the request.
    [second] = engine.generate([ids(100) + answer + [1, 2, 3]], GREEDY)
    [alone] = make_engine().generate([ids(100) + answer + [1, 2, 3]], GREEDY)
    assert second.cached_len == 192
    assert second.token_ids == alone.token_ids


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


def test_a_discarded_stream_ends_its_request() -> None:
    engine = make_engine()
    stream = engine.stream(ids(5), GREEDY)
    assert engine.has_work()
    del stream
    assert not engine.has_work() and engine.step() == []


def test_streams_and_a_batch_can_be_read_in_turns() -> None:
    engine = make_engine()
    one, other = engine.stream(ids(5), GREEDY), engine.stream(ids(6), GREEDY)
    first = [next(one), next(other), next(one)]
    [batch] = engine.generate([ids(7)], GREEDY)
    first += [*one, *other]
    assert sum(len(output.new_token_ids) for output in first) == 16
    assert len(batch.token_ids) == 8


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


def test_outputs_of_a_request_share_their_text_and_prompt_scores() -> None:
    """Check that a step costs only its own tokens, however long prompt and answer are."""
    engine = make_engine(tokenizer=ByteTokenizer())
    sampling = SamplingParams(max_tokens=50, ignore_eos=True)
    spec = RequestSpec(ids(100), sampling, prompt_logprobs=0)
    outputs = [*engine.stream(spec)]
    assert len(outputs) == 50 and len(outputs[-1].text) > 9
    text = ""
    for output in outputs:
        text += output.new_text
        assert output.text == text
        assert output.all_text is outputs[0].all_text
        assert output.prompt_logprobs is outputs[0].prompt_logprobs
    assert len(outputs[-1].prompt_logprobs) == 100


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


@pytest.mark.full("True")
@pytest.mark.parametrize("exact", [False, True])
def test_a_lease_log_replays_the_same_on_a_fresh_cache(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = LeaseLog()
    monkeypatch.setattr(cache_manager, "Lease", logged_lease(log))
    engine = make_engine(kv_tokens=640, slots=6, token_budget=64, max_running=4, exact=exact)
    rng = np.random.default_rng(3)
    prompts = [ids(int(rng.integers(1, 300)), first=80 * int(rng.integers(3))) for _ in range(40)]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=120))
    assert any(output.num_preemptions for output in outputs)
    assert any(output.cached_len for output in outputs)
    memory = engine.runner.memory
    fresh = build_prefix_cache(
        CacheConfig(
            num_kv_tokens=640,
            num_slots=6,
            kv_bytes_per_token=memory.row_bytes,
            state_bytes=memory.state_bytes,
        )
    )
    again = replay(fresh, parse_placement(",".join(engine.config.checkpoints)), log)
    assert again.events == log.events
    assert fresh.stats.as_dict() == engine.report().usage
