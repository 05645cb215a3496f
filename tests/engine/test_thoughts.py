"""Reasoning that ends at its budget: just there, only if it has not ended, and in every way of
computing it the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Engine, EngineConfig, SamplingParams, engine_config
from engine.requests.logit_rules import END, ReasoningBudget
from engine.testing.oracle import OracleRunner
from engine.testing.oracle_sampler import OracleSampler
from engine.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
ENDING = TOKENIZER.encode(END)
OPEN, CLOSE = TOKENIZER.encode("<think></think>")
SAID = st.lists(st.sampled_from([*b"ab \n<", OPEN, CLOSE, 258]), max_size=12)


@given(SAID, st.integers(0, 6), st.booleans(), SAID)
def test_what_is_said_is_ended_once_at_its_budget(
    said: list[int], budget: int, is_open: bool, wanted: list[int]
) -> None:
    """Beside a plain reading of the whole text, in which the model says ``said`` of itself."""
    prompt = np.array([65, *([OPEN, 10] if is_open else [66])], np.int32)
    limit = ReasoningBudget(TOKENIZER, 320, prompt, budget)
    answer: list[int] = []
    for token in [*said, *wanted, *b"x" * 40]:
        mask = limit.mask(len(answer), np.array(answer, np.int32))
        if mask is not None:
            [token] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        answer.append(token)
    whole = [*said, *wanted, *b"x" * 40]
    first = budget + (not is_open)
    text = TOKENIZER.decode(whole[:first], skip_special_tokens=False)
    thinks = "</think>" not in text and (is_open or text.lstrip().startswith("<think>"))
    if thinks:
        whole[first : first + len(ENDING)] = ENDING
    assert answer == whole


def make_engine(**settings: Any) -> Engine:
    return Engine(
        engine_config(check=True, **settings),
        runner=OracleRunner(4096, 16, exact=bool(settings.get("exact"))),
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )


def prompts() -> list[list[int]]:
    return [[*(number + np.arange(30)).tolist(), OPEN, 10] for number in range(4)]


@pytest.mark.full("{}", "{'draft': 'tree:4', 'overlap': 'on'}", "{'exact': True}")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"overlap": "on"},
        {"draft": "tree:4"},
        {"draft": "tree:4", "overlap": "on"},
        {"exact": True},
        {"max_running": 2, "token_budget": 64},
    ],
    ids=str,
)
def test_it_is_the_same_however_it_is_computed(settings: dict[str, Any]) -> None:
    free = SamplingParams(max_tokens=60, ignore_eos=True)
    params = SamplingParams(max_tokens=60, ignore_eos=True, thinking_token_budget=20)
    exact = {"exact": settings.get("exact", False)}
    unbounded = make_engine(**exact).generate(prompts(), free)
    plain = make_engine(**exact).generate(prompts(), params)
    for output, other in zip(plain, unbounded, strict=True):
        before = other.token_ids[:20]
        assert output.token_ids[:20] == before
        ended = CLOSE in before
        assert (output.token_ids[20 : 20 + len(ENDING)] == ENDING) != ended
        assert "\n</think>\n\n" in output.text or ended
    assert any(CLOSE not in output.token_ids[:20] for output in plain)
    engine = make_engine(**settings)
    for _ in range(2):
        outputs = engine.generate(prompts(), params)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]


def test_only_the_step_at_the_budget_waits_for_the_one_before() -> None:
    engine = make_engine(overlap="on")
    late: list[int] = []
    forward = engine.runner.forward
    engine.runner.forward = lambda batch, drawn=(): (  # type: ignore[method-assign]
        late.append(len(batch.late_tokens)) or forward(batch, drawn)
    )
    params = SamplingParams(max_tokens=40, ignore_eos=True, thinking_token_budget=20)
    [output] = engine.generate(prompts()[:1], params)
    assert output.token_ids[20:24] == ENDING
    assert late[:40] == [0] + [1] * 19 + [0] + [1] * 19


def test_tokens_that_alone_are_allowed_stay_so() -> None:
    params = SamplingParams(max_tokens=30, thinking_token_budget=5, allowed_token_ids=(65, 66))
    [output] = make_engine().generate(prompts()[:1], params)
    assert set(output.token_ids) == {65, 66}


def test_without_a_tokenizer_there_is_nothing_to_end() -> None:
    engine = Engine(
        EngineConfig(), runner=OracleRunner(512, 4), sampler=OracleSampler(), tokenizer=None
    )
    with pytest.raises(ValueError, match="thinking_token_budget requires a tokenizer"):
        engine.generate([[1, 2]], SamplingParams(thinking_token_budget=3))
