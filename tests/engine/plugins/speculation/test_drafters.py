"""Tests of drafters: suffix lookup, draft lengths, and sharing a step between requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plugins.speculation import drafters
from engine.plugins.speculation.drafters import (
    MAX_KEPT,
    MAX_TEXTS,
    SIZES,
    SuffixDrafter,
    continuation,
)
from engine.schedule.drafting import MAX_REST, MIN_REST, DraftLength


def reference(texts: list[list[int]], size: int, most: int) -> list[int]:
    """Return the continuation of the latest run of ``size`` tokens that ends ``texts[0]``, in the
    first text that has one. In ``texts[0]`` it wraps around."""
    run = texts[0][-size:]
    for number, text in enumerate(texts if len(run) == size else []):
        ends = [end for end in range(size, len(text)) if text[end - size : end] == run]
        if ends:
            rest = text[ends[-1] :]
            return [rest[i % len(rest)] for i in range(most)] if number == 0 else rest[:most]
    return []


@given(
    texts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=5),
    most=st.integers(1, 9),
    block=st.sampled_from([1, 7, 256]),
)
def test_suffix_lookup_finds_the_latest_equal_run(
    texts: list[list[int]], most: int, block: int
) -> None:
    """Compare with a reading of the text: the latest earlier run of six equal tokens, also in other
    texts, else of three in the own text. The result does not depend on the blocks."""
    own, *others = (np.array(text, np.int32) for text in texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafters, "BLOCK", block)
        found = continuation(own, most, others).tolist()
    long, short = SIZES
    assert found == (reference(texts, long, most) or reference(texts[:1], short, most))


class FakeRequest(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_ended_texts_are_kept_for_their_namespace() -> None:
    """Check the limits on ended texts; nothing is kept if sharing is off or after a reset."""

    def make_request(tokens: list[int], namespace: str | None) -> Any:
        own = np.array(tokens, np.int32)
        return FakeRequest(tokens=own, namespace=namespace, request_id=object())

    def draft(drafter: SuffixDrafter, request: Any) -> list[int]:
        (found,) = drafter.propose([(request, 3)])
        drafter.forget(request)
        return found.tolist()

    text = [*range(10), *range(50, 60)]
    for shares in (True, False):
        drafter = SuffixDrafter(shares=shares)
        assert draft(drafter, make_request(text, "a")) == []
        assert draft(drafter, make_request(text[:10], "b")) == []
        assert draft(drafter, make_request(text[:10], "a")) == [50, 51, 52] * shares
    drafter = SuffixDrafter(shares=True)
    draft(drafter, make_request(text, "a"))
    drafter.reset()
    assert draft(drafter, make_request(text[:10], "a")) == []
    draft(drafter, make_request(text, "a"))
    draft(drafter, make_request([7] * (MAX_KEPT - 1), "a"))
    assert draft(drafter, make_request(text[:10], "a")) == [], "long texts displace it"
    draft(drafter, make_request(text, "a"))
    for number in range(100, 100 + MAX_TEXTS):
        draft(drafter, make_request([number] * 5, "b"))
    assert draft(drafter, make_request(text[:10], "a")) == [], "newer texts displaced it"


def test_a_drafter_that_finds_nothing_is_called_later_each_time() -> None:
    length, pauses = DraftLength(8), list[int]()
    for _ in range(5):
        length.learn(100, 0, 0)
        pauses.append(length.wakes - 100)
    assert pauses == [1, 2, 4, 8, 8]


def test_a_drafter_that_is_never_right_drafts_rarely() -> None:
    length, tried = DraftLength(8), list[tuple[int, int]]()
    for step in range(20_000):
        if length.wakes <= step and length.length:
            tried.append((step, length.length))
            length.learn(step, length.length, 0)
    assert tried[:2] == [(0, 4), (1, 2)] and all(length == 1 for _, length in tried[2:])
    assert tried[2][0] - tried[1][0] == MIN_REST + 1, "a new request's drafter pauses"
    assert tried[-1][0] - tried[-2][0] == MAX_REST + 1
    assert len(tried) < 60
