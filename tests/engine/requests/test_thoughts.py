"""Tests of the reasoning budget: reasoning ends exactly there if it has not ended, however it is
computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Engine, SamplingParams
from engine.requests.logit_rules import END, FREE, ReasoningBudget, Ruling, packed
from engine.text.tokenizer_files import HFTokenizer
from tests.engine.test_engine import make_engine as make_oracle_engine

TOKENIZER = HFTokenizer()
ENDING = TOKENIZER.encode(END)
OPEN, CLOSE = TOKENIZER.encode("<think></think>")
TEXTS = st.lists(st.sampled_from([*b"ab \n<", OPEN, CLOSE, 258]), max_size=12)


@given(TEXTS, st.integers(0, 6), st.booleans(), TEXTS)
def test_reasoning_is_ended_once_at_its_budget(
    first_part: list[int], budget: int, is_open: bool, second_part: list[int]
) -> None:
    """Compare with a reading of the whole text, in which the model writes both parts."""
    prompt = np.array([65, *([OPEN, 10] if is_open else [66])], np.int32)
    limit = ReasoningBudget(TOKENIZER, 320, prompt, budget)
    answer: list[int] = []
    for token in [*first_part, *second_part, *b"x" * 40]:
        [ruling] = limit.apply(np.array(answer, np.int32), np.empty(0, np.int32), [FREE])
        mask = ruling.mask
        if mask is not None:
            [token] = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        answer.append(token)
    whole = [*first_part, *second_part, *b"x" * 40]
    first = budget + (not is_open)
    text = TOKENIZER.decode(whole[:first], skip_special_tokens=False)
    thinks = "</think>" not in text and (is_open or text.lstrip().startswith("<think>"))
    if thinks:
        whole[first : first + len(ENDING)] = ENDING
    assert answer == whole


def test_a_grammar_that_excludes_the_end_of_reasoning_keeps_it_excluded() -> None:
    limit = ReasoningBudget(TOKENIZER, 320, np.array([OPEN, 10], np.int32), 2)
    answer, none = np.array([65, 66], np.int32), np.empty(0, np.int32)
    possible, excluding = packed([ENDING[0], 67], 320), packed([67], 320)
    [ended] = limit.apply(answer, none, [Ruling(possible)])
    [kept] = limit.apply(answer, none, [Ruling(excluding)])
    assert ended.is_final and ended.mask is not None
    assert np.flatnonzero(np.unpackbits(ended.mask, bitorder="little")).tolist() == ENDING[:1]
    assert kept == Ruling(excluding)


def make_engine(**settings: Any) -> Engine:
    return make_oracle_engine(tokenizer=HFTokenizer(), **settings)


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
def test_budgets_do_not_depend_on_engine_settings(settings: dict[str, Any]) -> None:
    free = SamplingParams(max_tokens=60, ignore_eos=True)
    params = SamplingParams(max_tokens=60, ignore_eos=True, thinking_token_budget=20)
    exact = {"exact": settings.get("exact", False)}
    unbounded = make_engine(**exact).generate(prompts(), free)
    plain = make_engine(**exact).generate(prompts(), params)
    for output, other in zip(plain, unbounded, strict=True):
        before = other.token_ids[:20]
        assert output.token_ids[:20] == before
        has_ended = CLOSE in before
        assert (output.token_ids[20 : 20 + len(ENDING)] == ENDING) != has_ended
        assert "\n</think>\n\n" in output.text or has_ended
    assert any(CLOSE not in output.token_ids[:20] for output in plain)
    engine = make_engine(**settings)
    for _ in range(2):
        outputs = engine.generate(prompts(), params)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
