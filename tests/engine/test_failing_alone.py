"""Tests of faults in one request or one step: other answers are kept, and every caller gets a
result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.requests import request as requests
from engine.requests.request import Request, RequestSpec
from engine.schedule.scheduler import Batch
from engine.text.grammar import Grammar
from engine.text.tokenizer import StreamDecoder
from engine.text.tokenizer_files import HFTokenizer
from hybridcache import Lease
from hybridcache.radix.tokens import Tokens
from tests.engine.drafted import ScriptedDrafter, assert_same, drafting_engine, prompts
from tests.engine.test_engine import ids, make_engine
from tests.oracle import OracleRunner, OracleSampler

ANSWER = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("fails_on", ["push", "flush"])
def test_a_detokenizer_error_fails_only_its_request(
    fails_on: str, overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [ids(70 + i, 40 * i) for i in range(4)]
    expected = make_engine(tokenizer=HFTokenizer()).generate(prompts, ANSWER)
    engine = make_engine(tokenizer=HFTokenizer(), overlap=overlap)
    decoders = [StreamDecoder(engine.tokenizer) for _ in prompts]
    setattr(decoders[2], fails_on, Mock(side_effect=KeyError("Ā")))
    monkeypatch.setattr(requests, "StreamDecoder", Mock(side_effect=decoders))
    outputs = engine.generate(prompts, ANSWER)
    for i, (output, alone) in enumerate(zip(outputs, expected, strict=True)):
        if i == 2:
            assert output.finish_reason == "error" and output.error == "KeyError: 'Ā'"
        else:
            assert (output.token_ids, output.text) == (alone.token_ids, alone.text)
            assert output.finish_reason == "length" and output.error is None
    assert not engine.has_work()
    engine.check()


def test_a_detokenizer_error_at_an_abort_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(tokenizer=HFTokenizer())
    decoder = Mock(wraps=StreamDecoder(engine.tokenizer))
    decoder.flush.side_effect = KeyError("boom")
    monkeypatch.setattr(requests, "StreamDecoder", Mock(return_value=decoder))
    name = engine.submit(ids(70), ANSWER)
    while not engine.step():
        pass
    output = engine.abort(name)
    assert output is not None
    assert (output.finish_reason, output.error) == ("error", "KeyError: 'boom'")
    assert not engine.has_work()
    engine.check()


def poison(engine: Engine, from_len: int) -> Callable[[], None]:
    """Make logits in the namespace "bad" NaN from ``from_len`` tokens on. Return a function that
    undoes it."""
    forward = engine.runner.forward

    @torch.inference_mode()
    def poisoned(batch: Batch, *drawn: object) -> torch.Tensor:
        logits, first = forward(batch, *drawn).clone(), 0
        for segment in batch.segments:
            rows = range(first, first := first + segment.num_logits)
            lens = range(segment.end - len(rows) + 1, segment.end + 1)
            for row, length in zip(rows, lens, strict=True):
                if segment.namespace == "bad" and length >= from_len:
                    logits[row, 3] = torch.nan
        return logits

    engine.runner.forward = poisoned

    def undo() -> None:
        engine.runner.forward = forward

    return undo


KINDS: dict[str, dict[str, object]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"seed": 5, "logprobs": 2},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3},
    "guided": {"temperature": 0.0},
}


@pytest.mark.full(
    "overlap-greedy-0",
    "drafts-greedy-4",
    "in turn-greedy-4",
    "overlap-guided-4",
    "overlap-sampled-4",
)
@pytest.mark.parametrize(
    ("mode", "kind", "num_good"),
    [
        *((mode, "greedy", num) for mode in ("overlap", "in turn", "drafts") for num in (0, 4)),
        *((mode, "guided", 4) for mode in ("overlap", "drafts")),
        *(("overlap", kind, 4) for kind in ("sampled", "penalised")),
    ],
)
def test_nan_logits_fail_only_their_request(
    mode: str, kind: str, num_good: int, tmp_path: Path
) -> None:
    """Check that the tokens before are reported, other requests go on, and the failed step is not
    cached."""
    grammar = Grammar.of_regex("[a-z ]{30}") if kind == "guided" else None
    params = SamplingParams(max_tokens=12, ignore_eos=grammar is None, **KINDS[kind])
    specs = [RequestSpec(prompt, params, grammar=grammar) for prompt in prompts()]
    bad = RequestSpec([*range(100)], params, namespace="bad", grammar=grammar)
    specs.insert(2, bad)
    drafter = ScriptedDrafter(lambda done, most: most) if mode == "drafts" else None
    clean = drafting_engine(tmp_path, overlap="on" if mode == "overlap" else "off")
    expected = clean.generate(specs)
    if drafter is not None:
        drafter.learn(expected)
    engine = drafting_engine(tmp_path, drafter, overlap="on" if mode == "overlap" else "off")
    undo = poison(engine, len(bad.prompt) + num_good)
    engine.runner.commit = commit = Mock(wraps=engine.runner.commit)  # type: ignore[method-assign]
    outputs = engine.generate(specs)
    num_taken = []
    for batch, counts in (call.args for call in commit.call_args_list):
        drafted = (segment for segment in batch.segments if segment.num_drafts)
        verified = zip(drafted, counts, strict=True)
        num_taken += [count for segment, count in verified if segment.namespace == "bad"]
    assert num_taken[-1:] == [0] * (mode == "drafts" and num_good > 0)
    for output, alone in zip(outputs, expected, strict=True):
        if output.request_id == outputs[2].request_id:
            assert output.finish_reason == "error"
            assert output.token_ids == alone.token_ids[:num_good]
            assert f"token {num_good + 1} of the answer are NaN" in (output.error or "")
        else:
            assert_same([output], [alone])
    assert not engine.has_work()
    undo()
    [again] = engine.generate([bad])
    assert again.cached_len == (64 if num_good else 0)
    if drafter is None:
        assert again.token_ids == expected[2].token_ids


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_outputs_finished_by_a_failed_commit_are_returned(
    overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_token = SamplingParams(max_tokens=1, ignore_eos=True)
    engine = make_engine(tokenizer=HFTokenizer(), overlap=overlap)
    publish, remaining = Lease.publish, [1]

    def failing(lease: Lease, tokens: Tokens, end: int) -> None:
        if lease.prompt_len == 9 and remaining:
            remaining.pop()
            raise MemoryError("no room to publish")
        publish(lease, tokens, end)

    monkeypatch.setattr(Lease, "publish", failing)
    submitted = [engine.submit(ids(length, 50), one_token) for length in (8, 9, 10)]
    outputs: list[RequestOutput] = []
    with pytest.raises(MemoryError):
        while engine.has_work():
            outputs += engine.step()
    assert engine.interrupted == tuple(submitted[1:])
    while engine.has_work():
        outputs += engine.step()
        engine.check()
    assert sorted(output.request_id for output in outputs) == submitted
    assert {output.finish_reason for output in outputs} == {"length"}


def test_a_request_whose_rules_cannot_be_made_again_leaves_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step fails, and then the rules of one of its requests: it ends once, and the other goes
    on."""
    runner = OracleRunner(1024, 16)
    engine = Engine(EngineConfig(check=True), runner=runner, sampler=OracleSampler())
    names = [engine.submit([1, 2, number], SamplingParams(max_tokens=6)) for number in range(2)]
    engine.step()
    forward, make_rules = runner.forward, Request.make_rules

    def failing(*arguments: object) -> object:
        monkeypatch.setattr(runner, "forward", forward)
        raise RuntimeError("no step")

    def some(request: Request) -> None:
        if request.request_id == names[0]:
            raise MemoryError
        make_rules(request)

    monkeypatch.setattr(runner, "forward", failing)
    monkeypatch.setattr(Request, "make_rules", some)
    with pytest.raises(RuntimeError):
        engine.step()
    outputs = engine.take_outputs()
    while engine.has_work():
        outputs += engine.step()
    ends = {output.request_id: output.finish_reason for output in outputs if output.is_finished}
    assert ends == {names[0]: "error", names[1]: "length"}
    assert sum(output.is_finished for output in outputs) == 2
