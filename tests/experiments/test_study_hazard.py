"""The best online rule in hindsight, on prompts whose best rule can be told by eye."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.lab import QWEN3_NEXT
from experiments.study_hazard import Tips, hit_rates, information_bits, read_tips
from hybridcache.lab.trace import Trace, TraceRequest

KV = QWEN3_NEXT.kv_bytes_per_token


def two_kinds(number: int = 400) -> Tips:
    """Even prompts of 100 ids are continued two requests later, odd ones of 100 ids and two turns
    never."""
    odd = np.arange(number) % 2
    return Tips(
        lengths=np.full(number, 100),
        answers=np.full(number, 1),
        turns=2 * odd,
        gaps=np.zeros(number, np.int64),
        ages=np.where(odd, 1000, 2),
        gains=np.where(odd, 0, 100),
        sizes=np.full(number, 10),
        sessions=np.arange(number),
        head_tokens=0,
        prompt_tokens=100 * number,
    )


def test_a_rule_that_tells_the_kinds_apart_reuses_all_with_little() -> None:
    tips = two_kinds()
    classes = tips.classes()
    # one even prompt every second request, kept for two: ten bytes all the time
    assert hit_rates(tips, classes["turns"], 10) == (
        pytest.approx(0.5),
        pytest.approx(0.5, abs=0.05),
    )
    blind, _ = hit_rates(tips, classes["nothing"], 10)
    assert blind == pytest.approx(0.25), "half of its bytes go to prompts that never come again"
    assert hit_rates(tips, classes["nothing"], 20)[0] == pytest.approx(0.5)


def test_information_is_a_bit_where_the_class_tells_all_and_none_where_it_tells_nothing() -> None:
    tips = two_kinds()
    classes = tips.classes()
    assert information_bits(classes["turns"], tips.gains > 0) == pytest.approx(1, abs=0.01)
    assert information_bits(classes["nothing"], tips.gains > 0) == pytest.approx(0, abs=0.01)


def test_tips_follow_a_session_and_leave_the_common_head_out() -> None:
    prompts = ([0, 1, 2], [0, 9, 8], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5])
    requests = tuple(
        TraceRequest(number, number, None, np.array(prompt, np.int32), np.zeros(0, np.int32))
        for number, prompt in enumerate(prompts)
    )
    tips = read_tips(Trace("four", 1, requests.__iter__))
    assert tips.turns.tolist() == [0, 0, 1, 2] and tips.gaps.tolist() == [0, 0, 2, 1]
    assert tips.gains.tolist() == [2, 0, 4, 0] and tips.ages.tolist() == [2, 3, 1, 1]
    assert tips.sessions.tolist() == [0, 1, 0, 0]
    assert tips.head_tokens == 3 and tips.prompt_tokens == 17
