"""Tests of the engine through its public interface, on a runner that proves every read."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine import Engine, EngineConfig, RequestOutput, RequestSpec, SamplingParams
from engine.config import BUILTIN_DIR
from engine.engine import load_tokenizer_of
from engine.front.worker.screen import screen_rows
from engine.text.answers import Answer
from engine.text.tokenizer_files import HFTokenizer
from hybridcache import Lease
from tests.gguf_files import vocabulary, write_gguf
from tests.oracle import OracleDrawn, OracleRunner, OracleSampler, ticking_clock

GREEDY = SamplingParams(max_tokens=8)


def make_engine(
    kv_tokens: int = 4096,
    slots: int = 16,
    *,
    tokenizer: HFTokenizer | None = None,
    **settings: object,
) -> Engine:
    config = EngineConfig(check=True, **{"step_s": 0, **settings})
    runner = OracleRunner(kv_tokens, slots, exact=config.exact)
    parts = {"sampler": OracleSampler(), "tokenizer": tokenizer, "clock": ticking_clock()}
    return Engine(config, runner=runner, **parts)


def ids(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 320 for i in range(length)]


def test_outputs_on_their_way_repeat_no_facts() -> None:
    """The first one, the last one and the one after a preemption have them; readers have all."""
    engine = make_engine(256, max_running=2, page_size=1, max_queue=8)
    sampling, wired = SamplingParams(max_tokens=90), dict[str, list[RequestOutput]]()
    for first in (0, 100):
        request = engine.make(engine.validate(RequestSpec(ids(64, first), sampling)))
        engine.enqueue(request)
        wired[request.request_id] = []
    while engine.has_work():
        for output in engine.step():
            wired[output.request_id].append(output)
    num_complete = list[int]()
    for outputs in wired.values():
        changes = [b for a, b in pairwise(outputs) if a.num_preemptions != b.num_preemptions]
        complete = [one for one in outputs if one.losses is not None]
        num_complete.append(len({*map(id, (outputs[0], *changes, outputs[-1]))}))
        assert len(complete) == num_complete[-1] < len(outputs)
        answer, last = Answer(np.array(ids(64), np.int32)), outputs[0]
        for output in map(answer.add, outputs):
            last = output if output.num_tokens in {one.num_tokens for one in complete} else last
            assert (output.losses, output.cached_len) == (last.losses, last.cached_len)
            assert output.timings.ttft_s == outputs[0].timings.ttft_s is not None
            assert output.num_tokens == len(output.output)
    assert max(num_complete) > 2


def test_importing_the_engine_loads_no_torch() -> None:
    script = "import engine, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_process_that_answers_clients_loads_no_torch(tmp_path: Path) -> None:
    """Nor does reading a tokenizer, a config and the defaults of sampling from a GGUF file."""
    path = tmp_path / "model.gguf"
    write_gguf(gguf, BUILTIN_DIR, path, "Q4_0", vocabulary(BUILTIN_DIR, "qwen2"))
    script = """
import sys
from contextlib import closing
import engine.front.command.cli, engine.front.server.app, engine.front.worker.process_channel
from engine import EngineConfig
from engine.engine import load_tokenizer_of
from engine.requests.request import sampling_defaults
from engine.weights.model_config import read_config
for config in (EngineConfig(), EngineConfig(model=sys.argv[1])):
    assert load_tokenizer_of(config, None).encode("text")
    assert read_config(config.model_dir)["vocab_size"]
    assert sampling_defaults(config) == {}
