"""Tests of drafters: suffix lookup and its memory, draft lengths, and sharing a step between
requests."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import RequestSpec
from engine.plugins.speculation import suffix
from engine.plugins.speculation.draft_length import (
    MAX_GAP,
    MAX_IDLE,
    MAX_REST,
    MIN_REST,
    DraftLength,
    GlobalAcceptance,
)
from engine.plugins.speculation.draft_manager import Drafting, Source
from engine.plugins.speculation.suffix import (
    BYTES_PER_TOKEN,
    MAX_KEPT,
    MAX_READ,
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


def test_a_step_reads_at_most_one_piece_of_long_texts() -> None:
    """Check the limit over all requests; the drafter returns None until a text is read."""
    drafter = SuffixDrafter(shares=True, memory=IndexMemory(1 << 22))
    ids = np.random.default_rng(0).integers(0, 1000, 20_000).astype(np.int32)
    texts = [np.concatenate([ids, ids[:number]]) for number in (10, 20)]
    running: list[Any] = [FakeRequest(tokens=text, namespace=None) for text in texts]
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        inner = SuffixIndex.read

        def spy(index: SuffixIndex, tokens: Any, most: int | None = None) -> int:
            assert most is not None
            read.append(inner(index, tokens, most))
            return read[-1]

        patch.setattr(SuffixIndex, "read", spy)
        for step in range(100):
            read.clear()
            found = drafter.propose([(one, 3) for one in running])
            assert sum(read) <= MAX_READ
            if step == 0:
                assert list(found) == [None, None]
            if all(one is not None for one in found):
                break
    assert step == sum(map(len, texts)) // MAX_READ
    assert [one.tolist() for one in found if one is not None] == [
        ids[number:][:3].tolist() for number in (10, 20)
    ]


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


def test_the_draft_length_recovers_after_an_accepted_draft() -> None:
    length = DraftLength(8)
    assert len(drafts_in(length, range(MAX_MISSES))) == MAX_MISSES
    first = MAX_MISSES + MIN_REST
    lengths = [1, 2, 4, 8, 8]
    assert drafts_in(length, range(MAX_MISSES, first + 5), 8) == [
        (first + rank, length) for rank, length in enumerate(lengths)
    ]
    length.learn(99, 8, 3)
    assert length.length == 4


def test_a_drafter_without_drafts_is_called_less_often() -> None:
    length = DraftLength(8)
    steps = [step for step, _ in drafts_in(length, range(24), None)]
    assert steps == [0, 1, 3, 7, 15, 23]
    assert drafts_in(length, range(24, 24 + MAX_IDLE), 2) == [(31, 4)]
    assert length.length == 3
    length.learn(32, 0, 0)
    assert length.wakes == 33 and length.length == 3


def test_a_new_request_begins_with_the_acceptance_of_others() -> None:
    acceptance = GlobalAcceptance()
    trials = [drafts_in(DraftLength(3, acceptance), range(200)) for _ in range(9)]
    assert trials[0][0][1] > 1 and trials[-1] == [(0, 1), (17, 1), (50, 1), (115, 1)]
    # A request that is always right is found at its first draft, which raises the acceptance of the
    # next request.
    found = drafts_in(DraftLength(3, acceptance), range(60), 9)
    assert found[0] == (0, 1) and len(found) == 60 and found[-1][1] >= 3
    assert DraftLength(3, acceptance).length > 1


def test_trials_of_all_requests_and_drafters_are_spread_over_steps() -> None:
    """Check that requests and drafters share the steps between trials, and stop sharing once one is
    right."""
    first, others = Ones(), Ones("others")
    sources = [
        Source(drafter, partial(DraftLength, 4, GlobalAcceptance())) for drafter in (first, others)
    ]
    drafting = Drafting(sources, max_verified=50)
    running, tried, sources_tried = requests(3), [], Counter[str]()
    for step in range(1, 1200):
        if step % 40 == 0:
            drafting.forget(running.pop(0))
            running += requests(1)
        expected, before = drafting.may_guess(running), first.num_asked + others.num_asked
        drafts = drafting.propose([(request, 9) for request in running])
        assert expected == (first.num_asked + others.num_asked > before)
        for request, draft in drafts.items():
            drafting.learn(request, draft, int(step > 900), 1 + (step > 900))
            sources_tried[draft.source] += 300 < step < 900
        tried += [step] * bool(drafts)
    wrong = [step for step in tried if 300 < step < 900]
    assert {b - a for a, b in pairwise(wrong)} == {MAX_GAP}
    assert min(sources_tried.values()) > sources_tried.total() / 3
    right = [step for step in tried if step > 900]
    assert 1200 - right[0] == len(right), "an accepted draft ends the trials"


class Ones:
    """Drafter that returns as many ones as it may."""

    def __init__(self, name: str = "ones") -> None:
        self.name, self.num_asked = name, 0

    def propose(self, wanted: Any) -> list[np.ndarray]:
        self.num_asked += len(wanted)
        return [np.ones(most, np.int32) for _, most in wanted]

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


class Nothing(Ones):
    def propose(self, wanted: Any) -> list[np.ndarray]:
        return [np.ones(0, np.int32) for _ in wanted]


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


def test_drafts_get_shorter_as_a_step_fills() -> None:
    for count, lengths in [(1, [4]), (4, [4] * 4), (6, [2] * 6), (10, [1] * 10), (20, [1] * 10)]:
        sources = [
            Source(drafter, partial(DraftLength, 4)) for drafter in (Nothing("nothing"), Ones())
        ]
        drafting = Drafting(sources, max_verified=20)
        drafts = drafting.propose([(request, 50) for request in requests(count)])
        assert [len(draft.tokens) for draft in drafts.values()] == lengths
        assert {draft.source for draft in drafts.values()} == {"ones"}
    drafting = Drafting([Source(Ones(), partial(DraftLength, 4))], max_verified=20)
    one, other = requests(2)
    drafts = drafting.propose([(one, 0), (other, 2)])
    assert [len(draft.tokens) for draft in drafts.values()] == [2] and other in drafts
    drafting.learn(other, drafts[other], 1, 2)
    assert other.drafts.acceptance_len == 2.0
    assert other.drafts.drafted == {("ones", 1): 1, ("ones", 2): 1}
    assert other.drafts.accepted == {("ones", 1): 1}
    assert drafting.requests == {one, other}
    drafting.forget(one)
    assert drafting.requests == {other}
