"""Admission policies, compared with plain references, and custom admission policies."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.admission import (
    FLOOR,
    LOOK_AHEAD,
    MOST_WAIT_S,
    TOKENS_A_PASS,
    AdmissionPolicy,
    Load,
    Session,
    SessionGate,
    WaitingRequest,
)
from hybridcache.policies.registry import make_admission


@dataclass(eq=False)
class FakeRequest:
    """Request with the fields that policies see."""

    arrival: int
    session: Session
    num_tokens: int = 1000
    cached: int = 0
    arrival_s: float = inf
    namespace: Hashable = None
    max_len: int = 2000
    num_preemptions: int = 0
    num_passes: int = 0
    is_running: bool = False
    is_prefilling: bool = True
    cached_len: int = 0
    evicted_len: int | None = None

    @property
    def lost_len(self) -> int:
        """Evicted tokens: by default the whole part of the prompt that is not cached."""
        return self.num_tokens - self.cached_len if self.evicted_len is None else self.evicted_len


@dataclass
class FakeLoad:
    """Server load with the fields that policies see."""

    now_s: float = 0.0
    running: Sequence[Any] = ()
    max_running: int = 16
    open_sessions: Sequence[Session] = ()
    idle_sessions: Sequence[Session] = ()
    session_share: float = 0.0
    """Fraction of the memory that each session takes."""
    matched: list[WaitingRequest] = field(default_factory=list)

    def cached_len(self, request: FakeRequest) -> int:
        self.matched.append(request)
        return request.cached

    def footprint(self, session: Session) -> float:
        return self.session_share


def session(number: int, num_requests: int = 2, known_len: int = 1000) -> Session:
    new = Session(number, None, 0.0)
    new.num_requests, new.known_len = num_requests, known_len
    return new


def waiting(
    cached: Iterable[int], passes: Iterable[int] | None = None, num_tokens: int = 1000
) -> list[FakeRequest]:
    lengths = list(cached)
    counts = [0] * len(lengths) if passes is None else list(passes)
    return [
        FakeRequest(i, session(i), num_tokens, length, num_passes=count)
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]


def arrivals(ordered: Iterable[WaitingRequest]) -> list[int]:
    return [request.arrival for request in ordered]


queues = st.lists(
    st.tuples(st.integers(0, 900), st.integers(0, 30), st.integers(901, 2000)), max_size=150
)


@given(queues)
def test_ranking_policies_sort_the_oldest_requests_stably(
    queue: list[tuple[int, int, int]],
) -> None:
    requests = [
        FakeRequest(i, session(i), length, cached, num_passes=passes)
        for i, (cached, passes, length) in enumerate(queue)
    ]
    near, far = requests[:LOOK_AHEAD], requests[LOOK_AHEAD:]
    references = {
        "oldest": requests,
        "cached-first": [
            *sorted(near, key=lambda r: r.num_tokens - r.cached - TOKENS_A_PASS * r.num_passes),
            *far,
        ],
        "longest-match": [
            *sorted(near, key=lambda r: -(r.cached + TOKENS_A_PASS * r.num_passes)),
            *far,
        ],
    }
    for name, expected in references.items():
        actual = make_admission(name).order(requests, FakeLoad())
        assert arrivals(actual) == arrivals(expected), name


@pytest.mark.parametrize("name", ["cached-first", "longest-match"])
def test_a_cold_request_is_overtaken_a_bounded_number_of_times(name: str) -> None:
    """Fully cached requests keep arriving, and one is admitted each time."""
    policy, load, length = make_admission(name), FakeLoad(), 4096
    cold = FakeRequest(0, session(0), length)
    queue, num_admitted = [cold], 0
    while cold in queue:
        num_admitted += 1
        assert num_admitted < 1000
        queue.append(FakeRequest(num_admitted, session(num_admitted), length, length - 1))
        first = next(iter(policy.order(queue, load)))
        for older in queue[: queue.index(first)]:
            older.num_passes += 1
        queue.remove(first)
    assert 1 < num_admitted <= length // TOKENS_A_PASS + 2


# --- sessions -------------------------------------------------------------------------------------


def congest(policy: AdmissionPolicy, load: FakeLoad, lost: int = 100_000) -> None:
    """Report constant prompt computation and one large loss to ``policy``."""
    for _ in range(100):
        load.now_s += 1.0
        policy.computed(8000, 1.0, load)
    request = FakeRequest(-1, session(-1, known_len=lost), lost, is_running=True)
    policy.admitted(request, load)
    request.is_running = False
    policy.left(request, load)


def test_other_sessions_enter_one_by_one_after_the_debt_is_repaid() -> None:
    policy, load = make_admission("sessions"), FakeLoad(running=[None])
    congest(policy, load)
    requests = waiting([0, 1000, 0, 600])  # the prefixes of 0 and 2 were evicted
    requests[2].arrival_s = 1e6  # before that of request 0
    assert arrivals(policy.order(requests, load)) == [1, 3]
    wakes_at_s = policy.wakes_at_s
    assert wakes_at_s is not None and wakes_at_s > load.now_s
    load.now_s = wakes_at_s - 1e-3
    assert arrivals(policy.order(requests, load)) == [1, 3]
    load.now_s = wakes_at_s + 1e-6
    assert arrivals(policy.order(requests, load)) == [1, 3, 2]
    entering = requests.pop(2)
    entering.is_running = True
    policy.admitted(entering, load)
    assert arrivals(policy.order(requests, load)) == [1, 3], "two prefills entered at the same time"
    entering.is_prefilling = False
    load.now_s += 1000 / FLOOR
    assert arrivals(policy.order(requests, load)) == [0, 1, 3], (
        "the debt is repaid, but the order is not oldest first"
    )


@pytest.mark.parametrize(("pause_s", "withholds"), [(1.0, True), (50.0, False)])
def test_nothing_is_withheld_if_repeating_prompts_answers_more_requests(
    pause_s: float, withholds: bool
) -> None:
    """A session fills 0.4 of the memory for a cycle of a pause. Its prompt takes one second."""
    policy, load = make_admission("sessions"), FakeLoad(running=[None], session_share=0.4)
    for number in range(200):
        load.now_s += pause_s
        request = FakeRequest(number, session(number, num_requests=3), 8000)
        request.session.idle_since_s = load.now_s - pause_s
        request.arrival_s = load.now_s
        policy.arrived(request, load)
        policy.computed(8000, 1.0, load)
        policy.admitted(request, load)
        policy.left(request, load)
    congest(policy, load)
    cold = FakeRequest(999, session(999, num_requests=1), 8000)
    assert arrivals(policy.order([cold], load)) == ([] if withholds else [999])
    assert (float(policy.report()["worth"]) > 1) == withholds


def test_the_next_turn_of_a_session_waits_a_bounded_time() -> None:
    """The debt stays high, and resident sessions always have another request."""
    policy, load = make_admission("sessions"), FakeLoad(running=[None])
    congest(policy, load, lost=10**9)
    begun_s = load.now_s
    new = FakeRequest(0, session(0, num_requests=1), arrival_s=begun_s)
    later, lost, resident = (
        FakeRequest(number, session(number), cached=cached, arrival_s=begun_s + wait_s)
        for number, cached, wait_s in ((1, 0, 1.0), (2, 0, 0.0), (3, 1000, 0.0))
    )
    queue = [new, later, lost, resident]
    load.now_s = begun_s + MOST_WAIT_S - 0.1
    assert arrivals(policy.order(queue, load)) == [3]
    assert policy.wakes_at_s == pytest.approx(begun_s + MOST_WAIT_S)
    load.now_s = begun_s + MOST_WAIT_S
    assert arrivals(policy.order(queue, load)) == [2, 3]
    lost.is_running = True
    policy.admitted(lost, load)
    assert arrivals(policy.order([new, later, resident], load)) == [3], "one prefill at a time"
    lost.is_prefilling = False
    load.now_s += 1.0
    assert arrivals(policy.order([new, later, resident], load)) == [1, 3]


def test_further_choices_of_an_admitted_prompt_are_not_withheld() -> None:
    policy, load = SessionGate(), FakeLoad(running=[None])
    congest(policy, load, lost=80_000)
    for one in (session(0, num_requests=1, known_len=0), session(1)):
        choices = [FakeRequest(i, one) for i in range(3)]
        assert arrivals(policy.order(choices, load)) == []
        policy.admitted(choices[0], load)
        one.num_admitted = 1
        debt = policy.report()["debt_s"]
        assert arrivals(policy.order(choices[1:], load)) == [1, 2]
        policy.admitted(choices[1], load)
        assert policy.report()["debt_s"] == debt
        assert choices[1] in policy._entered, "a running choice is no resident session"


# --- Custom policies ------------------------------------------------------------------------------


class NewestFirst(AdmissionPolicy):
    def __init__(self, keep: int = 0) -> None:
        self.keep = keep

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        return reversed(waiting[self.keep :])


def test_a_custom_admission_policy_orders_requests() -> None:
    requests = waiting([0, 0, 0])
    for policy, found in ((f"{__name__}:NewestFirst(keep=1)", [2, 1]), (NewestFirst, [2, 1, 0])):
        assert arrivals(make_admission(policy).order(requests, FakeLoad())) == found
    with pytest.raises(ValueError, match="return waiting requests, each at most once"):
        make_admission(type("Own", (NewestFirst,), {"order": lambda *_: [1]})).order(requests, None)
