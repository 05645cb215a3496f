"""Tests of drafts from a model's prediction head, compared with one token per step.

Tokens and bits of log-probabilities are the same. A draft depends only on the tokens before it: not
on chunks, hits, other requests or the length of verifications.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.plugins.speculation.drafters import HeadDrafter
from engine.requests.request import Request
from tests.engine.drafted import (
    GREEDY,
    SAMPLING,
    MakeEngine,
    assert_same,
    engine_with_head,
    prompts,
)


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, list[int]]:
    """Return a dict from the tokens so far to their draft.

    Two drafts after the same tokens must agree over their common length.
    """
    seen: dict[bytes, list[int]] = {}
    propose = HeadDrafter.propose

    def spy(self: HeadDrafter, wanted: Sequence[tuple[Request, int]]) -> Any:
        found = propose(self, wanted)
        for (request, most), tokens in zip(wanted, found, strict=True):
            assert len(tokens) <= most
            new, before = tokens.tolist(), seen.setdefault(request.tokens.tobytes(), [])
            assert all(one == other for one, other in zip(new, before, strict=False))
            before.extend(new[len(before) :])
        return found

    monkeypatch.setattr(HeadDrafter, "propose", spy)
    return seen


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(engine_with_head, tmp_path)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft even if no draft was ever accepted."""
    monkeypatch.setattr("engine.schedule.drafting.MIN_ACCEPTANCE", 0.0)


@pytest.mark.full("mtp:4-greedy", "tree,mtp:2-penalties")
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("draft", ["mtp:4", "tree,mtp:2"])
def test_drafts_of_a_head_do_not_change_answers(
    sampling: str, draft: str, make_engine: MakeEngine, drafts: Any, eager: None
) -> None:
    params, plain, drafted = SAMPLING[sampling], make_engine("none"), make_engine(draft)
    for _ in range(2):
        expected = plain.generate(prompts(), params)
        outputs = drafted.generate(prompts(), params)
        assert_same(outputs, expected)
    assert drafted.report().kv.held == drafted.report().slots.held == 0
    assert len(drafts) > 20


@pytest.mark.full("bfloat16")
@pytest.mark.parametrize(
    "numbers",
    [
        {"dtype": "bfloat16", "state_dtype": "bfloat16", "model": {"num_experts": 0}},
        {
            "model": {"num_experts": 0},
            "kernels": "linear=reference,attention=reference,gdn=reference,conv1d=reference",
        },
    ],
    ids=["bfloat16", "reference"],
)
def test_drafts_depend_only_on_the_tokens(
    numbers: dict[str, Any], make_engine: MakeEngine, drafts: dict[bytes, list[int]], eager: None
) -> None:
    """Compare drafts, by the fixture ``drafts``: cold, after hits, in large and small batches, of
    one to four tokens."""
    plain = make_engine("none", **numbers).generate(prompts(), GREEDY)
    for draft, settings in (
        ("mtp:4", {}),
        ("tree:6,mtp:3", {}),
        ("mtp:1", {"max_running": 2, "prefix_cache": "none", "token_budget": 64}),
    ):
        engine = make_engine(draft, **numbers, **settings)
        for _ in range(2 if "prefix_cache" not in settings else 1):
            for one, other in zip(engine.generate(prompts(), GREEDY), plain, strict=True):
                assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert 80 < len(drafts) < 6 * 40
