"""Workloads: the stated sizes and ideal hit rates, the same for the same seed, and arrivals in
order."""

from __future__ import annotations

import pickle
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.arrivals import (
    Bursts,
    Fixed,
    Pauses,
    Poisson,
    interleave,
    parse_starts,
)
from hybridcache.lab.generators import GENERATORS, conversations
from hybridcache.lab.trace import Trace, TraceRequest
from hybridcache.lab.trace_stats import trace_stats

# Ideal token hit rates as published for these workloads (another random stream).
STATED = {
    "chat": (320, 0.918),
    "few-shot": (320, 0.665),
    "agent": (320, 0.960),
    "branch": (160, 0.928),
    "resend": (120, 0.666),
    "short": (120, 0.859),
}
SMALL = {"conversations": {"num_conversations": 100}, "sharegpt-like": {"requests": 100}}


def small(word: str) -> Trace:
    return GENERATORS[word](**SMALL.get(word, {}))


@pytest.mark.parametrize("word", list(STATED))
def test_stated_requests_and_ideal_hit_rate(word: str) -> None:
    requests, ideal = STATED[word]
    stats = trace_stats(GENERATORS[word]())
    assert stats.num_requests == requests
    assert stats.ideal_hit_rate == pytest.approx(ideal, abs=0.004)


def test_tree_cost_workload_is_the_stated_one() -> None:
    requests = list(conversations(live=64))
    assert len(requests) == 10_000
    assert sum(len(request.tokens) for request in requests) == pytest.approx(21.07e6, rel=0.01)


def test_at_most_so_many_conversations_are_live() -> None:
    requests = list(conversations(live=8, num_conversations=30))
    last = {request.session: number for number, request in enumerate(requests)}
    first: dict[object, int] = {}
    for number, request in enumerate(requests):
        first.setdefault(request.session, number)
    for number in range(len(requests)):
        assert sum(first[s] <= number <= last[s] for s in first) <= 8


@pytest.mark.full("chat", "short", "agent-tree")
@pytest.mark.parametrize("word", list(GENERATORS))
def test_a_generator_repeats_itself_and_travels_between_processes(word: str) -> None:
    trace = small(word)
    again = pickle.loads(pickle.dumps(trace))
    other_seed = list(GENERATORS[word](seed=1, **SMALL.get(word, {})))
    requests = list(trace)
    for one, two in zip(requests, again, strict=True):
        assert (one.tokens == two.tokens).all() and (one.output == two.output).all()
        assert one.timestamp_s == two.timestamp_s and one.session == two.session
    assert not np.array_equal(requests[0].tokens, other_seed[0].tokens)
    assert all(one.timestamp_s <= two.timestamp_s for one, two in pairwise(requests))
    for request in requests:
        assert request.tokens.dtype == np.int32 and request.tokens.min() >= 0
        assert list(request.boundaries) == sorted(request.boundaries)
        assert all(0 < position <= len(request.tokens) for position in request.boundaries)


def test_thoughts_are_short_prompts_that_branch() -> None:
    """Of which whole pages of 64 tokens leave a tenth out."""
    requests = list(GENERATORS["tree-of-thoughts"]())
    stats = trace_stats(GENERATORS["tree-of-thoughts"]())
    assert stats.num_requests == 12 * (1 + 5 + 5 + 3 * 8 * (1 + 5 + 5)) == 3300
    assert 300 < stats.prompt.mean < 360 and stats.prompt.largest < 450
    assert stats.ideal_hit_rate == pytest.approx(0.965, abs=0.005)
    assert stats.ideal_by_page[64] / stats.prompt_tokens == pytest.approx(0.87, abs=0.02)
    judged = [request for request in requests if len(request.output) == 8]
    for first, *again in (judged[i : i + 3] for i in range(0, len(judged), 3)):
        assert all(np.array_equal(first.tokens, other.tokens) for other in again)


def test_diffuse_and_uniform_cuts_differ_as_their_names_say() -> None:
    def deviation(word: str) -> float:
        return float(np.std([len(request.tokens) for request in GENERATORS[word]()]))

    assert deviation("diffuse-cut-points") < 0.5 * deviation("uniform-adversary")


@pytest.mark.parametrize("starts", [Poisson(2.0), Fixed(2.0), Bursts(2.0, 4)])
def test_arrival_rates(starts: Poisson | Fixed | Bursts) -> None:
    times = list(islice(starts.times(np.random.default_rng(0)), 4000))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.1)


def test_bursts_come_together() -> None:
    times = list(islice(Bursts(1.0, 5).times(np.random.default_rng(0)), 20))
    assert len(set(times)) == 4


def test_starts_by_word() -> None:
    assert parse_starts("poisson:0.5") == Poisson(0.5)
    assert parse_starts("bursts:2:32") == Bursts(2.0, 32)
    with pytest.raises(ValueError, match="sometimes"):
        parse_starts("sometimes:1")


def session(number: int, lengths: list[int]) -> list[TraceRequest]:
    tokens = np.full(1, number, np.int32)
    answers = [np.zeros(length, np.int32) for length in lengths]
    return [
        TraceRequest(float(turn), number, None, tokens, answer)
        for turn, answer in enumerate(answers)
    ]


@given(
    st.lists(st.lists(st.integers(0, 50), max_size=5), max_size=12),
    st.sampled_from([None, Pauses(3.0), Pauses(0.0)]),
    st.integers(0, 3),
)
def test_interleaving_keeps_every_session_in_order(
    lengths: list[list[int]], pauses: Pauses | None, seed: int
) -> None:
    sessions = [session(number, answers) for number, answers in enumerate(lengths)]
    merged = list(interleave(sessions, Poisson(0.5), pauses, seed=seed))
    assert len(merged) == sum(map(len, lengths))
    assert all(one.timestamp_s <= two.timestamp_s for one, two in pairwise(merged))
    for number, answers in enumerate(lengths):
        turns = [request for request in merged if request.session == number]
        assert [len(turn.output) for turn in turns] == answers


def test_a_pause_covers_writing_and_thinking() -> None:
    [first, second] = interleave([session(0, [100, 0])], Fixed(1.0), Pauses(0.0, 1.0, 50.0))
    assert second.timestamp_s - first.timestamp_s == pytest.approx(2.0)
