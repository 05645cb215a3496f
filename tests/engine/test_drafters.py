"""Tests of drafters: suffix lookup and its memory, draft lengths, and sharing a step between
requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import RequestSpec
from engine.plugins.speculation import suffix
from engine.plugins.speculation.draft_length import (
    MAX_REST,
    MIN_REST,
    DraftLength,
)
from engine.plugins.speculation.suffix import (
    BYTES_PER_TOKEN,
    MAX_KEPT,
    MAX_TEXTS,
    SIZES,
    IndexMemory,
    SuffixDrafter,
    SuffixIndex,
)
from engine.requests.request import Request


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 60), max_size=4),
    piece=st.integers(1, 40),
    max_tokens=st.integers(1, 9),
    first_tokens=st.sampled_from([2, 8, 256]),
)
def test_suffix_lookup_finds_the_latest_equal_run(
    tokens: list[int], cuts: list[int], piece: int, max_tokens: int, first_tokens: int
) -> None:
    """Compare with a reading of the text: the latest earlier run of six equal tokens, else of
    three.

    The result does not depend on how the text grew or in which pieces it was read.
    """
    index, ids = SuffixIndex(), np.array(tokens, np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "FIRST_TOKENS", first_tokens)
        patch.setattr(suffix, "MAX_TOKENS", 16)
        for cut in [*sorted(cuts), len(ids)]:
            while not index.has_read(ids[: min(cut, len(ids))]):
                assert 0 < index.read(ids[: min(cut, len(ids))], piece) <= piece
    expected: list[int] = []
    for size in SIZES:
        ends = [
            end
            for end in range(size, len(tokens))
            if len(tokens) >= size and tokens[end - size : end] == tokens[-size:]
        ]
        if ends:
            period = tokens[ends[-1] :]
            expected = [period[i % len(period)] for i in range(max_tokens)]
            break
    assert index.continuation(ids, max_tokens).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=30), min_size=2, max_size=5))
def test_other_texts_are_looked_up_if_the_own_text_has_no_long_match(
    texts: list[list[int]],
) -> None:
    """Check that the first text with six equal tokens is used; three are not enough in other
    texts."""
    others = []
    for text in texts[1:]:
        other = SuffixIndex()
        other.text = np.array(text, np.int32)
        other.read(other.text)
        others.append(other)
    own, most = np.array(texts[0], np.int32), 4
    index = SuffixIndex()
    index.read(own)
    alone = index.continuation(own, most).tolist()
    size = SIZES[0]

    def behind(text: list[int]) -> list[int]:
        ends = [
            end
            for end in range(size, len(text))
            if len(own) >= size and text[end - size : end] == texts[0][-size:]
        ]
        return text[ends[-1] :][:most] if ends else []

    expected = alone
    if not behind(texts[0]):
        expected = next(filter(None, map(behind, texts[1:])), alone)
    assert index.continuation(own, most, others).tolist() == expected


class FakeRequest(SimpleNamespace):
    __hash__ = object.__hash__  # type: ignore[assignment]


def test_ended_texts_are_kept_for_their_namespace() -> None:
    """Check the limits on ended texts; nothing is kept if sharing is off or after a reset."""

    def make_request(tokens: list[int], namespace: str | None) -> Any:
        return FakeRequest(tokens=np.array(tokens, np.int32), namespace=namespace)

    def draft(drafter: SuffixDrafter, request: Any) -> list[int]:
        while (found := drafter.propose([(request, 3)])[0]) is None:
            pass
        drafter.forget(request)
        return found.tolist()

    text = [*range(10), *range(50, 60)]
    for shares in (True, False):
        drafter = SuffixDrafter(shares=shares, memory=IndexMemory(1 << 22))
        assert draft(drafter, make_request(text, "a")) == []
        assert draft(drafter, make_request(text[:10], "b")) == []
        assert draft(drafter, make_request(text[:10], "a")) == [50, 51, 52] * shares
    memory = IndexMemory(1 << 22)
    drafter = SuffixDrafter(shares=True, memory=memory)
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
    drafter.reset()
    assert memory.used_bytes == 0


def test_the_memory_of_indices_is_bounded() -> None:
    """Check that a text that does not fit is not indexed, and that ended texts are displaced
    first."""
    memory = IndexMemory(BYTES_PER_TOKEN * 1024)
    drafter = SuffixDrafter(shares=True, memory=memory)
    ids = np.arange(3000, dtype=np.int32) % 1000
    ended, running, long = (
        FakeRequest(tokens=ids[:size], namespace="a") for size in (500, 700, 3000)
    )
    drafter.propose([(ended, 3)])
    drafter.forget(ended)
    assert memory.used_bytes == BYTES_PER_TOKEN * 512
    drafter.propose([(running, 3)])
    assert memory.used_bytes == BYTES_PER_TOKEN * 1024, "the ended text was displaced"
    for _ in range(5):
        (found,) = drafter.propose([(long, 3)])
        assert found is not None and not len(found)
    drafter.forget(running)
    for _ in range(5):
        drafter.propose([(long, 3)])
        assert memory.used_bytes <= memory.max_bytes
    drafter.forget(long)
    drafter.reset()
    assert memory.used_bytes == 0


def drafts_in(length: DraftLength, steps: range, right: int | None = 0) -> list[tuple[int, int]]:
    """Return (step, draft length) of the steps with a draft.

    ``right``: at most that many tokens of each draft are accepted, or None if there is no draft.
    """
    found = []
    for step in steps:
        if length.wakes <= step and length.length:
            found.append((step, length.length))
            drafted = 0 if right is None else length.length
            length.learn(step, drafted, min(drafted, right or 0))
    return found


MAX_MISSES = 2
"""Drafts in a row from which no token is accepted, after which a new request's drafter pauses."""


def test_a_drafter_that_is_never_right_drafts_rarely() -> None:
    tried = drafts_in(DraftLength(8), range(20_000))
    assert tried[:2] == [(0, 4), (1, 2)] and all(length == 1 for _, length in tried[2:])
    assert tried[MAX_MISSES][0] - tried[MAX_MISSES - 1][0] == MIN_REST + 1
    assert tried[-1][0] - tried[-2][0] == MAX_REST + 1
    assert len(tried) < 60


def requests(count: int) -> list[Request]:
    return [
        Request(
            RequestSpec([1, 2], request_id=f"request-{i}"),
            arrival=i,
            arrival_s=0.0,
            max_len=99,
            seed=0,
        )
        for i in range(count)
    ]
