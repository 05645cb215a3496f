"""Tests of workload generators: published sizes and ideal hit rates, determinism, arrival order."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from itertools import combinations, islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.runs.grid import identity_of
from hybridcache.lab.traces.arrivals import Pauses, Starts, interleave, parse_starts
from hybridcache.lab.traces.generators import GENERATORS, IMAGES, conversations
from hybridcache.lab.traces.statistics import trace_stats
from hybridcache.lab.traces.trace import Trace, TraceRequest
from hybridcache.radix.tokens import common_prefix_len
from tests.refused import refused

# (requests, ideal token hit rate) as published, with another random stream.
PUBLISHED = {
    "chat": (320, 0.918),
    "few-shot": (320, 0.665),
    "agent": (320, 0.960),
    "branch": (160, 0.928),
    "resend": (120, 0.666),
    "short": (120, 0.859),
}
SMALL: dict[str, dict[str, int]] = {
    "conversations": {"num_conversations": 100},
    "sharegpt-like": {"requests": 100},
    "retries": {"questions": 10, "trials": 2},
    "live-agents": {"sessions": 3},
    "phased-heads": {"phases": 2},
}


def small(name: str) -> Trace:
    return GENERATORS[name](**SMALL.get(name, {}))


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_number_of_requests_and_ideal_hit_rate_match_the_published(name: str) -> None:
    requests, ideal = PUBLISHED[name]
    stats = trace_stats(GENERATORS[name]())
    assert stats.num_requests == requests
    assert stats.ideal_hit_rate == pytest.approx(ideal, abs=0.004)


def test_agents_repeat_a_head_that_no_boundary_declares() -> None:
    requests = list(GENERATORS["retries"](questions=9, trials=2, heads=2, parallel=3))
    first = {one.session: one for one in reversed(requests)}
    assert sorted(first) == [*range(18)]
    for number, one in first.items():
        assert one.boundaries == (len(one.tokens),), "the end of the question, not of the head"
        assert np.array_equal(one.tokens, first[(number + 9) % 18].tokens), "it is tried twice"
    shared = [common_prefix_len(first[1].tokens, first[other].tokens) for other in (2, 3, 10)]
    assert shared == [0, 1600, len(first[1].tokens)]


def test_images_of_equal_length_come_in_several_conversations_and_share_nothing() -> None:
    requests = list(GENERATORS["image-chat"]())
    begun = [one.tokens for one in requests[:40] if one.tokens[500] >= IMAGES]
    sizes = {int(of[500]): int((of == of[500]).sum()) for of in begun}
    seen = {one: {of.session for of in requests if one in of.tokens} for one in sizes}
    assert {*sizes.values()} == {256, 1024} and min(map(len, seen.values())) > 3
    pairs = [pair for pair in combinations(begun, 2) if np.array_equal(*(of[:500] for of in pair))]
    for one, two in pairs:
        is_same = one[500] == two[500]
        assert common_prefix_len(one, two) == 500 + is_same * sizes[int(one[500])]
    assert len({one[500] == two[500] for one, two in pairs}) == 2


def test_live_agents_are_few_and_come_back_after_a_few_requests_of_others() -> None:
    requests = list(GENERATORS["live-agents"](sessions=8))
    names = [request.session for request in requests]
    last = {request.session: request for request in requests}
    assert all(20_000 - 2_000 < len(one.tokens) <= 40_000 for one in last.values())
    places = {name: [at for at, one in enumerate(names) if one == name] for name in last}
    live = [sum(of[0] <= at <= of[-1] for of in places.values()) for at in range(len(names))]
    assert max(live) == 5 and len(places) == 8
    gaps = sorted(two - one for of in places.values() for one, two in pairwise(of))
    assert [gaps[len(gaps) * part // 4] for part in (1, 2, 3)] == [3, 4, 6]
    paces = {name: np.diff([requests[at].timestamp_s for at in of]) for name, of in places.items()}
    for pace in paces.values():
        assert pace.max() < 1.5 * pace.min(), "the think time is that of the session"
    assert min(pace.mean() for pace in paces.values()) * 2 < max(map(np.mean, paces.values()))


def test_prompts_of_an_odd_phase_fork_behind_the_head_only() -> None:
    requests = list(GENERATORS["phased-heads"](phases=2, questions=5, chats=3, turns=2))
    assert len(requests) == 2 * (5 + 3 * 2)
    first, chats, later = requests[:5], requests[5:11], requests[11:16]
    head = first[0].tokens[:2500]
    for one in (*first, *later):
        assert one.boundaries == (len(one.tokens),), "nothing declares the head"
        assert np.array_equal(one.tokens[:2500], head)
    assert all(common_prefix_len(one.tokens, head) == 0 for one in chats)
    shared = [max(common_prefix_len(one.tokens, other.tokens) for other in first) for one in later]
    assert min(shared) > 2500 and len({one.session for one in requests}) == 16


def test_number_of_live_conversations_is_limited() -> None:
    names = [request.session for request in conversations(live=8, num_conversations=30)]
    live = [len({*names[: at + 1]} & {*names[at:]}) for at in range(len(names))]
    assert max(live) == 8 and len({*names}) == 30


@pytest.mark.full("chat", "short", "agent-tree")
@pytest.mark.parametrize("name", list(GENERATORS))
def test_generators_are_deterministic_and_can_be_pickled(name: str) -> None:
    trace = small(name)
    again = pickle.loads(pickle.dumps(trace))
    other_seed = list(GENERATORS[name](seed=1, **SMALL.get(name, {})))
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


@pytest.mark.parametrize("starts", ["poisson:2", "fixed:2", "bursts:2:4"])
def test_arrivals_have_the_given_rate(starts: str) -> None:
    times = list(islice(parse_starts(starts).times(np.random.default_rng(0)), 4000))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000, rel=0.1)


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
def test_interleaving_keeps_each_session_in_order(
    lengths: list[list[int]], pauses: Pauses | None, seed: int
) -> None:
    sessions = [session(number, answers) for number, answers in enumerate(lengths)]
    merged = list(interleave(sessions, Starts("poisson", 0.5), pauses, seed=seed))
    assert len(merged) == sum(map(len, lengths))
    assert all(one.timestamp_s <= two.timestamp_s for one, two in pairwise(merged))
    for number, answers in enumerate(lengths):
        turns = [request for request in merged if request.session == number]
        assert [len(turn.output) for turn in turns] == answers


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_a_generator_binds_its_options_at_once(name):
    refused("unexpected keyword argument 'sed'", GENERATORS[name], sed=1, kind=TypeError)
    assert inspect.signature(GENERATORS[name]).return_annotation == "Trace"
    trace = GENERATORS[name]()
    assert not list(trace.head(0))
    assert identity_of(trace) == identity_of(GENERATORS[name](seed=0))
    assert identity_of(trace) != identity_of(replace(trace, unit=trace.unit + 1))