assert "torch" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_steps_are_committed_while_the_device_computes_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check that a step is awaited, published and finished only after the next one is launched."""
    engine = make_engine(overlap="on")
    calls: list[str] = []
    for owner, name in (
        (engine.runner, "forward"),
        (Lease, "publish"),
        (Lease, "finish"),
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


@pytest.mark.parametrize("token_budget", [64, 128, 1000])
def test_equal_prompts_that_arrive_together_are_computed_once(token_budget: int) -> None:
    engine = make_engine(token_budget=token_budget)
    outputs = engine.generate([ids(1000)] * 4, SamplingParams(max_tokens=5))
    assert [output.cached_len for output in outputs] == [0, 960, 960, 960]
    assert engine.runner.num_tokens_computed == 1000 + 3 * 40 + 4 * 4


def test_a_stream_yields_the_whole_answer_and_ends_when_closed() -> None:
    engine = make_engine(tokenizer=HFTokenizer())
    [whole] = engine.generate(["abc"], SamplingParams(max_tokens=30, ignore_eos=True, logprobs=1))
    pieces = list(engine.stream("abc", SamplingParams(max_tokens=30, ignore_eos=True, logprobs=1)))
    assert "".join(piece.new_text for piece in pieces) == whole.text == pieces[-1].text
    assert [t for piece in pieces for t in piece.new_token_ids] == whole.token_ids
    assert [s for piece in pieces for s in piece.new_logprobs] == whole.logprobs
    stream = engine.stream("abcd", SamplingParams(max_tokens=30, ignore_eos=True))
    next(stream)
    stream.close()
    assert not engine.has_work()
    engine.submit("abc")
    engine.end_request(*engine.requests)  # As plugins do.
    assert [output.finish_reason for output in engine.step()] == ["abort"]


def test_an_interrupt_leaves_the_engine_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()

    def interrupted(num_tokens: int) -> None:
        raise KeyboardInterrupt

    for run in (
        lambda: engine.generate([ids(100), ids(90, 7)], GREEDY),
        lambda: list(engine.stream(ids(100), GREEDY)),
    ):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(engine.cache, "allocate_kv", interrupted)
            run()
        assert not engine.has_work()
        assert len(engine.generate([ids(100)], GREEDY)[0].token_ids) == 8


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("call", ["allocate_kv", "forward", "publish"])
def test_ctrl_c_in_a_step_is_raised_after_it_and_loses_nothing(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives while the cache changes, in the forward pass, or in the commit."""
    engine = make_engine()
    expected = engine.generate([ids(100)], GREEDY)[0].token_ids
    owner = {"forward": engine.runner, "publish": Lease}.get(call, engine.cache)
    original = getattr(owner, call)

    def interrupted(*args: object) -> object:
        found = original(*args)
        signal.raise_signal(signal.SIGINT)
        return found

    engine.submit(ids(100), GREEDY)
    new: list[int] = []
    num_interrupts = 0
    while engine.has_work():
        with monkeypatch.context() as patched:
            patched.setattr(owner, call, interrupted)
            try:
                outputs = engine.step()
            except KeyboardInterrupt:
                num_interrupts += 1
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
                outputs = engine.take_outputs()
        new += [token for output in outputs for token in output.new_token_ids]
    engine.check()
    assert num_interrupts > 0 == engine.cache.stats.rebuilds
    assert new == expected


def test_an_error_in_the_cache_starts_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    expected = [output.token_ids for output in engine.generate([ids(100), ids(90)], GREEDY)]

    def failing(*_: object) -> None:
        raise MemoryError

    names = [engine.submit(prompt, GREEDY) for prompt in (ids(100), ids(90))]
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(engine.cache, "insert", failing)
        patched.setattr(engine.cache, "publish", failing)
        while True:
            engine.step()
    assert set(engine.interrupted) <= set(names)
    assert engine.report().usage["rebuilds"] == 1 and engine.cache.cached_tokens == 0
    outputs = {}
    while engine.has_work():
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check()
    assert [outputs[name].token_ids for name in names] == expected


def test_a_failure_during_admission_leaves_the_request_in_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A policy of a user may raise when the first rows of a request are allocated."""
    engine = make_engine()
    engine.submit(ids(100), GREEDY, request_id="r")

    def failing(num_tokens: int) -> object:
        raise ZeroDivisionError

    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(engine.cache, "allocate_kv", failing)
        engine.step()
    engine.check()
    assert engine.interrupted == ()
    outputs = [output for _ in range(12) for output in engine.step()]
    assert outputs[-1].num_tokens == 8 and outputs[-1].is_finished


def test_namespaces_share_nothing() -> None:
    engine = make_engine()
    engine.generate([ids(200)], GREEDY, namespace="one")
    [other] = engine.generate([ids(200)], GREEDY, namespace="other")
    [same] = engine.generate([ids(200)], GREEDY, namespace="one")
    assert (other.cached_len, same.cached_len) == (0, 192)


def test_grid_without_a_position_in_the_context_is_refused() -> None:
    """It would start, and reuse no prompt. The start screen points out one that is merely large."""
    small: Any = {"cache_gib": 0.05, "max_model_len": 2049}
    with pytest.raises(ValueError, match="grid 4096 must be less than the context of 2,049 tokens"):
        Engine(EngineConfig(**small, grid=4096))
    for grid in (1024, 2048):
        with closing(Engine(EngineConfig(**small, grid=grid))) as engine:
            rows = dict(screen_rows(engine, ""))
        assert ("no prompt of less than 2,048 tokens" in rows["prefix cache"]) == (grid == 2048)


def test_chat_template_is_that_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}")
    for name, said in ((str(file), "{{ messages"), ("tools-first", "# Tools")):
        tokenizer = load_tokenizer_of(EngineConfig(chat_template=name), None)
        assert tokenizer is not None and tokenizer.chat_template is not None
        assert said in tokenizer.chat_template.source
    with pytest.raises(ValueError, match=r"none.jinja cannot be read \(No such file"):
        load_tokenizer_of(EngineConfig(chat_template="none.jinja"), None)
